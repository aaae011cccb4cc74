"""StyleCLIP's latent mapper: a small network that moves codes as a text says.

Patashnik et al., arXiv 2103.17249, section 5: w+ is changed by `0.1 M(w+)`, M being one
mapping network each for the coarse, middle and fine rows. `train.mapper` trains it.
"""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxstyle import pipeline, weights
from jaxstyle.errors import UserError
from jaxstyle.init import initialize, module_params
from jaxstyle.masks import row_groups
from jaxstyle.stylegan2 import (
    MAPPING_LR_MULTIPLIER,
    Generator,
    Params,
    dense,
    mapping_shapes,
)
from pallas_ops import fused_leaky_relu

# Published share of what the networks give that is added to the codes.
STEP = 0.1
GROUPS = ("coarse", "middle", "fine")


class Mapper(nn.Module):
    """w+ codes to moved ones: `apply({"params": p}, codes) -> codes`.

    Attributes:
      num_ws, w_dim: of the codes.
      depth: layers of each network.
      groups: rows that move: of coarse, middle, fine (0-3, 4-7 and 8-17 of 18, shorter
        codes in proportion).
      norm: what codes are divided by first: `width`, the length of each row, as in
        StyleGAN2's mapping network; or `rows`, as in the published code, that of each
        channel over a group's rows. Where all rows are one w the latter leaves nothing
        but the signs.
    """

    num_ws: int = 18
    w_dim: int = 512
    depth: int = 4
    groups: tuple[str, ...] = GROUPS
    norm: Literal["width", "rows"] = "width"

    def init_params(self, *, key: Array) -> dict:
        """Fresh parameters: {coarse: {dense_0, ..}, middle, fine}."""
        unknown = set(self.groups) - set(GROUPS)
        if unknown or not self.groups:
            raise UserError(
                f"groups is {self.groups}; it must be of {', '.join(GROUPS)}"
            )
        shape = mapping_shapes(self.depth, self.w_dim, self.w_dim)
        return initialize(dict.fromkeys(self.groups, shape), key=key)

    def setup(self):
        self.params = module_params(self)

    def moves(self, codes: Array) -> Array:
        """What the networks give [batch, num_ws, w_dim]; 0 in rows that stay."""
        if codes.ndim != 3 or codes.shape[1:] != (self.num_ws, self.w_dim):
            raise UserError(
                f"codes have shape {list(codes.shape)}; this mapper moves [batch, "
                f"{self.num_ws}, {self.w_dim}]"
            )
        parts, axis = [], {"width": 2, "rows": 1}[self.norm]
        for group, rows in row_groups(self.num_ws).items():
            x = codes[:, rows[0] : rows[-1] + 1]
            if group not in self.groups:
                parts.append(jnp.zeros_like(x))
                continue
            x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis, keepdims=True) + 1e-8)
            for i in range(self.depth):
                layer = self.params[group][f"dense_{i}"]
                x = dense(layer, x, MAPPING_LR_MULTIPLIER)
                x = fused_leaky_relu(x, jnp.zeros(()))
            parts.append(x)
        return jnp.concatenate(parts, 1)

    def __call__(self, codes: Array, strength: float | Array = 1.0) -> Array:
        """Moved codes [batch, num_ws, w_dim]; `strength` scales the move."""
        return codes + strength * STEP * self.moves(codes)


@partial(jax.jit, static_argnums=0)
def _apply(module, params, codes, strength):
    return module.apply({"params": params}, codes, strength)


def load(name: str, generator: Generator) -> tuple[Mapper, Params]:
    """A mapper for a generator's codes.

    Raises:
      UserError: no mapper there, or one of other codes.
    """
    model, params = weights.load(name)
    if "mapper" not in model:
        raise UserError(
            f"--mapper {name} holds {', '.join(model)}; it must be a run of python -m "
            "train.mapper"
        )
    module = model["mapper"]
    if (module.num_ws, module.w_dim) != (generator.num_ws, generator.w_dim):
        raise UserError(
            f"--mapper {name} moves codes of {module.num_ws} rows of {module.w_dim}; "
            f"the {generator.size} px generator has {generator.num_ws} of "
            f"{generator.w_dim}"
        )
    return module, params["mapper"]


def move(mapper: tuple[Mapper, Params], codes: Any, strength: float = 1) -> np.ndarray:
    """Codes w_plus [n, num_ws, w_dim], moved, each for itself."""
    module, params = mapper
    return pipeline.in_batches(
        lambda c: _apply(module, params, c, np.float32(strength)), np.asarray(codes), 1
    )
