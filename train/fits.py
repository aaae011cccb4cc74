"""Does a run fit a TPU? Its own steps, compiled for chips that are not there.

    pip install 'jaxstyle[tpu]'
    python -m train.fits jojo --topology v5e:2x2 --mesh-data 1 --size 1024 \\
        --ref art.png --inversion mean --dtype bfloat16 --mixes 4

Takes a scheme's name and its own options, prepares the run as the scheme does, and
instead of training compiles every step with the TPU compiler. Prints the memory of each
chip against what it has, the compiler's estimate of the time (never a measured one; see
pallas_ops/README.md) and the collectives. `--size` stands in for weights that you do
not have yet: random ones of the published architecture.

Of a run that does not fit, each option that saves memory is compiled too, to see which
would help. `--find-batch` searches the largest batch that fits instead: `--batch`, of
train.jojo `--mixes`, or with `--separate` the styles at a time, `--group`.
"""

import argparse
import atexit
import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxstyle import stylegan2, weights
from jaxstyle.errors import UserError, cli
from pallas_ops import bench
from train import sharding

# Memory in GiB of the chips that the bench knows.
HBM = {"v5e": 16, "v5p": 95, "v6e": 32}
# Compilations that the search for a batch may take.
TRIES = 10
COLLECTIVES = r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


class Compiled(SystemExit):
    """The end of a run that was only compiled; `records` are those of `report`."""

    def __init__(self, records: list[dict]):
        super().__init__(0)
        self.records = records


@functools.cache
def dump_folder() -> Path:
    """Where the compiler leaves its files; it looks up the place once in its life."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(bench.dumps())


def topology_devices(name: str) -> Sequence[Any]:
    """Descriptions of the chips of a topology such as v5e:4x4.

    Raises:
      UserError: an unknown chip or shape, or no TPU compiler.
    """
    if name.split(":")[0] not in HBM:
        raise UserError(
            f"--topology is {name!r}; it must be one of {', '.join(HBM)} with a shape, "
            "such as v5e:4x4"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except (RuntimeError, ValueError) as error:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                "the TPU compiler is not installed; pip install 'jaxstyle[tpu]'"
            ) from error
        reason = str(error).split("\n")[0]
        raise UserError(f"--topology is {name!r}: {reason}") from error
    return found.devices


def mesh_for(topology: str, style: int, data: int, fsdp: int, space: int) -> Mesh:
    """The mesh of a run on the chips of a topology."""
    devices = topology_devices(topology)
    return sharding.make_mesh(style, data, fsdp, space, devices=devices)


def abstract(tree: Any, layout: Any) -> Any:
    """Shapes in place of arrays, laid out as `layout` says."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        layout,
    )


def bytes_a_chip(tree: Any, layout: Any) -> int:
    """What a chip holds of a tree, without the padding of the chip's own layout."""
    sizes = jax.tree.map(
        lambda x, where: int(np.prod(where.shard_shape(x.shape))) * x.dtype.itemsize,
        tree,
        layout,
    )
    return sum(jax.tree.leaves(sizes))


def parts_of(state: Any) -> dict[str, Any]:
    """What a state holds, by name: a TrainState, or the dict of a search."""
    if isinstance(state, Mapping):
        return dict(state)
    return {"parameters": (state.params, state.ema), "optimiser": state.opt_state}


