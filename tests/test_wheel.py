"""The built wheel, away from the checkout: what a user installs must be whole."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


def run(command, folder, **environment):
    """Run a command in a folder; its output is shown if it fails."""
    done = subprocess.run(
        [str(c) for c in command],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--quiet", "--wheel-dir", folder, ROOT], folder)
    (built,) = folder.glob("*.whl")
    return built


def stylise(python, folder, **environment):
    """Stylise the photo in the installed package; returns the picture."""
    where = run(
        [python, "-c", "import jaxstyle; print(jaxstyle.__file__)"],
        folder,
        **environment,
    )
    package = Path(where.strip()).parent
    assert ROOT not in package.parents
    examples = package / "assets" / "examples"
    run(
        [python, "-m", "train.jojo", "--ref", examples / "cel.png", "--no-align"]
        + ["--inversion", "mean", "--steps", "2", "--out", folder / "run"],
        folder,
        **environment,
    )
    run(
        [python, "-m", "jaxstyle.stylize", examples / "photo.jpg"]
        + ["--weights", folder / "run", "--out", folder / "out.png"],
        folder,
        **environment,
    )
    picture = np.asarray(Image.open(folder / "out.png"))
    assert picture.shape == (64, 64, 3) and picture.std() > 5


@pytest.mark.slow
def test_wheel_in_a_clean_environment_stylises(wheel, tmp_path):
    run([sys.executable, "-m", "venv", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", wheel], tmp_path)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    stylise(python, folder, PYTHONPATH="")


@pytest.mark.slow
def test_wheel_away_from_the_checkout_stylises(wheel, tmp_path):
    installed = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    run([*pip, "--no-deps", "--quiet", "--target", installed, wheel], tmp_path)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    stylise(sys.executable, folder, PYTHONPATH=str(installed))
