"""Faces and their 68 landmarks in a picture, without anything but JAX and Pillow.

Two small networks of face-api.js (V. Mühler, 2018; MIT), ported; their weights ship in
`assets/landmarks` as the original's bytes. The points follow the iBUG order: jaw 0-16,
brows 17-26, nose 27-35, left eye 36-41 (left in the picture), right eye 42-47, mouth
48-67.
"""

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from PIL import Image

from jaxstyle import weights
from jaxstyle.init import Normal, initialize, module_params

DETECTOR_SIZE = 320
LANDMARK_SIZE = 112

Params = Mapping[str, Any]

# Width and height of the five box shapes a cell can predict, in cells.
_ANCHORS = (
    (1.603231, 2.094468),
    (6.041143, 7.080126),
    (2.882459, 3.518061),
    (4.266906, 5.178857),
    (9.041765, 10.66308),
)
# Mean colours (0 to 255) of the two networks' training pictures.
_DETECTOR_MEAN = (117.001, 114.697, 97.404)
_LANDMARK_MEAN = (122.782, 117.001, 104.298)

# The search. A detector run on one picture misses most drawings; over six views of the
# picture, mirrored and shrunk, it found all of the test pictures, anime included.
_SCALES = (1.0, 1.6, 2.5)
_VIEWS = 2 * len(_SCALES)
_ANGLES = tuple(np.radians([-45, 45, -90, 90, -135, 135, 180]))
_SEARCH_SIZE = 1280
_KEEP_SCORE = 0.2
_FACE_SCORE = 0.15
# Points of six crops of a real face differ by 0.01 to 0.04 of the distance of the
# outer eye corners, of anything else by 0.06 and (mostly far) more.
_FACE_SPREAD = 0.05
_MOST_FACES = 8
_CROP_SCALES = (1.0, 1.1, 1.2)
_FIT_ROUNDS = 3

# Where each point goes when the picture is mirrored.
_MIRRORED = np.array(
    [*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1)]
    + [45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40]
    + [*range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), 67, 66, 65]
)


class TinyFaceDetector(nn.Module):
    """Face boxes by a small YOLO: `apply({"params": p}, images) -> (boxes, scores)`.

    images [batch, size, size, 3] in [-1, 1], made for a size of 320 (any multiple of
    32). Returns boxes [batch, n, 4] as left, top, right, bottom in units of the
    picture's side, scores [batch, n] in [0, 1], with n = 5 (size / 32)²: every box
    of every cell, overlapping ones included.

    Attributes:
      channels: of the convolutions before the head.
    """

    channels: tuple[int, ...] = (16, 32, 64, 128, 256, 512)

    def init_params(self, *, key: Array) -> dict:
        """A random network."""
        first, *_ = self.channels
        tree = {"conv_0": {"weight": (3, 3, 3, first), "bias": (first,)}}
        for i in range(1, len(self.channels)):
            tree[f"conv_{i}"] = _separable(*self.channels[i - 1 : i + 1])
        outputs = 5 * len(_ANCHORS)
        tree["head"] = {
            "weight": (1, 1, self.channels[-1], outputs),
            "bias": (outputs,),
        }
        return _initialize(tree, key)

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array]:
        return detect(module_params(self), images)


class FaceLandmarks68(nn.Module):
    """68 points of a face crop: `apply({"params": p}, crops) -> points`.

    crops [batch, 112, 112, 3] in [-1, 1], a box around the points filling them.
    Returns points [batch, 68, 2], x and y in units of the crop's side.

    Attributes:
      channels: of the four dense blocks.
    """

    channels: tuple[int, ...] = (32, 64, 128, 256)

    def init_params(self, *, key: Array) -> dict:
        """A random network."""
        tree, before = {}, 3
        for i, width in enumerate(self.channels):
            first = (
                {"weight": (3, 3, before, width), "bias": (width,)}
                if i == 0
                else _separable(before, width)
            )
            rest = {f"conv_{j}": _separable(width, width) for j in (1, 2, 3)}
            tree[f"block_{i}"] = {"conv_0": first, **rest}
            before = width
        tree["dense"] = {"weight": (before, 136), "bias": (136,)}
        return _initialize(tree, key)

    @nn.compact
    def __call__(self, crops: Array) -> Array:
        return landmarks(module_params(self), crops)


