"""Whether a run fits: what is read from a program, and one small run compiled."""

import importlib.util
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxstyle.errors import UserError
from pallas_ops import bench
from tests.train.test_loop import mesh_of
from train import fits, sharding

TPU = importlib.util.find_spec("libtpu") is not None


def test_line():
    """Too much for the chip is said, with the collectives."""
    record = {"entry": 0, "every": 1, "ms": 12.34, "collectives": {}}
    record |= {"memory": 17 * 2**30, "arguments": 2**30, "temporaries": 16 * 2**30}
    text = fits.line(record, "v5e")
    assert "17.00 of 16 GiB a chip, DOES NOT FIT" in text and "12.3 ms" in text
    record["collectives"] = {"all-reduce": [3, 2**20]}
    text = fits.line(record, "v6e")
    assert "32 GiB a chip, fits" in text and "3 all-reduce of 1.0 MiB" in text


def test_chips_are_those_that_the_bench_counts():
    assert set(fits.HBM) == set(bench.CHIPS)


def test_bytes_of_a_chip():
    mesh = mesh_of(8, fsdp=4)
    tree = {"conv_4": {"weight": np.zeros((3, 3, 2, 8), np.float32)}, "n": jnp.int32(1)}
    layout = sharding.shardings(tree, mesh)
    assert fits.bytes_a_chip(tree, layout) == 3 * 3 * 2 * 8 * 4 // 4 + 4


@pytest.mark.parametrize(
    ("fixed", "each", "largest"),
    [(1.0, 0.5, 28), (1.0, 0.011, 1360), (15.9, 1.0, 0), (0.0, 15.0, 0)],
)
def test_largest_batch_takes_few_compilations(monkeypatch, fixed, each, largest):
    """GiB that grow with the batch, in steps as padding does."""
    tried = []

    def compiled(scheme, args):
        batch = int(args[args.index("--batch") + 1])
        assert batch % 4 == 0
        tried.append(batch)
        padded = fixed + each * batch * (1.02 if batch % 8 else 1)
        return [{"chip": "v5e", "memory": padded * 2**30}]

    monkeypatch.setattr(fits, "compiled", compiled)
    args = ["--compile-for", "v5e:2x2"]
    found = fits.find_batch(None, args, "--batch", 4)
    assert found == pytest.approx(largest, abs=4)
    assert len(tried) <= fits.TRIES and len(set(tried)) == len(tried)


def test_what_would_help_is_said(monkeypatch, capsys):
    def compiled(scheme, args):
        memory = 12 if "--remat" in args and "--steps" not in args else 20
        # Eight devices have no use for some mesh.
        return (
            [] if "--mesh-space" in args else [{"chip": "v5e", "memory": memory << 30}]
        )

    monkeypatch.setattr(fits, "compiled", compiled)
    fits.advise(None, ["--dtype", "bfloat16"], mesh_of(8))
    out = capsys.readouterr().out
    assert "it would fit with --remat\n" in out
    assert "with --mesh-fsdp 8:" in out and "with --dtype" not in out
    fits.advise(None, ["--steps", "5"], mesh_of(1))
    assert "none of them makes it fit" in capsys.readouterr().out


def test_mistakes(capsys):
    with pytest.raises(UserError, match=r"'h100:8'.*v5e:4x4"):
        fits.topology_devices("h100:8")
    with pytest.raises(SystemExit):
        fits.main(["jojoba", "--topology", "v5e:2x2"])
    assert "'jojoba' is no scheme" in capsys.readouterr().err


@pytest.mark.skipif(TPU, reason="libtpu is installed")
def test_no_compiler():
    with pytest.raises(UserError, match=r"jaxstyle\[tpu\]"):
        fits.topology_devices("v5e:2x2")


@pytest.mark.slow
@pytest.mark.skipif(not TPU, reason="needs libtpu: pip install 'jaxstyle[tpu]'")
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--mesh-data 4", "all-reduce"),
        ("--mesh-data 1", "collectives: none"),
        ("--mesh-data 1 --mesh-style 4 --separate", "collectives: none"),
    ],
)
def test_jojo(flags, expected):
    """The shipped model on one chip, on four, and four styles of which each has one."""
    examples = [f"jaxstyle/assets/examples/{n}.png" for n in ("cel", "paint", "pencil")]
    refs = [*examples, "jaxstyle/assets/examples/lorelei.png"]
    out = subprocess.run(
        [sys.executable, "-m", "train.fits", "jojo", "--topology", "v5e:2x2"]
        + ["--mixes", "4", "--inversion", "mean", *flags.split(), "--no-align"]
        + ["--ref", *(refs if "--separate" in flags else refs[:1])],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "of 16 GiB a chip, fits" in out and expected in out
    assert " ms by the compiler's estimate" in out
