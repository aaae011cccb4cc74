"""Whose face it is: networks that give one unit vector a picture.

- `ArcFace`: the IR-SE50 network that pSp, e4e and JoJoGAN's paper judge with (Deng et
  al., arXiv 1801.07698; weights by TreB1eN), read from `model_ir_se50.pth`.
- `FaceDescriptor`: dlib's residual network of 128 numbers (D. King, 2017), in
  face-api.js's form. It ships as `face_descriptor`: nothing has to be fetched.

Both take pictures aligned as FFHQ's and cut the face out of a fixed place; what is
outside of it does not count. The identity loss is `1 - sum(embed(a) * embed(b))`.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxstyle.encoders import (
    adaptive_pool,
    batch_norm,
    norm_shapes,
    trunk,
    trunk_shapes,
)
from jaxstyle.errors import UserError
from jaxstyle.init import Full, Normal, initialize, module_params

# Size of the aligned picture that the crops are measured in.
ALIGNED = 256
Params = Mapping[str, Any]


def face_crop(images: Array, rows: slice, columns: slice, size: int) -> Array:
    """A square of aligned pictures, averaged to [batch, size, size, 3].

    Args:
      images: [batch, height, height, 3]; brought to 256 px first (averaged, or pixels
        repeated where they are smaller).
      rows, columns: of the 256 px picture, equally many.
      size: of the result.
    """
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise UserError(
            f"images have shape {list(images.shape)}; identity is judged on aligned "
            "colour pictures [batch, size, size, 3]"
        )
    if images.shape[1] != ALIGNED:
        images = adaptive_pool(images, ALIGNED)
    return adaptive_pool(images[:, rows, columns], size)


def unit(x: Array) -> Array:
    """Vectors [batch, n] scaled to length 1."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class ArcFace(nn.Module):
    """IR-SE50 with its head: `apply({"params": p}, crops) -> [batch, width]`, unit.

    Attributes:
      size: of the crops.
      units, channels, se_ratio: of the trunk, see `jaxstyle.encoders`.
      width: of the embedding.
      dtype: of the convolutions.
    """

    size: int = 112
    units: tuple[int, ...] = (3, 4, 14, 3)
    channels: tuple[int, ...] = (64, 128, 256, 512)
    se_ratio: int = 16
    width: int = 512
    dtype: Any = "float32"

    def init_params(self, *, key: Array) -> dict:
        """A random network: {input, body_*, norm, dense, norm_out}.

        `dense` reads the last stage flattened in H, W, C order.
        """
        last = self.size >> len(self.units)
        flat = last * last * self.channels[-1]
        shapes = trunk_shapes(3, self.units, self.channels, self.se_ratio)
        shapes |= {
            "norm": norm_shapes(self.channels[-1]),
            "dense": {
                "weight": Normal((flat, self.width), flat**-0.5),
                "bias": Full((self.width,)),
            },
            "norm_out": norm_shapes(self.width),
        }
        return initialize(shapes, key=key)

    def setup(self):
        self.params = module_params(self)

    def crop(self, images: Array) -> Array:
        """The part of aligned pictures that pSp's identity loss sees."""
        return face_crop(images, slice(35, 223), slice(32, 220), self.size)

    def embed(self, images: Array) -> Array:
        """Aligned pictures [batch, h, h, 3] in [-1, 1] to unit vectors."""
        return self(self.crop(images))

    def __call__(self, crops: Array) -> Array:
        """Crops [batch, size, size, 3] in [-1, 1] to unit vectors, float32."""
        p = self.params
        features, _ = trunk(p, crops, self.units, train=False, dtype=self.dtype)
        x = features[f"stage_{len(self.units) - 1}"].astype(jnp.float32)
        x, _ = batch_norm(p["norm"], x, False)
        x = x.reshape(x.shape[0], -1) @ p["dense"]["weight"] + p["dense"]["bias"]
        x, _ = batch_norm(p["norm_out"], x, False)
        return unit(x)


