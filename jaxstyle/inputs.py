"""What encoders see of a picture file: drawings, label maps, pictures made smaller.

Training and inference share these, so that an encoder meets what it was trained with
(pSp's transforms). Pictures are resized bilinearly as a whole, whatever their shape.
"""

import colorsys

import numpy as np
from PIL import Image

from jaxstyle.errors import UserError


def values(picture: Image.Image) -> np.ndarray:
    """A picture as float32 [height, width, 3] in [-1, 1], in pSp's arithmetic."""
    half = np.float32(0.5)
    array = np.asarray(picture.convert("RGB"), np.float32)
    return (array / np.float32(255) - half) / half


def bilinear(picture: Image.Image, size: int) -> Image.Image:
    """A picture at [size, size], its shape not kept."""
    return picture.resize((size, size), Image.Resampling.BILINEAR)


def band(picture: Image.Image, size: int, rows: tuple[int, int]) -> Image.Image:
    """A whole picture in rows of a black [size, size] square, as LSUN's cars lie there.

    Args:
      picture: of any shape, which is not kept.
      size: of the square.
      rows: the first one and the one after the last.
    """
    square = Image.new("RGB", (size, size))
    inside = picture.resize((size, rows[1] - rows[0]), Image.Resampling.BILINEAR)
    square.paste(inside, (0, rows[0]))
    return square


def drawing(picture: Image.Image, size: int) -> np.ndarray:
    """A grey drawing: [size, size, 1] in [0, 1] (not in [-1, 1])."""
    grey = bilinear(picture.convert("L"), size)
    return np.asarray(grey, np.float32)[..., None] / np.float32(255)


def label_map(
    classes_of: Image.Image, size: int, classes: int, nearest: bool = False
) -> np.ndarray:
    """A label map, one channel a class: [size, size, classes], 0 or 1.

    Args:
      classes_of: of mode L, its values the classes; see `images.open_labels`.
      size: of the result.
      classes: how many there are.
      nearest: keep the class numbers. Published is a bilinear resize of them, which
        makes up others at edges.

    Raises:
      UserError: a class that does not exist.
    """
    picture = classes_of.convert("L")
    # Before resizing: a class must not slip through between two pixels.
    _check_classes(np.asarray(picture), classes)
    way = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    return one_hot(np.asarray(picture.resize((size, size), way)), classes)


def one_hot(values: np.ndarray, classes: int) -> np.ndarray:
    """Classes [height, width] as float32 [height, width, classes]."""
    _check_classes(values, classes)
    return np.eye(classes, dtype=np.float32)[values]


def _check_classes(values: np.ndarray, classes: int) -> None:
    if values.max(initial=0) >= classes:
        raise UserError(
            f"a label map holds the class {values.max()}; there are {classes} classes, "
            f"so the largest allowed is {classes - 1}"
        )


def low_resolution(picture: Image.Image, size: int, factor: int) -> np.ndarray:
    """A picture made smaller by `factor`, and large again: [size, size, 3]."""
    small = shrink(np.asarray(bilinear(picture.convert("RGB"), size)), factor)
    return values(bilinear(Image.fromarray(small), size))


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


def visible(x: np.ndarray) -> np.ndarray:
    """An input [height, width, channels] as a picture [height, width, 3] in [-1, 1].

    Drawings become grey, the classes of label maps colours as different as can be.
    """
    channels = x.shape[-1]
    if channels == 3:
        return x
    if channels == 1:
        return np.repeat(2 * x - 1, 3, -1)
    # Steps of the golden ratio around the circle of hues; the background is black.
    hues = [colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.7, 1.0) for i in range(channels)]
    colours = np.array([(0, 0, 0), *hues[1:]], np.float32) * 2 - 1
    return colours[np.argmax(x, -1)]
