"""What training an encoder takes, whichever it is: `train.psp` and `train.e4e` use it.

Networks and where they start from, the picture losses, reconstruction by the frozen
generator, validation and sample grids.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxstyle import weights
from jaxstyle.encoders import (
    adaptive_pool,
    batch_stats,
    full_codes,
    merge_batch_stats,
)
from jaxstyle.errors import UserError
from jaxstyle.features import judges
from jaxstyle.features.identity import ArcFace
from jaxstyle.features.resnet import ResNet
from jaxstyle.invert import for_lpips
from jaxstyle.stylegan2 import Generator
from train import data, loop, optim, resume, sharding, transforms
from train.cli import working
from train.state import TrainState

# pSp's face region, in a picture of 256 px.
ROWS, COLUMNS = (35, 223), (32, 220)
PREVIEW = 5
GENERATED = "generated"
# Share of generated codes that mix two.
MIXING = 0.5
UNITS = {"ir_se": (3, 4, 14, 3), "resnet": (3, 4, 6, 3)}
# Where torchvision's ResNet-34 is, once converted.
RESNET = "weights/resnet34"
# Running statistics and averages are no weights; the noise planes are no one's.
NOT_TRAINED = (r".*norm\w*/(mean|var)$", "w_avg", "noise_const")
# rosinality's arrays with a leading axis of one, which Ranger centres as a whole.
WHOLE = (r"synthesis/(const|(conv|up|rgb)_\d+/weight|rgb_\d+/bias)$",)


@dataclasses.dataclass(frozen=True)
class EncodingOptions:
    """Data, networks and judges of an encoder's training."""

    data: str
    """Pictures wanted: a folder, .npy file, tfds:NAME:SPLIT, what train.prepare wrote,
    or `generated`: pictures of the generator itself, whose codes are known."""
    source: str = ""
    """Inputs that belong to the pictures, by name: a folder; empty: the pictures."""
    val_data: str = ""
    """Pictures to validate on; the encoder that does best there is kept in OUT/best."""
    val_source: str = ""
    """Their inputs."""
    val_every: int = 2500
    """Iterations between validations; 0: only at the end."""
    weights: str = weights.DEFAULT
    """Folder with the generator; if it holds an encoder too (an official checkpoint, a
    run), the training goes on from that."""
    start: str = ""
    """Folder with an encoder to start from instead."""
    resume: bool = False
    """Go on where the checkpoint in --start or --weights stopped: its step, its
    optimisers. Of e4e's and ReStyle's training checkpoints; this project's own runs go
    on by their --out."""
    first_step: int = 0
    """Number of the first iteration, where a checkpoint does not tell."""
    encoder_size: int = 256
    """Pixels a side of the encoder's pictures, at which the losses are taken too."""
    encoder_blocks: Literal["ir_se", "resnet"] = "ir_se"
    """Residual blocks of a new encoder: IR-SE50's, or ResNet-34's (ReStyle for things
    that are no faces)."""
    encoder_units: tuple[int, ...] = ()
    """How many in each of its stages; empty: 3 4 14 3, for ResNet-34 3 4 6 3."""
    encoder_channels: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of its stages."""
    encoder_head_channels: int = 0
    """Channels of the convolutions of each row's head; 0: as wide as a code. Most of a
    small encoder's weights are there."""
    encoder_rows: tuple[int, ...] = ()
    """Rows that a new encoder sees, first and one after the last; empty: all. Cars:
    32 224, into which the pictures are resized (LSUN's generator of cars draws them
    so). The losses are taken there."""
    trunk_net: str = ""
    """Network that the trunk of a new encoder starts from; empty: the identity network
    or weights/arcface, for ResNet blocks weights/resnet34, if there."""
    restyle: int = 0
    """ReStyle: so many refinements a step, the encoder also seeing what the codes so
    far give (published: 5); 0: none."""
    train_decoder: bool = False
    """Train the generator too."""
    code_lambda: float = 0.0
    """--data generated: weight of the mean squared difference to the known code."""
    optimizer: Literal["ranger", "adam"] = "ranger"
    """Ranger is the published one."""
    lr: float = 1e-4
    """Learning rate."""
    noise_mode: Literal["random", "const", "none"] = "random"
    """The generator's noise planes while training."""
    mirror: bool = True
    """Flip pictures at random where the task does."""
    perceptual_net: str = ""
    """LPIPS network; empty: LPIPS-AlexNet."""
    identity_net: str = ""
    """Identity network; empty: weights/arcface if there, else the one that ships."""
    similarity_net: str = ""
    """Similarity network for other things than faces; empty: weights/moco."""
    reading: data.Reading = data.ReadOptions()