def _separable(inputs: int, outputs: int) -> dict:
    return {
        "depthwise": (3, 3, 1, inputs),
        "pointwise": (1, 1, inputs, outputs),
        "bias": (outputs,),
    }


def _initialize(tree: dict, key: Array) -> dict:
    normal = partial(jax.tree.map, lambda shape: Normal(shape, 0.05))
    return initialize(normal(tree, is_leaf=lambda x: isinstance(x, tuple)), key=key)


def detect(params: Params, images: Array) -> tuple[Array, Array]:
    """Boxes and scores; see `TinyFaceDetector`."""
    x = (images * 127.5 + 127.5 - jnp.array(_DETECTOR_MEAN)) / 255
    x = nn.leaky_relu(_conv(x, params["conv_0"], 1, "VALID"), 0.1)
    for i in range(1, len(params) - 1):
        x = nn.max_pool(x, (2, 2), (2, 2), "SAME")
        x = nn.leaky_relu(_separable_conv(x, params[f"conv_{i}"], 1), 0.1)
    x = nn.max_pool(x, (2, 2), (1, 1), "SAME")
    x = _conv(x, params["head"], 1, "VALID")
    batch, cells = x.shape[:2]
    x = x.reshape(batch, cells, cells, len(_ANCHORS), 5)
    position = jnp.stack(jnp.meshgrid(jnp.arange(cells), jnp.arange(cells)), -1)
    center = (position[:, :, None] + nn.sigmoid(x[..., :2])) / cells
    half = jnp.exp(x[..., 2:4]) * jnp.array(_ANCHORS) / cells / 2
    boxes = jnp.concatenate([center - half, center + half], -1)
    scores = nn.sigmoid(x[..., 4])
    return boxes.reshape(batch, -1, 4), scores.reshape(batch, -1)


def landmarks(params: Params, crops: Array) -> Array:
    """Points in crops; see `FaceLandmarks68`."""
    x = (crops * 127.5 + 127.5 - jnp.array(_LANDMARK_MEAN)) / 255
    for i in range(len(params) - 1):
        x = _dense_block(x, params[f"block_{i}"], i == 0)
    x = jnp.mean(x, (1, 2))
    points = x @ params["dense"]["weight"] + params["dense"]["bias"]
    return points.reshape(-1, 68, 2)


def _dense_block(x: Array, p: Params, first: bool) -> Array:
    """Four 3x3 layers, each fed with the sum of those before; halves the size."""
    total = nn.relu((_conv if first else _separable_conv)(x, p["conv_0"], 2))
    for j in (1, 2, 3):
        total = total + _separable_conv(nn.relu(total), p[f"conv_{j}"], 1)
    return nn.relu(total)


