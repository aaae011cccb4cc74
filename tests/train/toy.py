"""A scheme of a few numbers for the tests of the core; also a command."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np

from jaxstyle.errors import cli as wrap
from jaxstyle.stylegan2 import Generator
from train import cli, data, loop, optim, sharding
from train.state import create_state, update_ema

NETWORK = Generator(8, channels=(8, 8), mapping_depth=1, z_dim=4, w_dim=4)
PICTURES = np.random.default_rng(0).uniform(-1, 1, (20, 8, 8, 3)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Options:
    """Toy."""

    run: cli.Shared = cli.RunOptions(steps=6, batch=8, log_every=1)
    lr: float = 0.1
    """Rate."""
    nan_metric_at: int = -1
    """Step whose metric is not a number."""
    nan_state_at: int = -1
    """Step that spoils a parameter."""
    padding: int = 1
    """Extra numbers in the state."""


def options(out, **values):
    """Options with those of the run by name."""
    names = {f.name for f in dataclasses.fields(cli.RunOptions)}
    run = {k: v for k, v in values.items() if k in names}
    rest = {k: v for k, v in values.items() if k not in names}
    default = Options().run
    return Options(run=dataclasses.replace(default, out=str(out), **run), **rest)


def schedule(options, tx):
    """A noisy fit of the mapping's weight to the pictures, and a counter each third."""

    def step(state, frozen, batch):
        noise = sharding.sample_normal(state.key, options.run.batch, 4)
        target = batch["image"].mean((1, 2)) @ frozen["teacher"]["weight"] + 1

        def loss(params):
            dense = params["mapping"]["dense_0"]
            return jnp.mean(
                (1e-4 * noise @ dense["weight"] + dense["bias"] - target) ** 2
            )

        params, opt = state.params["generator"], state.opt_state["generator"]
        value, grads = jax.value_and_grad(loss)(params)
        params, opt = optim.apply(tx, grads, opt, params)
        spoiled = jnp.where(
            state.step == options.nan_state_at, jnp.nan, params["w_avg"]
        )
        params = params | {"w_avg": spoiled}
        ema = update_ema(state.ema["generator"], params, 0.9)
        state = state.replace(
            params={"generator": params},
            opt_state={"generator": opt},
            ema={"generator": ema},
        )
        bad = state.step == options.nan_metric_at
        return state, {"loss": jnp.where(bad, jnp.nan, value)}

    def count(state, frozen, batch):
        number = state.extra["count"] + 1
        drawn = jax.random.uniform(state.key)
        extra = state.extra | {"count": number, "drawn": drawn}
        return state.replace(extra=extra), {"count": number, "drawn": drawn}

    return [(1, step), (3, count), (0, count)]


def run(options, mesh, **arguments):
    """Train; returns the last state."""
    tx = optim.adam(options.lr, (0.9, 0.99))
    state = create_state(
        {"generator": NETWORK.init_params(key=jax.random.key(1))},
        {"generator": tx},
        key=jax.random.key(options.run.seed),
        ema=["generator"],
        extra={
            "count": jnp.zeros((), jnp.int32),
            "drawn": jnp.zeros(()),
            "padding": jax.random.normal(jax.random.key(2), options.padding),
        },
    )
    seed, batch = options.run.seed, options.run.batch
    return loop.fit(
        options,
        state,
        {"teacher": {"weight": jnp.eye(3, 4)}},
        schedule(options, tx),
        data.batches(PICTURES, batch, mesh, seed=seed, transform=data.mirrored),
        networks={"generator": NETWORK},
        mesh=mesh,
        sample=lambda state, frozen: jnp.zeros((4, 8, 8, 3)),
        **{"metadata": {"scheme": "toy"}} | arguments,
    )


def die_at_rename(number):
    """Kill this process before it gives the checkpoint of that number its name.

    A negative number: after it.
    """
    rename, seen = os.rename, []

    def watched(old, new, **more):
        ours = os.path.basename(new).isdigit()
        seen.extend([new] * ours)
        if ours and len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(old, new, **more)
        if ours and len(seen) == -number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.rename = watched


@wrap
def main():
    """The command of the tests that need a process of their own."""
    options = cli.parse(Options, "toy")
    die_at_rename(int(os.environ.get("DIE_AT_RENAME", "0")))
    run(options, cli.start(options.run))


if __name__ == "__main__":
    main()
