import numpy as np
import pytest
from PIL import Image

from jaxstyle import blend, generate, images, interpolate, pipeline
from tests.small_models import save_base, save_tuned


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Default outputs go to the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("weights") / "base")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    return save_tuned(tmp_path_factory.mktemp("weights") / "tuned", base)


def run(*args):
    interpolate.main([str(a) for a in args])


def fails(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def pixels(path):
    return np.asarray(images.open_image(path))


def tiles(path, columns, size=16):
    sheet = pixels(path)
    return [sheet[-size:, i * (size + 2) :][:, :size] for i in range(columns)]


@pytest.mark.parametrize("space", ["w_plus", "z"])
def test_ends_are_the_seeds(base, tmp_path, space):
    out = tmp_path / "sheet.png"
    run(
        "--weights",
        base,
        "--from",
        3,
        "--to",
        8,
        "--n",
        5,
        "--out",
        out,
        "--space",
        space,
    )
    generator, params = pipeline.load_generator(base)
    expected = images.to_uint8(generate.generate(generator, params, [3, 8]))
    way = tiles(out, 5)
    # The way computes a code twice: a pixel may round to the other side.
    for found, wanted in ((way[0], expected[0]), (way[-1], expected[1])):
        assert np.abs(found.astype(int) - wanted).max() <= 1
    assert len({tile.tobytes() for tile in way}) == 5


def test_sweep_goes_from_base_to_tuned(base, tuned, tmp_path):
    out = tmp_path / "sweep.png"
    args = ("--weights", tuned, "--from", 3, "--intensity", "sweep", "--n", 3)
    run(*args, "--out", out)
    way = tiles(out, 3)
    for tile, name in ((way[0], base), (way[2], tuned)):
        generator, params = pipeline.load_generator(name)
        expected = images.to_uint8(generate.generate(generator, params, [3]))[0]
        assert np.abs(tile.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("suffix", [".webp", ".gif", ""])
def test_animations(base, tuned, tmp_path, suffix):
    out = tmp_path / f"way{suffix}"
    run("--weights", base, tuned, "--from", 1, "--to", 2, "--n", 4, "--out", out)
    if suffix:
        with Image.open(out) as animation:
            assert animation.n_frames == 4
            # Both generators side by side.
            assert animation.size == (34, 16)
    else:
        assert sorted(p.name for p in out.iterdir()) == [
            f"{i:04d}.png" for i in range(4)
        ]


def test_code_files(base, tmp_path, capsys):
    generator, params = pipeline.load_generator(base)
    z = pipeline.seed_codes([4, 5], generator.z_dim)
    pipeline.write_codes(tmp_path / "z.npz", z=z)
    w_plus = pipeline.to_w_plus(generator, params, z, "z")
    pipeline.write_codes(tmp_path / "w.npz", w_plus=w_plus[1:])
    ends = ("--from", tmp_path / "z.npz", "--to", tmp_path / "w.npz")
    out = ("--weights", base, "--n", 2, "--out")
    run(*ends, *out, tmp_path / "a.png")
    assert "taking the first" in capsys.readouterr().out
    run("--from", 4, "--to", 5, *out, tmp_path / "b.png")
    difference = pixels(tmp_path / "a.png").astype(int) - pixels(tmp_path / "b.png")
    assert np.abs(difference).max() <= 1
    assert "--space is z" in fails(capsys, *ends, *out, "c.png", "--space", "z")
    np.savez(tmp_path / "flat.npz", w_plus=w_plus[0])
    error = fails(capsys, "--from", tmp_path / "flat.npz", "--to", 1, *out, "c.png")
    assert "add the batch axis" in error


def test_wrong_options(base, tmp_path, capsys):
    given = ("--weights", base, "--from", 1)
    assert "--to" in fails(capsys, *given)
    assert "--n is 1" in fails(capsys, *given, "--to", 2, "--n", 1)
    assert "--base" in fails(capsys, *given, "--intensity", "sweep")
    assert "no such picture" in fails(capsys, *given, "--to", tmp_path / "me.jpg")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--out", "way.mp4"], "an animation (.webp, .gif)"),
        (["--out", "way.gif", "--fps", 99], "--fps is 99"),
        (["--fps", 0], "--fps is 0"),
        (["--intensity", 3], "--intensity is 3"),
        (["--layers", "hair"], "--layers is 'hair'"),
    ],
)
def test_mistakes_are_told_before_work(base, tmp_path, capsys, flags, message):
    """The photo is not even looked for."""
    ends = ("--from", tmp_path / "none.jpg", "--to", 2)
    assert message in fails(capsys, "--weights", base, *ends, *flags)


def test_morph_goes_from_weights_to_weights(base, tuned, tmp_path, capsys):
    out = tmp_path / "morph.png"
    run("--weights", base, tuned, "--from", 3, "--morph", "--n", 3, "--out", out)
    way = tiles(out, 3)
    half = tmp_path / "half"
    blend.main([base, tuned, "--share", "0.5", "--out", str(half)])
    for tile, name in zip(way, (base, half, tuned), strict=True):
        generator, params = pipeline.load_generator(name)
        expected = images.to_uint8(generate.generate(generator, params, [3]))[0]
        assert np.abs(tile.astype(int) - expected).max() <= 1
    error = fails(capsys, "--weights", base, "--from", 3, "--morph")
    assert "two or more --weights" in error
    error = fails(capsys, "--weights", base, tuned, "--from", 3, "--style-id", 1, 2)
    assert "no DualStyleGAN style" in error


def test_several_models_make_a_video_grid(base, tuned, tmp_path):
    out = tmp_path / "video.webp"
    names = (base, tuned, tuned, base)
    run("--weights", *names, "--from", 3, "--to", 8, "--n", 2, "--out", out)
    with Image.open(out) as video:
        assert (video.n_frames, video.size) == (2, (34, 34))


def test_an_edit_is_an_end(base, tmp_path):
    np.savez(tmp_path / "age.npz", direction=np.ones((1, 16), np.float32))
    args = ("--weights", base, "--from", 3, "--n", 2, "--directions", tmp_path)
    run(*args, "--edit", "age:+2", "--out", tmp_path / "older.png")
    generator, params = pipeline.load_generator(base)
    z = pipeline.seed_codes([3], generator.z_dim)
    codes = pipeline.to_w_plus(generator, params, z, "z")
    both = np.concatenate([codes, codes + 2])
    expected = images.to_uint8(pipeline.pictures(generator, params, both))
    for tile, picture in zip(tiles(tmp_path / "older.png", 2), expected, strict=True):
        assert np.abs(tile.astype(int) - picture).max() <= 1
