"""Modulated convolution (Karras et al. 2020, arXiv 1912.04958, section 2.2).

The weight is shared by the batch: the style scales the input's channels and the
demodulation scales the output's. That equals one weight a sample and needs half
the memory traffic.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_ops import modulated_conv_tpu as tpu
from pallas_ops.cells import LANES, pack, unpack
from pallas_ops.convolution import conv2d, downsample_conv2d, up_conv2d

# Smallest output a kernel is the default for: below, XLA's convolutions are as fast.
KERNEL_FROM = 32
# Pictures a chip that XLA lays out as the rows of a register; its convolutions of 128
# channels or more then come close to the chip's limit, up to so many pixels a side.
WHOLE_BATCH = 8
WHOLE_BATCH_CONV, WHOLE_BATCH_RESAMPLED = 64, 128
# Axes of a mesh that a batch is split over.
BATCH = ("data", "fsdp")


def _platform() -> str:
    """The platform a traced program is for: that of the mesh in use, if any."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def pick_implementation(
    implementation: str | None = None,
    *,
    unsupported: str | None = None,
    preferred: bool = True,
) -> str:
    """The implementation that runs: the named one, or the best there is for `None`.

    Args:
      implementation: `xla`, `pallas` or None.
      unsupported: why the kernel cannot take the arguments, if it cannot.
      preferred: whether the kernel is the faster one where both run.

    Raises:
      NotImplementedError: `pallas` where it cannot run, with the reason.
      ValueError: another name.
    """
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(
            f"implementation is {implementation!r}; it must be None, 'xla' or 'pallas'"
        )
    if _platform() != "tpu":
        unsupported = (
            f"there is no Pallas kernel for the {_platform()} backend; "
            "use None or 'xla'"
        )
    elif jax.sharding.get_abstract_mesh().shape.get("space", 1) > 1:
        unsupported = "rows are split over the mesh's `space` axis; use None or 'xla'"
    if implementation == "pallas" and unsupported:
        raise NotImplementedError(f"implementation 'pallas': {unsupported}")
    if implementation is None and not (unsupported or not preferred):
        return "pallas"
    return implementation or "xla"


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


def _demodulation(weight: Array, style: Array) -> Array:
    """One over the norm of each sample's output channels: [batch, out] float32."""
    # Nine terms by hand: a reduction over leading axes is slow on a CPU.
    taps = weight.astype(jnp.float32).reshape(-1, *weight.shape[2:])
    energy = sum(jnp.square(tap) for tap in taps)
    return lax.rsqrt(jnp.square(style) @ energy + 1e-8)


def _kernel_pays(shape, weight, up: bool, down: bool) -> bool:
    """Whether the kernel is the faster one, by the compiler's count.

    Its blur lies in its taps, 36 a pixel of the smaller picture instead of 9, and a 1×1
    skip has as many: where XLA lays out well, it halves pictures faster.
    """
    size = shape[1] * (1 + up)
    if down and min(weight[2:]) >= LANES:
        if weight[0] == 1:
            return False
        if shape[0] // _parts(shape[0]) % WHOLE_BATCH == 0:
            return size > WHOLE_BATCH_RESAMPLED
    return size >= KERNEL_FROM * (1 + down)


def _kernel_gradient_pays(shape, weight, up: bool) -> bool:
    """Whether that holds with the backward pass too.

    The kernels' comes from the gradient of each picture's own weight. Where pictures
    are small, many of them mean more traffic than XLA's has, and at 32 px even that of
    one picture outweighs the two convolutions. Of styles side by side each has
    weights of its own anyway.
    """
    size, batch = shape[1] * (1 + up), shape[0] // _parts(shape[0])
    if min(weight[2:]) < LANES or _styles_side_by_side():
        return True
    if batch % WHOLE_BATCH == 0:
        return size > (WHOLE_BATCH_RESAMPLED if up else WHOLE_BATCH_CONV)
    return batch > 1 or up or size > KERNEL_FROM


