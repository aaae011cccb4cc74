"""Pictures for training, through grain: folders, pairs of folders, arrays, TFDS sets.

The order of the samples is a function of the seed and the global index alone, and so is
everything random about a sample. Every process reads its own rows of each global batch,
and the position is one number, so a run resumes at the same picture on any number of
processes and workers. Only a few batches are in memory at a time.

A picture that cannot be read is reported by name once, and the next one takes its
place; too many of them end the run.
"""

import dataclasses
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import grain
import numpy as np
import tyro
from absl import flags
from etils import epath
from jax.sharding import Mesh
from PIL import Image

from jaxstyle.errors import UserError
from jaxstyle.images import image_files, open_image, open_labels, to_array
from jaxstyle.paths import is_remote, place
from train.sharding import process_rows

# How far to look for a readable picture after a broken one.
TRIES = 16


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How pictures are read."""

    workers: int = 0
    """Processes that decode pictures; 0: threads of this one."""
    max_broken: int = 10
    """Pictures that may be unreadable (each process counts its own); one more is an
    error."""
    tfds_folder: str = ""
    """Where TFDS keeps its data sets; empty: its usual place."""


Reading = Annotated[ReadOptions, tyro.conf.OmitArgPrefixes]

# Sources: sequences of `PIL.Image`, with `name(index)` for messages and `stamp()`, a
# text that changes with their contents.


class Folder(Sequence):
    """The pictures of a folder in natural order; `labels` reads label maps, mode L."""

    def __init__(self, path: str, labels: bool = False):
        self.files, self.labels = image_files(path), labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:
        return (open_labels if self.labels else open_image)(self.files[index])

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.files[index])

    def stamp(self) -> str:
        """Names and sizes of the files."""
        return " ".join(f"{f.name} {f.stat().length}" for f in self.files)


class ArrayFile(Sequence):
    """A `.npy` file of uint8 pictures [n, height, width, 3], memory-mapped."""

    def __init__(self, path: str):
        if is_remote(path):
            raise UserError(
                f"--data {path}: a .npy file is mapped into memory and must be on this "
                "machine; name a folder of pictures, or one from train.prepare"
            )
        try:
            self.array, self.path = np.load(path, mmap_mode="r"), path
        except (OSError, ValueError) as error:
            raise UserError(f"--data {path} is not a .npy file: {error}") from None
        if (
            self.array.dtype != np.uint8
            or self.array.ndim != 4
            or self.array.shape[-1] != 3
        ):
            raise UserError(
                f"--data {path} holds {self.array.dtype} {list(self.array.shape)}; it "
                "must be uint8 [n, height, width, 3]"
            )

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(np.array(self.array[index]))

    def name(self, index: int) -> str:
        """Which picture of the file."""
        return f"{self.path}[{index}]"

    def stamp(self) -> str:
        """Nothing: length and first picture tell."""
        return ""

    def __getstate__(self):
        return {"path": self.path}

    def __setstate__(self, state):
        # A worker maps the file again; pickling would copy the whole array.
        self.__init__(state["path"])


class TfdsPictures(Sequence):
    """A feature, usually `image`, of a TFDS data set in array_record form."""

    def __init__(self, data: str, folder: str = "", feature: str = "image"):
        from tensorflow_datasets.core.decode import SkipDecoding

        builder, where, split = _tfds_builder(data, folder)
        if feature not in builder.info.features:
            raise UserError(
                f"{where} has no feature {feature!r}, only "
                + ", ".join(builder.info.features)
            )
        # TFDS would decode all features, and ask for OpenCV.
        raw = {name: SkipDecoding() for name in builder.info.features}
        try:
            self.source = builder.as_data_source(split=split, decoders=raw)
        except ValueError as error:
            splits = ", ".join(builder.info.splits)
            raise UserError(
                f"{where}:{split}: no such split ({error}); it has {splits}"
            ) from None
        self.arguments, self.features = (data, folder, feature), builder.info.features

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Image.Image:
        if index >= len(self):
            raise IndexError(index)
        try:
            with Image.open(io.BytesIO(self.source[index][self.arguments[2]])) as image:
                return image.copy() if image.mode == "L" else image.convert("RGB")
        except Exception as error:
            # Decoders fail in many ways; all mean the same to the user.
            raise UserError(f"{self.name(index)} is damaged ({error})") from None

    def name(self, index: int) -> str:
        """Which example of the set."""
        return f"{self.arguments[0]}[{index}]"

    def stamp(self) -> str:
        """Nothing: length and first picture tell."""
        return ""

    def __getstate__(self):
        return self.arguments

    def __setstate__(self, arguments):
        self.__init__(*arguments)


def _tfds_builder(data: str, folder: str) -> tuple[Any, str, str]:
    """The builder of `tfds:NAME:SPLIT` or of a prepared folder, its name, the split."""
    from tensorflow_datasets.core import registered
    from tensorflow_datasets.core.read_only_builder import (
        builder_from_directory,
        builder_from_files,
    )

    if not data.startswith("tfds:"):
        prepared = _prepared_folder(data)
        return builder_from_directory(str(prepared)), f"--data {data}", "train"
    _, name, *split = data.split(":")
    again = f"tfds build {name} --file_format=array_record" + (
        f" --data_dir={folder}" if folder else ""
    )
    # The prepared files alone: the code that made them may need TensorFlow.
    try:
        builder = builder_from_files(name, data_dir=folder or None)
    except registered.DatasetNotFoundError:
        raise UserError(
            f"--data tfds:{name} is not prepared on this machine; prepare it with: "
            + again
        ) from None
    form = builder.info.file_format.value
    if form != "array_record":
        raise UserError(
            f"--data tfds:{name} is stored as {form}, which needs TensorFlow to "
            f"read; prepare it anew with: {again}"
        )
    return builder, f"--data tfds:{name}", ":".join(split) or "train"


def _prepared_folder(data: str) -> epath.Path | None:
    """Where in the folder `data` is the set that `train.prepare` wrote, if any."""
    found = sorted(place(data).glob("*/*/dataset_info.json"))
    return found[-1].parent if found else None


class Pairs(Sequence):
    """Two sources side by side: (source, target) pictures."""

    def __init__(self, source: Sequence, target: Sequence):
        if len(source) != len(target):
            raise UserError(
                f"--source holds {len(source)} pictures and --data {len(target)}; they "
                "must be pairs"
            )
        self.source, self.target = source, target

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        return self.source[index], self.target[index]

    def name(self, index: int) -> str:
        """The target's name."""
        return self.target.name(index)

    def stamp(self) -> str:
        """Both stamps."""
        return f"{self.source.stamp()} | {self.target.stamp()}"


