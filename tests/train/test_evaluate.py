"""The evaluation: its measures on cases with known answers, and one small table."""

import json

import jax
import numpy as np
import pytest

from jaxstyle import images, pipeline, weights
from jaxstyle.errors import UserError
from jaxstyle.features import judges
from jaxstyle.features.identity import ArcFace
from tests import dual_models, small_models
from train import (
    commands,
    evaluate,
    inverters,
    jojo,
    measures,
    nada,
    style_classifier,
    stylegan2,
)


def faces(n, size=32, seed=0):
    """Smooth random pictures [n, size, size, 3] in [-1, 1]."""
    small = np.random.default_rng(seed).uniform(-1, 1, (n, 4, 4, 3))
    return np.asarray(jax.image.resize(small, (n, size, size, 3), "linear"))


def test_own_nearer_counts_pairs():
    distances = np.array([[1.0, 2, 3], [2, 1, 0.5], [9, 9, 1]])
    assert measures.own_nearer(distances) == pytest.approx(5 / 6)


def test_color_transfer_takes_the_colours():
    reference = faces(1, seed=1)[0] * 0.3
    moved = measures.color_transfer(faces(2) * 0.3, reference)
    for picture in moved:
        np.testing.assert_allclose(
            picture.mean((0, 1)), reference.mean((0, 1)), atol=0.05
        )
    again = measures.color_transfer(reference[None], reference)[0]
    np.testing.assert_allclose(again, reference, atol=1e-5)


def test_distances_are_lpips_and_the_style_is_nearest_to_itself():
    model, params = weights.load("lpips_alexnet")
    judge = params["lpips"]
    a, b = faces(2), faces(2, seed=1)
    features = [measures.describe(judge, x) for x in (a, b)]
    found = np.asarray(measures.all_distances(judge, *features))
    sized = [measures.judge_size(x) for x in (a, b)]
    expected = model.lpips.apply({"params": judge}, *sized)
    for i in range(2):
        np.testing.assert_allclose(found[i, i], expected[i], rtol=1e-5)
    style = measures.style_distances(features[0], [f[:1] for f in features[0]])
    assert style[0] < 1e-10 and style[1] > 1e-3


def test_pictures_are_measured_as_a_file_holds_them():
    # Networks draw beyond white and black.
    beyond = faces(2) * 3
    held = np.clip(beyond, -1, 1)
    np.testing.assert_array_equal(*map(measures.judge_size, (beyond, held)))


def test_the_same_face_has_cosine_one():
    judge = judges.choose("identity")
    a, b = (measures.faces(judge, faces(2, seed=i)) for i in (0, 1))
    assert measures.mean_cosine(a, a) == pytest.approx(1, abs=1e-5)
    assert measures.mean_cosine(a, b) == pytest.approx(np.trace(a @ b.T) / 2, abs=1e-5)


def test_the_best_value_of_a_sweep_costs_little_lpips():
    rows = {
        value: {"lpips": lpips, "cosine": cosine, "identity": 0.9, "style": 0.5}
        for value, lpips, cosine in (
            (0.0, 0.4, 0.2),
            (0.1, 0.41, 0.5),
            (0.3, 0.42, 0.6),
            (1.0, 0.43, 0.9),
        )
    }
    assert evaluate.best_value(rows) == 0.3
    lines = evaluate.sweep_table("id-lambda", rows).splitlines()
    assert [line.endswith("| best |") for line in lines[2:]] == [0, 0, 1, 0]
    assert lines[4] == "| 0.3 | 0.420 | 90% | 0.60 | 0.50 | 1.050 | best |"
    assert evaluate.swept(evaluate.Options()) == {}
    options = evaluate.Options(sweep="id-lambda", sweep_values=(0.5,))
    assert evaluate.swept(options) == {0.0: "id-lambda 0", 0.5: "id-lambda 0.5"}


def test_costs_of_a_command():
    held = np.ones(400_000_000, np.uint8)  # by us, and none of the command's business
    seconds, memory = commands.run(["-c", "print(len(b'x' * 60_000_000))"])
    assert 0 < seconds < 60 and 60 < memory < 300 < held.nbytes / 1e6
    with pytest.raises(UserError, match="python -c 1/0.*failed"):
        commands.run(["-c", "1/0"])