def report(
    run: Any,
    entry: Callable[[int, Mesh, Any, Any], Any],
    state: Any,
    frozen: Mapping[str, Any],
    every: Sequence[int],
    batch: Mapping[str, Any],
    rules: Any,
) -> list[dict]:
    """Compile the entries of a schedule for `run.compile_for` and print what is known.

    Args:
      run: RunOptions.
      entry: (index, mesh, layout of the state, layout of frozen) -> a jitted step.
      state, frozen: arrays, or their shapes; a TrainState or, of a search, a dict.
      every: of each entry; 0 leaves it out.
      batch: the rows of one global batch, trees of arrays.
      rules: layouts by path.

    Returns:
      A dict an entry: `memory` and its parts in bytes a chip, `ms`, `collectives` as
      {operation: [count, bytes]} (`ms` may be None, with `why`); or `error`.

    Raises:
      UserError: a batch that the mesh cannot split.
    """
    chip = run.compile_for.split(":")[0]
    found, folder = [], dump_folder()
    mesh = mesh_for(
        run.compile_for, run.mesh_style, run.mesh_data, run.mesh_fsdp, run.mesh_space
    )
    if batch:
        sharding.check_batch(run.batch, mesh)
    print(f"{run.compile_for}: {sharding.describe(mesh.shape)}")
    layout, frozen_layout = sharding.layouts(state, frozen, mesh, rules)
    batch = dict(batch)
    rows = jax.tree.map(lambda x: sharding.batch_sharding(mesh, x.ndim), batch)
    held = parts_of(state) | {"frozen networks and data": (dict(frozen), batch)}
    where = parts_of(layout) | {"frozen networks and data": (frozen_layout, rows)}
    parts = {name: bytes_a_chip(tree, where[name]) for name, tree in held.items()}
    print("; ".join(f"{n} {size / 2**30:.3f} GiB" for n, size in parts.items()))
    args = (
        abstract(state, layout),
        abstract(frozen, frozen_layout),
        abstract(batch, rows),
    )
    for index, interval in enumerate(every):
        if not interval:
            continue
        record = {"entry": index, "every": interval, "chip": chip, "parts": parts}
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                step = entry(index, mesh, layout, frozen_layout)
                compiled = step.lower(*args).compile()
            record |= measured(compiled, folder, chip)
        except (jax.errors.JaxRuntimeError, RuntimeError) as error:
            record["error"] = str(error).split("\n")[0][:300]
        bench.clear(folder)
        print(line(record, chip), flush=True)
        found.append(record)
    if all(record.get("ms") for record in found):
        mean = sum(record["ms"] / record["every"] for record in found)
        print(f"an iteration: {mean:.1f} ms in the mean, by the compiler's estimate")
    return found


def fits(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every step has room."""
    return all(
        "error" not in r and r["memory"] <= HBM[r["chip"]] * 2**30 for r in records
    )


def measured(compiled: Any, folder: Path, chip: str) -> dict:
    """What the compiler says of a program."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    held = memory.argument_size_in_bytes
    # A donated state is not held twice.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    record = {
        "memory": held + results + memory.temp_size_in_bytes,
        "arguments": held,
        "temporaries": memory.temp_size_in_bytes,
        "collectives": {},
    }
    try:
        record["ms"] = bench.estimate(folder, text, chip)["ms"]
    except RuntimeError as error:
        record |= {"ms": None, "why": str(error)}
    for shape, name in re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", text):
        count, size = record["collectives"].get(name, (0, 0))
        record["collectives"][name] = [count + 1, size + bench.bytes_of(shape)]
    return record


def line(record: Mapping[str, Any], chip: str) -> str:
    """A record for people."""
    name = f"step {record['entry']} (every {record['every']})"
    if "error" in record:
        return f"{name}: {record['error']}"
    gib = {n: record[n] / 2**30 for n in ("memory", "arguments", "temporaries")}
    verdict = "fits" if gib["memory"] <= HBM[chip] else "DOES NOT FIT"
    talk = ", ".join(
        f"{count} {operation} of {size / 2**20:.1f} MiB"
        for operation, (count, size) in record["collectives"].items()
    )
    if record["ms"] is None:
        time = f"no estimate of the time ({record['why']})"
    else:
        time = f"{record['ms']:.1f} ms by the compiler's estimate"
    return (
        f"{name}: {gib['memory']:.2f} of {HBM[chip]} GiB a chip, {verdict} (held "
        f"from step to step {gib['arguments']:.2f}, activations and other temporaries "
        f"{gib['temporaries']:.2f}); {time}; collectives: {talk or 'none'}"
    )


def random_weights(size: int, folder: Path) -> Path:
    """A network folder with random weights of the published architecture."""
    networks = {
        "generator": stylegan2.Generator(size),
        "discriminator": stylegan2.Discriminator(size),
    }
    params = {
        name: module.init_params(key=jax.random.key(i))
        for i, (name, module) in enumerate(networks.items())
    }
    weights.save(folder / "random", networks, params, dtype="bfloat16")
    return folder / "random"


def compiled(scheme: Any, args: Sequence[str]) -> list[dict]:
    """The records of a scheme's command line; none where it refuses its options."""
    try:
        scheme.main(list(args))
    except Compiled as end:
        return end.records
    except SystemExit as end:
        if not end.code:
            raise
        return []
    raise UserError("this command ends without training anything")


def knobs(args: Sequence[str], chips: int) -> dict[str, list[str]]:
    """Options that save memory; those that are given already are left out."""
    found = {"--remat": [], "--dtype": ["bfloat16"]}
    if several := [str(n) for n in (2, 4, 8) if chips % n == 0]:
        found |= {"--mesh-fsdp": several[-1:], "--mesh-space": ["2"]}
    return {flag: value for flag, value in found.items() if flag not in args}


