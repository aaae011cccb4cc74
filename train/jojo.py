"""JoJoGAN: one picture teaches a style.

Chong and Forsyth, "JoJoGAN: One Shot Face Stylization", arXiv 2112.11641.

1. Invert the reference y to a code w(y); an inversion that looks like a real face
   learns a strong style, one that reproduces the drawing a weak one.
2. Make a family of codes by mixing: s_i = M·s(w) + (1-M)·s(FC(z_i)), M one bit a
   modulated layer (published code: rows 0-6 stay the reference's).
3. theta = argmin mean_i L(G(s_i; theta), y), L the L1 distance of discriminator
   features: every picture of the family is to look like y.
4. `--id-lambda`: + lambda mean_i (1 - cos(F(G(s_i; theta)), F(G(s_i; theta_0)))), the
   identity loss, F an identity network and theta_0 the base: whose face it is shall
   survive. (In the paper alone, which gives no weight; the published code has none.)
5. `--own-color`: ours, in no paper. One picture does not tell which of its colours are
   its style and which its model's. With share c the picture of a mixed code shall not
   look like y but like y + c (G(s_i; theta_0) - G(s(w); theta_0)): as much darker or
   redder as the base draws it. What is left to learn is what the style does to any
   colour. `auto` looks at y: a drawing without colours takes a head's own away, a
   colourful one leaves them.

    python -m train.jojo --ref art.png
    python -m jaxstyle.stylize me.jpg

The model that ships with us recommends defaults of its own, printed at the start; a
minute on two CPU cores. Look at samples/000000.png first: if the base generator's
picture of the reference (second row) already looks drawn, the style will come out weak;
try `--inversion virtual` or `mean`.

One reference on many chips: `--mixes` random mixes of it a step are split over the
`data` axis (the published code draws 1). Many references: one style from all, or with
`--separate` one style each, over the `style` axis, with no collective in the step.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from etils import epath
from jax import Array
from jax.sharding import PartitionSpec as P

from jaxstyle import weights
from jaxstyle.align import AlignOptions
from jaxstyle.errors import UserError, cli
from jaxstyle.features import judges
from jaxstyle.features.lpips import feature_distance
from jaxstyle.images import image_files
from jaxstyle.invert import for_lpips
from jaxstyle.masks import parse_mask, preserve_color_mask
from jaxstyle.paths import place
from jaxstyle.stylegan2 import Generator, style_vectors
from train import optim, references, sharding, styles
from train.cli import (
    RunOptions,
    Shared,
    as_flags,
    parse,
    start,
    with_out,
    with_profile,
    working,
)
from train.loop import check_folder, fit
from train.state import TrainState, create_state

# Places of the published taps among the discriminator's blocks, as far as they exist.
TAPS = (1, 3, 4, 5)
GRID = 5
# Colourfulness up to which a reference leaves no colours, and from which it leaves all.
COLORFUL = (15.0, 33.0)
PER_STYLE = ("reference", "preview")
# Codes come from the mapping network, and buffers are not parameters.
NOT_TRAINED = ("mapping/", "noise_const/", "w_avg")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of train.jojo; the defaults are the published ones."""

    ref: tuple[epath.Path, ...]
    """The reference picture, or several, or a folder of them."""
    weights: str = weights.DEFAULT
    """Base networks: a name we ship, a converted folder, or a run."""
    profile: bool = True
    """Take the defaults that the weights recommend for themselves (`jojo` in their
    config.json, printed); --no-profile: the published ones."""
    separate: bool = False
    """Several references: learn one style from each, at the same time; each style
    becomes a folder OUT/styles/NAME."""
    group: int = 0
    """--separate: styles that are learned at a time; 0: all. `train.fits --find-batch`
    finds how many fit."""
    patience: int = 0
    """--separate: a style learns no longer once its loss, averaged over about ten
    steps, has not fallen for so many; 0: all take --steps."""
    encoder: str = "optimize"
    """Inverts the reference: an encoder's folder, or `optimize` (no encoder needed)."""
    inversion_steps: int = 300
    """Steps of the inversion by optimisation."""
    inversion_space: Literal["w", "w_plus"] = "w"
    """Where the optimisation searches: one code pulled to the average one, or a code a
    row, which resembles the reference more and so teaches a weaker style."""
    inversion: Literal["invert", "mean", "virtual"] = "invert"
    """Code of the reference: its inversion; the mean code (extreme references: animals,
    abstract art; no landmarks needed); or both, mixed by --virtual-mask."""
    virtual_mask: str = "structure"
    """--inversion virtual: layers that keep the inverted code; the others take the mean
    one."""
    preview_inversion: bool = False
    """Write what the base generator makes of the reference's code under each named
    mask, and exit."""
    mask: str = ""
    """Layers that keep the reference's code (the paper's M): structure (the published
    rows 0-6), color, all, none, one digit 0 or 1 a modulated layer, or ranges (0-8,12).
    Empty: structure."""
    preserve_color: bool = False
    """Mix only rows 9, 11, 15, 16, 17, so that a photo keeps its colours."""
    mask_space: Literal["w", "s"] = "w"
    """Mix the codes of the layers (their affine maps train), or the style vectors."""
    alpha: float = 1.0
    """Share of the random code in the mixed layers; 1 is the strongest style."""
    mixes: int = 1
    """Random mixes of each reference a step."""
    codes: int = 0
    """Draw this many random codes once and go through them (the paper's S); 0: fresh
    ones every step."""
    own_color: float | Literal["auto"] = 0.0
    """Share of a head's own colours that survive the style, 0 (published) to 1; auto: 0
    for a reference that is less than slightly colourful, 1 for one that is moderately
    so or more (Hasler and Suesstrunk 2003)."""
    perceptual: Literal["discriminator", "lpips"] = "discriminator"
    """Features to compare: the discriminator's, or LPIPS (the code's first release;
    also the way out when the weights hold no discriminator)."""
    perceptual_net: str = ""
    """LPIPS network, of `--perceptual lpips` and of the reference's inversion; empty:
    LPIPS-AlexNet (the first release had LPIPS-VGG)."""
    id_lambda: float = 0.0
    """Weight of the identity loss between what the base and the trained generator draw
    of the same mixed code."""
    identity_net: str = ""
    """Identity network; empty: weights/arcface if there, else the one that ships."""
    lr: float = 2e-3
    """Adam's learning rate (betas 0 and 0.99)."""
    noise_mode: Literal["random", "const", "none"] = "random"
    """Noise planes while training."""
    align: Annotated[AlignOptions, tyro.conf.OmitArgPrefixes] = AlignOptions()
    run: Shared = RunOptions(steps=300, log_every=10, sample_every=100, save_every=100)


