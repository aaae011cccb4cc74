"""DualStyleGAN: a sampler of new exemplar codes.

Yang et al., "Pastiche Master" (arXiv 2203.13248), by GLANN's matching (Hoshen et al.,
arXiv 1812.08985; IMLE, Li and Malik, arXiv 1809.09087). Two networks N, one for the
structure rows of the codes c and one for the color rows. An epoch:

    draw    noise e_1 .. e_2m, and N(e) with batch statistics
    match   each code with the nearest N(e), exactly
    learn   mean (N(e) - c)² over the matched pairs, a batch at a time

The codes are repeated to about a thousand and jittered once by N(0, 0.05²). As in the
published code Adam starts anew every epoch, with a rate that halves every 50 and a
weight decay that is added to the gradient. Of more than a thousand codes each counts
once (the published code then has no data at all).

    python -m train.dual_sampler --weights weights/cartoon
    python -m train.dual_sampler --weights weights/cartoon --out runs/sampler

An iteration is an epoch, about half a second of work for a CPU at full size. The losses
fall quickly at first and flatten out: they say how well the data are covered.
"""

import dataclasses
from functools import partial
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jaxstyle import weights
from jaxstyle.dualstylegan import STRUCTURE_ROWS
from jaxstyle.encoders import merge_batch_stats
from jaxstyle.errors import UserError, cli
from jaxstyle.exemplars import Sampler
from train import loop, optim
from train.cli import RunOptions, Shared, parse, start, with_out
from train.state import TrainState, create_state

BETAS = (0.5, 0.999)
DATA = 1000
STATISTICS = (r"norm_\d+/(mean|var)$",)


@dataclasses.dataclass(frozen=True)
class Options:
    """Training of the sampler of exemplar codes."""

    weights: str
    """Folder of a style with exemplars."""
    run: Shared = RunOptions(steps=500, batch=128, save_every=100)
    codes: str = ""
    """Which of its codes: refined, extrinsic; empty: the refined ones if there are."""
    jitter: float = 0.05
    """Deviation of the noise on the codes."""
    lr: float = 1e-3
    """Adam's rate at first."""
    halve_every: int = 50
    """Epochs after which the rate is halved."""
    weight_decay: float = 1e-5
    """Times the weights, added to the gradient."""
    z_dim: int = 128
    """Width of the noise."""


