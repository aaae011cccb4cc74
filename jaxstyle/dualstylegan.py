"""DualStyleGAN: a second style path on a frozen StyleGAN2 (Yang et al., CVPR 2022).

The paper (arXiv 2203.13248) keeps the generator of faces as it is, the intrinsic path,
and adds an extrinsic path that takes the code of an artistic portrait, the exemplar:

- *structure*, rows 0 to 6: a code passes T_s, one small network for all rows, and
  steers a residual block (ModRes) behind the row's convolution, 4 to 32 px;
- *color*, rows 7 and on: each row has a linear map T_c, and its layers read
  `a T_c(exemplar) + (1 - a) intrinsic`.

Each row has a weight `a`: 0 everywhere is the plain generator. `DualStyleGAN` owns the
extrinsic path alone. The base generator is an
argument, so that one tree serves any number of styles, and what trains is what the
module holds.

What the paper calls transform blocks a layer, T_s, is a single network in the published
code, which we follow. Truncation pulls towards the zero code there, not the average;
`center` gives the other.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxstyle import stylegan2
from jaxstyle.errors import UserError
from jaxstyle.init import Full, Normal, initialize, module_params
from jaxstyle.stylegan2 import Generator
from pallas_ops import activated_conv2d, fused_leaky_relu

# Rows that steer structure; those behind them steer color.
STRUCTURE_ROWS = 7
# Style weights come in this number whatever the size; smaller models read the first.
NUM_WEIGHTS = 18
# Picture size of the last residual block.
COARSE = 32
NORM_EPSILON = 1e-5
SPACES = ("z", "z_plus", "w", "w_plus")
Params = Mapping[str, Any]


def style_weights(structure: float = 1.0, color: float = 1.0) -> np.ndarray:
    """One weight for the structure rows and one for the color rows: [18]."""
    rows = np.arange(NUM_WEIGHTS)
    return np.where(rows < STRUCTURE_ROWS, structure, color).astype(np.float32)


def to_w_plus(generator: Generator, params: Params, codes: Array, space: str) -> Array:
    """Codes of a space as w+ [batch, num_ws, w_dim].

    Args:
      generator, params: of the intrinsic path.
      codes: z [batch, z_dim], z_plus [batch, num_ws, z_dim] (each row goes through the
        mapping network), w [batch, w_dim] or w_plus [batch, num_ws, w_dim].
      space: which.

    Raises:
      UserError: an unknown space or another shape.
    """
    if space not in SPACES:
        raise UserError(f"space is {space!r}; it must be one of {', '.join(SPACES)}")
    rows = generator.num_ws
    if space == "z_plus":
        if codes.ndim != 3 or codes.shape[1:] != (rows, generator.z_dim):
            raise UserError(
                f"codes have shape {list(codes.shape)}; space 'z_plus' at "
                f"{generator.size} px takes [batch, {rows}, {generator.z_dim}]"
            )
    else:
        generator.check_codes(codes, space)
    if space.startswith("z"):
        codes = stylegan2.mapping(params["mapping"], codes)
    if codes.ndim == 2:
        codes = jnp.broadcast_to(codes[:, None], (codes.shape[0], rows, codes.shape[1]))
    return codes


def adaptive_norm(params: Params, x: Array, style: Array) -> Array:
    """Each channel normalised over its picture, then scaled and shifted by a style.

    Args:
      params: `weight` [w_dim, 2 * channels] and `bias`, giving scales and shifts.
      x: [batch, height, width, channels].
      style: [batch, w_dim].

    Returns:
      As `x`; the statistics are taken in float32, for a 4 px map has only 16 values.
    """
    scale, shift = jnp.split(style @ params["weight"] + params["bias"], 2, -1)
    y = x.astype(jnp.float32)
    mean, var = (f(y, (1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
    y = (y - mean) * lax.rsqrt(var + NORM_EPSILON)
    return (scale[:, None, None] * y + shift[:, None, None]).astype(x.dtype)


def _convolve(params: Params, x: Array, dilation: int) -> Array:
    """3×3 convolution, bias and leaky ReLU; the size stays."""
    weight, bias = params["weight"], params["bias"]
    gain = stylegan2.equalized_gain(weight)
    if dilation == 1:
        return activated_conv2d(x, weight, bias, gain=gain)
    y = lax.conv_general_dilated(
        x,
        weight.astype(x.dtype),
        (1, 1),
        ((dilation, dilation),) * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return fused_leaky_relu(y * jnp.asarray(gain, x.dtype), bias)


def mod_res(
    params: Params, x: Array, style: Array, weight: Array, dilation: int = 1
) -> Array:
    """A modulative residual block: `x + weight * f(x, style)`.

    Args:
      params: `norm1`, `conv1`, `norm2`, `conv2`.
      x: [batch, height, width, channels].
      style: [batch, w_dim], after T_s.
      weight: [] or [batch].
      dilation: of both convolutions; VToonify lets a 32 px grid see as far as coarser
        ones did by 4 and 2.
    """
    y = _convolve(params["conv1"], adaptive_norm(params["norm1"], x, style), dilation)
    y = _convolve(params["conv2"], adaptive_norm(params["norm2"], y, style), dilation)
    weight = jnp.reshape(jnp.asarray(weight, x.dtype), (-1, 1, 1, 1))
    return x + weight * y


def used_weights(weights: Any, rows: int, fuse_index: int = NUM_WEIGHTS) -> Array:
    """The weights of a model's rows, [1 or batch, rows].

    Args:
      weights: [n] or [batch, n] with n at least `rows`, or one number for all.
      rows: of the model's codes.
      fuse_index: rows beyond it keep to the intrinsic path.

    Raises:
      UserError: too few weights.
    """
    weights = jnp.asarray(weights, jnp.float32)
    weights = jnp.full(rows, weights) if weights.ndim == 0 else weights
    if weights.ndim > 2 or weights.shape[-1] < rows:
        raise UserError(
            f"style weights have shape {list(weights.shape)}; it must be [{rows}] or "
            f"more ({NUM_WEIGHTS} fit every size), with a batch axis or without"
        )
    weights = jnp.atleast_2d(weights)[:, :rows]
    # The published code leaves the first block out already at 0.
    return jnp.where(jnp.arange(rows) <= (fuse_index or -1), weights, 0.0)


def color_rows(params: Params, w_plus: Array, extrinsic: Array, weights: Array):
    """w+ whose color rows are mixed with the exemplar's behind T_c.

    Args:
      params: `color_7` .. .
      w_plus, extrinsic: intrinsic and extrinsic codes [batch, num_ws, w_dim].
      weights: [1 or batch, num_ws].
    """
    rows = [w_plus[:, i] for i in range(STRUCTURE_ROWS)]
    for i in range(STRUCTURE_ROWS, w_plus.shape[1]):
        mapped = stylegan2.dense(params[f"color_{i}"], extrinsic[:, i])
        weight = weights[:, i, None]
        rows.append(weight * mapped + (1 - weight) * w_plus[:, i])
    return jnp.stack(rows, 1)


class DualStyleGAN(nn.Module):
    """The extrinsic style path of a generator of the same size and channels.

    Attributes:
      size: picture size, a power of two from 32 to 1024.
      channel_multiplier, channels: of the generator.
      w_dim: width of a code.
      structure_depth: layers of T_s.
    """

    size: int
    channel_multiplier: int = 2
    channels: tuple[int, ...] | None = None
    w_dim: int = 512
    structure_depth: int = 2

    @property
    def num_ws(self) -> int:
        """Rows of a code."""
        return stylegan2.num_ws(self.size)

    def init_params(self, *, key: Array, init_noise: float = 0.01) -> dict:
        """A path that changes next to nothing: {structure, modres_*, color_*}.

        Args:
          key: random key.
          init_noise: scale of the residual blocks' convolutions and of what T_c adds to
            the identity; published: 0.01. With 0 the picture is exactly that of style
            mixing with the exemplar's code from row 7 on.

        Scales of the style-dependent normalisation are drawn normal, with the variance
        of the uniform draw in the published code.
        """
        if self.size < COARSE:
            raise UserError(f"size is {self.size}; DualStyleGAN starts at {COARSE}")
        table = stylegan2.channel_table(
            self.size, self.channel_multiplier, self.channels
        )
        depth, width = self.structure_depth, self.w_dim
        shapes: dict[str, Any] = {
            "structure": stylegan2.mapping_shapes(depth, width, width)
        }
        for i, name in enumerate(stylegan2.noise_names(COARSE)):
            channels = table[stylegan2.layer_resolution(name)]
            norm = {
                "weight": Normal((width, 2 * channels), (1 / (3 * width)) ** 0.5),
                "bias": Full((2 * channels,)),
            }
            conv = {
                "weight": Normal((3, 3, channels, channels), init_noise),
                "bias": Full((channels,)),
            }
            shapes[f"modres_{i}"] = {
                "norm1": norm,
                "conv1": conv,
                "norm2": norm,
                "conv2": conv,
            }
        for i in range(STRUCTURE_ROWS, self.num_ws):
            shapes[f"color_{i}"] = {
                "weight": Normal((width, width), init_noise),
                "bias": Full((width,)),
            }
        params = initialize(shapes, key=key)
        for name, part in params.items():
            if name.startswith("color"):
                part["weight"] += np.sqrt(width) * jnp.eye(width)
            elif name.startswith("modres"):
                for norm in ("norm1", "norm2"):
                    bias = part[norm]["bias"]
                    ones = jnp.arange(bias.size) < bias.size // 2
                    part[norm]["bias"] = ones.astype(jnp.float32)
        return params

    def setup(self):
        self.params = module_params(self)

    def structure(self, codes: Array) -> Array:
        """T_s: exemplar codes [.., w_dim] in w as the residual blocks read them."""
        return stylegan2.mapping(self.params["structure"], codes)

    def color(self, codes: Array) -> Array:
        """T_c: the color rows of w+ [batch, num_ws, w_dim], the others unchanged."""
        return color_rows(self.params, codes, codes, jnp.ones((1, self.num_ws)))

    def __call__(
        self,
        generator: Generator,
        base: Params,
        intrinsic: Array,
        extrinsic: Array | None,
        *,
        space: str = "z_plus",
        extrinsic_space: str = "z_plus",
        weights: Any = 1.0,
        fuse_index: int = NUM_WEIGHTS,
        psi: float | Array = 1.0,
        center: Array | None = None,
        mix_codes: Array | None = None,
        mix_from: int | Array | None = None,
        noise: str | Mapping[str, Array] = "const",
        key: Array | None = None,
        dilation: int | Sequence[int] = 1,
        return_feat: bool = False,
    ) -> tuple[Array, dict[str, Any]]:
        """Stylise: the intrinsic code's face in the exemplar's style.

        Args:
          generator: the intrinsic path's architecture, with dtype and remat of both.
          base: its parameters.
          intrinsic: codes of the face; see `to_w_plus`.
          extrinsic: codes of the exemplar; None leaves the extrinsic path out. A single
            face meets many exemplars, and a single exemplar many faces.
          space, extrinsic_space: of the codes: z, z_plus, w or w_plus.
          weights: of the exemplar, row by row: see `used_weights`.
          fuse_index: rows beyond it keep to the intrinsic path.
          psi: truncation of the intrinsic code.
          center: code [w_dim] it pulls towards; None: zero, as in the published code.
          mix_codes: second intrinsic codes of the same space.
          mix_from: first row that takes those; a scalar or one a picture.
          noise, key: as in `Generator`.
          dilation: of the residual blocks, one for all or one each.
          return_feat: stop at 32 px, where VToonify goes on.

        Returns:
          Pictures [batch, size, size, 3], nominally in [-1, 1], and `out`: `w_plus`
          (intrinsic, before any mixing with the exemplar), `mixed` (after) and
          `features`, every layer's output by name. With `return_feat` the features
          [batch, 32, 32, channels] and, as `out["rgb"]`, the picture so far.

        Raises:
          UserError: a generator of another architecture, codes or weights of another
            shape.
        """
        self._check(generator)
        w_plus = to_w_plus(generator, base, intrinsic, space)
        if mix_codes is not None:
            second = to_w_plus(generator, base, mix_codes, space)
            first = jnp.arange(self.num_ws)[None] < jnp.reshape(mix_from, (-1, 1))
            w_plus = jnp.where(first[..., None], w_plus, second)
        if not (isinstance(psi, (int, float)) and psi == 1):
            zero = jnp.zeros(self.w_dim)
            w_plus = stylegan2.truncate(w_plus, zero if center is None else center, psi)
        out: dict[str, Any] = {"w_plus": w_plus}
        transform = None
        if extrinsic is not None:
            extrinsic = to_w_plus(generator, base, extrinsic, extrinsic_space)
            w_plus, extrinsic = jnp.broadcast_arrays(w_plus, extrinsic)
            weights = used_weights(weights, self.num_ws, fuse_index)
            w_plus = color_rows(self.params, w_plus, extrinsic, weights)
            transform = self._blocks(extrinsic, weights, dilation)
        out["mixed"] = w_plus
        size = COARSE if return_feat else self.size
        w_layers = w_plus[:, np.array(stylegan2.style_rows(size))]
        planes = stylegan2.noise_planes(
            self.size, w_plus.shape[0], noise, const=base["noise_const"], key=key
        )
        run = partial(
            stylegan2.synthesis, dtype=jnp.dtype(generator.dtype), transform=transform
        )
        run = stylegan2.recomputed(run) if generator.remat else run
        styles = stylegan2.style_vectors(base["synthesis"], w_layers)
        image, out["features"] = run(base["synthesis"], styles, planes)
        if return_feat:
            return out["features"][f"conv_{COARSE}"], out | {"rgb": image}
        return image, out

    def _blocks(self, extrinsic: Array, weights: Array, dilation: Any):
        """The residual blocks as a map of a layer's output."""
        if isinstance(dilation, int):
            dilation = (dilation,) * STRUCTURE_ROWS
        if len(dilation) != STRUCTURE_ROWS:
            raise UserError(
                f"dilation has {len(dilation)} entries; there are {STRUCTURE_ROWS} "
                "residual blocks"
            )
        styles = self.structure(extrinsic[:, :STRUCTURE_ROWS])
        place = {n: i for i, n in enumerate(stylegan2.noise_names(COARSE))}

        def transform(name: str, x: Array) -> Array:
            i = place.get(name)
            if i is None:
                return x
            block = self.params[f"modres_{i}"]
            return mod_res(block, x, styles[:, i], weights[:, i], dilation[i])

        return transform

    def _check(self, generator: Generator) -> None:
        table = stylegan2.channel_table(
            self.size, self.channel_multiplier, self.channels
        )
        ours = (table, self.w_dim)
        if ours != (generator.channel_table, generator.w_dim):
            raise UserError(
                f"the generator is of {generator.size} px, channels "
                f"{list(generator.channel_table.values())}, w_dim {generator.w_dim}; "
                f"this DualStyleGAN was made for {self.size} px, channels "
                f"{list(table.values())}, w_dim {self.w_dim}"
            )
