"""The stages of the pipeline on drawn heads, and what is measured of a style."""

import numpy as np
import pytest

from jaxstyle import weights
from tests import dual_models
from train import (
    cli,
    destylize,
    dual_finetune,
    dual_heads,
    dual_pretrain,
    dual_sampler,
    evaluate,
    refine_exstyle,
    stylegan2,
)

SCHEMES = {
    f"train.{m.__name__[6:]}": m
    for m in (
        *(stylegan2, destylize, dual_pretrain, dual_finetune, refine_exstyle),
        dual_sampler,
    )
}


def test_every_stage_is_a_command_that_its_scheme_takes(tmp_path):
    options = dual_heads.Options(out=tmp_path, encoder="some/encoder", scale=0.01)
    found = {}
    for stage in dual_heads.STAGES:
        flag, module, *args = dual_heads.command_of(options, stage)
        scheme = SCHEMES[module]
        found[stage] = cli.parse(scheme.Options, scheme.__doc__, args)
        assert flag == "-m" and found[stage].run.out == str(tmp_path / stage)
        assert found[stage].run.steps == round(
            0.01
            * {"tuned": 400, "codes": 200, "pretrain": 1200, "finetune": 1500}.get(
                stage, 100 if stage == "style" else 300
            )
        )
    assert found["tuned"].augmenting.augment
    assert found["codes"].portrait_weights == found["tuned"].run.out
    assert found["finetune"].exemplars == found["codes"].run.out
    assert found["finetune"].weights == found["pretrain"].run.out
    assert found["style"].weights == found["finetune"].run.out
    assert found["style"].encoder == "some/encoder"
    sizes = {found["codes"].judge_size, found["style"].judge_size}
    assert sizes == {options.judge_size} == {found["finetune"].adversarial.judge_size}
    args = dual_heads.measure_command(options)[2:]
    table = cli.parse_options(evaluate.Options, "", evaluate.__doc__, args)
    assert set(table.methods.split(",")) <= set(evaluate.METHODS)
    assert table.dual_weights == options.dual_weights
    assert table.dual_preserve_color == options.dual_preserve_color == "code"


def pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (n, 4, 4, 3)).repeat(8, 1).repeat(8, 2).astype(np.float32)


def test_shape_and_color_are_told_apart():
    judge = weights.load("lpips_alexnet")[1]["lpips"]
    faces = pictures(3)
    tinted = faces + np.float32([0.3, 0, -0.3])
    brighter = faces * 0.5 + 0.2
    other = np.repeat(pictures(3, 1).mean(-1, keepdims=True), 3, -1)
    grey_faces = np.repeat(faces.mean(-1, keepdims=True), 3, -1)
    found = dual_heads.effects({"none": faces, "both": tinted, "x": brighter}, judge)
    assert found["none"] == {"shape": pytest.approx(0, abs=1e-6), "color": 0}
    assert found["both"]["color"] > 0.1 and found["both"]["shape"] < 1e-3
    assert found["x"]["shape"] < 1e-3
    found = dual_heads.effects({"none": grey_faces, "both": other}, judge)
    assert found["both"]["color"] < 1e-6 and found["both"]["shape"] > 0.1
    same = np.repeat(faces[:1], 3, 0)
    assert dual_heads.apart(same, judge) < 1e-5 < dual_heads.apart(faces, judge)


def test_weights_of_a_style_are_measured(tmp_path, quick_compile):
    dual_models.save_style(tmp_path / "style")
    text = dual_heads.measure_weights(dual_heads.Options(out=tmp_path))
    rows = [line.split("|")[1:-1] for line in text.splitlines()[2:6]]
    values = {name.strip(): (float(a), float(b)) for name, a, b in rows}
    assert values["none"] == (0, 0) and list(values) == list(dual_heads.WEIGHTS)
    assert "one face under two exemplars" in text


def test_an_encoder_is_needed(tmp_path, capsys):
    base = dual_models.save_all(tmp_path) / "base"
    with pytest.raises(SystemExit):
        dual_heads.main(["--weights", str(base), "--out", str(tmp_path / "out")])
    assert "--encoder is not given, and" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
