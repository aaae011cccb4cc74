"""Does a run fit a TPU? Its own steps, compiled for chips that are not there.

    pip install 'jaxstyle[tpu]'
    python -m train.fits jojo --topology v5e:2x2 --mesh-data 1 --size 1024 \\
        --ref art.png --inversion mean --dtype bfloat16 --mixes 4

Takes a scheme's name and its own options, prepares the run as the scheme does, and
instead of training compiles every step with the TPU compiler. Prints the memory of each
chip against what it has, the compiler's estimate of the time (never a measured one; see
pallas_ops/README.md) and the collectives. `--size` stands in for weights that you do
not have yet: random ones of the published architecture.
"""

import argparse
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxstyle import stylegan2, weights
from jaxstyle.errors import UserError, cli
from pallas_ops import bench
from train import sharding

# Memory in GiB of the chips that the bench knows.
HBM = {"v5e": 16, "v5p": 95, "v6e": 32}
COLLECTIVES = r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


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


def abstract(tree: Any, layout: Any) -> Any:
    """Shapes in place of arrays, laid out as `layout` says."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        tree,
        layout,
    )


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
      state, frozen: arrays, or their shapes.
      every: of each entry; 0 leaves it out.
      batch: the rows of one global batch.
      rules: layouts by path.

    Returns:
      A dict an entry: `memory` and its parts in bytes a chip, `ms`, `collectives` as
      {operation: [count, bytes]} (`ms` may be None, with `why`); or `error`.
    """
    chip = run.compile_for.split(":")[0]
    found = []
    with bench.dumps() as folder:
        mesh = sharding.make_mesh(
            run.mesh_style,
            run.mesh_data,
            run.mesh_fsdp,
            run.mesh_space,
            devices=topology_devices(run.compile_for),
        )
        print(f"{run.compile_for}: {sharding.describe(mesh.shape)}")
        layout = sharding.shardings(state, mesh, rules)
        frozen_layout = sharding.shardings({"frozen": frozen}, mesh, rules)["frozen"]
        rows = {n: sharding.batch_sharding(mesh, x.ndim) for n, x in batch.items()}
        args = (
            abstract(state, layout),
            abstract(frozen, frozen_layout),
            abstract(dict(batch), rows),
        )
        for index, interval in enumerate(every):
            if not interval:
                continue
            record = {"entry": index, "every": interval}
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
    return found


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
    fits = "fits" if gib["memory"] <= HBM[chip] else "DOES NOT FIT"
    talk = ", ".join(
        f"{count} {operation} of {size / 2**20:.1f} MiB"
        for operation, (count, size) in record["collectives"].items()
    )
    if record["ms"] is None:
        time = f"no estimate of the time ({record['why']})"
    else:
        time = f"{record['ms']:.1f} ms by the compiler's estimate"
    return (
        f"{name}: {gib['memory']:.2f} of {HBM[chip]} GiB a chip, {fits} (state and "
        f"frozen networks {gib['arguments']:.2f}, temporaries "
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


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.fits`."""
    parser = argparse.ArgumentParser(
        prog="python -m train.fits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scheme", help="such as jojo; then its own options")
    parser.add_argument("--topology", required=True, help="such as v5e:4x4")
    parser.add_argument("--size", type=int, help="random weights of this size")
    chosen, rest = parser.parse_known_args(sys.argv[1:] if args is None else args)
    found = importlib.util.find_spec(f"train.{chosen.scheme}")
    scheme = found and importlib.import_module(f"train.{chosen.scheme}")
    if not hasattr(scheme, "Options"):
        raise UserError(f"{chosen.scheme!r} is no scheme; name a file of train/")
    # The run is prepared here, whatever libtpu may find.
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        rest += ["--compile-for", chosen.topology, "--out", f"{folder}/run"]
        if chosen.size:
            rest += ["--weights", str(random_weights(chosen.size, Path(folder)))]
        scheme.main(rest)


if __name__ == "__main__":
    main()
