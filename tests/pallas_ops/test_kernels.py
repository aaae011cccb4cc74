"""The TPU kernels against `reference.py`, interpreted; and what guards them."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from pallas_ops import (
    activated_conv2d,
    cell_conv_tpu,
    modulated_conv,
    modulated_conv2d,
    modulated_conv_tpu,
    reference,
)
from pallas_ops.cells import pack, packing_of, unpack
from tests.pallas_ops.test_ops import assert_near, normal

# name: (in channels, out channels, up, width of the input); the channels of the 1024 px
# generator, pictures as narrow as a kernel takes.
LAYERS = {
    "conv_1024": (32, 32, False, 64),
    "conv_512": (64, 64, False, 32),
    "conv_256": (128, 128, False, 16),
    "conv_128": (256, 256, False, 16),
    "conv_64": (512, 512, False, 16),
    "up_1024": (64, 32, True, 32),
    "up_512": (128, 64, True, 16),
    "up_256": (256, 128, True, 16),
    "up_128": (512, 256, True, 16),
    "up_64": (512, 512, True, 16),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two rows a block, and two blocks of outputs where there are 256."""
    monkeypatch.setattr(cell_conv_tpu, "_block_rows", lambda height, *_: 2 - height % 2)
    monkeypatch.setattr(cell_conv_tpu, "STEP_OUTPUTS", 128)


def arguments(name, batch, height, dtype=jnp.float32):
    """x, weight, style, noise and bias of a layer."""
    channels, outputs, up, width = LAYERS[name]
    out = height * (1 + up), width * (1 + up)
    return (
        normal(0, batch, height, width, channels, dtype=dtype),
        normal(1, 3, 3, channels, outputs) / (9 * channels) ** 0.5,
        1 + 0.3 * normal(2, batch, channels),
        normal(3, 1 if batch == 1 else batch, *out),
        normal(4, outputs),
    )


def specified(up):
    """The specification in float32."""

    def layer(x, weight, style, noise, bias):
        y = reference.modulated_conv2d(x.astype(jnp.float32), weight, style, up=up)
        return reference.fused_leaky_relu(y + noise[..., None], bias)

    return layer


def by_kernels(up, interpret=True):
    """The same by the kernels, from pixels to pixels."""

    def layer(x, weight, style, noise, bias):
        channels, outputs = weight.shape[2:]
        packing = packing_of(channels)
        y = modulated_conv_tpu.modulated_conv(
            pack(x, packing),
            weight,
            style,
            modulated_conv._demodulation(weight, style),
            noise,
            bias=bias,
            up=up,
            packing=packing,
            interpret=interpret,
        )
        return unpack(
            y, modulated_conv_tpu.plan_for(channels, outputs, up=up).packing[1]
        )

    return layer


def scalar(layer, weights):
    """A functional that is nonlinear in every argument."""
    return lambda *args: jnp.sum(jnp.sin(layer(*args)) * weights)


@pytest.mark.parametrize(
    ("name", "batch", "height", "dtype"),
    [
        ("conv_1024", 3, 4, "bfloat16"),
        ("conv_256", 1, 5, "bfloat16"),
        ("conv_64", 1, 4, "bfloat16"),
        ("up_1024", 2, 4, "bfloat16"),
        ("up_512", 1, 4, "bfloat16"),
        ("up_256", 3, 3, "bfloat16"),
        ("up_64", 1, 4, "bfloat16"),
        ("conv_1024", 2, 3, "float32"),
        ("up_512", 2, 3, "float32"),
    ],
)
def test_forward(name, batch, height, dtype):
    up, args = LAYERS[name][2], arguments(name, batch, height, jnp.dtype(dtype))
    y = jax.jit(by_kernels(up))(*args)
    assert y.dtype == args[0].dtype
    assert_near(y, specified(up)(*args), 9 * LAYERS[name][0])


@pytest.mark.parametrize("name", ["conv_1024", "up_256"])
def test_gradients(name):
    """First derivatives by every argument, as a batch of two."""
    up, args = LAYERS[name][2], arguments(name, 2, 2)
    weights = normal(5, *jax.eval_shape(specified(up), *args).shape)
    ours, expected = (
        jax.jit(jax.grad(scalar(f, weights), range(5)))(*args)
        for f in (by_kernels(up), specified(up))
    )
    for a, e in zip(ours, expected, strict=True):
        assert_near(a, e, max(9 * LAYERS[name][0], weights[..., 0].size), 25)


