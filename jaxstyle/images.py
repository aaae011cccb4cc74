"""Pictures in and out: files, 8-bit pictures and arrays, grids, animations.

This is the only place where pictures are 8 bit, but for the rounding that pSp's low
resolution asks for (`inputs.shrink`). Everywhere else a picture is a float32
array [height, width, 3] (a batch: [batch, height, width, 3]) with values in [-1, 1].
"""

import collections
import io
import os
import re
import warnings

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont, ImageOps

from jaxstyle.errors import UserError, one_line
from jaxstyle.paths import place

MAX_PIXELS = 100_000_000
"""Larger pictures are refused: a float copy alone would take more than 1 GB."""

MAX_FPS = 50
"""The finest that a GIF can show."""

# Only plain raster formats: Pillow would also start external programs (EPS).
_READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "AVIF")
SUFFIXES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_READABLE_SUFFIXES = set(SUFFIXES) | set(".gif .ppm .pgm .tga .avif .jfif .mpo".split())
_SAVE_OPTIONS = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "TIFF": {"compression": "tiff_deflate"},
}


def open_labels(path):
    """Read a label map as a `PIL.Image` of mode L whose values are the classes.

    From an index picture (grey), or a palette picture, whose indices count; a colour
    picture must be grey. Raises `UserError` as `open_image` does.
    """
    return _open(path, _to_labels)


def open_image(path):
    """Read a picture file as an upright 8-bit RGB `PIL.Image`.

    The EXIF rotation is applied; grey, palette, 16-bit and CMYK pictures become RGB,
    transparent parts become white; of an animation the first frame is taken.
    Raises `UserError` for missing, damaged or truncated files, for pictures of more
    than `MAX_PIXELS`, and for formats this does not read.
    """
    return _open(path, _to_rgb)


def _open(path, convert):
    path = place(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name one picture")
    if not path.is_file():
        raise UserError(f"{path}: no such picture")
    if path.stat().length == 0:
        raise UserError(f"{path} is an empty file")
    with warnings.catch_warnings():
        # Pillow warns about odd metadata and large sizes; the size rule is ours.
        warnings.simplefilter("ignore")
        try:
            with path.open("rb") as file, Image.open(file, formats=_READABLE) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise UserError(
                        f"{path} has {width} x {height} pixels, more than the "
                        f"{MAX_PIXELS // 10**6} million allowed; make it smaller"
                    )
                image.load()
                return convert(_upright(image), path)
        except UserError:
            raise
        except Image.UnidentifiedImageError:
            raise UserError(
                f"{path} is damaged or not a picture this program reads "
                "(PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, TGA, AVIF); convert it to PNG"
            ) from None
        except Image.DecompressionBombError:
            raise UserError(
                f"{path} has more than the {MAX_PIXELS // 10**6} million pixels "
                "allowed; make it smaller"
            ) from None
        except Exception as error:
            # Decoders fail on hostile files in many ways (OSError, ValueError,
            # struct.error, SyntaxError ...); all of them mean the same to the user.
            raise UserError(
                f"{path} is damaged or truncated ({one_line(error, 100)})"
            ) from None


def _upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # Damaged EXIF data in an otherwise readable picture: keep it as stored.
        return image


def _to_rgb(image, path):
    """Any Pillow mode to 8-bit RGB, transparency on white."""
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "F" or values.max() > 65535 or values.min() < 0:
            raise UserError(
                f"{path} has 32-bit pixels; save it with 8 or 16 bits a channel"
            )
        return _from_16_bit(values)
    if image.mode.startswith("I;16"):
        return _from_16_bit(np.asarray(image))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    # A copy, so that nothing refers to the file once it is closed.
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _to_labels(image, path):
    """Classes of a grey, palette or 16-bit picture."""
    if image.mode == "P":
        return Image.fromarray(np.array(image))
    if image.mode.startswith("I") and np.asarray(image).max() < 256:
        return Image.fromarray(np.asarray(image).astype(np.uint8))
    colours = np.asarray(_to_rgb(image, path))
    if (colours != colours[..., :1]).any():
        raise UserError(
            f"{path} is a colour picture; a label map is grey (its values the classes) "
            "or has a palette"
        )
    return Image.fromarray(colours[..., 0].copy())


def _from_16_bit(values):
    grey = np.rint(values.astype(np.float64) / 257).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def center_square(image):
    """The largest centred square of a `PIL.Image`."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def to_array(image, size=None):
    """A `PIL.Image` as float32 [height, width, 3] in [-1, 1].

    size: None keeps the size; an int gives [size, size, 3], centre-cropping to a
    square first, then resizing (Lanczos).
    """
    image = image.convert("RGB")
    if size is not None:
        image = center_square(image)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(array):
    """Floats in [-1, 1] (clipped) to uint8, any shape; uint8 passes through."""
    array = np.asarray(array)
    if array.dtype == np.uint8:
        return array
    array = np.nan_to_num(array.astype(np.float32), nan=-1.0)
    return np.rint(np.clip(array * 127.5 + 127.5, 0, 255)).astype(np.uint8)


def to_pil(image):
    """[height, width, 3 or 1] or [height, width] in [-1, 1], or uint8, to RGB PIL.

    A `PIL.Image` passes through.
    """
    if isinstance(image, Image.Image):
        return image
    array = to_uint8(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3):
        raise ValueError(
            f"a picture is [height, width, 3], not {list(array.shape)}; "
            "take one picture of a batch"
        )
    return Image.fromarray(
        np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
    )


def write_bytes(path, data):
    """Write a file under a temporary name in its folder, then rename it.

    Makes the folder if needed; `gs://` paths work.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_image(path, image):
    """Save a picture (array in [-1, 1], uint8 array or PIL) and return its path.

    The suffix chooses the format; without one it is PNG and `.png` is appended.
    """
    path = epath.Path(path)
    if not path.suffix:
        path = path.with_name(path.name + ".png")
    image_format = image_format_of(path)
    buffer = io.BytesIO()
    to_pil(image).save(buffer, image_format, **_SAVE_OPTIONS.get(image_format, {}))
    write_bytes(path, buffer.getvalue())
    return path


def image_format_of(path):
    """Pillow's format name for the suffix of `path`; `UserError` if there is none."""
    suffix = epath.Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"cannot save {path}: unknown picture suffix {suffix!r}; "
            f"use one of {', '.join(SUFFIXES)}"
        )
    return SUFFIXES[suffix]