class Sized(Sequence):
    """A source's pictures cropped to squares, float32 [size, size, 3] in [-1, 1]."""

    def __init__(self, source: Sequence, size: int):
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        return to_array(self.source[index], self.size)

    def name(self, index: int) -> str:
        """The source's."""
        return self.source.name(index)

    def stamp(self) -> str:
        """The source's."""
        return self.source.stamp()


def open_pictures(data: str, tfds_folder: str = "") -> Sequence:
    """The pictures that `--data` names, as `PIL.Image`.

    Args:
      data: a folder of pictures, one that `train.prepare` wrote, a `.npy` file, or
        `tfds:NAME:SPLIT`.
      tfds_folder: where TFDS keeps its sets, when not in its usual place.

    Raises:
      UserError: nothing there, or a form that cannot be read.
    """
    if data.startswith("tfds:") or _prepared_folder(data):
        return TfdsPictures(data, tfds_folder)
    return ArrayFile(data) if data.endswith(".npy") else Folder(data)


def open_source(data: str, size: int, tfds_folder: str = "") -> Sized:
    """The pictures of `open_pictures`, as arrays [size, size, 3]."""
    return Sized(open_pictures(data, tfds_folder), size)


def open_pairs(
    data: str, source: str = "", *, labels: bool = False, tfds_folder: str = ""
) -> Pairs:
    """Pairs of an encoder's input and the picture wanted.

    Args:
      data: pictures wanted, as in `open_pictures`.
      source: folder (or other data) of inputs; in folders, files of the same name but
        for the ending belong together. Empty: the feature `source` of a set that
        `train.prepare` wrote with one, else the pictures themselves.
      labels: whether the inputs are label maps.
      tfds_folder: see `open_pictures`.

    Raises:
      UserError: see `open_pictures`; a picture wanted that has no input.
    """
    target = open_pictures(data, tfds_folder)
    if not source:
        if isinstance(target, TfdsPictures):
            if "source" in target.features:
                return Pairs(TfdsPictures(data, tfds_folder, "source"), target)
        return Pairs(target, target)
    if not isinstance(target, Folder) or not place(source).is_dir():
        return Pairs(open_pictures(source, tfds_folder), target)
    inputs = Folder(source, labels)
    by_stem = {file.stem: file for file in inputs.files}
    missing = [f.name for f in target.files if f.stem not in by_stem]
    if missing:
        raise UserError(
            f"--source {source} has no picture for {len(missing)} of the "
            f"{len(target)} in --data {data}, the first {missing[0]}; the names must "
            "agree up to the ending"
        )
    inputs.files = [by_stem[file.stem] for file in target.files]
    return Pairs(inputs, target)


def fingerprint(source: Sequence) -> str:
    """A digest that changes with the data set: its names, sizes and first picture."""
    state = hashlib.sha256(f"{len(source)} {source.stamp()}".encode())
    first = first_readable(source, 0, _as_it_is)[0]
    for part in first if isinstance(first, tuple) else [first]:
        state.update(np.ascontiguousarray(part).tobytes())
    return state.hexdigest()[:16]


Transform = Callable[[Any, np.random.Generator], Mapping[str, np.ndarray]]


