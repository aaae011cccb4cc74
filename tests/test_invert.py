"""Inversion by optimisation and by an encoder, and its command."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxstyle import images, inputs, invert, pipeline, weights
from jaxstyle.encoders import encode
from jaxstyle.errors import UserError
from jaxstyle.features.lpips import LPIPS
from jaxstyle.invert import Search
from jaxstyle.stylegan2 import Generator
from tests.small_models import save_base, save_encoder
from train import sharding

GENERATOR = Generator(32, channels=(16, 16, 16, 8), mapping_depth=2, z_dim=8, w_dim=8)
JUDGE = LPIPS()


@pytest.fixture(scope="module")
def setting():
    """A random generator, LPIPS, and three of the generator's pictures."""
    params = GENERATOR.init_params(key=jax.random.key(0))
    z = jax.random.normal(jax.random.key(1), (3, 8))
    apply = jax.jit(lambda p, z: GENERATOR.apply({"params": p}, z))
    targets, out = apply(params, z)
    params["w_avg"] = out["w"].mean(0)
    _, judge_params = weights.load("lpips_alexnet")
    return params, judge_params["lpips"], targets


def search_for(setting, targets, space, steps, **options):
    params, judge_params, _ = setting
    return invert.optimize(
        GENERATOR,
        params,
        JUDGE,
        judge_params,
        targets,
        Search(space=space, steps=steps),
        key=jax.random.key(2),
        progress=False,
        **options,
    )


@pytest.mark.parametrize(
    "space", [*(pytest.param(s, marks=pytest.mark.slow) for s in ("w_plus", "z")), "w"]
)
def test_search_comes_near_to_the_pictures(setting, space):
    params, judge_params, targets = setting

    @jax.jit
    def distance(images):
        return JUDGE.apply({"params": judge_params}, images, targets)

    average = GENERATOR.apply({"params": params}, params["w_avg"][None], space="w")[0]
    before = distance(jnp.broadcast_to(average, targets.shape))
    found = search_for(setting, targets, space, 60)
    assert found["w_plus"].shape == (3, 10 - 2, 8)
    assert found["loss"].shape == (3,)
    after = distance(found["images"])
    assert (after < 0.7 * before).all() if space != "z" else after.sum() < before.sum()
    again = GENERATOR.apply({"params": params}, found["w_plus"], space="w_plus")[0]
    np.testing.assert_allclose(again, found["images"], atol=1e-4)
    if space != "w_plus":
        assert found[space].shape == (3, 8)
        assert (found["w_plus"] == found["w"][:, None]).all()


@pytest.mark.slow
def test_each_picture_is_searched_alone(setting):
    targets = setting[2]
    together = search_for(setting, targets, "w_plus", 12)["w_plus"]
    alone = search_for(setting, targets[1:2], "w_plus", 12)["w_plus"]
    np.testing.assert_allclose(alone[0], together[1], atol=2e-3)
    # The same command again gives the same bits.
    again = search_for(setting, targets[1:2], "w_plus", 12)["w_plus"]
    assert (alone == again).all()


@pytest.mark.slow
def test_beginnings_are_split_as_their_pictures(setting):
    params, _, targets = setting
    start = params["w_avg"] + 0.1 * jax.random.normal(jax.random.key(5), (2, 8, 8))
    here = search_for(setting, targets[:2], "w_plus", 6, start=start)["w_plus"]
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    spread = jax.device_put(targets[:2], sharding.batch_sharding(mesh, 1))
    with jax.set_mesh(mesh):
        there = search_for(setting, spread, "w_plus", 6, start=start)["w_plus"]
    assert len(there.sharding.device_set) == 2
    assert not there.sharding.is_fully_replicated
    np.testing.assert_allclose(there, here, atol=2e-3)


def test_rows_stay_together_for_the_first_third(setting):
    path = search_for(setting, setting[2][:1], "w_plus", 12, snapshots=12)["path"]
    spread = np.ptp(np.asarray(path)[:, 0], axis=1).max(-1)
    assert len(path) == 13
    assert (spread[:5] == 0).all() and (spread[6:] > 0).all()


