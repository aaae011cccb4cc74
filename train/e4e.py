"""e4e: codes that are easy to edit, near those of the mapping network.

Tov et al., "Designing an Encoder for StyleGAN Image Manipulation", arXiv 2102.02766.
One base code w for all rows, and an offset for each other row; rows learn theirs one
after the other, and a critic D on single codes keeps them near the mapping's:

    E      λ_D mean over rows softplus(-D(row))            (eq. 2, non-saturating)
           + λ_Δ sum over rows ‖row - w‖₂                   (eq. 4)
           + λ₂ ‖y - ŷ‖² + λ_LPIPS LPIPS(y, ŷ) + λ_id (1 - ⟨R(y), R(ŷ)⟩)
    D      softplus(-D(w(z))) + softplus(D(a row))
    R1     γ/2 · k · E ‖∇ D(w(z))‖²                         every k = 16 iterations

Row 1 joins at iteration 20,000, every 2,000 another. The stage is a traced mask: one
compilation for all of them; Ranger counts each row's updates from when it joins.

    python -m train.e4e --data ffhq --weights weights/ffhq
    python -m train.e4e --data cars --weights weights/cars --id-lambda 0 \
        --similarity-lambda 0.5 --encoder-rows 32 224

Published: 200,000 to 300,000 iterations of batch 8. Losses of D stay near 0.5 to 0.6
each. An encoder from before the last row has joined (52,000 at 1024 px) reads well only
up to its rows; the others' offsets are untrained.

`--restyle 5` trains ReStyle's e4e (arXiv 2104.02699), with `--encoder-blocks resnet`
its version for things that are no faces; its published code shows the critic offsets
without the average code, this one the codes. `--resume` goes on from a checkpoint of
the original's training (`--save_training_data`), converted: same step and optimisers.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from jax import Array

from jaxstyle import weights
from jaxstyle.encoders import Encoder4Editing, LatentDiscriminator, merge_batch_stats
from jaxstyle.errors import UserError, cli
from train import encoding, loop, optim, sharding
from train.cli import RunOptions, Shared, parse, start, with_out
from train.encoding import EncodingOptions, Setup
from train.state import TrainState, create_state

CRITIC = "latent_discriminator"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of train.e4e; the defaults are the published ones for faces."""

    common: Annotated[EncodingOptions, tyro.conf.OmitArgPrefixes]
    lpips_lambda: float = 0.8
    """Weight of LPIPS."""
    l2_lambda: float = 1.0
    """Weight of the mean squared difference."""
    id_lambda: float = 0.1
    """Weight of the identity loss."""
    similarity_lambda: float = 0.0
    """Weight of the similarity loss, for things that are no faces (published: 0.5)."""
    progressive: bool = True
    """Rows join one after the other; else all learn from the start, without the
    distances of the rows."""
    progressive_start: int = 20_000
    """Iteration at which the second row joins."""
    progressive_every: int = 2_000
    """Iterations between the others."""
    delta_lambda: float = 2e-4
    """Weight of the distances of the rows from the base code."""
    w_discriminator_lambda: float = 0.1
    """Weight of the critic; 0: none."""
    w_discriminator_lr: float = 2e-5
    """Its learning rate (Adam)."""
    r1: float = 10.0
    """γ, weight of R1."""
    d_reg_every: int = 16
    """Iterations between R1 updates."""
    w_pool: int = 0
    """Earlier codes that the critic is shown again; 0: none (published: 0, or 50)."""
    run: Shared = RunOptions(
        steps=300_000, batch=8, log_every=50, sample_every=1000, save_every=5000
    )


def lambdas_of(options: Options) -> dict[str, float]:
    """Weights of the losses by name."""
    return {
        "lpips": options.lpips_lambda,
        "l2": options.l2_lambda,
        "id": options.id_lambda,
        "similarity": options.similarity_lambda,
        "critic": options.w_discriminator_lambda,
        "delta": options.delta_lambda if options.progressive else 0.0,
        "code": options.common.code_lambda,
    }


