"""Pictures in the style of one of a DualStyleGAN's exemplars."""

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxstyle import weights
from jaxstyle.dualstylegan import (
    NUM_WEIGHTS,
    STRUCTURE_ROWS,
    DualStyleGAN,
    style_weights,
    to_w_plus,
)
from jaxstyle.errors import UserError
from jaxstyle.stylegan2 import Generator, Params


@dataclasses.dataclass(frozen=True)
class DualOptions:
    """The exemplar, and how much of it."""

    style_id: tuple[str, ...] = ()
    """Exemplars of a DualStyleGAN style, by number or name; several give a sheet."""
    style_weights: str = "0.75,1"
    """Their weights: structure,color, or one number for each of the 18 rows."""
    preserve_color: Literal["no", "code", "weights"] = "no"
    """Keep the photo's colors: `code` gives the color transforms the photo's code, as
    the published flag does; `weights` leaves them out, as color weights of 0 do."""
    psi: float = 0.75
    """Truncation of the photo's code, towards 0 as published; 1: none."""


class Exemplar(NamedTuple):
    """A style's extrinsic path with one exemplar.

    Attributes:
      module, params: the path.
      code: of the exemplar, w+ [1, num_ws, w_dim].
      weights: of its rows, [18].
      psi: truncation of the photo's code.
      keep_color: take the color rows of the photo's code.
    """

    module: DualStyleGAN
    params: Params
    code: Array
    weights: np.ndarray
    psi: float
    keep_color: bool


def parse_weights(text: str, option: str = "--style-weights") -> np.ndarray:
    """`"0.75,1"` (structure, color) or 18 numbers as [18].

    Raises:
      UserError: anything else.
    """
    try:
        values = [float(part) for part in text.replace(" ", "").split(",")]
    except ValueError:
        values = []
    if len(values) not in (2, NUM_WEIGHTS) or not np.isfinite(values).all():
        raise UserError(
            f"{option} is {text!r}; it must be two numbers, structure and color, or "
            f"{NUM_WEIGHTS}, one a row: 0.75,1"
        )
    return style_weights(*values) if len(values) == 2 else np.float32(values)


def is_dual(name: str) -> bool:
    """Whether a folder holds a DualStyleGAN."""
    return "dual" in weights.read_config(name)["networks"]


def load(
    name: str, options: DualOptions
) -> tuple[Generator, Params, dict[str, Exemplar]]:
    """A style folder's base generator, its parameters, and exemplars by label.

    Raises:
      UserError: no exemplar is chosen, or there is no such one.
    """
    model, params = weights.load(name)
    if not options.style_id:
        count = len(model.exemplars.names)
        raise UserError(
            f"weights {name!r} hold {count} exemplars; choose with --style-id, 0 to "
            f"{count - 1} or a name"
        )
    table = parse_weights(options.style_weights)
    if options.preserve_color == "weights":
        table = np.where(np.arange(NUM_WEIGHTS) < STRUCTURE_ROWS, table, 0)
    found = {}
    for style_id in options.style_id:
        codes = model.exemplars.apply({"params": params["exemplars"]}, style_id)
        found[str(model.exemplars.index(style_id))] = Exemplar(
            model.dual,
            params["dual"],
            to_w_plus(model.generator, params["generator"], codes, "z_plus"),
            table,
            options.psi,
            options.preserve_color == "code",
        )
    return model.generator, params["generator"], found


@partial(jax.jit, static_argnames=("generator", "module", "noise"))
def _draw(generator, base, module, params, face, code, table, psi, noise, key):
    return module.apply(
        {"params": params},
        generator,
        base,
        face,
        code,
        space="w_plus",
        extrinsic_space="w_plus",
        weights=table,
        psi=psi,
        noise=noise,
        key=key,
    )[0]


def picture(
    exemplar: Exemplar,
    generator: Generator,
    base: Params,
    code: Any,
    *,
    intensity: float = 1.0,
    noise: str = "const",
    key: Array | None = None,
) -> np.ndarray:
    """A face in an exemplar's style.

    Args:
      exemplar: see `load`.
      generator, base: the intrinsic path.
      code: of the face, w+ [num_ws, w_dim].
      intensity: times all weights.
      noise, key: as in `Generator`; one key a picture, [1].

    Returns:
      [size, size, 3], nominally in [-1, 1].
    """
    face, other = jnp.asarray(code)[None], exemplar.code
    if exemplar.keep_color:
        other = other.at[:, STRUCTURE_ROWS:].set(face[:, STRUCTURE_ROWS:])
    table = exemplar.weights * np.float32(intensity)
    image = _draw(
        generator,
        base,
        exemplar.module,
        exemplar.params,
        face,
        other,
        table,
        exemplar.psi,
        noise,
        key,
    )
    return np.asarray(image[0])