@pytest.mark.slow
def test_pull_brings_codes_to_the_average(setting):
    params, judge_params, targets = setting
    far = []
    for pull in (0.0, 100.0):
        found = invert.optimize(
            GENERATOR,
            params,
            JUDGE,
            judge_params,
            targets[:1],
            Search(space="w", steps=30, pull=pull),
            key=jax.random.key(2),
            progress=False,
        )
        far.append(float(jnp.abs(found["w"] - params["w_avg"]).max()))
    assert far[1] < 0.1 * far[0]


def test_pictures_for_lpips():
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 3))
    large = invert.for_lpips(x)
    assert large.shape == (1, 128, 128, 3)
    np.testing.assert_array_equal(large[:, ::8, 7::8], x)
    np.testing.assert_array_equal(invert.for_lpips(large), large)
    x = jnp.ones((1, 1024, 1024, 3)) * jnp.arange(1024.0)[:, None, None]
    np.testing.assert_allclose(invert.for_lpips(x)[0, :, 0, 0][:2], [1.5, 5.5])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three pictures that need no alignment."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 40, 3), np.uint8)
    for name, array in zip("abc", pixels, strict=True):
        Image.fromarray(array).save(folder / f"{name}.png")
    return folder


@pytest.mark.slow
def test_command_optimizes(tmp_path, photos, capsys):
    base = save_base(tmp_path / "base", size=32)
    out = tmp_path / "found"
    common = ["--weights", base, "--no-align", "--steps", "3"]
    invert.main(
        [
            str(photos),
            *common,
            "--out",
            str(out),
            "--limit",
            "2",
            "--side-by-side",
            "--video",
            "--space",
            "w",
        ]
    )
    assert sorted(p.name for p in out.iterdir()) == [
        "a-inverted.png",
        "a-search.webp",
        "b-inverted.png",
        "b-search.webp",
        "codes.npz",
    ]
    with np.load(out / "codes.npz") as file:
        assert file["w_plus"].shape == (2, 8, 16) and file["w"].shape == (2, 16)
        assert list(file["names"]) == ["a", "b"]
    assert "a: (8, 16) code, loss" in capsys.readouterr().out
    generator, _ = pipeline.load_generator(base)
    assert pipeline.read_codes(out / "codes.npz", generator)[1] == "w_plus"
    single = tmp_path / "deep" / "me.npz"
    invert.main([str(photos / "c.png"), *common, "--out", str(single), "--codes-only"])
    assert [p.name for p in single.parent.iterdir()] == ["me.npz"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, photos):
    """A 16 px generator, encoders by what they read, and their inputs."""
    root = tmp_path_factory.mktemp("encoders")
    pixels = np.random.default_rng(1).integers(0, 255, (2, 48, 48), np.uint8)
    for name in ("sketch", "labels", "index"):
        (root / name).mkdir()
    for name, array in zip("ab", pixels, strict=True):
        Image.fromarray(array).save(root / "sketch" / f"{name}.png")
        classes = Image.fromarray(array % 5)
        classes.save(root / "index" / f"{name}.png")
        palette = Image.frombytes("P", classes.size, classes.tobytes())
        palette.putpalette(np.arange(15) * 16)
        palette.save(root / "labels" / f"{name}.png")
    paths = {name: str(root / name) for name in ("sketch", "labels", "index")}
    return paths | {
        "photos": str(photos),
        "base": save_base(root / "base"),
        "photo encoder": save_encoder(root / "enc"),
        "sketch encoder": save_encoder(root / "enc-sketch", 1),
        "labels encoder": save_encoder(root / "enc-labels", 5),
        "restyle encoder": save_encoder(root / "enc-restyle", 6),
        "cars encoder": save_encoder(root / "enc-cars", rows=(4, 28)),
    }


def run(folders, photo, encoder, out, *options):
    """The command; returns the codes of out/codes.npz."""
    arguments = [folders.get(photo, photo), "--weights", folders["base"]]
    arguments += ["--encoder", folders[f"{encoder} encoder"], "--out", str(out)]
    invert.main([*arguments, "--no-align", *options])
    with np.load(out / "codes.npz") as file:
        return dict(file)


