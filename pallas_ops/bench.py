"""Time of the synthesis on a TPU, as the TPU compiler counts it, without a TPU.

    python -m pallas_ops.bench --topology v5e:2x2 --batch 1,4,8 --json FILE

Needs libtpu (`pip install 'jaxstyle[tpu]'`) and no chip: every layer, and the whole
synthesis (`total`), is compiled ahead of time, forward and forward + backward, with
XLA's convolutions and with the kernels. An estimate by the compiler, never a measured
time:

- an XLA operation counts the `estimated_cycles` of the scheduled program;
- a kernel counts the turns of its grid times the largest of its scheduled bundles, the
  rows that its busiest matrix unit multiplies, and its memory traffic in cycles.

All of it is read from the compiler's output. A loop within a turn counts as often as
its exit test says; one without such a test is an error. The whole 1024 px program
compiles for minutes: `--layers` and `--directions` choose less, and `--json` keeps what
is there.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The chips: GHz, GB/s of memory and bfloat16 multiply-adds a cycle.
CHIPS = {
    "v5e": (1.5, 819, 4 * 128**2),
    "v5p": (1.75, 2765, 8 * 128**2),
    "v6e": (1.75, 1640, 4 * 256**2),
}
# Rows that one matrix multiplication instruction takes, of bfloat16; half as many fit a
# register in float32. The second form follows one of the first on the same rows; so
# counted, every kernel's sum is its arithmetic's.
MATMUL_ROWS = {"vmatmul": 16, "vmatmul.lmr": 8}
DTYPE_BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "u8": 1, "pred": 1}
# The layer whose convolution waits for the matrix units even in XLA.
SCALE = "conv_64"
KERNEL = 'custom_call_target="tpu_custom_call"'
KEYS = ("topology", "size", "batch", "layer", "direction", "implementation")


@dataclass(frozen=True)
class Kernel:
    """What the compiler's files say of one kernel; all but `turns` are of one turn."""

    turns: int
    bundles: int
    matmul_rows: int
    spills: int


@contextlib.contextmanager
def dumps():
    """A folder for the compiler's files, gone afterwards.

    libtpu reads the flags once, when it is loaded: enter this before anything compiles.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(
            [
                os.environ.get("LIBTPU_INIT_ARGS", ""),
                f"--xla_jf_dump_to={folder}",
                "--xla_jf_dump_llo_text=true",
                "--xla_jf_dump_llo_pass_label_regex=.*final.*",
            ]
        )
        yield Path(folder)


@contextlib.contextmanager
def nowhere():
    """An empty folder, for counts that need none of the compiler's files."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def read_loops(code: str) -> tuple[list[tuple[int, str]], int | None, int, int]:
    """How often the bundles of a kernel run.

    Args:
      code: the scheduled bundles, whose depth of loops is a number of `>`.

    Returns:
      (times in one turn of the grid's loop, text) of each bundle, the exit count of the
      grid's loop (None without one), how many loops there are, and how many of them
      can be counted.
    """
    exits: dict[int, int] = {}
    inside: list[int] = []
    bundles, outer, loops = [], set(), 0
    for line in code.splitlines():
        found = re.match(r" *(?:0x[0-9a-f]+|0) +(\w\w)? *: *(>*) *\{(\})?", line)
        if not found:
            continue
        begins, depth, empty = found[1] == "LB", len(found[2]), bool(found[3])
        if not empty:
            # Empty bundles do not say how deep they are.
            del inside[depth - begins :]
        if begins:
            inside.append(loops)
            loops += 1
        outer.update(inside[:1])
        if test := re.search(r"totalorder %\w+, (\d+) /\* loop exit test \*/", line):
            exits[inside[-1]] = int(test[1])
        bundles.append((tuple(inside[1:]), line))
    if len(outer) > 1 or len(exits) != loops:
        return [], None, loops, len(exits)
    turns = exits[outer.pop()] if outer else None
    counted = [(math.prod(exits[i] for i in of), line) for of, line in bundles]
    return counted, turns, loops, loops


