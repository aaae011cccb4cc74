"""Trunks of AlexNet, VGG-16 and VGG-19: chains of convolutions, ReLUs and max pools.

Krizhevsky et al. 2012 (in torchvision's variant), Simonyan and Zisserman, arXiv
1409.1556. `VGG` gives activations for losses on features; `jaxstyle.features.lpips`
weighs those of AlexNet and VGG-16 into a distance.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxstyle.errors import UserError
from jaxstyle.init import Full, Normal, initialize, module_params

# Mean and deviation of ImageNet's colours in [0, 1].
_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)

Params = Mapping[str, Any]


class Layer(NamedTuple):
    """A convolution and the ReLU after it.

    Attributes:
      kernel: side of the convolution.
      channels: it gives.
      pool: whether a max pool halves the map before it.
      name: `relu1_1` ..: stage, and place in the stage.
    """

    kernel: int
    channels: int
    pool: bool
    name: str


def _vgg(*counts: int) -> tuple[Layer, ...]:
    widths = (64, 128, 256, 512, 512)
    return tuple(
        Layer(3, width, stage > 0 and i == 0, f"relu{stage + 1}_{i + 1}")
        for stage, (width, count) in enumerate(zip(widths, counts, strict=True))
        for i in range(count)
    )


TRUNKS = {
    "alex": (
        Layer(11, 64, False, "relu1_1"),
        Layer(5, 192, True, "relu2_1"),
        Layer(3, 384, True, "relu3_1"),
        Layer(3, 256, False, "relu3_2"),
        Layer(3, 256, False, "relu3_3"),
    ),
    "vgg16": _vgg(2, 2, 3, 3, 3),
    "vgg19": _vgg(2, 2, 4, 4, 4),
}


def trunk_shapes(net: str) -> dict:
    """Parameters of `trunk`: `conv_0` .. with `weight` [k, k, in, out] and `bias`."""
    shapes, width_in = {}, 3
    for i, (k, width, _, _) in enumerate(TRUNKS[net]):
        scale = (2 / (k * k * width_in)) ** 0.5
        shapes[f"conv_{i}"] = {
            "weight": Normal((k, k, width_in, width), scale),
            "bias": Full((width,)),
        }
        width_in = width
    return shapes


def trunk(params: Params, x: Array, net: str, dtype: Any) -> dict[str, Array]:
    """Activations after each ReLU by name, in order.

    Args:
      params: of `trunk_shapes`.
      x: [batch, height, width, 3], normalised as the network wants it.
      net: `alex`, `vgg16` or `vgg19`.
      dtype: of the convolutions and of the result.
    """
    x, out = x.astype(dtype), {}
    window = (3, 3) if net == "alex" else (2, 2)
    for i, (kernel, _, pool, name) in enumerate(TRUNKS[net]):
        layer = params[f"conv_{i}"]
        if pool:
            x = nn.max_pool(x, window, strides=(2, 2))
        x = _convolve(x, layer["weight"].astype(dtype), 4 if kernel == 11 else 1)
        x = out[name] = jax.nn.relu(x + layer["bias"].astype(dtype))
    return out


def _convolve(x: Array, weight: Array, stride: int) -> Array:
    # All convolutions keep the size ("same") but AlexNet's first, 11x11 by steps of 4.
    pad = (2, 2) if stride == 4 else (weight.shape[0] // 2,) * 2
    return lax.conv_general_dilated(
        x, weight, (stride,) * 2, (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class VGG(nn.Module):
    """A trunk's activations: `apply({"params": p}, images) -> {"relu1_1": ..., ...}`.

    Give the parameters to a jitted function as an argument: closed over, XLA folds
    whole convolutions while it compiles. What is not used is not computed there.

    Attributes:
      net: `vgg16`, `vgg19` or `alex`.
      dtype: of the convolutions.
    """

    net: str = "vgg19"
    dtype: Any = "float32"

    def init_params(self, *, key: Array) -> dict:
        """A random network; see `trunk_shapes`."""
        if self.net not in TRUNKS:
            raise UserError(f"net: {self.net!r}; VGG has {', '.join(TRUNKS)}")
        return initialize(trunk_shapes(self.net), key=key)

    def setup(self):
        self.params = module_params(self)

    def __call__(self, images: Array) -> dict[str, Array]:
        """Activations [batch, height', width', channels] of pictures in [-1, 1].

        Args:
          images: [batch, height, width, 3], both sides at least 16.
        """
        x = (images.astype(jnp.float32) / 2 + 0.5 - jnp.array(_MEAN)) / jnp.array(
            _DEVIATION
        )
        return trunk(self.params, x, self.net, self.dtype)