def test_a_command_that_has_ended_is_not_repeated_as_another(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(commands, "run", lambda c: (ran.append(c), (len(ran), 9.0))[1])
    done, command = tmp_path / "cost.json", ["-m", "train.jojo", "--ref", "a b.png"]
    cost = {"seconds": 1, "memory": 9.0}
    assert commands.once(done, [*command, "--lr", "1"]) == cost
    # The order of flags says nothing.
    assert commands.once(done, [*command[:2], "--lr", "1", *command[2:]]) == cost
    with pytest.raises(UserError, match="--lr 1 → --lr 2 --steps 3. .*another --out"):
        commands.once(done, [*command, "--lr", "2", "--steps", "3"])
    with pytest.raises(UserError, match=r"cost.json .* --lr 1 → \(nothing\)"):
        commands.once(done, command)
    assert len(ran) == 1
    # Of an older version's, the run itself says whether it is this one.
    done.write_text(json.dumps({"seconds": 70, "memory": 8}))
    for _ in range(2):
        assert commands.once(done, command) == {"seconds": 70, "memory": 8}
    assert ran[1:] == [command]


def train_here(command):
    """Instead of a process of its own, which would compile everything again."""
    schemes = {f"train.{m.__name__[6:]}": m for m in (jojo, nada, stylegan2)}
    assert command[0] == "-m"
    schemes[command[1]].main(command[2:])
    return 1.5, 200.0


def save_teachers(folder, size=64):
    """Pictures of four styles that a glance tells apart."""
    folder.mkdir()
    for i, style in enumerate(evaluate.TEACHERS):
        pictures = faces(8, size, seed=i) * 20 + 30 + 60 * i
        np.save(folder / f"{style}.npy", pictures.astype(np.uint8))
    return folder


def test_the_classifier_learns_styles(tmp_path):
    folder = save_teachers(tmp_path / "teachers")
    options = evaluate.Options(teachers=str(folder), classifier_steps=60)
    judge = evaluate.classifier(options, {})
    pictures = np.load(folder / "pencil.npy") / np.float32(127.5) - 1
    assert evaluate.called(judge, pictures, "pencil") == {"called": 1.0}
    assert evaluate.called(judge, pictures, "cel") == {"called": 0.0}
    assert evaluate.called(judge, pictures, "lorelei") == {}
    pictures[:, 0] = -999  # no more than black
    assert evaluate.called(judge, pictures, "pencil") == {"called": 1.0}
    assert style_classifier.named(judge, pictures[:, ::2, ::2]).shape == (8,)
    plain = evaluate.Options(out=tmp_path)
    assert evaluate.classifier(plain, {"jojo": evaluate.METHODS["jojo"]}) is None
    (folder / "cel.npy").unlink()
    with pytest.raises(UserError, match="cel.npy is missing.*train.heads"):
        evaluate.classifier(options, {})


def test_commands_of_the_other_schemes(tmp_path):
    folder = save_teachers(tmp_path / "teachers", 16)
    options = evaluate.Options(teachers=str(folder), out=tmp_path)
    texts, pictures, finetune = (
        evaluate.command_of(options, evaluate.METHODS[name], "pencil")
        for name in ("nada-text", "nada-pictures", "finetune+swap")
    )
    assert texts[1:] == [
        *("train.nada", "--source", "a photo", "--target", "a pencil drawing")
    ]
    assert pictures[1:3] == ["train.nada", "--ref"] and len(pictures) == 7
    assert images.to_array(images.open_image(pictures[3])).shape == (16, 16, 3)
    assert finetune[1:] == ["train.stylegan2", "--data", str(folder / "pencil.npy")]


@pytest.mark.slow
def test_a_table_of_the_other_schemes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "run", train_here)
    base = small_models.save_base(tmp_path / "base")
    for i, kind in enumerate(("photo", "cel", "pencil", "paint")):
        (tmp_path / "heads" / kind).mkdir(parents=True)
        for j, picture in enumerate(faces(2, seed=i)):
            images.save_image(tmp_path / "heads" / kind / f"{j:05d}.png", picture)
    teachers = save_teachers(tmp_path / "teachers", 16)
    args = ["--weights", base, "--heads", tmp_path / "heads", "--n", 2, "--steps", 2]
    args += ["--styles", "cel,lorelei", "--methods"]
    args += ["nada-text,nada-pictures,finetune+swap", "--teachers", teachers]
    args += ["--classifier-steps", 2, "--sheet-heads", 0, "--out", tmp_path / "out"]
    clip = f"--clip {nada.SMALL_CLIP}"
    monkeypatch.setitem(
        evaluate.METHODS,
        "nada-text",
        evaluate.Method((*clip.split(),), scheme="nada-text"),
    )
    monkeypatch.setitem(
        evaluate.METHODS,
        "nada-pictures",
        evaluate.Method((*clip.split(),), scheme="nada-pictures"),
    )
    evaluate.main([str(a) for a in [*args, "--extra=--steps 2"]])
    assert "of the drawn are called so" in capsys.readouterr().out
    records = json.loads((tmp_path / "out/table.json").read_text())
    rows = {(r["style_name"], r["method"]): r for r in records}
    for name in ("nada-text", "nada-pictures", "finetune+swap"):
        row = rows["cel", name]
        assert 0 <= row["called"] <= 1 and row["variety"] > 0 and row["ratio"] > 0
        assert ("lorelei", name) not in rows
    assert rows["cel", "inversion"]["variety"] == pytest.approx(1)
    assert rows["cel", "reference"]["variety"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_a_small_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "run", train_here)
    base = small_models.save_base(tmp_path / "base")
    for i, kind in enumerate(("photo", "cel")):
        (tmp_path / "heads" / kind).mkdir(parents=True)
        for j, picture in enumerate(faces(2, seed=i)):
            images.save_image(tmp_path / "heads" / kind / f"{j:05d}.png", picture)
    for kind in ("pencil", "paint"):
        (tmp_path / "heads" / kind).symlink_to(tmp_path / "heads" / "cel")
    common = ["--weights", base, "--heads", tmp_path / "heads", "--n", 2]
    common += ["--styles", "cel", "--tune", 2, "--tune-lr", 0.01]
    common += ["--out", tmp_path / "out", "--sheet-heads", 1, 5]
    args = ["--methods", "default,default-half,default-untuned", "--steps", 2]
    judge = ArcFace(16, units=(1, 1), channels=(4, 8), se_ratio=2, width=8)
    judge_params = {"identity": judge.init_params(key=jax.random.key(0))}
    weights.save(tmp_path / "judge", {"identity": judge}, judge_params)
    args += ["--sweep", "id-lambda", "--sweep-values", 0.5]
    args += ["--identity-net", tmp_path / "judge", "--sheet-to", tmp_path / "grid.jpg"]
    extra = f"--steps 2 --inversion mean --identity-net {tmp_path / 'judge'}"
    common += [f"--extra={extra}"]
    encoder = small_models.save_encoder(tmp_path / "encoder")
    restyle = small_models.save_encoder(tmp_path / "restyle", 6)
    args += ["--inverters", f"w-3,mean,{encoder},{encoder}+2,{restyle}"]
    evaluate.main([str(a) for a in [*common, *args]])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out/inverters.json").read_text())
    searched, mean, *encoded = (r["lpips"] for r in found)
    assert len({searched, mean, *encoded}) == 5
    assert found[0]["truth"] != found[1]["truth"] and found[1]["seconds"] == 0
    assert f"| {encoder}+2 | " in printed
    assert images.open_image(tmp_path / "out/inverters.jpg").width > 5 * 16
    ceiling, titles = (printed.index(t) for t in ("its own truth", "own nearer"))
    assert ceiling < titles and "| best |" in printed
    records = json.loads((tmp_path / "out/table.json").read_text())
    by_name = {(r["style_name"], r["method"]): r for r in records}
    assert by_name["cel", "inversion"]["ratio"] == 1
    assert (
        0
        < by_name["cel", "default"]["lpips"]
        != by_name["cel", "default-half"]["lpips"]
    )
    assert by_name["cel", "default"]["memory"] == 200
    apart = [by_name["cel", f"default{x}"]["lpips"] for x in ("", "-untuned")]
    assert apart[0] != apart[1]
    apart = [by_name["cel", f"{x}inversion"]["lpips"] for x in ("", "tuned ")]
    assert apart[0] != apart[1]
    assert by_name["cel", "tuned inversion"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert "Tuning: 2 steps" in printed
    assert by_name["cel", "default"]["lpips"] == by_name["cel", "id-lambda 0"]["lpips"]
    assert by_name["cel", "inversion"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert by_name["mean", "id-lambda 0.5"]["cosine"] < 1
    width, height = images.open_image(tmp_path / "out/sheet.jpg").size
    assert width > 9 * 16 and height < 3 * 16
    assert (tmp_path / "grid.jpg").read_bytes() == (
        tmp_path / "out/sheet.jpg"
    ).read_bytes()
    # The codes of an encoder are others, and its name is said.
    args = ["--methods", "default", "--encoder", encoder]
    evaluate.main([str(a) for a in [*common, *args]])
    assert f"s a photo ({encoder})" in capsys.readouterr().out
    records = json.loads((tmp_path / "out/table.json").read_text())
    again = {(r["style_name"], r["method"]): r for r in records}
    assert again["cel", "inversion"]["lpips"] != by_name["cel", "inversion"]["lpips"]


def test_inverters_by_name(tmp_path):
    generator, _ = pipeline.load_generator(small_models.save_base(tmp_path / "base"))
    encoder = small_models.save_encoder(tmp_path / "enc")
    assert inverters.parse("mean", generator) is None
    search = inverters.parse("w_plus-40", generator)
    assert search == inverters.Inverter(inverters.Search(space="w_plus", steps=40))
    alone = inverters.parse(encoder, generator)
    assert alone.encoder.where == encoder and alone.refine == 0
    assert inverters.parse(f"{encoder}+50", generator).refine == 50
    with pytest.raises(UserError, match="enc\\+many.*runs/e4e\\+50"):
        inverters.parse("enc+many", generator)
    with pytest.raises(UserError, match="does not exist"):
        inverters.parse("w-0", generator)


@pytest.mark.slow
def test_exemplars_in_the_table(tmp_path, quick_compile):
    style = dual_models.save_style(tmp_path / "style")
    for i, kind in enumerate(("photo", "cel", "pencil", "paint")):
        (tmp_path / "heads" / kind).mkdir(parents=True)
        for j, picture in enumerate(faces(3, 32, seed=i)):
            images.save_image(tmp_path / "heads" / kind / f"{j:05d}.png", picture)
    args = ["--weights", style, "--heads", tmp_path / "heads", "--n", 3, "--steps", 2]
    args += ["--styles", "cel,pencil", "--methods", "dual,dual-stored", "--dual", style]
    args += ["--sheet-heads", 0, "--out", tmp_path / "out"]
    evaluate.main([str(a) for a in args])
    records = json.loads((tmp_path / "out/table.json").read_text())
    rows = {(r["style_name"], r["method"]): r for r in records}
    new, stored = rows["cel", "dual"], rows["cel", "dual-stored"]
    assert new["lpips"] != stored["lpips"] and stored["ratio"] > 0
    assert ("pencil", "dual") not in rows and ("pencil", "inversion") in rows
    # Colors from the head's code are others.
    evaluate.main([str(a) for a in [*args, "--dual-preserve-color", "code"]])
    rows = json.loads((tmp_path / "out/table.json").read_text())
    rows = {(r["style_name"], r["method"]): r for r in rows}
    assert rows["cel", "dual"]["lpips"] != new["lpips"]
    # Weights of 0: the inversion itself.
    again = [*args, "--dual-weights", "0,0"]
    evaluate.main([str(a) for a in again])
    rows = json.loads((tmp_path / "out/table.json").read_text())
    rows = {(r["style_name"], r["method"]): r for r in rows}
    for name in ("dual", "dual-stored"):
        assert rows["cel", name]["lpips"] == rows["cel", "inversion"]["lpips"]
    # Of generators tuned to the photos, but where the method says not.
    again += ["--tune", "2", "--methods", "dual,dual-untuned,dual-stored"]
    evaluate.main([str(a) for a in again])
    rows = json.loads((tmp_path / "out/table.json").read_text())
    found = {r["method"]: r["lpips"] for r in rows if r["style_name"] == "cel"}
    assert found["dual-untuned"] == found["inversion"] != found["tuned inversion"]
    assert found["dual"] == found["dual-stored"] == found["tuned inversion"]


def test_wrong_options_are_named(tmp_path, capsys):
    options = evaluate.Options(out=tmp_path, heads=str(tmp_path / "none"))
    with pytest.raises(UserError, match="train.heads"):
        evaluate.draw_heads(options)
    with pytest.raises(UserError, match="--styles"):
        evaluate._chosen("oil", evaluate.STYLES, "--styles")
    for flag, value in (("--n", 1), ("--sheet-heads", 20), ("--sweep-values", -1)):
        with pytest.raises(SystemExit):
            evaluate.main([flag, str(value)])
        assert f"{flag} is" in capsys.readouterr().err
    for args, message in (
        ([], "--methods holds dual, which needs --dual"),
        (["--dual", "heads"], "--dual heads holds no DualStyleGAN"),
        (["--encoder", "heads_e4e", "--space", "w"], "--space: of a search, but"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main(["--methods", "default,dual", *args])
        assert message in capsys.readouterr().err