def test_command_encodes(tmp_path, folders):
    found = run(folders, "photos", "photo", tmp_path, "--batch", "2")
    assert found["w_plus"].shape == (3, 6, 16)
    assert (tmp_path / "c-inverted.png").exists()
    # An encoder's folder that holds the generator too needs no --weights.
    networks = [weights.load(folders[k]) for k in ("photo encoder", "base")]
    both = {k: v for module, _ in networks for k, v in module.items()}
    values = {k: v for _, params in networks for k, v in params.items()}
    weights.save(tmp_path / "both", both, values)
    options = ["--encoder", str(tmp_path / "both"), "--out", str(tmp_path / "same.npz")]
    invert.main([folders["photos"], *options, "--no-align", "--codes-only"])
    with np.load(tmp_path / "same.npz") as file:
        np.testing.assert_allclose(file["w_plus"], found["w_plus"], atol=1e-5)
    single = Path(folders["photos"], "c.png")
    alone = run(folders, str(single), "photo", tmp_path / "one")
    np.testing.assert_allclose(alone["w_plus"][0], found["w_plus"][2], atol=1e-5)


def test_a_model_recommends_a_pull_for_photos(tmp_path, folders):
    model, params = weights.load(folders["base"])
    advice = {"invert": {"pull": 7.0}}
    weights.save(tmp_path / "wise", model, params, metadata=advice)
    wise, plain = str(tmp_path / "wise"), folders["base"]
    assert invert.for_photos(Search(), wise).pull == 7
    assert invert.for_photos(Search(pull=0.5), wise).pull == 0.5
    assert invert.for_photos(Search(space="w"), wise).pull is None
    assert invert.for_photos(Search(), plain) == Search()
    args = [folders["photos"], "--no-align", "--steps", "6", "--codes-only"]
    spread = []
    for name, base, more in (
        ("a", plain, []),
        ("b", wise, []),
        ("c", wise, ["--pull", "0.5"]),
        ("d", plain, ["--pull", "7"]),
    ):
        out = str(tmp_path / f"{name}.npz")
        invert.main([*args, "--weights", base, "--out", out, *more])
        with np.load(out) as file:
            spread.append(file["w_plus"])
    np.testing.assert_array_equal(spread[0], spread[2])
    np.testing.assert_array_equal(spread[1], spread[3])
    assert spread[1].std(1).mean() < spread[0].std(1).mean()


def test_a_search_that_begins_with_the_encoders_code(tmp_path, folders):
    start = run(folders, "photos", "photo", tmp_path / "start")
    near = ["--refine", "1", "--search-lr", "1e-6"]
    same = run(folders, "photos", "photo", tmp_path / "same", *near)
    np.testing.assert_allclose(same["w_plus"], start["w_plus"], atol=1e-4)
    found = run(folders, "photos", "photo", tmp_path / "found", "--refine", "12")
    moved = np.abs(found["w_plus"] - start["w_plus"])
    assert moved.max(2).min() > 1e-3, "a row stood still"
    files = images.image_files(Path(folders["photos"]))
    targets = [images.to_array(images.open_image(p), 16) for p in files]

    def error(codes):
        generator, params = pipeline.load_generator(folders["base"])
        drawn = pipeline.pictures(generator, params, codes)
        return np.square(drawn - np.stack(targets)).mean((1, 2, 3))

    assert np.all(error(found["w_plus"]) < error(start["w_plus"]))
    # The pull is to that code, not to the average one.
    pulled = ["--refine", "12", "--pull", "1e4"]
    near = run(folders, "photos", "photo", tmp_path / "near", *pulled)
    assert np.abs(near["w_plus"] - start["w_plus"]).max() < 0.1 * moved.max()


def test_command_mixes_and_edits(tmp_path, folders):
    np.savez(tmp_path / "age.npz", direction=np.ones((1, 16), np.float32))
    options = ["--mix-rows", "fine", "--mix-alpha", "0.5", "--seeds", "3,5"]
    options += ["--edit", "age:+3", "--directions", str(tmp_path), "--side-by-side"]
    out = tmp_path / "out"
    codes = run(folders, "photos", "photo", out, *options)["w_plus"]
    labels = ["seed0003-age+3", "seed0005-age+3"]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [f"{n}-{label}.png" for n in "abc" for label in (*labels, "inverted")]
        + ["codes.npz", *(f"codes-{label}.npz" for label in labels)]
    )
    generator, params = pipeline.load_generator(folders["base"])
    z = pipeline.seed_codes([3, 5], generator.z_dim)
    random = pipeline.to_w_plus(generator, params, z, "z")
    for label, other in zip(labels, random, strict=True):
        with np.load(out / f"codes-{label}.npz") as file:
            changed = file["w_plus"]
            assert list(file["names"]) == ["a", "b", "c"]
        np.testing.assert_allclose(changed[:, :3], codes[:, :3] + 3, atol=1e-5)
        half = (codes[:, 3:] + other[3:]) / 2 + 3
        np.testing.assert_allclose(changed[:, 3:], half, atol=1e-5)
        picture = pipeline.pictures(generator, params, changed[:1])[0]
        written = np.asarray(images.open_image(out / f"a-{label}.png"))
        np.testing.assert_allclose(written, images.to_uint8(picture), atol=1)
    # Photo, inversion, two outputs.
    assert images.open_image(out / "a-inverted.png").width == 4 * 16 + 3 * 2


