"""Whether a run fits: what is read from a program, and one small run compiled."""

import importlib.util

import pytest

from jaxstyle.errors import UserError
from pallas_ops import bench
from train import fits

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
def test_jojo(capsys):
    """The shipped model on four chips, and on one, which needs no collective."""
    import subprocess
    import sys

    for data, expected in (4, "all-reduce"), (1, "collectives: none"):
        out = subprocess.run(
            [sys.executable, "-m", "train.fits", "jojo", "--topology", "v5e:2x2"]
            + ["--mesh-data", str(data), "--mixes", "4", "--inversion", "mean"]
            + ["--ref", "jaxstyle/assets/examples/cel.png"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "of 16 GiB a chip, fits" in out and expected in out
