import subprocess
import sys

import numpy as np
import pytest

from jaxstyle import demo, images
from tests.small_models import save_base


def test_wrong_pictures(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--photo", str(tmp_path / "me.png")])
    assert stop.value.code == 1
    assert "no such picture" in capsys.readouterr().err


def test_a_photo_that_cannot_be_used_stops_it_before_it_learns(tmp_path, capfd):
    photo, out = tmp_path / "me.png", tmp_path / "demo"
    photo.write_bytes(b"nothing")
    with pytest.raises(SystemExit) as stop:
        demo.main(["--photo", str(photo), "--no-align", "--out", str(out)])
    assert stop.value.code == 1
    printed = capfd.readouterr()
    assert f"{photo} is damaged" in printed.err and "--photo" in printed.err
    assert "train.jojo" not in printed.out


@pytest.fixture
def calls(monkeypatch):
    """The commands that the demo runs, which do nothing here."""
    seen = []
    monkeypatch.setattr(demo, "call", lambda *command: seen.append(command) or 0)
    return seen


def test_only_your_own_photo_is_taken_as_it_is(calls):
    for photo in (None, demo.PHOTO):
        demo.cut_out(demo.Options(photo=photo, align=False), demo.PHOTO, 0.0)
    ours, yours = calls
    assert "--no-align" in yours and "--no-align" not in ours


def test_the_run_outlives_a_checkout_that_moves(calls, tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setattr(demo, "REFERENCE", tmp_path / name / "cel.png")
        demo.learn(demo.Options(), 0.0)
    assert calls[0] == calls[1]


@pytest.mark.slow
def test_learns_and_draws(tmp_path):
    base = save_base(tmp_path / "base", size=32)
    for name in ("photo", "art"):
        values = np.random.default_rng(len(name)).integers(
            0, 255, (40, 40, 3), np.uint8
        )
        images.save_image(tmp_path / f"{name}.png", values)
    command = [sys.executable, "-m", "jaxstyle.demo", "--weights", base]
    command += ["--photo", tmp_path / "photo.png", "--ref", tmp_path / "art.png"]
    command += ["--steps", "2", "--no-align", "--out", tmp_path / "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(tmp_path / "demo" / "demo.png")
    # Photo, reference and three intensities.
    assert images.open_image(tmp_path / "demo" / "demo.png").width == 5 * 256 + 4 * 2
    assert "--steps 2" in done.stdout
