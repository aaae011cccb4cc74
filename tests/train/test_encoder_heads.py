"""The small encoders' commands, and what is measured of them."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from jaxstyle import images, weights
from tests import small_models
from train import cli, commands, e4e, encoder_heads, psp, stylegan2


def test_every_command_is_one_that_its_scheme_takes(tmp_path):
    options = encoder_heads.Options(out=tmp_path)
    schemes = {f"train.{m.__name__[6:]}": m for m in (psp, e4e, stylegan2)}
    for name in (*encoder_heads.INVERTERS, *encoder_heads.TASKS, "toons"):
        flag, module, *args = encoder_heads.command_of(options, name)
        scheme = schemes[module]
        found = cli.parse(scheme.Options, scheme.__doc__, args)
        assert flag == "-m" and found.run.out == str(tmp_path / name)
        if name == "toons":
            continue
        found = scheme.resolve(found)
        steps = encoder_heads.INVERTERS.get(name, options.task_steps)
        assert found.run.steps == steps
        if name in encoder_heads.TASKS:
            assert found.task == encoder_heads.TASKS[name].task
            toons = found.common.weights == str(tmp_path / "toons")
            assert toons == (name == "toonify")
        elif name == "z_plus":
            assert found.space == "z_plus"
        else:
            # All ten rows have joined long before the end.
            last = found.progressive_start + 9 * found.progressive_every
            assert last <= 0.3 * found.run.steps


def save_heads(folder, kind, n, rng):
    """Coarse noise as pictures or, of two classes, as label maps."""
    (folder / kind).mkdir(parents=True)
    for i in range(n):
        coarse = rng.uniform(-1, 1, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
        path = folder / kind / f"{i:05d}.png"
        if kind == "labels":
            Image.fromarray((coarse[..., 0] > 0).astype(np.uint8)).save(path)
        else:
            images.save_image(path, coarse)


def train_nothing(command):
    """Instead of a training: an untrained encoder beside the generator."""
    _, module, *args = command
    given = {a: b for a, b in itertools.pairwise(args) if a.startswith("--")}
    out, base = given["--out"], given["--weights"]
    model, params = weights.load(base)
    networks, values = (
        {"generator": model.generator},
        {"generator": params["generator"]},
    )
    if module == "train.psp":
        kinds = {"celebs_sketch_to_face": 1, "celebs_seg_to_face": 11}
        small_models.save_encoder(f"{out}-encoder", kinds.get(given["--task"], 3))
        other, more = weights.load(f"{out}-encoder")
        networks |= {"encoder": other.encoder}
        values |= {"encoder": more["encoder"]}
    weights.save(out, networks, values)
    return 1.0, 2.0


def test_tasks_are_measured_against_the_average_head(tmp_path, monkeypatch, capsys):
    base = small_models.save_base(tmp_path / "base")
    rng = np.random.default_rng(0)
    for kind in ("photo", "pencil", "cel", "labels"):
        save_heads(tmp_path / "held", kind, 3, rng)
    for pose in ("turned", "ahead"):
        save_heads(tmp_path / pose, "photo", 3, rng)
    for drawn in ("data", "large"):
        (tmp_path / drawn).mkdir()
    monkeypatch.setattr(commands, "run", train_nothing)
    args = ["--out", tmp_path, "--weights", base, "--n", 3, "--only"]
    encoder_heads.main([str(a) for a in [*args, "sketch,labels,super_resolution"]])
    encoder_heads.main([str(a) for a in [*args, "frontal,toonify"]])
    printed = capsys.readouterr().out
    assert "| super_resolution, 8 times |" in printed and "| toonify |" in printed
    records = json.loads((tmp_path / "table.json").read_text())
    assert [r["task"] for r in records] == ["frontal", "toonify"]
    for record in records:
        assert record["ratio"] == record["lpips"] / record["average"] > 0
        assert record["input"] > 0
    # The turned heads are the inputs, and frontal ones are wanted.
    sheet = images.to_array(images.open_image(tmp_path / "frontal.jpg"))
    assert sheet.shape[1] > 3 * 16
    for name in ("sketch", "labels", "super_resolution", "toonify"):
        assert (tmp_path / f"{name}.jpg").is_file()


def test_what_is_perfect_has_no_distance(tmp_path, monkeypatch):
    """An encoder whose codes draw the pictures wanted."""
    base = small_models.save_base(tmp_path / "base")
    model, params = weights.load(base)
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((2, 6, 16), np.float32)
    drawn = encoder_heads.pipeline.pictures(model.generator, params["generator"], codes)
    for i, picture in enumerate(np.clip(drawn, -1, 1)):
        path = tmp_path / "held" / "photo" / f"{i:05d}.png"
        images.save_image(path, picture)
    small_models.save_encoder(tmp_path / "encoder")
    other, more = weights.load(tmp_path / "encoder")
    networks = {"generator": model.generator, "encoder": other.encoder}
    values = {"generator": params["generator"], "encoder": more["encoder"]}
    weights.save(tmp_path / "inversion", networks, values)
    monkeypatch.setattr(encoder_heads, "encode_pictures", lambda *a, **k: codes)
    options = encoder_heads.Options(out=tmp_path, n=2, weights=base)
    judge = weights.load("lpips_alexnet")[1]["lpips"]
    (record,) = encoder_heads.measure(options, "inversion", judge)
    assert record["lpips"] < 0.05 * record["average"] and record["identity"] == 1


def test_names_are_checked(capsys):
    with pytest.raises(SystemExit):
        encoder_heads.main(["--only", "e4e,toon"])
    assert "--only is 'e4e,toon'; it must be of e4e, z_plus" in capsys.readouterr().err