def advise(scheme: Any, args: Sequence[str], mesh: Mesh) -> None:
    """Compile with one option more at a time, and say which would do."""
    helped = []
    for flag, value in knobs(args, mesh.size).items():
        print(f"with {' '.join([flag, *value])}:", flush=True)
        found = compiled(scheme, [*args, flag, *value, "--mesh-data", "0"])
        helped += [" ".join([flag, *value])] if found and fits(found) else []
    if helped:
        print(f"it would fit with {', or with '.join(helped)}")
    else:
        print(
            "none of them makes it fit: combine them, take more chips, or a smaller "
            "batch, which --find-batch finds"
        )


def find_batch(scheme: Any, args: Sequence[str], flag: str, unit: int) -> int:
    """The largest number for `flag` found to fit; 0 where the smallest does not.

    Memory grows nearly in proportion, so two compilations tell where to look.

    Args:
      scheme: its module.
      args: its options, `--compile-for` among them.
      flag: of what is searched.
      unit: it is a multiple of this.
    """
    chip = args[args.index("--compile-for") + 1].split(":")[0]
    # Of those that fit, bytes by how many units.
    memory: dict[int, int] = {}
    count, high = 1, 0
    for _ in range(TRIES):
        print(f"{flag} {count * unit}:", flush=True)
        records = compiled(scheme, [*args, flag, str(count * unit)])
        if not records:
            break
        if fits(records):
            memory[count] = max(r["memory"] for r in records)
        else:
            high = count
        low = max(memory, default=0)
        if high and high - low <= 1:
            break
        count = 2 * max(low, 1)
        if len(memory) > 1:
            first = min(memory)
            slope = max(1, (memory[low] - memory[first]) / (low - first))
            count = low + int((HBM[chip] * 2**30 - memory[low]) / slope)
        count = min(max(count, low + 1), high - 1 if high else 16 * low)
    low = max(memory, default=0)
    more = f"; {high * unit} does not" if high else ""
    print(f"the largest {flag} found to fit is {low * unit}{more}")
    return low * unit


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.fits`."""
    parser = argparse.ArgumentParser(
        prog="python -m train.fits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("scheme", help="such as jojo; then its own options")
    parser.add_argument("--topology", required=True, help="such as v5e:4x4")
    parser.add_argument(
        "--size",
        type=int,
        help="random weights of this size; or the scheme's own --size, if it has one",
    )
    parser.add_argument(
        "--find-batch", action="store_true", help="search the largest batch that fits"
    )
    chosen, rest = parser.parse_known_args(sys.argv[1:] if args is None else args)
    found = importlib.util.find_spec(f"train.{chosen.scheme}")
    scheme = found and importlib.import_module(f"train.{chosen.scheme}")
    if not hasattr(scheme, "Options"):
        raise UserError(f"{chosen.scheme!r} is no scheme; name a file of train/")
    # The run is prepared here, whatever libtpu may find.
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        rest += ["--compile-for", chosen.topology, "--out", f"{folder}/run"]
        own = {field.name for field in dataclasses.fields(scheme.Options)}
        if chosen.size and "size" in own:
            rest += ["--size", str(chosen.size)]
        elif chosen.size:
            rest += ["--weights", str(random_weights(chosen.size, Path(folder)))]
        axes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name, usual in ("style", 1), ("data", 0), ("fsdp", 1), ("space", 1):
            axes.add_argument(f"--mesh-{name}", type=int, default=usual)
        sizes = vars(axes.parse_known_args(rest)[0]).values()
        # Before the compiler is loaded: it reads once where to leave its files.
        dump_folder()
        mesh = mesh_for(chosen.topology, *sizes)
        if chosen.find_batch and "--separate" in rest:
            find_batch(scheme, rest, "--group", mesh.shape["style"])
        elif chosen.find_batch:
            flag = "--mixes" if chosen.scheme == "jojo" else "--batch"
            find_batch(scheme, rest, flag, sharding.batch_places(mesh))
        elif not (records := compiled(scheme, rest)):
            sys.exit(1)
        elif not fits(records):
            advise(scheme, rest, mesh)


if __name__ == "__main__":
    # The loop knows this module, and its `Compiled`, under its own name only.
    importlib.import_module("train.fits").main()
