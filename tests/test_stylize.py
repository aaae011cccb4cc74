import json
import os

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from jaxstyle import images, pipeline, stylize, weights
from jaxstyle.encoders import BackboneWPlusEncoder
from jaxstyle.encoding import load_encoder
from jaxstyle.errors import UserError
from tests.small_models import save_base, save_tuned
from train import jojo


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Default outputs go to the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def base(folder):
    """A generator with an encoder that fits it."""
    model, params = weights.load(save_base(folder / "plain"))
    encoder = BackboneWPlusEncoder(
        num_styles=model.generator.num_ws,
        size=32,
        units=(1, 1),
        channels=(4, 4),
        se_ratio=2,
        w_dim=model.generator.w_dim,
        pool=2,
    )
    params["encoder"] = encoder.init_params(key=jax.random.key(7))
    weights.save(folder / "base", dict(model) | {"encoder": encoder}, params)
    return str(folder / "base")


@pytest.fixture(scope="module")
def art(base, folder):
    path = folder / "art"
    save_tuned(path, base, references=["drawings/art.jpg"])
    images.save_image(path / "references" / "art.png", picture(1).resize((16, 16)))
    return str(path)


@pytest.fixture(scope="module")
def oil(base, folder):
    return save_tuned(folder / "oil", base, seed=2)


def picture(seed, width=48, height=40):
    values = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photo(tmp_path):
    return images.save_image(tmp_path / "me.png", picture(0))


def run(*args):
    stylize.main([str(a) for a in (*args, "--no-align")])