def read_kernel(folder: Path, name: str) -> Kernel:
    """Read the compiler's files of the kernel that the program calls `name`.

    Raises:
      FileNotFoundError: there are none.
      RuntimeError: they hold a loop whose turns cannot be read.
    """

    def text(ending: str) -> str:
        # The name's own files, not those of `name.1`.
        pattern = re.compile(rf"\d+-{re.escape(name)}-\d+-{ending}\.txt")
        found = [f for f in folder.iterdir() if pattern.fullmatch(f.name)]
        if not found:
            raise FileNotFoundError(f"no files {ending} of kernel {name}")
        if len(found) > 1:
            raise RuntimeError(f"{len(found)} files {ending} of kernel {name}")
        return found[0].read_text()

    analysis = text("schedule-analysis_final_bundles")
    bundles = int(re.search(r"total scheduled bundles:\s+(\d+)", analysis)[1])
    counted, turns, loops, resolved = read_loops(text("final_bundles"))
    if not counted:
        raise RuntimeError(f"kernel {name} holds {loops} loops, {resolved} resolved")
    bundles += sum(times - 1 for times, _ in counted)
    rows = Counter()
    for times, line in counted:
        found = re.findall(r"(vmatmul(?:\.lmr)?)([\w.]*)mxu(\d)", line)
        for kind, form, unit in found:
            rows[unit] += times * MATMUL_ROWS[kind] // (1 + (".f32." in form))
    slots = text("final_hlo-static-per-bundle-utilization")
    names, used = slots.split("== UTILIZATION:")
    spill = names.split("\n")[1].split(", ").index("VSTORE:SPILL")
    spills = sum(int(line.split()[spill]) for line in used.strip().splitlines())
    # Two turns of the grid's loop only start and end its pipeline.
    turns = 1 if turns is None else turns - 2
    return Kernel(turns, bundles, max(rows.values(), default=0), spills)


def bytes_of(shapes: str) -> int:
    """Bytes of the arrays in a piece of a program's text."""
    total = 0
    for dtype, sides in re.findall(r"\b(\w+)\[([\d,]*)\]", shapes):
        if dtype in DTYPE_BYTES:
            size = DTYPE_BYTES[dtype]
            for side in filter(None, sides.split(",")):
                size *= int(side)
            total += size
    return total


