"""Photos to codes of a generator.

    python -m jaxstyle.invert me.jpg --out me.npz
    python -m jaxstyle.invert photos/ --encoder weights/e4e --weights weights/ffhq

By optimisation (the default; needs no encoder): a code is moved until the generator's
picture resembles the photo, in LPIPS and in pixels (the projector of StyleGAN2, Karras
et al., arXiv 1912.04958, appendix D, noise planes staying as they are). Steps and
pulls are measured in standard deviations of w, so the defaults fit any generator.

- `--space w_plus`: one code a row, for photos. The first third of the steps moves a
  single w, then every row may leave it, pulled back towards it.
- `--space w`: a single code pulled towards the average one: closer to what the
  generator knows, farther from the photo.
- `--space z`: a code of the mapping network's input.

By an encoder (pSp, e4e): one pass, no steps; ReStyle's refine their code `--restyle`
times.

Writes an .npz with `w_plus` [n, num_ws, w_dim] (and `w` or `z` where the search was in
it), for `python -m jaxstyle.generate --codes`, and a picture of each code.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from etils import epath
from jax import Array
from tqdm import tqdm

from jaxstyle import images, pipeline, weights
from jaxstyle.align import AlignOptions, prepare
from jaxstyle.cache import use_compilation_cache
from jaxstyle.encoders import encode, refine
from jaxstyle.errors import UserError, cli
from jaxstyle.options import parse
from jaxstyle.stylegan2 import Generator, Params

SPACES = ("w_plus", "w", "z")
LPIPS_SIZES = (128, 256)
CANDIDATES = 64
FRAMES = 60
RESTYLE = 5


@dataclasses.dataclass(frozen=True)
class Search:
    """Options of the inversion by optimisation."""

    space: Literal["w_plus", "w", "z"] = "w_plus"
    """Where to search: w_plus resembles the photo most, w stays what the generator
    knows, z even more so."""
    steps: int = 300
    """Steps of the search; 1000 for the last bit at 1024 px."""
    search_lr: float = 0.05
    """Largest step, in standard deviations of w."""
    search_noise: float = 0.5
    """Noise on the code at the start, in standard deviations of w; it fades out over
    three quarters of the steps."""
    pull: float = 0.5
    """Weight of the squared distance, in standard deviations, from the average code
    (w) and of the rows from their common code (w_plus). Less resembles the photo more,
    more takes a style better."""
    mse: float = 1.0
    """Weight of the squared pixel differences beside LPIPS."""
    lpips: str = "lpips_alexnet"
    """LPIPS weights."""


DEFAULT = Search()
_NUMBERS = ("steps", "search_lr", "search_noise", "pull", "mse")


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


def resize(pictures: Array, size: int) -> Array:
    """Pictures [n, h, h, 3] at `size`, filtered when they shrink."""
    n, height, width, channels = pictures.shape
    if (height, width) == (size, size):
        return pictures
    return jax.image.resize(pictures, (n, size, size, channels), "linear")


def _codes(point: Params, frozen: Params, space: str, noise: Array | float) -> Array:
    """The code that a search point stands for, in `space`."""
    if space == "z":
        return point["base"] + noise
    w = frozen["w_avg"] + frozen["sigma"] * (point["base"] + noise)
    if space == "w":
        return w
    return w[:, None] + frozen["sigma"] * point["rows"]


def _judge(frozen: Params, image: Array, judge: nn.Module) -> Array:
    """Distance [n] of pictures [n, size, size, 3] to their targets."""
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
        image, _ = generator.apply({"params": frozen["generator"]}, codes, space=space)
        losses = _judge(frozen, image, judge)
        if space != "z":
            losses += search["pull"] * sum(
                jnp.mean(jnp.square(x), tuple(range(1, x.ndim))) for x in point.values()
            )
        return jnp.sum(losses), losses

    (_, losses), gradient = jax.value_and_grad(loss, has_aux=True)(point)
    if "rows" in point:
        gradient["rows"] = jnp.where(done >= 1 / 3, gradient["rows"], 0.0)
    moves, moments = optax.scale_by_adam().update(gradient, moments)
    rise = jnp.minimum(1.0, (done + 1 / search["steps"]) / 0.05)
    fall = 0.5 - 0.5 * jnp.cos(jnp.pi * jnp.minimum(1.0, (1 - done) / 0.25))
    rate = search["search_lr"] * rise * fall
    point = optax.apply_updates(point, jax.tree.map(lambda m: -rate * m, moves))
    return point, moments, losses


@partial(jax.jit, static_argnames=("generator", "judge", "space"))
def _start(frozen, *, generator, judge, space):
    """Where the searches begin: the average code, or in z the best of some draws."""
    n = frozen["targets"].shape[0]
    if space != "z":
        point = {"base": jnp.zeros((n, generator.w_dim))}
        if space == "w_plus":
            point["rows"] = jnp.zeros((n, generator.num_ws, generator.w_dim))
        return point

    def score(z):
        image, _ = generator.apply({"params": frozen["generator"]}, z[None])
        return _judge(frozen, image, judge)

    z = jax.random.normal(frozen["key"], (CANDIDATES, generator.z_dim))
    return {"base": z[jnp.argmin(jax.lax.map(score, z), 0)]}


@partial(jax.jit, static_argnames=("generator", "space"))
def _finish(point, frozen, *, generator, space):
    """Codes without noise, and their pictures."""
    codes = _codes(point, frozen, space, 0.0)
    image, out = generator.apply({"params": frozen["generator"]}, codes, space=space)
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
      targets: [n, size, size, 3] in [-1, 1], of the generator's size.
      search: space, steps and weights.
      key: of the noise on the code, and of the first draws in z.
      snapshots: keep about this many codes of the way, for an animation.
      progress: show a bar with the mean loss.

    Returns:
      `w_plus` [n, num_ws, w_dim], the codes in the searched space under its name,
      `images` [n, size, size, 3], `loss` [n], and with `snapshots` `path`
      [snapshots, n, num_ws, w_dim].

    Raises:
      UserError: an unknown space, fewer than 1 step, or targets of another size.
    """
    size = generator.size
    if search.space not in SPACES:
        raise UserError(f"space is {search.space!r}; it must be w_plus, w or z")
    if search.steps < 1:
        raise UserError(f"--steps is {search.steps}; it must be at least 1")
    if targets.ndim != 4 or targets.shape[1:] != (size, size, 3):
        raise UserError(
            f"targets have shape {list(targets.shape)}; this generator draws "
            f"[n, {size}, {size}, 3]"
        )
    targets = jnp.asarray(targets, jnp.float32)
    w_avg, sigma = jax.jit(statistics, static_argnums=0)(generator, params)
    features = jax.jit(lambda p, x: judge.apply({"params": p}, x, method="features"))(
        judge_params, for_lpips(targets)
    )
    frozen = {
        "generator": params,
        "lpips": judge_params,
        "targets": targets,
        "features": features,
        "w_avg": w_avg,
        "sigma": sigma,
        "key": key,
        # As data, not constants: other values need no new compilation.
        "search": {k: np.float32(getattr(search, k)) for k in _NUMBERS},
    }
    static = {"generator": generator, "space": search.space}
    point = _start(frozen, judge=judge, **static)
    moments = optax.scale_by_adam().init(point)
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


