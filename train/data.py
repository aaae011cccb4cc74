"""Pictures for training: a folder, an array file, or a TFDS data set, through grain.

The order of the samples is a function of the seed and the global index alone. Every
process reads its own rows of each global batch, and the position is one number, so a
run resumes at the same picture on any number of processes.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from jaxstyle.errors import UserError
from jaxstyle.images import image_files, open_image, to_array
from train.sharding import process_rows


class Folder(Sequence):
    """The pictures of a folder, each [size, size, 3] float32 in [-1, 1]."""

    def __init__(self, path: str, size: int):
        self.files, self.size = image_files(path), size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        return to_array(open_image(self.files[index]), self.size)


class ArrayFile(Sequence):
    """A `.npy` file of uint8 pictures [n, height, width, 3], memory-mapped."""

    def __init__(self, path: str, size: int):
        try:
            self.array, self.size = np.load(path, mmap_mode="r"), size
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

    def __getitem__(self, index: int) -> np.ndarray:
        return to_array(Image.fromarray(np.array(self.array[index])), self.size)


class TfdsPictures(Sequence):
    """The `image` feature of a TFDS data set in array_record form."""

    def __init__(self, name: str, split: str, size: int, folder: str | None):
        from tensorflow_datasets.core import registered
        from tensorflow_datasets.core.read_only_builder import builder_from_files

        again = f"tfds build {name} --file_format=array_record" + (
            f" --data_dir={folder}" if folder else ""
        )
        # The prepared files alone: the code that made them may need TensorFlow.
        try:
            builder = builder_from_files(name, data_dir=folder)
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
        if "image" not in builder.info.features:
            raise UserError(
                f"--data tfds:{name} has no feature 'image', only "
                + ", ".join(builder.info.features)
            )
        try:
            self.source = builder.as_data_source(split=split)
        except ValueError as error:
            splits = ", ".join(builder.info.splits)
            raise UserError(
                f"--data tfds:{name}:{split}: no such split ({error}); it has {splits}"
            ) from None
        self.size = size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        image = np.asarray(self.source[index]["image"])
        if image.shape[-1] == 1:
            image = image.repeat(3, -1)
        return to_array(Image.fromarray(image), self.size)


def open_source(data: str, size: int, tfds_folder: str | None = None) -> Sequence:
    """The pictures that `--data` names, resized to [size, size, 3].

    Args:
      data: a folder of pictures, a `.npy` file, or `tfds:NAME:SPLIT`.
      size: picture size.
      tfds_folder: where TFDS keeps its sets, when not in its usual place.

    Raises:
      UserError: nothing there, or a form that cannot be read.
    """
    if data.startswith("tfds:"):
        _, name, *split = data.split(":")
        return TfdsPictures(name, ":".join(split) or "train", size, tfds_folder)
    if data.endswith(".npy"):
        return ArrayFile(data, size)
    return Folder(data, size)


def fingerprint(source: Sequence) -> str:
    """A digest that changes with the data set: its names, sizes and first picture."""
    state = hashlib.sha256(str(len(source)).encode())
    for file in getattr(source, "files", ()):
        state.update(f"{file.name} {file.stat().st_size}".encode())
    state.update(np.ascontiguousarray(source[0]).tobytes())
    return state.hexdigest()[:16]


class _Rows(Sequence):
    """This process's rows of every global batch, as one long sequence."""

    def __init__(self, order, batch: int, rows: slice, seed: int, mirror: bool):
        self.order, self.batch, self.rows = order, batch, rows
        self.seed, self.mirror = seed, mirror
        self.local = rows.stop - rows.start

    def __len__(self) -> int:
        return len(self.order) // self.batch * self.local

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, row = divmod(index, self.local)
        position = step * self.batch + self.rows.start + row
        image = self.order[position]
        if self.mirror and np.random.default_rng((self.seed, position)).random() < 0.5:
            image = image[:, ::-1]
        return {"image": image}


def batches(
    source: Sequence, batch: int, mesh: Mesh, *, seed: int, mirror: bool = False
) -> Any:
    """Shuffled batches without end, an iterator with `get_state` and `set_state`.

    Args:
      source: pictures [height, width, 3].
      batch: global batch.
      mesh: says which rows this process supplies.
      seed: of the order (new each epoch) and of the mirroring.
      mirror: flip every second picture, at random, left to right.

    Returns:
      Iterator over {"image": [local_batch, height, width, 3]} float32.

    Raises:
      UserError: fewer pictures than the batch, or a batch the mesh cannot split.
    """
    rows = process_rows(mesh, batch)
    if len(source) < batch:
        raise UserError(
            f"--batch is {batch}, but --data holds only {len(source)} pictures; use a "
            "smaller batch or more pictures"
        )
    order = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
    local = _Rows(order, batch, rows, seed, mirror)
    dataset = grain.MapDataset.source(local).batch(rows.stop - rows.start)
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(options))
