"""FIR up- and down-sampling (upfirdn2d of StyleGAN2, appendix B)."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

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


def upsample2d(x: Array) -> Array:
    """Double height and width with the [1, 3, 3, 1] filter (the skip of to-RGB)."""
    return upfirdn2d(x, fir_kernel(4.0), up=2, pad=(2, 1))


def downsample_conv2d(x: Array, weight: Array) -> Array:
    """Blur, then convolve with stride 2: the discriminator's down-sampling.

    Args:
      x: [batch, height, width, in_channels].
      weight: [k, k, in_channels, out_channels], k 1 or 3.

    Returns:
      [batch, height / 2, width / 2, out_channels].
    """
    size = weight.shape[0]
    total = len(FIR) - 2 + size - 1
    blurred = upfirdn2d(x, fir_kernel(), pad=((total + 1) // 2, total // 2))
    return lax.conv_general_dilated(
        blurred,
        weight.astype(x.dtype),
        window_strides=(2, 2),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
