"""The specification: each operation in a few lines of `jax.lax`, however slow.

Tests hold every implementation against these.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_ops.upfirdn import fir_kernel, upfirdn2d

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv2d(x: Array, weight: Array) -> Array:
    """Stride 1, same size, odd kernel."""
    return lax.conv_general_dilated(
        x, weight, (1, 1), "SAME", dimension_numbers=DIMENSIONS
    )


def up_conv2d(x: Array, weight: Array) -> Array:
    """Transposed 3×3 convolution of stride 2 (the flip is its own), then the blur."""
    y = lax.conv_general_dilated(
        x,
        jnp.flip(weight, (0, 1)),
        window_strides=(1, 1),
        padding=((2, 2), (2, 2)),
        lhs_dilation=(2, 2),
        dimension_numbers=DIMENSIONS,
    )
    return upfirdn2d(y, fir_kernel(4.0), pad=(1, 1))


def downsample_conv2d(x: Array, weight: Array) -> Array:
    """Blur, then a convolution of stride 2."""
    before = (weight.shape[0] + 2) // 2
    y = upfirdn2d(x, fir_kernel(), pad=(before, weight.shape[0] + 1 - before))
    return lax.conv_general_dilated(
        y, weight, (2, 2), "VALID", dimension_numbers=DIMENSIONS
    )


def modulated_conv2d(
    x: Array,
    weight: Array,
    style: Array,
    *,
    up: bool = False,
    demodulate: bool = True,
) -> Array:
    """Equations 1 and 3 of arXiv 1912.04958 literally: one weight for each sample."""

    def single(x, style):
        w = weight * style[:, None]
        if demodulate:
            w = w * lax.rsqrt(jnp.sum(jnp.square(w), (0, 1, 2)) + 1e-8)
        return (up_conv2d if up else conv2d)(x[None], w)[0]

    return jax.vmap(single)(x, style)


def upsample2d(x: Array) -> Array:
    """Double the size: zero insertion and the [1, 3, 3, 1] filter."""
    return upfirdn2d(x, fir_kernel(4.0), up=2, pad=(2, 1))


def downsample2d(x: Array) -> Array:
    """Halve the size: the [1, 3, 3, 1] filter, every second sample."""
    return upfirdn2d(x, fir_kernel(), down=2, pad=(1, 1))


def fused_leaky_relu(x: Array, bias: Array) -> Array:
    """Bias over the last axis, slope 0.2, gain sqrt(2)."""
    y = x + bias
    return jnp.where(y >= 0, y, 0.2 * y) * 2**0.5