def fails(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        stylize.main([str(a) for a in args])
    assert stop.value.code == 1
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    return error


@pytest.fixture(scope="module")
def style(art):
    return stylize.load_styles([art])[0]


@pytest.fixture(scope="module")
def code(style):
    shape = (style.generator.num_ws, style.generator.w_dim)
    return np.asarray(jax.random.normal(jax.random.key(3), shape))


def drawn(style, params, code, **options):
    variables = {"params": params}
    return style.generator.apply(variables, code[None], space="w_plus", **options)[0][0]


@pytest.mark.parametrize("noise", ["const", "none"])
def test_intensity_ends_are_the_generators(style, code, noise):
    for intensity, params in ((0, style.base), (1, style.params)):
        result = stylize.stylize(style, code, intensity=intensity, noise=noise)
        np.testing.assert_allclose(
            result, drawn(style, params, code, noise=noise), atol=1e-5
        )


def test_blend_at_its_ends(style, code):
    """The lockstep program itself gives the two generators, not only its shortcut."""
    layers = len(style.generator.layer_names)
    for intensity, params in ((0.0, style.base), (1.0, style.params)):
        share = np.full(layers, intensity, np.float32)
        result = stylize._blend(
            style.generator, style.base, style.params, code[None], share, None, "const"
        )
        np.testing.assert_allclose(result[0], drawn(style, params, code), atol=1e-5)


def test_half_intensity_is_no_cross_fade(style, code):
    half = stylize.stylize(style, code, intensity=0.5)
    ends = [drawn(style, p, code) for p in (style.base, style.params)]
    assert np.abs(half - (ends[0] + ends[1]) / 2).max() > 0.1


def test_layer_ranges(style, code):
    last = len(style.generator.layer_names) - 1
    whole = stylize.stylize(style, code, intensity=0.7)
    np.testing.assert_array_equal(
        whole, stylize.stylize(style, code, intensity=0.7, layers=f"0-{last}")
    )
    base = drawn(style, style.base, code)
    np.testing.assert_allclose(
        stylize.stylize(style, code, layers="none"), base, atol=1e-5
    )
    # Of the last to-RGB alone, the features stay the base's and one map changes.
    some = stylize.stylize(style, code, layers=str(last))
    out = style.generator.apply({"params": style.base}, code[None], space="w_plus")[1]
    assert 0 < np.abs(some - base).max()
    assert out["features"]["conv_16"].shape == (1, 16, 16, 8)
    with pytest.raises(UserError, match="--layers is '0-99'"):
        stylize.stylize(style, code, layers="0-99")
    with pytest.raises(UserError, match="--intensity is 1.5"):
        stylize.stylize(style, code, intensity=1.5)
    with pytest.raises(UserError, match="add the batch axis|w_plus"):
        stylize.stylize(style, code[0])


def test_random_noise_follows_the_seed(base, folder, code):
    model, params = weights.load(base)
    noisy = params["generator"]
    synthesis = dict(noisy["synthesis"])
    synthesis["conv_16"] = synthesis["conv_16"] | {"noise_strength": np.float32(1)}
    params["generator"] = noisy | {"synthesis": synthesis}
    path = folder / "noisy"
    weights.save(path, dict(model), params, metadata={"base": str(path)})
    style = stylize.load_styles([str(path)])[0]

    def draw(seed):
        return stylize.stylize(style, code, noise="random", seed=seed)

    np.testing.assert_array_equal(draw(1), draw(1))
    assert np.abs(draw(1) - draw(2)).max() > 0.1


def test_one_photo(base, art, photo, tmp_path, capsys):
    out = tmp_path / "out"
    run(photo, "--weights", art, "--out", out)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.endswith(f"; encoder: {base}")
    assert last == str(out / "me-art.png")
    assert images.open_image(out / "me-art.png").size == (16, 16)
    assert images.open_image(out / "me-face.png").size == (256, 256)
    codes = list(out.glob("me-*.npz"))
    assert len(codes) == 1
    assert np.load(codes[0])["w_plus"].shape == (1, 6, 16)
    first = (out / "me-art.png").read_bytes()

    # The second time the code is read, and the bytes are the same.
    run(photo, "--weights", art, "--out", out / "again.png")
    run(photo, "--weights", art, "--out", out)
    assert "earlier run" in capsys.readouterr().out
    assert (out / "me-art.png").read_bytes() == first
    assert (out / "again.png").read_bytes() == first
    assert list(out.glob("me-*.npz")) == codes

    # Another photo of the same name has another code.
    images.save_image(photo, picture(5))
    run(photo, "--weights", art, "--out", out)
    assert len(list(out.glob("me-*.npz"))) == 2
    assert (out / "me-art.png").read_bytes() != first


def test_codes_of_an_encoder_that_trains_on(base, style, tmp_path):
    first = load_encoder(base, style.generator)
    later = first._replace(params=jax.tree.map(lambda x: 1.1 * x, first.params))
    face = images.to_array(picture(0), 256)
    codes = [
        stylize.photo_code(
            face, style.generator, style.base, encoder=encoder, cache=tmp_path / "me"
        )
        for encoder in (first, later, first)
    ]
    np.testing.assert_array_equal(codes[0], codes[2])
    assert np.abs(codes[0] - codes[1]).max() > 1e-3
    assert len(list(tmp_path.glob("me-*.npz"))) == 2


def test_sheet_of_one_style(art, photo, tmp_path):
    run(photo, "--weights", art, "--out", tmp_path, "--grid", "--intensity", "0.5")
    sheet = images.open_image(tmp_path / "me-grid.png")
    # Photo, inversion, the kept reference and the result.
    assert sheet.width == 4 * 256 + 3 * 2
    assert (tmp_path / "me-art.png").exists()


def test_tuned_to_the_photo(base, art, oil, photo, tmp_path, capsys):
    """The inversion on the sheet and all results come from generators that moved."""
    plain, tuned = tmp_path / "plain", tmp_path / "tuned"
    options = (photo, "--weights", art, oil)
    run(*options, "--out", plain)
    run(*options, "--out", tuned, "--tune", "3", "--tune-lr", "0.02")
    names = ("me-art.png", "me-oil.png", "me-grid.png")
    pairs = [(plain / name, tuned / name) for name in names]
    one, two, sheet = (
        [np.asarray(images.open_image(path), np.float32) for path in pair]
        for pair in pairs
    )
    for before, after in (one, two):
        assert np.abs(before - after).mean() > 1
    face, inversion = slice(0, 256), slice(258, 514)
    before, after = sheet
    np.testing.assert_array_equal(before[:256, face], after[:256, face])
    assert np.abs(before[:, inversion] - after[:, inversion]).mean() > 1
    assert "--tune is -1" in fails(capsys, *options, "--tune", "-1", "--no-align")


def test_sheet_of_several_styles(art, oil, photo, tmp_path):
    out = tmp_path / "me_styles.jpg"
    run(photo, "--weights", art, oil, "--out", out)
    names = {p.name for p in tmp_path.glob("*.jpg")}
    assert names == {"me_styles.jpg", "me_styles-art.jpg", "me_styles-oil.jpg"}
    assert images.open_image(out).width == 4 * 256 + 3 * 2


def test_styles_of_one_run(base, folder, photo, tmp_path, capsys):
    model, params = weights.load(base)
    one = params["generator"]
    both = jax.tree.map(lambda x: np.stack([x, 1.01 * x]), one)
    path = folder / "both"
    weights.save(path, {"generator": model.generator}, {"generator": one})
    config = weights.config_dict(
        {"generator": model.generator}, {"base": base, "styles": ["ink", "wax"]}
    )
    (path / "config.json").write_text(json.dumps(config))
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path / "params", {"generator": both}, force=True)
    assert [s.name for s in stylize.load_styles([str(path)])] == ["ink", "wax"]
    run(photo, "--weights", path, "--style", "wax", "--out", tmp_path)
    assert (tmp_path / "me-wax.png").exists()
    assert not (tmp_path / "me-ink.png").exists()
    error = fails(capsys, photo, "--weights", path, "--style", "oil")
    assert "ink, wax" in error


