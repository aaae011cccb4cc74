"""Modulated convolution (Karras et al. 2020, arXiv 1912.04958, section 2.2).

The weight is shared by the batch: the style scales the input's channels and the
demodulation scales the output's. That equals one weight a sample and needs half
the memory traffic.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_ops.convolution import conv2d, up_conv2d


def pick_implementation(implementation: str | None = None) -> str:
    """The implementation that runs: the named one, or the best there is for `None`.

    Raises:
      NotImplementedError: `pallas`, which has no kernel here.
      ValueError: another name.
    """
    if implementation == "pallas":
        raise NotImplementedError(
            "implementation 'pallas': there is no Pallas kernel for the "
            f"{jax.default_backend()} backend; use None or 'xla'"
        )
    if implementation not in (None, "xla"):
        raise ValueError(
            f"implementation is {implementation!r}; it must be None, 'xla' or 'pallas'"
        )
    return "xla"


def modulated_conv2d(
    x: Array,
    weight: Array,
    style: Array,
    *,
    up: bool = False,
    demodulate: bool = True,
    implementation: str | None = None,
) -> Array:
    """Convolve with a weight scaled by the style, output channels normalised.

    Args:
      x: [batch, height, width, in_channels].
      weight: [k, k, in_channels, out_channels], k 1 or 3, equalised already.
      style: [batch, in_channels].
      up: double the size (transposed convolution and FIR blur); k is 3.
      demodulate: divide each output channel by its weight's norm (equation 3).
      implementation: `xla`, `pallas`, or None for the best there is.

    Returns:
      [batch, height, width, out_channels], twice the size with `up`; dtype of `x`.

    Raises:
      NotImplementedError: a named implementation that cannot run here.
    """
    pick_implementation(implementation)
    style = style.astype(jnp.float32)

    # Scaled again in the backward pass rather than kept beside `x`.
    @jax.checkpoint
    def convolve(x, style, weight):
        scaled = x * style[:, None, None, :].astype(x.dtype)
        return up_conv2d(scaled, weight) if up else conv2d(scaled, weight)

    y = convolve(x, style, weight)
    if demodulate:
        # Nine terms by hand: a reduction over leading axes is slow on a CPU.
        taps = weight.astype(jnp.float32).reshape(-1, *weight.shape[2:])
        energy = sum(jnp.square(tap) for tap in taps)
        scale = lax.rsqrt(jnp.square(style) @ energy + 1e-8)
        y = y * scale[:, None, None, :].astype(y.dtype)
    return y


@jax.custom_vjp
def _leaky_relu(x: Array) -> Array:
    return jnp.where(x >= 0, x, 0.2 * x) * jnp.asarray(2**0.5, x.dtype)


def _leaky_relu_backward(out: Array, g: Array) -> tuple[Array]:
    # The output has the input's sign and is kept anyway, as the next layer's input.
    return (jnp.where(out >= 0, g, 0.2 * g) * jnp.asarray(2**0.5, g.dtype),)


_leaky_relu.defvjp(lambda x: (_leaky_relu(x),) * 2, _leaky_relu_backward)


def fused_leaky_relu(x: Array, bias: Array) -> Array:
    """`leaky_relu(x + bias, 0.2) * sqrt(2)`; bias over the last axis."""
    return _leaky_relu(x + bias.astype(x.dtype))
