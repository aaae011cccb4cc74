"""LPIPS, the learned perceptual distance of two pictures.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric" (2018), version 0.1: activations of AlexNet or VGG-16 are normalised over
their channels, their squared differences weighted by learned heads (eq. 1).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from jaxstyle.errors import UserError
from jaxstyle.features.vgg import TRUNKS, trunk, trunk_shapes
from jaxstyle.init import Full, initialize, module_params

# Mean and deviation of ImageNet's colours for pictures in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)

# The trunk of each net, and the activations it compares.
TAPS = {
    "alex": ("alex", ("relu1_1", "relu2_1", "relu3_1", "relu3_2", "relu3_3")),
    "vgg": ("vgg16", ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")),
}
SMALLEST = 32
Params = Mapping[str, Any]


class LPIPS(nn.Module):
    """LPIPS as a module: `apply({"params": p}, a, b)` gives a distance a picture.

    Give the parameters to a jitted function as an argument: closed over, XLA folds
    whole convolutions while it compiles, which takes minutes.

    Attributes:
      net: `alex` (the usual one) or `vgg`.
      dtype: of the convolutions; normalisation and distance are float32.
    """

    net: str = "alex"
    dtype: Any = "float32"

    def init_params(self, *, key: Array) -> dict:
        """Random trunk and even heads; real ones ship as `lpips_alexnet`.

        Names: `conv_0` .. in order, with `weight` [k, k, in, out] and `bias` [out],
        and `head_0` .. `head_4` [channels].
        """
        net, taps = _taps(self.net)
        shapes = trunk_shapes(net)
        widths = {layer.name: layer.channels for layer in TRUNKS[net]}
        for i, tap in enumerate(taps):
            shapes[f"head_{i}"] = Full((widths[tap],), 1 / widths[tap])
        return initialize(shapes, key=key)

    def setup(self):
        self.params = module_params(self)

    def features(self, images: Array) -> tuple[Array, ...]:
        """Normalised activations of five layers, see the function `features`."""
        return features(self.params, images, net=self.net, dtype=self.dtype)

    def feature_distance(self, images: Array, target: Sequence[Array]) -> Array:
        """Distance [batch] to what `features` gave for target pictures.

        A target batch of 1 is compared with every picture.
        """
        return feature_distance(self.params, self.features(images), target)

    def __call__(self, a: Array, b: Array) -> Array:
        """Distance [batch] of pictures [batch, height, width, 3] in [-1, 1]."""
        # Not as one batch: of the half without a gradient none would be spared, and
        # devices that share the batch would have to exchange their pictures.
        return feature_distance(self.params, self.features(a), self.features(b))


def features(
    params: Params, images: Array, *, net: str = "alex", dtype: Any = jnp.float32
) -> tuple[Array, ...]:
    """Activations of the five tapped layers, each of length 1 over its channels.

    Args:
      params: trunk and heads.
      images: [batch, height, width, 3] in [-1, 1], both sides at least 32.
      net: `alex` or `vgg`.
      dtype: of the convolutions.

    Returns:
      Five float32 arrays [batch, height', width', channels].

    Raises:
      UserError: an unknown net, or pictures that are too small or not RGB.
    """
    trunk_name, taps = _taps(net)
    if images.ndim != 4 or images.shape[3] != 3 or min(images.shape[1:3]) < SMALLEST:
        raise UserError(
            f"images have shape {list(images.shape[1:])} each; LPIPS takes [height, "
            f"width, 3] with sides of at least {SMALLEST}: enlarge them first"
        )
    x = (images.astype(jnp.float32) - jnp.array(_SHIFT)) / jnp.array(_SCALE)
    out = trunk(params, x, trunk_name, dtype)
    return tuple(_normalise(out[tap].astype(jnp.float32)) for tap in taps)


def feature_distance(params: Params, a: Sequence[Array], b: Sequence[Array]) -> Array:
    """Distance [batch] of two results of `features`; a batch of 1 broadcasts."""
    total = 0.0
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        squares = jnp.square(one - other).mean((1, 2))
        total += squares @ lax.stop_gradient(params[f"head_{i}"])
    return total


def _taps(net):
    if net not in TAPS:
        raise UserError(f"net: {net!r}; LPIPS has the nets {', '.join(TAPS)}")
    return TAPS[net]


def _normalise(x):
    # A column of zeros has length 0, whose gradient is infinite: take the root of 1
    # there, so that black pictures have finite gradients (the column stays 0).
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    empty = squares == 0
    length = jnp.where(empty, 0.0, jnp.sqrt(jnp.where(empty, 1.0, squares)))
    return x / (length + 1e-10)