def load_encoder(path: str, generator: Generator) -> tuple[nn.Module, Params, str]:
    """An encoder that fits a generator, its parameters, and the space of its codes.

    Raises:
      UserError: no encoder there, one of another number of rows or width, or one that
        reads no photos.
    """
    model, params = weights.load(path)
    encoder = model.encoder
    if (encoder.num_styles, encoder.w_dim) != (generator.num_ws, generator.w_dim):
        raise UserError(
            f"encoder {path} gives {encoder.num_styles} codes of {encoder.w_dim}; the "
            f"{generator.size} px generator takes {generator.num_ws} of "
            f"{generator.w_dim}: use the encoder trained for it, or --encoder optimize"
        )
    if encoder.in_channels not in (3, 6):
        raise UserError(
            f"encoder {path} reads {encoder.in_channels} channels, not photos"
        )
    space = weights.read_config(path)["metadata"].get("space", "w_plus")
    return encoder, params["encoder"], space


@partial(jax.jit, static_argnames=("encoder", "generator", "space", "restyle"))
def _encode(encoder, values, generator, params, x, *, space, restyle):
    """Pictures at the encoder's size to w+; six channels make it one of ReStyle's."""
    if encoder.in_channels == 6:
        return refine(encoder, values, generator, params, x, restyle)
    codes = encode(encoder, values, x)
    if space != "z_plus":
        return codes
    rows = codes.reshape(-1, codes.shape[-1])
    rows = generator.apply({"params": params}, rows, method="mapping")
    return rows.reshape(codes.shape)


