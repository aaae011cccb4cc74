"""The two TPU kernels: a convolution of cells, and its weight's gradient.

Both go through a picture by blocks of whole rows: from 64 to 1024 px a row of a
StyleGAN2 activation is 64 KiB in bfloat16. The row above and the row below a block come
as blocks of their own, so that no border is ever padded in memory.

Operands and weights are those of `cells`. An activation is
[batch, height, rows, width, channels], `rows` being 2 on the fine side of an
up-convolution. That side may hold the two columns of a cell one after the other
(`split`): in bfloat16 two neighbouring columns are the halves of one word, so putting
them together and taking them apart costs next to nothing here.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_ops.cells import LANES, Geometry

# Cycles of the matrix units that a step of the grid may take, about: long enough to
# hide its start, short enough to compile as straight-line code.
STEP_CYCLES = 6144
# Output channels of a step: enough to use what a step loads and rearranges, few enough
# for the weights to fit.
STEP_OUTPUTS = 256
VMEM_BYTES = 100 * 2**20
# Of the leaky ReLU.
SLOPE = 0.2
# The blocks of a picture that a step sees.
PICTURE = ("x", "above", "below")


def _precision(dtype):
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def _columns(row: Array, split: int) -> list[Array]:
    """A row as `split` float32 arrays [width, channels], one a column of the cells."""
    if split == 1:
        return [row.astype(jnp.float32)]
    if row.dtype == jnp.bfloat16:
        words = pltpu.bitcast(row, jnp.uint32)
        halves = words << 16, words & jnp.uint32(0xFFFF0000)
        return [pltpu.bitcast(half, jnp.float32) for half in halves]
    pairs = row.reshape(row.shape[0] // 2, 2, row.shape[1])
    return [pairs[:, 0], pairs[:, 1]]


def _store(ref, index, columns: list[Array]):
    """Write a row, given as the columns of its cells."""
    if len(columns) == 1:
        ref[index] = columns[0].astype(ref.dtype)
    elif ref.dtype == jnp.bfloat16:
        rounded = [c.astype(jnp.bfloat16).astype(jnp.float32) for c in columns]
        low, high = (pltpu.bitcast(c, jnp.uint32) for c in rounded)
        ref[index] = pltpu.bitcast(low >> 16 | high, jnp.bfloat16)
    else:
        ref[index] = jnp.stack(columns, 1).reshape(-1, columns[0].shape[1])


def _sloped(cells: Array, sign: Array) -> Array:
    """Float32 cells times the slope of the leaky ReLU that gave values of this sign."""
    return cells * jnp.where(sign >= 0, 1.0, SLOPE)


def _compiler_params(rows: str) -> pltpu.CompilerParams:
    """Those of a grid of outputs, pictures and rows, which chips of two cores share."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", rows),
        vmem_limit_bytes=VMEM_BYTES,
    )


