"""DualStyleGAN's exemplars: their codes by name, and a sampler of new ones.

`Exemplars` is a table of codes kept like a network. `Sampler` maps normal noise to
codes; it is learned by matching (IMLE, Li and Malik, arXiv 1809.09087, as in GLANN,
Hoshen et al., arXiv 1812.08985), once for the structure rows and once for the color
rows.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax import Array

from jaxstyle.encoders import batch_norm, norm_shapes
from jaxstyle.errors import UserError, one_line
from jaxstyle.init import Full, Normal, initialize, module_params

# What a table may hold of each exemplar, in z+: the encoder's code, that code refined,
# and the code of its face without the style.
CODES = ("extrinsic", "refined", "intrinsic")
Params = Mapping[str, Any]


class Exemplars(nn.Module):
    """Codes of the portraits a style was learned from.

    Attributes:
      names: of the portraits; their order is that of `--style-id`.
      num_ws: rows of a code.
      z_dim: width of a row.
      codes: which of `CODES` the table holds, each [n, num_ws, z_dim], in z+.
    """

    names: tuple[str, ...]
    num_ws: int = 18
    z_dim: int = 512
    codes: tuple[str, ...] = ("extrinsic",)

    def init_params(self, *, key: Array) -> dict:
        """Zeros; `key` is not used."""
        del key
        shape = (len(self.names), self.num_ws, self.z_dim)
        return initialize(
            {name: Full(shape) for name in self.codes}, key=jax.random.key(0)
        )

    def setup(self):
        self.params = module_params(self)

    def index(self, style_id: int | str) -> int:
        """The place of an exemplar by number or name.

        Raises:
          UserError: there is none.
        """
        if style_id in self.names:
            return self.names.index(style_id)
        number = int(style_id) if str(style_id).isdecimal() else -1
        if not 0 <= number < len(self.names):
            raise UserError(
                f"style-id is {style_id!r}; it must be 0 to {len(self.names) - 1} or "
                f"one of {one_line(', '.join(self.names), 200)}"
            )
        return number

    def __call__(self, style_id: int | str, codes: str = "") -> Array:
        """The code [1, num_ws, z_dim] of an exemplar.

        Args:
          style_id: its number or name.
          codes: one of `CODES`; empty: refined if there are any, else extrinsic.

        Raises:
          UserError: no such exemplar, or no codes of that kind.
        """
        codes = codes or next(k for k in ("refined", *self.codes) if k in self.codes)
        if codes not in self.codes:
            raise UserError(
                f"codes is {codes!r}; this style holds {', '.join(self.codes)}"
            )
        return self.params[codes][self.index(style_id)][None]


class Sampler(nn.Module):
    """Noise [batch, z_dim] to codes [batch, rows, w_dim] in z+.

    Attributes:
      rows: of the codes: 7 for structure, the rest for color.
      w_dim: width of a row.
      z_dim: width of the noise.
      width: of the two hidden layers.
    """

    rows: int
    w_dim: int = 512
    z_dim: int = 128
    width: int = 128

    def init_params(self, *, key: Array) -> dict:
        """Fresh parameters: {dense_0, norm_0, dense_1, norm_1, dense_2}.

        The weights have the variance of PyTorch's uniform draw.
        """
        widths = (self.z_dim, self.width, self.width, self.rows * self.w_dim)
        shapes: dict[str, Any] = {
            f"dense_{i}": {"weight": Normal(widths[i : i + 2], (3 * widths[i]) ** -0.5)}
            for i in range(3)
        }
        shapes |= {f"norm_{i}": norm_shapes(self.width) for i in range(2)}
        return initialize(shapes, key=key)

    def setup(self):
        self.params = module_params(self)

    def __call__(self, z: Array, *, train: bool = False) -> tuple[Array, dict]:
        """Draw codes.

        Args:
          z: [batch, z_dim], normal.
          train: normalise by the batch's statistics. The published `generate.py` draws
            with these too, and so needs more than one sample at a time.

        Returns:
          Codes [batch, rows, w_dim], and with `train` the new running statistics under
          `batch_stats`, for `jaxstyle.encoders.merge_batch_stats`.
        """
        x, stats = z, {}
        for i in range(2):
            x = x @ self.params[f"dense_{i}"]["weight"]
            x, stats[f"norm_{i}"] = batch_norm(self.params[f"norm_{i}"], x, train)
            x = jax.nn.relu(x)
        x = x @ self.params["dense_2"]["weight"]
        out = {"batch_stats": stats} if train else {}
        return x.reshape(-1, self.rows, self.w_dim), out
