"""Judging a generator's own pictures: measures on pictures with known answers."""

import jax
import numpy as np
import pytest

from jaxstyle import images, weights
from jaxstyle.errors import UserError
from tests import small_models
from train import samples


@pytest.fixture(scope="module")
def judge():
    """LPIPS parameters."""
    return weights.load("lpips_alexnet")[1]["lpips"]


def smooth(n, size=16, seed=0):
    """Smooth random pictures [n, size, size, 3] in [-1, 1]."""
    small = np.random.default_rng(seed).uniform(-1, 1, (n, 4, 4, 3))
    return np.asarray(jax.image.resize(small, (n, size, size, 3), "linear"))


def test_faces_are_counted():
    folder = weights.ASSETS / "examples"
    head = images.to_array(images.open_image(folder / "head1.jpg"), 64)
    assert samples.face_rate(np.stack([head, np.zeros_like(head)])) == 0.5


def test_variety_is_nought_for_equal_pictures(judge):
    pictures = smooth(3)
    assert samples.variety(judge, pictures[[0, 0, 0]]) < 1e-6
    assert samples.variety(judge, pictures) > 0.01


def test_the_nearest_is_found_past_a_batch(judge):
    source = smooth(samples.BATCH + 5)
    wanted = [samples.BATCH + 3, 7]
    index, distance = samples.nearest(judge, source[wanted], source, len(source))
    assert list(index) == wanted and distance.max() < 1e-5
    index, _ = samples.nearest(judge, source[wanted], source, samples.BATCH)
    assert index[0] < samples.BATCH


def test_too_few_pictures_are_refused(tmp_path):
    np.save(tmp_path / "data.npy", np.zeros((3, 16, 16, 3), np.uint8))
    base = small_models.save_base(tmp_path / "base")
    options = samples.Options(str(tmp_path / "data.npy"), base, n=12)
    with pytest.raises(UserError, match="--data has 3 pictures"):
        samples.inspect(options)


def test_data_without_faces(tmp_path, monkeypatch, capsys):
    """Cars have none: there is no ratio to theirs."""
    rows = {
        "data": {"faces": 0.0, "variety": 0.4},
        "psi 1": {"faces": 0.0, "variety": 0.2},
        "nearest": {"lpips": [0.3]},
    }
    monkeypatch.setattr(samples, "inspect", lambda options: rows)
    samples.main(["--data", "cars", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "psi 1: faces 0.0%, variety 0.200 (0.50 of the data's)" in text