def computations(program: str) -> dict[str, list[str]]:
    """The lines of a program's parts by name; the one that begins is called ENTRY."""
    parts, lines = {}, []
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.-]+) .*\{$", line):
            lines = parts["ENTRY" if head[1] else head[2]] = []
        else:
            lines.append(line)
    return parts


def turns_of(condition: list[str]) -> int:
    """How often a loop runs whose condition is given: it counts from 0 to a constant.

    Raises:
      RuntimeError: it is another one.
    """
    counts = re.findall(r" s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    if len(counts) != 1 or "direction=LT" not in "\n".join(condition):
        raise RuntimeError("it does not say how often a loop runs")
    return int(counts[0])


def estimate(folder: Path, program: str, chip: str) -> dict:
    """Cycles of a compiled program: loops as often as they run, the longest branches.

    Args:
      folder: of the compiler's files.
      program: the scheduled program's text.
      chip: a key of `CHIPS`.

    Returns:
      `ms` and, of it, `xla_ms`; the share of a kernel by name, in `kernels`.

    Raises:
      RuntimeError: a kernel without files, or a loop whose turns cannot be read.
    """
    ghz, bandwidth, _ = CHIPS[chip]
    parts = computations(program)
    shapes = dict(re.findall(r"%([\w.-]+) = ([^=]*?) [\w-]+\(", program))
    # Several names of one array: a block and its neighbours read it three times.
    same = dict(re.findall(r"%([\w.-]+) = [^=]*? bitcast\(%([\w.-]+)\)", program))

    def array(name: str) -> str:
        return array(same[name]) if name in same else name

    # A kernel that is called twice is compiled once, under one of the names.
    body = dict(re.findall(rf"%([\w.-]+) = .*?{KERNEL}.*?backend_config=(.*)", program))
    twins: dict[str, list[str]] = {}
    for name, text in body.items():
        twins.setdefault(text, []).append(name)

    def kernel(name: str) -> Kernel:
        for twin in [name, *twins.get(body.get(name, ""), [])]:
            with contextlib.suppress(FileNotFoundError):
                return read_kernel(folder, twin)
        raise RuntimeError(f"the compiler left no files of kernel {name}")

    def cost(part: str) -> tuple[float, Counter]:
        xla, kernels = 0.0, Counter()
        for line in parts[part]:
            turns, inner = 1, []
            if KERNEL in line:
                name = re.search(r"%([\w.-]+) =", line)[1]
                operands = re.search(r"custom-call\((.*?)\)", line)[1]
                read = {array(n) for n in re.findall(r"%([\w.-]+)", operands)}
                moved = bytes_of(shapes[name]) + sum(bytes_of(shapes[n]) for n in read)
                found = kernel(name)
                compute = found.turns * max(found.bundles, found.matmul_rows)
                kernels[name] += max(compute, moved / (bandwidth / ghz)) / ghz / 1e6
            elif loop := re.search(
                r" while\(.*condition=%(\S+), body=%([^\s,]+)", line
            ):
                turns, inner = turns_of(parts[loop[1]]), [loop[2]]
            elif re.search(r" (conditional|call)\(", line):
                after = line[line.index("), ") :]
                inner = [n for n in re.findall(r"%([\w.-]+)", after) if n in parts]
            elif cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
                xla += int(cycles[1]) / ghz / 1e6
            if inner:
                costs = [cost(name) for name in inner]
                longest = max(costs, key=lambda x: x[0] + sum(x[1].values()))
                xla += turns * longest[0]
                kernels += Counter({n: turns * ms for n, ms in longest[1].items()})
        return xla, kernels

    xla_ms, kernels = cost("ENTRY")
    return {
        "ms": xla_ms + sum(kernels.values()),
        "xla_ms": xla_ms,
        "kernels": dict(kernels),
    }


def scale(folder: Path, program: str) -> dict[str, list[int]]:
    """XLA's own convolutions that wait for the matrix units, counted both ways.

    The two counts must agree, or kernels and XLA's operations have no common scale.

    Returns:
      By name, the cycles that XLA estimates and those that counting it like a kernel
      gives.
    """
    found = {}
    for line in program[program.index("\nENTRY") :].splitlines():
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        if "kind=kOutput" in line and "COST_MODEL_TYPE_CLASSIC" in line and cycles:
            name = re.search(r"%([\w.-]+) =", line)[1]
            with contextlib.suppress(RuntimeError, FileNotFoundError):
                op = read_kernel(folder, name)
                if op.matmul_rows > op.bundles:
                    found[name] = [int(cycles[1]), op.turns * op.matmul_rows]
    return found


def floors(layer: str, table: dict, batch: int, chip: str) -> tuple[float, float]:
    """Least ms of a layer's forward pass by arithmetic and by memory traffic.

    Nine multiplications a pair of channels and a pixel (of the smaller picture, for an
    up-convolution); each activation read and written once, and the weight read.
    """
    ghz, bandwidth, multiplies = CHIPS[chip]
    kind, size = layer.split("_")
    size = int(size)
    inside = size // 2 if kind == "up" else size
    channels, outputs = table[inside], 3 if kind == "rgb" else table[size]
    taps = 1 if kind == "rgb" else 9
    arithmetic = batch * inside**2 * taps * channels * outputs
    moved = batch * (inside**2 * channels + size**2 * outputs) * 2
    moved += taps * channels * outputs * 2
    return arithmetic / multiplies / ghz / 1e6, moved / bandwidth / 1e6


def program(size: int, batch: int, layer: str, direction: str, implementation: str):
    """A function and its arguments' shapes: a layer, or the synthesis (`total`).

    The gradient is that of a scalar with respect to everything.
    """
    import jax
    import jax.numpy as jnp

    from jaxstyle import stylegan2
    from pallas_ops import output_packing

    # The kernels are the default from 32 px up; naming them would demand them below.
    chosen = None if implementation == "pallas" else implementation
    generator = stylegan2.Generator(size, dtype="bfloat16")
    params = jax.eval_shape(lambda k: generator.init_params(key=k), jax.random.key(0))
    table = generator.channel_table

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    if layer == "total":
        styles = tuple(array(batch, d) for d in generator.style_dims)

        def forward(params, styles):
            planes = stylegan2.noise_planes(
                size, batch, "const", const=params["noise_const"]
            )
            return stylegan2.synthesis(
                params["synthesis"],
                styles,
                planes,
                dtype=jnp.bfloat16,
                implementation=chosen,
            )[0]

        args = params, styles
    else:
        kind, resolution = layer.split("_")
        up, resolution = kind == "up", int(resolution)
        inside = resolution // 2 if up else resolution
        params = params["synthesis"][layer]
        weight = params["weight"].shape

        # The layout in which the layer before leaves its output.
        packing, channels = 1, table[inside]
        if implementation == "pallas":
            packing = max(1, 128 // channels)
        shape = batch, inside, inside // packing, packing * channels
        after = output_packing(
            shape, weight, up=up, packing=packing, implementation=chosen
        )

        def forward(params, x, style, noise):
            # Nobody trains the planes themselves.
            noise = jax.lax.stop_gradient(noise)
            return stylegan2.styled_conv(
                params,
                x,
                style,
                noise,
                up=up,
                packing=(packing, after),
                implementation=chosen,
            )

        args = (
            params,
            array(*shape, dtype=jnp.bfloat16),
            array(batch, channels),
            array(1, resolution, resolution),
        )
    if direction == "forward":
        return forward, args
    out = jax.eval_shape(forward, *args)

    def both(cotangent, *args):
        y, pull = jax.vjp(forward, *args)
        return y, pull(cotangent)

    return both, (array(*out.shape, dtype=out.dtype), *args)


def measure(
    folder: Path,
    programs: Path | None,
    topology: str,
    size: int,
    batch: int,
    *what: str,
) -> dict:
    """One record; `what` is layer, direction and implementation."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from jaxstyle.stylegan2 import channel_table

    layer, direction, _ = what
    chip = topology.split(":")[0]
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
    ).devices
    mesh = Mesh(np.array(devices[:1]), ("data",), axis_types=(AxisType.Auto,))
    record = dict(zip(KEYS, (topology, size, batch, *what), strict=True))
    table = channel_table(size)
    layers = list(layer_names(size)) if layer == "total" else [layer]
    passes = 1 if direction == "forward" else 3
    for i, name in enumerate(("mxu_floor_ms", "hbm_floor_ms")):
        record[name] = passes * sum(floors(n, table, batch, chip)[i] for n in layers)
    record |= {"ms": None, "peak_bytes": None, "error": None}
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            function, args = program(size, batch, *what)
            where = NamedSharding(mesh, PartitionSpec())
            args = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), args
            )
            compiled = jax.jit(function).lower(*args).compile()
        text = compiled.as_text()
        if programs:
            name = "-".join(str(record[k]) for k in KEYS).replace(":", "-")
            (programs / f"{name}.txt").write_text(text)
        record |= estimate(folder, text, chip)
        if layer == SCALE:
            record["scale"] = scale(folder, text)
        memory = compiled.memory_analysis()
        record["peak_bytes"] = memory.peak_memory_in_bytes
        record["temp_bytes"] = memory.temp_size_in_bytes
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        record["error"] = str(error).split("\n")[0][:300]
    finally:
        clear(folder)
    return record


def clear(folder: Path) -> None:
    """Empty a folder: a compilation leaves hundreds of megabytes."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def layer_names(size: int) -> list[str]:
    """The 3×3 layers."""
    from jaxstyle.stylegan2 import noise_names

    return list(noise_names(size))


def line(record: dict) -> str:
    """A record for people."""
    name = " ".join(str(record[k]) for k in KEYS)
    if record["ms"] is None:
        return f"{name}: {record['error']}"
    floor = max(record["mxu_floor_ms"], record["hbm_floor_ms"])
    return (
        f"{name}: {record['ms']:.3f} ms (XLA operations {record['xla_ms']:.3f}), "
        f"MXU floor {record['mxu_floor_ms']:.3f}, HBM floor "
        f"{record['hbm_floor_ms']:.3f}, {record['ms'] / floor:.2f} × the larger, "
        f"temporaries {record['temp_bytes'] / 2**30:.2f} GiB"
    )


def tables(records: list[dict]) -> str:
    """Markdown: a table of every whole synthesis and one of the layers of each chip."""
    from jaxstyle.stylegan2 import channel_table

    by_key = {tuple(r[k] for k in KEYS): r for r in records}

    def cell(key, *what) -> str:
        found = by_key.get((*key, *what))
        if found is None:
            return ""
        if found["ms"] is None:
            return "refused"
        return f"{found['ms']:.2f}"

    def pair(key, direction) -> list[str]:
        xla, kernels = (cell(key, direction, i) for i in ("xla", "pallas"))
        ratio = ""
        if {xla, kernels}.isdisjoint({"", "refused"}):
            ratio = f"{float(xla) / float(kernels):.1f}"
        return [xla, kernels, ratio]

    def row(cells) -> str:
        return f"| {' | '.join(str(c) for c in cells)} |"

    def table(head, rows) -> list[str]:
        return [row(head), row(["---"] * len(head)), *map(row, rows), ""]

    keys = dict.fromkeys(k[:4] for k in by_key)
    rows = []
    for key in sorted(k for k in keys if k[3] == "total"):
        for direction in ("forward", "forward+backward"):
            found = by_key.get((*key, direction, "pallas"))
            if found is None:
                continue
            temporaries = found.get("temp_bytes")
            rows.append(
                [*key[:3], direction, *pair(key, direction)]
                + [f"{found[f'{f}_floor_ms']:.2f}" for f in ("mxu", "hbm")]
                + ["" if temporaries is None else f"{temporaries / 2**30:.2f}"]
            )
    head = "chips | size | batch | direction | XLA, ms | kernels, ms | times"
    head += " | MXU floor | HBM floor | temporaries, GiB"
    lines = table(head.split(" | "), rows)
    for topology, size, batch in sorted({k[:3] for k in keys if k[3] != "total"}):
        lines += [f"{topology}, {size} px, batch {batch}:", ""]
        head = ["layer", "forward: XLA, ms", "kernel, ms", "times", "MXU floor"]
        head += ["HBM floor", "forward + backward: XLA, ms", "kernel, ms", "times"]
        rows = []
        for layer in layer_names(size):
            key = topology, size, batch, layer
            if key in keys:
                chip = topology.split(":")[0]
                floor = floors(layer, channel_table(size), batch, chip)
                floor = [f"{ms:.2f}" for ms in floor]
                forward = pair(key, "forward")
                rows.append([layer, *forward, *floor, *pair(key, "forward+backward")])
        lines += table(head, rows)
    return "\n".join(lines)


def options(argv: list[str]) -> argparse.Namespace:
    """The command line."""

    def words(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(word) for word in words(text)]

    parser = argparse.ArgumentParser(prog="pallas_ops.bench", description=__doc__)
    add = parser.add_argument
    add("--topology", type=words, default=["v5e:2x2"], help="such as v5e:2x2,v6e:2x2")
    add("--batch", type=numbers, default=[1, 4, 8])
    add("--size", type=numbers, default=[1024, 256])
    add("--layers", type=words, help="such as up_1024,total; default all and total")
    add("--directions", type=words, default=["forward", "forward+backward"])
    add("--implementations", type=words, default=["xla", "pallas"])
    add("--json", type=Path, help="records, kept and refreshed")
    add("--tables", action="store_true", help="print those of --json, and no more")
    add("--programs", type=Path, help="a folder for the compiled programs' texts")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command line entry."""
    chosen = options(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    if chosen.tables:
        print(tables(list(read_records(chosen.json).values())))
        return
    if chosen.programs:
        chosen.programs.mkdir(parents=True, exist_ok=True)
    jobs = list(all_jobs(chosen))
    # libtpu takes its flags once a process. XLA's form compiles several times faster
    # without the files that only kernels need.
    for files in (False, True):
        part = [job for job in jobs if needs_files(job) == files]
        if part:
            context = multiprocessing.get_context("spawn")
            process = context.Process(target=measure_all, args=(chosen, part, files))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(process.exitcode)


def all_jobs(chosen: argparse.Namespace) -> Iterator[tuple]:
    """What a command asks for, as values of `KEYS`."""
    for topology, size, batch in itertools.product(
        chosen.topology, chosen.size, chosen.batch
    ):
        layers = chosen.layers or [*layer_names(size), "total"]
        for what in itertools.product(
            layers, chosen.directions, chosen.implementations
        ):
            yield topology, size, batch, *what


def needs_files(job: tuple) -> bool:
    """Whether a count needs the compiler's files: those of kernels, and the scale's."""
    return job[-1] == "pallas" or job[3] == SCALE


def measure_all(chosen: argparse.Namespace, jobs: list[tuple], files: bool) -> None:
    """Measure, print and keep; in a process of its own."""
    with dumps() if files else nowhere() as folder:
        for job in jobs:
            record = measure(folder, chosen.programs, *job)
            print(line(record), flush=True)
            if chosen.json:
                records = read_records(chosen.json) | {job: record}
                text = json.dumps(list(records.values()), indent=1)
                new = chosen.json.with_suffix(".new")
                new.write_text(text + "\n")
                new.replace(chosen.json)


def read_records(path: Path | None) -> dict[tuple, dict]:
    """The records of `--json` by `KEYS`; none where there is no file yet."""
    if path is None or not path.exists():
        return {}
    return {tuple(r[k] for k in KEYS): r for r in json.loads(path.read_text())}


if __name__ == "__main__":
    main()