def keep_weights(options: Options, size: int) -> np.ndarray:
    """Share of the reference's code in each layer's mix: float32 [num_layers]."""
    if options.mask and options.preserve_color:
        raise UserError("--mask and --preserve-color both choose the layers; give one")
    if not 0 <= options.alpha <= 1:
        raise UserError(f"--alpha is {options.alpha}; it must be from 0 to 1")
    if options.preserve_color:
        mask = preserve_color_mask(size)
    else:
        mask = parse_mask(options.mask or "structure", size, "--mask")
    return np.where(mask > 0, mask, 1 - options.alpha).astype(np.float32)


def colorfulness(pictures: Array) -> Array:
    """How colourful pictures [n, h, w, 3] in [-1, 1] are: [n].

    Hasler and Suesstrunk, "Measuring colourfulness in natural images", 2003, M^(3): 0
    is not, 15 slightly, 33 moderately, 45 averagely, 59 quite, 82 highly colourful.
    """
    r, g, b = jnp.moveaxis((pictures + 1) * 127.5, -1, 0)
    opponents = jnp.stack([r - g, (r + g) / 2 - b])
    spread, mean = opponents.std((2, 3)), opponents.mean((2, 3))
    return jnp.hypot(*spread) + 0.3 * jnp.hypot(*mean)


