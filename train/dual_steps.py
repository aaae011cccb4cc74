"""What the adversarial stages of DualStyleGAN have in common: stages 2 and 3.

Yang et al., "Pastiche Master" (arXiv 2203.13248), section 3.3. The base generator is
frozen and shared, so the state of a stage holds:

| network         | what                                                            |
| --------------- | --------------------------------------------------------------- |
| `dual_trained`  | the extrinsic path that learns                                  |
| `dual`          | its moving average, in `ema`: what a loaded run draws with      |
| `discriminator` | learns                                                          |
| `generator`     | the base; carried along, no optimiser                           |

The names are those of a converted `generator-pretrain.pt`, from which stage 3 may
start. A stage says what it draws and how codes follow from that; the steps of D, R1,
path length and average are here.

The published averages leave T_s out, so it stays at its random start in them while the
blocks beside it learn with a T_s that moves. We average the whole path; `--ema
published` is the other. The published path length is taken with one device's own
running mean; ours is one for all.

**Accumulation**: `--accumulate n` takes a batch in n parts, one after the other, and
updates once with the mean of their gradients. Published: 8 devices with 4 pictures
each; one device does the same with `--batch 32 --accumulate 8`. What couples the
pictures of a batch (the minibatch deviation of D, the centre of the contextual loss)
then sees a part, as it sees a device's share there.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax import Array, lax
from jax.sharding import Mesh

from jaxstyle import weights
from jaxstyle.dualstylegan import DualStyleGAN
from jaxstyle.encoders import adaptive_pool
from jaxstyle.encoding import Encoder, load_encoder
from jaxstyle.errors import UserError
from jaxstyle.stylegan2 import Discriminator, Generator
from train import augment, loop, optim, sharding, stylegan2
from train.cli import RunOptions, working
from train.state import TrainState, create_state, update_ema

EMA_DECAY = 0.5 ** (32 / 10_000)


@dataclasses.dataclass(frozen=True)
class AdversarialOptions:
    """Options of both adversarial stages."""

    lr: float = 2e-3
    """Adam's rate, before the scaling for lazy regularisation."""
    accumulate: int = 1
    """Parts that a batch is taken in, to save memory."""
    r1: float = 10.0
    """Weight of R1."""
    path_regularize: float = 2.0
    """Weight of the path length, which is taken in the intrinsic codes."""
    path_batch_shrink: int = 2
    """The path length runs on the batch divided by this."""
    d_reg_every: int = 16
    """Iterations between R1 updates; 0: none."""
    g_reg_every: int = 4
    """Iterations between path-length updates; 0: none."""
    mixing: float = 0.9
    """Probability that a batch mixes two intrinsic codes."""
    ema: Literal["whole", "published"] = "whole"
    """Average the whole extrinsic path, or all but T_s."""
    judge_size: int = 256
    """Pixels a side at which pictures are judged."""
    augmenting: augment.Augmenting = augment.AugmentOptions()


Adversarial = Annotated[AdversarialOptions, tyro.conf.OmitArgPrefixes]


class Setup(NamedTuple):
    """What the steps are made of.

    Attributes:
      options: of the adversarial part.
      batch: global batch.
      adversarial_weight: times the losses of D and G, but not the regularisers.
      generator, dual, discriminator: modules.
    """

    options: AdversarialOptions
    batch: int
    adversarial_weight: float
    generator: Generator
    dual: DualStyleGAN
    discriminator: Discriminator


class Codes(NamedTuple):
    """Codes of pictures.

    Attributes:
      intrinsic: w+ [batch, num_ws, w_dim].
      extrinsic: w+ [batch, num_ws, w_dim]; None for the generator alone.
      keys: of the layers' noise, [batch]; None: the stored planes.
    """

    intrinsic: Array
    extrinsic: Array | None
    keys: Array | None


# What a stage hands to the steps: what it draws, arrays with a leading batch axis by
# name; and the codes of such rows.
Rows = Mapping[str, Any]
Draw = Callable[[TrainState, Mapping[str, Any], Mapping[str, Any]], Rows]
ToCodes = Callable[[Rows, TrainState, Mapping[str, Any]], Codes]


