"""Photos to codes of a generator.

    python -m jaxstyle.invert me.jpg --out me.npz
    python -m jaxstyle.invert photos/ --encoder weights/e4e --weights weights/ffhq

By optimisation (the default; needs no encoder): a code is moved until the generator's
picture resembles the photo, in LPIPS and in pixels (the projector of StyleGAN2, Karras
et al., arXiv 1912.04958, appendix D, noise planes staying as they are). Steps and
pulls are measured in standard deviations of w, so the defaults fit any generator.

- `--space w_plus`: one code a row, for photos. The first third of the steps moves a
  single w, pulled towards the average one; then every row may leave it, pulled back
  towards it.
- `--space w`: that single code alone: closer to what the generator knows, farther from
  the photo.
- `--space z`: a code of the mapping network's input; `z_plus`: one a row, as w_plus is
  to w, for DualStyleGAN's exemplars.

By an encoder (pSp, e4e): one pass, no steps; ReStyle's refine their code `--restyle`
times, and with `--refine 50` a search of so many steps begins with the code. One of
drawings or of label maps takes those instead of photos; `--factors 4 8` shows a photo
made smaller to one of super-resolution. One of cars takes whole wide pictures, and so
are the results.

    python -m jaxstyle.invert maps/ --encoder runs/seg --mix-rows fine --seeds 0-4
    python -m jaxstyle.invert me.jpg --encoder weights/e4e --edit age:+3 smile:-1
    python -m jaxstyle.invert photos/ --encoder weights/psp --target photos/

Of each photo OUT gets NAME-inverted.png, and for each of `--seeds` mixed in, or for the
edits, NAME-LABEL.png. The codes `w_plus` [n, num_ws, w_dim] (and `w`, `z` or `z_plus`
where the search was in it) and the `names` are in codes.npz, those of the other outputs
in codes-LABEL.npz, for `python -m jaxstyle.generate --codes`. `--target` measures the
outputs against pictures (at 256 px, as published) and writes metrics.json.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from etils import epath
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jaxstyle import edits, images, inputs, masks, metrics, pipeline, weights
from jaxstyle.align import AlignOptions, prepare
from jaxstyle.cache import use_compilation_cache
from jaxstyle.encoding import (
    RESTYLE,
    Encoder,
    Item,
    Reading,
    encode_pictures,
    load_encoder,
    read_items,
)
from jaxstyle.errors import UserError, cli
from jaxstyle.options import parse
from jaxstyle.pipeline import resize
from jaxstyle.stylegan2 import Generator, Params, mapping

SPACES = ("w_plus", "w", "z", "z_plus")
LPIPS_SIZES = (128, 256)
CANDIDATES = 64
FRAMES = 60
INVERSION = "inversion"


@dataclasses.dataclass(frozen=True)
class Search:
    """Options of the inversion by optimisation."""

    space: Literal["w_plus", "w", "z", "z_plus"] = "w_plus"
    """Where to search: w_plus resembles the photo most, w stays what the generator
    knows, z even more so; z_plus is a z for each row."""
    steps: int = 300
    """Steps of the search; 1000 for the last bit at 1024 px."""
    search_lr: float = 0.05
    """Largest step, in standard deviations of w."""
    search_noise: float = 0.5
    """Noise on the code at the start, in standard deviations of w; it fades out over
    three quarters of the steps."""
    pull: float | None = None
    """Weight of the squared distances, in standard deviations, of the code from the
    average one (w, w_plus) and of the rows from their common code (w_plus, z_plus); of
    a search that begins with an encoder's code both from there. Less resembles the
    photo more, more takes a style better. None: what the model recommends, else 0.5."""
    mse: float = 1.0
    """Weight of the squared pixel differences beside LPIPS."""
    lpips: str = "lpips_alexnet"
    """LPIPS weights."""


DEFAULT = Search()
PULL = 0.5
_NUMBERS = ("steps", "search_lr", "search_noise", "pull", "mse")
# Share of the steps in which a single code moves, before its rows may leave it.
ROWS_FROM = 1 / 3


def for_photos(search: Search, name: str) -> Search:
    """A search in w_plus with the pull that a model recommends, if none is given.

    A generator of few pictures draws a photo that is unlike them as a smear unless its
    code stays near the average one and its rows together.

    Args:
      search: what was asked for.
      name: of the model's folder.
    """
    advice = weights.read_config(name)["metadata"].get("invert", {})
    given = search.pull is not None or search.space != "w_plus"
    if given or "pull" not in advice:
        return search
    return dataclasses.replace(search, pull=advice["pull"])


def statistics(generator: Generator, params: Params) -> tuple[Array, Array]:
    """The average code [w_dim] and the standard deviation of w's entries, a scalar."""
    z = jax.random.normal(jax.random.key(0), (4096, generator.z_dim))
    w = generator.apply({"params": params}, z, method="mapping")
    return params["w_avg"], jnp.sqrt(jnp.mean(jnp.square(w - params["w_avg"])))


