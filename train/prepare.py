"""A folder of pictures as a data set that is read fast and by many hosts.

    python -m train.prepare photos/ data/ffhq256 --size 256
    python -m train.psp --data data/ffhq256

Crops the pictures to squares, shrinks them to `--size`, encodes them once (PNG, or
JPEG with `--jpeg 95`) and writes array_record files with TFDS, which needs no
TensorFlow. The folder OUT is then taken by `--data` of every command; TFDS itself reads
it with `tfds.builder_from_directory("OUT/pictures/1.0.0")`.

With `--source FOLDER` each picture wanted keeps the input of the same name beside it
(sketches, label maps), in the input's own size and colours.

A picture that cannot be read is reported by name and left out, up to `--max-broken`.
Nothing is written under OUT's name before all of it is.
"""

import contextlib
import dataclasses
import functools
import io
import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image
from tqdm import tqdm

from jaxstyle.errors import UserError, cli
from jaxstyle.images import center_square, open_image, open_labels
from jaxstyle.options import parse
from train import data

NAME = "pictures"


@dataclasses.dataclass(frozen=True)
class Options:
    """Write a data set."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of pictures."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to make; it must not exist."""
    size: int = 256
    """Pixels a side; smaller pictures are not enlarged before they are read."""
    source: str = ""
    """Folder of inputs with the same names: pairs."""
    labels: bool = False
    """The inputs are label maps: classes as grey values or palette indices."""
    jpeg: int = 0
    """JPEG quality of the pictures wanted; 0: PNG."""
    workers: int = 0
    """Processes that decode and encode; 0: this one alone."""
    max_broken: int = 10
    """Pictures that may be unreadable; one more is an error."""


def encode(files: tuple[Path, ...], *, options: Options) -> dict[str, bytes] | str:
    """The features of one example as encoded pictures, or why it cannot be read.

    Args:
      files: the picture wanted, and its input if there is one.
      options: size, format and whether inputs are label maps.
    """
    try:
        picture = center_square(open_image(files[0]))
        inputs = [(open_labels if options.labels else open_image)(f) for f in files[1:]]
    except UserError as error:
        return str(error)
    side = min(options.size, picture.width)
    picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    kind = {"format": "JPEG", "quality": options.jpeg} if options.jpeg else {}
    example = {"image": _bytes(picture, **({"format": "PNG"} | kind))}
    if inputs:
        example["source"] = _bytes(inputs[0], format="PNG")
    return example


def _bytes(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def examples(options: Options) -> Iterator[tuple[int, dict[str, Any]]]:
    """Examples in the order of the names, broken ones left out.

    Raises:
      UserError: more broken ones than `--max-broken`.
    """
    if options.source:
        pairs = data.open_pairs(
            str(options.folder), options.source, labels=options.labels
        )
        files = list(zip(pairs.target.files, pairs.source.files, strict=True))
    else:
        files = [(f,) for f in data.Folder(str(options.folder)).files]
    encoder = functools.partial(encode, options=options)
    broken = 0
    with contextlib.ExitStack() as stack:
        run = map(encoder, files)
        if options.workers:
            pool = multiprocessing.get_context("spawn").Pool(options.workers)
            run = _in_pool(stack.enter_context(pool), encoder, files, options.workers)
        for i, example in enumerate(tqdm(run, total=len(files), unit="picture")):
            if isinstance(example, dict):
                yield i, {k: io.BytesIO(v) for k, v in example.items()}
                continue
            broken += 1
            if broken > options.max_broken:
                raise UserError(
                    f"{example}; number {broken} of such, --max-broken is "
                    f"{options.max_broken}"
                )
            tqdm.write(f"left out: {example}", file=sys.stderr)


def _in_pool(pool: Any, encoder: Any, files: list, workers: int) -> Iterator[Any]:
    """Encoded files in order, a part at a time: few wait to be written."""
    part = 64 * workers
    for start in range(0, len(files), part):
        yield from pool.imap(encoder, files[start : start + part], 8)


def write(options: Options) -> int:
    """Write the data set; how many examples it holds."""
    import tensorflow_datasets as tfds

    image = tfds.features.Image(
        shape=(None, None, 3), encoding_format="jpeg" if options.jpeg else "png"
    )
    features = {"image": image}
    if options.source:
        channels = 1 if options.labels else 3
        features["source"] = tfds.features.Image(shape=(None, None, channels))

    class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Pictures of a folder."""

        VERSION = tfds.core.Version("1.0.0")
        name = NAME

        def _info(self):
            # Not from configs: those are looked for beside a module, not a command.
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{options.folder.name}, at most {options.size} px",
                features=tfds.features.FeaturesDict(features),
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            return examples(options)

    tfds.disable_progress_bar()
    out = options.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        builder = Pictures(data_dir=temporary, file_format="array_record")
        # It tells of the temporary folder.
        with contextlib.redirect_stdout(None):
            builder.download_and_prepare()
        shutil.rmtree(temporary / "downloads", ignore_errors=True)
        temporary.chmod(0o755)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return builder.info.splits["train"].num_examples


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.prepare`."""
    options = parse(Options, "train.prepare", __doc__, args)
    if options.out.exists():
        raise UserError(f"{options.out} exists already; choose another OUT")
    if options.size < 1 or not 0 <= options.jpeg <= 100:
        raise UserError(
            f"--size is {options.size} and --jpeg {options.jpeg}; --size must be at "
            "least 1, --jpeg from 0 to 100"
        )
    count = write(options)
    print(
        f"{count} examples in {options.out}; now: --data {options.out}, or "
        f"--data tfds:{NAME}:train --tfds-folder {options.out}"
    )


if __name__ == "__main__":
    main()