@pytest.mark.parametrize("name", ["conv_512", "up_256"])
def test_bfloat16_gradient(name):
    """By the input; a CPU has no transposed product of bfloat16 for the weight's."""
    up, args = LAYERS[name][2], arguments(name, 1, 2, jnp.bfloat16)
    # Far from the kink, where a rounding would change the slope.
    args = *args[:4], 20.0 * (-1) ** jnp.arange(LAYERS[name][1])
    # An argument: XLA:CPU would leave out the rounding of one that it computes itself.
    g = normal(5, *jax.eval_shape(specified(up), *args).shape, dtype=jnp.bfloat16)

    def pulled(layer):
        def pull(g, *args):
            y, back = jax.vjp(lambda x: layer(x, *args[1:]), args[0])
            return back(g.astype(y.dtype))[0]

        return jax.jit(pull)(g, *args)

    got = pulled(by_kernels(up))
    assert got.dtype == jnp.bfloat16
    assert_near(got, pulled(specified(up)), 9 * LAYERS[name][1], 25)


@pytest.mark.parametrize(
    "name", ["conv_512", pytest.param("up_1024", marks=pytest.mark.slow)]
)
def test_second_derivatives(name):
    """The gradient of the gradient's norm, as path length and R1 need."""
    up, args = LAYERS[name][2], arguments(name, 1, 1)
    weights = normal(5, *jax.eval_shape(specified(up), *args).shape)

    def norm(layer):
        first = jax.grad(scalar(layer, weights), (0, 1, 2))
        return lambda *a: sum(jnp.sum(jnp.square(g)) for g in first(*a))

    ours, expected = (
        jax.jit(jax.grad(norm(f), range(5)))(*args)
        for f in (by_kernels(up), specified(up))
    )
    for a, e in zip(ours, expected, strict=True):
        assert_near(a, e, max(9 * LAYERS[name][0], weights[..., 0].size), 25)


def test_vmap():
    """A leading style axis on everything, forward and backward."""
    name = "conv_512"
    args = [jnp.stack([a, 1 - a / 2]) for a in arguments(name, 2, 2)]
    weights = normal(5, *args[0].shape[1:])

    def both(layer):
        return jax.value_and_grad(scalar(layer, weights), range(5))

    got = jax.jit(jax.vmap(both(by_kernels(False))))(*args)
    want = jax.jit(jax.vmap(both(specified(False))))(*args)
    for a, e in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_near(a, e, 9 * 64, 25)


@pytest.mark.parametrize(
    ("name", "height"), [("conv_512", 3), ("conv_128", 3), ("up_128", 3)]
)
def test_no_races(name, height, capsys):
    """Of every kernel's own writes and of its blocks' transfers, backward too.

    Three blocks of rows, and two of outputs from 256 channels.
    """
    up, args = LAYERS[name][2], arguments(name, 1, height)
    params = pltpu.InterpretParams(detect_races=True)
    weights = normal(5, *jax.eval_shape(specified(up), *args).shape)

    def both(layer):
        return jax.jit(jax.value_and_grad(scalar(layer, weights), range(5)))(*args)

    got, want = both(by_kernels(up, params)), both(specified(up))
    for a, e in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert_near(a, e, max(9 * LAYERS[name][0], weights[..., 0].size), 25)
    jax.block_until_ready(got)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize(("channels", "outputs", "k"), [(32, 64, 1), (128, 256, 3)])
def test_down(channels, outputs, k):
    """The discriminator's down-sampling and its gradients: the up-convolution's own."""
    x = normal(0, 2, 4, 32 * packing_of(channels), channels)
    weight = normal(1, k, k, channels, outputs) / (k * k * channels) ** 0.5
    bias = normal(2, outputs)
    plan = modulated_conv_tpu.plan_for(channels, outputs, down=True)

    def ours(x, weight, bias):
        padding = ((1, 1), (1, 1), (0, 0), (0, 0))
        y = modulated_conv_tpu.modulated_conv(
            pack(x, plan.packing[0]),
            jnp.pad(weight, padding) if k == 1 else weight,
            jnp.ones((2, channels)),
            jnp.ones((2, outputs)),
            bias=bias,
            down=True,
            packing=plan.packing[0],
            interpret=True,
        )
        return unpack(y, plan.packing[1])

    def specified(x, weight, bias):
        return reference.fused_leaky_relu(reference.downsample_conv2d(x, weight), bias)

    weights = normal(5, *jax.eval_shape(specified, x, weight, bias).shape)
    got, want = (
        jax.jit(jax.value_and_grad(scalar(f, weights), range(3)))(x, weight, bias)
        for f in (ours, specified)
    )
    for a, e in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_near(a, e, 9 * channels + weights[..., 0].size, 25)


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    """Choices fall as on a TPU; kernels are interpreted."""
    monkeypatch.setattr(modulated_conv, "_platform", lambda: "tpu")
    run = partial(modulated_conv_tpu.modulated_conv, interpret=True)
    monkeypatch.setattr(modulated_conv_tpu, "modulated_conv", run)


