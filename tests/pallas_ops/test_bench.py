"""What the bench reads from the compiler's files, and one small compiled step."""

import importlib.util
import json
from pathlib import Path

import pytest

from jaxstyle.stylegan2 import channel_table
from pallas_ops import bench

FILES = {
    "schedule-analysis_final_bundles": "\ttotal scheduled bundles:    100\n",
    "final_bundles": """
  0xb LB: > { %1 = vmatmul.bf16.vlgmr.msra.gmra.mxu0 %v2  ;;  %v3 = vadd.f32 %v4, %v5 }
  0xc   : > { %2 = vmatmul.bf16.gmra.mxu0 %v2  ;;  %v7 = vld [vmem:[%s4] sm:$0xff] }
  0xd   : > { %3 = vmatmul.lmr.bf16.gmra.16.mxu0 %v2 }
  0xe   : > { %4 = vmatmul.bf16.gmra.mxu1 %v2 }
  0xf   : > { %p18_p13 = scmp.ge.s32.totalorder %s21_s16, 34 /* loop exit test */ }
""",
    "final_hlo-static-per-bundle-utilization": (
        "== CAPACITY:\nMXU, VALU, VSTORE:SPILL, SALU\n4 4 1 2\n"
        "== UTILIZATION:\n1 0 1 0\n1 0 0 0\n1 2 1 0\n"
    ),
}
PROGRAM = """
ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  %bitcast.1 = bf16[128]{0} bitcast(%x)
  %bitcast.2 = bf16[128]{0} bitcast(%x)
  %conv.1 = bf16[8,16]{1,0} custom-call(%bitcast.1, %bitcast.2), \
custom_call_target="tpu_custom_call"
  ROOT %copy = bf16[8,16]{0,1} copy(%conv.1), backend_config={"estimated_cycles":"3000"}
}
"""


def write(folder, name, files):
    for i, (ending, text) in enumerate(files.items()):
        (folder / f"17-{name}-{70 + i}-{ending}.txt").write_text(text)


def test_estimate(tmp_path):
    """Grid × the busiest of bundles, matrix unit and memory, and XLA's own cycles."""
    write(tmp_path, "conv.1", FILES)
    kernel = bench.read_kernel(tmp_path, "conv.1")
    assert kernel == bench.Kernel(turns=32, bundles=100, matmul_rows=40, spills=2)
    found = bench.estimate(tmp_path, PROGRAM, "v5e")
    assert found["xla_ms"] == pytest.approx(3000 / 1.5e6)
    assert found["kernels"] == {"conv.1": pytest.approx(3200 / 1.5e6)}
    assert found["ms"] == pytest.approx(6200 / 1.5e6)


def test_loops_and_branches_of_a_program(tmp_path):
    """A loop counts as often as it runs, of branches the longest one does."""
    write(tmp_path, "conv.1", FILES)
    call = next(n for n in PROGRAM.splitlines() if "%conv.1 =" in n)
    call += ', backend_config={"body":"a"}'
    inner = """
%turn (a: bf16[8,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %bitcast.3 = bf16[128]{0} bitcast(%a)
  CALL
}

%more (i: s32[]) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%short (a: bf16[8,16]) -> bf16[8,16] {
  ROOT %add.1 = bf16[8,16] add(%a, %a), backend_config={"estimated_cycles":"10"}
}

%long (a: bf16[8,16]) -> bf16[8,16] {
  ROOT %add.2 = bf16[8,16] add(%a, %a), backend_config={"estimated_cycles":"500"}
}
""".replace("CALL", call.replace("bitcast.1, %bitcast.2", "bitcast.3, %bitcast.3"))
    outer = """
  %while.1 = (s32[], bf16[8,16]) while(%t), condition=%more, body=%turn, metadata={}
  %cond = bf16[8,16] conditional(%p, %x), branch_computations={%short, %long}
  ROOT %copy"""
    program = inner + PROGRAM.replace("  ROOT %copy", outer[1:])
    # Compiled once, for the name within the loop.
    program = program.replace(
        "%conv.1 = bf16[8,16]{1,0} custom-call(%bitcast.1",
        "%conv.2 = bf16[8,16]{1,0} custom-call(%bitcast.1",
    )
    first = next(n for n in program.splitlines() if "%conv.2 =" in n)
    program = program.replace(first, first + ', backend_config={"body":"a"}')
    found = bench.estimate(tmp_path, program, "v5e")
    assert found["xla_ms"] == pytest.approx((3000 + 500) / 1.5e6)
    one = pytest.approx(3200 / 1.5e6)
    assert found["kernels"] == {"conv.1": 7 * 3200 / 1.5e6, "conv.2": one}
    with pytest.raises(RuntimeError, match="how often a loop runs"):
        bench.estimate(tmp_path, program.replace("direction=LT", "direction=NE"), "v5e")


