"""Plain, up- and down-sampling convolutions with gradients that stay fast on a CPU.

Every form was chosen by its time, forward and gradient. Accelerators take one
`lax` convolution each. On a CPU:

| operation                       | form                                             |
| ------------------------------- | ------------------------------------------------ |
| plain, and its input gradient   | Winograd's, or one SAME convolution              |
| its weight gradient             | one convolution; above `LARGE`, blocks of rows   |
| up (transposed, blur)           | four small convolutions, one an output phase     |
| its input gradient (blur, down) | four small convolutions, one an input phase      |
| its weight gradient             | nine matmuls; above `LARGE`, blocks of rows      |

A block of rows is a matmul of its 3×3 patches, small enough for the cache. The forms of
the first two rows, and of up and its input gradient, take a few samples at a time for
the same reason. Winograd's halves the time from 32 channels on while a sample stays in
the cache, and from 256 channels on beyond it.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_ops.adjoint import bilinear_trio
from pallas_ops.upfirdn import blur, downsample2d

# Elements of an activation above which its weight gradient goes block by block, and
# the pixels of a block.
LARGE = 2**22
BLOCK_PIXELS = 512
# Elements of an activation that a group of samples has, one sample at least.
GROUP = 2**19

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# A weight's gradient is a convolution whose kernel is the other activation: channels
# take the place of the batch, the batch is summed over.
WEIGHT_DIMENSIONS = ("CHWN", "IHWO", "HWNC")
VALID = ((0, 0), (0, 0))


def _conv(x: Array, weight: Array, padding=((1, 1), (1, 1)), **options) -> Array:
    """`lax` convolution of stride 1 unless said otherwise, NHWC by HWIO."""
    options = {"window_strides": (1, 1), "dimension_numbers": DIMENSIONS} | options
    return lax.conv_general_dilated(x, weight, padding=padding, **options)


def _transposed(weight: Array) -> Array:
    return weight.swapaxes(2, 3)


def _patches(x: Array, height: int, width: int, stride: int = 1) -> list[Array]:
    """The nine shifted windows [b, height, width, c] that a 3×3 kernel sees."""
    rows, columns = (height - 1) * stride + 1, (width - 1) * stride + 1
    return [
        x[:, i : i + rows : stride, j : j + columns : stride]
        for i in range(3)
        for j in range(3)
    ]


def _weight_by_blocks(padded: Array, other: Array, stride: int = 1) -> Array:
    """Sum of outer products of 3×3 patches with another activation's pixels.

    Args:
      padded: [batch, stride * (height - 1) + 3, stride * (width - 1) + 3, a].
      other: [batch, height, width, b].
      stride: of the patches.

    Returns:
      [3, 3, a, b].
    """
    batch, height, width, _ = other.shape
    limit = max(1, BLOCK_PIXELS // (batch * width))
    rows = max(r for r in range(1, limit + 1) if height % r == 0)

    def add(i, total):
        start, size = i * rows * stride, (rows - 1) * stride + 3
        block = lax.dynamic_slice_in_dim(padded, start, size, 1)
        patches = jnp.concatenate(_patches(block, rows, width, stride), -1)
        pixels = lax.dynamic_slice_in_dim(other, i * rows, rows, 1)
        return total + jnp.einsum(
            "bhwp,bhwo->po", patches, pixels, preferred_element_type=jnp.float32
        )

    shape = (9 * padded.shape[-1], other.shape[-1])
    total = lax.fori_loop(0, height // rows, add, jnp.zeros(shape))
    return total.reshape(3, 3, *padded.shape[-1:], -1).astype(other.dtype)


# Stride 1


def _plain_cpu(x: Array, weight: Array) -> Array:
    _, height, width, channels = x.shape
    # Otherwise the transforms cost more than they spare, or too much precision.
    worth = (
        x.dtype == jnp.float32
        and height % 2 == width % 2 == 0
        and min(height, width) >= 8
        and min(weight.shape[2:]) >= 32
        and (height * width * channels <= 2 * GROUP or channels >= 256)
    )
    return _winograd(x, weight) if worth else _conv(x, weight)


def _winograd(x: Array, weight: Array) -> Array:
    """F(2×2, 3×3) of Lavin & Gray 2015 (arXiv 1509.09308): 16 products for 36.

    Every tile of 2×2 outputs reads 4×4 inputs; the transforms act on one axis after the
    other.
    """
    batch, height, width, _ = x.shape

    def of_input(x, axis, size):
        a, b, c, d = (lax.slice_in_dim(x, i, i + size - 1, 2, axis) for i in range(4))
        return a - c, b + c, c - b, b - d

    def of_weight(w):
        return w[0], (w[0] + w[1] + w[2]) / 2, (w[0] - w[1] + w[2]) / 2, w[2]

    def of_output(a, b, c, d):
        return a + b + c, b - c - d

    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = []
    for row, taps in zip(of_input(x, 1, height), of_weight(weight), strict=True):
        # Four products in one: sixteen apart compile for long, in much memory.
        tiles, taps = jnp.stack(of_input(row, 2, width)), jnp.stack(of_weight(taps))
        products = jnp.einsum("tbhwi,tio->tbhwo", tiles, taps)
        rows.append(jnp.stack(of_output(*products), 3))
    return jnp.stack(of_output(*rows), 2).reshape(batch, height, width, -1)


def _plain_input(g: Array, weight: Array) -> Array:
    return _conv(g, _transposed(jnp.flip(weight, (0, 1))))


def _plain_input_cpu(g: Array, weight: Array) -> Array:
    # Beyond the cache Winograd's would set a training step's peak memory.
    if g.size > 2 * GROUP * g.shape[0]:
        return _plain_input(g, weight)
    return _plain_cpu(g, _transposed(jnp.flip(weight, (0, 1))))


def _plain_weight(x: Array, g: Array) -> Array:
    return _conv(x, g, dimension_numbers=WEIGHT_DIMENSIONS)


def _plain_weight_cpu(x: Array, g: Array) -> Array:
    if x.size < LARGE:
        return _plain_weight(x, g)
    return _weight_by_blocks(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), g)


# Up: transposed convolution of stride 2, [b, h, w, i] to [b, 2h + 1, 2w + 1, o], then
# the blur to [b, 2h, 2w, o]. In terms of y of odd size and taps w[i, j]:
# y[2n + i, 2m + j] sums x[n, m] w[i, j]; even rows take the taps 0 and 2, odd rows 1.


def _up(x: Array, weight: Array) -> Array:
    flipped = jnp.flip(weight, (0, 1))
    y = _conv(x, flipped, ((2, 2), (2, 2)), lhs_dilation=(2, 2))
    return blur(y, gain=4.0, pad=1)


def _up_cpu(x: Array, weight: Array) -> Array:
    def phase(a, b):
        taps = weight[1:2] if a else weight[::-2]
        taps = taps[:, 1:2] if b else taps[:, ::-2]
        # Every phase gets an even share of the output; the odd ones' last is cut.
        padding = ((0, 1) if a else (1, 1), (0, 1) if b else (1, 1))
        return _conv(x, taps, padding)

    rows = [jnp.stack([phase(a, 0), phase(a, 1)], 3) for a in (0, 1)]
    b, h, w, _, c = rows[0].shape
    y = jnp.stack(rows, 2).reshape(b, 2 * h, 2 * w, c)[:, :-1, :-1]
    return blur(y, gain=4.0, pad=1)


def _up_input(g: Array, weight: Array) -> Array:
    y = blur(g, gain=4.0, pad=2)
    return _conv(y, _transposed(weight), VALID, window_strides=(2, 2))


def _up_input_cpu(g: Array, weight: Array) -> Array:
    y, taps = blur(g, gain=4.0, pad=2), _transposed(weight)
    return (
        _conv(y[:, ::2, ::2], taps[::2, ::2], VALID)
        + _conv(y[:, ::2, 1::2], taps[::2, 1:2], VALID)
        + _conv(y[:, 1::2, ::2], taps[1:2, ::2], VALID)
        + _conv(y[:, 1::2, 1::2], taps[1:2, 1:2], VALID)
    )


def _up_weight(x: Array, g: Array) -> Array:
    y = blur(g, gain=4.0, pad=2)
    return _transposed(
        _conv(y, x, VALID, rhs_dilation=(2, 2), dimension_numbers=WEIGHT_DIMENSIONS)
    )


def _up_weight_cpu(x: Array, g: Array) -> Array:
    y = blur(g, gain=4.0, pad=2)
    if g.size >= LARGE:
        return _transposed(_weight_by_blocks(y, x, stride=2))
    products = [
        jnp.einsum("bhwi,bhwo->io", x, patch)
        for patch in _patches(y, *x.shape[1:3], stride=2)
    ]
    return jnp.stack(products).reshape(3, 3, *products[0].shape)


def _in_groups(form):
    """`form` on a few samples at a time, unless devices share the batch."""

    def run(x, weight):
        batch = x.shape[0]
        limit = max(1, GROUP * batch // x.size)
        size = max(n for n in range(1, min(limit, batch) + 1) if batch % n == 0)
        if size == batch or jax.sharding.get_abstract_mesh().size > 1:
            return form(x, weight)
        groups = x.reshape(batch // size, size, *x.shape[1:])
        y = lax.map(lambda group: form(group, weight), groups)
        return y.reshape(batch, *y.shape[2:])

    return run


def _on(cpu, default):
    """The form for the platform that the program is compiled for."""
    return lambda a, b: lax.platform_dependent(a, b, cpu=cpu, default=default)


_conv3x3, _, _ = bilinear_trio(
    _on(_in_groups(_plain_cpu), _conv),
    _on(_in_groups(_plain_input_cpu), _plain_input),
    _on(_plain_weight_cpu, _plain_weight),
)
_up3x3, _down3x3, _ = bilinear_trio(
    _on(_in_groups(_up_cpu), _up),
    _on(_in_groups(_up_input_cpu), _up_input),
    _on(_up_weight_cpu, _up_weight),
)


def conv2d(x: Array, weight: Array) -> Array:
    """Convolution of stride 1 and the same size.

    Args:
      x: [batch, height, width, in_channels].
      weight: [k, k, in_channels, out_channels], k 1 or 3.

    Returns:
      [batch, height, width, out_channels], dtype of `x`.
    """
    weight = weight.astype(x.dtype)
    return x @ weight[0, 0] if weight.shape[0] == 1 else _conv3x3(x, weight)


def up_conv2d(x: Array, weight: Array) -> Array:
    """Transposed 3×3 convolution of stride 2, then the FIR blur; doubles the size.

    Args:
      x: [batch, height, width, in_channels].
      weight: [3, 3, in_channels, out_channels].

    Returns:
      [batch, 2 height, 2 width, out_channels], dtype of `x`.
    """
    return _up3x3(x, weight.astype(x.dtype))


def downsample_conv2d(x: Array, weight: Array) -> Array:
    """Blur, then convolve with stride 2: the discriminator's down-sampling.

    Args:
      x: [batch, height, width, in_channels], even height and width.
      weight: [k, k, in_channels, out_channels], k 1 or 3.

    Returns:
      [batch, height / 2, width / 2, out_channels], dtype of `x`.
    """
    weight = weight.astype(x.dtype)
    if weight.shape[0] == 1:
        return downsample2d(x) @ weight[0, 0]
    # The adjoint of the up-convolution, whose blur has four times the gain.
    return _down3x3(x, _transposed(weight) * 0.25)