def _styles_side_by_side() -> bool:
    """Whether this is mapped over an axis `style`, of a mesh or of `vmap` alone."""
    if jax.sharding.get_abstract_mesh().shape.get("style", 1) > 1:
        return True
    try:
        lax.axis_size("style")
    except NameError:
        return False
    return True


def _with_gradient_of(function, other):
    """`function`; but where its gradient is wanted, `other`, which equals it."""
    either = jax.custom_vjp(function)
    either.defvjp(lambda *args: jax.vjp(other, *args), lambda pull, g: pull(g))
    return either


def _pick(shape, weight, up, down, packing, implementation):
    """The implementation for an input of this shape, and its output's packing."""
    preferred = _kernel_pays(shape, weight, up, down)
    if implementation != "xla" and down and weight[0] == 1:
        weight = 3, 3, *weight[2:]
    picked = pick_implementation(
        implementation,
        unsupported=tpu.unsupported(shape, weight, up=up, down=down, packing=packing),
        preferred=preferred,
    )
    if picked == "xla":
        return picked, 1
    return picked, tpu.plan_for(*weight[2:], up=up, down=down).packing[1]


def output_packing(
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    *,
    up: bool = False,
    down: bool = False,
    packing: int = 1,
    implementation: str | None = None,
) -> int:
    """Columns of a cell in which a layer's output is computed.

    A caller that keeps to it from layer to layer spares the copies between layouts.

    Args:
      shape: of the input, [batch, height, width / packing, packing * channels].
      weight: shape [k, k, in_channels, out_channels].
      up, packing, implementation: as in `modulated_conv2d`.
      down: as in `activated_conv2d`.
    """
    return _pick(shape, weight, up, down, packing, implementation)[1]


def modulated_conv2d(
    x: Array,
    weight: Array,
    style: Array,
    *,
    up: bool = False,
    demodulate: bool = True,
    noise: Array | None = None,
    noise_strength: Array | None = None,
    bias: Array | None = None,
    packing: tuple[int, int] = (1, 1),
    implementation: str | None = None,
) -> Array:
    """Convolve with a weight scaled by the style, output channels normalised.

    With `bias`, noise, bias and leaky ReLU follow, as in `fused_leaky_relu`.

    Args:
      x: [batch, height, width, in_channels], or packed: `packing[0]` neighbouring
        columns side by side in the channels, see `pallas_ops.cells`.
      weight: [k, k, in_channels, out_channels], k 1 or 3, equalised already.
      style: [batch, in_channels].
      up: double the size (transposed convolution and FIR blur); k is 3.
      demodulate: divide each output channel by its weight's norm (equation 3).
      noise: [1 or batch, out_height, out_width], added before the bias.
      noise_strength: [], a factor of the noise; None for 1. Given apart, because its
        gradient then costs no pass over the activation.
      bias: [out_channels]; None for the convolution alone.
      packing: columns of a cell of the input and of the output.
      implementation: `xla`, `pallas`, or None for the best there is.

    Returns:
      [batch, height, width, out_channels], twice the size with `up`, packed as asked;
      dtype of `x`.

    Raises:
      NotImplementedError: a named implementation that cannot run here.
      ValueError: noise without a bias.
    """
    if noise is not None and bias is None:
        raise ValueError("noise is given without a bias; pass zeros")
    style = style.astype(jnp.float32)
    picked, computed = _pick(
        x.shape, weight.shape, up, False, packing[0], implementation
    )

    def by_kernel(x, weight, style, *others):
        scale = jnp.ones((x.shape[0], weight.shape[3]))
        if demodulate:
            scale = _demodulation(weight, style)
        run = partial(tpu.modulated_conv, up=up, packing=packing[0])
        return _over_mesh(run, x, weight, style, scale, *others)

    def by_xla(x, weight, style, noise, strength, bias):
        convolve = _scaled_up_conv if up else _scaled_conv
        y = convolve(unpack(x, packing[0]), style, weight)
        if demodulate:
            scale = _demodulation(weight, style)
            y = y * scale[:, None, None, :].astype(y.dtype)
        if noise is not None:
            noise = noise if strength is None else strength * noise
            y = y + noise[..., None].astype(y.dtype)
        return y if bias is None else fused_leaky_relu(y, bias)

    run = by_kernel if picked == "pallas" else by_xla
    if picked == "pallas" and implementation is None:
        if not _kernel_gradient_pays(x.shape, weight.shape, up):
            run = _with_gradient_of(by_kernel, by_xla)
    y = run(x, weight, style, noise, noise_strength, bias)
    return y if packing[1] == computed else pack(unpack(y, computed), packing[1])


