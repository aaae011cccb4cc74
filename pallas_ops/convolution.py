"""Plain, up- and down-sampling convolutions with gradients that stay fast on a CPU."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_ops.adjoint import bilinear_trio
from pallas_ops.upfirdn import downsample2d, fir

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# A weight's gradient is a convolution whose kernel is the other activation: channels
# take the place of the batch, the batch is summed over.
WEIGHT_DIMENSIONS = ("CHWN", "IHWO", "HWNC")


def _transposed(weight: Array) -> Array:
    return weight.swapaxes(2, 3)


def _conv(x: Array, weight: Array) -> Array:
    return lax.conv_general_dilated(
        x, weight, (1, 1), "SAME", dimension_numbers=DIMENSIONS
    )


def _conv_input(g: Array, weight: Array) -> Array:
    return _conv(g, _transposed(jnp.flip(weight, (0, 1))))


def _conv_weight(x: Array, g: Array) -> Array:
    return lax.conv_general_dilated(
        x, g, (1, 1), ((1, 1), (1, 1)), dimension_numbers=WEIGHT_DIMENSIONS
    )


def _up(x: Array, weight: Array) -> Array:
    y = lax.conv_general_dilated(
        x,
        jnp.flip(weight, (0, 1)),
        window_strides=(1, 1),
        padding=((2, 2), (2, 2)),
        lhs_dilation=(2, 2),
        dimension_numbers=DIMENSIONS,
    )
    return fir(y, gain=4.0, pad=1)


def _up_input(g: Array, weight: Array) -> Array:
    return lax.conv_general_dilated(
        fir(g, gain=4.0, pad=2),
        _transposed(weight),
        window_strides=(2, 2),
        padding="VALID",
        dimension_numbers=DIMENSIONS,
    )


def _up_weight(x: Array, g: Array) -> Array:
    out = lax.conv_general_dilated(
        fir(g, gain=4.0, pad=2),
        x,
        window_strides=(1, 1),
        padding="VALID",
        rhs_dilation=(2, 2),
        dimension_numbers=WEIGHT_DIMENSIONS,
    )
    return _transposed(out)


_conv3x3, _, _ = bilinear_trio(_conv, _conv_input, _conv_weight)
_up3x3, _down3x3, _ = bilinear_trio(_up, _up_input, _up_weight)


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
