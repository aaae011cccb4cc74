"""FFHQ crops against the original's, ways to give the points, and the way back."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxstyle import align, images
from jaxstyle.align import AlignOptions
from jaxstyle.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
EYES, MOUTH = ((120.0, 90.0), (180.0, 98.0)), (146.0, 160.0)


@pytest.fixture(scope="module")
def astronaut():
    """[512, 512, 3] uint8."""
    with np.load(GOLDEN / "encoder_inputs.npz") as data:
        return data["astronaut_512_u8"]


@pytest.fixture(scope="module")
def golden():
    """Four cases of e4e's `align_face`."""
    with np.load(GOLDEN / "face_alignment.npz") as data:
        return dict(data)


def source(case, astronaut):
    if case == "tilted_corner":
        astronaut = astronaut[:400, 60:460]
    if case == "shrunk_x5":
        astronaut = astronaut.repeat(5, 0).repeat(5, 1)
    return Image.fromarray(astronaut)


def by_hand():
    return np.array([*EYES, MOUTH])


@pytest.mark.parametrize(
    "case", ["interior", "edge_padded", "tilted_corner", "shrunk_x5"]
)
def test_crops_equal_the_original(case, astronaut, golden):
    image = source(case, astronaut)
    result = align.align(image, golden[f"{case}/landmarks"], 256)
    np.testing.assert_allclose(result.quad, golden[f"{case}/quad0"], rtol=1e-9)
    _, inside = align.prepare_source(image, result.quad, 256)
    np.testing.assert_allclose(inside, golden[f"{case}/quad"], rtol=1e-9)
    difference = np.abs(
        np.asarray(result.crop).astype(int) - golden[f"{case}/aligned_u8"]
    )
    # Equal under the Pillow of the golden data; other versions may round otherwise.
    assert np.quantile(difference, 0.999) <= 2
    if case == "shrunk_x5":
        _, inside = align.prepare_source(image, result.quad, 1024)
        expected = golden["shrunk_x5_at_1024/quad"]
        np.testing.assert_allclose(inside, expected, rtol=1e-9)


def test_five_and_three_points_give_the_same_crop(golden):
    points = golden["interior/landmarks"].astype(float)
    left, right, mouth = align.anchors(points)
    five = [left, right, points[30], points[48], points[54]]
    quad = align.ffhq_quad(points)
    np.testing.assert_allclose(align.ffhq_quad(np.array(five)), quad)
    np.testing.assert_allclose(align.ffhq_quad(np.array([left, right, mouth])), quad)
    with pytest.raises(UserError, match=r"shape \[67, 2\]"):
        align.ffhq_quad(points[:67])
    with pytest.raises(UserError, match="coincide"):
        align.ffhq_quad(np.ones((3, 2)))
    with pytest.raises(UserError, match="outside"):
        align.align(Image.new("RGB", (50, 50)), by_hand() + 5000, 64)


def test_pasting_back_the_crop_restores_the_picture(astronaut, golden):
    for case, limit in (("interior", 3.0), ("tilted_corner", 3.0), ("shrunk_x5", 1.5)):
        image = source(case, astronaut)
        points = golden[f"{case}/landmarks"]
        side = round(float(golden[f"{case}/qsize0"]))
        result = align.align(image, points, side)
        back = align.paste_back(image, result.crop, result)
        error = np.abs(np.asarray(back).astype(int) - np.asarray(image))
        inside = error[np.asarray(back_mask(image, result))]
        assert 0 < inside.mean() < limit
        low, high = result.quad.min(0) - 1, result.quad.max(0) + 2
        outside = np.ones(error.shape[:2], bool)
        outside[
            max(int(low[1]), 0) : max(int(high[1]), 0),
            max(int(low[0]), 0) : max(int(high[0]), 0),
        ] = False
        assert not error[outside].any()


def back_mask(image, result):
    """Where a white crop pasted on black is wholly white."""
    black, white = Image.new("RGB", image.size), Image.new("RGB", (64, 64), "white")
    return np.asarray(align.paste_back(black, white, result))[..., 0] == 255