def pictures(setup: Setup, params: Any, base: Any, codes: Codes) -> Array:
    """G(codes), [batch, size, size, 3].

    Args:
      setup: modules.
      params: of the extrinsic path; None draws with the generator alone.
      base: of the generator.
      codes: see there.
    """
    options: dict[str, Any] = {"space": "w_plus"}
    if codes.keys is not None:
        options |= {"noise": "random", "key": codes.keys}
    if params is None:
        image, _ = setup.generator.apply({"params": base}, codes.intrinsic, **options)
    else:
        image, _ = setup.dual.apply(
            {"params": params},
            setup.generator,
            base,
            codes.intrinsic,
            codes.extrinsic,
            extrinsic_space="w_plus",
            **options,
        )
    return sharding.constrain(image)


def rows_of_w(generator: Generator, base: Any, z: Array) -> Array:
    """z [batch, z_dim] as w+ [batch, num_ws, w_dim]."""
    w = generator.apply({"params": base}, z, method="mapping")
    return jnp.broadcast_to(w[:, None], (len(w), generator.num_ws, w.shape[1]))


def mixed(generator: Generator, base: Any, rows: Rows, mix_from: str = "mix_from"):
    """w+ [batch, num_ws, w_dim] of `z`, from row `mix_from` [batch] on of `z_mix`."""
    first, second = (rows_of_w(generator, base, rows[n]) for n in ("z", "z_mix"))
    kept = jnp.arange(generator.num_ws)[:, None] < rows[mix_from][:, None, None]
    return jnp.where(kept, first, second)


def draw_mixed(setup: Setup, key: Array, batch: int) -> dict[str, Array]:
    """`z`, `z_mix`, `mix_from` (one for the batch), `keys`, `path`: [batch, ...]."""
    inputs = stylegan2.draw_inputs(setup.generator, setup.options.mixing, key, batch)
    return {
        "z": inputs.z,
        "z_mix": inputs.z_mix,
        "mix_from": jnp.broadcast_to(inputs.mix_from, (batch,)),
        "keys": inputs.noise["key"],
        "path": inputs.path,
    }


