"""LPIPS, the learned perceptual distance of two pictures.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric" (2018), version 0.1: activations of AlexNet or VGG-16 are normalised over
their channels, their squared differences weighted by learned heads (eq. 1).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxstyle.errors import UserError

# Mean and deviation of ImageNet's colours for pictures in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)

# One entry a convolution: (kernel, channels, pool before it, tapped after it).
_ALEX = (
    (11, 64, False, True),
    (5, 192, True, True),
    (3, 384, True, True),
    (3, 256, False, True),
    (3, 256, False, True),
)
_VGG = tuple(
    (3, channels, stage > 0 and i == 0, i == count - 1)
    for stage, (channels, count) in enumerate(
        [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]
    )
    for i in range(count)
)
TRUNKS = {"alex": _ALEX, "vgg": _VGG}
SMALLEST = 32


class LPIPS(nn.Module):
    """LPIPS as a module; `apply({"params": p}, a, b)` gives a distance a picture.

    Give the parameters to a jitted function as an argument: closed over, XLA folds
    whole convolutions while it compiles, which takes minutes.

    Attributes:
        net: "alex" (the usual one) or "vgg".
        dtype: of the convolutions; normalisation and distance are float32.
    """

    net: str = "alex"
    dtype: str = "float32"

    def __call__(self, a, b):
        """Distance of `a` and `b` `[batch, height, width, 3]` in [-1, 1]: `[batch]`."""
        return distance(self.variables["params"], a, b, net=self.net, dtype=self.dtype)

    def features(self, images):
        """Normalised activations, see the function `features`."""
        params = self.variables["params"]
        return features(params, images, net=self.net, dtype=self.dtype)

    def feature_distance(self, images, target):
        """Distance of `images` to what `features` gave for other pictures: `[batch]`.

        A target batch of 1 is compared with every picture.
        """
        return feature_distance(
            self.variables["params"], self.features(images), target
        )

    def init_params(self, *, key):
        """Random parameters; real ones come with the package ("lpips_alexnet")."""
        return init_params(key=key, net=self.net)


def init_params(*, key, net="alex"):
    """Random parameters of the trunk and even heads, `{"conv_0": ..., "head_0": ...}`.

    Shapes: weights `[k, k, in, out]`, biases `[out]`, heads `[channels]`.
    """
    params, inputs, taps = {}, 3, 0
    trunk = _trunk(net)
    for i, (part, (kernel, channels, _, tapped)) in enumerate(
        zip(jax.random.split(key, len(trunk)), trunk, strict=True)
    ):
        shape = (kernel, kernel, inputs, channels)
        scale = (2 / (kernel * kernel * inputs)) ** 0.5
        params[f"conv_{i}"] = {
            "weight": scale * jax.random.normal(part, shape),
            "bias": jnp.zeros(channels),
        }
        if tapped:
            params[f"head_{taps}"] = jnp.full(channels, 1 / channels)
            taps += 1
        inputs = channels
    return params


def features(params, images, *, net="alex", dtype="float32"):
    """Activations of the five tapped layers, each of length 1 over its channels.

    Args:
        params: trunk and heads.
        images: `[batch, height, width, 3]` in [-1, 1], both sides at least 32.
        net: "alex" or "vgg".
        dtype: of the convolutions.

    Returns:
        A tuple of five float32 arrays `[batch, height', width', channels]`.

    Raises:
        UserError: unknown net, or pictures too small or not RGB.
    """
    trunk = _trunk(net)
    if images.ndim != 4 or images.shape[3] != 3 or min(images.shape[1:3]) < SMALLEST:
        raise UserError(
            f"images: shape {images.shape}; LPIPS takes [batch, height, width, 3] "
            f"with sides of at least {SMALLEST}; enlarge the pictures first"
        )
    x = (images.astype(jnp.float32) - jnp.array(_SHIFT)) / jnp.array(_SCALE)
    x, out = x.astype(dtype), []
    for i, (_, _, pool, tapped) in enumerate(trunk):
        layer = params[f"conv_{i}"]
        weight, bias = layer["weight"].astype(dtype), layer["bias"].astype(dtype)
        if pool:
            window = 3 if net == "alex" else 2
            x = nn.max_pool(x, (window, window), strides=(2, 2))
        convolve = _stem if weight.shape[0] == 11 else _convolve
        x = jax.nn.relu(convolve(x, weight) + bias)
        if tapped:
            out.append(_normalise(x.astype(jnp.float32)))
    return tuple(out)


def feature_distance(params, a, b):
    """Distance of two results of `features`: `[batch]`; a batch of 1 broadcasts."""
    total = 0.0
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        squares = jnp.square(one - other).mean(axis=(1, 2))
        total += squares @ lax.stop_gradient(params[f"head_{i}"]).astype(jnp.float32)
    return total


def distance(params, a, b, *, net="alex", dtype="float32"):
    """LPIPS of `a` and `b` `[batch, height, width, 3]` in [-1, 1]: `[batch]`."""
    both = features(params, jnp.concatenate([a, b]), net=net, dtype=dtype)
    count = a.shape[0]
    return feature_distance(params, [f[:count] for f in both], [f[count:] for f in both])


def _trunk(net):
    if net not in TRUNKS:
        raise UserError(f"net: {net!r}; LPIPS has the nets {', '.join(TRUNKS)}")
    return TRUNKS[net]


def _normalise(x):
    # A column of zeros has length 0, whose gradient is infinite: take the root of 1
    # there, so that black pictures have finite gradients (the column stays 0).
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    empty = squares == 0
    length = jnp.where(empty, 0.0, jnp.sqrt(jnp.where(empty, 1.0, squares)))
    return x / (length + 1e-10)


def _convolve(x, weight):
    return lax.conv_general_dilated(
        x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _stem(x, weight):
    """AlexNet's first convolution: 11x11, stride 4, padding 2.

    Written over 4x4 blocks as a 3x3 convolution of stride 1, whose gradient is
    much faster on a CPU than the one of a strided convolution.
    """
    batch, height, width, channels = x.shape
    rows, columns = (height - 7) // 4 + 3, (width - 7) // 4 + 3
    x = jnp.pad(
        x,
        (
            (0, 0),
            (2, 4 * rows - height - 2),
            (2, 4 * columns - width - 2),
            (0, 0),
        ),
    )
    x = x.reshape(batch, rows, 4, columns, 4, channels).swapaxes(2, 3)
    x = x.reshape(batch, rows, columns, 16 * channels)
    weight = jnp.pad(weight, ((0, 1), (0, 1), (0, 0), (0, 0)))
    weight = weight.reshape(3, 4, 3, 4, channels, -1).swapaxes(1, 2)
    weight = weight.reshape(3, 3, 16 * channels, -1)
    return lax.conv_general_dilated(
        x, weight, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