def kernels(function, *args) -> int:
    return str(jax.make_jaxpr(function)(*args)).count("pallas_call[")


@pytest.mark.parametrize(
    ("batch", "size", "up", "gradient"),
    [
        (8, 32, False, False),
        (8, 64, False, False),
        (8, 128, False, True),
        (8, 128, True, False),
        (8, 256, True, True),
        (1, 32, False, False),
        (1, 32, True, True),
        (4, 32, False, True),
    ],
)
def test_gradients_by_the_faster(as_on_a_tpu, batch, size, up, gradient):
    """Kernels forward; with the backward pass too where they are faster then."""
    inside = size // (1 + up)
    x, weight = normal(0, batch, inside, inside, 128), normal(1, 3, 3, 128, 128)
    style, bias = 1 + normal(2, batch, 128), normal(3, 128)

    def layer(*args, **options):
        return modulated_conv2d(*args, up=up, bias=bias, **options)

    def gradients(*args, **options):
        return jax.grad(lambda *a: jnp.sum(layer(*a, **options)), range(3))(*args)

    args = x, weight, style
    assert kernels(layer, *args) > 0
    assert (kernels(gradients, *args) > 0) == gradient
    # Nobody's choice is overruled, and styles side by side have weights of their own.
    assert kernels(partial(gradients, implementation="pallas"), *args) > 0
    assert kernels(partial(gradients, implementation="xla"), *args) == 0
    many = jax.vmap(gradients, axis_name="style")
    assert kernels(many, *(a[None] for a in args)) > 0
    convolve = partial(activated_conv2d, bias=bias)
    if not up:
        assert kernels(convolve, x, weight) > 0
        slopes = jax.grad(lambda *a: jnp.sum(convolve(*a)))
        assert (kernels(slopes, x, weight) > 0) == gradient


def test_gradient_of_another(as_on_a_tpu):
    """The two agree: forward by the kernel, both derivatives by the other."""
    args = normal(0, 1, 32, 32, 128), normal(1, 3, 3, 128, 128) / 34, normal(2, 1, 128)
    noise, bias = normal(3, 1, 32, 32), normal(4, 128)
    weights = normal(5, 1, 32, 32, 128)

    def layer(implementation, *args):
        return modulated_conv2d(
            *args, noise=noise, bias=bias, implementation=implementation
        )

    def norm(implementation):
        first = jax.grad(scalar(partial(layer, implementation), weights), range(3))
        return lambda *a: sum(jnp.sum(jnp.square(g)) for g in first(*a))

    ours, expected = jax.jit(partial(layer, None)), jax.jit(partial(layer, "xla"))
    assert_near(ours(*args), expected(*args), 9 * 128)
    got, want = (jax.jit(jax.grad(norm(i), range(3)))(*args) for i in (None, "xla"))
    for a, e in zip(got, want, strict=True):
        assert_near(a, e, 9 * 128, 25)


@pytest.mark.parametrize(
    ("batch", "size", "k", "channels", "taken"),
    [
        (4, 128, 3, 128, True),
        (8, 128, 3, 128, False),
        (8, 256, 3, 128, True),
        (4, 256, 1, 128, False),
        (4, 512, 1, 64, True),
    ],
)
def test_halved_by_the_faster(as_on_a_tpu, batch, size, k, channels, taken):
    packing = packing_of(channels)
    x = normal(0, batch, size, size // packing, packing * channels)
    weight = normal(1, k, k, channels, 128)
    halve = partial(activated_conv2d, bias=None, down=True, packing=(packing, 1))
    assert (kernels(halve, x, weight) > 0) == taken


@pytest.mark.parametrize(
    ("axes", "batch", "taken"),
    [
        ({"data": 1}, 8, False),
        ({"data": 4}, 32, False),
        ({"data": 4}, 16, True),
        ({"data": 4}, 8, True),
        # Four do not divide it: nothing is split.
        ({"data": 4}, 6, True),
        ({"style": 2, "data": 1}, 8, True),
    ],
    ids=str,
)
def test_batch_of_a_chip(as_on_a_tpu, axes, batch, taken):
    """Choices go by a chip's part of the batch; styles over chips keep the kernels."""
    x, weight = normal(0, batch, 32, 32, 128), normal(1, 3, 3, 128, 128)
    auto = (AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), auto)

    def slopes(x, weight):
        layer = partial(modulated_conv2d, style=jnp.ones((len(x), 128)))
        return jax.grad(lambda x: jnp.sum(layer(x, weight)))(x)

    with jax.set_mesh(mesh):
        assert (kernels(slopes, x, weight) > 0) == taken