# Mean colour (0 to 255) of the pictures the descriptor was trained on.
_MEAN = (122.782, 117.001, 104.298)


class FaceDescriptor(nn.Module):
    """dlib's face descriptor: `apply({"params": p}, crops) -> [batch, width]`.

    The published vectors are about 1.4 long, and the distance of two of them is below
    0.6 for one person. Most of that length is common to all faces: `embed` takes the
    mean of this project's drawn heads away, so that two of them have a cosine about 0.

    Attributes:
      units: residual blocks a stage; all stages but the first halve the size.
      channels: of the stages.
      width: of the descriptor.
    """

    units: tuple[int, ...] = (3, 4, 3, 3, 1)
    channels: tuple[int, ...] = (32, 64, 128, 256, 256)
    width: int = 128

    def init_params(self, *, key: Array) -> dict:
        """A random network: {input, block_0 .., dense, center}.

        A layer holds `weight` [k, k, in, out] and `bias`, and `scale` and `shift` [out]
        that follow the convolution.
        """

        def layer(k, width_in, width_out):
            return {
                "weight": Normal(
                    (k, k, width_in, width_out), (k * k * width_in) ** -0.5
                ),
                "bias": Full((width_out,)),
                "scale": Full((width_out,), 1.0),
                "shift": Full((width_out,)),
            }

        width = self.channels[0]
        shapes: dict[str, Any] = {"input": layer(7, 3, width)}
        for count, width_out in zip(self.units, self.channels, strict=True):
            for _ in range(count):
                shapes[f"block_{len(shapes) - 1}"] = {
                    "conv1": layer(3, width, width_out),
                    "conv2": layer(3, width_out, width_out),
                }
                width = width_out
        shapes["dense"] = {"weight": Normal((width, self.width), width**-0.5)}
        shapes["center"] = Full((self.width,))
        return initialize(shapes, key=key)

    def setup(self):
        self.params = module_params(self)

    def crop(self, images: Array) -> Array:
        """The face about as dlib cuts it out: half as wide again as the brows."""
        return face_crop(images, slice(59, 233), slice(41, 215), 150)

    def embed(self, images: Array) -> Array:
        """Aligned pictures [batch, h, h, 3] in [-1, 1] to unit vectors."""
        return unit(self(self.crop(images)) - self.params["center"])

    def __call__(self, crops: Array) -> Array:
        """Crops [batch, 150, 150, 3] in [-1, 1] to descriptors, float32."""
        p = self.params
        x = (crops.astype(jnp.float32) * 127.5 + 127.5 - jnp.array(_MEAN)) / 255
        x = jax.nn.relu(_scaled_conv(p["input"], x, 2, "VALID"))
        x = nn.max_pool(x, (3, 3), (2, 2))
        i = 0
        for stage, count in enumerate(self.units):
            for j in range(count):
                x = _residual(p[f"block_{i}"], x, stage > 0 and j == 0)
                i += 1
        return jnp.mean(x, (1, 2)) @ p["dense"]["weight"]


def _residual(params: Params, x: Array, halve: bool) -> Array:
    stride, padding = (2, "VALID") if halve else (1, "SAME")
    y = jax.nn.relu(_scaled_conv(params["conv1"], x, stride, padding))
    y = _scaled_conv(params["conv2"], y, 1, "SAME")
    if halve:
        # Unpadded convolutions give a pixel less than pooling, and the stage more
        # channels: both are filled with zeros.
        x = nn.avg_pool(x, (2, 2), (2, 2))
    shape = [max(a, b) for a, b in zip(x.shape, y.shape, strict=True)]
    return jax.nn.relu(_padded(x, shape) + _padded(y, shape))


def _padded(x: Array, shape: list[int]) -> Array:
    return jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, shape, strict=True)])


def _scaled_conv(params: Params, x: Array, stride: int, padding: str) -> Array:
    x = lax.conv_general_dilated(
        x,
        params["weight"],
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return (x + params["bias"]) * params["scale"] + params["shift"]
