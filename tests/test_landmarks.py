"""The face detector and the landmark network against the original and against dlib."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jaxstyle
from jaxstyle import landmarks
from jaxstyle.align import find_landmarks
from jaxstyle.errors import UserError

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def astronaut():
    """NASA's photo of Eileen Collins (public domain), [512, 512, 3] uint8."""
    with np.load(GOLDEN / "encoder_inputs.npz") as data:
        return data["astronaut_512_u8"]


@pytest.fixture(scope="module")
def golden():
    """Outputs of face-api 1.7.15 in node, and dlib's points of the same photo."""
    with np.load(GOLDEN / "face_api.npz") as data:
        return dict(data)


def error(points, reference):
    """Mean distance in units of the distance of the outer eye corners."""
    eyes = np.linalg.norm(reference[36] - reference[45])
    return np.linalg.norm(points - reference, axis=1).mean() / eyes


def test_detector_equals_the_original(astronaut, golden):
    model, params = jaxstyle.load("landmarks")
    images = astronaut[None, :320, 60:380].astype(np.float32) / 127.5 - 1
    boxes, scores = jax.jit(model.face_detector.apply)(
        {"params": params["face_detector"]}, images
    )
    assert boxes.shape == (1, 500, 4)
    np.testing.assert_allclose(scores[0], golden["detector_scores"], atol=2e-6)
    left, top, right, bottom = 320 * boxes[0, np.argmax(scores[0])]
    x, y, width, height, score = golden["box"]
    np.testing.assert_allclose(
        [left, top, right - left, bottom - top], [x, y, width, height], atol=1e-3
    )
    assert abs(scores.max() - score) < 2e-6


def test_landmark_network_equals_the_original(astronaut, golden):
    model, params = jaxstyle.load("landmarks")
    crops = astronaut[None, 60:172, 170:282].astype(np.float32) / 127.5 - 1
    points = jax.jit(model.face_landmarks.apply)(
        {"params": params["face_landmarks"]}, crops
    )
    np.testing.assert_allclose(points[0], golden["points"], atol=2e-6)


def test_init_params_have_the_stored_shapes():
    model, params = jaxstyle.load("landmarks")
    for name, network in model.items():
        shapes = jax.eval_shape(lambda n=network: n.init_params(key=jax.random.key(0)))
        assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(
            lambda x: x.shape, params[name]
        )


def test_points_are_close_to_dlib(astronaut, golden):
    points, count = find_landmarks(Image.fromarray(astronaut))
    assert count == 1
    # Measured 0.034; the original's own pipeline gives 0.045.
    assert error(points, golden["dlib_points"]) < 0.04


@pytest.mark.slow
def test_points_are_close_to_dlib_itself(astronaut):
    pytest.importorskip("dlib", reason="needs the extra jaxstyle[dlib]")
    pytest.importorskip("face_recognition_models", reason="needs jaxstyle[dlib]")
    image = Image.fromarray(astronaut)
    reference, count = find_landmarks(image, "dlib")
    # dlib sees a second face, of which the largest has to be the astronaut's.
    assert count == 2
    assert error(find_landmarks(image)[0], reference) < 0.05


def test_small_and_tilted_pictures(astronaut, golden):
    photo = Image.fromarray(astronaut).crop((96, 0, 352, 256))
    reference = golden["dlib_points"] - [96, 0]
    small = photo.resize((96, 96), Image.Resampling.LANCZOS)
    face = landmarks.find_faces(small)[0]
    assert error((face.points + 0.5) / 96 * 256 - 0.5, reference) < 0.06

    for degrees in (30, 180):
        turned = photo.rotate(-degrees, Image.Resampling.BICUBIC)
        angle = np.radians(degrees)
        turn = np.array(
            [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        )
        expected = (reference - 127.5) @ turn.T + 127.5
        assert error(landmarks.find_faces(turned)[0].points, expected) < 0.05


def test_a_small_face_in_a_large_picture(astronaut, golden):
    sheet = Image.new("RGB", (1600, 900), (90, 120, 90))
    sheet.paste(Image.fromarray(astronaut[:256, 96:352]), (1100, 500))
    expected = golden["dlib_points"] - [96, 0] + [1100, 500]
    assert error(landmarks.find_faces(sheet)[0].points, expected) < 0.05


def test_several_faces_come_largest_first(astronaut):
    face = Image.fromarray(astronaut).crop((96, 0, 352, 256))
    sheet = Image.new("RGB", (480, 256), "white")
    sheet.paste(face.resize((160, 160), Image.Resampling.LANCZOS), (20, 40))
    sheet.paste(face, (224, 0))
    faces = landmarks.find_faces(sheet)
    assert len(faces) == 2
    assert faces[0].points[:, 0].min() > 224 > faces[1].points[:, 0].max()
    assert faces[0].size > faces[1].size
    assert faces[0].spread < 0.05 and 0 < faces[0].score <= 1


def test_no_face():
    noise = np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8)
    image = Image.fromarray(noise)
    assert landmarks.find_faces(image) == []
    assert landmarks.find_faces(Image.new("RGB", (1, 1))) == []
    with pytest.raises(UserError, match="--eyes.*--landmarks FILE.*--no-align"):
        find_landmarks(image)
    with pytest.raises(UserError, match="'opencv'"):
        find_landmarks(image, "opencv")
