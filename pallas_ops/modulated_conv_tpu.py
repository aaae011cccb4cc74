"""The modulated convolution on a TPU: the kernels of `cell_conv_tpu`, differentiable.

With styles s, demodulation d and a cotangent g everything comes from one form,

    T = sum over pixels of g * d * conv(s * x, weight),

whose four gradients are three operations: the convolution, its adjoint (the same kernel
with other taps) and the gradient of each picture's own weight, from which those of
weight, s and d are small sums. Every backward pass is made of these operations, so that
derivatives of any order exist.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_ops import cell_conv_tpu as kernels
from pallas_ops import cell_weight_tpu
from pallas_ops.cells import (
    LANES,
    Geometry,
    cell_weight,
    pack,
    packing_of,
    pixel_weight,
    unpack,
)


class Plan(NamedTuple):
    """What a kernel call knows at compile time.

    Attributes:
      geometry: of the cells.
      split: columns of a fine cell held one after the other; see `cell_conv_tpu`.
      interpret: run without a TPU.
    """

    geometry: Geometry
    split: int
    interpret: bool

    @property
    def split_in(self) -> int:
        """Columns of an input's cell held one after the other."""
        return self.split if self.geometry.adjoint else 1

    @property
    def split_out(self) -> int:
        """Columns of an output's cell held one after the other."""
        return 1 if self.geometry.adjoint else self.split

    @property
    def packing(self) -> tuple[int, int]:
        """Columns side by side in the channels of the input and of the output."""
        return (
            self.geometry.packing_in // self.split_in,
            self.geometry.packing_out // self.split_out,
        )

    @property
    def sums_taps(self) -> bool:
        """Whether cells are columns of 128 channels or more, their taps sums of 9."""
        return self.geometry.up and self.split == 2

    @property
    def transposed(self) -> "Plan":
        return self._replace(geometry=self.geometry.transposed)