def _write_operands(operands, x, scale, *, sided, split, sign=None):
    """Fill the scratch [operands, block + 2, rows, width, channels] that is multiplied.

    Neighbouring columns are moved once here instead of at each of their uses.

    Args:
      operands: the scratch.
      x: references to a block of rows, the row above it and the row below.
      scale: a reference to a factor a channel, or None.
      sided, split: of the operands, of the input.
      sign: references to rows whose signs choose slopes for those of `x`.
    """
    x, above, below = x
    block, rows = x.shape[1:3]
    width, channels = operands.shape[3:]
    column = lax.broadcasted_iota(jnp.int32, (width, channels), 0)
    lane = lax.broadcasted_iota(jnp.int32, (width, channels), 1)
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1
    for i in range(block + 2):
        for r in range(rows):
            if i == 0:
                ref, index, outside = 1, 0, first
            elif i == block + 1:
                ref, index, outside = 2, 0, last
            else:
                ref, index, outside = 0, i - 1, None
            row = (x, above, below)[ref][0, index, r]
            cells = jnp.concatenate(_columns(row, split), 1)
            if sign is not None:
                signs = _columns(sign[ref][0, index, r], split)
                cells = _sloped(cells, jnp.concatenate(signs, 1))
            if scale is not None:
                cells = cells * scale[0]
            if outside is not None:
                cells = jnp.where(outside, 0.0, cells)
            left = jnp.where(column == 0, 0.0, pltpu.roll(cells, 1, 0))
            right = pltpu.roll(cells, width - 1, 0)
            right = jnp.where(column == width - 1, 0.0, right)
            if sided:
                found = cells, jnp.where(lane < channels // 2, right, left)
            else:
                found = left, cells, right
            for t, operand in enumerate(found):
                operands[t, i, r] = operand.astype(operands.dtype)


def _operand(operands, t: int, y: int, r: int, block: int) -> Array:
    """The pixels [block * width, channels] that meet tap y of operand t."""
    width, channels = operands.shape[3:]
    return operands[t, y : y + block, r].reshape(block * width, channels)


def _taps(operands):
    """(row in, row offset, operand) of every matmul."""
    count, _, rows = operands.shape[:3]
    return [(r, y, t) for r in range(rows) for y in range(3) for t in range(count)]


def _conv_kernel(*refs, names, sided, split_in, packing, act):
    """One block of rows of one picture, some of the output channels."""
    ref = dict(zip(names, refs, strict=True))
    x, w, out, operands = (ref[n] for n in ("x", "w", "out", "operands"))
    _write_operands(
        operands,
        [ref[n] for n in PICTURE],
        ref.get("scale_in"),
        sided=sided,
        split=split_in,
        sign=[ref[f"sign_{n}"] for n in PICTURE] if "sign_x" in ref else None,
    )
    block, width = x.shape[1], operands.shape[3]
    _, rows_out, split = w.shape[:3]

    def pixels(s, m):
        total = None
        for r, y, t in _taps(operands):
            lhs = _operand(operands, t, y, r, block)
            product = jnp.dot(
                lhs,
                w[0, s, m, r, y, t],
                preferred_element_type=jnp.float32,
                precision=_precision(lhs.dtype),
            )
            total = product if total is None else total + product
        if "scale_out" in ref:
            total = total * ref["scale_out"][0]
        if "bias" in ref:
            total = total + ref["bias"][...]
        return total

    def row(total, i, s, m):
        cells = total[i * width : (i + 1) * width]
        if "noise" in ref:
            first = (pl.program_id(2) * block + i) * rows_out + s
            first = first * packing * split + m * packing
            cells = cells + _noise(ref["noise"], first, cells.shape[1], packing)
        return jnp.maximum(cells, SLOPE * cells) if act else cells

    for s in range(rows_out):
        totals = [pixels(s, m) for m in range(split)]
        for i in range(block):
            columns = [row(total, i, s, m) for m, total in enumerate(totals)]
            _store(out, (0, i, s), columns)


def _noise(ref, first, channels: int, packing: int) -> Array:
    """A row's noise, spread over the channels of its columns: [width, channels].

    The plane comes with the cells of a row on sublanes and (row, column of the cell) on
    lanes: one lane gather a register, where a broadcast would need a copy in memory.
    """
    plane = ref[0]
    lane = lax.broadcasted_iota(jnp.int32, plane.shape, 1)
    first = lax.rem(first, LANES)
    blocks = [
        jnp.take_along_axis(
            plane, lax.div((lane + start) * packing, channels) + first, axis=1
        )
        for start in range(0, channels, LANES)
    ]
    spread = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, 1)
    return spread[:, :channels]