def test_paste_back(art, photo, tmp_path):
    run(photo, "--weights", art, "--out", tmp_path / "whole.png", "--paste-back")
    whole = np.asarray(images.open_image(tmp_path / "whole.png"), int)
    before = np.asarray(images.open_image(photo), int)
    assert whole.shape == before.shape == (40, 48, 3)
    # --no-align takes the centred square; what is beside it stays as it was.
    np.testing.assert_array_equal(whole[:, :4], before[:, :4])
    np.testing.assert_array_equal(whole[:, -4:], before[:, -4:])
    assert np.abs(whole - before)[15:25, 20:28].max() > 20


def test_folder(art, tmp_path, capsys):
    photos = tmp_path / "photos"
    for name in ("a.png", "b.png", "b.jpg"):
        images.save_image(photos / name, picture(len(name)))
    (photos / "broken.png").write_bytes(b"nothing")
    (photos / "notes.txt").write_text("no picture")
    run(photos, "--weights", art, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert printed.count("skipped") == 1 and "skipped broken.png" in printed
    results = {p.name for p in (tmp_path / "out").glob("*-art.png")}
    assert results == {"a-art.png", "b-png-art.png", "b-jpg-art.png"}

    for path in photos.iterdir():
        path.write_bytes(b"")
    error = fails(capsys, photos, "--weights", art, "--out", tmp_path, "--no-align")
    assert "none of the 4 photos" in error


def test_newest_finished_run(art, oil, folder, photo, tmp_path, capsys):
    error = fails(capsys, photo)
    assert "no finished run" in error and "train.jojo" in error
    runs = tmp_path / "runs"
    runs.mkdir()
    for i, path in enumerate((art, oil)):
        (runs / f"run{i}").symlink_to(path)
        summary = runs / f"run{i}" / "summary.json"
        summary.write_text("{}")
        os.utime(summary, (1000 - i, 1000 - i))
    run(photo)
    printed = capsys.readouterr().out
    assert "weights: runs/run0 (the newest finished run), finetuned from" in printed
    assert (tmp_path / "stylized" / "me-run0.png").exists()


def test_unaligned_input(art, photo, capsys, tmp_path):
    """A picture in which no face is found."""
    error = fails(capsys, photo, "--weights", art, "--out", tmp_path)
    assert "no face found" in error and "--no-align" in error and "--eyes" in error


def test_missing_discriminator(art, photo, tmp_path, capsys):
    """A finetuned generator alone cannot learn a further style by its features."""
    with pytest.raises(UserError, match="hold no discriminator; they hold generator"):
        _ = weights.load(art)[0].discriminator
    with pytest.raises(SystemExit):
        jojo.main(["--ref", str(photo), "--weights", art, "--no-align"])
    error = capsys.readouterr().err
    assert "hold no discriminator" in error and "--perceptual lpips" in error


def test_weights_that_do_not_fit(base, art, folder, photo, capsys):
    assert "--base" in fails(capsys, photo, "--weights", base)
    # 256 px weights with another base, here at 8 and 16 px.
    small = save_base(folder / "small", size=8)
    error = fails(capsys, photo, "--weights", art, "--base", small)
    assert "8 px" in error and "16 px" in error
    error = fails(capsys, photo, "--weights", art, "--base", folder / "moved")
    assert "does not exist" in error and "--base" in error
    error = fails(capsys, photo, "--weights", art, "--encoder", small, "--no-align")
    assert "encoder" in error
    assert "no run" in fails(capsys, photo, "--weights", art, "--step", "5")


def test_options_that_cannot_be(art, photo, tmp_path, capsys):
    weighted = (photo, "--weights", art, "--no-align")
    assert "--intensity" in fails(capsys, *weighted, "--intensity", "2")
    assert "--layers" in fails(capsys, *weighted, "--layers", "hair")
    assert "suffix" in fails(capsys, *weighted, "--out", tmp_path / "me.doc")
    assert "photo itself" in fails(capsys, *weighted, "--out", photo)
    assert "no such picture" in fails(capsys, tmp_path / "x.jpg", "--weights", art)
    folder = (tmp_path, "--weights", art)
    assert "folder" in fails(capsys, *folder, "--out", tmp_path / "me.jpg")
    points = ("--eyes", "1,2", "3,2", "--mouth", "2,4")
    assert "one photo" in fails(capsys, *folder, *points)


@pytest.mark.parametrize(
    "flags, unused",
    [
        (
            ["--psi", "0.5", "--style-id", "1", "--refine", "9"],
            "--psi, --style-id, --re",
        ),
        (["--lr-color", "0.1", "--no-align-style"], "--lr-color, --no-align-style"),
        (["--tune-lr", "0.1"], "--tune-lr is 0.1"),
        (["--encoder", "base", "--steps", "5", "--pull", "2"], "--steps, --pull"),
        (["--encoder", "base", "--lpips", "vgg", "--mse", "2"], "--mse: of a search"),
        # The encoder that lies with the base.
        (["--mse", "2"], "search with --encoder optimize"),
    ],
)
def test_options_without_effect(art, photo, capsys, flags, unused):
    assert unused in fails(capsys, photo, "--weights", art, "--no-align", *flags)


@pytest.mark.parametrize("flag", ["--weights", "--style-id", "--edit"])
def test_a_photo_after_an_option_of_many_values(art, photo, capsys, flag):
    for given in (photo, photo.parent):
        for flags in ([], ["--overview"]):
            error = fails(capsys, *flags, "--weights", art, flag, given)
            assert f"{flag} took {given}" in error
            assert f"python -m jaxstyle.stylize {given}" in error
    # A folder of a network is none of photos, whatever lies in it.
    images.save_image(photo.parent / "run" / "sample.png", picture(1))
    (photo.parent / "run" / "config.json").write_text("{}")
    assert "no photo is given; name" in fails(capsys, "--weights", "run")


def test_optimisation(folder, photo, tmp_path):
    """LPIPS needs 32 px; the run of the steps is what is checked, not the result."""
    base = save_base(folder / "base32", size=32)
    art = save_tuned(folder / "art32", base)
    options = ("--encoder", "optimize", "--steps", "2")
    run(photo, "--weights", art, "--out", tmp_path, *options)
    assert images.open_image(tmp_path / "me-art32.png").size == (32, 32)
    codes = list(tmp_path.glob("me-*.npz"))
    assert len(codes) == 1
    generator, _ = pipeline.load_generator(base)
    assert pipeline.read_codes(codes[0], generator)[1] == "w_plus"