def _conv(x: Array, p: Params, stride: int, padding: str = "SAME") -> Array:
    x = lax.conv_general_dilated(
        x,
        p["weight"],
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return x + p["bias"]


def _separable_conv(x: Array, p: Params, stride: int) -> Array:
    """3x3 a channel, then 1x1 across channels, zero padding on even sizes as TF's."""
    height, width = x.shape[1] // stride, x.shape[2] // stride
    x = jnp.pad(x, [(0, 0), *[(2 - stride, 1)] * 2, (0, 0)])
    # Nine shifted products: grouped convolutions are slow on CPUs.
    x = sum(
        x[:, i : i + height * stride : stride, j : j + width * stride : stride]
        * p["depthwise"][i, j, 0]
        for i in range(3)
        for j in range(3)
    )
    return x @ p["pointwise"][0, 0] + p["bias"]


class Face(NamedTuple):
    """A face found in a picture.

    points: [68, 2] x, y in pixels, the centre of the first pixel being 0, 0.
    score: 0 to 1, how sure the detector is.
    spread: how far the points of different crops differ from their mean, in units of
        the distance of the outer eye corners.
    """

    points: np.ndarray
    score: float
    spread: float

    @property
    def size(self) -> float:
        """Longer side of the box around the points, in pixels."""
        return float(np.ptp(self.points, axis=0).max())


class _Square(NamedTuple):
    """A square of a picture, in pixels from its top left corner; angle in radians."""

    x: float
    y: float
    side: float
    angle: float = 0.0
    mirror: bool = False

    def matrix(self) -> np.ndarray:
        """[2, 3], from the unit square to the picture."""
        right = self.side * np.array([np.cos(self.angle), np.sin(self.angle)])
        down = np.array([-right[1], right[0]])
        if self.mirror:
            right = -right
        return np.stack([right, down, (self.x, self.y) - (right + down) / 2], 1)


def find_faces(image: Image.Image) -> list[Face]:
    """The largest faces of an RGB picture, at most 8, the largest first.

    Upright faces of at least a sixth of the picture's side are found first. Only if
    there are none, smaller ones are searched, then tilted and upside down ones.
    """
    shrink = max(1.0, max(image.size) / _SEARCH_SIZE)
    small = image
    if shrink > 1:
        small = image.resize(
            [max(1, round(n / shrink)) for n in image.size], Image.Resampling.LANCZOS
        )
    for squares in _searches(*small.size):
        faces: list[Face] = []
        for score, square in _candidates(small, squares):
            scaled = square._replace(
                x=square.x * image.width / small.width,
                y=square.y * image.height / small.height,
                side=square.side * shrink,
            )
            points, spread = _fit(image, scaled)
            face = Face(points - 0.5, score, spread)
            if spread < _FACE_SPREAD and not any(_same(face, f) for f in faces):
                faces.append(face)
            if len(faces) == _MOST_FACES:
                break
        if faces:
            return sorted(faces, key=lambda face: -face.size)
    return []


def _same(a: Face, b: Face) -> bool:
    distance = np.linalg.norm(a.points.mean(0) - b.points.mean(0))
    return bool(distance < max(a.size, b.size) / 2)


def _searches(width: int, height: int) -> Iterator[list[_Square]]:
    """Squares to look at, likely and cheap ones first."""
    whole = _Square(width / 2, height / 2, max(width, height))

    def turned(angle):
        return [whole._replace(side=whole.side * s, angle=angle) for s in _SCALES]

    yield turned(0.0)
    for part in (2, 4):
        side = whole.side / part
        if side >= 128:
            yield [
                _Square(x, y, side)
                for y in _centers(height, side)
                for x in _centers(width, side)
            ]
    yield [square for angle in _ANGLES for square in turned(angle)]


def _centers(length: float, side: float) -> np.ndarray:
    """Centres of half-overlapping squares that cover a length."""
    steps = max(0, int(np.ceil((length - side) / (side / 2))))
    if steps == 0:
        return np.array([length / 2])
    return np.linspace(side / 2, length - side / 2, steps + 1)


def _candidates(
    image: Image.Image, squares: list[_Square]
) -> list[tuple[float, _Square]]:
    """Score and square of everything that may be a face, the largest first.

    Each square is looked at as it is and mirrored; detections of one place count
    together, by the best pair.
    """
    views = [square._replace(mirror=m) for square in squares for m in (False, True)]
    found = []
    for start in range(0, len(views), _VIEWS):
        chunk = views[start : start + _VIEWS]
        boxes, scores = _run_detector(_sample(image, chunk, DETECTOR_SIZE))
        for i, view in enumerate(chunk):
            to_image = view.matrix()
            for j in _best_boxes(boxes[i], scores[i]):
                low, high = boxes[i, j, :2], boxes[i, j, 2:]
                x, y = to_image @ [*(low + high) / 2, 1]
                side = (high - low).max() * view.side
                face = _Square(x, y, side, view.angle)
                found.append((float(scores[i, j]), face, (start + i) // 2, i % 2))
    found.sort(key=lambda f: -f[0])
    candidates = []
    while found:
        best = found[0][1]
        near = [f for f in found if _overlap(best, f[1])]
        found = [f for f in found if not _overlap(best, f[1])]
        pairs = np.zeros((len(squares), 2))
        for score, _, square, mirrored in near:
            pairs[square, mirrored] = max(pairs[square, mirrored], score)
        total = float(pairs.mean(1).max())
        if total >= _FACE_SCORE:
            near = [f for f in near if f[1].angle == best.angle]
            x, y, side = np.average(
                [f[1][:3] for f in near], axis=0, weights=[f[0] for f in near]
            )
            candidates.append((total, _Square(x, y, side, best.angle)))
    return sorted(candidates, key=lambda c: -c[1].side)


def _overlap(a: _Square, b: _Square) -> bool:
    near = np.hypot(a.x - b.x, a.y - b.y) < 0.4 * a.side
    return bool(near and 0.5 < a.side / b.side < 2)


def _best_boxes(boxes: np.ndarray, scores: np.ndarray) -> list[int]:
    """Boxes above the least score that overlap no better one by 40 % or more."""
    kept: list[int] = []
    for i in np.argsort(-scores):
        if scores[i] < _KEEP_SCORE:
            break
        if all(_intersection_over_union(boxes[i], boxes[j]) < 0.4 for j in kept):
            kept.append(int(i))
    return kept


def _intersection_over_union(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    common = np.prod(np.maximum(sides, 0))
    return common / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - common)


def _fit(image: Image.Image, square: _Square) -> tuple[np.ndarray, float]:
    """Points [68, 2] of the face in a square, and their spread.

    The mean over six crops, three sizes and their mirror images; then again with
    crops turned upright and centred by the points found.
    """
    for _ in range(_FIT_ROUNDS):
        views = [
            square._replace(side=square.side * scale, mirror=mirror)
            for scale in _CROP_SCALES
            for mirror in (False, True)
        ]
        crops = _run_landmarks(_sample(image, views, LANDMARK_SIZE))
        results = []
        for view, crop in zip(views, crops, strict=True):
            to_image = view.matrix()
            # The network was trained on crops resized without half-pixel centres.
            crop = crop + 0.5 / LANDMARK_SIZE
            points = crop @ to_image[:, :2].T + to_image[:, 2]
            results.append(points[_MIRRORED] if view.mirror else points)
        points = np.mean(results, 0)
        square = _square_around(points)
    eyes = np.linalg.norm(points[36] - points[45])
    distances = np.linalg.norm(np.array(results) - points, axis=-1)
    return points, float(distances.mean() / max(eyes, 1e-6))


def _square_around(points: np.ndarray) -> _Square:
    """The smallest square in line with the eyes that holds all points."""
    x, y = points[42:48].mean(0) - points[36:42].mean(0)
    angle = np.arctan2(y, x)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    upright = points @ turn
    low, high = upright.min(0), upright.max(0)
    center = turn @ (low + high) / 2
    return _Square(*center, (high - low).max(), angle)


def _sample(image: Image.Image, squares: list[_Square], size: int) -> np.ndarray:
    """Squares of a picture as [6, size, size, 3] in [-1, 1], black outside of it."""
    batch = np.full((_VIEWS, size, size, 3), -1, np.float32)
    for i, square in enumerate(squares):
        matrix = square.matrix()
        corners = matrix @ np.array([[0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
        low = np.clip(np.floor(corners.min(1)) - 2, 0, image.size)
        high = np.clip(np.ceil(corners.max(1)) + 2, 0, image.size)
        if (high - low < 1).any() or square.side < 1:
            continue
        # Shrunk first with a filter that does not alias; then turned.
        shrink = max(1.0, square.side / size)
        shape = np.maximum(1, np.rint((high - low) / shrink)).astype(int)
        part = image.resize(
            tuple(shape.tolist()), Image.Resampling.LANCZOS, (*low, *high)
        )
        factors = shape / (high - low)
        matrix[:, 2] -= low
        matrix = matrix * factors[:, None] / [size, size, 1]
        part = part.transform(
            (size, size),
            Image.Transform.AFFINE,
            matrix.ravel().tolist(),
            Image.Resampling.BILINEAR,
        )
        batch[i] = np.asarray(part, np.float32) / 127.5 - 1
    return batch


@cache
def _networks():
    model, params = weights.load("landmarks")

    def jitted(name):
        network = model[name]
        function = jax.jit(lambda p, x: network.apply({"params": p}, x))
        return partial(function, params[name])

    return jitted("face_detector"), jitted("face_landmarks")


def _run_detector(batch: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(x) for x in _networks()[0](batch)]


def _run_landmarks(batch: np.ndarray) -> np.ndarray:
    return np.asarray(_networks()[1](batch))
