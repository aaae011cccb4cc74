"""Every scheme, over devices and over processes: the same losses as on one."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from jaxstyle import images, weights
from jaxstyle.exemplars import Exemplars
from tests import dual_models
from tests.clip_models import SMALL
from tests.small_models import save_base
from tests.train import many
from tests.train.test_loop import lines
from train import dual_pretrain

TPU = importlib.util.find_spec("libtpu") is not None
# What each scheme is run with, a word of which in braces is a path of `material`.
ENCODER = (
    "--weights {base} --data {faces} --encoder-size 32 --encoder-units 1 1 1 "
    "--encoder-channels 16 16 16 --batch 8 --lpips-lambda 0 --id-lambda 0 --lr 1e-3"
)
ARGUMENTS = {
    "stylegan2": "--weights {base} --data {faces} --batch 8",
    "jojo": "--weights {base} --ref {photo} --no-align --inversion mean --mixes 8 "
    "--mask 11110000 --own-color auto",
    "psp": ENCODER,
    "e4e": ENCODER + " --w-pool 0",
    "mapper": "--weights {base} --clip {clip} --batch 8 --target sketch --id-lambda 0 "
    "--validate-count 2",
    "clip_heads": "--data {heads} --held-out 4 --size 16 --width 32 --batch 8 "
    "--vision-layers 1 --text-layers 1",
    "clip_gradients": "--data {drawn} --held-out 2 --batch 8 --mixes 10 --together 1",
    # A step that is seen: of two pictures that hardly differ the direction is rounding.
    "nada": "--weights {base} --clip {clip} --batch 8 --source photo --target sketch "
    "--lr 0.1 --lambda-global 1 --lambda-crop 1",
    "dual_pretrain": "--weights {dual}/base --encoder {dual}/encoder --data {faces} "
    "--batch 8 --judge-size 64 --perceptual-net alexnet",
    "dual_finetune": "--weights {dual}/stage1 --exemplars {dual}/codes --batch 8 "
    "--data {dual}/pictures --identity-net {dual}/identity --judge-size 64 "
    "--perceptual-net alexnet",
    "dual_sampler": "--weights {style} --batch 96",
    "warm_start": "--data {faces} --size 32 --w-dim 16 --channels 8 8 8 8 --batch 8 "
    "--mapping-depth 2",
}
# Schemes with a loop of their own, for every picture.
SEARCHES = {
    "destylize": "--weights {dual}/base --portrait-weights {dual}/portrait --batch 4 "
    "--encoder {dual}/encoder --data {dual}/pictures --identity-net {dual}/identity "
    "--judge-size 64",
    "refine_exstyle": "--weights {dual}/style --data {dual}/pictures --batch 4 "
    "--perceptual-net alexnet --judge-size 64",
}
# How far the first step's numbers may be apart, beside rounding: of a gradient's norm
# (penalties), and of what is near 0.
RELATIVE, PENALTY, ABSOLUTE = 1e-5, 1e-4, 1e-6
PENALTIES = ("r1", "path", "d_r1", "path_length", "path_mean")


def schemes():
    """Names of the files of train/ that hand steps to the loop."""
    folder = Path(train.__file__).parent
    calls = re.compile(r"\b(loop\.fit\(|import .*\bfit\b)")
    texts = {p.stem: p.read_text() for p in folder.glob("*.py")}
    return sorted(n for n, t in texts.items() if calls.search(t) and "run: Shared" in t)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Small networks, pictures and codes, by name."""
    folder = tmp_path_factory.mktemp("material")
    model, params = weights.load(save_base(folder / "plain"))
    # Without noise NADA's two generators draw the same at first: no direction.
    for name, layer in params["generator"]["synthesis"].items():
        if name.startswith(("conv", "up")):
            layer["noise_strength"] = np.float32(0.3)
    weights.save(folder / "base", dict(model), params)
    rng = np.random.default_rng(0)
    (folder / "faces").mkdir()
    for i in range(16):
        coarse = rng.uniform(-1, 1, (4, 4, 3)).astype(np.float32)
        picture = coarse.repeat(8, 0).repeat(8, 1)
        images.save_image(folder / "faces" / f"{i:02d}.png", picture)
    images.save_image(folder / "photo.png", picture)
    head = {"age": 0.8, "melanin": 0.1, "hair": [0.6] * 3, "hair_line": "round"}
    head |= {"hair_length": 0.0, "beard": 0.5, "targets": {}}
    rows = [json.dumps(head | {"male": i % 2}) for i in range(12)]
    for name, size in (("heads", 16), ("drawn", 64)):
        (folder / name).mkdir()
        for style in ("photo", "pencil"):
            heads = rng.integers(0, 256, (12, size, size, 3)).astype(np.uint8)
            np.save(folder / name / f"{style}.npy", heads)
        np.save(folder / name / "labels.npy", heads[..., 0] // 64)
        (folder / name / "heads.jsonl").write_text("\n".join(rows) + "\n")
    clip = SMALL.clone(vocab_size=49408)
    params = {"clip": clip.init_params(key=jax.random.key(3))}
    weights.save(folder / "clip", {"clip": clip}, params)
    exemplars = Exemplars(
        names=tuple("abcdef"), num_ws=8, z_dim=4, codes=("extrinsic", "refined")
    )
    codes = np.asarray(jax.random.normal(jax.random.key(0), (6, 8, 4)))
    tables = {"exemplars": {"extrinsic": codes, "refined": codes}}
    weights.save(folder / "style", {"exemplars": exemplars}, tables)
    dual = dual_models.save_all(folder / "dual")
    dual_models.save_exemplars(dual / "codes")
    flags = ["--weights", str(dual / "base"), "--out", str(dual / "stage1")]
    dual_pretrain.main([*flags, "--steps", "0"])
    parts = [weights.load(dual / name) for name in ("stage1", "codes")]
    networks, params = ({**a, **b} for a, b in zip(*parts, strict=True))
    weights.save(dual / "style", networks, params)
    names = ("base", "heads", "drawn", "faces", "clip", "style", "dual")
    return {n: folder / n for n in names} | {"photo": folder / "photo.png"}


def arguments(scheme, material, out, steps):
    """The command line of a short run."""
    flags = (ARGUMENTS | SEARCHES)[scheme].format(**material).split()
    shared = f"--out {out} --steps {steps} --log-every 1 --sample-every 0".split()
    return flags + shared + ["--save-every", "0"]


def assert_near(found, expected, relative):
    """Lines of metrics; numbers that are near 0 by how far they are from it."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        bound = PENALTY if name in PENALTIES else relative
        bound = max(bound, relative) * abs(value) + ABSOLUTE
        assert abs(found[name] - value) <= bound, (name, found[name], value)


def test_every_scheme_is_here():
    """A scheme that comes later has to say how it is run."""
    assert schemes() == sorted(ARGUMENTS)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", schemes())
def test_first_step_agrees_on_every_mesh(scheme, material, tmp_path, quick_compile):
    module = importlib.import_module(f"train.{scheme}")
    meshes = {
        "one": "--mesh-data 1",
        "data": "--mesh-data 8",
        "fsdp": "--mesh-data 4 --mesh-fsdp 2",
    }
    found = {}
    for name, flags in meshes.items():
        out = tmp_path / name
        module.main([*arguments(scheme, material, out, 1), *flags.split()])
        # The warm start has its run in a folder below.
        found[name] = lines(next(out.rglob("metrics.jsonl")).parent)[0]
    for name in ("data", "fsdp"):
        assert_near(found[name], found["one"], RELATIVE)


@pytest.mark.slow
@pytest.mark.skipif(not TPU, reason="needs libtpu: pip install 'jaxstyle[tpu]'")
@pytest.mark.parametrize("scheme", sorted(ARGUMENTS | SEARCHES))
def test_fits_compiles_every_scheme(scheme, material, tmp_path):
    command = [sys.executable, "-m", "train.fits", scheme, "--topology", "v5e:2x2"]
    flags = arguments(scheme, material, tmp_path / "run", 1)
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = re.findall(r"^step \d+ \(every.*", done.stdout, re.MULTILINE)
    assert steps and all("GiB a chip, fits" in step for step in steps)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["jojo", "stylegan2", "psp"])
def test_processes_do_what_one_does(scheme, material, tmp_path):
    found = {}
    for count in (1, 2, 4):
        out = tmp_path / str(count)
        flags = arguments(scheme, material, out, 5)
        outputs = many.finished(many.started(f"train.{scheme}", [flags] * count))
        found[count] = lines(out)
        assert "step 5/5" in outputs[0]
        # Files and words are process 0's.
        assert not any("step" in text for text in outputs[1:])
        assert any((out / "samples").iterdir()) and (out / "summary.json").exists()
    for count in (2, 4):
        assert_near(found[count][0], found[1][0], RELATIVE)
        assert_near(found[count][4], found[1][4], 1e-3)
    # Two processes begin, four go on, one ends.
    out = tmp_path / "parts"
    for count, steps in ((2, 2), (4, 4), (1, 5)):
        flags = arguments(scheme, material, out, steps)
        outputs = many.finished(many.started(f"train.{scheme}", [flags] * count))
    assert f"continuing {out} at step 4 of 5" in outputs[0]
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4, 5]
    assert_near(lines(out)[4], found[1][4], 1e-3)
    model, params = weights.load(out)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


MODELS = {
    "destylize": "",
    "clip_heads": "model",
    "clip_gradients": "model-1",
    "warm_start": "model",
    "nada": "styles",
}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", MODELS)
def test_processes_write_the_networks_that_one_writes(scheme, material, tmp_path):
    more = ["--target", "sketch", "paint"] if scheme == "nada" else []
    mesh = ["--mesh-style", "2"] if more else []
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        flags = [*arguments(scheme, material, out, 2), *more, *mesh]
        many.finished(many.started(f"train.{scheme}", [flags] * count, devices=2))
        folder = out / MODELS[scheme]
        folders = sorted(folder.iterdir()) if more else [folder]
        found.append([weights.load(f)[1] for f in folders])
    assert len(found[0]) == max(1, len(more) - 1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *found
    )


@pytest.mark.slow
def test_processes_that_differ_are_told(tmp_path):
    flags = ["--out", tmp_path / "run", "--steps", 3]
    outputs = many.finished(
        many.started("tests.train.toy", [flags, [*flags, "--lr", 0.2]]), code=1
    )
    for text in outputs:
        assert "process 1 on" in text and "differs from process 0" in text
        assert "--lr 0.2" in text and "Traceback" not in text


@pytest.mark.slow
def test_processes_need_a_folder_they_share(tmp_path):
    # Each has a home of its own, as hosts without common storage have.
    flags = ["--out", "~/run", "--steps", 3]
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    processes = many.started(
        "tests.train.toy", [flags] * 2, homes=[tmp_path / "0", tmp_path / "1"]
    )
    for text in many.finished(processes, code=1):
        assert "is not the folder that process 0 writes to" in text
