"""Which layers StyleGAN-NADA trains, and an Adam that may skip some.

Gal et al., arXiv 2108.00946, section 4.2: before each step, codes are moved a little
towards the target text; the layers whose codes moved most are trained in that step.
The choice is a mask of traced numbers, so nothing is compiled again when it changes.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxstyle.errors import UserError
from jaxstyle.stylegan2 import layer_names, num_ws
from train.optim import path_name

LayerMap = Literal["peer", "fixed"]
Phase = Literal["default", "texture", "shape", "shape_expanded", "no_fine", "all"]
# Rate of the gradient descent that moves the codes.
CODE_RATE = 0.01


def convolutions(size: int) -> tuple[str, ...]:
    """The modulated convolutions after the first, rosinality's `convs`."""
    names = (n for n in layer_names(size) if not n.startswith("rgb"))
    return tuple(names)[1:]


def phase_layers(size: int, phase: Phase) -> tuple[str, ...]:
    """Names of the synthesis network that train without a choice; `const` is one."""
    convs = convolutions(size)
    if phase == "all":
        return "const", *layer_names(size)
    limits = {
        "default": (0, None),
        "texture": (2, 10),
        "shape": (0, 2),
        "shape_expanded": (0, 3),
        "no_fine": (0, 10),
    }
    if phase not in limits:
        raise UserError(f"phase is {phase!r}; it must be one of {', '.join(limits)}")
    return "const", "conv_4", *convs[slice(*limits[phase])]


def row_layers(size: int, layer_map: LayerMap) -> tuple[tuple[str, ...], ...]:
    """The layers that each row of a w+ code stands for in the choice.

    `peer`: the published table, where a row from the second on stands for the layer
    before the one it drives. `fixed`: the convolution it drives; row 1 drives the first
    to-RGB too, and the last row the last to-RGB alone.
    """
    convs = convolutions(size)
    if layer_map == "peer":
        return tuple((name,) for name in ("conv_4", "rgb_4", *convs))
    rows = [("conv_4",), ("rgb_4", convs[0]), *((name,) for name in convs[1:])]
    return *rows, (f"rgb_{size}",)


def phase_mask(size: int, phase: Phase) -> dict[str, float]:
    """1 for each name of the synthesis network that trains, else 0."""
    chosen = phase_layers(size, phase)
    return {name: float(name in chosen) for name in ("const", *layer_names(size))}


def chosen_mask(size: int, scores: Array, k: int, layer_map: LayerMap) -> dict:
    """1 for each layer of the k rows with the highest scores, else 0.

    Args:
      size: of the pictures.
      scores: [num_ws].
      k: number of rows.
      layer_map: see `row_layers`.
    """
    names = ("const", *layer_names(size))
    table = np.zeros((num_ws(size), len(names)), np.float32)
    for row, layers in enumerate(row_layers(size, layer_map)):
        for name in layers:
            table[row, names.index(name)] = 1
    _, rows = jax.lax.top_k(scores, k)
    picked = jnp.max(jnp.asarray(table)[rows], 0)
    return dict(zip(names, picked, strict=True))


def scores(loss: Callable[[Array, Array], Array], w: Array, rows: int, steps: int):
    """How far each row of codes moves when they follow a loss: [rows].

    The steps are added up by themselves: they are a millionth of the codes, whose
    rounding would decide.

    Args:
      loss: of codes [batch, rows, w_dim] and the number of the step.
      w: codes [batch, w_dim], the same for all rows at first.
      rows: of a w+ code.
      steps: of plain gradient descent.
    """
    start = jnp.broadcast_to(w[:, None], (w.shape[0], rows, w.shape[1]))

    def step(i, moved):
        return moved - CODE_RATE * jax.grad(loss)(start + moved, i)

    moved = jax.lax.fori_loop(0, steps, step, jnp.zeros_like(start))
    return jnp.mean(jnp.abs(moved), (0, 2))


class MaskedState(NamedTuple):
    """State of `masked_adam`: trees like the parameters.

    Attributes:
      count: updates each parameter has had, int32 [].
      square: moving average of the squared gradient.
    """

    count: Any
    square: Any


def masked_adam(
    learning_rate: float,
    beta2: float,
    *,
    eps: float = 1e-8,
    idle: Literal["keep", "decay"] = "keep",
) -> optax.GradientTransformationExtraArgs:
    """Adam without a first moment (beta1 0), for layers that do not always train.

    `update(grads, state, params, active=...)` takes a mask by the first part of a
    parameter's path, {"conv_4": 1.0, "rgb_4": 0.0, ...}, traced or not. What is not
    active does not move.

    Args:
      learning_rate: lr.
      beta2: of the average of squared gradients.
      eps: added to its root.
      idle: `keep`: moments and counts of idle layers stand still, as with PyTorch 2.
        `decay`: they go on with a gradient of zero, as with PyTorch 1.7, which the
        published models were trained with; a layer that is first chosen in step t then
        moves by sqrt((1 - beta2^t) / (1 - beta2)) times the rate, up to 11 times.
    """

    def init(params):
        return MaskedState(
            count=jax.tree.map(lambda _: jnp.zeros((), jnp.int32), params),
            square=jax.tree.map(jnp.zeros_like, params),
        )

    def update(grads, state, params=None, *, active: Mapping[str, Any], **_):
        def step(path, g, count, square):
            mask = jnp.asarray(active[path_name(path).split("/")[0]], g.dtype)
            g = mask * g
            ahead = 1 if idle == "decay" else mask.astype(jnp.int32)
            new = beta2 * square + (1 - beta2) * jnp.square(g)
            square = new if idle == "decay" else jnp.where(mask > 0, new, square)
            count = count + ahead
            # 1 - beta2^t without cancellation; an idle layer may not have begun.
            rest = -jnp.expm1(jnp.maximum(count, 1) * np.log(beta2))
            return -learning_rate * g / (jnp.sqrt(square / rest) + eps), count, square

        results = jax.tree_util.tree_map_with_path(
            step, grads, state.count, state.square
        )
        updates, count, square = jax.tree.transpose(
            jax.tree.structure(grads), jax.tree.structure((0, 0, 0)), results
        )
        return updates, MaskedState(count, square)

    return optax.GradientTransformationExtraArgs(init, update)
