"""The FFHQ crop: faces turned upright, centred and scaled as the networks expect.

```
python -m jaxstyle.align me.jpg me_aligned.png
python -m jaxstyle.align photos/ aligned/ --size 256
```

The geometry is that of the FFHQ data set (Karras et al. 2019, appendix A), as pSp, e4e
and JoJoGAN use it: a square from the means of the eyes and of the mouth corners.
`ALIGN.md` says what to do when no face is found.
"""

import io
import json
import os
import sys
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import scipy.ndimage
import tyro
from etils import epath
from PIL import Image

from jaxstyle import images
from jaxstyle.errors import UserError, cli, one_line
from jaxstyle.options import parse
from jaxstyle.paths import place

WAYS_OUT = (
    "give the eyes and the mouth by hand (--eyes x,y x,y --mouth x,y), a file of "
    "landmarks (--landmarks FILE), or --no-align for a picture that is cropped already"
)
FEATHER = 0.12


class Alignment(NamedTuple):
    """An aligned crop and where it comes from.

    crop: square RGB picture.
    quad: [4, 2] its corners (top left, bottom left, bottom right, top right) in the
        original picture, x and y in pixels, the centre of the first pixel being 0, 0.
    """

    crop: Image.Image
    quad: np.ndarray


@dataclass(frozen=True)
class AlignOptions:
    """How to find the face in a picture."""

    landmarks: str = "embedded"
    """Where the face is: embedded (the detector that ships with jaxstyle), dlib (an
    extra: pip install "jaxstyle[dlib]"), or a file of 68, 5 or 3 points x y (.npy,
    .txt, .json), or a folder with such a file for each picture, NAME.npy and so on."""
    eyes: tuple[str, str] | None = None
    """Centres of both eyes by hand, in pixels: x,y x,y. Needs --mouth too."""
    mouth: str | None = None
    """Centre of the mouth by hand, in pixels: x,y."""
    align: bool = True
    """--no-align takes the picture as it is, for pictures that are cropped already;
    one that is not square is cropped to its centre."""


# Geometry


