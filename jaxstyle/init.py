"""Fresh parameters from a tree of shapes, all normals in one draw.

One draw and one compilation: a draw per parameter costs a compilation per shape,
which takes longer than everything else a small model does at start.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Normal(NamedTuple):
    """A parameter drawn from N(0, scale²)."""

    shape: tuple[int, ...]
    scale: float = 1.0


class Full(NamedTuple):
    """A parameter that starts at one value."""

    shape: tuple[int, ...]
    value: float = 0.0


@partial(jax.jit, static_argnums=0)
def _draw(leaves: tuple[Normal | Full, ...], key: Array) -> tuple[Array, ...]:
    sizes = [int(np.prod(p.shape)) for p in leaves if isinstance(p, Normal)]
    pieces = iter(
        jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    )
    return tuple(
        next(pieces).reshape(p.shape) * p.scale
        if isinstance(p, Normal)
        else jnp.full(p.shape, p.value, jnp.float32)
        for p in leaves
    )


def initialize(tree: Any, *, key: Array) -> Any:
    """Arrays for a nested dict of `Normal` and `Full`, float32."""
    leaves, treedef = jax.tree.flatten(
        tree, is_leaf=lambda x: isinstance(x, (Normal, Full))
    )
    return jax.tree.unflatten(treedef, _draw(tuple(leaves), key))


def module_params(module: nn.Module) -> Any:
    """A module's parameter tree; its `init_params` fills it under `module.init`."""
    if module.is_initializing():
        for name, value in module.init_params(key=module.make_rng("params")).items():
            module.put_variable("params", name, value)
    return module.variables["params"]