def test_loop_within_a_turn(tmp_path):
    """Its bundles and products count as often as they run."""
    lines = FILES["final_bundles"].splitlines()
    loop = [
        "  0x10 LB: >> { %8 = vmatmul.bf16.gmra.mxu1 %v2 }",
        "  0x11   : >> { %p = scmp.ge.s32.totalorder %s1, 3 /* loop exit test */ }",
    ]
    code = "\n".join([*lines[:-1], *loop, lines[-1]])
    write(tmp_path, "conv.1", FILES | {"final_bundles": code})
    kernel = bench.read_kernel(tmp_path, "conv.1")
    assert kernel == bench.Kernel(32, 100 + 2 * 2, (1 + 3) * 16, 2)


def test_rows_of_float32(tmp_path):
    """Half as many fit a register, whatever the instruction is told besides."""
    code = FILES["final_bundles"]
    for form in ("", ".msk"):
        wide = code.replace("vmatmul.bf16", f"vmatmul{form}.f32")
        write(tmp_path, "conv.1", FILES | {"final_bundles": wide})
        # Two of 8 rows, and 8 of the second form, which stays as it was.
        assert bench.read_kernel(tmp_path, "conv.1").matmul_rows == 8 + 8 + 8


def test_unresolved_loop(tmp_path):
    """A loop in the body would be counted once: refused."""
    code = FILES["final_bundles"] + "  0x10 LB: >> { %p = vnop }\n"
    write(tmp_path, "conv.1", FILES | {"final_bundles": code})
    with pytest.raises(RuntimeError, match="2 loops"):
        bench.read_kernel(tmp_path, "conv.1")
    with pytest.raises(FileNotFoundError, match="no files"):
        bench.read_kernel(tmp_path, "conv")


def test_kernel_that_is_called_twice(tmp_path):
    """The compiler leaves files under one of the names: those of the same body."""
    write(tmp_path, "conv.1", FILES)
    call = next(n for n in PROGRAM.splitlines() if "%conv.1 =" in n)
    first = call + ', backend_config={"body":"a"}'
    twin = first.replace("%conv.1", "%conv.2")
    found = bench.estimate(tmp_path, PROGRAM.replace(call, f"{first}\n{twin}"), "v5e")
    assert found["kernels"]["conv.2"] == found["kernels"]["conv.1"]
    other = twin.replace('"a"', '"b"')
    with pytest.raises(RuntimeError, match="no files of kernel conv.2"):
        bench.estimate(tmp_path, PROGRAM.replace(call, f"{first}\n{other}"), "v5e")


def test_floors():
    """1024 px, 32 channels, batch 4 on a v5e, by hand."""
    arithmetic, memory = bench.floors("conv_1024", channel_table(1024), 4, "v5e")
    assert arithmetic == pytest.approx(4 * 2**20 * 9 * 32**2 / 4 / 128**2 / 1.5e6)
    assert memory == pytest.approx(2 * 4 * 2**20 * 32 * 2 / 819e6, rel=1e-3)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install 'jaxstyle[tpu]'",
)
def test_one_layer(tmp_path):
    """The smallest layer, in a process that loads libtpu with the flags."""
    import subprocess
    import sys

    path = tmp_path / "records.json"
    subprocess.run(
        [sys.executable, "-m", "pallas_ops.bench", "--size", "64", "--batch", "1"]
        + ["--layers", "conv_32", "--directions", "forward", "--json", str(path)],
        check=True,
    )
    xla, kernel = json.loads(path.read_text())
    assert xla["error"] is None and kernel["error"] is None
    assert kernel["kernels"] and not xla["kernels"]
    assert kernel["ms"] < xla["ms"]


def test_readme_tables():
    """The page's tables are those of the records beside it."""
    folder = Path(bench.__file__).parent
    records = json.loads((folder / "records.json").read_text())
    page = (folder / "README.md").read_text()
    lines = bench.tables(records).splitlines()
    assert len(lines) > 6 and not set(lines) - set(page.splitlines())


def test_targets():
    """What the compiler counted for the batches that matter, against what was asked."""
    folder = Path(bench.__file__).parent
    records = json.loads((folder / "records.json").read_text())
    by_key = {tuple(r[k] for k in bench.KEYS): r for r in records}

    def total(batch, direction):
        return by_key["v5e:2x2", 1024, batch, "total", direction, "pallas"]

    assert total(1, "forward")["ms"] <= 3.5
    assert total(4, "forward")["ms"] <= 10
    both = total(4, "forward+backward")
    assert both["ms"] <= 35 and both["temp_bytes"] <= 4 * 2**30
    pairs = [(by_key.get((*k[:5], "xla")), r) for k, r in by_key.items()]
    pairs = [(x, r) for x, r in pairs if x and r["implementation"] == "pallas"]
    slower = [r for x, r in pairs if r["ms"] > x["ms"]]
    assert len(pairs) >= 240 and not slower