def path_batch(setup: Setup) -> int:
    """Pictures that count in a path-length step."""
    return max(1, setup.batch // setup.options.path_batch_shrink)


def path_rows(setup: Setup) -> int:
    """Pictures to draw for it, see `sharding.filled`; parts of a batch stay."""
    count = path_batch(setup)
    return count if setup.options.accumulate > 1 else sharding.filled(count)


def judged(setup: Setup, images: Array) -> Array:
    """Pictures at the size at which they are judged: averaged, or pixels repeated."""
    return adaptive_pool(images, setup.options.judge_size)


# Accumulation


def in_parts(function: Callable[[Any], tuple[Any, Any]], rows: Any, parts: int):
    """Mean gradients over the parts of a batch, taken one after the other.

    Args:
      function: rows to (gradients, anything else).
      rows: tree of arrays [batch, ...]. A part takes every n-th row, so that on many
        devices each has a share of every part.
      parts: how many; a divisor of the batch.

    Returns:
      The mean gradients, and the rest of every part stacked, [parts, ...].
    """
    if parts == 1:
        grads, out = function(rows)
        return grads, jax.tree.map(lambda x: x[None], out)

    def split(x):
        return jnp.moveaxis(x.reshape(len(x) // parts, parts, *x.shape[1:]), 1, 0)

    rows = jax.tree.map(split, rows)
    first = jax.tree.map(lambda x: x[0], rows)
    shapes, _ = jax.eval_shape(function, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, part):
        grads, out = function(part)
        return jax.tree.map(jnp.add, total, grads), out

    total, out = lax.scan(add, zeros, rows)
    return jax.tree.map(lambda x: x / parts, total), out


def parts_of(count: int, parts: int) -> int:
    """The most parts, up to so many, that divide a count."""
    return next(n for n in range(min(parts, count), 0, -1) if count % n == 0)


def averaged(out: Mapping[str, Array]) -> dict[str, Array]:
    """Metrics of the parts as numbers."""
    return {name: jnp.mean(x) for name, x in out.items()}


# Steps


def shower(setup: Setup, state: TrainState) -> Callable[[Array, Any], Array]:
    """(pictures, keys) to what the discriminator sees of them."""
    return partial(augment.shown, setup.options.augmenting, state.extra)


def show_keys(setup: Setup, state: TrainState) -> dict[str, Array]:
    """Keys of the augmentation of made and real pictures; nothing without it."""
    if not setup.options.augmenting.augment:
        return {}
    keys = (jax.random.fold_in(state.key, i) for i in (100, 101))
    names = ("show_made", "show_real")
    return {
        n: sharding.sample_keys(k, setup.batch)
        for n, k in zip(names, keys, strict=True)
    }


def update(
    optimizers: Mapping[str, Any], state: TrainState, name: str, grads: Any
) -> TrainState:
    """One update of a network."""
    params, opt_state = optim.apply(
        optimizers[name], grads, state.opt_state[name], state.params[name]
    )
    return state.replace(
        params=state.params | {name: params},
        opt_state=state.opt_state | {name: opt_state},
    )


def d_step(setup: Setup, optimizers: Any, draw: Draw, to_codes: ToCodes) -> loop.Step:
    """D's logistic loss; `draw` also gives the real pictures, `real`."""

    def step(state, frozen, batch):
        rows = {**draw(state, frozen, batch), **show_keys(setup, state)}
        show, base = shower(setup, state), state.params["generator"]

        def gradients(rows):
            codes = to_codes(rows, state, frozen)
            fake = pictures(setup, state.params["dual_trained"], base, codes)
            fake = show(fake, rows.get("show_made"))
            real = show(rows["real"], rows.get("show_real"))

            def loss(params):
                value, logits = stylegan2.discriminator_loss(
                    setup.discriminator, params, real, fake
                )
                value *= setup.adversarial_weight
                return value, {"d_loss": value} | logits

            return jax.grad(loss, has_aux=True)(state.params["discriminator"])

        grads, out = in_parts(gradients, rows, setup.options.accumulate)
        extra, metrics = augment.learned(
            setup.options.augmenting, state.extra, out["real_score"].reshape(-1, 1)
        )
        state = update(optimizers, state, "discriminator", grads)
        return state.replace(extra=extra), averaged(out) | metrics

    return step


def r1_step(setup: Setup, optimizers: Any, real_of: Callable[..., Array]) -> loop.Step:
    """R1 on real pictures, those of the iteration: (state, batch) -> [batch, ...]."""

    def step(state, frozen, batch):
        rows = {"real": real_of(state, batch), **show_keys(setup, state)}
        weight = setup.options.r1 / 2 * setup.options.d_reg_every
        show = shower(setup, state)

        def gradients(rows):
            def loss(params):
                value = stylegan2.r1_penalty(
                    setup.discriminator,
                    params,
                    rows["real"],
                    partial(show, keys=rows.get("show_real")),
                )
                return weight * value, {"r1": value}

            return jax.grad(loss, has_aux=True)(state.params["discriminator"])

        grads, out = in_parts(gradients, rows, setup.options.accumulate)
        return update(optimizers, state, "discriminator", grads), averaged(out)

    return step


def path_step(
    setup: Setup,
    optimizers: Any,
    draw: Draw,
    to_codes: ToCodes,
    mean_of: Callable[[TrainState], Array] = lambda state: state.extra["path_mean"],
) -> loop.Step:
    """The path length in the intrinsic codes; `draw` also gives `path`.

    Color rows have no gradient there, being replaced by the exemplar's, and count in
    the mean over rows.

    Args:
      setup, optimizers: see there.
      draw, to_codes: of the stage.
      mean_of: the running mean that a state goes on from.
    """

    def step(state, frozen, batch):
        rows, base = draw(state, frozen, batch), state.params["generator"]
        weight = setup.options.path_regularize * setup.options.g_reg_every
        mean = mean_of(state)
        count = path_batch(setup)
        # As large as the parts of the other steps, so that they split as evenly.
        most = -(-setup.options.accumulate // setup.options.path_batch_shrink)
        parts = parts_of(count, most)

        def gradients(rows):
            codes = to_codes(rows, state, frozen)

            def loss(params):
                def projection(w_plus):
                    image = pictures(
                        setup, params, base, codes._replace(intrinsic=w_plus)
                    )
                    return jnp.sum(image * rows["path"])

                slope = jax.grad(projection)(codes.intrinsic)[: count // parts]
                lengths = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(slope), 2), 1))
                new = mean + stylegan2.PATH_DECAY * (jnp.mean(lengths) - mean)
                value = jnp.mean(jnp.square(lengths - new))
                metrics = {"path": value, "path_mean": new, "path_length": lengths}
                return weight * value, metrics

            return jax.grad(loss, has_aux=True)(state.params["dual_trained"])

        grads, out = in_parts(gradients, rows, parts)
        state, metrics = update(optimizers, state, "dual_trained", grads), averaged(out)
        extra = state.extra | {"path_mean": metrics["path_mean"]}
        return state.replace(extra=extra), metrics

    return step


def ema_step(setup: Setup) -> loop.Step:
    """The moving average of the extrinsic path."""

    def step(state, frozen, batch):
        old, new = state.ema["dual"], state.params["dual_trained"]
        average = update_ema(old, new, EMA_DECAY)
        if setup.options.ema == "published":
            average |= {"structure": old["structure"]}
        return state.replace(ema={"dual": average}), {}

    return step


# Set-up


def check(options: AdversarialOptions, run: RunOptions, mesh: Mesh) -> None:
    """Refuse values that cannot be.

    Raises:
      UserError: naming the option.
    """
    sharding.check_batch(run.batch, mesh)
    augment.check(options.augmenting)
    for name in ("accumulate", "path_batch_shrink", "judge_size"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {getattr(options, name)}; it must be above 0")
    parts, places = options.accumulate, sharding.batch_places(mesh)
    if run.batch % (parts * places):
        raise UserError(
            f"--accumulate is {parts} with --batch {run.batch} over {places} devices; "
            f"the batch must be a multiple of {parts * places}"
        )


def load_networks(
    name: str, run: RunOptions, init_noise: float | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Networks of a stage by name, and where they start from.

    Args:
      name: folder with a generator, and what else there is: discriminator, `dual`,
        `dual_trained`.
      run: dtype, remat and seed.
      init_noise: of a fresh extrinsic path, see `DualStyleGAN.init_params`; None
        refuses a folder without one.

    Raises:
      UserError: no generator, or no extrinsic path where one is needed.
    """
    model, params = weights.load(name)
    generator = model.generator
    shape = (generator.size, generator.channel_multiplier, generator.channels)
    key = jax.random.key(run.seed)
    networks = {"generator": generator}
    if "discriminator" in model:
        networks["discriminator"] = model.discriminator
    else:
        print(f"{name} holds no discriminator: a fresh one is trained")
        networks["discriminator"] = Discriminator(*shape)
        params["discriminator"] = networks["discriminator"].init_params(key=key)
    networks = {n: working(m, run) for n, m in networks.items()}
    if "dual" in model:
        print(f"extrinsic path: goes on from {name}")
        networks["dual"] = model.dual
        trained = params.get("dual_trained", params["dual"])
    elif init_noise is None:
        raise UserError(
            f"{name} holds no extrinsic path (dual), only {', '.join(model)}; give a "
            "run of train.dual_pretrain or a converted DualStyleGAN"
        )
    else:
        networks["dual"] = DualStyleGAN(*shape, w_dim=generator.w_dim)
        make = jax.jit(partial(networks["dual"].init_params, init_noise=init_noise))
        params["dual"] = trained = make(key=jax.random.fold_in(key, 1))
    networks["dual_trained"] = networks["dual"]
    params["dual_trained"] = trained
    return networks, {n: params[n] for n in networks}


def z_plus_encoder(name: str, folder: str, generator: Generator, dtype: str) -> Encoder:
    """The encoder to z+ that a stage takes codes from.

    Args:
      name: its folder; empty: the stage's own weights, or what these name in their
        metadata as `z_plus_encoder`.
      folder: those.
      generator: that its codes are for.
      dtype: of its convolutions.

    Raises:
      UserError: there is none, or one of another space.
    """
    where = name
    if not where:
        config = weights.read_config(folder)
        own = folder if "encoder" in config["networks"] else ""
        where = config["metadata"].get("z_plus_encoder", own)
    if not where:
        raise UserError(
            f"{folder} holds no encoder; name one with --encoder: converted from "
            "encoder.pt, or trained by train.psp --space z_plus"
        )
    found = load_encoder(where, generator)
    if found.space != "z_plus" or found.inputs != "photo":
        raise UserError(
            f"the encoder of {where} makes {found.space} of {found.inputs}s; it must "
            "make z+ of photos: train.psp --space z_plus"
        )
    print(f"encoder: {where}", flush=True)
    return found._replace(module=found.module.clone(dtype=dtype))


def make_optimizers(options: AdversarialOptions) -> dict[str, Any]:
    """Adam of the two networks that learn."""
    return {
        "dual_trained": optim.adam(options.lr, lazy_every=options.g_reg_every),
        "discriminator": optim.adam(options.lr, lazy_every=options.d_reg_every),
    }


def make_state(
    options: AdversarialOptions, run: RunOptions, params: Any, optimizers: Any
) -> TrainState:
    """The state before the first iteration."""
    return create_state(
        {n: p for n, p in params.items() if n != "dual"},
        optimizers,
        key=jax.random.key(run.seed),
        ema={"dual": params["dual"]},
        extra={"path_mean": jnp.zeros(())} | augment.start_extra(options.augmenting),
    )