@pytest.mark.parametrize("size", [64, 300])
def test_pasting_back_is_in_register(size):
    """On ramps of both directions a shift of a tenth of a pixel would show."""
    y, x = np.mgrid[:256, :256]
    ramps = np.stack([x, y, 255 - y], -1).astype(np.uint8)
    ramps = Image.fromarray(ramps)
    result = align.align(ramps, by_hand() * 0.5 + [50, 60], size)
    mask = back_mask(ramps, result)
    back = align.paste_back(ramps, result.crop, result)
    error = (np.asarray(back).astype(float) - np.asarray(ramps))[mask]
    assert mask.sum() > 5000
    # Pillow cuts fractions off where it interpolates: half a level darker each time.
    assert np.abs(error).max() <= 2
    x, down, up = error.mean(0)
    assert abs(x - (down + up) / 2) < 0.1 and abs(down - up) < 0.1


def test_feather():
    image, white = Image.new("RGB", (300, 300)), Image.new("RGB", (64, 64), "white")
    result = align.align(image, by_hand(), 64)
    hard = np.asarray(align.paste_back(image, white, result, feather=0))
    soft = np.asarray(align.paste_back(image, white, result, feather=0.3))
    assert set(np.unique(hard)) == {0, 255}
    assert len(np.unique(soft)) > 100 and soft.sum() < hard.sum()
    with pytest.raises(UserError, match="feather"):
        align.paste_back(image, white, result, feather=0.6)
    far = result._replace(quad=result.quad + 5000)
    assert align.paste_back(image, white, far) == image


def test_points_by_hand_in_either_order():
    left, right, mouth = "120,90", "180,98", "146,160"
    expected = by_hand()
    for eyes in ((left, right), (right, left)):
        np.testing.assert_array_equal(align.points_by_hand(eyes, mouth), expected)
    for bad in ("120", "a,b", "1,2,3", "nan,3", ""):
        with pytest.raises(UserError, match="written x,y"):
            align.points_by_hand((bad, right), mouth)


def test_landmark_files(tmp_path, golden):
    points = golden["interior/landmarks"].astype(float)
    np.save(tmp_path / "me.npy", points)
    np.savetxt(tmp_path / "me.txt", points)
    (tmp_path / "commas.txt").write_text("1,2\n\n3,4\n5,6\n")
    (tmp_path / "me.json").write_text(json.dumps({"landmarks": points.tolist()}))
    for name in ("me.npy", "me.txt", "me.json"):
        np.testing.assert_array_equal(align.read_landmarks(tmp_path / name), points)
    found = align.read_landmarks(tmp_path, "photos/commas.png")
    np.testing.assert_array_equal(found, [[1, 2], [3, 4], [5, 6]])

    bad = tmp_path / "bad.txt"
    for text in ("", "1 2\n3\n", "hello", "1 2\n3 4\n", "1 2\n3 4\n5 nan\n"):
        bad.write_text(text)
        with pytest.raises(UserError, match="bad.txt"):
            align.read_landmarks(bad)
    np.save(tmp_path / "bad.npy", np.array([{}], object), allow_pickle=True)
    for name in ("bad.npy", "missing.npy"):
        with pytest.raises(UserError, match=name):
            align.read_landmarks(tmp_path / name)


@pytest.fixture
def photo(tmp_path, astronaut):
    """A file of 320 x 256 pixels."""
    return images.save_image(tmp_path / "me.png", astronaut[:256, 96:416])


def test_prepare_finds_the_face_and_says_how_many(photo, astronaut, tmp_path, capsys):
    crop, alignment = align.prepare(photo, 64)
    assert crop.size == (64, 64) and crop is alignment.crop
    assert capsys.readouterr().err == ""
    # dlib's points give a square of 174 pixels around 129, 107.
    assert np.hypot(*(alignment.quad[3] - alignment.quad[0])) == pytest.approx(
        174, 0.05
    )
    np.testing.assert_allclose(alignment.quad.mean(0), [129, 107], atol=3)

    face = astronaut[:256, 96:352]
    two = images.save_image(tmp_path / "two.png", np.hstack([face, face]))
    align.prepare(two, 64)
    assert "2 faces found, the largest is used" in capsys.readouterr().err


