"""How pictures are compared on drawn heads: LPIPS, style, faces, and a cheap rival.

Features are computed once a picture and compared many times. Pictures are brought to
256 px bilinearly for both networks.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxstyle.features import judges, lpips
from jaxstyle.invert import resize

LPIPS_SIZE = 256


def judge_size(pictures: Array) -> Array:
    """Pictures [n, h, h, 3] at 256 px, bilinearly; their values cut as in a file."""
    return resize(jnp.clip(pictures, -1, 1), LPIPS_SIZE)


@jax.jit
def describe(params: lpips.Params, pictures: Array) -> tuple[Array, ...]:
    """LPIPS features of pictures [n, h, h, 3] at 256 px."""
    return lpips.features(params, judge_size(pictures))


@jax.jit
def all_distances(params: lpips.Params, a: Sequence[Array], b: Sequence[Array]):
    """LPIPS between all pictures of two sets by their features, [n, m]."""
    rows = jax.lax.map(
        lambda f: lpips.feature_distance(params, [x[None] for x in f], b), a
    )
    return rows


def gram(feature: Array) -> Array:
    """Gram matrices [n, c, c] of a feature [n, h, w, c] (Gatys et al. 2016, eq. 3)."""
    pixels = feature.shape[1] * feature.shape[2]
    return jnp.einsum("nhwc,nhwd->ncd", feature, feature) / pixels


@jax.jit
def style_distances(a: Sequence[Array], b: Sequence[Array]) -> Array:
    """Relative squared distance of Gram matrices, mean over the layers: [n].

    Args:
      a: features of n pictures.
      b: features of one.
    """
    total = 0.0
    for x, y in zip(a, b, strict=True):
        own, target = gram(x), gram(y)
        apart = jnp.sum(jnp.square(own - target), (1, 2))
        total += apart / jnp.sum(jnp.square(target), (1, 2))
    return total / len(a)


@partial(jax.jit, static_argnums=0)
def _embed(module, params, pictures):
    return module.apply({"params": params}, judge_size(pictures), method="embed")


def faces(identity: judges.Judge, pictures: Array) -> np.ndarray:
    """The identity network's unit vectors of pictures [n, h, h, 3]."""
    return np.asarray(_embed(identity.module, identity.params, pictures))


def mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of unit vectors [n, width], row by row."""
    return float(np.sum(a * b, -1).mean())


def spread(distances: np.ndarray) -> float:
    """Mean distance between two different ones, of distances [n, n]."""
    n = len(distances)
    return float((distances.sum() - np.trace(distances)) / (n * (n - 1)))


def own_nearer(distances: np.ndarray) -> float:
    """Share of pairs (i, j) in which truth i is nearer to picture i than truth j is.

    Args:
      distances: [n, n], picture i to truth j.
    """
    n = len(distances)
    nearer = np.diagonal(distances)[:, None] < distances
    return float(nearer.sum() / (n * (n - 1)))


# lαβ of Reinhard et al. 2001, equations 4 to 6.
_LMS = np.array(
    [[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]]
)
_LAB = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ [[1, 1, 1], [1, 1, -2], [1, -1, 0]]


def color_transfer(pictures: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Pictures with the mean and deviation of the reference's lαβ channels.

    Args:
      pictures: [n, h, w, 3] in [-1, 1].
      reference: [h, w, 3].
    """

    def to_lab(x):
        rgb = np.clip(np.asarray(x, np.float64) / 2 + 0.5, 0, 1)
        return np.log10(np.maximum(rgb @ _LMS.T, 1 / 256)) @ _LAB.T

    source, target = to_lab(pictures), to_lab(reference)
    mean, spread = source.mean((1, 2), keepdims=True), source.std((1, 2), keepdims=True)
    moved = (source - mean) / np.maximum(spread, 1e-6) * target.std((0, 1))
    lms = 10 ** ((moved + target.mean((0, 1))) @ np.linalg.inv(_LAB).T)
    rgb = np.clip(lms @ np.linalg.inv(_LMS).T, 0, 1)
    return (rgb * 2 - 1).astype(np.float32)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Markdown of rows, the first being the titles."""
    titles, *others = rows
    rows = [titles, ["---"] * len(titles), *others]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