def invert(
    generator: Generator,
    params: Params,
    pictures: Array,
    *,
    encoder: str = "optimize",
    restyle: int = RESTYLE,
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
      pictures: [n, h, h, 3] in [-1, 1]; resized to what is needed.
      encoder: `optimize`, or the folder of an encoder.
      restyle: refinements, if it is one of ReStyle's.
      search: options of the optimisation.
      key: its random key.
      batch: pictures at a time, at most.
      snapshots: see `optimize`.
      progress: show bars.

    Returns:
      What `optimize` does; of an encoder `w_plus` and `images`.
    """
    pictures = jnp.asarray(pictures, jnp.float32)
    if encoder != "optimize":
        module, values, space = load_encoder(encoder, generator)
        run = partial(_encode, module, values, generator, params)
        w_plus = pipeline.in_batches(
            lambda x: run(x, space=space, restyle=restyle),
            resize(pictures, module.size),
            batch,
        )
        drawn = pipeline.pictures(generator, params, w_plus, batch=batch)
        return {"w_plus": w_plus, "images": drawn}
    model, judge_params = weights.load(search.lpips)
    pictures = resize(pictures, generator.size)
    # Even batches, the last one filled up: one compilation.
    n = len(pictures)
    batch = -(-n // -(-n // batch))
    done = [
        optimize(
            generator,
            params,
            model.lpips,
            judge_params["lpips"],
            pictures[np.minimum(np.arange(start, start + batch), n - 1)],
            search,
            key=key,
            snapshots=snapshots,
            progress=progress,
        )
        for start in range(0, n, batch)
    ]
    axes = {name: 1 if name == "path" else 0 for name in done[0]}
    return {
        name: np.concatenate([d[name] for d in done], axis).take(range(n), axis)
        for name, axis in axes.items()
    }


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of jaxstyle.invert."""

    photo: tyro.conf.Positional[Path]
    """A photo, or a folder of photos."""
    weights: str = weights.DEFAULT
    """The generator: a name we ship, a converted folder, or a run."""
    encoder: str = "optimize"
    """An encoder's folder, or `optimize`, which needs none."""
    restyle: int = RESTYLE
    """Refinements of an encoder of ReStyle's."""
    out: str = "inverted"
    """A folder, or the .npz file of the codes; pictures go beside it."""
    side_by_side: bool = False
    """Put the aligned photo beside the generator's picture."""
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


def load_photos(options: Options, size: int) -> tuple[list[str], np.ndarray]:
    """Names and aligned pictures [n, size, size, 3] of the photos.

    Of a folder, photos without a face are named and left out.

    Raises:
      UserError: no photo, or none with a face.
    """
    paths = images.image_files(options.photo)[: options.limit]
    names, crops = [], []
    for path in paths:
        try:
            crop, _ = prepare(path, size, options.align)
        except UserError as error:
            if len(paths) == 1:
                raise
            print(f"left out: {error}")
            continue
        names.append(Path(path).stem)
        crops.append(images.to_array(crop, size))
    if not crops:
        raise UserError(f"{options.photo}: no photo that could be used")
    return names, np.stack(crops)


def check(options: Options) -> None:
    """Refuse options that cannot be.

    Raises:
      UserError: naming the option.
    """
    for name in ("batch", "limit", "restyle"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if options.encoder != "optimize":
        if options.video:
            raise UserError("--video shows a search; leave out --encoder")
        if options.search != DEFAULT:
            raise UserError(
                f"--encoder {options.encoder} needs one pass and gives w_plus; leave "
                "out the options of the search"
            )


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m jaxstyle.invert`."""
    options = parse(Options, "jaxstyle.invert", __doc__, args)
    check(options)
    use_compilation_cache()
    generator, params = pipeline.load_generator(options.weights)
    size = generator.size
    if options.encoder != "optimize":
        size = load_encoder(options.encoder, generator)[0].size
    names, photos = load_photos(options, size)
    found = invert(
        generator,
        params,
        photos,
        encoder=options.encoder,
        restyle=options.restyle,
        search=options.search,
        key=jax.random.key(options.seed),
        batch=options.batch,
        snapshots=FRAMES if options.video else 0,
    )
    out = epath.Path(options.out)
    if out.suffix != ".npz":
        out = out / "codes.npz"
    codes = {space: found[space] for space in SPACES if space in found}
    pipeline.write_codes(out, **codes, names=np.array(names))
    photos = np.asarray(resize(jnp.asarray(photos), generator.size))
    for i, name in enumerate(names):
        loss = f", loss {found['loss'][i]:.4f}" if "loss" in found else ""
        print(f"{name}: {tuple(found['w_plus'][i].shape)} code{loss}")
        if not options.codes_only:
            shown = found["images"][i]
            if options.side_by_side:
                shown = images.grid([photos[i], shown])
            images.save_image(out.parent / f"{name}-inverted.png", shown)
        if options.video:
            frames = pipeline.pictures(generator, params, found["path"][:, i])
            images.save_animation(out.parent / f"{name}-search.webp", list(frames))
    print(out)


if __name__ == "__main__":
    main()
