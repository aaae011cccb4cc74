"""From picture files to what an encoder sees: the transforms that pSp was trained with.

Each takes an item of a source and a random generator, and gives float32 arrays:
`image` [size, size, 3] in [-1, 1], the picture wanted, and where it differs `input`
[size, size, channels]. Pictures are resized bilinearly as a whole, whatever their
shape. All are functions of this module, so that worker processes can run partials.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from jaxstyle.errors import UserError

FACTORS = (1, 2, 4, 8, 16, 32)
Rng = np.random.Generator
Example = dict[str, np.ndarray]


def same(item: Image.Image, rng: Rng, *, size: int, mirror: bool = True) -> Example:
    """Inversion: the picture itself, flipped at random."""
    return {"image": _flip(_resized(item, size), rng, mirror)}


def apart(
    item: tuple[Image.Image, Image.Image], rng: Rng, *, size: int, mirror: bool = True
) -> Example:
    """Frontalisation: input and picture are flipped independently of each other."""
    source, target = (_flip(_resized(x, size), rng, mirror) for x in item)
    return {"input": source, "image": target}


def sketch(item: tuple[Image.Image, Image.Image], rng: Rng, *, size: int) -> Example:
    """A grey drawing, one channel in [0, 1] (not in [-1, 1])."""
    grey = _bilinear(item[0].convert("L"), size)
    return {
        "input": np.asarray(grey, np.float32)[..., None] / np.float32(255),
        "image": _resized(item[1], size),
    }


def labels(
    item: tuple[Image.Image, Image.Image],
    rng: Rng,
    *,
    size: int,
    classes: int = 19,
    nearest: bool = False,
) -> Example:
    """A label map, one channel a class.

    Published is a bilinear resize of the class numbers, which mixes them at edges;
    `nearest` keeps them.

    Raises:
      UserError: a class that does not exist.
    """
    source = item[0].convert("L")
    if nearest:
        source = source.resize((size, size), Image.Resampling.NEAREST)
    else:
        source = _bilinear(source, size)
    return {
        "input": one_hot(np.asarray(source), classes),
        "image": _resized(item[1], size),
    }


def low_resolution(
    item: Image.Image, rng: Rng, *, size: int, factors: Sequence[int] = FACTORS
) -> Example:
    """Super-resolution: the picture made smaller by one of the factors, and large."""
    image = _bilinear(item, size)
    factor = int(rng.choice(np.asarray(factors)))
    small = Image.fromarray(shrink(np.asarray(image), factor))
    return {"input": _resized(small, size), "image": _values(image)}


def one_hot(values: np.ndarray, classes: int) -> np.ndarray:
    """Classes [height, width] as float32 [height, width, classes]."""
    if values.max(initial=0) >= classes:
        raise UserError(
            f"a label map holds the class {values.max()}; --classes is {classes}, so "
            f"the largest allowed is {classes - 1}"
        )
    return np.eye(classes, dtype=np.float32)[values]


def bicubic_kernel(factor: int) -> np.ndarray:
    """Taps [4 factor] of pSp's cubic filter (a = -0.5), their sum 1, float32."""
    at = np.abs((np.arange(4 * factor) - 2 * factor + 0.5) / factor)
    near = 1.5 * at**3 - 2.5 * at**2 + 1
    far = -0.5 * at**3 + 2.5 * at**2 - 4 * at + 2
    taps = np.where(at <= 1, near, np.where(at < 2, far, 0)).astype(np.float32)
    return taps / taps.sum()


def shrink(picture: np.ndarray, factor: int) -> np.ndarray:
    """A uint8 picture [height, width, 3] smaller by `factor`, as pSp does it.

    Reflected edges; rows first; clipped and cut off to 8 bits. Factor 1 is a blur.
    """
    x, taps = picture.astype(np.float32) / np.float32(255), bicubic_kernel(factor)
    before = 3 * factor // 2
    for axis in (0, 1):
        pad = [(0, 0)] * 3
        pad[axis] = (before, 3 * factor - before)
        x = np.pad(x, pad, "reflect")
        windows = np.lib.stride_tricks.sliding_window_view(x, 4 * factor, axis)
        x = windows[(slice(None),) * axis + (slice(None, None, factor),)] @ taps
    return (np.clip(x, 0, 1) * np.float32(255)).astype(np.uint8)


def _bilinear(picture: Image.Image, size: int) -> Image.Image:
    return picture.resize((size, size), Image.Resampling.BILINEAR)


def _values(picture: Image.Image) -> np.ndarray:
    half = np.float32(0.5)
    return (np.asarray(picture, np.float32) / np.float32(255) - half) / half


def _resized(picture: Image.Image, size: int) -> np.ndarray:
    return _values(_bilinear(picture.convert("RGB"), size))


def _flip(array: np.ndarray, rng: Rng, mirror: bool) -> np.ndarray:
    return array[:, ::-1] if mirror and rng.random() < 0.5 else array