def image_files(path):
    """The pictures of a folder in natural order (2.png before 10.png), or one file.

    Hidden files and other files are left out; sub-folders are not entered. Raises
    `UserError` if there is no picture.
    """
    path = place(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such picture or folder")
    files = [file for file in path.iterdir() if _is_picture(file)]
    if not files:
        known = sorted(_READABLE_SUFFIXES)
        raise UserError(
            f"{path} holds no pictures ({', '.join(known)}); sub-folders are not "
            "searched"
        )
    return sorted(files, key=lambda file: natural_key(file.name))


def holds_pictures(path):
    """Whether a path is a picture, or a folder of such, by the names of the files."""
    path = place(path)
    return any(map(_is_picture, path.iterdir() if path.is_dir() else [path]))


def _is_picture(file):
    known = file.suffix.lower() in _READABLE_SUFFIXES
    return known and not file.name.startswith(".") and file.is_file()


def file_names(paths):
    """A name for each picture in the names of other files: mostly the stem.

    a.jpg and a.png of one folder become a-jpg and a-png, not to overwrite each other.
    """
    paths = [epath.Path(path) for path in paths]
    alike = collections.Counter(path.stem for path in paths)
    return [
        path.stem if alike[path.stem] == 1 else path.name.replace(".", "-")
        for path in paths
    ]


def natural_key(name):
    """Sort key that orders runs of digits by their value."""
    parts = re.split(r"(\d+)", name.lower())
    # The split alternates text and digits, so that equal positions compare alike.
    return [int(p) if i % 2 else p for i, p in enumerate(parts)], name


def grid(
    images, columns=None, *, captions=None, column_labels=None, row_labels=None, gap=2
):
    """Pictures side by side on white, row by row, as one `PIL.Image`.

    images: [n, height, width, 3] in [-1, 1] or a list of pictures (arrays or PIL);
        smaller ones are enlarged to the largest height, keeping their shape.
    columns: pictures in a row; None makes the grid as square as it can be.
    captions: n texts, each under its picture.
    column_labels, row_labels: texts above the columns and left of the rows.
    gap: pixels between pictures.
    """
    images = [to_pil(image) for image in images]
    if not images:
        raise ValueError("a grid needs at least one picture")
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = max(image.height for image in images)
    images = [
        image
        if image.height == height
        else image.resize(
            (max(1, round(image.width * height / image.height)), height),
            Image.Resampling.BICUBIC,
        )
        for image in images
    ]
    width = max(image.width for image in images)

    font = ImageFont.load_default(size=max(10, min(32, height // 12)))
    line = font.getbbox("Ag")[3] + 4
    left = 0
    if row_labels:
        left = int(max(font.getlength(str(text)) for text in row_labels)) + 8
    top = line if column_labels else 0
    caption = line if captions else 0
    cell_width, cell_height = width + gap, height + caption + gap
    sheet = Image.new(
        "RGB",
        (left + columns * cell_width - gap, top + rows * cell_height - gap),
        "white",
    )
    draw = ImageDraw.Draw(sheet)

    def write(center_x, top_y, text):
        text = _shorten(str(text), font, width)
        draw.text((center_x - font.getlength(text) / 2, top_y + 1), text, "black", font)

    for index, image in enumerate(images):
        x = left + index % columns * cell_width
        y = top + index // columns * cell_height
        sheet.paste(image, (x + (width - image.width) // 2, y))
        if captions:
            write(x + width / 2, y + height, captions[index])
    for column, text in enumerate((column_labels or [])[:columns]):
        write(left + column * cell_width + width / 2, 0, text)
    for row, text in enumerate((row_labels or [])[:rows]):
        y = top + row * cell_height + (height - line) / 2
        draw.text((4, y), str(text), "black", font)
    return sheet


def _shorten(text, font, width):
    """Cut `text` so that it fits into `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def save_animation(path, frames, fps=12):
    """Save pictures as an endless animation and return its path.

    path: `.webp` or `.gif`; a path without a suffix becomes a folder of PNG frames.
    frames: [n, height, width, 3] in [-1, 1] or a list of pictures of one size.
    fps: frames a second, 1 to `MAX_FPS`.
    """
    path = epath.Path(path)
    suffix = path.suffix.lower()
    frames = [to_pil(frame) for frame in frames]
    if not frames:
        raise ValueError("an animation needs at least one frame")
    if not 1 <= fps <= MAX_FPS:
        raise UserError(f"fps is {fps}; it must be between 1 and {MAX_FPS}")
    if not suffix:
        for index, frame in enumerate(frames):
            save_image(path / f"{index:04d}.png", frame)
        return path
    if suffix not in (".webp", ".gif"):
        raise UserError(
            f"cannot save an animation as {path}: use .webp, .gif, or a name without "
            "a suffix for a folder of frames"
        )
    options = {"quality": 90, "method": 4} if suffix == ".webp" else {"disposal": 1}
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        suffix[1:].upper(),
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 / fps),
        loop=0,
        **options,
    )
    write_bytes(path, buffer.getvalue())
    return path
