"""FIR up- and down-sampling (upfirdn2d of StyleGAN2) by the [1, 3, 3, 1] filter."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_ops.adjoint import linear_pair

FIR = (1.0, 3.0, 3.0, 1.0)


def fir_kernel(gain: float = 1.0) -> np.ndarray:
    """The separable [1, 3, 3, 1] low-pass as a [4, 4] kernel summing to `gain`."""
    kernel = np.outer(FIR, FIR).astype(np.float32)
    return kernel / kernel.sum() * gain


def upfirdn2d(
    x: Array,
    kernel: Array,
    *,
    up: int = 1,
    down: int = 1,
    pad: tuple[int, int] = (0, 0),
) -> Array:
    """Zero-insert, pad, convolve with a FIR kernel, keep every `down`-th sample.

    The general form; the networks use the faster special cases below.

    Args:
      x: [batch, height, width, channels].
      kernel: [kernel_height, kernel_width]; a true convolution, so it is flipped.
      up: samples per input sample; each is followed by `up - 1` zeros.
      down: stride of the output.
      pad: rows (and columns) before and after; negative crops.

    Returns:
      [batch, out_height, out_width, channels], each side
      `(n * up + pad[0] + pad[1] - kernel_size) // down + 1`.
    """
    channels = x.shape[-1]
    flipped = jnp.flip(jnp.asarray(kernel, x.dtype), (0, 1))
    weight = jnp.broadcast_to(flipped[:, :, None, None], (*flipped.shape, 1, channels))
    # XLA's dilation has no trailing zeros; upfirdn2d counts them as samples.
    padding = (pad[0], pad[1] + up - 1)
    return lax.conv_general_dilated(
        x,
        weight,
        window_strides=(down, down),
        padding=(padding, padding),
        lhs_dilation=(up, up),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )


def _shifted_sums(x: Array, *, gain: float, pad: int, stride: int = 1) -> Array:
    """The filter along one axis after the other; arguments as `blur`'s."""
    taps = np.array(FIR) / sum(FIR) * gain**0.5
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    for axis in (1, 2):
        last = (x.shape[axis] - len(FIR)) // stride * stride
        x = sum(
            lax.slice_in_dim(x, i, i + last + 1, stride, axis) * float(tap)
            for i, tap in enumerate(taps)
        )
    return x


def blur(x: Array, *, gain: float, pad: int) -> Array:
    """The [1, 3, 3, 1] filter over both axes.

    Args:
      x: [batch, height, width, channels].
      gain: sum of the two-dimensional filter.
      pad: zeros on each side of both axes.

    Returns:
      [batch, height + 2 * pad - 3, width + 2 * pad - 3, channels].
    """
    return lax.platform_dependent(
        x,
        cpu=lambda x: _shifted_sums(x, gain=gain, pad=pad),
        default=lambda x: upfirdn2d(x, fir_kernel(gain), pad=(pad, pad)),
    )


def _downsample(x: Array, gain: float) -> Array:
    return _shifted_sums(x, gain=gain, pad=1, stride=2)


def _upsample(x: Array, gain: float) -> Array:
    """Each output is 3/4 of the nearest input and 1/4 of the next one, per axis."""
    for axis in (1, 2):
        edges = [(0, 0)] * 4
        edges[axis] = (1, 1)
        padded = jnp.pad(x, edges)
        size = x.shape[axis]
        before = lax.slice_in_dim(padded, 0, size, axis=axis)
        after = lax.slice_in_dim(padded, 2, size + 2, axis=axis)
        near = x * (0.375 * gain**0.5)
        even = near + before * (0.125 * gain**0.5)
        odd = near + after * (0.125 * gain**0.5)
        shape = list(x.shape)
        shape[axis] *= 2
        x = jnp.stack([even, odd], axis + 1).reshape(shape)
    return x


_up, _ = linear_pair(lambda x: _upsample(x, 4.0), lambda x: _downsample(x, 4.0))
_down, _ = linear_pair(lambda x: _downsample(x, 1.0), lambda x: _upsample(x, 1.0))


def upsample2d(x: Array) -> Array:
    """Double height and width with the [1, 3, 3, 1] filter (the skip of to-RGB)."""
    return _up(x)


def downsample2d(x: Array) -> Array:
    """Filter with [1, 3, 3, 1] and keep every second sample: [b, h / 2, w / 2, c]."""
    return _down(x)


def upsample_planes(x: Array, packing: int) -> Array:
    """`upsample2d` of planes whose columns are those of cells, for a TPU.

    Two products with banded matrices: shifted sums and interleaving would copy between
    layouts. The taps are exact in bfloat16, so three passes give float32.

    Args:
      x: [batch, channels, height, columns of a cell, cells], float32.
      packing: columns of a cell of the result.

    Returns:
      [batch, channels, 2 * height, packing, cells].
    """
    batch, channels, height, columns, cells = x.shape
    rows = _upsampling_matrix(height)
    # From columns of the picture to (column of a cell, cell), on either side.
    across = _upsampling_matrix(columns * cells)
    across = across.reshape(-1, packing, cells, columns)
    across = across.transpose(1, 0, 3, 2).reshape(2 * columns * cells, -1)
    x = x.reshape(batch, channels, height, columns * cells)
    x = jnp.einsum("bchw,vw->bchv", x, across, precision="high")
    x = jnp.einsum("bchv,gh->bcgv", x, rows, precision="high")
    return x.reshape(batch, channels, 2 * height, packing, -1)


def _upsampling_matrix(size: int) -> np.ndarray:
    """[2 size, size]: each output is 3/4 of the nearest input and 1/4 of the next."""
    matrix = np.zeros((2 * size, size), np.float32)
    for i in range(size):
        matrix[2 * i : 2 * i + 2, i] = 0.75
        matrix[max(2 * i - 1, 0), i] += 0.25 * (i > 0)
        matrix[min(2 * i + 2, 2 * size - 1), i] += 0.25 * (i < size - 1)
    return matrix