def own_color_shares(options: Options, pictures: Array) -> Array:
    """`--own-color` for each reference [n, h, w, 3]: [n] from 0 to 1."""
    if options.own_color == "auto":
        slightly, moderately = COLORFUL
        share = (colorfulness(pictures) - slightly) / (moderately - slightly)
        return jnp.clip(share, 0, 1)
    return jnp.full(len(pictures), options.own_color, jnp.float32)


def describe(options: Options, judge: Any, params: Any, images: Array) -> list[Array]:
    """Features of pictures [batch, h, w, 3] that the loss compares."""
    if options.perceptual == "discriminator":
        names = [judge.tap_names[i] for i in TAPS if i < len(judge.tap_names)]
        blocks = judge.tap_names.index(names[-1])
        _, out = judge.apply({"params": params}, images, taps=blocks)
        return [out["features"][name] for name in names]
    # The first release compares pictures resized to 256 px by areas.
    enlarged = for_lpips(images)
    return list(judge.apply({"params": params}, enlarged, method="features"))


def distances(options: Options, params: Any, a: list[Array], b: list[Array]) -> Array:
    """Perceptual distance of each picture [batch]; `b` may repeat along the batch."""
    if options.perceptual == "lpips":
        return feature_distance(params, a, b)
    per_tap = [jnp.mean(jnp.abs(x - y), (1, 2, 3)) for x, y in zip(a, b, strict=True)]
    return jnp.mean(jnp.stack(per_tap), 0).astype(jnp.float32)


def identity_loss(judge: Any, params: Any, made: Array, base: Array) -> Array:
    """1 - cosine [batch] of the embeddings of two generators' pictures.

    Args:
      judge: identity network.
      params: its parameters.
      made: pictures [batch, size, size, 3] of the generator that learns.
      base: those of the base; no gradient flows into them.
    """
    base = jax.lax.stop_gradient(base)
    a, b = (judge.apply({"params": params}, x, method="embed") for x in (made, base))
    return 1 - jnp.sum(a * b, -1)


def loss_fn(
    params: Any,
    frozen: Mapping[str, Any],
    reference: Mapping[str, Any],
    z: Array,
    *,
    options: Options,
    generator: Generator,
    judge: Any,
    keep: np.ndarray,
    noise: Any,
    key: Array | None = None,
    identity: Any = None,
) -> tuple[Array, dict[str, Array]]:
    """Mean distance of the mixed pictures to their references, and identity loss.

    Args:
      params: the generator that learns.
      frozen: `judge`; `affine` (the base's) for `--mask-space s`; `base` for
        `--id-lambda` and `--own-color`, `identity` for the former.
      reference: `codes` [refs, num_layers, w_dim] and `features` of the pictures; for
        `--own-color` instead of these the `pictures`, what the base draws of their
        codes without noise, `inverted` [refs, size, size, 3], and the `shares` [refs].
      z: [refs * mixes, z_dim], the mixes of a reference in a row.
      options: of the scheme.
      generator, judge: modules.
      keep: share of the reference's code, [num_layers].
      noise: as in `Generator`.
      key: one key a picture, for random noise; both generators draw with it.
      identity: module, for `--id-lambda`.

    Returns:
      The loss [], and its terms where there are several.
    """
    mixes = z.shape[0] // reference["codes"].shape[0]

    def repeated(x):
        return jnp.repeat(x, mixes, 0) if mixes > 1 else x

    # The mapping network never learns: its output is where codes come from.
    w = generator.apply({"params": params}, z, method="mapping")
    w = jax.lax.stop_gradient(w)[:, None]
    codes = repeated(reference["codes"])
    if options.mask_space == "w":
        share = keep[:, None]
        mixed, space = share * codes + (1 - share) * w, "w_layers"
    else:
        kept = style_vectors(frozen["affine"], codes)
        drawn = style_vectors(frozen["affine"], jnp.broadcast_to(w, codes.shape))
        pairs = zip(keep, kept, drawn, strict=True)
        mixed, space = tuple(k * a + (1 - k) * b for k, a, b in pairs), "styles"

    def draw(params, noise=noise):
        variables = {"params": params}
        return generator.apply(variables, mixed, space=space, noise=noise, key=key)[0]

    image = draw(params)
    fake = describe(options, judge, frozen["judge"], image)
    if options.own_color:
        shift = draw(frozen["base"], "none") - repeated(reference["inverted"])
        share = repeated(reference["shares"])[:, None, None, None]
        wanted = jnp.clip(repeated(reference["pictures"]) + share * shift, -1, 1)
        wanted = jax.lax.stop_gradient(wanted)
        real = describe(options, judge, frozen["judge"], wanted)
    else:
        real = [repeated(f) for f in reference["features"]]
    loss = jnp.mean(distances(options, frozen["judge"], fake, real))
    if not options.id_lambda:
        return loss, {}
    apart = identity_loss(identity, frozen["identity"], image, draw(frozen["base"]))
    terms = {"perceptual": loss, "id": jnp.mean(apart)}
    return loss + options.id_lambda * terms["id"], terms