def test_command_makes_photos_smaller(tmp_path, folders):
    options = ["--factors", "2", "8", "--side-by-side", "--limit", "1"]
    found = run(folders, "photos", "photo", tmp_path, *options)
    assert list(found["names"]) == ["a-x2", "a-x8"]
    module, params = weights.load(folders["photo encoder"])
    crop = images.open_image(Path(folders["photos"], "a.png"))
    crop = crop.resize((256, 256), Image.Resampling.LANCZOS)
    x = np.stack([inputs.low_resolution(crop, 32, f) for f in (2, 8)])
    wanted = encode(module["encoder"], params["encoder"], x)
    np.testing.assert_allclose(found["w_plus"], wanted, atol=1e-4)
    assert images.open_image(tmp_path / "a-x8-inverted.png").width == 3 * 16 + 2 * 2


def test_command_takes_wide_pictures_whole(tmp_path, folders):
    """An encoder of cars sees the picture in the middle of a square, and gives that."""
    Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).save(tmp_path / "car.png")
    wide = str(tmp_path / "car.png")
    found = run(folders, wide, "cars", tmp_path, "--target", wide)
    assert images.open_image(tmp_path / "car-inverted.png").size == (16, 12)
    module, params = weights.load(folders["cars encoder"])
    x = np.full((1, 32, 32, 3), -1.0, np.float32)
    inside = images.open_image(wide).resize((32, 24), Image.Resampling.BILINEAR)
    x[0, 4:28] = inputs.values(inside)
    wanted = encode(module["encoder"], params["encoder"], x)
    np.testing.assert_allclose(found["w_plus"], wanted, atol=1e-4)
    assert json.loads((tmp_path / "metrics.json").read_text())


def test_command_reads_drawings_and_label_maps(tmp_path, folders, capsys):
    sketch = run(folders, "sketch", "sketch", tmp_path / "s", "--side-by-side")
    drawing = images.open_image(Path(folders["sketch"], "b.png"))
    module, params = weights.load(folders["sketch encoder"])
    x = inputs.drawing(drawing, 32)[None]
    wanted = encode(module["encoder"], params["encoder"], x)
    np.testing.assert_allclose(sketch["w_plus"][1:], wanted, atol=1e-4)
    palette = run(folders, "labels", "labels", tmp_path / "p", "--nearest-labels")
    index = run(folders, "index", "labels", tmp_path / "i", "--nearest-labels")
    np.testing.assert_array_equal(palette["w_plus"], index["w_plus"])
    mixed = run(folders, "index", "labels", tmp_path / "m")
    assert np.abs(mixed["w_plus"] - index["w_plus"]).max() > 1e-4
    Image.fromarray(np.full((9, 9), 5, np.uint8)).save(tmp_path / "i" / "x.png")
    with pytest.raises(SystemExit):
        run(folders, str(tmp_path / "i" / "x.png"), "labels", tmp_path / "n")
    assert (
        "x.png: a label map holds the class 5; there are 5" in capsys.readouterr().err
    )


def test_command_refines(tmp_path, folders):
    once = run(folders, "photos", "restyle", tmp_path / "1", "--restyle", "1")
    twice = run(folders, "photos", "restyle", tmp_path / "2", "--restyle", "2")
    assert np.abs(once["w_plus"] - twice["w_plus"]).max() > 1e-4


