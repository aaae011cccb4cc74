"""From picture files to training examples: the transforms that pSp was trained with.

Each takes an item of a source and a random generator, and gives float32 arrays:
`image` [size, size, 3] in [-1, 1], the picture wanted, and where it differs `input`
[size, size, channels]. What is random about an example is here, the arithmetic in
`jaxstyle.inputs`. All are functions of this module, so that worker processes can run
partials.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from jaxstyle import inputs

FACTORS = (1, 2, 4, 8, 16, 32)
BILINEAR = Image.Resampling.BILINEAR
Rng = np.random.Generator
Example = dict[str, np.ndarray]
Pair = tuple[Image.Image, Image.Image]


def same(
    item: Image.Image,
    rng: Rng,
    *,
    size: int,
    mirror: bool = True,
    rows: Sequence[int] = (),
) -> Example:
    """Inversion: the picture itself, flipped at random.

    With `rows`, first and one after the last, it lies there and all else is black.
    """
    if not rows:
        return {"image": _flip(_resized(item, size), rng, mirror)}
    wide = item.convert("RGB").resize((size, rows[1] - rows[0]), BILINEAR)
    image = np.full((size, size, 3), -1, np.float32)
    image[slice(*rows)] = inputs.values(wide)
    return {"image": _flip(image, rng, mirror)}


def apart(item: Pair, rng: Rng, *, size: int, mirror: bool = True) -> Example:
    """Frontalisation: input and picture are flipped independently of each other."""
    source, target = (_flip(_resized(x, size), rng, mirror) for x in item)
    return {"input": source, "image": target}


def sketch(item: Pair, rng: Rng, *, size: int) -> Example:
    """A grey drawing and the picture wanted; see `inputs.drawing`."""
    return {"input": inputs.drawing(item[0], size), "image": _resized(item[1], size)}


def labels(
    item: Pair, rng: Rng, *, size: int, classes: int = 19, nearest: bool = False
) -> Example:
    """A label map and the picture wanted; see `inputs.label_map`."""
    return {
        "input": inputs.label_map(item[0], size, classes, nearest),
        "image": _resized(item[1], size),
    }


def low_resolution(
    item: Image.Image, rng: Rng, *, size: int, factors: Sequence[int] = FACTORS
) -> Example:
    """Super-resolution: the picture made smaller by one of the factors, and large."""
    factor = int(rng.choice(np.asarray(factors)))
    return {
        "input": inputs.low_resolution(item, size, factor),
        "image": _resized(item, size),
    }


def _resized(picture: Image.Image, size: int) -> np.ndarray:
    return inputs.values(inputs.bilinear(picture.convert("RGB"), size))


def _flip(array: np.ndarray, rng: Rng, mirror: bool) -> np.ndarray:
    return array[:, ::-1] if mirror and rng.random() < 0.5 else array