def plain(image: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A picture [height, width, 3] as it is: {"image"}."""
    return {"image": image}


def _as_it_is(item: Any, rng: np.random.Generator) -> Any:
    return item


def mirrored(image: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Every second picture, at random, flipped left to right."""
    return {"image": image[:, ::-1] if rng.random() < 0.5 else image}


def first_readable(
    source: Sequence, index: int, transform: Transform = plain, seed: Any = 0
) -> tuple[Mapping[str, np.ndarray], int]:
    """The example at `index`, or the next that can be made.

    Args:
      source: of the items.
      index: where to look first.
      transform: of an item; see `batches`.
      seed: of the transform's draws.

    Returns:
      The example, and `index` if that one is broken, else -1.

    Raises:
      UserError: as many as `TRIES` in a row cannot be read.
    """
    n = len(source)
    for i in range(min(TRIES, n)):
        try:
            item = source[(index + i) % n]
            return transform(item, np.random.default_rng(seed)), index if i else -1
        except UserError as problem:
            error = problem
    raise UserError(f"{min(TRIES, n)} pictures in a row cannot be read: {error}")


class _Rows(Sequence):
    """This process's rows of the global batches from `first` on, one long sequence."""

    def __init__(
        self,
        source,
        order,
        batch: int,
        rows: np.ndarray,
        seed: int,
        transform: Transform,
    ):
        self.source, self.order, self.batch, self.rows = source, order, batch, rows
        self.seed, self.transform, self.first = seed, transform, 0
        self.local = len(rows)

    def __len__(self) -> int:
        return (len(self.order) // self.batch - self.first) * self.local

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, row = divmod(index, self.local)
        position = (self.first + step) * self.batch + int(self.rows[row])
        example, broken = first_readable(
            self.source,
            int(self.order[position]),
            self.transform,
            (self.seed, position),
        )
        return {k: np.asarray(v, order="C") for k, v in example.items()} | {
            "broken": np.int64(broken)
        }

    def problem(self, index: int) -> str:
        """What is wrong with a broken item, its file named: it is read once more."""
        name = self.source.name(index)
        try:
            item = self.source[index]
        except UserError as error:
            # It names the file, of a pair the one that is broken.
            return str(error)
        try:
            self.transform(item, np.random.default_rng(0))
        except UserError as error:
            return f"{name}: {error}"
        return f"{name} could not be read at first"


class Batches:
    """Iterator over this process's rows of the batches; see `batches`."""

    def __init__(self, rows: _Rows, reading: ReadOptions):
        self._rows, self._reading = rows, reading
        self._done, self._iterator = 0, None
        self._broken: set[int] = set()

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        self._done += 1
        self._report(batch.pop("broken"))
        if self._reading.workers:
            # Workers hand over shared memory, which must not outlive them.
            batch = {name: np.array(value) for name, value in batch.items()}
        return batch

    def _start(self):
        self._rows.first = self._done
        dataset = grain.MapDataset.source(self._rows).batch(self._rows.local)
        options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
        dataset = dataset.to_iter_dataset(options)
        if self._reading.workers:
            # Grain reads its flags, which no command of ours has.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._reading.workers, per_worker_buffer_size=2
                )
            )
        return iter(dataset)

    def _report(self, indices: np.ndarray) -> None:
        """Name what could not be read, once each."""
        for index in set(indices.tolist()) - self._broken - {-1}:
            self._broken.add(index)
            reason = self._rows.problem(index)
            count, limit = len(self._broken), self._reading.max_broken
            if count > limit:
                raise UserError(
                    f"{reason}; number {count} of such, --max-broken is {limit}: "
                    "repair or remove them, or raise it"
                )
            print(f"left out: {reason} ({count} of at most {limit})", flush=True)

    def get_state(self) -> dict[str, int]:
        """Batches given so far."""
        return {"batches": self._done}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Go on after so many batches, at once."""
        self.close()
        self._done = int(state["batches"])

    def close(self) -> None:
        """End the workers."""
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator = None


def batches(
    source: Sequence,
    batch: int,
    mesh: Mesh,
    *,
    seed: int,
    transform: Transform = plain,
    shuffle: bool = True,
    reading: ReadOptions = ReadOptions(),
) -> Batches:
    """Batches without end, an iterator with `get_state` and `set_state`.

    Args:
      source: pictures, arrays [height, width, 3] or whatever `transform` takes.
      batch: global batch.
      mesh: says which rows this process supplies.
      seed: of the order (new each epoch) and of the transform's draws.
      transform: item and a generator of its own to a dict of arrays. With worker
        processes it must be picklable: a function of a module, or a partial of one.
      shuffle: false keeps the source's order.
      reading: workers, and how many pictures may be broken.

    Returns:
      Iterator over dicts of this process's rows [local_batch, ...].

    Raises:
      UserError: fewer pictures than the batch, or a batch the mesh cannot split.
    """
    rows = process_rows(mesh, batch)
    if len(source) < batch:
        raise UserError(
            f"--batch is {batch}, but --data holds only {len(source)} pictures; use a "
            "smaller batch or more pictures"
        )
    order = grain.MapDataset.range(len(source))
    # Not without end: grain rounds the number of batches as a float.
    order = (order.shuffle(seed=seed) if shuffle else order).repeat(
        2**50 // len(source)
    )
    return Batches(_Rows(source, order, batch, rows, seed, transform), reading)
