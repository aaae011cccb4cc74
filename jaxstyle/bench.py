"""Time and memory of the generator and of a JoJoGAN step on this machine.

    python -m jaxstyle.bench
    python -m jaxstyle.bench --sizes 256 --batches 4 --what forward --json

Published widths, random weights. Each case runs in a process of its own; times are
medians after one warm-up call. Compiling goes through the persistent cache unless
`--no-cache` is given. `compile MB` is the process's peak until the program is compiled,
`peak MB` that of the calls (outside Linux, of both; of a GPU or TPU, its own memory).
"""

import contextlib
import dataclasses
import json
import multiprocessing
import pathlib
import resource
import sys
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxstyle.cache import release_memory, use_compilation_cache
from jaxstyle.errors import UserError, cli
from jaxstyle.options import parse
from jaxstyle.stylegan2 import Discriminator, Generator, resolutions
from pallas_ops import pick_implementation

COLUMNS = {
    "what": "what",
    "size": "size",
    "batch": "batch",
    "median_s": "median s",
    "cpu_s": "cpu s",
    "compile_s": "compile s",
    "compile_mb": "compile MB",
    "peak_mb": "peak MB",
    "implementation": "implementation",
}
TAPS = (1, 3, 4, 5)
FIRST_RANDOM_ROW = 7


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of jaxstyle.bench."""

    sizes: tuple[int, ...] = (64, 256, 1024)
    """Picture sizes."""
    batches: tuple[int, ...] = (1, 4)
    """Batch sizes."""
    what: tuple[Literal["forward", "jojo"], ...] = ("forward", "jojo")
    """The generator's forward pass, the JoJoGAN training step, or both."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the convolutions."""
    repeats: int = 3
    """Timed calls of each case."""
    cache: bool = True
    """Keep compiled programs; without, the compile time is that of a first run."""
    json: bool = False
    """Print one JSON list instead of a table."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    what: str
    size: int
    batch: int
    dtype: str
    repeats: int
    cache: bool


def forward_case(case: Case) -> tuple[Any, tuple]:
    """Pictures from z with fresh noise: the function and its arguments."""
    generator = Generator(case.size, dtype=case.dtype)
    key = jax.random.key(0)
    params = generator.init_params(key=key)
    z = jax.random.normal(key, (case.batch, generator.z_dim))

    def forward(params, z, key):
        return generator.apply({"params": params}, z, noise="random", key=key)[0]

    return jax.jit(forward), (params, z, key)


def jojo_case(case: Case) -> tuple[Any, tuple]:
    """The published JoJoGAN step, one picture a reference; its state is donated.

    Adam at 2e-3 on the L1 distance of four discriminator features, the target's being
    computed beforehand; rows from the seventh on take a random face's code.
    """
    generator = Generator(case.size, dtype=case.dtype)
    judge = Discriminator(case.size, dtype=case.dtype)
    keys = jax.random.split(jax.random.key(0), 4)
    params = generator.init_params(key=keys[0])
    judge_params = judge.init_params(key=keys[1])
    optimizer = optax.adam(2e-3, b1=0.0, b2=0.99)
    codes = jax.random.normal(keys[2], (case.batch, generator.num_ws, generator.w_dim))
    target = jax.random.normal(keys[3], (case.batch, case.size, case.size, 3))
    names = [judge.tap_names[i] for i in TAPS if i < len(judge.tap_names)]
    blocks = judge.tap_names.index(names[-1])
    kept = jnp.arange(generator.num_ws)[:, None] < FIRST_RANDOM_ROW

    def features(judge_params, images):
        _, out = judge.apply({"params": judge_params}, images, taps=blocks)
        return [out["features"][name] for name in names]

    def step(state, judge_params, real):
        params, opt_state, key = state
        key, z_key, noise_key = jax.random.split(key, 3)
        z = jax.random.normal(z_key, (case.batch, generator.z_dim))
        w = generator.apply({"params": params}, z, method="mapping")
        mixed = jnp.where(kept, codes, jax.lax.stop_gradient(w)[:, None])

        def loss(params):
            image, _ = generator.apply(
                {"params": params}, mixed, space="w_plus", noise="random", key=noise_key
            )
            fake = features(judge_params, image)
            pairs = zip(fake, real, strict=True)
            return sum(jnp.mean(jnp.abs(f - r)) for f, r in pairs) / len(real)

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state, key

    state = (params, optimizer.init(params), jax.random.key(1))
    real = jax.jit(features)(judge_params, target)
    return jax.jit(step, donate_argnums=0), (state, judge_params, real)


def process_mb() -> float:
    """Peak memory of this process, since `forget_peak` where that works."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def forget_peak() -> None:
    """Let the peak of this process begin anew, on Linux."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Peak memory of the device, or of this process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**20
    return process_mb()


def measure(case: Case) -> dict[str, Any]:
    """Build, compile and time one case in this process."""
    if case.cache:
        use_compilation_cache()
    function, args = (forward_case if case.what == "forward" else jojo_case)(case)
    jax.block_until_ready(args)
    release_memory()
    start = time.perf_counter()
    compiled = function.lower(*args).compile()
    compile_s, compile_mb = time.perf_counter() - start, process_mb()
    release_memory()
    forget_peak()
    times = []
    for _ in range(1 + case.repeats):
        begin = time.perf_counter(), time.process_time()
        out = jax.block_until_ready(compiled(*args))
        end = time.perf_counter(), time.process_time()
        times.append((end[0] - begin[0], end[1] - begin[1]))
        if case.what == "jojo":
            args = (out, *args[1:])
    median, cpu = (sorted(t)[case.repeats // 2] for t in zip(*times[1:], strict=True))
    return {
        "what": case.what,
        "size": case.size,
        "batch": case.batch,
        "dtype": case.dtype,
        "median_s": round(median, 3),
        "cpu_s": round(cpu, 3),
        "compile_s": round(compile_s, 1),
        "compile_mb": round(compile_mb),
        "peak_mb": round(peak_mb()),
        "implementation": f"{pick_implementation()} ({jax.default_backend()})",
    }


def run_case(case: Case) -> dict[str, Any]:
    """`measure` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (case,))


def line(values: dict[str, Any]) -> str:
    """One row of the table."""
    return "  ".join(f"{values[key]!s:>9}" for key in COLUMNS)


@cli
def main(args: list[str] | None = None) -> None:
    """Measure every combination and print as each is done."""
    options = parse(Options, "jaxstyle.bench", __doc__, args)
    for size in options.sizes:
        resolutions(size)
    for name in ("batches", "repeats"):
        value = getattr(options, name)
        if min(value if name == "batches" else (value,), default=0) < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if options.cache:
        print(f"compilation cache: {use_compilation_cache()}", file=sys.stderr)
    if not options.json:
        print(line(COLUMNS), flush=True)
    results = []
    for what in options.what:
        for size in options.sizes:
            for batch in options.batches:
                case = Case(
                    what, size, batch, options.dtype, options.repeats, options.cache
                )
                results.append(run_case(case))
                if not options.json:
                    print(line(results[-1]), flush=True)
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