def _parts(batch: int) -> int:
    """Devices that share a batch: 1 where it cannot be split evenly."""
    parts = math.prod(_batch_axes().values())
    return 1 if batch % parts else parts


def _batch_axes() -> dict[str, int]:
    """The axes of the mesh in use that a batch is split over, and their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {
        name: mesh.shape[name]
        for name in BATCH
        if kinds.get(name) == AxisType.Auto and mesh.shape[name] > 1
    }


def _over_mesh(run, x, weight, style, scale, noise, strength, bias):
    """A kernel call on every device's part of the batch.

    The compiler cannot split a kernel by itself: without this every device would
    gather the whole batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    ]
    args = x, weight, style, scale, noise, strength, bias
    if not free or mesh.size == 1:
        return run(*args)
    split = P(tuple(_batch_axes())) if _parts(x.shape[0]) > 1 else P()
    noise_split = split if noise is not None and noise.shape[0] > 1 else P()
    specs = split, P(), split, split, noise_split, P(), P()
    # Styles may be split by hand already; then the other axes must be too, even those
    # of one place.
    return jax.shard_map(
        run,
        in_specs=specs,
        out_specs=split,
        axis_names=set(free),
        check_vma=False,
    )(*args)


def activated_conv2d(
    x: Array,
    weight: Array,
    bias: Array | None,
    *,
    gain: float = 1.0,
    down: bool = False,
    packing: tuple[int, int] = (1, 1),
    implementation: str | None = None,
) -> Array:
    """`gain * conv(x, weight)`; with `bias`, bias and leaky ReLU behind it.

    Args:
      x: [batch, height, width, in_channels], packed as in `modulated_conv2d`.
      weight: [k, k, in_channels, out_channels], k 1 or 3.
      bias: [out_channels], or None.
      gain: a factor of the convolution.
      down: blur and halve the size, as in `downsample_conv2d`.
      packing: columns of a cell of the input and of the output.
      implementation: `xla`, `pallas`, or None for the best there is.

    Returns:
      [batch, height, width, out_channels], half the size with `down`, packed as asked;
      dtype of `x`.

    Raises:
      NotImplementedError: a named implementation that cannot run here.
    """
    picked, computed = _pick(
        x.shape, weight.shape, False, down, packing[0], implementation
    )

    def by_kernel(x, weight, bias):
        if weight.shape[0] == 1:
            # The blur of a 1×1 lies where that of a 3×3 meets its middle tap.
            weight = jnp.pad(weight, ((1, 1), (1, 1), (0, 0), (0, 0)))
        style = jnp.ones((x.shape[0], weight.shape[2]))
        scale = jnp.full((x.shape[0], weight.shape[3]), gain)
        run = partial(tpu.modulated_conv, down=down, packing=packing[0])
        return _over_mesh(run, x, weight, style, scale, None, None, bias)

    def by_xla(x, weight, bias):
        x = unpack(x, packing[0])
        y = (downsample_conv2d if down else conv2d)(x, weight)
        y = y * jnp.asarray(gain, x.dtype)
        return y if bias is None else fused_leaky_relu(y, bias)

    run = by_kernel if picked == "pallas" else by_xla
    if picked == "pallas" and implementation is None and not down:
        if not _kernel_gradient_pays(x.shape, weight.shape, False):
            run = _with_gradient_of(by_kernel, by_xla)
    y = run(x, weight, bias)
    return y if packing[1] == computed else pack(unpack(y, computed), packing[1])


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
