"""Residual networks of torchvision's layout (He et al., arXiv 1512.03385).

ResNet-50 with weights of MoCo v2 (Chen et al., arXiv 2003.04297) is pSp's judge of
similarity where pictures show no faces.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxstyle.encoders import batch_norm, conv, norm_shapes
from jaxstyle.errors import UserError
from jaxstyle.init import Normal, initialize, module_params

# Size of the pictures that pSp's MoCo loss looks at.
INPUT = 224
WIDTHS = (64, 128, 256, 512)
Params = Mapping[str, Any]


class ResNet(nn.Module):
    """A ResNet without its classifier: `apply({"params": p}, images) -> [batch, n]`.

    Attributes:
      units: residual blocks in each of the four stages; (3, 4, 6, 3) for 34 and 50.
      bottleneck: blocks of three convolutions, four times as wide (50 and more), or of
        two (18 and 34).
      dtype: of the convolutions.
    """

    units: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    dtype: Any = "float32"

    def init_params(self, *, key: Array) -> dict:
        """A random network: {input, block_0 ..}; batch norms as in the encoders."""

        def layer(k, width_in, width_out):
            scale = (2 / (k * k * width_in)) ** 0.5
            weight = Normal((k, k, width_in, width_out), scale)
            return {"conv": weight, "norm": norm_shapes(width_out)}

        shapes, width = {"input": layer(7, 3, WIDTHS[0])}, WIDTHS[0]
        for stage, count in enumerate(self.units):
            inner = WIDTHS[stage]
            outer = inner * 4 if self.bottleneck else inner
            for i in range(count):
                if self.bottleneck:
                    layers = (1, width, inner), (3, inner, inner), (1, inner, outer)
                else:
                    layers = (3, width, inner), (3, inner, outer)
                block = {f"layer_{j}": layer(*k) for j, k in enumerate(layers)}
                if i == 0 and (stage > 0 or width != outer):
                    block["shortcut"] = layer(1, width, outer)
                shapes[f"block_{len(shapes) - 1}"] = block
                width = outer
        return initialize(shapes, key=key)

    def setup(self):
        self.params = module_params(self)

    def embed(self, images: Array) -> Array:
        """Pictures [batch, h, h, 3] in [-1, 1] to unit vectors, as pSp's MoCo loss.

        They are brought to 224 px by nearest neighbours, without the normalisation of
        colours that the network was trained with: that is what was published.
        """
        if images.ndim != 4 or images.shape[3] != 3:
            raise UserError(
                f"images have shape {list(images.shape)}; similarity is judged on "
                "colour pictures [batch, height, width, 3]"
            )
        rows, columns = (np.arange(INPUT) * n // INPUT for n in images.shape[1:3])
        x = self(images[:, rows][:, :, columns])
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    def __call__(self, images: Array) -> Array:
        """Means of the last stage, float32, of pictures [batch, height, width, 3]."""
        p = self.params
        x = images.astype(self.dtype)
        x = jax.nn.relu(_normed_conv(p["input"], x, 2))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        i = 0
        for stage, count in enumerate(self.units):
            for j in range(count):
                stride = 2 if stage > 0 and j == 0 else 1
                x = self._block(p[f"block_{i}"], x, stride)
                i += 1
        return jnp.mean(x.astype(jnp.float32), (1, 2))

    def _block(self, params: Params, x: Array, stride: int) -> Array:
        names = [name for name in params if name.startswith("layer_")]
        # torchvision halves in the 3x3 convolution.
        halving = 1 if self.bottleneck else 0
        y = x
        for j in range(len(names)):
            y = _normed_conv(params[f"layer_{j}"], y, stride if j == halving else 1)
            if j + 1 < len(names):
                y = jax.nn.relu(y)
        if "shortcut" in params:
            x = _normed_conv(params["shortcut"], x, stride)
        return jax.nn.relu(x + y)


def _normed_conv(params: Params, x: Array, stride: int) -> Array:
    x = conv(x, params["conv"], stride=stride)
    return batch_norm(params["norm"], x, False)[0]