class Setup(NamedTuple):
    """What a step is made of besides its options.

    Attributes:
      encoder, generator: modules.
      judges: modules by role.
      lambdas: weights of the losses by name; those of 0 are not computed.
      space: `w_plus`, or `z_plus`: codes go through the mapping row by row.
    """

    encoder: nn.Module
    generator: Generator
    judges: Mapping[str, nn.Module]
    lambdas: Mapping[str, float]
    space: str = "w_plus"


# Losses


def crop(images: Array) -> Array:
    """pSp's face region of pictures [batch, size, size, 3]."""
    rows, columns = (
        slice(*(round(n * images.shape[1] / 256) for n in edges))
        for edges in (ROWS, COLUMNS)
    )
    return images[:, rows, columns]


def picture_losses(
    setup: Setup,
    frozen: Mapping[str, Any],
    made: Array,
    wanted: Array,
    shown: Array | None = None,
) -> dict[str, Array]:
    """The losses on pictures with a weight, one value a sample [batch] each.

    `lpips`, `l2` (mean of squares), their `_crop` on the face region; `id` and
    `similarity`, 1 - cosine of embeddings (pSp, section 3.2 and appendix). These two
    come with a number to look at, `id_improve` or `similarity_improve`: by how much
    what is made is closer to what is wanted than what was shown is.

    Args:
      setup: judges and weights.
      frozen: the judges' parameters by role.
      made: [batch, size, size, 3].
      wanted: the same shape; no gradient flows into it.
      shown: what the encoder saw, [batch, size, size, channels]; None: what is wanted.
    """
    if rows := getattr(setup.encoder, "rows", ()):
        made, wanted = made[:, slice(*rows)], wanted[:, slice(*rows)]
        shown = None if shown is None else shown[:, slice(*rows)]
    wanted = jax.lax.stop_gradient(wanted)

    def lpips(a, b):
        judge = setup.judges["perceptual"]
        both = for_lpips(a), for_lpips(b)
        return judge.apply({"params": frozen["perceptual"]}, *both)

    def squares(a, b):
        return jnp.mean(jnp.square(a - b), (1, 2, 3))

    def likeness(role):
        """Cosines of what is made and of what was shown with what is wanted."""
        judge, params = setup.judges[role], {"params": frozen[role]}
        embed = functools.partial(judge.apply, params, method="embed")
        on_wanted = jax.lax.stop_gradient(embed(wanted))
        cosine = jnp.sum(embed(made) * on_wanted, -1)
        if shown is None:
            return cosine, jnp.ones_like(cosine)
        if shown.shape[-1] != 3:
            return cosine, None
        return cosine, jnp.sum(jax.lax.stop_gradient(embed(shown)) * on_wanted, -1)

    terms = {
        "lpips": lambda: lpips(made, wanted),
        "l2": lambda: squares(made, wanted),
        "lpips_crop": lambda: lpips(crop(made), crop(wanted)),
        "l2_crop": lambda: squares(crop(made), crop(wanted)),
    }
    terms = {k: term() for k, term in terms.items() if setup.lambdas.get(k)}
    for name, role in (("id", "identity"), ("similarity", "similarity")):
        if setup.lambdas.get(name):
            now, before = likeness(role)
            terms[name] = 1 - now
            if before is not None:
                terms[f"{name}_improve"] = jax.lax.stop_gradient(now - before)
    return terms


def code_loss(setup: Setup, codes: Array, batch: Mapping[str, Array]) -> dict:
    """Mean squared difference [batch] of codes to known ones, if it has a weight."""
    if not setup.lambdas.get("code") or "codes" not in batch:
        return {}
    return {"code": jnp.mean(jnp.square(codes - batch["codes"]), (1, 2))}


