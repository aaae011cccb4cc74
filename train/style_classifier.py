"""Which style is a picture drawn in? A network that learns it from drawn heads.

`train.evaluate` trains it anew on pictures of `train.heads`, apart from all methods and
their losses, so that none of them can please it but by the style itself. Three 3 × 3
convolutions and a mean over the places; pictures are varied as for `train.clip_heads`,
since those of a generator are softer than drawn ones.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from jaxstyle.init import Full, Normal, initialize
from train.clip_heads import varied

SIZE = 64
WIDTHS = (16, 32, 64)


def init_params(styles: int, *, key: Array) -> dict:
    """Parameters for so many styles: `conv_0` .., `dense`."""
    shapes, width = {}, 3
    for i, out in enumerate(WIDTHS):
        scale = (2 / (9 * 4 * width)) ** 0.5
        shapes[f"conv_{i}"] = {
            "weight": Normal((3, 3, 4 * width, out), scale),
            "bias": Full((out,)),
        }
        width = out
    shapes["dense"] = {"weight": Normal((width, styles), width**-0.5)}
    return initialize(shapes, key=key)


def logits(params: Mapping, pictures: Array) -> Array:
    """Of pictures [batch, 64, 64, 3] in [-1, 1]: [batch, styles]."""
    x = pictures
    for i in range(len(WIDTHS)):
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, height // 2, width // 2, 4 * channels)
        layer = params[f"conv_{i}"]
        x = lax.conv_general_dilated(
            x,
            layer["weight"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.leaky_relu(x + layer["bias"], 0.2)
    return jnp.mean(x, (1, 2)) @ params["dense"]["weight"]


def learn(
    pictures: Mapping[str, np.ndarray], steps: int, *, seed: int = 0, batch: int = 64
) -> dict:
    """Parameters trained on pictures by style, uint8 [n, size, size, 3] each."""
    key, rng = jax.random.key(seed), np.random.default_rng(seed)
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    params = init_params(len(pictures), key=key)
    opt_state, stacks = tx.init(params), list(pictures.values())

    @jax.jit
    def step(params, opt_state, x, labels):
        def loss(params):
            each = optax.softmax_cross_entropy_with_integer_labels(
                logits(params, x), labels
            )
            return jnp.mean(each)

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(steps):
        labels = rng.integers(len(stacks), size=batch)
        chosen = [stacks[i][rng.integers(len(stacks[i]))] for i in labels]
        x = np.stack([varied(picture, SIZE, 0.1, rng) for picture in chosen])
        params, opt_state = step(params, opt_state, x, labels)
    return params


@jax.jit
def named(params: Mapping, pictures: Array) -> Array:
    """Number of the style of each picture [batch, size, size, 3]: [batch]."""
    pictures = jnp.clip(pictures, -1, 1)  # as in a file
    batch, _, _, channels = pictures.shape
    shape = (batch, SIZE, SIZE, channels)
    return jnp.argmax(logits(params, jax.image.resize(pictures, shape, "linear")), -1)
