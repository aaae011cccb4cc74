"""Every operation against its specification in `reference.py`, and the originals."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_ops
from pallas_ops import convolution, reference

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def assert_near(actual, expected, reduced, slack=10.0):
    """Equal up to the rounding of a sum of `reduced` products in the dtype at hand.

    Relative to the largest expected value: sums are float32, whose roundings add up
    like a random walk; bfloat16 rounds arguments and result, however long the sum.
    """
    assert actual.shape == expected.shape
    unit = 2**-9 if actual.dtype == jnp.bfloat16 else 2**-24 * reduced**0.5
    actual, expected = (np.asarray(a, np.float32) for a in (actual, expected))
    bound = unit * slack * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def modulated(module, **options):
    return partial(module.modulated_conv2d, **options)


# name: (function of a module, kernel size or None, whether it takes a style)
CASES = {
    "conv": (lambda m: m.conv2d, 3, False),
    "conv_1x1": (lambda m: m.conv2d, 1, False),
    "up_conv": (lambda m: m.up_conv2d, 3, False),
    "down_conv": (lambda m: m.downsample_conv2d, 3, False),
    "down_conv_1x1": (lambda m: m.downsample_conv2d, 1, False),
    "modulated": (modulated, 3, True),
    "modulated_up": (partial(modulated, up=True), 3, True),
    "to_rgb": (partial(modulated, demodulate=False), 1, True),
    "upsample": (lambda m: m.upsample2d, None, False),
    "downsample": (lambda m: m.downsample2d, None, False),
}
even_only = ("down_conv", "down_conv_1x1", "downsample")


def case(name, shape, outputs=6, dtype=jnp.float32):
    """Both implementations, their arguments and the size of the reduction."""
    choose, k, styled = CASES[name]
    if name in even_only:
        shape = (shape[0], shape[1] // 2 * 2, shape[2] // 2 * 2, shape[3])
    args = [normal(0, *shape, dtype=dtype)]
    if k:
        args.append(normal(1, k, k, shape[3], outputs, dtype=dtype))
    if styled:
        args.append(1 + 0.3 * normal(2, shape[0], shape[3]))
    reduced = (k or 1) ** 2 * shape[3] + 16
    return jax.jit(choose(pallas_ops)), jax.jit(choose(reference)), args, reduced


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "shape", [(1, 4, 4, 8), (2, 7, 5, 3), (3, 12, 10, 40)], ids=str
)
def test_forward(name, shape):
    ours, expected, args, reduced = case(name, shape)
    assert_near(ours(*args), expected(*args), reduced)


@pytest.mark.parametrize("name", CASES)
def test_forward_bfloat16(name):
    ours, expected, args, reduced = case(name, (2, 6, 6, 8), dtype=jnp.bfloat16)
    out = ours(*args)
    assert out.dtype == jnp.bfloat16
    exact = expected(*(a.astype(jnp.float32) for a in args))
    assert_near(out, exact, reduced)


def scalar(function, weights):
    """A functional that is nonlinear in every argument."""
    return lambda *args: jnp.sum(jnp.sin(function(*args)) * weights)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(1, 4, 4, 8), (3, 7, 6, 5)], ids=str)
def test_gradients(name, shape):
    """First derivatives, and the derivative of their squared norm."""
    ours, expected, args, reduced = case(name, shape)
    out = jax.eval_shape(expected, *args)
    weights = normal(5, *out.shape)
    argnums = tuple(range(len(args)))
    # The weight's gradient sums over the pictures.
    reduced = max(reduced, np.prod(out.shape[:3]))

    def first(f):
        return jax.grad(scalar(f, weights), argnums)

    def second(f):
        def norm(*a):
            return sum(jnp.sum(jnp.square(g)) for g in first(f)(*a))

        return jax.grad(norm, argnums)

    for derivative, slack in ((first, 25), (second, 25)):
        ours_all = jax.jit(derivative(ours))(*args)
        expected_all = jax.jit(derivative(expected))(*args)
        for a, e in zip(ours_all, expected_all, strict=True):
            assert_near(a, e, reduced, slack)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("axes", ["all", "first"])
def test_vmap(name, axes):
    """A leading style axis on everything, or on the pictures only."""
    ours, _, args, reduced = case(name, (2, 6, 6, 8))
    stacked = [jnp.stack([a, a * 0.5 + 1, -a]) for a in args]
    if axes == "first":
        stacked = [stacked[0], *args[1:]]
    in_axes = tuple([0] + [0 if axes == "all" else None] * (len(args) - 1))
    out = jax.eval_shape(ours, *args)
    gradient = jax.grad(
        scalar(ours, normal(5, *out.shape)), argnums=tuple(range(len(args)))
    )
    mapped = jax.jit(jax.vmap(ours, in_axes))(*stacked)
    mapped_gradient = jax.jit(jax.vmap(gradient, in_axes))(*stacked)
    for i in range(3):
        single = [
            a[i] if ax == 0 else a for a, ax in zip(stacked, in_axes, strict=True)
        ]
        assert_near(mapped[i], ours(*single), reduced)
        for got, want in zip(mapped_gradient, gradient(*single), strict=True):
            assert_near(got[i], want, max(reduced, np.prod(out.shape[:3])), 25)


def test_leaky_relu():
    x, bias = normal(0, 2, 5, 4, 3), normal(1, 3)
    out = pallas_ops.fused_leaky_relu(x, bias)
    assert_near(out, reference.fused_leaky_relu(x, bias), 1)
    half = pallas_ops.fused_leaky_relu(x.astype(jnp.bfloat16), bias)
    assert half.dtype == jnp.bfloat16


def test_implementation():
    args = normal(0, 1, 4, 4, 3), normal(1, 3, 3, 3, 3), normal(2, 1, 3)
    default = pallas_ops.modulated_conv2d(*args)
    named = pallas_ops.modulated_conv2d(*args, implementation="xla")
    np.testing.assert_array_equal(default, named)
    with pytest.raises(NotImplementedError, match="no Pallas kernel"):
        pallas_ops.modulated_conv2d(*args, implementation="pallas")
    with pytest.raises(ValueError, match="'triton'"):
        pallas_ops.modulated_conv2d(*args, implementation="triton")


def test_large_weight_gradients(monkeypatch):
    """The block by block forms, which small activations never reach."""
    monkeypatch.setattr(convolution, "LARGE", 1)
    monkeypatch.setattr(convolution, "BLOCK_PIXELS", 30)
    weight = normal(1, 3, 3, 4, 6)
    for name, shape in (("conv2d", (2, 9, 5, 4)), ("up_conv2d", (2, 9, 5, 4))):
        x = normal(0, *shape)
        ours, expected = getattr(pallas_ops, name), getattr(reference, name)
        cotangent = normal(2, *jax.eval_shape(expected, x, weight).shape)

        def gradient(f, x=x, g=cotangent):
            return jax.jit(jax.grad(lambda w: jnp.sum(f(x, w) * g)))(weight)

        assert_near(gradient(ours), gradient(expected), cotangent.size, 10)


@pytest.mark.parametrize("name", ["conv2d", "up_conv2d", "downsample_conv2d"])
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_groups_of_samples(monkeypatch, name, samples):
    """A few samples at a time, plain ones by Winograd's form; two derivatives."""
    # A shape of its own each time, because traces are kept.
    x, weight = normal(0, 4, 8, 8 + 2 * samples, 33), normal(1, 3, 3, 33, 32)
    monkeypatch.setattr(convolution, "GROUP", samples * x.size // 4)
    calls = []
    winograd = convolution._winograd
    monkeypatch.setattr(
        convolution, "_winograd", lambda x, w: calls.append(len(x)) or winograd(x, w)
    )
    ours, expected = getattr(pallas_ops, name), getattr(reference, name)
    cotangent = normal(2, *jax.eval_shape(expected, x, weight).shape)

    def squared_gradient(f):
        def norm(x, weight):
            gradient = jax.grad(lambda x: jnp.sum(jnp.sin(f(x, weight)) * cotangent))(x)
            return jnp.sum(jnp.square(gradient)), (f(x, weight), gradient)

        return jax.jit(jax.grad(norm, (0, 1), has_aux=True))(x, weight)

    seconds, firsts = squared_gradient(ours)
    expected_seconds, expected_firsts = squared_gradient(expected)
    for got, want in zip(firsts, expected_firsts, strict=True):
        assert_near(got, want, 9 * 33, 25)
    for got, want in zip(seconds, expected_seconds, strict=True):
        assert_near(got, want, cotangent.size, 25)
    assert set(calls) == ({samples} if name == "conv2d" else set())


# The originals' numbers (NCHW)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "stylegan2_ops.npz") as data:
        return dict(data)


def nhwc(array):
    return jnp.asarray(array.transpose(0, 2, 3, 1))


def hwio(array):
    """A stored modulated weight [1, out, in, k, k] with its equalised scale."""
    weight = jnp.asarray(array[0].transpose(2, 3, 1, 0))
    return weight / np.sqrt(np.prod(weight.shape[:3]))


def style_of(golden):
    weight = golden["mod_weight"] / np.sqrt(golden["mod_weight"].shape[1])
    return jnp.asarray(golden["w"] @ weight.T + golden["mod_bias"])


@pytest.mark.parametrize("index", range(6))
def test_upfirdn_golden(golden, index):
    up, down, *pad = map(int, golden[f"upfirdn_{index}_cfg"])
    out = pallas_ops.upfirdn2d(
        nhwc(golden["x"]), golden["k"], up=up, down=down, pad=tuple(pad)
    )
    assert_near(out, nhwc(golden[f"upfirdn_{index}"]), golden["k"].size)


@pytest.mark.parametrize("name", ["plain", "up", "rgb"])
@pytest.mark.parametrize("module", [pallas_ops, reference])
def test_modulated_conv_golden(golden, module, name):
    out = module.modulated_conv2d(
        nhwc(golden["h"]),
        hwio(golden[f"modconv_weight_{name}"]),
        style_of(golden),
        up=name == "up",
        demodulate=name != "rgb",
    )
    assert_near(out, nhwc(golden[f"modconv_{name}"]), 9 * 8)


@pytest.mark.parametrize("module", [pallas_ops, reference])
def test_resampling_golden(golden, module):
    skip = nhwc(golden["skip"])
    assert_near(module.upsample2d(skip), nhwc(golden["rgb_upsample"]), 16)
    assert_near(module.downsample2d(skip), nhwc(golden["rgb_downsample"]), 16)


def test_down_conv_golden(golden):
    """The originals' modulated down-convolution, from the plain one."""
    weight, style = hwio(golden["modconv_weight_down"]), style_of(golden)
    x = nhwc(golden["h"]) * style[:, None, None]
    energy = jnp.sum(jnp.square(weight), (0, 1))
    scale = jax.lax.rsqrt(jnp.square(style) @ energy + 1e-8)[:, None, None]
    out = pallas_ops.downsample_conv2d(x, weight) * scale
    assert_near(out, nhwc(golden["modconv_down"]), 9 * 8)


def test_leaky_relu_golden(golden):
    out = pallas_ops.fused_leaky_relu(nhwc(golden["x"]), golden["lrelu_bias"])
    assert_near(out, nhwc(golden["lrelu"]), 1)