def _call(plan: Plan, x: Array, weight: Array, scale_in: Array, scale_out: Array, **of):
    """The kernel; weights and scales of pixels, `x` and the result of cells."""
    geometry = plan.geometry
    weight = weight.astype(jnp.float32)
    weight = weight[None] if weight.ndim == 4 else weight
    if plan.sums_taps:
        cells = cell_weight_tpu.cell_weight(weight, geometry, x.dtype, plan.interpret)
    else:
        cells = cell_weight(weight, geometry).astype(x.dtype)
    return kernels.convolve(
        x,
        cells,
        geometry,
        scale_in=jnp.tile(scale_in, (1, geometry.packing_in)),
        scale_out=jnp.tile(scale_out, (1, plan.packing[1])),
        split_in=plan.split_in,
        interpret=plan.interpret,
        **of,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(
    plan: Plan,
    x: Array,
    sign: Array | None,
    weight: Array,
    scale_in: Array,
    scale_out: Array,
) -> Array:
    """`scale_out * conv(scale_in * slopes(sign) * x, weight)`.

    Args:
      plan: with an adjoint geometry this is the transposed convolution.
      x: [batch, height, rows, width, channels], cells.
      sign: like `x`: values whose signs choose the leaky ReLU's slopes; or None.
      weight: [3, 3, in, out], or one a picture [batch, 3, 3, in, out]; the plain
        convolution's also for the adjoint.
      scale_in, scale_out: [batch, in], [batch, out] float32, of this direction.
    """
    return _call(plan, x, weight, scale_in, scale_out, sign=sign)


def _conv_forward(plan, *args):
    return _conv(plan, *args), args


def _conv_backward(plan, saved, g):
    x, sign, weight, scale_in, scale_out = saved
    x = _sloped(x, sign)
    dx = _conv(plan.transposed, g, None, weight, scale_out, scale_in)
    if plan.geometry.adjoint:
        own, _ = _own_gradient(plan.transposed, g, x, None, None)
        dweight, dout, din = _scale_gradients(own, weight, scale_out, scale_in)
    else:
        own, _ = _own_gradient(plan, x, g, None, None)
        dweight, din, dout = _scale_gradients(own, weight, scale_in, scale_out)
    return _sloped(dx, sign), None, dweight, din, dout


def _sloped(x: Array, sign: Array | None) -> Array:
    """`x` times the leaky ReLU's slope where its output, or input, has this sign."""
    if sign is None:
        return x
    return x * jnp.where(sign >= 0, 1, kernels.SLOPE).astype(x.dtype)


def _scale_gradients(own: Array, weight: Array, coarse: Array, fine: Array):
    """Gradients of weight and scales from those of each picture's scaled weight."""

    def scaled(weight, coarse, fine):
        coarse, fine = coarse[:, None, None, :, None], fine[:, None, None, None]
        return weight.astype(jnp.float32) * coarse * fine

    return jax.vjp(scaled, weight, coarse, fine)[1](own)


_conv.defvjp(_conv_forward, _conv_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _own_gradient(
    plan: Plan, x: Array, g: Array, sign: Array | None, noise: Array | None
) -> tuple[Array, Array]:
    """Gradient of each picture's own weight, and sums that cost nothing beside it.

    Args:
      plan: not adjoint.
      x, g: cells.
      sign: like `g`, which is multiplied by the slopes first; or None.
      noise: as in `_styled`, or None.

    Returns:
      [batch, 3, 3, in, out] float32, and the sums over pixels of `g` and of
      `g * noise`: [batch, 2, columns of a cell * out] float32.
    """
    lanes = None if noise is None else _noise_lanes(noise, plan.geometry.packing_out)
    cells, sums = kernels.weight_gradient(
        x,
        g,
        plan.geometry,
        sign=sign,
        noise=lanes,
        split=plan.split,
        interpret=plan.interpret,
    )
    if plan.sums_taps:
        own = cell_weight_tpu.pixel_weight(cells, plan.geometry, plan.interpret)
    else:
        own = pixel_weight(cells, plan.geometry)
    return own, sums


def _own_forward(plan, *args):
    return _own_gradient(plan, *args), args


def _own_backward(plan, saved, cotangents):
    x, g, sign, noise = saved
    weight, sums = cotangents
    coarse = jnp.ones((x.shape[0], weight.shape[3]))
    fine = jnp.ones((x.shape[0], weight.shape[4]))
    dx = _conv(plan.transposed, g, sign, weight, fine, coarse)
    dg = _conv(plan, x, None, weight, coarse, fine)
    through = sums[:, :, None, None, None].astype(g.dtype)
    dg = dg + through[:, 0]
    dnoise = None
    if noise is not None:
        packing = plan.packing[1]
        dg = dg + _spread(noise, g.shape[4], packing).astype(g.dtype) * through[:, 1]
        dnoise = _gathered(_sloped(g, sign) * through[:, 1], noise, packing)
    return dx, _sloped(dg, sign), None, dnoise


_own_gradient.defvjp(_own_forward, _own_backward)


def _spread(noise: Array, channels: int, packing: int) -> Array:
    """Planes [b, height, rows, columns] over the channels of cells."""
    cells = noise.reshape(*noise.shape[:3], -1, packing)
    return jnp.repeat(cells, channels // packing, axis=4)


def _gathered(g: Array, noise: Array, packing: int) -> Array:
    """The transpose of `_spread`: sums over channels, and pictures of one plane."""
    # As a product: taking cells apart would copy the activation.
    ones = jnp.ones((g.shape[4] // packing, 1), g.dtype)
    planes = jnp.einsum(
        "bhrwk,kq->bhrqw",
        g,
        jnp.kron(jnp.eye(packing, dtype=g.dtype), ones),
        preferred_element_type=jnp.float32,
        precision="highest" if g.dtype == jnp.float32 else None,
    )
    planes = planes.swapaxes(3, 4).reshape(*g.shape[:3], -1)
    return planes if noise.shape[0] > 1 else jnp.sum(planes, 0, keepdims=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _styled(
    plan: Plan,
    x: Array,
    weight: Array,
    scale_in: Array,
    scale_out: Array,
    noise: Array | None,
    strength: Array | None,
    bias: Array,
) -> Array:
    """`leaky_relu(conv + strength * noise + bias)` in one pass; see `_conv`.

    Args:
      noise: planes [1 or batch, height, rows, columns] float32, or None.
      strength: [] float32, with `noise`.
      bias: [out] float32.
    """
    lanes = None
    if noise is not None:
        lanes = _noise_lanes(noise, plan.geometry.packing_out) * strength
    bias = jnp.tile(bias, plan.packing[1])[None]
    return _call(plan, x, weight, scale_in, scale_out, noise=lanes, bias=bias, act=True)


def _noise_lanes(noise: Array, packing: int) -> Array:
    """Planes [b, height, rows, columns] as [b, cells of a row, (row, column)]."""
    batch, height, rows, columns = noise.shape
    cells = noise.reshape(batch, height * rows, columns // packing, packing)
    lanes = cells.swapaxes(1, 2).reshape(batch, columns // packing, -1)
    return jnp.pad(lanes, ((0, 0), (0, 0), (0, -lanes.shape[2] % LANES)))


def _styled_forward(plan, x, weight, scale_in, scale_out, noise, strength, bias):
    y = _styled(plan, x, weight, scale_in, scale_out, noise, strength, bias)
    return y, (x, weight, scale_in, scale_out, noise, strength, y)


def _styled_backward(plan, saved, g):
    # The output has the sign of what went into the activation.
    x, weight, scale_in, scale_out, noise, strength, y = saved
    if plan.geometry.adjoint:
        g = _sloped(g, y)
        sums = jnp.sum(g.astype(jnp.float32), (1, 2, 3))[:, None]
        args = x, None, weight, scale_in, scale_out
        dx, _, *others = _conv_backward(plan, args, g)
    else:
        dx = _conv(plan.transposed, g, y, weight, scale_out, scale_in)
        own, sums = _own_gradient(plan, x, g, y, noise)
        others = _scale_gradients(own, weight, scale_in, scale_out)
    dnoise, dstrength = None, None
    if noise is not None:
        # Nobody computes the first unless somebody wants it.
        dnoise = strength * _gathered(_sloped(g, y), noise, plan.packing[1])
        dstrength = jnp.sum(sums[:, 1])
    dbias = jnp.sum(sums[:, 0].reshape(-1, scale_out.shape[1]), 0)
    return dx, *others, dnoise, dstrength, dbias


_styled.defvjp(_styled_forward, _styled_backward)


def plan_for(
    channels: int,
    outputs: int,
    *,
    up: bool = False,
    down: bool = False,
    interpret: bool = False,
) -> Plan:
    """The layout in which a layer runs: as many columns to a cell as lanes hold."""
    if down:
        return plan_for(outputs, channels, up=True, interpret=interpret).transposed
    packing = packing_of(channels)
    packing_out = 2 * packing if up else packing
    split = 2 if up and outputs >= LANES else 1
    return Plan(Geometry(packing, packing_out, up), split, interpret)


def unsupported(
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    *,
    up: bool = False,
    down: bool = False,
    packing: int = 1,
) -> str | None:
    """Why the kernel cannot run a layer, or None.

    Args:
      shape: of the input, [batch, height, width / packing, packing * channels].
      weight: shape [k, k, in, out].
      up, down: whether it doubles or halves the size.
      packing: columns of a cell of the input.
    """
    if weight[0] != 3:
        return f"the kernels are 3×3, not {weight[0]}×{weight[0]}"
    for channels in weight[2:]:
        if channels % LANES and LANES % channels:
            return f"{channels} channels neither divide nor are a multiple of {LANES}"
    plan = plan_for(*weight[2:], up=up, down=down)
    for channels, packed in zip(weight[2:], plan.packing, strict=True):
        if packed != packing_of(channels):
            return f"{weight[2]} and {weight[3]} channels do not follow one packing"
    width, cells = shape[2] * packing, plan.geometry.packing_in
    if width % (16 * cells) or shape[1] % (1 + down):
        return f"{shape[1]} × {width} pixels are not whole rows of {16 * cells} columns"
    return None


def modulated_conv(
    x: Array,
    weight: Array,
    style: Array,
    scale: Array,
    noise: Array | None = None,
    strength: Array | None = None,
    bias: Array | None = None,
    *,
    up: bool = False,
    down: bool = False,
    packing: int = 1,
    interpret: bool = False,
) -> Array:
    """`scale * conv(style * x, weight)`; with `bias`, noise and activation behind it.

    Args:
      x: [batch, height, width / packing, packing * in].
      weight: [3, 3, in, out].
      style: [batch, in] float32.
      scale: [batch, out] float32, the demodulation.
      noise: [1 or batch, out_height, out_width], or None.
      strength: [], a factor of the noise; None for 1.
      bias: [out], or None for the convolution alone.
      up: double the size (transposed convolution, then blur).
      down: halve it (blur, then strided convolution).
      packing: columns of a cell of `x`.
      interpret: run without a TPU.

    Returns:
      [batch, out_height, out_width / p, p * out], dtype of `x`, where p is the plan's
      `packing[1]`.
    """
    plan = plan_for(*weight.shape[2:], up=up, down=down, interpret=interpret)
    if down:
        # The adjoint of the up-convolution, whose blur has four times the gain.
        weight = weight.swapaxes(2, 3) * 0.25
    x = pack(unpack(x, packing), plan.packing[0])
    x = x.reshape(x.shape[0], -1, plan.geometry.rows_in, *x.shape[2:])
    if bias is None:
        y = _conv(plan, x, None, weight, style, scale)
    else:
        gain = 2**0.5
        if noise is not None:
            columns = x.shape[3] // plan.split_in * plan.geometry.packing_out
            shape = noise.shape[0], x.shape[1], plan.geometry.rows_out, columns
            noise = noise.astype(jnp.float32).reshape(shape)
            strength = jnp.float32(1) if strength is None else strength
            strength = strength.astype(jnp.float32) * gain
        else:
            strength = None
        bias = bias.astype(jnp.float32) * gain
        y = _styled(plan, x, weight, style, scale * gain, noise, strength, bias)
    return y.reshape(y.shape[0], -1, *y.shape[3:])
