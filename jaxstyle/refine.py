"""DualStyleGAN: an exemplar's code moved until the network gives its picture.

The paper's latent optimisation (arXiv 2203.13248, section 3.4), as published: the code
e and fresh noise planes minimise

    LPIPS(G(i, e), S) + CX(G(i, e), S) + 1e5 * correlation of the planes,

S being the portrait, i its face's code without the style. Structure rows, color rows
and planes have rates of their own in Adam; the planes are brought back to mean 0 and
deviation 1 after every step. Pictures are compared at 256 px.

A batch is searched for at once, each picture as it would be alone.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from tqdm import tqdm

from jaxstyle import losses, weights
from jaxstyle.dualstylegan import STRUCTURE_ROWS, DualStyleGAN
from jaxstyle.features.judges import choose_features
from jaxstyle.stylegan2 import Generator, Params, layer_resolution, noise_names

SIZE = 256
NOISE_WEIGHT = 1e5


@dataclasses.dataclass(frozen=True)
class Rates:
    """Adam's rates of the parts of a point."""

    lr_color: float = 0.01
    """Rate of the color rows; 0.1 for flat colors (published for cartoon)."""
    lr_structure: float = 0.005
    """Rate of the structure rows."""
    lr_noise: float = 0.1
    """Rate of the noise planes."""


class Networks(NamedTuple):
    """The modules of the loss.

    Attributes:
      generator, dual: the style.
      perceptual: an `LPIPS`.
      features: a trunk of `choose_features`.
      size: pixels a side at which both see pictures.
    """

    generator: Generator
    dual: DualStyleGAN
    perceptual: nn.Module
    features: nn.Module
    size: int = SIZE


