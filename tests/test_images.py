"""Pictures in and out: every kind of file a user may have, and the bad ones."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxstyle import images, pipeline
from jaxstyle.errors import UserError, cli, one_line


def gradient(height=12, width=16):
    """A uint8 picture whose four corners differ, with values spread over 0..255."""
    y, x = np.mgrid[:height, :width]
    return np.stack(
        [255 * x // (width - 1), 255 * y // (height - 1), (x + y) % 256], -1
    ).astype(np.uint8)


def test_png_round_trip_is_exact(tmp_path):
    array = images.to_array(Image.fromarray(gradient()))
    assert array.dtype == np.float32 and array.min() >= -1 and array.max() <= 1
    path = images.save_image(tmp_path / "deep" / "a", array)
    assert path.name == "a.png"
    np.testing.assert_array_equal(np.asarray(images.open_image(path)), gradient())
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_exif_rotation_is_applied(tmp_path):
    picture = Image.fromarray(gradient())
    for orientation, undo in ((6, Image.Transpose.ROTATE_90), (3, None)):
        stored = picture.transpose(undo or Image.Transpose.ROTATE_180)
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / "a.png", exif=exif)
        read = images.open_image(tmp_path / "a.png")
        assert read.size == picture.size
        np.testing.assert_array_equal(np.asarray(read), gradient())


def test_grey_palette_and_bilevel(tmp_path):
    for mode in ("L", "P", "1"):
        Image.fromarray(gradient()).convert(mode).save(tmp_path / "a.png")
        read = images.open_image(tmp_path / "a.png")
        expected = Image.open(tmp_path / "a.png").convert("RGB")
        assert read.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(read), np.asarray(expected))


def test_transparent_parts_become_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:, 2:, 3] = 255
    rgba[:, 1:2, 3] = 128
    Image.fromarray(rgba).save(tmp_path / "a.png")
    read = np.asarray(images.open_image(tmp_path / "a.png"))
    np.testing.assert_array_equal(read[0, :, 0], [255, 127, 0, 0])
    grey_alpha = Image.fromarray(rgba).convert("LA")
    grey_alpha.save(tmp_path / "b.png")
    read = np.asarray(images.open_image(tmp_path / "b.png"))
    np.testing.assert_array_equal(read[0, :, 0], [255, 127, 0, 0])
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "c.png", transparency=0)
    read = np.asarray(images.open_image(tmp_path / "c.png"))
    np.testing.assert_array_equal(read[0], [[255, 255, 255], [255, 0, 0]])


def test_16_bit_grey(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        read = np.asarray(images.open_image(tmp_path / name))
        np.testing.assert_array_equal(read[0, :, 0], [0, 1, 128, 255])
        assert read.shape == (1, 4, 3)


def test_cmyk(tmp_path):
    for name in ("a.jpg", "a.tif"):
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / name)
        red = np.asarray(images.open_image(tmp_path / name)).astype(int)
        assert np.abs(red - [255, 0, 0]).max() < 8


def test_first_frame_of_an_animation(tmp_path):
    frames = np.stack([gradient(), 255 - gradient()]) / 127.5 - 1
    path = images.save_animation(tmp_path / "a.gif", frames)
    read = np.asarray(images.open_image(path)).astype(int)
    assert np.abs(read - gradient()).mean() < 20


def png_header(width, height):
    """A PNG that only claims a size."""

    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        images.open_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files_are_refused_in_one_line(tmp_path):
    good = tmp_path / "good.png"
    images.save_image(good, gradient(64, 64))
    jpeg = images.save_image(tmp_path / "good.jpg", gradient(64, 64))
    for source in (good, jpeg):
        data = source.read_bytes()
        for quarter in (1, 2, 3):
            cut = tmp_path / f"cut{source.suffix}"
            cut.write_bytes(data[: len(data) * quarter // 4])
            refused(cut, "damaged or")
    bad = tmp_path / "bad.png"
    for width, height in ((100_000, 100_000), (12_000, 10_000)):
        bad.write_bytes(png_header(width, height))
        refused(bad, "million")
    bad.write_bytes(b"")
    refused(bad, "empty")
    bad.write_bytes(b"not a picture\n" * 100)
    refused(bad, "not a picture")
    bad.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    refused(bad, "not a picture")
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tif")
    refused(tmp_path / "float.tif", "32-bit")
    refused(tmp_path, "folder")
    refused(tmp_path / "missing.png", "no such")


def test_uint8_rounding():
    array = np.array([-2, -1, 0, 0.5, 1, 3, np.nan], np.float32)
    np.testing.assert_array_equal(images.to_uint8(array), [0, 0, 128, 191, 255, 255, 0])
    every = np.arange(256, dtype=np.uint8)
    floats = every.astype(np.float32) / np.float32(127.5) - 1
    np.testing.assert_array_equal(images.to_uint8(floats), every)
    with pytest.raises(ValueError, match="one picture of a batch"):
        images.to_pil(np.zeros((1, 4, 4, 3)))


def test_to_array_crops_to_a_square_and_resizes():
    wide = Image.new("RGB", (40, 20), "white")
    wide.paste("black", (0, 0, 10, 20))
    array = images.to_array(wide, 10)
    np.testing.assert_array_equal(array, np.ones((10, 10, 3), np.float32))


@pytest.mark.parametrize("size", [16, 40, 96])
def test_arrays_shrink_as_files_that_are_read(size):
    # PIL rounds to whole grey values, twice, and cuts twice what overshoots.
    values = np.random.default_rng(0).integers(70, 185, (10, 10, 3), np.uint8)
    image = Image.fromarray(values).resize((64, 64), Image.Resampling.NEAREST)
    found = pipeline.as_read(images.to_array(image)[None], size)[0]
    np.testing.assert_allclose(found, images.to_array(image, size), atol=2.5 / 127.5)


def test_folder_in_natural_order(tmp_path):
    for name in ("10.png", "2.png", "a1.jpg", "1.PNG", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    names = [path.name for path in images.image_files(tmp_path)]
    assert names == ["1.PNG", "2.png", "10.png", "a1.jpg"]
    assert images.image_files(tmp_path / "2.png") == [tmp_path / "2.png"]
    with pytest.raises(UserError, match="holds no pictures"):
        images.image_files(tmp_path / "folder.png")
    with pytest.raises(UserError, match="no such"):
        images.image_files(tmp_path / "missing")


def test_save_refuses_unknown_suffixes_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="unknown picture suffix '.xyz'"):
        images.save_image(tmp_path / "a.xyz", gradient())
    with pytest.raises(UserError, match="cannot save an animation"):
        images.save_animation(tmp_path / "a.png", [gradient()])
    with pytest.raises(UserError, match="fps"):
        images.save_animation(tmp_path / "a.gif", [gradient()], fps=0)
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError):
        images.save_image(tmp_path / "taken.png", gradient())
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


def test_animations(tmp_path):
    frames = np.stack([gradient(), 255 - gradient(), gradient()[::-1]])
    for suffix in ("webp", "gif"):
        path = images.save_animation(tmp_path / f"a.{suffix}", frames, fps=10)
        with Image.open(path) as animation:
            assert animation.n_frames == 3
            animation.load()
            assert animation.info["duration"] == 100
            assert animation.info["loop"] == 0
    folder = images.save_animation(tmp_path / "frames", frames)
    assert [path.name for path in images.image_files(folder)] == [
        "0000.png",
        "0001.png",
        "0002.png",
    ]


def test_grid_places_every_picture():
    tiles = np.stack([np.full((8, 8, 3), v, np.float32) for v in (-1, 0, 0.5)])
    sheet = np.asarray(images.grid(tiles, 2, gap=2))
    assert sheet.shape == (18, 18, 3)
    assert (sheet[:8, :8] == 0).all() and (sheet[:8, 10:] == 128).all()
    assert (sheet[10:, :8] == 191).all() and (sheet[10:, 10:] == 255).all()
    assert images.grid(tiles[:1]).size == (8, 8)


def test_grid_texts_and_mixed_sizes():
    pictures = [np.zeros((64, 64, 3)), Image.new("RGB", (32, 32)), gradient(64, 96)]
    plain = images.grid(pictures, 3)
    labelled = images.grid(
        pictures,
        3,
        captions=["photo", "a very long caption that cannot fit", ""],
        column_labels=["one", "two"],
        row_labels=["row"],
    )
    assert labelled.width > plain.width and labelled.height > plain.height
    assert plain.size == (3 * 96 + 2 * 2, 64)


def test_cli_reports_user_errors_in_one_line(tmp_path):
    code = (
        "import sys\n"
        "from jaxstyle.errors import UserError, cli\n"
        "@cli\n"
        "def main(kind):\n"
        "    if kind == 'user': raise UserError('size is 7;\\nuse 8')\n"
        "    if kind == 'file': open('missing/file')\n"
        "    if kind == 'stop': raise KeyboardInterrupt\n"
        "    if kind == 'bug': raise ValueError('ours')\n"
        "    return kind\n"
        "main(sys.argv[1])\n"
    )

    def run(kind):
        return subprocess.run(
            [sys.executable, "-c", code, kind], capture_output=True, text=True
        )

    user = run("user")
    assert (user.returncode, user.stderr) == (1, "error: size is 7; use 8\n")
    missing = run("file")
    assert missing.returncode == 1
    assert missing.stderr == "error: missing/file: No such file or directory\n"
    stop = run("stop")
    assert (stop.returncode, stop.stderr) == (130, "interrupted\n")
    bug = run("bug")
    assert bug.returncode == 1 and "Traceback" in bug.stderr
    assert cli(lambda: 3)() == 3


def test_one_line():
    assert one_line("a\n  b\x1b[0m\tc") == "a b [0m c"
    assert len(one_line("x" * 1000)) == 600