def _block_rows(height: int, cycles_per_row: int, lanes_per_row: int = 1) -> int:
    """Rows of a step: a divisor of the height whose noise fills a part of 128 lanes."""
    limit = max(1, STEP_CYCLES // cycles_per_row)
    return max(
        d
        for d in range(1, height + 1)
        if d == 1
        or (d <= limit and height % d == 0 and LANES % (d * lanes_per_row) == 0)
    )


def _block_outputs(outputs: int) -> int:
    """Output channels of a step."""
    while outputs > STEP_OUTPUTS and outputs % (2 * LANES) == 0:
        outputs //= 2
    return outputs


def _picture_specs(x: Array, block: int) -> dict:
    """A block of rows and its two neighbours, for a grid (outputs, batch, block)."""
    height = x.shape[1]

    def spec(rows, index):
        return x, pl.BlockSpec(
            (1, rows, *x.shape[2:]), lambda n, b, i: (b, index(i), 0, 0, 0)
        )

    return {
        "x": spec(block, lambda i: i),
        "above": spec(1, lambda i: jnp.maximum(i * block - 1, 0)),
        "below": spec(1, lambda i: jnp.minimum((i + 1) * block, height - 1)),
    }


def _noise_spec(noise: Array, lanes: int):
    """The 128 lanes that hold the `lanes` of a block, for the grid of a picture."""
    several = noise.shape[0] > 1
    return noise, pl.BlockSpec(
        (1, noise.shape[1], LANES),
        lambda n, b, i: (b * several, 0, lax.div(i * lanes, LANES)),
    )


def convolve(
    x: Array,
    weight: Array,
    geometry: Geometry,
    *,
    sign: Array | None = None,
    scale_in: Array | None = None,
    scale_out: Array | None = None,
    noise: Array | None = None,
    bias: Array | None = None,
    act: bool = False,
    split_in: int = 1,
    interpret=False,
) -> Array:
    """`scale_out * conv(scale_in * x, weight) + noise + bias`, then the activation.

    Args:
      x: [batch, height, rows_in, split_in * width, channels / split_in].
      weight: [1 or batch, rows_out, split, rows_in, 3, operands, channels, outputs].
      geometry: of the cells.
      sign: like `x`, which is first multiplied by the leaky ReLU's slopes there.
      scale_in: [batch, channels] float32.
      scale_out: [batch, outputs] float32.
      noise: [1 or batch, width, lanes] float32, the lanes being (row, column of the
        cell) and filled up to a multiple of 128.
      bias: [1, outputs] float32.
      act: leaky ReLU of slope 0.2.
      split_in: columns of a cell that `x` holds one after the other.
      interpret: as in `pallas_call`.

    Returns:
      [batch, height, rows_out, split * width, outputs], dtype of `x`.
    """
    batch, height, rows_in = x.shape[:3]
    _, rows_out, split, _, _, operands, depth, outputs = weight.shape
    width, packing = x.shape[3] // split_in, geometry.packing_out // split
    out_block = _block_outputs(outputs)
    matmuls = rows_out * split * rows_in * 3 * operands
    tiles = pl.cdiv(depth, LANES) * pl.cdiv(out_block, LANES)
    block = _block_rows(
        height, pl.cdiv(width * matmuls * tiles, 4), rows_out * split * packing
    )
    own = weight.shape[0] > 1
    inputs = _picture_specs(x, block) | {
        "w": (
            weight.astype(x.dtype),
            pl.BlockSpec(
                (1, *weight.shape[1:7], out_block),
                lambda n, b, i: (b * own, 0, 0, 0, 0, 0, 0, n),
            ),
        ),
    }
    if sign is not None:
        signs = _picture_specs(sign, block)
        inputs |= {f"sign_{name}": value for name, value in signs.items()}
    if scale_in is not None:
        spec = pl.BlockSpec((1, 1, depth), lambda n, b, i: (b, 0, 0))
        inputs["scale_in"] = scale_in[:, None], spec
    if scale_out is not None:
        spec = pl.BlockSpec((1, 1, out_block), lambda n, b, i: (b, 0, n))
        inputs["scale_out"] = scale_out[:, None], spec
    if bias is not None:
        inputs["bias"] = bias, pl.BlockSpec((1, out_block), lambda n, b, i: (0, n))
    if noise is not None:
        inputs["noise"] = _noise_spec(noise, block * rows_out * split * packing)
    return pl.pallas_call(
        partial(
            _conv_kernel,
            names=(*inputs, "out", "operands"),
            sided=geometry.sided,
            split_in=split_in,
            packing=packing,
            act=act,
        ),
        grid=(outputs // out_block, batch, height // block),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=pl.BlockSpec(
            (1, block, rows_out, split * width, out_block),
            lambda n, b, i: (b, i, 0, 0, n),
        ),
        out_shape=jax.ShapeDtypeStruct(
            (batch, height, rows_out, split * width, outputs), x.dtype
        ),
        scratch_shapes=[
            pltpu.VMEM((operands, block + 2, rows_in, width, depth), x.dtype)
        ],
        compiler_params=_compiler_params("parallel"),
        interpret=interpret,
        name="cell_conv",
    )(*(array for array, _ in inputs.values()))


def _weight_kernel(*refs, names, sided, packing):
    """Add a block of rows to the gradient of one picture's weight."""
    ref = dict(zip(names, refs, strict=True))
    g, out, sums, operands = (ref[n] for n in ("g", "out", "sums", "operands"))
    _write_operands(operands, [ref[n] for n in PICTURE], None, sided=sided, split=1)
    block = g.shape[1]
    _, rows_out, split = out.shape[:3]
    begins = pl.program_id(2) == 0

    def add(ref, index, value, first):
        """Begins with what a picture's first turn finds first."""
        # A select hides behind the matrix products; zeros stored beforehand do not.
        so_far = jnp.where(begins, 0.0, ref[index]) if first else ref[index]
        ref[index] = so_far + value

    def columns(i, s):
        found = _columns(g[0, i, s], split)
        if "sign" in ref:
            signs = _columns(ref["sign"][0, i, s], split)
            found = [_sloped(c, z) for c, z in zip(found, signs, strict=True)]
        return found

    if "noise" not in ref:
        sums[0, 1] = jnp.zeros(sums.shape[2:], sums.dtype)
    for s in range(rows_out):
        rows = [columns(i, s) for i in range(block)]
        for m in range(split):
            for i, row in enumerate(rows):
                cells = row[m]
                first = s == m == i == 0
                add(sums, (0, 0), jnp.sum(cells, 0), first)
                if "noise" in ref:
                    lane = (pl.program_id(2) * block + i) * rows_out + s
                    lane = lane * packing * split + m * packing
                    noise = _noise(ref["noise"], lane, cells.shape[1], packing)
                    add(sums, (0, 1), jnp.sum(cells * noise, 0), first)
            pixels = jnp.concatenate([row[m].astype(g.dtype) for row in rows], 0)
            for r, y, t in _taps(operands):
                product = lax.dot_general(
                    _operand(operands, t, y, r, block),
                    pixels,
                    (((0,), (0,)), ((), ())),
                    preferred_element_type=jnp.float32,
                    precision=_precision(g.dtype),
                )
                add(out, (0, s, m, r, y, t), product, True)


def weight_gradient(
    x: Array,
    g: Array,
    geometry: Geometry,
    *,
    sign: Array | None = None,
    noise: Array | None = None,
    split: int = 1,
    interpret=False,
) -> tuple[Array, Array]:
    """The gradient of each picture's own weight, summed over its pixels.

    Args:
      x: [batch, height, 1, width, channels].
      g: [batch, height, rows_out, split * width, outputs], dtype of `x`.
      geometry: of the convolution; not adjoint.
      sign: like `g`, which is first multiplied by the leaky ReLU's slopes there.
      noise: as in `convolve`.
      split: columns of a cell that `g` holds one after the other.
      interpret: as in `pallas_call`.

    Returns:
      [batch, rows_out, split, 1, 3, operands, channels, outputs] float32, and the sums
      over pixels of `g` and of `g * noise`, [batch, 2, outputs] float32.
    """
    batch, height, _, width, depth = x.shape
    rows_out, outputs = g.shape[2], g.shape[4]
    packing = geometry.packing_out // split
    operands = geometry.columns.shape[0]
    matmuls = rows_out * split * 3 * operands * pl.cdiv(depth, LANES)
    out_block = _block_outputs(outputs)
    # The sum runs over pixels: fewer than 128 would leave a part of the matrix unit
    # idle, and every step reads and writes the whole result.
    if LANES * matmuls * pl.cdiv(out_block, LANES) > 4 * STEP_CYCLES:
        out_block = min(out_block, LANES)
    tiles = matmuls * pl.cdiv(out_block, LANES)
    lanes = rows_out * split * packing
    block = _block_rows(height, pl.cdiv(width * tiles, 4), lanes)
    shape = (batch, rows_out, split, 1, 3, operands, depth, outputs)
    spec = pl.BlockSpec(
        (1, block, rows_out, split * width, out_block),
        lambda n, b, i: (b, i, 0, 0, n),
    )
    inputs = _picture_specs(x, block) | {"g": (g, spec)}
    if sign is not None:
        inputs["sign"] = sign, spec
    if noise is not None:
        inputs["noise"] = _noise_spec(noise, block * lanes)
    return pl.pallas_call(
        partial(
            _weight_kernel,
            names=(*inputs, "out", "sums", "operands"),
            sided=geometry.sided,
            packing=packing,
        ),
        grid=(outputs // out_block, batch, height // block),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[
            pl.BlockSpec(
                (1, *shape[1:7], out_block), lambda n, b, i: (b, 0, 0, 0, 0, 0, 0, n)
            ),
            pl.BlockSpec((1, 2, out_block), lambda n, b, i: (b, 0, n)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct((batch, 2, outputs), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((operands, block + 2, 1, width, depth), x.dtype)],
        compiler_params=_compiler_params("arbitrary"),
        interpret=interpret,
        name="cell_weight_gradient",
    )(*(array for array, _ in inputs.values()))