def make_step(
    options: Options,
    generator: Generator,
    judge: Any,
    tx: Any,
    keep: np.ndarray,
    identity: Any = None,
):
    """The step of the scheme; with `separate`, one for all styles side by side."""

    def one(params, opt_state, reference, key, step, frozen):
        batch = reference["codes"].shape[0] * options.mixes
        if options.codes:
            first = (step * options.mixes) % options.codes
            number = (first + jnp.arange(batch) % options.mixes) % options.codes
            rows = jnp.arange(batch) // options.mixes
            z = sharding.constrain(reference["z"][rows, number])
        else:
            z = sharding.sample_normal(
                jax.random.fold_in(key, 0), batch, generator.z_dim
            )
        (loss, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params,
            frozen,
            reference,
            z,
            options=options,
            generator=generator,
            judge=judge,
            keep=keep,
            noise=options.noise_mode,
            key=sharding.sample_keys(jax.random.fold_in(key, 1), batch),
            identity=identity,
        )
        params, opt_state = optim.apply(tx, grads, opt_state, params)
        return params, opt_state, {"loss": loss} | terms

    def step(state: TrainState, frozen: Any, _: Any) -> tuple[TrainState, dict]:
        params, opt_state = state.params["generator"], state.opt_state["generator"]
        if options.separate:
            count = len(options.ref)
            keys = sharding.sample_keys(state.key, count)
            shared = {n: x for n, x in frozen.items() if n not in PER_STYLE}
            after, opt_after, metrics = styles.side_by_side(one)(
                params, opt_state, frozen["reference"], keys, state.step, shared
            )
            if options.patience:
                (params, opt_state), learns = styles.held(
                    state, options.patience, (after, opt_after), (params, opt_state)
                )
                extra = styles.progress(state, metrics["loss"], learns)
                state = state.replace(extra=extra)
                metrics |= {"learns": learns.astype(jnp.float32)}
            else:
                params, opt_state = after, opt_after
        else:
            params, opt_state, metrics = one(
                params, opt_state, frozen["reference"], state.key, state.step, frozen
            )
        state = state.replace(
            params={"generator": params}, opt_state={"generator": opt_state}
        )
        return state, metrics

    return step


def names(options: Options) -> list[str]:
    """A name for each reference: its file's, numbered where two are alike."""
    stems = [p.stem for p in options.ref]
    return [s if stems.count(s) == 1 else f"{s}-{i}" for i, s in enumerate(stems)]


def sharding_rules(options: Options) -> tuple:
    """The usual layouts; with `separate`, everything of a style over `style`."""
    if not options.separate:
        return sharding.RULES
    return (
        (r"^(step|key|frozen/(judge|affine|base|identity|preview))", P()),
        (r"", P("style")),
    )


