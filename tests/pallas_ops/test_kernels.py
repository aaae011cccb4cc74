"""The TPU kernels against `reference.py`, in TPU interpret mode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import pallas_ops
from pallas_ops import cell_conv_tpu, modulated_conv, modulated_conv_tpu, reference
from pallas_ops.cells import pack, packing_of, unpack
from tests.pallas_ops.test_ops import assert_near, normal

# name: (in channels, out channels, up, width of the input); true channels of the
# 1024 px generator, pictures as narrow as a kernel takes.
LAYERS = {
    "conv_1024": (32, 32, False, 64),
    "conv_512": (64, 64, False, 32),
    "conv_256": (128, 128, False, 16),
    "conv_64": (512, 512, False, 16),
    "up_1024": (64, 32, True, 32),
    "up_512": (128, 64, True, 16),
    "up_256": (256, 128, True, 16),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """At least two blocks of rows, and two of outputs where there are 256."""
    monkeypatch.setattr(cell_conv_tpu, "STEP_CYCLES", 200)
    monkeypatch.setattr(cell_conv_tpu, "STEP_OUTPUTS", 128)


def layer(name, batch, height, dtype=jnp.float32):
    """Arguments (x, weight, style, noise, bias) of a layer."""
    channels, outputs, up, width = LAYERS[name]
    scale = 1 + up
    return (
        normal(0, batch, height, width, channels, dtype=dtype),
        normal(1, 3, 3, channels, outputs) / (9 * channels) ** 0.5,
        1 + 0.3 * normal(2, batch, channels),
        normal(3, max(1, batch - 1) and 1, height * scale, width * scale),
        normal(4, outputs),
    )


def expected(up, x, weight, style, noise, bias):
    """The specification in float32."""
    y = reference.modulated_conv2d(x.astype(jnp.float32), weight, style, up=up)
    return reference.fused_leaky_relu(y + noise[..., None], bias)


def kernel(up, x, weight, style, noise, bias, interpret=True):
    """The same by the kernels, from pixels to pixels."""
    channels, outputs = weight.shape[2:]
    packing = packing_of(channels)
    y = modulated_conv_tpu.modulated_conv(
        pack(x, packing),
        weight,
        style,
        modulated_conv._demodulation(weight, style),
        noise,
        bias,
        up=up,
        packing=packing,
        interpret=interpret,
    )
    return unpack(y, modulated_conv_tpu.output_packing(channels, outputs, up=up))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_forward(name, dtype):
    up = LAYERS[name][2]
    args = layer(name, 2, 3 if up else 6, jnp.dtype(dtype))
    y = kernel(up, *args)
    assert y.dtype == args[0].dtype
    assert_near(y, expected(up, *args), 9 * LAYERS[name][0])