def length(x: Array, axes: tuple[int, ...]) -> Array:
    """Euclidean norm over axes; its gradient at 0 is 0, not NaN."""
    squares = jnp.sum(jnp.square(x), axes)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def total(lambdas: Mapping[str, float], terms: Mapping[str, Any]) -> Any:
    """The sum of the terms that have a weight, each a number."""
    return sum(lambdas[name] * terms[name] for name in terms if lambdas.get(name))


# Encoder and generator


class Passed(NamedTuple):
    """What one pass through encoder and generator gives.

    Attributes:
      codes: [batch, num_ws, w_dim] as the encoder means them.
      image: [batch, size, size, 3] at the encoder's size.
      stats: new running statistics of the encoder, if it trained.
    """

    codes: Array
    image: Array
    stats: Any = None


def draw(setup: Setup, generator_params: Any, codes: Array, **noise: Any) -> Array:
    """The generator's picture of codes, averaged or enlarged to the encoder's size."""
    generator, variables = setup.generator, {"params": generator_params}
    if setup.space == "z_plus":
        rows = codes.reshape(-1, codes.shape[-1])
        rows = generator.apply(variables, rows, method="mapping")
        codes = rows.reshape(codes.shape)
    image, _ = generator.apply(variables, codes, space="w_plus", **noise)
    return adaptive_pool(sharding.constrain(image), setup.encoder.size)


class Encoded(NamedTuple):
    """Codes [batch, num_ws, w_dim], and new running statistics of a training pass."""

    codes: Array
    stats: Any = None


def encode(
    setup: Setup,
    params: Mapping[str, Any],
    x: Array,
    *,
    before: Passed | None = None,
    **arguments: Any,
) -> Encoded:
    """Pictures to codes.

    Args:
      setup: modules.
      params: of `encoder`.
      x: inputs [batch, size, size, channels].
      before: ReStyle: the pass before, whose codes are refined.
      arguments: `train`, and `stage` of e4e's encoder.
    """
    if before is not None:
        x = jnp.concatenate([x, before.image], -1)
    codes, out = setup.encoder.apply({"params": params["encoder"]}, x, **arguments)
    if before is not None:
        codes = codes + before.codes
    else:
        codes = full_codes(setup.encoder, params["encoder"], codes)
    return Encoded(codes, out.get("batch_stats"))


def run(
    setup: Setup,
    params: Mapping[str, Any],
    x: Array,
    *,
    noise: Any,
    key: Array | None = None,
    **arguments: Any,
) -> Passed:
    """Encode pictures and draw them again.

    Args:
      setup: modules.
      params: of `encoder` and `generator`.
      x: inputs [batch, size, size, channels].
      noise, key: of the generator.
      arguments: of `encode`.
    """
    codes, stats = encode(setup, params, x, **arguments)
    image = draw(setup, params["generator"], codes, noise=noise, key=key)
    return Passed(codes, image, stats)


def first_pass(setup: Setup, params: Mapping[str, Any], batch: int) -> Passed:
    """ReStyle's start: the average code and its picture, for each sample."""
    codes = params["encoder"]["w_avg"][None]
    image = draw(setup, params["generator"], codes, noise="const")
    start = Passed(codes, image)
    return jax.tree.map(lambda v: jnp.repeat(v, batch, 0), start)


