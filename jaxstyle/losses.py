"""Losses on pictures' features, codes, noise planes and parameters.

Published terms of DualStyleGAN (Yang et al., arXiv 2203.13248) and of what it builds
on, each a pure function. Features are those of `jaxstyle.features.vgg.VGG`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

# Rows of the contextual loss's matrix at a time: 4096 columns of 256 rows take 4 MiB.
CX_ROWS = 256
CX_EPSILON = 1e-5
# The published weights of the taps: learning to mix styles, and learning a style.
MIXING_TAPS = {"relu1_1": 0.5, "relu2_1": 0.5, "relu3_1": 0.5}
STYLE_TAPS = {"relu2_1": 0.5, "relu3_1": 1.0}
MATCHED_TAPS = ("relu2_1", "relu3_1")
CX_TAP = "relu3_1"
Features = Mapping[str, Array]


def _unit(x: Array) -> Array:
    """Vectors of the last axis scaled to length 1; those of length 0 stay."""
    squares = jnp.sum(jnp.square(x), -1, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(squares, 1e-24))


def contextual(x: Array, y: Array, *, bandwidth: float = 0.2) -> Array:
    """Contextual loss (Mechrez et al., arXiv 1803.02077, eq. 1 to 5), cosine distance.

    For each feature of `y`, how much the feature of `x` that suits it best prefers it
    over the others; no place in the picture matters. The matrix of all pairs is never
    held: its rows are computed some at a time, and once more for the gradient.

    Args:
      x: features [batch, height, width, channels]; the gradient flows through them.
      y: features of the pictures to resemble, of the same shape.
      bandwidth: h, published 0.5; DualStyleGAN takes 0.2.

    Returns:
      The mean over the batch, []. The mean feature that both are centred on is that of
      the whole batch of `y`, so the value of two pictures is not the mean of theirs.
    """
    mean = jnp.mean(y, (0, 1, 2), dtype=jnp.float32)
    batch, channels = x.shape[0], x.shape[3]
    x, y = (
        _unit(a.astype(jnp.float32) - mean).reshape(batch, -1, channels) for a in (x, y)
    )
    # All pictures at once: a loop over them would bring a split batch to every device.
    best = jax.vmap(partial(_best_similarity, bandwidth=bandwidth))(x, y)
    return jnp.mean(-jnp.log(jnp.mean(best, -1) + CX_EPSILON))


def _best_similarity(x: Array, y: Array, *, bandwidth: float) -> Array:
    """For each y [positions, channels] the largest contextual similarity: [positions].

    A similarity compares one x with all y, so a row of the matrix is complete in
    itself; only the largest one crosses rows.
    """
    rows = min(CX_ROWS, x.shape[0])
    blocks = -(-x.shape[0] // rows)
    padded = jnp.pad(x, ((0, blocks * rows - x.shape[0]), (0, 0)))
    real = jnp.arange(blocks * rows) < x.shape[0]

    @jax.checkpoint
    def block(best, part):
        x, real = part
        # Distances near 0 are divided by such: no shortened products here.
        distance = 1 - jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)
        nearest = jnp.min(distance, 1, keepdims=True)
        relative = distance / (nearest + CX_EPSILON)
        similarity = jax.nn.softmax((1 - relative) / bandwidth, 1)
        similarity = jnp.where(real[:, None], similarity, 0.0)
        return jnp.maximum(best, jnp.max(similarity, 0)), None

    parts = padded.reshape(blocks, rows, -1), real.reshape(blocks, rows)
    best, _ = lax.scan(block, jnp.zeros(y.shape[0]), parts)
    return best


def feature_matching(x: Features, y: Features) -> Array:
    """Squared difference of the taps' means over each picture, averaged: []."""
    total = jnp.zeros(())
    for tap in MATCHED_TAPS:
        a, b = (jnp.mean(f[tap].astype(jnp.float32), (1, 2)) for f in (x, y))
        total += jnp.mean(jnp.square(a - b))
    return total


def perceptual(x: Features, y: Features, taps: Mapping[str, float]) -> Array:
    """Mean absolute difference of features, weighted tap by tap: [].

    Args:
      x, y: features by tap.
      taps: weights, `MIXING_TAPS` or `STYLE_TAPS`.
    """
    total = jnp.zeros(())
    for tap, weight in taps.items():
        a, b = (f[tap].astype(jnp.float32) for f in (x, y))
        total += weight * jnp.mean(jnp.abs(a - b))
    return total


def identity(a: Array, b: Array) -> Array:
    """1 - cosine of unit vectors [batch, n], averaged; `b` gets no gradient: []."""
    return jnp.mean(1 - jnp.sum(a * lax.stop_gradient(b), -1))


def parameter_norms(params: Any) -> Array:
    """Sum of the lengths (not squared) of all arrays in a tree: [].

    DualStyleGAN's regulariser of the extrinsic path without T_s; at the start the
    identities of T_c make most of it. An array of zeros has gradient 0.
    """

    def length(p):
        squares = jnp.sum(jnp.square(p.astype(jnp.float32)))
        zero = squares == 0
        return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))

    return sum(map(length, jax.tree.leaves(params)), start=jnp.zeros(()))


def row_deviation(codes: Array) -> Array:
    """Mean unbiased deviation over the rows of codes [batch, rows, width]: [].

    Facial destylisation keeps the rows of z+ together with it. Rows that are all equal
    have gradient 0.
    """
    rows = codes.shape[1]
    centred = codes - jnp.mean(codes, 1, keepdims=True)
    variance = jnp.sum(jnp.square(centred), 1) / max(rows - 1, 1)
    zero = variance == 0
    return jnp.mean(jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, variance))))


def noise_correlation(planes: Sequence[Array]) -> Array:
    """How much neighbours in noise planes have in common (arXiv 1912.04958, app. D).

    Args:
      planes: each [batch, r, r]. On every size of a pyramid down to 8 the product with
        the right and with the lower neighbour is averaged, over the batch too, and
        squared.

    Returns:
      The sum, [].
    """
    total = jnp.zeros(())
    for plane in planes:
        while True:
            for axis in (1, 2):
                total += jnp.square(jnp.mean(plane * jnp.roll(plane, 1, axis)))
            batch, size, _ = plane.shape
            if size <= 8:
                break
            plane = plane.reshape(batch, size // 2, 2, size // 2, 2).mean((2, 4))
    return total


def normalized_noise(plane: Array) -> Array:
    """A noise plane [batch, r, r] brought to mean 0 and unbiased deviation 1."""
    return (plane - jnp.mean(plane)) / jnp.std(plane, ddof=1)
