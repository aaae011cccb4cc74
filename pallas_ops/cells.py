"""Cells: the layout in which the TPU kernels hold an activation.

A TPU works on 128 channels at once. Where a picture has fewer, `packing` neighbouring
columns share the channel axis: [batch, height, width, channels] becomes
[batch, height, width / packing, packing * channels], column-major in the channels. A
3×3 convolution of pixels is then a 3×3 convolution of cells, and an up-convolution
produces the finer layout as its output channels, so nothing is ever interleaved.

Only columns are packed. Rows are no tile dimension on a TPU: a kernel reads and writes
any of them at no cost.
"""

from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jax import Array

LANES = 128


def pack(x: Array, packing: int) -> Array:
    """[batch, height, width, channels] to [.., width / packing, packing * channels]."""
    *lead, width, channels = x.shape
    return x.reshape(*lead, width // packing, packing * channels)


def unpack(x: Array, packing: int) -> Array:
    """The inverse of `pack`."""
    *lead, width, channels = x.shape
    return x.reshape(*lead, width * packing, channels // packing)


def packing_of(channels: int) -> int:
    """Columns of a cell: as many as 128 lanes hold."""
    return max(1, LANES // channels)


@dataclass(frozen=True)
class Geometry:
    """A linear map of cells that looks one cell to every side.

    Attributes:
      packing_in, packing_out: columns of a cell.
      rows_in, rows_out: rows of a cell.
      up: an up-convolution with its blur (or, `adjoint`, that one's transpose).
      adjoint: the transpose: weights swap their channels, taps change sides.
    """

    packing_in: int
    packing_out: int
    up: bool = False
    adjoint: bool = False

    @property
    def rows_in(self) -> int:
        return 2 if self.up and self.adjoint else 1

    @property
    def rows_out(self) -> int:
        return 2 if self.up and not self.adjoint else 1

    @property
    def sided(self) -> bool:
        """Whether half a neighbour is all that a cell sees of it.

        Then both neighbours fit into one operand: the right one's first half and the
        left one's second.
        """
        reach = 2 if self.up and self.adjoint else 1
        return 2 * reach <= self.packing_in

    @property
    def pixels(self) -> bool:
        """Whether cells are pixels, and a convolution's taps its own."""
        return self.packing_in == self.packing_out == 1

    @property
    def transposed(self) -> "Geometry":
        """The geometry of the gradient with respect to the input."""
        return Geometry(self.packing_out, self.packing_in, self.up, not self.adjoint)

    @cached_property
    def columns(self) -> np.ndarray:
        """[operand, column in, column out, 3]: which tap joins two columns.

        Operands are the left neighbour, the cell and the right neighbour; or the cell
        and one made of both.
        """
        if self.adjoint:
            taps = _taps(self.packing_out, self.packing_in, self.up)
            taps = taps[::-1].swapaxes(1, 2)
        else:
            taps = _taps(self.packing_in, self.packing_out, self.up)
        if not self.sided:
            return taps
        first = np.arange(self.packing_in) < self.packing_in // 2
        side = np.where(first[:, None, None], taps[2], taps[0])
        return np.stack([taps[1], side])

    @cached_property
    def rows(self) -> np.ndarray:
        """[offset, row in, row out, 3], as `columns`."""
        taps = _taps(1, 2 if self.up else 1, self.up)
        return taps[::-1].swapaxes(1, 2) if self.adjoint else taps

    @cached_property
    def joined(self) -> np.ndarray:
        """[row out, row in, offset, operand, column in, column out, 3, 3].

        Rows and columns at once, so that weights of cells are one plain product: three
        factors in one einsum become convolutions over channels, on which the compiler
        for v6e spends minutes each.
        """
        return np.einsum("yrsu,tjnx->srytjnux", self.rows, self.columns)


def _taps(inside: int, outside: int, up: bool) -> np.ndarray:
    """[cell offset + 1, column in, column out, 3] of one axis, not adjoint."""
    taps = np.zeros((3, inside, outside, 3), np.float32)
    # The zero-inserted input under a flipped kernel and the blur [1, 3, 3, 1] / 4: six
    # taps, of which each output column sees every second.
    blurred = np.zeros((6, 3), np.float32)
    for tap in range(3):
        blurred[2 - tap : 6 - tap, tap] = np.array([1, 3, 3, 1]) / 4
    for cell in range(3):
        for i in range(inside):
            for o in range(outside):
                column = (cell - 1) * inside + i
                if up:
                    tap = column - o // 2 + 1
                    if 0 <= tap <= 2:
                        taps[cell, i, o] = blurred[2 * tap + 1 - o % 2]
                elif 0 <= column - o + 1 <= 2:
                    taps[cell, i, o, column - o + 1] = 1
    return taps


def cell_weight(weight: Array, geometry: Geometry) -> Array:
    """Weights of pixels [w, 3, 3, in, out] as weights of cells.

    Args:
      weight: of the convolution, also for its adjoint (which swaps the channels).
      geometry: of the cells.

    Returns:
      [w, rows_out, 1, rows_in, 3, operands, packing_in * in, packing_out * out].
    """
    if geometry.adjoint:
        weight = weight.swapaxes(3, 4)
    if geometry.pixels:
        weight = weight[:, ::-1, ::-1] if geometry.adjoint else weight
        return weight[:, None, None, None]
    count, _, _, depth, width = weight.shape
    *lead, inside, outside = geometry.joined.shape[:-2]
    cells = jnp.einsum(
        "kq,wqc->wkc",
        geometry.joined.reshape(-1, 9),
        weight.reshape(count, 9, depth * width),
        precision="highest",
    )
    cells = cells.reshape(count, *lead, inside, outside, depth, width)
    cells = cells.swapaxes(-3, -2)
    return cells.reshape(count, *lead, inside * depth, outside * width)[:, :, None]


def pixel_weight(cells: Array, geometry: Geometry) -> Array:
    """The transpose of `cell_weight`, for gradients.

    Args:
      cells: [w, rows_out, 1, rows_in, 3, operands, channels, outputs].
      geometry: of the cells, not adjoint.

    Returns:
      [w, 3, 3, in, out].
    """
    if geometry.pixels:
        return cells[:, 0, 0, 0]
    count, _, _, _, _, _, depth, width = cells.shape
    *lead, inside, outside = geometry.joined.shape[:-2]
    depth, width = depth // inside, width // outside
    cells = cells.reshape(count, *lead, inside, depth, outside, width)
    weight = jnp.einsum(
        "kq,wkc->wqc",
        geometry.joined.reshape(-1, 9),
        cells.swapaxes(-3, -2).reshape(count, -1, depth * width),
        precision="highest",
    )
    return weight.reshape(count, 3, 3, depth, width)