def gradients(
    loss_fn: Callable[..., tuple[Array, tuple[dict[str, Array], Passed]]],
    setup: Setup,
    options: EncodingOptions,
    params: Mapping[str, Any],
    trained: Sequence[str],
    frozen: Mapping[str, Any],
    batch: Mapping[str, Array],
    key: Array,
) -> tuple[dict[str, Any], dict[str, Array], Any]:
    """Gradients of a step: of one pass, or of all refinements of ReStyle.

    ReStyle (section 3.2): the gradients of all refinements add up, and none flows from
    one into the one before.

    Args:
      loss_fn: (trained, params, frozen, batch, before, noise) -> (loss, (terms,
        passed)); `before` is the pass before or None, `noise` the generator's
        arguments.
      setup: modules and weights.
      options: noise and refinements.
      params: of encoder and generator.
      trained: names of those that learn.
      frozen: the judges'.
      batch: `image`, and `input` where it differs.
      key: of the noise.

    Returns:
      Gradients by network, the (last pass's) terms, and new running statistics.
    """
    size = batch["image"].shape[0]
    grad = jax.grad(loss_fn, has_aux=True)

    def one(stats, before, key):
        now = params | {"encoder": merge_batch_stats(params["encoder"], stats)}
        keys = sharding.sample_keys(key, size)
        noise = {"noise": options.noise_mode, "key": keys}
        learning = {name: now[name] for name in trained}
        return grad(learning, now, frozen, batch, before, noise)

    stats = batch_stats(params["encoder"])
    if not options.restyle:
        grads, (terms, passed) = one(stats, None, key)
        return grads, terms, passed.stats

    def refine(carry, key):
        stats, before, sums = carry
        grads, (terms, passed) = one(stats, before, key)
        stats, passed = passed.stats, passed._replace(stats=None)
        passed = jax.lax.stop_gradient(passed)
        return (stats, passed, jax.tree.map(jnp.add, sums, grads)), terms

    zeros = jax.tree.map(jnp.zeros_like, {name: params[name] for name in trained})
    start = (stats, first_pass(setup, params, size), zeros)
    keys = jax.random.split(key, options.restyle)
    # Convolutions in a loop are slow on CPUs.
    unroll = jax.default_backend() == "cpu"
    (stats, _, grads), terms = jax.lax.scan(refine, start, keys, unroll=unroll)
    return grads, jax.tree.map(lambda v: v[-1], terms), stats


def inputs(batch: Mapping[str, Array]) -> Array:
    """What the encoder sees; where a task has no `input`, the picture itself."""
    return batch.get("input", batch["image"])


# Networks and judges


def check(options: EncodingOptions) -> None:
    """Refuse options that cannot be.

    Raises:
      UserError: a negative number of refinements, a code loss without known codes.
    """
    if options.restyle < 0:
        raise UserError(f"--restyle is {options.restyle}; it must not be negative")
    if options.encoder_head_channels < 0:
        raise UserError(
            f"--encoder-head-channels is {options.encoder_head_channels}; it must not "
            "be negative (0: as wide as a code)"
        )
    if options.code_lambda and options.data != GENERATED:
        raise UserError(
            "--code-lambda is given, but only --data generated knows the codes"
        )
    rows, step = options.encoder_rows, 1 << len(options.encoder_channels)
    if rows and not (
        len(rows) == 2
        and 0 <= rows[0] < rows[1] <= options.encoder_size
        and (rows[1] - rows[0]) % step == 0
    ):
        raise UserError(
            f"--encoder-rows is {' '.join(map(str, rows))}; it must be two of the "
            f"{options.encoder_size} rows, a multiple of {step} apart"
        )
    if options.source and options.data == GENERATED:
        raise UserError(f"--source is {options.source!r}, but --data is {GENERATED}")


def load_judges(
    options: EncodingOptions, lambdas: Mapping[str, float], dtype: Any
) -> dict[str, judges.Judge]:
    """The judges that losses with a weight need, by role.

    Raises:
      UserError: see `judges.choose`; identity and similarity together.
    """
    if lambdas.get("id") and lambdas.get("similarity"):
        raise UserError(
            "--id-lambda and --similarity-lambda are both above 0; identity is for "
            "faces, similarity for everything else: set one to 0"
        )
    wanted = {
        "perceptual": ("lpips", "lpips_crop"),
        "identity": ("id",),
        "similarity": ("similarity",),
    }
    return {
        role: judges.choose(role, getattr(options, f"{role}_net"), dtype)
        for role, names in wanted.items()
        if any(lambdas.get(name) for name in names)
    }