def make_sample(options: Options, generator: Generator):
    """Pictures of the current generator beside those of the base, five a row."""

    def draw(params, codes, space):
        return generator.apply({"params": params}, codes, space=space)[0]

    def sample(state: TrainState, frozen: Any) -> Array:
        shown = frozen["preview"]
        params = state.params["generator"]
        if options.separate:
            styled = jax.vmap(lambda p, c: draw(p, c[None], "w_layers")[0])(
                jax.tree.map(lambda x: x[:GRID], params), shown["codes"]
            )
            samples = [
                draw(
                    jax.tree.map(lambda x, i=i: x[i], params), shown["w_plus"], "w_plus"
                )
                for i in range(shown["codes"].shape[0])
            ]
        else:
            styled = draw(params, shown["codes"], "w_layers")
            samples = [draw(params, shown["w_plus"], "w_plus")]
        rows = [shown["references"], shown["inverted"], styled, shown["base"], *samples]
        size = generator.size

        def padded(row):
            blank = jnp.ones((GRID - row.shape[0], size, size, 3))
            return jnp.concatenate([row, blank])

        return jnp.stack([padded(row) for row in rows])

    return sample


def frozen_of(
    options: Options,
    generator: Generator,
    base: Any,
    judge: Any,
    judge_params: Any,
    pictures: Array,
    codes: Array,
    identity_params: Any = None,
) -> dict[str, Any]:
    """What a run never changes: judge, references, what the sample grids show.

    Args:
      options: of the scheme.
      generator: the architecture.
      base: the generator's parameters before training.
      judge, judge_params: the network whose features the loss compares.
      pictures: aligned references [refs, size, size, 3].
      codes: theirs, [refs, num_layers, w_dim].
      identity_params: of the identity network, for `--id-lambda`.
    """
    reference = {"codes": codes}
    if options.own_color:

        def draw(base, codes):
            apply = partial(generator.apply, {"params": base})
            return apply(codes, space="w_layers", noise="none")[0]

        reference |= {
            "pictures": pictures,
            "inverted": styles.a_few_at_a_time(draw, base, codes, references.BATCH),
            "shares": own_color_shares(options, pictures),
        }
    else:
        reference["features"] = styles.a_few_at_a_time(
            partial(describe, options, judge), judge_params, pictures, references.BATCH
        )
    key = jax.random.key(options.run.seed)
    if options.codes:
        shape = (codes.shape[0], options.codes, generator.z_dim)
        reference["z"] = jax.random.normal(jax.random.fold_in(key, 1), shape)
    if options.separate:
        reference = jax.tree.map(lambda x: x[:, None], reference)

    def preview(base, codes, z):
        apply = partial(generator.apply, {"params": base})
        inverted, _ = apply(codes, space="w_layers")
        samples, out = apply(z, psi=0.7)
        return {"inverted": inverted, "base": samples, "w_plus": out["w_plus"]}

    z = jax.random.normal(jax.random.fold_in(key, 2), (GRID, generator.z_dim))
    shown = {"codes": codes[:GRID], "references": pictures[:GRID]}
    frozen = {
        "judge": judge_params,
        "reference": reference,
        "preview": shown | preview(base, shown["codes"], z),
    }
    if options.mask_space == "s":
        frozen["affine"] = {
            name: {"affine": base["synthesis"][name]["affine"]}
            for name in generator.layer_names
        }
    if options.id_lambda or options.own_color:
        frozen["base"] = {name: base[name] for name in ("synthesis", "noise_const")}
    if options.id_lambda:
        frozen["identity"] = identity_params
    return frozen


def start_state(options: Options, base: Any, tx: Any) -> TrainState:
    """A copy of the base to train, or one a style."""
    trained, extra = base, {}
    if options.separate:
        count = len(options.ref)
        trained = styles.copies(base, count)
        extra = styles.start_progress(count) if options.patience else {}
    state = create_state(
        {"generator": trained}, {}, key=jax.random.key(options.run.seed), extra=extra
    )
    init = jax.vmap(tx.init) if options.separate else tx.init
    return state.replace(opt_state={"generator": init(trained)})