def test_command_measures(tmp_path, folders, capsys):
    # Outputs as targets: the same but for 8 bits; one that cannot be read is named.
    out = tmp_path / "out"
    run(folders, "photos", "photo", out)
    wanted = tmp_path / "wanted"
    wanted.mkdir()
    for name in "abc":
        (out / f"{name}-inverted.png").rename(wanted / f"{name}.png")
    (wanted / "c.png").write_bytes(b"nothing")
    options = ["--target", str(wanted), "--mix-rows", "coarse", "--batch", "2"]
    run(folders, "photos", "photo", out, *options)
    printed = capsys.readouterr().out
    assert "left out of the metrics:" in printed and "over 2 targets" in printed
    measured = json.loads((out / "metrics.json").read_text())
    assert list(measured["pictures"]["inversion"]) == ["a", "b"]
    means = {k: v["mean"] for k, v in measured["summary"]["inversion"].items()}
    assert means["mse"] < 1e-3 and means["lpips"] < 0.03 and means["identity"] > 0.99
    assert measured["summary"]["seed0000"]["mse"]["mean"] > means["mse"]
    (wanted / "b.png").unlink()
    with pytest.raises(SystemExit):
        run(folders, "photos", "photo", out, "--target", str(wanted))
    assert "no picture for 1 of the 3 given, the first b.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--steps", "0"], "--steps is 0"),
        (["--limit", "0"], "--limit is 0"),
        (["--encoder", "here/e4e", "--video"], "leave out --encoder"),
        (["--encoder", "here/e4e", "--space", "w"], "options of the search"),
        (["--factors", "4"], "--factors, --restyle and --nearest-labels are for"),
        (["--seeds", "0-4"], "--mix-rows, for example fine"),
        (["--mix-rows", "fine", "--mix-alpha", "2"], "--mix-alpha is 2.0"),
        (["--mix-rows", "8-17"], "--mix-rows is '8-17'; codes of this generator"),
        (["--mix-rows", "fine", "--seeds", "x"], "--seeds is 'x'"),
        (["--edit", "age:+3"], "no age.npz in --directions directions"),
        (["--codes-only", "--side-by-side"], "leave out --side-by-side"),
        (["--identity-net", "weights/arcface"], "judge against --target"),
        (["--target", "no/folder"], "no/folder: no such picture or folder"),
        (["--out", "me.png"], "--out is me.png; it must be a folder"),
        (["--eyes", "1,1", "2,2", "--mouth", "1,2"], "are for one photo"),
        (["--encoder", "base"], "hold no encoder; they hold generator"),
        (["--encoder", "photo", "--restyle", "3"], "is none of ReStyle's"),
        (["--encoder", "photo", "--factors", "17"], "from 1 to 16, half"),
        (["--encoder", "photo", "--factors", "4", "4"], "one is given twice"),
        (["--encoder", "photo", "--nearest-labels"], "is for label maps"),
        (["--encoder", "sketch", "--factors", "4"], "makes photos smaller"),
        (["--encoder", "sketch", "--landmarks", "dlib"], "taken as they are"),
        (["--encoder", "cars", "--landmarks", "dlib"], "takes whole pictures"),
    ],
)
def test_refuses_in_one_line(folders, capsys, options, message):
    short = {"base": folders["base"]}
    short |= {k: folders[f"{k} encoder"] for k in ("photo", "sketch", "cars")}
    options = [short.get(o, o) for o in options]
    base = ["--weights", folders["base"]]
    with pytest.raises(SystemExit):
        invert.main([folders["photos"], *base, "--no-align", *options])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_refuses_pictures_of_another_size(setting):
    with pytest.raises(UserError, match=r"\[n, 32, 32, 3\]"):
        search_for(setting, jnp.zeros((1, 64, 64, 3)), "w", 3)


def test_other_encoders_and_generators_are_refused(tmp_path, folders):
    generator, params = pipeline.load_generator(folders["base"])
    photo = jnp.zeros((1, 32, 32, 3))
    with pytest.raises(UserError, match="reads sketch, 1 channels, not.* of 3"):
        invert.invert(
            generator,
            params,
            photo,
            encoder=folders["sketch encoder"],
            key=jax.random.key(0),
        )
    with pytest.raises(UserError, match="gives 6 codes of 16; the 32 px generator"):
        invert.load_encoder(folders["photo encoder"], GENERATOR)
