"""An up-convolution's weights as those of cells, and back, as TPU kernels.

With its blur the up-convolution has 36 taps, sums of 9. From 128 channels up XLA makes
a pass over the weight for each, which at 512 channels and 32 px costs more than the
convolution; here every tap is read once and every result written once. A fine cell's
two columns are parts of their own (`split` in `cell_conv_tpu`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_ops.cells import LANES, Geometry

# Chips of two cores share the grid.
PARALLEL = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)


def _shape(geometry: Geometry) -> tuple[int, ...]:
    """[row out, column out, row in, row offset, operand, column in] of the taps."""
    operands, inside, outside, _ = geometry.columns.shape
    return geometry.rows_out, outside, geometry.rows_in, 3, operands, inside


def _sum(factors, arrays) -> Array:
    """The linear combination of a few arrays, without those of factor zero."""
    terms = [float(f) * a for f, a in zip(factors, arrays, strict=True) if f]
    return sum(terms[1:], terms[0]) if terms else jnp.zeros_like(arrays[0])


def _tile(*lead: int, swapped: bool = False) -> pl.BlockSpec:
    """All taps of a tile of the channels, for a grid (weight, inputs, outputs)."""
    zeros = (0,) * len(lead)
    return pl.BlockSpec(
        (1, *lead, LANES, LANES),
        lambda w, i, o: (w, *zeros, o, i) if swapped else (w, *zeros, i, o),
    )


def _cell_kernel(weight, out, *, geometry):
    def column(x):
        found = [weight[0, u, x] for u in range(3)]
        return [tile.T for tile in found] if geometry.adjoint else found

    columns = [column(x) for x in range(3)]
    rows_out, _, rows_in, *_ = shape = _shape(geometry)
    by_row = {
        (s, r, y): [_sum(geometry.rows[y, r, s], tiles) for tiles in columns]
        for s, r, y in np.ndindex(rows_out, rows_in, 3)
    }
    for s, n, r, y, t, j in np.ndindex(shape):
        cells = _sum(geometry.columns[t, j, n], by_row[s, r, y])
        out[0, s, n, r, y, t, j] = cells.astype(out.dtype)


def cell_weight(weight: Array, geometry: Geometry, dtype, interpret=False) -> Array:
    """The weights of cells.

    Args:
      weight: [w, 3, 3, in, out] float32, channels in multiples of 128; for an adjoint
        geometry too, which swaps them.
      geometry: of an up-convolution, the coarse cells being pixels.
      dtype: of the result.
      interpret: as in `pallas_call`.

    Returns:
      [w, rows_out, packing_out, rows_in, 3, operands, packing_in * in, out].
    """
    count, _, _, depth, width = weight.shape
    if geometry.adjoint:
        depth, width = width, depth
    *lead, inside = _shape(geometry)
    cells = pl.pallas_call(
        partial(_cell_kernel, geometry=geometry),
        grid=(count, depth // LANES, width // LANES),
        in_specs=[_tile(3, 3, swapped=geometry.adjoint)],
        out_specs=_tile(*lead, inside),
        out_shape=jax.ShapeDtypeStruct((count, *lead, inside, depth, width), dtype),
        compiler_params=PARALLEL,
        interpret=interpret,
        name="cell_weight",
    )(weight)
    return cells.reshape(count, *lead, inside * depth, width)


def _pixel_kernel(cells, out, *, geometry):
    rows_out, outside, _, _, operands, _ = _shape(geometry)
    across = list(np.ndindex(operands, outside))
    down = list(np.ndindex(rows_out, 3))
    found = {(s, y): [cells[0, s, n, 0, y, t] for t, n in across] for s, y in down}
    for x in range(3):
        factors = [geometry.columns[t, 0, n, x] for t, n in across]
        by_column = [_sum(factors, found[i]) for i in down]
        for u in range(3):
            factors = [geometry.rows[y, 0, s, u] for s, y in down]
            out[0, u, x] = _sum(factors, by_column)


def pixel_weight(cells: Array, geometry: Geometry, interpret=False) -> Array:
    """The transpose of `cell_weight`, for gradients.

    Args:
      cells: [w, rows_out, packing_out, 1, 3, operands, in, out] float32.
      geometry: as there, not adjoint.
      interpret: as in `pallas_call`.

    Returns:
      [w, 3, 3, in, out] float32.
    """
    count, *lead, depth, width = cells.shape
    return pl.pallas_call(
        partial(_pixel_kernel, geometry=geometry),
        grid=(count, depth // LANES, width // LANES),
        in_specs=[_tile(*lead)],
        out_specs=_tile(3, 3),
        out_shape=jax.ShapeDtypeStruct((count, 3, 3, depth, width), jnp.float32),
        compiler_params=PARALLEL,
        interpret=interpret,
        name="pixel_weight",
    )(cells)