def stage_at(options: Options, rows: int, step: Array) -> Array:
    """Rows beyond the base code that have an offset at a step: int32 []."""
    if not options.progressive:
        return jnp.asarray(rows - 1)
    past = step - options.progressive_start
    stage = jnp.where(past < 0, 0, past // options.progressive_every + 1)
    return jnp.minimum(stage, rows - 1)


def active_parts(encoder: Encoder4Editing, stage: Array) -> dict[str, Array]:
    """Which parts of the encoder have a gradient at a stage, for `optim.ranger`."""
    active = {f"style_{row}": row <= stage for row in range(1, encoder.num_styles)}
    for k, first in enumerate(encoder.level_rows, start=1):
        active[f"lateral_{k}"] = stage >= first
    return active


# Losses


def critic_loss(critic: LatentDiscriminator, params: Any, real: Array, fake: Array):
    """Logistic loss on codes [batch, w_dim]: loss [], {name: []}."""
    on_real, on_fake = (critic.apply({"params": params}, x) for x in (real, fake))
    parts = {
        "d_real": jnp.mean(jax.nn.softplus(-on_real)),
        "d_fake": jnp.mean(jax.nn.softplus(on_fake)),
    }
    return sum(parts.values()), parts


def r1_penalty(critic: LatentDiscriminator, params: Any, real: Array) -> Array:
    """E ‖∇ D(w)‖²: []."""
    gradient = jax.grad(lambda w: jnp.sum(critic.apply({"params": params}, w)))(real)
    return jnp.mean(jnp.sum(jnp.square(gradient), 1))


def code_losses(
    setup: Setup, critic: LatentDiscriminator, params: Any, codes: Array, stage: Array
) -> dict[str, Array]:
    """The losses on codes [batch, num_ws, w_dim], one value a sample.

    `critic`: mean over rows 0 .. stage; `delta`: sum over rows 1 .. stage.
    """
    terms, rows = {}, jnp.arange(codes.shape[1])
    if setup.lambdas["critic"]:
        logits = critic.apply({"params": params}, codes)[..., 0]
        shown = jnp.where(rows <= stage, jax.nn.softplus(-logits), 0.0)
        terms["critic"] = jnp.sum(shown, 1) / (stage + 1)
    if setup.lambdas["delta"]:
        distances = encoding.length(codes[:, 1:] - codes[:, :1], (2,))
        terms["delta"] = jnp.sum(jnp.where(rows[1:] <= stage, distances, 0.0), 1)
    return terms


def loss_fn(
    trained: Any,
    params: Any,
    frozen: Any,
    batch: Any,
    before: Any,
    noise: Any,
    *,
    setup: Setup,
    critic: LatentDiscriminator,
    stage: Array,
):
    """The loss [] of one pass, its terms and what it passed; see `train.psp`."""
    params = params | trained
    x = encoding.inputs(batch)
    passed = encoding.run(
        setup, params, x, before=before, train=True, stage=stage, **noise
    )
    terms = encoding.picture_losses(setup, frozen, passed.image, batch["image"])
    terms |= code_losses(setup, critic, params.get(CRITIC), passed.codes, stage)
    terms |= encoding.code_loss(setup, passed.codes, batch)
    means = {name: jnp.mean(value) for name, value in terms.items()}
    return encoding.total(setup.lambdas, means), (means, passed)


# The pool


def query_pool(
    pool: Array, count: Array, codes: Array, swap: Array, places: Array
) -> tuple[Array, Array, Array]:
    """Show codes to a pool of earlier ones, one after the other.

    Until it is full it keeps each and gives it back; then a code either comes back or
    changes places with an earlier one.

    Args:
      pool: [size, w_dim].
      count: [], how many it holds.
      codes: [batch, w_dim].
      swap: [batch], whether to change places once it is full.
      places: [batch], with which.

    Returns:
      Codes to use [batch, w_dim], the new pool and count.
    """
    size = pool.shape[0]

    def one(carry, item):
        pool, count = carry
        code, swap, place = item
        full = count >= size
        place = jnp.where(full, place, jnp.minimum(count, size - 1))
        given = jnp.where(full & swap, pool[place], code)
        stored = jnp.where(full & ~swap, pool[place], code)
        return (pool.at[place].set(stored), jnp.minimum(count + 1, size)), given

    carry, given = jax.lax.scan(one, (pool, count), (codes, swap, places))
    return given, *carry


def shown_to_critic(
    options: Options, extra: Any, key: Array, real: Array, fake: Array, stage: Array
) -> tuple[Array, Array, dict[str, Array]]:
    """Real and fake codes [batch, w_dim] for the critic, and the pools after them.

    Args:
      options: whether there are pools.
      extra: the pools.
      key: of the draws.
      real: [batch, w_dim].
      fake: [batch, num_ws, w_dim]; with pools a random row up to `stage` counts.
      stage: [].
    """
    if not options.w_pool:
        return real, fake[:, 0], {}
    batch = real.shape[0]
    row_keys, real_keys, fake_keys = jax.random.split(key, 3)
    keys = sharding.sample_keys(row_keys, batch)
    rows = jax.vmap(lambda k: jax.random.randint(k, (), 0, stage + 1))(keys)
    fake = jnp.take_along_axis(fake, rows[:, None, None], 1)[:, 0]
    shown, pools = [], {}
    for name, codes, k in (("real", real, real_keys), ("fake", fake, fake_keys)):
        keys = sharding.sample_keys(k, batch)
        draws = jax.vmap(lambda k: jax.random.uniform(k, (2,)))(keys)
        places = jnp.floor(draws[:, 1] * options.w_pool).astype(jnp.int32)
        pool, count = extra[f"{name}_pool"], extra[f"{name}_count"]
        given, pool, count = query_pool(pool, count, codes, draws[:, 0] > 0.5, places)
        shown.append(given)
        pools |= {f"{name}_pool": pool, f"{name}_count": count}
    return *shown, pools


# Steps


def schedule(
    options: Options,
    setup: Setup,
    critic: LatentDiscriminator,
    optimizers: Mapping[str, Any],
) -> list[tuple[int, loop.Step]]:
    """The entries D (with R1) and E for `fit`."""
    common, generator = options.common, setup.generator
    rows = setup.encoder.num_styles

    def filled(state: TrainState, batch: Any) -> Any:
        """The batch; drawn by the generator where there is no data set."""
        if common.data != encoding.GENERATED:
            return batch
        key, params = jax.random.fold_in(state.key, 2), state.params["generator"]
        return encoding.generate(setup, params, key, options.run.batch, 0.0)

    def d_step(state: TrainState, frozen: Any, batch: Any):
        batch = filled(state, batch)
        params, size = state.params, batch["image"].shape[0]
        stage = stage_at(options, rows, state.step)
        key = jax.random.fold_in(state.key, 0)
        z = sharding.sample_normal(key, size, generator.z_dim)
        variables = {"params": params["generator"]}
        real = generator.apply(variables, z, method="mapping")
        before = encoding.first_pass(setup, params, size) if common.restyle else None
        x = encoding.inputs(batch)
        fake = encoding.encode(setup, params, x, before=before, train=True, stage=stage)
        key = jax.random.fold_in(state.key, 1)
        real, fake_codes, pools = shown_to_critic(
            options, state.extra, key, real, fake.codes, stage
        )
        real, fake_codes = jax.lax.stop_gradient((real, fake_codes))
        tx = optimizers[CRITIC]
        grad = jax.value_and_grad(
            lambda p: critic_loss(critic, p, real, fake_codes), has_aux=True
        )
        (loss, parts), grads = grad(params[CRITIC])
        current = optim.apply(tx, grads, state.opt_state[CRITIC], params[CRITIC])

        def regularize(current):
            weight = options.r1 / 2 * options.d_reg_every
            value, grads = jax.value_and_grad(
                lambda p: weight * r1_penalty(critic, p, real)
            )(current[0])
            return optim.apply(tx, grads, current[1], current[0]), value

        def leave(current):
            return current, jnp.zeros(())

        now = state.step % options.d_reg_every == 0
        (after, opt), r1 = jax.lax.cond(now, regularize, leave, current)
        encoder = merge_batch_stats(params["encoder"], fake.stats)
        state = state.replace(
            params=params | {CRITIC: after, "encoder": encoder},
            opt_state=state.opt_state | {CRITIC: opt},
            extra=state.extra | pools,
        )
        return state, {"d_loss": loss, "d_r1": r1} | parts

    def e_step(state: TrainState, frozen: Any, batch: Any):
        batch = filled(state, batch)
        stage = stage_at(options, rows, state.step)
        loss = functools.partial(loss_fn, setup=setup, critic=critic, stage=stage)
        trained = [name for name in optimizers if name != CRITIC]
        grads, terms, stats = encoding.gradients(
            loss, setup, common, state.params, trained, frozen, batch, state.key
        )
        active = active_parts(setup.encoder, stage) if options.progressive else None
        state = encoding.update(state, optimizers, grads, stats, active)
        value = encoding.total(setup.lambdas, terms)
        return state, {"loss": value, "stage": stage} | terms

    return [(int(options.w_discriminator_lambda > 0), d_step), (1, e_step)]


def resolve(options: Options) -> Options:
    """Defaults that depend on other options.

    Raises:
      UserError: values that cannot be.
    """
    if options.common.optimizer == "adam" and options.progressive:
        raise UserError(
            "--optimizer is adam, which would move rows that have not joined; use "
            "ranger, or --no-progressive"
        )
    for name, low in (
        ("progressive_start", 0),
        ("progressive_every", 1),
        ("d_reg_every", 1),
        ("w_pool", 0),
    ):
        if getattr(options, name) < low:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be "
                f"at least {low}"
            )
    encoding.check(options.common)
    if options.common.encoder_rows and options.id_lambda:
        raise UserError(
            "--encoder-rows is for pictures without faces: use --id-lambda 0 and "
            "--similarity-lambda 0.5"
        )
    return with_out(options, f"e4e-{PurePath(options.common.data).stem}")