def load_judge(options: Options, model: Any, params: Any) -> tuple[Any, Any]:
    """The network whose features the loss compares.

    Raises:
      UserError: the weights hold no discriminator, or one of another size.
    """
    if options.perceptual == "lpips":
        judge = judges.choose("perceptual", options.perceptual_net, options.run.dtype)
        return judge.module, judge.params
    if "discriminator" not in model:
        raise UserError(
            f"--weights {options.weights} hold no discriminator, whose features are "
            "the loss; use --perceptual lpips, or convert a file that has `d`"
        )
    judge = model["discriminator"]
    if judge.size != model["generator"].size:
        raise UserError(
            f"--weights {options.weights} hold a {judge.size} px discriminator for a "
            f"{model['generator'].size} px generator; use --perceptual lpips"
        )
    print(f"perceptual judge: discriminator of {options.weights} (the published one)")
    return working(judge, options.run), params["discriminator"]


def read(args: list[str] | None) -> Options:
    """The options of a command line, over the defaults that the weights recommend.

    Raises:
      UserError: the weights recommend an option that does not exist.
    """
    options = parse(Options, __doc__, args)
    metadata = weights.read_config(options.weights)["metadata"]
    wanted = dict(metadata.get("jojo", {})) if options.profile else {}
    if options.preserve_color:
        wanted.pop("mask", None)  # both choose the layers
    if not wanted:
        return options
    default = Options(ref=options.ref, weights=options.weights)
    default = with_profile(default, wanted, "jojo")
    print(f"defaults of {options.weights}: {as_flags(wanted)}", flush=True)
    return parse(Options, __doc__, args, default)


def resolve(options: Options) -> Options:
    """Defaults that depend on other options.

    Raises:
      UserError: values that cannot be.
    """
    paths = [image_files(p) if place(p).is_dir() else [p] for p in options.ref]
    options = dataclasses.replace(options, ref=tuple(p for part in paths for p in part))
    for path in options.ref:
        if not path.is_file():
            raise UserError(f"--ref {path} is not a file; give a picture")
    zero = ("codes", "group", "patience")
    for name, low in (("mixes", 1), ("inversion_steps", 1), *((n, 0) for n in zero)):
        if getattr(options, name) < low:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be "
                f"at least {low}"
            )
    if (options.group or options.patience) and not options.separate:
        raise UserError(
            "--group and --patience are for --separate; give it, or leave them"
        )
    at_once = options.group or len(options.ref)
    if options.separate and at_once % options.run.mesh_style:
        raise UserError(
            f"{at_once} styles at a time do not divide over --mesh-style "
            f"{options.run.mesh_style}; use a --group that does, or a smaller mesh"
        )
    if options.group > len(options.ref):
        raise UserError(
            f"--group is {options.group}, but --ref names {len(options.ref)} pictures"
        )
    if options.id_lambda < 0:
        raise UserError(f"--id-lambda is {options.id_lambda}; it must not be negative")
    if options.own_color != "auto" and not 0 <= options.own_color <= 1:
        raise UserError(
            f"--own-color is {options.own_color}; it must be auto, or from 0 to 1"
        )
    batch = len(options.ref) * options.mixes
    if options.run.batch not in (RunOptions.batch, batch):
        raise UserError(
            f"--batch is {options.run.batch}, but a step draws --mixes "
            f"{options.mixes} of each of {len(options.ref)} references, {batch} "
            "pictures; use --mixes"
        )
    return with_out(options, "jojo-" + "-".join(p.stem for p in options.ref[:3]))


def groups(options: Options) -> list[tuple[Options, int]]:
    """The runs of a command, and how many of each one's styles another has learned.

    All have the same number of styles, so that one compilation serves them.
    """
    size, count, out = options.group, len(options.ref), options.run.out
    if not size:
        return [(options, 0)]
    parts = []
    for i, first in enumerate(range(0, count, size)):
        begin = min(first, count - size)
        run = dataclasses.replace(options.run, out=f"{out}/groups/{i:03d}")
        ref = options.ref[begin : begin + size]
        part = dataclasses.replace(options, ref=ref, run=run)
        parts.append((part, first - begin))
    return parts


