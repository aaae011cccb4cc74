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


def _input_scaled(convolve):
    """`convolve` on a scaled input, which the backward pass scales again.

    Keeping the scaled copy beside `x` would double the memory of a training step.
    """

    def forward(x, style, weight):
        return convolve(x * style[:, None, None, :].astype(x.dtype), weight)

    def backward(saved, g):
        x, style, weight = saved
        # XLA:CPU drops optimisation barriers and would make the scaled copy, and the
        # transposed weight, long before they are needed. Zero times the gradient is a
        # dependency that it cannot see through.
        zero = lax.platform_dependent(
            lax.stop_gradient(g[0, 0, 0, 0]),
            cpu=lambda value: 0 * value,
            default=jnp.zeros_like,
        )
        late = style + zero.astype(style.dtype), weight + zero.astype(weight.dtype)
        return jax.vjp(forward, x, *late)[1](g)

    scaled = jax.custom_vjp(forward)
    scaled.defvjp(lambda *args: (forward(*args), args), backward)
    return scaled


_scaled_conv = _input_scaled(conv2d)
_scaled_up_conv = _input_scaled(up_conv2d)


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
    y = (_scaled_up_conv if up else _scaled_conv)(x, style, weight)
    if demodulate:
        # Nine terms by hand: a reduction over leading axes is slow on a CPU.
        taps = weight.astype(jnp.float32).reshape(-1, *weight.shape[2:])
        energy = sum(jnp.square(tap) for tap in taps)
        scale = lax.rsqrt(jnp.square(style) @ energy + 1e-8)
        y = y * scale[:, None, None, :].astype(y.dtype)
    return y


def _slopes(sign: Array, x: Array) -> Array:
    """`x` times sqrt(2), and times 0.2 where `sign` is negative."""
    return x * jnp.where(sign >= 0, 2**0.5, 0.2 * 2**0.5).astype(x.dtype)


@jax.custom_vjp
def _leaky_relu(x: Array) -> Array:
    return _slopes(x, x)


def _leaky_relu_backward(out: Array, g: Array) -> tuple[Array]:
    # The output has the input's sign and is kept anyway, as the next layer's input.
    return (_slopes(out, g),)


_leaky_relu.defvjp(lambda x: (_leaky_relu(x),) * 2, _leaky_relu_backward)


def fused_leaky_relu(x: Array, bias: Array) -> Array:
    """`leaky_relu(x + bias, 0.2) * sqrt(2)`; bias over the last axis."""
    return _leaky_relu(x + bias.astype(x.dtype))
