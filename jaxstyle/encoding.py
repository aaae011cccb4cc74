"""Encoders at work: what they read of files, and the codes they give.

An encoder reads photos, drawings or label maps; which shows in its channels, or in the
metadata of the run it comes from.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array
from tqdm import tqdm

from jaxstyle import images, inputs, pipeline, weights
from jaxstyle.align import AlignOptions, prepare
from jaxstyle.encoders import encode, refine
from jaxstyle.errors import UserError
from jaxstyle.stylegan2 import Generator, Params

RESTYLE = 5
"""Published number of refinements of ReStyle's encoders."""
CROP_SIZE = 256
"""Faces are cut out at least as large as encoders read them, without jagged edges."""


class Encoder(NamedTuple):
    """An encoder that fits a generator.

    Attributes:
      module, params: the network.
      space: of its codes, `w_plus` or `z_plus`.
      inputs: what it reads: photo, sketch or labels.
      where: the folder it comes from.
    """

    module: nn.Module
    params: Params
    space: str
    inputs: str
    where: str

    @property
    def refines(self) -> bool:
        """Whether it is one of ReStyle's: it also sees what the codes so far give."""
        return self.module.in_channels == 6 and self.inputs == "photo"

    def rows(self, size: int) -> tuple[int, int]:
        """Rows that it sees, first and one after the last, of pictures of `size`."""
        seen = getattr(self.module, "rows", ()) or (0, self.module.size)
        return tuple(round(n * size / self.module.size) for n in seen)

    @property
    def sees_band(self) -> bool:
        """Whether it sees some rows only: whole wide pictures lie there, as cars do."""
        return self.rows(self.module.size) != (0, self.module.size)


# Names of tasks and of inputs in a run's metadata; the rest shows in the channels.
_LABELS = ("labels", "celebs_seg_to_face")


def load_encoder(path: str, generator: Generator, network: str = "encoder") -> Encoder:
    """An encoder for a generator.

    Args:
      path: its folder.
      generator: the architecture.
      network: its name there: a converted DualStyleGAN style may hold a second one,
        `encoder_w_plus`.

    Raises:
      UserError: no encoder there, or one of another number of rows or width.
    """
    model, params = weights.load(path)
    encoder = model[network]
    if (encoder.num_styles, encoder.w_dim) != (generator.num_ws, generator.w_dim):
        raise UserError(
            f"encoder {path} gives {encoder.num_styles} codes of {encoder.w_dim}; the "
            f"{generator.size} px generator takes {generator.num_ws} of "
            f"{generator.w_dim}: name the generator it was trained for with --weights, "
            "or use --encoder optimize"
        )
    metadata = weights.read_config(path)["metadata"]
    task = metadata.get("inputs") or metadata.get("task")
    if task in _LABELS or encoder.in_channels not in (1, 3, 6):
        inputs = "labels"
    else:
        inputs = "sketch" if encoder.in_channels == 1 else "photo"
    # The metadata speak of the first.
    z_plus = network == "encoder" and metadata.get("space") == "z_plus"
    space = "z_plus" if z_plus else "w_plus"
    return Encoder(encoder, params[network], space, inputs, path)


@partial(jax.jit, static_argnames=("encoder", "generator", "space", "restyle"))
def _encode(encoder, values, generator, params, x, *, space, restyle):
    """Pictures at the encoder's size to w+; `restyle` above 0 refines them."""
    if restyle:
        return refine(encoder, values, generator, params, x, restyle)
    codes = encode(encoder, values, x)
    if space != "z_plus":
        return codes
    rows = codes.reshape(-1, codes.shape[-1])
    rows = generator.apply({"params": params}, rows, method="mapping")
    return rows.reshape(codes.shape)


def encode_pictures(
    encoder: Encoder,
    generator: Generator,
    params: Params,
    pictures: Array,
    *,
    restyle: int = RESTYLE,
    batch: int = 4,
) -> np.ndarray:
    """Codes of pictures by an encoder.

    Args:
      encoder: see `load_encoder`.
      generator: the architecture.
      params: its parameters.
      pictures: [n, h, h, channels] as the encoder reads them; see `jaxstyle.inputs`.
      restyle: refinements, if it is one of ReStyle's.
      batch: pictures at a time.

    Returns:
      w_plus [n, num_ws, w_dim].

    Raises:
      UserError: photos for an encoder that reads something else.
    """
    wanted = 3 if encoder.refines else encoder.module.in_channels
    if pictures.shape[-1] != wanted:
        raise UserError(
            f"encoder {encoder.where} reads {encoder.inputs}, {wanted} channels, not "
            f"pictures of {pictures.shape[-1]}"
        )
    run = partial(_encode, encoder.module, encoder.params, generator, params)
    steps = restyle if encoder.refines else 0
    return pipeline.in_batches(
        lambda x: run(x, space=encoder.space, restyle=steps),
        pipeline.resize(jnp.asarray(pictures, jnp.float32), encoder.module.size),
        batch,
    )


class Item(NamedTuple):
    """A picture to invert.

    Attributes:
      name: for file names.
      path: of the file.
      x: what goes in, [h, h, channels].
      shown: for sheets, pictures by label.
    """

    name: str
    path: epath.Path
    x: np.ndarray
    shown: dict[str, np.ndarray]


class Reading(NamedTuple):
    """How picture files become what goes in.

    Attributes:
      inputs: photo, sketch or labels.
      size: pixels a side.
      classes: of label maps.
      nearest: see `inputs.label_map`.
      factors: photos are made smaller by each; empty: left alone.
      align: how the face of a photo is found.
      rows: the whole photo goes into those of the square, and no face is looked for;
        empty: faces.
    """

    inputs: str
    size: int
    classes: int = 0
    nearest: bool = False
    factors: tuple[int, ...] = ()
    align: AlignOptions = AlignOptions()
    rows: tuple[int, ...] = ()


def read_items(paths: Sequence[epath.Path], reading: Reading) -> Iterator[Item]:
    """The pictures as they go in, one after the other.

    Of a folder, what cannot be used (no face, damaged, unknown classes) is named and
    left out.

    Args:
      paths: of the files.
      reading: see there.

    Raises:
      UserError: a single picture that cannot be used.
    """
    for path, name in zip(paths, images.file_names(paths), strict=True):
        try:
            yield from _read(path, name, reading)
        except UserError as error:
            if len(paths) == 1:
                raise
            tqdm.write(f"left out: {error}")


def _read(path: epath.Path, name: str, reading: Reading) -> list[Item]:
    kind, size = reading.inputs, reading.size
    if kind == "sketch":
        x = inputs.drawing(images.open_image(path), size)
        return [Item(name, path, x, {kind: inputs.visible(x)})]
    if kind == "labels":
        labels = images.open_labels(path)
        try:
            x = inputs.label_map(labels, size, reading.classes, reading.nearest)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return [Item(name, path, x, {kind: inputs.visible(x)})]
    if reading.rows:
        crop = inputs.band(images.open_image(path), size, reading.rows)
    else:
        crop, _ = prepare(path, max(CROP_SIZE, size), reading.align)
    photo = images.to_array(crop, size)
    if not reading.factors:
        return [Item(name, path, photo, {"photo": photo})]
    small = {f: inputs.low_resolution(crop, size, f) for f in reading.factors}
    return [
        Item(f"{name}-x{f}", path, x, {"photo": photo, f"{f} x smaller": x})
        for f, x in small.items()
    ]
