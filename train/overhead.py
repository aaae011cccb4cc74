"""What does the loop cost beside the step? JoJoGAN's step, in the loop and bare.

    python -m train.overhead --size 64 --steps 60

Trains on random weights and a random picture: once by `train.loop.fit`, which logs
every tenth iteration as usual, and once by calling the same compiled step again and
again, in turns. Prints the milliseconds an iteration of both, the fastest of all turns,
as others' work on the machine only ever adds. Compiling, the first iterations and the
checkpoint at the end are not counted.
"""

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxstyle.errors import UserError, cli
from jaxstyle.options import parse
from jaxstyle.stylegan2 import Discriminator, Generator
from train import jojo, loop, optim, sharding
from train.cli import RunOptions, start

LOG_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of train.overhead."""

    size: int = 64
    """Pixels a side."""
    channels: tuple[int, ...] = ()
    """Channels at 4, 8, … size; empty: the published table."""
    steps: int = 60
    """Iterations a turn, a multiple of 10 and at least 20."""
    turns: int = 3
    """Turns of both."""


def setup(options: Options) -> tuple[jojo.Options, Any, Any, Any, Generator]:
    """Options of the scheme, a function that makes the state, frozen, step, network."""
    run = RunOptions(steps=options.steps, log_every=LOG_EVERY, save_every=0)
    chosen = jojo.Options(ref=(Path("random"),), run=run)
    table = options.channels or None
    generator = Generator(options.size, channels=table)
    judge = Discriminator(options.size, channels=table)
    key = jax.random.key(0)
    base, judge_params = (n.init_params(key=key) for n in (generator, judge))
    picture = jnp.tanh(jax.random.normal(key, (1, options.size, options.size, 3)))
    codes = jnp.zeros((1, len(generator.layer_names), generator.w_dim))
    frozen = jojo.frozen_of(
        chosen, generator, base, judge, judge_params, picture, codes
    )
    tx = optim.frozen(optim.adam(chosen.lr), jojo.NOT_TRAINED)
    keep = jojo.keep_weights(chosen, options.size)
    step = jojo.make_step(chosen, generator, judge, tx, keep)
    return chosen, lambda: jojo.start_state(chosen, base, tx), frozen, step, generator


def bare(state: Any, frozen: Any, step: Any, mesh: Any, steps: int) -> float:
    """Seconds an iteration of the compiled step alone."""
    layout, of_frozen = sharding.layouts(state, frozen, mesh)
    state, frozen = sharding.place(state, layout), sharding.place(frozen, of_frozen)
    with jax.set_mesh(mesh):
        entry = loop._jit(step, 0, layout, of_frozen, mesh)
        compiled = entry.lower(state, frozen, {}).compile()
        for i in range(steps):
            if i == LOG_EVERY:
                jax.block_until_ready(state)
                began = time.perf_counter()
            state, _ = compiled(state, frozen, {})
        jax.block_until_ready(state)
    return (time.perf_counter() - began) / (steps - LOG_EVERY)


def in_the_loop(
    chosen: jojo.Options, state: Any, frozen: Any, step: Any, mesh: Any, net: Any
) -> float:
    """Seconds an iteration of `fit`, from its own metrics."""
    with tempfile.TemporaryDirectory() as out:
        run = dataclasses.replace(chosen.run, out=out)
        chosen = dataclasses.replace(chosen, run=run)
        entries = [(1, step)]
        networks = {"generator": net}
        loop.fit(chosen, state, frozen, entries, None, networks=networks, mesh=mesh)
        lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    first, *_, last = map(json.loads, lines)
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.overhead`."""
    options = parse(Options, "train.overhead", __doc__, args)
    if options.steps < 2 * LOG_EVERY or options.steps % LOG_EVERY:
        raise UserError(
            f"--steps is {options.steps}; it must be a multiple of {LOG_EVERY}, at "
            f"least {2 * LOG_EVERY}"
        )
    mesh = start(RunOptions(mesh_data=1))
    chosen, make, frozen, step, generator = setup(options)
    alone, looped = [], []
    for _ in range(options.turns):
        alone.append(bare(make(), frozen, step, mesh, options.steps))
        looped.append(in_the_loop(chosen, make(), frozen, step, mesh, generator))
    bare_ms, loop_ms = 1000 * min(alone), 1000 * min(looped)
    print(
        f"{options.size} px: {loop_ms:.2f} ms an iteration of the loop, {bare_ms:.2f} "
        f"of the step alone: {loop_ms - bare_ms:+.2f} ms, "
        f"{100 * (loop_ms / bare_ms - 1):+.1f} %"
    )


if __name__ == "__main__":
    main()