def make_setup(options: Options):
    """Modules, the critic, first parameters and the frozen judges'."""
    lambdas, common, run = lambdas_of(options), options.common, options.run
    networks, params = encoding.make_networks(common, Encoder4Editing, 3, run)
    model, found = weights.load(common.start or common.weights)
    if CRITIC in model:
        critic, params[CRITIC] = model[CRITIC], found[CRITIC]
    else:
        critic = LatentDiscriminator(w_dim=networks["generator"].w_dim)
        key = jax.random.fold_in(jax.random.key(run.seed), 2)
        params[CRITIC] = critic.init_params(key=key)
    judges = encoding.load_judges(common, lambdas, run.dtype)
    modules = {role: judge.module for role, judge in judges.items()}
    setup = Setup(networks["encoder"], networks["generator"], modules, lambdas)
    frozen = {role: judge.params for role, judge in judges.items()}
    return setup, critic, params, frozen


def make_state(options: Options, params: Any, optimizers: Any) -> TrainState:
    """The state before the first iteration."""
    extra = {}
    for name in ("real", "fake") if options.w_pool else ():
        width = params["encoder"]["w_avg"].shape[1]
        extra[f"{name}_pool"] = jnp.zeros((options.w_pool, width))
        extra[f"{name}_count"] = jnp.zeros((), jnp.int32)
    key = jax.random.key(options.run.seed)
    return create_state(params, optimizers, key=key, extra=extra)