def for_lpips(pictures: Array) -> Array:
    """Pictures [n, h, h, 3] at 128 to 256 px: pixels repeated, or averaged over areas.

    AlexNet sees little of a face at 64 px, its first step being four pixels wide;
    codes found on enlarged pictures have the eyes and the mouth of the photo.
    """
    n, h, w, c = pictures.shape
    factor = -(-LPIPS_SIZES[0] // h)
    if factor > 1:
        return jnp.repeat(jnp.repeat(pictures, factor, 1), factor, 2)
    factor = max(1, h // LPIPS_SIZES[1])
    shape = (n, h // factor, factor, w // factor, factor, c)
    return pictures.reshape(shape).mean((2, 4))


def _codes(point: Params, frozen: Params, space: str, noise: Array | float) -> Array:
    """The code that a search point stands for, in `space`."""
    code = point["base"] + noise
    if space.endswith("plus"):
        code = code[:, None] + point["rows"]
    return code if space[0] == "z" else frozen["origin"] + frozen["sigma"] * code


def _draw(generator: Generator, params: Params, codes: Array, space: str):
    """Pictures and `out` of codes in any of `SPACES`."""
    if space == "z_plus":
        codes, space = mapping(params["mapping"], codes), "w_plus"
    return generator.apply({"params": params}, codes, space=space)


def photo_distance(frozen: Params, image: Array, judge: nn.Module) -> Array:
    """Distance [n] of pictures [n, size, size, 3] to their targets.

    Args:
      frozen: `targets`, their `features`, the judge's parameters `lpips`, and in
        `search` the weight `mse` of the squared pixel differences.
      image: the pictures.
      judge: an `LPIPS` module; see `for_lpips`.
    """
    small = for_lpips(image)
    distance = judge.apply(
        {"params": frozen["lpips"]},
        small,
        frozen["features"],
        method="feature_distance",
    )
    pixels = jnp.mean(jnp.square(image - frozen["targets"]), (1, 2, 3))
    return distance + frozen["search"]["mse"] * pixels


@partial(
    jax.jit,
    static_argnames=("generator", "judge", "space"),
    donate_argnames=("point", "moments"),
)
def _step(point, moments, frozen, step, *, generator, judge, space):
    """One step of every picture's search; the searches do not touch each other."""
    search = frozen["search"]
    done = step / search["steps"]
    # One draw for all pictures: a picture gets the same code alone and in a batch.
    noise = jax.random.normal(
        jax.random.fold_in(frozen["key"], step), point["base"].shape[1:]
    )
    noise *= search["search_noise"] * jnp.maximum(0.0, 1 - done / 0.75) ** 2

    def loss(point):
        codes = _codes(point, frozen, space, noise)
        image, _ = _draw(generator, frozen["generator"], codes, space)
        losses = photo_distance(frozen, image, judge)
        # A z has its own length, which the mapping network takes away.
        pulled = [x for k, x in point.items() if k == "rows" or space[0] == "w"]
        losses += search["pull"] * sum(
            (jnp.mean(jnp.square(x), tuple(range(1, x.ndim))) for x in pulled),
            start=jnp.zeros(()),
        )
        return jnp.sum(losses), losses

    (_, losses), gradient = jax.value_and_grad(loss, has_aux=True)(point)
    if "rows" in point:
        moves = done >= search["rows_from"]
        gradient["rows"] = jnp.where(moves, gradient["rows"], 0.0)
    moves, moments = optax.scale_by_adam().update(gradient, moments)
    rise = jnp.minimum(1.0, (done + 1 / search["steps"]) / 0.05)
    fall = 0.5 - 0.5 * jnp.cos(jnp.pi * jnp.minimum(1.0, (1 - done) / 0.25))
    rate = search["search_lr"] * rise * fall
    point = optax.apply_updates(point, jax.tree.map(lambda m: -rate * m, moves))
    return point, moments, losses


@partial(jax.jit, static_argnames=("generator", "judge", "space"))
def _start(frozen, *, generator, judge, space):
    """Where the searches begin: in w at the origin, in z at the best of some draws."""
    n = frozen["targets"].shape[0]
    point = {}
    if space.endswith("plus"):
        width = generator.z_dim if space == "z_plus" else generator.w_dim
        point["rows"] = jnp.zeros((n, generator.num_ws, width))
    if space.startswith("w"):
        return point | {"base": jnp.zeros((n, generator.w_dim))}

    def score(z):
        image, _ = generator.apply({"params": frozen["generator"]}, z[None])
        return photo_distance(frozen, image, judge)

    z = jax.random.normal(frozen["key"], (CANDIDATES, generator.z_dim))
    return point | {"base": z[jnp.argmin(jax.lax.map(score, z), 0)]}


@partial(jax.jit, static_argnames=("generator", "space"))
def _finish(point, frozen, *, generator, space):
    """Codes without noise, and their pictures."""
    codes = _codes(point, frozen, space, 0.0)
    image, out = _draw(generator, frozen["generator"], codes, space)
    found = {k: out[k] for k in ("w", "w_plus") if k in out}
    return found | {space: codes, "images": image}


def optimize(
    generator: Generator,
    params: Params,
    judge: nn.Module,
    judge_params: Params,
    targets: Array,
    search: Search = DEFAULT,
    *,
    key: Array,
    start: Array | None = None,
    snapshots: int = 0,
    progress: bool = True,
) -> dict[str, Array]:
    """Codes whose pictures resemble the targets.

    All pictures are searched for at once, each as it would be alone: the loss is a sum
    over them, and Adam's moments are kept by entry.

    Args:
      generator: the architecture.
      params: its parameters.
      judge: an `LPIPS` module; see `for_lpips`.
      judge_params: its parameters.
      targets: [n, size, size, 3] in [-1, 1], of the generator's size; split over
        devices, so is the search.
      search: space, steps and weights.
      key: of the noise on the code, and of the first draws in z.
      start: codes to begin with and to be pulled to, w_plus [n, num_ws, w_dim], all
        rows moving from the first step on; None: the average code, or in z the best of
        some draws.
      snapshots: keep about this many codes of the way, for an animation.
      progress: show a bar with the mean loss.

    Returns:
      `w_plus` [n, num_ws, w_dim], the codes in the searched space under its name,
      `images` [n, size, size, 3], `loss` [n], and with `snapshots` `path`
      [snapshots, n, num_ws, w_dim].

    Raises:
      UserError: an unknown space, a start in another one than w_plus, fewer than 1
        step, or targets of another size.
    """
    size = generator.size
    if search.space not in SPACES:
        raise UserError(f"space is {search.space!r}; it must be {', '.join(SPACES)}")
    if start is not None and search.space != "w_plus":
        raise UserError(f"space is {search.space!r}; codes to begin with are of w_plus")
    if search.steps < 1:
        raise UserError(f"--steps is {search.steps}; it must be at least 1")
    if targets.ndim != 4 or targets.shape[1:] != (size, size, 3):
        raise UserError(
            f"targets have shape {list(targets.shape)}; this generator draws "
            f"[n, {size}, {size}, 3]"
        )
    if start is not None:
        generator.check_codes(start, "w_plus")
    targets = jnp.asarray(targets, jnp.float32)
    if search.pull is None:
        search = dataclasses.replace(search, pull=PULL)
    w_avg, sigma = jax.jit(statistics, static_argnums=0)(generator, params)
    features = jax.jit(lambda p, x: judge.apply({"params": p}, x, method="features"))(
        judge_params, for_lpips(targets)
    )
    frozen = {
        "generator": params,
        "lpips": judge_params,
        "targets": targets,
        "features": features,
        "origin": w_avg if start is None else jnp.asarray(start, jnp.float32),
        "sigma": sigma,
        "key": key,
        # As data, not constants: other values need no new compilation.
        "search": {k: np.float32(getattr(search, k)) for k in _NUMBERS}
        | {"rows_from": np.float32(ROWS_FROM if start is None else 0)},
    }
    static = {"generator": generator, "space": search.space}
    point = _start(frozen, judge=judge, **static)
    moments = optax.scale_by_adam().init(point)
    if isinstance(targets.sharding, NamedSharding):
        # Codes go where their pictures are.
        mesh, split = targets.sharding.mesh, P(*targets.sharding.spec[:1])

        def spread(x):
            return jax.device_put(x, NamedSharding(mesh, split if x.ndim else P()))

        point, moments = jax.tree.map(spread, (point, moments))
        if start is not None:
            frozen["origin"] = spread(frozen["origin"])
    kept, every = [], max(1, search.steps // max(1, snapshots))
    with tqdm(total=search.steps, desc="compile", disable=not progress) as bar:
        for step in range(search.steps):
            if snapshots and step % every == 0:
                kept.append(_finish(point, frozen, **static)["w_plus"])
            point, moments, losses = _step(
                point, moments, frozen, step, judge=judge, **static
            )
            if step == 0:
                bar.set_description("invert")
            if step % 10 == 9 or step == search.steps - 1:
                # Reading the loss waits for the device: not at every step.
                bar.set_postfix(loss=f"{float(losses.mean()):.4f}")
            bar.update()
    out = _finish(point, frozen, **static)
    if snapshots:
        out["path"] = jnp.stack([*kept, out["w_plus"]])
    return out | {"loss": losses}


def invert(
    generator: Generator,
    params: Params,
    pictures: Array,
    *,
    encoder: str | Encoder = "optimize",
    restyle: int = RESTYLE,
    refine: int = 0,
    search: Search = DEFAULT,
    key: Array,
    batch: int = 4,
    snapshots: int = 0,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Codes of aligned pictures, by optimisation or by an encoder.

    Args:
      generator: the architecture.
      params: its parameters.
      pictures: [n, h, h, 3] in [-1, 1]; resized to what is needed. For an encoder
        of drawings or label maps what that reads.
      encoder: `optimize`, or an encoder or its folder.
      restyle: refinements, if it is one of ReStyle's.
      refine: steps of a search in w_plus that begins with the encoder's codes, without
        noise on them; the pictures must then be photos.
      search: options of the optimisation; of its steps and space see `refine`.
      key: its random key.
      batch: pictures at a time, at most.
      snapshots: see `optimize`.
      progress: show bars.

    Returns:
      What `optimize` does; of an encoder alone `w_plus` and `images`.
    """
    start = None
    if encoder != "optimize":
        if isinstance(encoder, str):
            encoder = load_encoder(encoder, generator)
        start = encode_pictures(
            encoder, generator, params, pictures, restyle=restyle, batch=batch
        )
        if not refine:
            drawn = pipeline.pictures(generator, params, start, batch=batch)
            return {"w_plus": start, "images": drawn}
        search = dataclasses.replace(
            search, space="w_plus", steps=refine, search_noise=0.0
        )
    model, judge_params = weights.load(search.lpips)
    pictures = pipeline.as_read(pictures, generator.size)
    # Even batches, the last one filled up: one compilation.
    n = len(pictures)
    batch = -(-n // -(-n // batch))
    done = []
    for first in range(0, n, batch):
        rows = np.minimum(np.arange(first, first + batch), n - 1)
        found = optimize(
            generator,
            params,
            model.lpips,
            judge_params["lpips"],
            # As they are, they stay on the devices they were spread over.
            pictures if n == batch else pictures[rows],
            search,
            key=key,
            start=None if start is None else start[rows],
            snapshots=snapshots,
            progress=progress,
        )
        done.append(found)
    axes = {name: 1 if name == "path" else 0 for name in done[0]}
    return {
        name: np.concatenate([d[name] for d in done], axis).take(range(n), axis)
        for name, axis in axes.items()
    }


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of jaxstyle.invert."""

    photo: tyro.conf.Positional[epath.Path]
    """A photo, or a folder of photos; for an encoder of drawings or label maps those
    (PNG, the classes as grey values or palette indices)."""
    weights: str = ""
    """The generator: a name we ship, a converted folder, or a run. Empty: the one
    stored with the encoder, else heads."""
    encoder: str = "optimize"
    """An encoder's folder, or `optimize`, which needs none."""
    restyle: int | None = None
    """Refinements of an encoder of ReStyle's; 5 if not given."""
    refine: int = 0
    """Steps of a search that begins with the encoder's code, 50 or so; 0: none."""
    factors: tuple[int, ...] = ()
    """Super-resolution: make each photo smaller by these factors first; each gives an
    output of its own."""
    nearest_labels: bool = False
    """Resize label maps without mixing their numbers (published: mixed)."""
    mix_rows: str = ""
    """Style mixing: rows of the code that come from random ones: coarse, middle, fine,
    or numbers such as 8-17."""
    mix_alpha: float = 1.0
    """Share of the random code in those rows."""
    seeds: str = "0"
    """Seeds of the codes to mix with; 0-4 gives five outputs a photo."""
    edit: tuple[str, ...] = ()
    """Move the codes along directions, all of them added: age:+3 smile:-1.5."""
    directions: str = "directions"
    """Folder of direction files NAME.npz, as `python -m convert` writes them."""
    target: epath.Path | None = None
    """Pictures wanted, a folder with the same names (or one picture): print and write
    LPIPS, MSE and identity of the outputs."""
    perceptual_net: str = ""
    """--target: network of LPIPS; empty: LPIPS-AlexNet."""
    identity_net: str = ""
    """--target: identity network; empty: weights/arcface if there, else ours."""
    out: str = "inverted"
    """A folder, or the .npz file of the codes; pictures go beside it."""
    side_by_side: bool = False
    """Put input, target and all outputs of a photo on one sheet, NAME-inverted.png."""
    codes_only: bool = False
    """Write no pictures."""
    video: bool = False
    """Also write the way of the search as an animation."""
    limit: int | None = None
    """Take only the first so many photos of a folder."""
    batch: int = 4
    """Photos at a time."""
    seed: int = 0
    """Seed of the search; the same command gives the same codes."""
    search: Annotated[Search, tyro.conf.OmitArgPrefixes] = DEFAULT
    align: Annotated[AlignOptions, tyro.conf.OmitArgPrefixes] = AlignOptions()


def generator_name(options: Options) -> str:
    """The generator to use: as given, or what the encoder's folder holds."""
    if options.weights or options.encoder == "optimize":
        return options.weights or weights.DEFAULT
    has_one = "generator" in weights.read_config(options.encoder)["networks"]
    return options.encoder if has_one else weights.DEFAULT


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one of what is left."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def find_targets(
    target: epath.Path | None, paths: Sequence[epath.Path]
) -> dict[epath.Path, epath.Path]:
    """The picture wanted of each picture.

    Raises:
      UserError: one without.
    """
    if target is None:
        return {}
    if target.is_file() and len(paths) == 1:
        return {paths[0]: target}
    by_stem = {file.stem: file for file in images.image_files(target)}
    missing = [path.name for path in paths if path.stem not in by_stem]
    if missing:
        raise UserError(
            f"--target {target} has no picture for {len(missing)} of the {len(paths)} "
            f"given, the first {missing[0]}; the names must agree up to the ending"
        )
    return {path: by_stem[path.stem] for path in paths}


def read_target(options: Options, path: epath.Path, encoder: Encoder | None):
    """A picture wanted [256, 256, 3], or None if it cannot be used.

    Photos are aligned like those that go in; what belongs to drawings and label maps
    has their frame already.
    """
    try:
        if encoder and encoder.sees_band:
            rows = encoder.rows(metrics.SIZE)
            return inputs.values(
                inputs.band(images.open_image(path), metrics.SIZE, rows)
            )
        if encoder and encoder.inputs != "photo":
            whole = images.open_image(path)
            return inputs.values(inputs.bilinear(whole, metrics.SIZE))
        return images.to_array(prepare(path, metrics.SIZE, options.align)[0])
    except UserError as error:
        tqdm.write(f"left out of the metrics: {error}")
        return None


def read_changes(
    options: Options, generator: Generator, params: Params
) -> edits.Changes:
    """The mixes and edits that the options ask for.

    Raises:
      UserError: unknown rows, seeds or directions.
    """
    rows, mixes = [], {}
    if options.mix_rows:
        rows = masks.parse_rows(options.mix_rows, generator.num_ws, "--mix-rows")
        seeds = pipeline.parse_numbers(options.seeds, "--seeds")
        z = pipeline.seed_codes(seeds, generator.z_dim)
        codes = pipeline.to_w_plus(generator, params, z, "z")
        mixes = {f"seed{s:04d}": code for s, code in zip(seeds, codes, strict=True)}
    moves = [
        edits.parse_edit(text, options.directions, generator.num_ws, generator.w_dim)
        for text in options.edit
    ]
    return edits.Changes(mixes, rows, options.mix_alpha, moves)


def check(options: Options) -> None:
    """Refuse options that cannot be.

    Raises:
      UserError: naming the option.
    """
    for name in ("batch", "limit", "restyle"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    search = options.search
    if search.steps < 1:
        raise UserError(f"--steps is {search.steps}; it must be at least 1")
    if options.refine < 0:
        raise UserError(f"--refine is {options.refine}; it must not be negative")
    if options.encoder != "optimize":
        if options.video:
            raise UserError("--video shows a search; leave out --encoder")
        if options.refine:
            fixed = ("space", "steps", "search_noise")
            if any(getattr(search, k) != getattr(DEFAULT, k) for k in fixed):
                raise UserError(
                    f"--refine is {options.refine}: so many steps in w_plus, without "
                    "noise; leave out --space, --steps and --search-noise"
                )
        elif search != DEFAULT:
            raise UserError(
                f"--encoder {options.encoder} needs one pass and gives w_plus; leave "
                "out the options of the search"
            )
    elif options.refine:
        raise UserError(
            f"--refine is {options.refine}, but there is no code to begin with: name "
            "an --encoder"
        )
    elif options.factors or options.restyle or options.nearest_labels:
        raise UserError(
            "--factors, --restyle and --nearest-labels are for encoders; name one with "
            "--encoder"
        )
    if not options.mix_rows and (options.mix_alpha != 1 or options.seeds != "0"):
        raise UserError(
            "--mix-alpha and --seeds are about style mixing; say what to mix with "
            "--mix-rows, for example fine"
        )
    if not 0 <= options.mix_alpha <= 1:
        raise UserError(f"--mix-alpha is {options.mix_alpha}; it must be from 0 to 1")
    if options.codes_only and options.side_by_side:
        raise UserError("--codes-only writes no pictures; leave out --side-by-side")
    if options.target is None and (options.perceptual_net or options.identity_net):
        raise UserError("--perceptual-net and --identity-net judge against --target")
    if options.photo.is_dir() and (options.align.eyes or options.align.mouth):
        raise UserError(
            f"--eyes and --mouth are for one photo, but {options.photo} is a folder; "
            "use --landmarks FOLDER"
        )
    suffix = epath.Path(options.out).suffix.lower()
    if suffix in images.SUFFIXES and not epath.Path(options.out).is_dir():
        raise UserError(
            f"--out is {options.out}; it must be a folder, or an .npz file for the "
            "codes, with the pictures beside it"
        )


def check_encoder(options: Options, encoder: Encoder) -> None:
    """Refuse options that an encoder has no use for.

    Raises:
      UserError: naming the option.
    """
    what = f"encoder {options.encoder} reads {encoder.inputs}"
    if options.restyle and not encoder.refines:
        raise UserError(
            f"--restyle is {options.restyle}, but encoder {options.encoder} is none of "
            "ReStyle's: it gives its code in one pass"
        )
    if options.factors and encoder.inputs != "photo":
        raise UserError(f"--factors makes photos smaller, but {what}")
    largest = encoder.module.size // 2
    for factor in options.factors:
        if not 1 <= factor <= largest:
            raise UserError(
                f"--factors holds {factor}; it must be from 1 to {largest}, half the "
                "size of the encoder's pictures"
            )
    if len(set(options.factors)) < len(options.factors):
        raise UserError(f"--factors is {options.factors}: one is given twice")
    if options.nearest_labels and encoder.inputs != "labels":
        raise UserError(f"--nearest-labels is for label maps, but {what}")
    if options.refine and (encoder.inputs != "photo" or encoder.sees_band):
        raise UserError(f"--refine compares with photos of faces, but {what}")
    if options.refine and options.factors:
        raise UserError("--refine would bring back what --factors takes away")
    plain = dataclasses.replace(options.align, align=True) == AlignOptions()
    if encoder.sees_band and not plain:
        raise UserError(
            f"encoder {options.encoder} takes whole pictures, and looks for no face; "
            "leave out --landmarks, --eyes and --mouth"
        )
    if encoder.inputs != "photo" and not plain:
        raise UserError(
            f"{what}, taken as they are; leave out --landmarks, --eyes and --mouth"
        )


class Job(NamedTuple):
    """What all batches of a command share.

    Attributes:
      generator, params: the generator.
      encoder: or None, for the search.
      changes: to the codes.
      targets: picture wanted by path of the input.
      judges: by role; empty without targets.
    """

    generator: Generator
    params: Params
    encoder: Encoder | None
    changes: edits.Changes
    targets: dict[epath.Path, epath.Path]
    judges: dict[str, Any]


def invert_batch(
    options: Options, job: Job, items: Sequence[Item], batch: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Codes and pictures of a batch; the arrays hold `batch`, `items` may be fewer.

    Returns:
      What `invert` gives, and w_plus of the other outputs under their labels; and
      pictures [batch, size, size, 3] by label, `inversion` the first.
    """
    last = len(items) - 1
    found = invert(
        job.generator,
        job.params,
        np.stack([items[min(i, last)].x for i in range(batch)]),
        encoder=job.encoder or "optimize",
        restyle=options.restyle or RESTYLE,
        refine=options.refine,
        search=for_photos(options.search, generator_name(options)),
        key=jax.random.key(options.seed),
        batch=batch,
        snapshots=FRAMES if options.video else 0,
    )
    outputs = edits.changed_codes(found["w_plus"], job.changes)
    draw = partial(pipeline.pictures, job.generator, job.params, batch=batch)
    drawn = {label: draw(w_plus) for label, w_plus in outputs.items()}
    return found | outputs, {INVERSION: found["images"]} | drawn


def judge_batch(
    job: Job, items: Sequence[Item], wanted: Sequence[Any], drawn: Mapping[str, Array]
) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics by label, name and metric, of the items whose target could be read."""
    there = [i for i, x in enumerate(wanted) if x is not None]
    if not there:
        return {}
    n = len(drawn[INVERSION])
    full = [wanted[i] if i in there else wanted[there[0]] for i in range(len(items))]
    filled = np.stack([full[min(i, len(full) - 1)] for i in range(n)])
    values = {k: metrics.compare(job.judges, x, filled) for k, x in drawn.items()}
    return {
        label: {
            items[i].name: {name: float(column[i]) for name, column in columns.items()}
            for i in there
        }
        for label, columns in values.items()
    }


def sheet(item: Item, target: Any, outputs: Mapping[str, np.ndarray]) -> Any:
    """Input, target and outputs of a photo in a row, with labels if there are many."""
    pictures = dict(item.shown)
    if target is not None:
        pictures["target"] = target
    pictures |= outputs
    height = len(outputs[INVERSION])
    row = [
        np.asarray(resize(jnp.asarray(x)[None], height))[0] for x in pictures.values()
    ]
    labels = list(pictures) if len(pictures) > 2 else None
    return images.grid(row, len(row), column_labels=labels)


def write_pictures(
    options: Options,
    folder: Any,
    item: Item,
    target: Any,
    outputs: dict[str, Any],
    rows: tuple[int, int],
) -> None:
    """NAME-inverted.png, the picture or the sheet, and NAME-LABEL.png of one photo.

    Of the outputs, but on the sheet, only `rows` are written, first and one after last.
    """
    first = outputs[INVERSION][slice(*rows)]
    if options.side_by_side:
        first = sheet(item, target, outputs)
    images.save_image(folder / f"{item.name}-inverted.png", first)
    for label, picture in outputs.items():
        if label != INVERSION:
            images.save_image(
                folder / f"{item.name}-{label}.png", picture[slice(*rows)]
            )


def write_results(
    out: Any, names: list[str], codes: dict[str, list], judged: dict[str, dict]
) -> None:
    """The code files, one an output, and metrics.json."""
    spaces = {space: codes.pop(space) for space in SPACES if space in codes}
    pipeline.write_codes(out, **spaces, names=np.array(names))
    for label, w_plus in codes.items():
        path = out.parent / f"{out.stem}-{label}.npz"
        pipeline.write_codes(path, w_plus=w_plus, names=np.array(names))
    if judged:
        means = {k: metrics.summary(list(v.values())) for k, v in judged.items()}
        images.write_bytes(out.parent / "metrics.json", metrics.as_json(means, judged))
        print(f"mean ± deviation over {len(judged[INVERSION])} targets:")
        print(metrics.table(means))


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m jaxstyle.invert`."""
    options = parse(Options, "jaxstyle.invert", __doc__, args)
    check(options)
    use_compilation_cache()
    paths = images.image_files(options.photo)[: options.limit]
    targets = find_targets(options.target, paths)
    generator, params = pipeline.load_generator(generator_name(options))
    encoder, reading = None, Reading("photo", generator.size, align=options.align)
    shown = 0, generator.size
    if options.encoder != "optimize":
        encoder = load_encoder(options.encoder, generator)
        check_encoder(options, encoder)
        reading = Reading(
            encoder.inputs,
            max(encoder.module.size, generator.size if options.refine else 0),
            classes=encoder.module.in_channels,
            nearest=options.nearest_labels,
            factors=options.factors,
            align=options.align,
            rows=encoder.rows(encoder.module.size) if encoder.sees_band else (),
        )
        shown = encoder.rows(generator.size)
    changes, judges = read_changes(options, generator, params), {}
    if targets:
        judges = metrics.load_judges(options.perceptual_net, options.identity_net)
    job = Job(generator, params, encoder, changes, targets, judges)
    out = epath.Path(options.out)
    out = out if out.suffix == ".npz" else out / "codes.npz"
    # Even batches, the last one filled up: one compilation.
    count = len(paths) * max(1, len(options.factors))
    batch = -(-count // -(-count // options.batch))
    names: list[str] = []
    codes: dict[str, list] = {}
    judged: dict[str, dict] = {}
    bar = tqdm(total=count, unit="photo", disable=count == 1)
    # A batch at a time: thousands of large pictures would not fit into memory.
    for items in chunks(read_items(paths, reading), batch):
        found, drawn = invert_batch(options, job, items, batch)
        wanted = [
            read_target(options, targets[item.path], encoder) if targets else None
            for item in items
        ]
        for label, values in judge_batch(job, items, wanted, drawn).items():
            judged.setdefault(label, {}).update(values)
        for name in found.keys() - {"images", "loss", "path"}:
            codes.setdefault(name, []).extend(found[name][: len(items)])
        for i, item in enumerate(items):
            names.append(item.name)
            loss = f", loss {found['loss'][i]:.4f}" if "loss" in found else ""
            tqdm.write(f"{item.name}: {found['w_plus'][i].shape} code{loss}")
            if not options.codes_only:
                mine = {label: x[i] for label, x in drawn.items()}
                write_pictures(options, out.parent, item, wanted[i], mine, shown)
            if options.video:
                frames = pipeline.pictures(generator, params, found["path"][:, i])
                path = out.parent / f"{item.name}-search.webp"
                images.save_animation(path, list(frames))
        bar.update(len(items))
    bar.close()
    if not names:
        raise UserError(f"{options.photo}: no picture that could be used")
    write_results(out, names, codes, judged)
    print(out)


if __name__ == "__main__":
    main()