def view(pictures: Array, size: int) -> Array:
    """Pictures [n, h, h, c] at `size`: averaged over areas, or pixels repeated."""
    n, height, width, channels = pictures.shape
    if height < size:
        factor = size // height
        return jnp.repeat(jnp.repeat(pictures, factor, 1), factor, 2)
    factor = height // size
    shape = (n, height // factor, factor, width // factor, factor, channels)
    return pictures.reshape(shape).mean((2, 4))


def start(codes: Array, size: int, *, key: Array) -> dict[str, Any]:
    """Where the search begins.

    Args:
      codes: of the exemplars, z+ [n, num_ws, z_dim].
      size: of the generator's pictures.
      key: of the noise planes; the same ones for each exemplar.

    Returns:
      `structure` [n, 7, z_dim], `color` [n, num_ws - 7, z_dim], and `noise`, planes
      [n, r, r] by layer.
    """
    planes = {}
    for i, name in enumerate(noise_names(size)):
        plane = jax.random.normal(
            jax.random.fold_in(key, i), (layer_resolution(name),) * 2
        )
        planes[name] = jnp.broadcast_to(plane, (len(codes), *plane.shape))
    codes = jnp.asarray(codes)
    return {
        "structure": codes[:, :STRUCTURE_ROWS],
        "color": codes[:, STRUCTURE_ROWS:],
        "noise": planes,
    }


def codes_of(point: Mapping[str, Any]) -> Array:
    """The codes of a point, z+ [n, num_ws, z_dim]."""
    return jnp.concatenate([point["structure"], point["color"]], 1)


def optimizer(rates: Rates) -> optax.GradientTransformation:
    """Adam with a rate for each part of a point."""
    parts = ("structure", "color", "noise")
    return optax.partition(
        {part: optax.adam(getattr(rates, f"lr_{part}")) for part in parts},
        {part: part for part in parts},
    )


def anchors(networks: Networks, frozen: Mapping[str, Any]) -> dict[str, Any]:
    """What the loss compares with: `lpips` and `cx`, the targets' features.

    Args:
      networks: see there.
      frozen: `perceptual` and `features`, parameters; `targets` [n, h, h, 3], h
        the networks' size.
    """
    return {
        "lpips": networks.perceptual.apply(
            {"params": frozen["perceptual"]}, frozen["targets"], method="features"
        ),
        "cx": networks.features.apply(
            {"params": frozen["features"]}, frozen["targets"]
        )[losses.CX_TAP],
    }


def loss(
    point: Mapping[str, Any],
    frozen: Mapping[str, Any],
    networks: Networks,
    given: Mapping[str, Any],
) -> tuple[Array, dict[str, Array]]:
    """The loss, a sum over the pictures.

    Args:
      point: of `start`.
      frozen: parameters `generator`, `dual`, `perceptual`, `features`; and `intrinsic`,
        codes of the faces in z+ [n, num_ws, z_dim].
      networks: the modules.
      given: of `anchors`.

    Returns:
      The sum, and `lpips`, `cx`, `noise` of each picture [n], without weights.
    """
    image, _ = networks.dual.apply(
        {"params": frozen["dual"]},
        networks.generator,
        frozen["generator"],
        frozen["intrinsic"],
        codes_of(point),
        noise=point["noise"],
    )
    image = view(image, networks.size)
    distance = networks.perceptual.apply(
        {"params": frozen["perceptual"]},
        image,
        given["lpips"],
        method="feature_distance",
    )
    seen = networks.features.apply({"params": frozen["features"]}, image)
    # Each picture in a batch of its own: the loss centres features over its batch.
    cx = jax.vmap(lambda x, y: losses.contextual(x[None], y[None]))(
        seen[losses.CX_TAP], given["cx"]
    )
    noise = jax.vmap(lambda p: losses.noise_correlation([x[None] for x in p]))(
        list(point["noise"].values())
    )
    total = jnp.sum(distance + cx + NOISE_WEIGHT * noise)
    return total, {"lpips": distance, "cx": cx, "noise": noise}


def renormalised(point: Mapping[str, Any]) -> dict[str, Any]:
    """The point after a step: every plane with mean 0 and deviation 1."""
    planes = jax.tree.map(jax.vmap(losses.normalized_noise), point["noise"])
    return {**point, "noise": planes}


@partial(jax.jit, static_argnames=("networks", "rates"), donate_argnums=(0, 1))
def _step(point, moments, frozen, given, networks, rates):
    (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(
        point, frozen, networks, given
    )
    moves, moments = optimizer(rates).update(grads, moments, point)
    point = renormalised(optax.apply_updates(point, moves))
    return point, moments, terms["lpips"] + terms["cx"]


def refine(
    networks: Networks,
    frozen: Mapping[str, Any],
    codes: Array,
    *,
    steps: int = 100,
    rates: Rates = Rates(),
    key: Array,
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Refined codes of exemplars.

    Args:
      networks: the modules.
      frozen: what `loss` and `anchors` take.
      codes: where they begin, z+ [n, num_ws, z_dim].
      steps: of Adam; published: 100.
      rates: of Adam.
      key: of the noise planes.
      progress: show a bar with the mean loss, without the planes' part.

    Returns:
      Codes, z+ [n, num_ws, z_dim], and the last losses [n].
    """
    given = jax.jit(anchors, static_argnums=0)(networks, frozen)
    point = start(codes, networks.generator.size, key=key)
    point = jax.tree.map(jnp.array, point)
    moments, value = optimizer(rates).init(point), None
    with tqdm(total=steps, desc="refine", disable=not progress) as bar:
        for step in range(steps):
            point, moments, value = _step(
                point, moments, frozen, given, networks, rates
            )
            if step % 10 == 9 or step == steps - 1:
                bar.set_postfix(loss=f"{float(value.mean()):.4f}")
            bar.update()
    return np.asarray(codes_of(point)), np.asarray(value)


def judge_of(
    model: Mapping[str, nn.Module],
    params: Params,
    *,
    perceptual: str = "lpips_alexnet",
    perceptual_net: str = "",
    size: int = SIZE,
) -> tuple[Networks, dict[str, Any]]:
    """The modules and parameters of the loss for a style.

    Args:
      model, params: of the style's folder; `generator` and `dual` are used.
      perceptual: folder of LPIPS weights.
      perceptual_net: trunk of the contextual loss; see `choose_features`.
      size: pixels a side at which pictures are judged.

    Returns:
      `Networks`, and `frozen` but for `intrinsic` and `targets`.
    """
    lpips, lpips_params = weights.load(perceptual)
    trunk = choose_features(perceptual_net)
    modules = model["generator"], model["dual"], lpips["lpips"], trunk.module
    return Networks(*modules, size), {
        "generator": params["generator"],
        "dual": params["dual"],
        "perceptual": lpips_params["lpips"],
        "features": trunk.params,
    }