def test_prepare_by_hand_and_from_a_file(photo, tmp_path, golden):
    image = images.open_image(photo)
    hand = AlignOptions(eyes=("120,90", "180,98"), mouth="146,160")
    crop, _ = align.prepare(photo, 64, hand)
    assert crop == align.align(image, by_hand(), 64).crop
    np.save(tmp_path / "points.npy", by_hand())
    crop_2, _ = align.prepare(
        photo, 64, AlignOptions(landmarks=str(tmp_path / "points.npy"))
    )
    assert crop_2 == crop
    for aligned in (True, False):
        with pytest.raises(UserError, match="belong together"):
            align.prepare(photo, 64, AlignOptions(mouth="1,2", align=aligned))
    with pytest.raises(UserError, match="--eyes and --mouth .* --no-align"):
        align.prepare(photo, 64, dataclasses.replace(hand, align=False))
    with pytest.raises(UserError, match="--landmarks says .* --no-align"):
        align.prepare(photo, 64, AlignOptions(landmarks="dlib", align=False))


def test_no_align_crops_the_centre_and_says_so(photo, capsys):
    crop, alignment = align.prepare(photo, 256, AlignOptions(align=False))
    image = images.open_image(photo)
    assert crop == image.crop((32, 0, 288, 256))
    assert "320 x 256 pixels, not square" in capsys.readouterr().err
    # The crop can still be pasted back.
    white = Image.new("RGB", (64, 64), "white")
    back = np.asarray(align.paste_back(image, white, alignment, feather=0))
    assert (back[2:-2, 34:286] == 255).all()
    np.testing.assert_array_equal(back[:, :31], np.asarray(image)[:, :31])
    crop, _ = align.prepare(photo, 64, AlignOptions(align=False))
    assert crop.size == (64, 64)


def test_command(photo, tmp_path, capsys):
    out = tmp_path / "out"
    hand = ["--eyes", "120,90", "180,98", "--mouth", "146,160", "--size", "64"]
    align.main([str(photo), str(out / "a.png"), *hand])
    align.main([str(photo), str(out), *hand])
    assert images.open_image(out / "a.png") == images.open_image(out / "me.png")
    capsys.readouterr()

    folder = tmp_path / "photos"
    images.save_image(folder / "1.png", images.open_image(photo))
    (folder / "2.png").write_bytes(b"broken")
    align.main([str(folder), str(out), "--no-align", "--size", "32"])
    printed = capsys.readouterr()
    assert printed.out.strip() == str(out / "1.png")
    assert "left out" in printed.err and "1 of 2 pictures" in printed.err

    (folder / "1.png").unlink()
    for wrong in (
        [str(folder), str(out), "--no-align"],
        [str(photo), str(out / "a.xyz")],
        [str(photo), str(out), "--size", "1"],
        [str(photo), str(out), "--landmarks", "missing.npy"],
        [str(tmp_path / "missing.png"), str(out)],
    ):
        with pytest.raises(SystemExit) as stopped:
            align.main(wrong)
        assert stopped.value.code == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_command_loses_no_picture(photo, tmp_path, capsys):
    folder = tmp_path / "photos"
    for name in ("a.jpg", "a.png"):
        images.save_image(folder / name, images.open_image(photo))
    small = ["--no-align", "--size", "32"]
    align.main([str(folder), str(tmp_path / "out"), *small])
    crops = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert crops == ["a-jpg.png", "a-png.png"]

    (folder / "a.jpg").unlink()
    before = {p: p.read_bytes() for p in (photo, folder / "a.png")}
    for photos, out, why in (
        (photo, photo, "overwrite the photo"),
        (photo, tmp_path, "overwrite the photo"),
        (folder, folder, "overwrite the photo"),
        (folder, tmp_path / "photos" / ".." / "photos", "overwrite the photo"),
        (folder, tmp_path / "crop.png", "is a folder of photos"),
    ):
        with pytest.raises(SystemExit):
            align.main([str(photos), str(out), *small])
        error = capsys.readouterr().err
        assert f"OUT is {out}" in error and why in error
    assert before == {p: p.read_bytes() for p in before}
    assert not (tmp_path / "crop.png").exists()