def anchors(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left eye, right eye (left and right in the picture) and mouth, each [2].

    points: [68, 2] in the iBUG order, [5, 2] eyes, nose and mouth corners, or [3, 2]
        eyes and mouth.
    """
    points = np.asarray(points, np.float64)
    if points.shape == (68, 2):
        mouth = (points[48] + points[54]) * 0.5
        return points[36:42].mean(0), points[42:48].mean(0), mouth
    if points.shape == (5, 2):
        return points[0], points[1], (points[3] + points[4]) * 0.5
    if points.shape == (3, 2):
        return points[0], points[1], points[2]
    raise UserError(
        f"landmarks have the shape {list(points.shape)}; they must be 68, 5 or 3 "
        "points of x and y"
    )


def ffhq_quad(points: np.ndarray) -> np.ndarray:
    """Corners [4, 2] of the FFHQ crop in the picture; see `Alignment`."""
    left, right, mouth = anchors(points)
    eyes = (left + right) * 0.5
    across, down = right - left, mouth - eyes
    x = across + down[::-1] * [1, -1]
    length = np.hypot(*x)
    if not np.isfinite(length) or length < 1e-6:
        raise UserError("the landmarks of the eyes and the mouth coincide; " + WAYS_OUT)
    x *= max(np.hypot(*across) * 2.0, np.hypot(*down) * 1.8) / length
    y = x[::-1] * [-1, 1]
    center = eyes + down * 0.1
    return np.stack([center - x - y, center - x + y, center + x + y, center + x - y])


def prepare_source(
    image: Image.Image, quad: np.ndarray, size: int
) -> tuple[Image.Image, np.ndarray]:
    """The part of a picture that a crop needs, and the quad in it.

    Large pictures are shrunk, the surroundings cut off, and what the crop lacks
    beyond the border is filled by reflection that fades to a blurred median colour.
    """
    quad = np.array(quad, np.float64)
    side = float(np.hypot(*(quad[3] - quad[0])))
    shrink = int(np.floor(side / size * 0.5))
    if shrink > 1:
        image = image.resize(
            [max(1, int(np.rint(n / shrink))) for n in image.size],
            Image.Resampling.LANCZOS,
        )
        quad /= shrink
        side /= shrink

    border = max(int(np.rint(side * 0.1)), 3)
    low = np.floor(quad.min(0)).astype(int) - border
    high = np.ceil(quad.max(0)).astype(int) + border
    box = (*np.maximum(low, 0).tolist(), *np.minimum(high, image.size).tolist())
    if box[0] >= box[2] or box[1] >= box[3]:
        raise UserError("the face lies outside of the picture; " + WAYS_OUT)
    if box[2] - box[0] < image.width or box[3] - box[1] < image.height:
        image = image.crop(box)
        quad -= box[:2]

    low = np.floor(quad.min(0)).astype(int)
    high = np.ceil(quad.max(0)).astype(int)
    pad = np.maximum([*(border - low), *(high - image.size + border)], 0)
    if pad.max() > border - 4:
        pad = np.maximum(pad, int(np.rint(side * 0.3)))
        image = _pad(image, pad, side * 0.02)
        quad += pad[:2]
    return image, quad


def _pad(image: Image.Image, pad: np.ndarray, blur: float) -> Image.Image:
    """Reflect by `pad` (left, top, right, bottom), softened towards the outside."""
    left, top, right, bottom = pad
    pixels = np.pad(
        np.asarray(image, np.float32), [(top, bottom), (left, right), (0, 0)], "reflect"
    )
    height, width = pixels.shape[:2]
    y, x = (axis.astype(np.float32)[..., None] for axis in np.ogrid[:height, :width])
    outside = np.maximum(
        1 - np.minimum(x / left, (width - 1 - x) / right),
        1 - np.minimum(y / top, (height - 1 - y) / bottom),
    )
    blurred = scipy.ndimage.gaussian_filter(pixels, [blur, blur, 0])
    pixels += (blurred - pixels) * np.clip(outside * 3 + 1, 0, 1)
    pixels += (np.median(pixels, axis=(0, 1)) - pixels) * np.clip(outside, 0, 1)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def align(image: Image.Image, landmarks: np.ndarray, size: int) -> Alignment:
    """Crop a face of an RGB picture as FFHQ's faces are cropped.

    landmarks: [68, 2], [5, 2] or [3, 2], see `anchors`.
    size: side of the crop in pixels.
    """
    quad = ffhq_quad(landmarks)
    source, inside = prepare_source(image, quad, size)
    crop = source.transform(
        (size, size),
        Image.Transform.QUAD,
        (inside + 0.5).ravel().tolist(),
        Image.Resampling.BILINEAR,
    )
    return Alignment(crop, quad)


def paste_back(
    image: Image.Image,
    crop: Image.Image,
    alignment: Alignment,
    feather: float = FEATHER,
) -> Image.Image:
    """Put a (changed) crop back into the picture it was cut from.

    crop: any square size.
    alignment: what cut the original crop.
    feather: width of the soft edge, as a part of the crop's side, 0 to 0.5.
    """
    if not 0 <= feather <= 0.5:
        raise UserError(f"feather is {feather}; it must be between 0 and 0.5")
    corner = alignment.quad[0] + 0.5
    axes = np.stack(
        [alignment.quad[3] - alignment.quad[0], alignment.quad[1] - alignment.quad[0]],
        1,
    )
    side = max(1, round(float(np.hypot(*axes[:, 0]))))
    if crop.width > side:
        crop = crop.resize((side, side), Image.Resampling.LANCZOS)

    low = np.clip(np.floor(alignment.quad.min(0)), 0, image.size).astype(int)
    high = np.clip(np.ceil(alignment.quad.max(0)) + 1, 0, image.size).astype(int)
    if (low >= high).any():
        return image.copy()
    inverse = np.linalg.inv(axes)
    offset = inverse @ (low - corner)
    width, height = high - low
    warped = crop.transform(
        (int(width), int(height)),
        Image.Transform.AFFINE,
        (np.column_stack([inverse, offset]) * crop.width).ravel().tolist(),
        Image.Resampling.BICUBIC,
    )
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    u, v = np.tensordot(inverse, [x, y], 1) + offset[:, None, None]
    inside = np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v))
    # Pixels at the very edge have no neighbours to be interpolated from.
    ramp = np.clip((inside - 1 / side) / max(feather, 1e-6), 0, 1)
    mask = (ramp * ramp * (3 - 2 * ramp))[..., None]

    result = np.array(image.convert("RGB"))
    window = result[low[1] : high[1], low[0] : high[0]]
    window[:] = np.rint(window + (np.asarray(warped, np.float32) - window) * mask)
    return Image.fromarray(result)


# Finding the face


def find_landmarks(
    image: Image.Image, detector: str = "embedded"
) -> tuple[np.ndarray, int]:
    """Landmarks [68, 2] of the largest face of an RGB picture, and how many there are.

    Raises `UserError` if there is no face, or if dlib is wanted and not installed.
    """
    if detector == "embedded":
        # Imported here: JAX takes a second, and `--no-align` has no use for it.
        from jaxstyle.landmarks import find_faces

        faces = [face.points for face in find_faces(image)]
    elif detector == "dlib":
        faces = _dlib_faces(image)
    else:
        raise UserError(f"detector is {detector!r}; it must be 'embedded' or 'dlib'")
    if not faces:
        other = "; or try --landmarks dlib" if detector == "embedded" else ""
        raise UserError(f"no face found; {WAYS_OUT}{other}")
    return max(faces, key=lambda points: np.ptp(points, axis=0).max()), len(faces)


def _dlib_faces(image: Image.Image) -> list[np.ndarray]:
    try:
        import dlib
        import face_recognition_models
    except ImportError as error:
        raise UserError(
            f"--landmarks dlib needs a package that is missing ({error}): "
            'pip install "jaxstyle[dlib]", or use --landmarks embedded'
        ) from None
    pixels = np.asarray(image)
    predictor = dlib.shape_predictor(
        str(face_recognition_models.pose_predictor_model_location())
    )
    boxes = dlib.get_frontal_face_detector()(pixels, 1)
    return [
        np.array([[point.x, point.y] for point in predictor(pixels, box).parts()])
        for box in boxes
    ]


def read_landmarks(
    path: str | os.PathLike, picture: str | os.PathLike = ""
) -> np.ndarray:
    """Landmarks [68, 2], [5, 2] or [3, 2] of a .npy, .txt or .json file.

    A .json file holds a list of points, or a dict with one under "landmarks". If `path`
    is a folder, the file in it is named as `picture`.
    """
    path = place(path)
    if path.is_dir():
        stem = epath.Path(picture).stem
        files = [path / (stem + suffix) for suffix in (".npy", ".txt", ".json")]
        path = next((file for file in files if file.is_file()), files[0])
    if not path.is_file():
        raise UserError(
            f"--landmarks {path}: no such file; it must be embedded, dlib, or a file "
            "of points"
        )
    try:
        if path.suffix == ".npy":
            points = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        elif path.suffix == ".json":
            points = json.loads(path.read_text())
            points = points["landmarks"] if isinstance(points, dict) else points
        else:
            points = [
                line.replace(",", " ").split()
                for line in path.read_text().splitlines()
                if line.strip()
            ]
        points = np.asarray(points, np.float64)
    except Exception as error:
        raise UserError(
            f"{path} is not a file of points ({one_line(error, 100)}); write one point "
            "x y a line"
        ) from None
    if points.shape not in [(68, 2), (5, 2), (3, 2)] or not np.isfinite(points).all():
        raise UserError(
            f"{path} holds an array of shape {list(points.shape)}; it must be 68, 5 or "
            "3 finite points of x and y"
        )
    return points


def points_by_hand(eyes: tuple[str, str], mouth: str) -> np.ndarray:
    """[3, 2] from the texts of `--eyes` and `--mouth`.

    The eyes may come in either order: seen along the face, the mouth is below them.
    """
    left, right, below = (
        _point("--eyes", eyes[0]),
        _point("--eyes", eyes[1]),
        _point("--mouth", mouth),
    )
    across, down = right - left, below - (left + right) / 2
    if across[0] * down[1] - across[1] * down[0] < 0:
        left, right = right, left
    return np.stack([left, right, below])


def _point(option: str, text: str) -> np.ndarray:
    try:
        point = np.array([float(number) for number in text.split(",")])
    except ValueError:
        point = np.empty(0)
    if point.shape != (2,) or not np.isfinite(point).all():
        raise UserError(f"{option} has {text!r}; a point is written x,y, as 120,95")
    return point


def prepare(
    path: str | os.PathLike, size: int, options: AlignOptions | None = None
) -> tuple[Image.Image, Alignment]:
    """Read a picture and crop its face: what every command does with a photo.

    Returns the crop [size x size] and its alignment, for `paste_back`. Says on stderr
    when there are several faces, or when an unaligned picture has to be cropped.
    """
    options = options or AlignOptions()
    if (options.eyes is None) != (options.mouth is None):
        raise UserError(
            "--eyes and --mouth belong together: --eyes x,y x,y --mouth x,y"
        )
    told = options.eyes or options.landmarks != AlignOptions.landmarks
    if told and not options.align:
        what = "--eyes and --mouth say" if options.eyes else "--landmarks says"
        raise UserError(
            f"{what} where the face is, --no-align takes the picture as it is; leave "
            "one of them out"
        )
    image = images.open_image(path)
    if not options.align:
        alignment = _center_crop(image, size, path)
        return alignment.crop, alignment
    if options.eyes and options.mouth:
        points = points_by_hand(options.eyes, options.mouth)
    elif options.landmarks in ("embedded", "dlib"):
        try:
            points, count = find_landmarks(image, options.landmarks)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if count > 1:
            print(f"{path}: {count} faces found, the largest is used", file=sys.stderr)
    else:
        points = read_landmarks(options.landmarks, path)
    try:
        alignment = align(image, points, size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return alignment.crop, alignment


def _center_crop(image: Image.Image, size: int, path: str | os.PathLike) -> Alignment:
    """The centred square, with the quad that an alignment of it would have."""
    side = min(image.size)
    if image.width != image.height:
        print(
            f"{path}: {image.width} x {image.height} pixels, not square; its centre is "
            "used",
            file=sys.stderr,
        )
    left, top = (image.width - side) // 2, (image.height - side) // 2
    crop = images.center_square(image)
    if side != size:
        crop = crop.resize((size, size), Image.Resampling.LANCZOS)
    corners = np.array([[0, 0], [0, side], [side, side], [side, 0]], np.float64)
    return Alignment(crop, corners + [left - 0.5, top - 0.5])


# Command line


@dataclass(frozen=True)
class Options:
    """Crop faces as FFHQ's faces are cropped, which is what the networks expect."""

    photo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PHOTO")]
    """A picture, or a folder of pictures."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A picture file for one photo, else a folder: NAME.png for each photo."""
    size: int = 1024
    """Side of the crops in pixels."""
    align: Annotated[AlignOptions, tyro.conf.OmitArgPrefixes] = AlignOptions()


def _outputs(
    options: Options, paths: list[epath.Path], folder: bool
) -> list[epath.Path]:
    """The file of each crop; refuses one that would take the place of a photo."""
    out = epath.Path(options.out)
    is_file = bool(out.suffix) and not out.is_dir()
    if folder and is_file and out.suffix.lower() in images.SUFFIXES:
        raise UserError(
            f"OUT is {out}, one picture, but {options.photo} is a folder of photos; "
            "name a folder"
        )
    if is_file and not folder:
        images.image_format_of(out)
        outs = [out]
    else:
        outs = [out / f"{name}.png" for name in images.file_names(paths)]
    photos = {path.resolve() for path in paths}
    for file in outs:
        if file.resolve() in photos:
            raise UserError(
                f"OUT is {out}: the crop would overwrite the photo {file}; name "
                "another file or folder"
            )
    return outs


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m jaxstyle.align`."""
    options = parse(Options, "jaxstyle.align", None, args)
    if options.align.align:
        from jaxstyle.cache import use_compilation_cache

        use_compilation_cache()
    if not 8 <= options.size <= 4096:
        raise UserError(f"--size is {options.size}; it must be between 8 and 4096")
    paths = images.image_files(options.photo)
    folder = place(options.photo).is_dir()
    if len(paths) > 1:
        if options.align.eyes or options.align.mouth:
            raise UserError(
                f"--eyes and --mouth are for one picture, but {options.photo} holds "
                f"{len(paths)}; use --landmarks FOLDER"
            )
    outs = _outputs(options, paths, folder)
    done = 0
    for path, out in zip(paths, outs, strict=True):
        try:
            crop, _ = prepare(path, options.size, options.align)
        except UserError as error:
            if not folder:
                raise
            print(f"left out: {one_line(error)}", file=sys.stderr)
            continue
        print(images.save_image(out, crop))
        done += 1
    if folder:
        print(f"{done} of {len(paths)} pictures aligned", file=sys.stderr)
    if not done:
        raise UserError(f"none of the {len(paths)} pictures could be aligned")


if __name__ == "__main__":
    main()