def make_networks(
    options: EncodingOptions, make: Callable[..., nn.Module], channels: int, run: Any
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Encoder and generator, and their first parameters, by name.

    The encoder is, in this order: the one in `--start`; the one beside the generator in
    `--weights`; a new one, its trunk from the ArcFace network if that is at hand and of
    the same shape (published), else random.

    Args:
      options: weights and sizes.
      make: class of the encoder, or a partial of it.
      channels: of its input pictures.
      run: RunOptions, for seed and dtype.

    Raises:
      UserError: an encoder of another kind or size than asked for.
    """
    model, params = weights.load(options.weights)
    generator = working(model["generator"], run)
    params = {"generator": params["generator"]} | {
        k: v for k, v in params.items() if k == "encoder"
    }
    channels *= 2 if options.restyle else 1
    fields = {"level_rows": ()} if options.restyle else {}
    if options.encoder_head_channels:
        fields["head_channels"] = options.encoder_head_channels
    fresh = make(
        num_styles=generator.num_ws,
        size=options.encoder_size,
        in_channels=channels,
        units=options.encoder_units or UNITS[options.encoder_blocks],
        channels=options.encoder_channels,
        w_dim=generator.w_dim,
        blocks=options.encoder_blocks,
        rows=options.encoder_rows,
        **fields,
    )
    if options.start:
        model, other = weights.load(options.start)
        params["encoder"] = other[_only_encoder(model, options.start)]
    if "encoder" in params:
        where = options.start or options.weights
        encoder = model["encoder"]
        for name in ("num_styles", "in_channels", "w_dim"):
            got, asked = getattr(encoder, name), getattr(fresh, name)
            if got != asked:
                hint = {
                    "num_styles": "it belongs to a generator of another size",
                    "in_channels": "see --task, --classes, --restyle",
                    "w_dim": "it belongs to another generator",
                }[name]
                raise UserError(
                    f"the encoder of {where} has {name} {got}, not {asked}: {hint}"
                )
        if type(encoder) is not type(fresh):
            raise UserError(
                f"{where} holds a {type(encoder).__name__}; this training is of a "
                f"{type(fresh).__name__}: see --encoder, or give another --start"
            )
        for name in ("size", "blocks", "units", "channels", "head_channels", "rows"):
            option = f"encoder_{name}"
            if getattr(options, option) == getattr(EncodingOptions, option):
                continue
            got, asked = getattr(encoder, name), getattr(fresh, name)
            if got != asked:
                raise UserError(
                    f"--{option.replace('_', '-')} is {asked}, but the encoder of "
                    f"{'--start' if options.start else '--weights'} {where} has {got} "
                    "and goes on: leave it out"
                )
        print(f"encoder: goes on from {where}")
        if encoder.start_from_w_avg != fresh.start_from_w_avg:
            how = "start" if encoder.start_from_w_avg else "do not start"
            print(f"encoder: as there, its codes {how} from the average one")
    else:
        encoder = fresh
        params["encoder"] = _fresh_params(options, fresh, run.seed)
        average = params["generator"]["w_avg"]
        rows = jnp.repeat(average[None], fresh.num_styles, 0)
        params["encoder"]["w_avg"] = rows if fresh.start_from_w_avg else 0 * rows
    networks = {"encoder": encoder.clone(dtype=run.dtype), "generator": generator}
    return networks, {name: params[name] for name in networks}


def _only_encoder(model: Mapping[str, nn.Module], where: str) -> str:
    if "encoder" not in model:
        raise UserError(f"--start {where} holds no encoder, only {', '.join(model)}")
    return "encoder"


def _fresh_params(options: EncodingOptions, encoder: nn.Module, seed: int) -> Any:
    """Random parameters, the trunk from a network of its shapes where there is one.

    Published: ArcFace, or of ResNet blocks torchvision's ResNet-34.
    """
    key = jax.random.key(seed)
    params = jax.jit(lambda k: encoder.init_params(key=k))(key)
    resnet = encoder.blocks == "resnet"
    usual = RESNET if resnet else options.identity_net or judges.ARCFACE
    folder = options.trunk_net or usual
    try:
        model, other = weights.load(folder)
    except UserError:
        if options.trunk_net:
            raise
        model, other = {}, {}
    found = resnet_trunk(model, other) if resnet else arcface_trunk(model, other)
    shapes = functools.partial(jax.tree.map, jnp.shape)
    body = {k: v for k, v in params.items() if k.startswith("body_")}
    if found is None or shapes(body) != shapes({k: found.get(k) for k in body}):
        if options.trunk_net:
            raise UserError(
                f"--trunk-net is {folder!r}; its trunk has other shapes than the "
                f"encoder's {options.encoder_blocks} blocks"
            )
        name = "torchvision's ResNet-34" if resnet else "the ArcFace trunk"
        print(f"encoder: new, from random weights (published: {name})")
        return params
    print(f"encoder: new, its trunk from {folder}")
    trunk = {k: found[k] for k in body}
    layer = params["input"] | found["input"]
    if encoder.in_channels == 3:
        trunk["input"] = layer
    elif options.restyle and encoder.in_channels == 6:
        # ReStyle's start: the picture's half pretrained, the other N(0, 1).
        half = jax.random.normal(jax.random.fold_in(key, 1), layer["conv"].shape)
        trunk["input"] = layer | {"conv": jnp.concatenate([layer["conv"], half], 2)}
    return params | trunk


def arcface_trunk(model: Mapping[str, nn.Module], params: Mapping[str, Any]) -> Any:
    """ArcFace's layers by an encoder's names, or None where there is none."""
    name = next((n for n in model if isinstance(model[n], ArcFace)), None)
    return name and params[name]


def resnet_trunk(model: Mapping[str, nn.Module], params: Mapping[str, Any]) -> Any:
    """A ResNet's layers by an encoder's names, or None where there is none.

    Only of those with two convolutions a block: 18 and 34.
    """
    name = next((n for n in model if isinstance(model[n], ResNet)), None)
    if name is None or model[name].bottleneck:
        return None
    found = {"input": params[name]["input"]}
    for key, block in params[name].items():
        if not key.startswith("block_"):
            continue
        layers = {}
        for n in (1, 2):
            layers[f"conv{n}"] = block[f"layer_{n - 1}"]["conv"]
            layers[f"norm{n}"] = block[f"layer_{n - 1}"]["norm"]
        if "shortcut" in block:
            layers["shortcut"] = block["shortcut"]
        found[key.replace("block", "body")] = layers
    return found


def make_optimizers(options: EncodingOptions) -> dict[str, Any]:
    """The optimiser of each network that trains, by name."""
    if options.optimizer == "ranger":
        tx = optim.ranger(options.lr, whole=WHOLE)
    else:
        tx = optim.adam(options.lr, (0.9, 0.999))
    names = ["encoder"] + ["generator"] * options.train_decoder
    return {name: optim.frozen(tx, NOT_TRAINED) for name in names}


def begin(options: EncodingOptions, state: TrainState, steps: int) -> TrainState:
    """A fresh state at the iteration that the options ask for.

    Args:
      options: `resume`, `first_step`.
      state: fresh.
      steps: iterations in all.

    Raises:
      UserError: both options, no iterations left, or see `resume.resume`.
    """
    first = options.first_step
    if first < 0 or first >= steps:
        raise UserError(f"--first-step is {first}; it must be from 0 to below --steps")
    if not options.resume:
        return state.replace(step=jnp.asarray(first, jnp.int32))
    if first:
        raise UserError("--first-step is given with --resume, which knows the step")
    folder = options.start or options.weights
    return resume.resume(state, folder, options.optimizer, steps)


def update(
    state: TrainState,
    optimizers: Mapping[str, Any],
    grads: Mapping[str, Any],
    stats: Any,
    active: Mapping[str, Any] | None = None,
) -> TrainState:
    """One update of the networks that train, and of the running statistics.

    Args:
      state: before it.
      optimizers: by name.
      grads: by name.
      stats: the encoder's new running statistics.
      active: see `optim.ranger`, for the encoder.
    """
    params, opt_state = dict(state.params), dict(state.opt_state)
    for name, grad in grads.items():
        tx = optimizers[name]
        more = {"active": active} if name == "encoder" and active else {}
        params[name], opt_state[name] = optim.apply(
            tx, grad, opt_state[name], params[name], **more
        )
    params["encoder"] = merge_batch_stats(params["encoder"], stats)
    return state.replace(params=params, opt_state=opt_state)


# Data, validation, sample grids


def open_data(options: EncodingOptions, kind: str, validation: bool = False) -> Any:
    """The source that a task's transform takes.

    Args:
      options: `data` and `source`, or those to validate on.
      kind: of `TRANSFORMS`.
      validation: which.
    """
    folder = options.reading.tfds_folder
    wanted, given = options.data, options.source
    if validation:
        wanted, given = options.val_data, options.val_source
    if kind in ("same", "low_resolution"):
        if given:
            raise UserError(f"--source is {given!r}, but the task's inputs are --data")
        return data.open_pictures(wanted, folder)
    return data.open_pairs(wanted, given, labels=kind == "labels", tfds_folder=folder)


TRANSFORMS = {
    "same": transforms.same,
    "apart": transforms.apart,
    "sketch": transforms.sketch,
    "labels": transforms.labels,
    "low_resolution": transforms.low_resolution,
}


def make_transform(kind: str, **arguments: Any) -> data.Transform:
    """A task's transform with those of the arguments that it takes."""
    function = TRANSFORMS[kind]
    names = function.__kwdefaults__ or {}
    names = {"size", *names}
    taken = {k: v for k, v in arguments.items() if k in names}
    return functools.partial(function, **taken)


def preview_of(source: Any, transform: data.Transform) -> dict[str, Array]:
    """The first pictures of a source, as a batch for the sample grids."""
    items = [
        data.first_readable(source, i, transform, i)[0]
        for i in range(min(PREVIEW, len(source)))
    ]
    return {k: jnp.stack([item[k] for item in items]) for k in items[0]}


def generate(
    setup: Setup, params: Any, key: Array, batch: int, mixing: float
) -> dict[str, Array]:
    """Pictures of the generator [batch, size, size, 3] and their codes.

    Args:
      setup: modules and space.
      params: of the generator.
      key: of codes and noise.
      batch: how many.
      mixing: share of codes that are one up to a row and another from it on.
    """
    generator, variables = setup.generator, {"params": params}
    k1, k2, k3, k4 = jax.random.split(key, 4)
    z = [sharding.sample_normal(k, batch, generator.z_dim) for k in (k1, k2)]
    # Samples decide for themselves, so that none depends on the batch.
    draws = jax.vmap(jax.random.uniform)(sharding.sample_keys(k3, batch))
    rows = generator.num_ws
    crossover = jnp.where(draws < mixing, draws / (mixing or 1) * rows, rows)
    first = jnp.arange(rows)[:, None] < crossover[:, None, None]
    if setup.space == "w_plus":
        z = [generator.apply(variables, x, method="mapping") for x in z]
    codes = jnp.where(first, z[0][:, None], z[1][:, None])
    keys = sharding.sample_keys(k4, batch)
    image = draw(setup, params, codes, noise="random", key=keys)
    return {"image": image, "codes": codes}


def make_sample(
    setup: Setup, steps: int, stage_of: Callable[[Array], Any] | None = None
) -> Callable[[TrainState, Mapping[str, Any]], Array]:
    """Grids of inputs, pictures wanted and pictures made, one row each.

    Args:
      setup: modules.
      steps: refinements.
      stage_of: e4e's stage from the step.
    """

    def sample(state, frozen):
        shown = frozen["preview"]
        more = {"stage": stage_of(state.step)} if stage_of else {}
        passed = evaluate(setup, state.params, inputs(shown), steps, **more)
        return jnp.stack([displayed(inputs(shown)), shown["image"], passed.image])

    return sample


def evaluate(
    setup: Setup, params: Mapping[str, Any], x: Array, steps: int, **arguments: Any
) -> Passed:
    """Encode and draw with fixed noise; `steps` refinements if above 0 (ReStyle)."""
    arguments |= {"noise": "const"}
    if not steps:
        return run(setup, params, x, **arguments)
    passed = first_pass(setup, params, x.shape[0])
    for _ in range(steps):
        passed = run(setup, params, x, before=passed, **arguments)
    return passed


def displayed(x: Array) -> Array:
    """Inputs of any number of channels as pictures [batch, h, w, 3]."""
    channels = x.shape[-1]
    if channels == 3:
        return x
    grey = x if channels == 1 else jnp.argmax(x, -1, keepdims=True) / (channels - 1)
    return jnp.repeat(2 * grey - 1, 3, -1)


def training_data(
    options: EncodingOptions,
    kind: str,
    transform: Callable[..., Any],
    run: Any,
    mesh: Any,
    setup: Setup,
    generator_params: Any,
    mixing: float,
) -> tuple[data.Batches | None, dict[str, Array], str]:
    """Batches, pictures for the sample grids, and a digest of the data.

    Of generated data there are no batches and no digest.

    Args:
      options: what to read, and how.
      kind: of `TRANSFORMS`.
      transform: (mirror=bool) -> the transform.
      run: RunOptions.
      mesh: of the run.
      setup, generator_params, mixing: of `generate`.
    """
    if options.data == GENERATED:
        key = jax.random.key(run.seed)
        shown = generate(setup, generator_params, key, PREVIEW, mixing)
        return None, {"image": shown["image"]}, ""
    source = open_data(options, kind)
    batches = data.batches(
        source,
        run.batch,
        mesh,
        seed=run.seed,
        transform=transform(mirror=options.mirror),
        reading=options.reading,
    )
    preview = preview_of(source, transform(mirror=False))
    return batches, preview, data.fingerprint(source)


def validation(
    options: EncodingOptions,
    kind: str,
    transform: Callable[..., Any],
    run: Any,
    mesh: Any,
    setup: Setup,
    losses: Callable[[Mapping[str, Any], Mapping[str, Any], Any, Any], dict],
) -> tuple[int, loop.Validate] | None:
    """What `fit` validates with, or None where there is no set to validate on.

    Args:
      options, kind, transform, run, mesh: see `training_data`.
      setup: weights of the losses.
      losses: see `make_validate`.

    Raises:
      UserError: fewer pictures than devices that each take some of a batch.
    """
    if not options.val_data:
        return None
    source = open_data(options, kind, validation=True)
    places = sharding.batch_places(mesh)
    if len(source) < places:
        raise UserError(
            f"--val-data is {options.val_data}, which holds only {len(source)} "
            f"pictures for {places} devices of the mesh's data and fsdp axes; use more "
            "pictures, or fewer devices with --mesh-data"
        )
    batch = min(run.batch, len(source) // places * places)

    def open_batches():
        return data.batches(
            source,
            batch,
            mesh,
            seed=0,
            transform=transform(mirror=False),
            shuffle=False,
            reading=options.reading,
        )

    validate = make_validate(setup, open_batches, len(source), batch, mesh, losses)
    return options.val_every, validate


def make_validate(
    setup: Setup,
    batches: Callable[[], data.Batches],
    count: int,
    batch: int,
    mesh: Any,
    losses: Callable[[Mapping[str, Any], Mapping[str, Any], Any, Any], dict],
) -> Callable[[TrainState, Mapping[str, Any]], dict[str, float]]:
    """Mean losses over a whole validation set, stored statistics in the encoder.

    Args:
      setup: weights of the losses.
      batches: opens the set in its order, `batch` samples a time.
      count: samples in the set.
      batch: global batch; what the last one has too much is not counted.
      mesh: of the run.
      losses: (params, frozen, batch, step) to values [batch] by name.
    """
    everywhere = sharding.replicated(mesh)
    step = jax.jit(losses, out_shardings=everywhere)

    def validate(state, frozen):
        stream, sums, left = batches(), {}, count
        while left > 0:
            rows = sharding.global_batch(next(stream), mesh)
            values = step(state.params, frozen, rows, state.step)
            for name, value in jax.device_get(values).items():
                sums[name] = sums.get(name, 0.0) + float(np.sum(value[:left]))
            left -= batch
        stream.close()
        means = {name: value / count for name, value in sums.items()}
        loss = total(setup.lambdas, means)
        return {"val_loss": loss} | {f"val_{k}": v for k, v in means.items()}

    return validate