def learn(
    options: Options,
    style_names: Mapping[epath.Path, str],
    mesh: Any,
    generator: Generator,
    base: Any,
    judges_of: Any,
    digests: Mapping[str, str],
) -> TrainState:
    """One run: prepare its references and train.

    Args:
      options: with the references of this run.
      style_names: of each reference.
      mesh: of the run.
      generator: the architecture.
      base: its parameters before training.
      judges_of: module and parameters of the judge, and of the identity network.
      digests: of weights and judges.
    """
    judge, judge_params, identity_net, identity_params = judges_of
    metadata = {
        "scheme": "jojo",
        "base": options.weights,
        "references": [str(p) for p in options.ref],
    }
    if options.separate:
        metadata["styles"] = [style_names[path] for path in options.ref]
    identity = {"reference": references.digest(options.ref)} | digests
    check_folder(options, metadata, identity)
    if options.run.compile_for:
        # Nobody waits for an inversion, and nothing of it is left in the folder.
        pictures, codes = references.shapes(options, generator)
    else:
        pictures, codes = references.prepare(options, generator, base, identity)
    if options.own_color == "auto" and not options.run.compile_for:
        shares = np.asarray(own_color_shares(options, pictures))
        told = ", ".join(
            f"{style_names[p]} {x:.2f}"
            for p, x in zip(options.ref, shares, strict=True)
        )
        print(f"share of a head's own colours that survives: {told}")
    tx = optim.frozen(optim.adam(options.lr), NOT_TRAINED)

    def make(base, *arrays):
        frozen = frozen_of(options, generator, base, judge, *arrays)
        return start_state(options, base, tx), frozen

    arrays = base, judge_params, pictures, codes, identity_params
    rules = sharding_rules(options)
    if options.run.compile_for:
        state, frozen = jax.eval_shape(make, *arrays)
    else:
        own = P("style") if options.separate else P()
        specs = (P(), P(), own, own, P())
        state, frozen = sharding.built(make, mesh, rules, *arrays, specs=specs)
    layers = keep_weights(options, generator.size)
    return fit(
        options,
        state,
        frozen,
        [(1, make_step(options, generator, judge, tx, layers, identity_net))],
        None,
        networks={"generator": generator},
        mesh=mesh,
        metadata=metadata,
        identity=identity,
        sample=make_sample(options, generator),
        rules=rules,
    )


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.jojo`."""
    options = resolve(read(args))
    mesh = start(options.run)
    model, params = weights.load(options.weights)
    generator = working(model["generator"], options.run)
    base = params["generator"]
    keep_weights(options, generator.size)
    if options.preview_inversion:
        references.preview(options, generator, base)
        return
    judge = load_judge(options, model, params)
    identity = None, None
    if options.id_lambda:
        _, *identity = judges.choose(
            "identity", options.identity_net, options.run.dtype
        )
    digests = {
        "weights": weights.digest(params),
        "judges": weights.digest([judge[1], identity[1]]),
    }
    style_names = dict(zip(options.ref, names(options), strict=True))
    folder = epath.Path(options.run.out) / "styles"
    for part, known in groups(options):
        judges_of = (*judge, *identity)
        state = learn(part, style_names, mesh, generator, base, judges_of, digests)
        if options.separate:
            base_of = {"scheme": "jojo", "base": options.weights}
            new = {
                style_names[path]: base_of | {"references": [str(path)]}
                for path in part.ref[known:]
            }
            styles.write(folder, state, known, new, {"generator": generator})
    if jax.process_index() == 0:
        which = options.run.out
        if options.separate:
            which = folder / style_names[options.ref[0]]
        print(f"now: python -m jaxstyle.stylize me.jpg --weights {which}")


if __name__ == "__main__":
    main()