def make_optimizers(options: Options) -> dict[str, Any]:
    """Ranger for encoder (and decoder), Adam for the critic."""
    critic = optim.adam(options.w_discriminator_lr, (0.9, 0.999))
    return encoding.make_optimizers(options.common) | {CRITIC: critic}


def train(options: Options, mesh: Any) -> TrainState:
    """The whole run; what `main` calls after reading the command line."""
    run, common = options.run, options.common
    sharding.check_batch(run.batch, mesh)
    setup, critic, params, frozen = make_setup(options)
    optimizers = make_optimizers(options)
    identity = {"weights": weights.digest(params), "judges": weights.digest(frozen)}
    encoder = setup.encoder
    make = functools.partial(
        encoding.make_transform, "same", size=encoder.size, rows=encoder.rows
    )
    batches, frozen["preview"], digest = encoding.training_data(
        common, "same", make, run, mesh, setup, params["generator"], 0.0
    )
    identity |= {"data": digest} if digest else {}
    stage_of = functools.partial(stage_at, options, setup.encoder.num_styles)

    def validation_losses(params, frozen, batch, step):
        x = encoding.inputs(batch)
        stage = stage_of(step)
        passed = encoding.evaluate(setup, params, x, common.restyle, stage=stage)
        terms = encoding.picture_losses(setup, frozen, passed.image, batch["image"])
        codes, judge = passed.codes, params.get(CRITIC)
        return terms | code_losses(setup, critic, judge, codes, stage)

    return loop.fit(
        options,
        encoding.begin(common, make_state(options, params, optimizers), run.steps),
        frozen,
        schedule(options, setup, critic, optimizers),
        batches,
        networks={
            "encoder": setup.encoder,
            "generator": setup.generator,
            CRITIC: critic,
        },
        mesh=mesh,
        metadata={"scheme": "e4e"},
        identity=identity,
        sample=encoding.make_sample(setup, common.restyle, stage_of),
        validate=encoding.validation(
            common, "same", make, run, mesh, setup, validation_losses
        ),
    )


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.e4e`."""
    options = resolve(parse(Options, __doc__, args))
    train(options, start(options.run))


if __name__ == "__main__":
    main()