def make_data(codes: Array, jitter: float, *, key: Array) -> dict[str, Array]:
    """Codes [n, rows, w_dim] as the data [about 1000, …] of the two networks."""
    repeated = jnp.tile(codes, (max(1, DATA // codes.shape[0]), 1, 1))
    repeated += jitter * jax.random.normal(key, repeated.shape)
    parts = repeated[:, :STRUCTURE_ROWS], repeated[:, STRUCTURE_ROWS:]
    return dict(zip(("sampler_structure", "sampler_color"), parts, strict=True))


def nearest(made: Array, data: Array) -> Array:
    """For each datum [n, d] the place of the nearest made one [m, d]: [n]."""
    products = jnp.matmul(data, made.T, precision=lax.Precision.HIGHEST)
    return jnp.argmin(jnp.sum(jnp.square(made), -1) - 2 * products, 1)


def epoch(
    sampler: Sampler,
    params: Any,
    data: Array,
    noise: Array,
    order: Array,
    lr: float | Array,
    *,
    weight_decay: float = 1e-5,
) -> tuple[Any, Array]:
    """Draw, match and learn once.

    Args:
      sampler: the network.
      params: its parameters.
      data: codes [n, rows, w_dim].
      noise: batches [2 * (n // batch), batch, z_dim] to match with.
      order: a permutation of the data, [n]; what does not fill a batch is left out.
      lr: Adam's rate.
      weight_decay: see `Options`.

    Returns:
      New parameters, and the loss of each batch.
    """
    batch, z_dim = noise.shape[1:]
    tx = optim.frozen(
        optax.chain(
            optax.add_decayed_weights(weight_decay), optax.adam(lr, *BETAS, eps=1e-8)
        ),
        STATISTICS,
    )

    def run(params, z):
        codes, out = sampler.apply({"params": params}, z, train=True)
        return codes, out["batch_stats"]

    def draw(params, z):
        codes, stats = run(params, z)
        return merge_batch_stats(params, stats), codes.reshape(batch, -1)

    params, made = lax.scan(draw, params, noise)
    matched = nearest(made.reshape(-1, made.shape[-1]), data.reshape(len(data), -1))

    def learn(carry, chosen):
        params, opt_state = carry

        def loss(params):
            codes, stats = run(params, noise.reshape(-1, z_dim)[matched[chosen]])
            return jnp.mean(jnp.square(codes - data[chosen])), stats

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        params, opt_state = optim.apply(tx, grads, opt_state, params)
        return (merge_batch_stats(params, stats), opt_state), value

    batches = order[: len(data) // batch * batch].reshape(-1, batch)
    (params, _), losses = lax.scan(learn, (params, tx.init(params)), batches)
    return params, losses


def train_step(
    samplers: dict[str, Sampler], options: Options, state: TrainState, frozen: Any, _
) -> tuple[TrainState, dict[str, Array]]:
    """An epoch of both networks."""
    halvings = state.step // max(1, options.halve_every)
    lr = options.lr * 0.5 ** halvings.astype(jnp.float32)
    params, metrics = {}, {}
    for i, (name, sampler) in enumerate(samplers.items()):
        data, batch = frozen["codes"][name], options.run.batch
        for_noise, for_order = jax.random.split(jax.random.fold_in(state.key, i))
        shape = (2 * (len(data) // batch), batch, sampler.z_dim)
        params[name], losses = epoch(
            sampler,
            state.params[name],
            data,
            jax.random.normal(for_noise, shape),
            jax.random.permutation(for_order, len(data)),
            lr,
            weight_decay=options.weight_decay,
        )
        metrics[name.replace("sampler", "loss")] = jnp.mean(losses)
    return state.replace(params=params), metrics


def train(options: Options, mesh: Any) -> TrainState:
    """The whole run; what `main` calls after reading the command line.

    Raises:
      UserError: weights without exemplars or without the codes wanted, or a batch that
        the data do not fill.
    """
    model, params = weights.load(options.weights)
    exemplars, tables = model.exemplars, params["exemplars"]
    kind = options.codes or ("refined" if "refined" in tables else "extrinsic")
    if kind not in tables:
        raise UserError(
            f"--codes is {kind!r}; {options.weights} holds {', '.join(tables)}"
        )
    key = jax.random.key(options.run.seed)
    for_data, for_params = jax.random.split(key)
    data = make_data(tables[kind], options.jitter, key=for_data)
    count = len(data["sampler_color"])
    if options.run.batch > count:
        raise UserError(f"--batch is {options.run.batch}; the data have {count} codes")
    samplers = {
        name: Sampler(rows=x.shape[1], w_dim=exemplars.z_dim, z_dim=options.z_dim)
        for name, x in data.items()
    }
    fresh = {
        name: sampler.init_params(key=jax.random.fold_in(for_params, i))
        for i, (name, sampler) in enumerate(samplers.items())
    }
    return loop.fit(
        options,
        create_state(fresh, {}, key=key),
        {"codes": data},
        [(1, partial(train_step, samplers, options))],
        None,
        networks=samplers,
        mesh=mesh,
        metadata={"scheme": "dual_sampler", "style": options.weights},
        identity={"codes": weights.digest(tables[kind])},
    )


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.dual_sampler`."""
    options = parse(Options, __doc__, args)
    options = with_out(options, f"sampler-{PurePath(options.weights).name}")
    train(options, start(options.run))


if __name__ == "__main__":
    main()
