"""StyleGAN2 generator and discriminator (Karras et al. 2020, arXiv 1912.04958).

Pure functions over plain parameter dicts; `Generator` and `Discriminator` are thin
Linen modules that own the architecture and the parameters. Nothing is tied to one
resolution: every power of two from 8 to 1024, any channel table.

Codes enter in one of five spaces:

| space      | shape                        | what                                     |
| ---------- | ---------------------------- | ---------------------------------------- |
| `z`        | [batch, z_dim]               | normal noise, mapped to w                |
| `w`        | [batch, w_dim]               | one code for all rows                    |
| `w_plus`   | [batch, num_ws, w_dim]       | one code a row, 2 log2(size) - 2 rows    |
| `w_layers` | [batch, num_layers, w_dim]   | one code a modulated layer               |
| `styles`   | num_layers × [batch, in]     | the style vectors themselves (s-space)   |

A w+ row drives a convolution, or a to-RGB and the up-convolution after it: 18 rows
but 26 modulated layers at 1024.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jaxstyle.errors import UserError
from jaxstyle.init import Full, Normal, initialize, module_params
from pallas_ops import (
    activated_conv2d,
    conv2d,
    fused_leaky_relu,
    modulated_conv2d,
    output_packing,
    pack,
    pick_implementation,
    unpack,
    upsample2d,
    upsample_planes,
)

SPACES = ("z", "w", "w_plus", "w_layers", "styles")
MAPPING_LR_MULTIPLIER = 0.01
STDDEV_GROUP = 4
# Name of the activations that `recomputed` keeps: the output of each resolution.
BLOCK = "block"
Params = Mapping[str, Any]


def resolutions(size: int) -> tuple[int, ...]:
    """The resolutions of the pyramid: 4, 8, … size.

    Raises:
      UserError: unless `size` is a power of two from 8 to 1024.
    """
    if size not in (8, 16, 32, 64, 128, 256, 512, 1024):
        raise UserError(f"size is {size}; it must be a power of two from 8 to 1024")
    return tuple(2**i for i in range(2, size.bit_length()))


def channel_table(
    size: int, channel_multiplier: int = 2, channels: Sequence[int] | None = None
) -> dict[int, int]:
    """Channels of each resolution: the published table, or `channels` as given.

    Args:
      size: picture size.
      channel_multiplier: 2 for config-f, 1 for config-e.
      channels: one entry a resolution from 4 up, instead of the table.
    """
    levels = resolutions(size)
    if channels is not None:
        if len(channels) != len(levels):
            raise UserError(
                f"channels has {len(channels)} entries; size {size} needs "
                f"{len(levels)}, one for each of {levels}"
            )
        return dict(zip(levels, map(int, channels), strict=True))
    return {r: min(512, 16384 * channel_multiplier // r) for r in levels}


def num_ws(size: int) -> int:
    """Rows of a w+ code: 10, 14, 18 at 64, 256, 1024."""
    return 2 * len(resolutions(size))


def layer_names(size: int) -> tuple[str, ...]:
    """The modulated layers in execution order: conv_4, rgb_4, up_8, conv_8, …"""
    names = ["conv_4", "rgb_4"]
    for r in resolutions(size)[1:]:
        names += [f"up_{r}", f"conv_{r}", f"rgb_{r}"]
    return tuple(names)


def style_rows(size: int) -> tuple[int, ...]:
    """The w+ row that each modulated layer reads: 0, 1, 1, 2, 3, 3, 4, 5, …"""
    rows = [0, 1]
    for i in range(1, len(resolutions(size))):
        rows += [2 * i - 1, 2 * i, 2 * i + 1]
    return tuple(rows)


def noise_names(size: int) -> tuple[str, ...]:
    """The layers that add noise: every modulated layer but the to-RGBs."""
    return tuple(n for n in layer_names(size) if not n.startswith("rgb"))


def layer_resolution(name: str) -> int:
    """Output size of a layer: `layer_resolution("up_64") == 64`."""
    return int(name.rsplit("_", 1)[1])


# Single operations


def pixel_norm(x: Array) -> Array:
    """Scale each vector of the last axis to a root mean square of one."""
    return x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-8)


def dense(params: Params, x: Array, lr_multiplier: float = 1.0) -> Array:
    """Equalised linear layer: weights of unit variance, scaled when used."""
    weight = params["weight"]
    scale = lr_multiplier / np.sqrt(weight.shape[0])
    return x @ (weight * scale) + params["bias"] * lr_multiplier


def equalized_gain(weight: Array) -> float:
    """What equalises a stored convolution weight [k, k, in, out]: 1 / sqrt(fan in).

    It goes on an activation or a style, which spares a copy of every weight.
    """
    return float(1 / np.sqrt(np.prod(weight.shape[:-1])))


def styled_conv(
    params: Params,
    x: Array,
    style: Array,
    noise: Array | None,
    *,
    up: bool = False,
    packing: tuple[int, int] = (1, 1),
    implementation: str | None = None,
) -> Array:
    """Modulated 3×3 convolution, noise, bias, activation: [batch, h, w, out].

    `packing` and `implementation` are those of `modulated_conv2d`.
    """
    weight = params["weight"]
    return modulated_conv2d(
        x,
        weight,
        style * equalized_gain(weight),
        up=up,
        noise=noise,
        noise_strength=params["noise_strength"],
        bias=params["bias"],
        packing=packing,
        implementation=implementation,
    )


def to_rgb(params: Params, x: Array, style: Array) -> Array:
    """Modulated 1×1 convolution to three channels, no demodulation: [b, h, w, 3]."""
    weight = params["weight"]
    style = style * equalized_gain(weight)
    y = modulated_conv2d(
        x, weight, style, demodulate=False, implementation="xla"
    ).astype(jnp.float32)
    return y + params["bias"]


def to_rgb_planes(params: Params, x: Array, style: Array, packing: int) -> Array:
    """`to_rgb` of packed cells, to planes: no copy, no lane without a pixel.

    Args:
      params: of the layer.
      x: [batch, height, cells, packing * in_channels].
      style: [batch, in_channels].
      packing: columns of a cell of `x`.

    Returns:
      [batch, 3, height, packing, cells], float32.
    """
    weight = params["weight"][0, 0] * equalized_gain(params["weight"])
    weight = weight * style.astype(jnp.float32)[..., None]
    # Each column of a cell has its own block of the weight.
    weight = jnp.einsum("bio,pq->bpioq", weight, jnp.eye(packing))
    weight = weight.reshape(weight.shape[0], x.shape[3], -1, packing)
    y = jnp.einsum(
        "bhwk,bkoq->bohqw",
        x,
        weight.astype(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return y + params["bias"][:, None, None, None]


def picture_of_planes(planes: Array) -> Array:
    """[batch, channels, height, packing, cells] to [batch, height, width, channels]."""
    batch, channels, height = planes.shape[:3]
    return planes.transpose(0, 2, 4, 3, 1).reshape(batch, height, -1, channels)


# Generator


def mapping(params: Params, z: Array) -> Array:
    """z [batch, z_dim] to w [batch, w_dim], in float32."""
    x = pixel_norm(z.astype(jnp.float32))
    for i in range(len(params)):
        x = dense(params[f"dense_{i}"], x, MAPPING_LR_MULTIPLIER)
        x = fused_leaky_relu(x, jnp.zeros(()))
    return x


def truncate(
    w_plus: Array, w_avg: Array, psi: float | Array, cutoff: int | None = None
) -> Array:
    """Pull the first `cutoff` rows (all, when None) towards the average code.

    Args:
      w_plus: [batch, num_ws, w_dim].
      w_avg: [w_dim].
      psi: 1 leaves the codes alone, 0 gives the average.
      cutoff: number of rows from the coarsest.
    """
    rows = jnp.arange(w_plus.shape[1]) < (w_plus.shape[1] if cutoff is None else cutoff)
    factor = jnp.where(rows, psi, 1.0)[:, None]
    return w_avg + (w_plus - w_avg) * factor


def style_vectors(synthesis_params: Params, w_layers: Array) -> tuple[Array, ...]:
    """Style vectors of codes [batch, num_layers, w_dim], one [batch, in] a layer."""
    names = layer_names(2 ** (2 + (w_layers.shape[1] - 2) // 3))
    return tuple(
        dense(synthesis_params[name]["affine"], w_layers[:, i].astype(jnp.float32))
        for i, name in enumerate(names)
    )


def noise_planes(
    size: int,
    batch: int,
    noise: str | Mapping[str, Array],
    *,
    const: Params | None = None,
    key: Array | None = None,
) -> dict[str, Array | None]:
    """One noise plane [1 or batch, r, r] for each noisy layer, or None.

    Args:
      size: picture size.
      batch: number of pictures, for `random`.
      noise: `const` (the planes stored with the weights), `random` (normals drawn
        from `key`, or from one key a picture when it has shape [batch]), `none`,
        or the planes themselves by layer name.
      const: the stored planes, for `const`.
      key: for `random`.

    Raises:
      UserError: an unknown mode, or `random` without a key.
    """
    names = noise_names(size)
    if isinstance(noise, Mapping):
        if set(noise) != set(names):
            raise UserError(
                f"noise names the layers {sorted(noise)}; it must name {list(names)}"
            )
        return {n: noise[n] for n in names}
    if noise == "none":
        return dict.fromkeys(names)
    if noise == "const":
        return {n: lax.stop_gradient(const[n])[None] for n in names}
    if noise != "random":
        raise UserError(
            f"noise is {noise!r}; it must be const, random, none or planes by layer"
        )
    if key is None:
        raise UserError("noise 'random' needs key=, a jax.random key")

    def draw(i, shape):
        if key.ndim:
            keys = jax.vmap(lambda k: jax.random.fold_in(k, i))(key)
            return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
        return jax.random.normal(jax.random.fold_in(key, i), (batch, *shape))

    return {n: draw(i, (layer_resolution(n),) * 2) for i, n in enumerate(names)}


def synthesis(
    params: Params,
    styles: Sequence[Array],
    noise: Mapping[str, Array | None],
    *,
    dtype: Any = jnp.float32,
    blend: Params | None = None,
    blend_styles: Sequence[Array] | None = None,
    blend_weights: Array | None = None,
    transform: Callable[[str, Array], Array] | None = None,
    implementation: str | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Style vectors to a picture.

    With `blend`, a second generator runs in lockstep (JoJoGAN's feature
    interpolation): layer i gives `(1 - a_i) A_i(h) + a_i B_i(h)`, the mix being the
    input of both generators' next layers, and the RGB skip likewise.

    Args:
      params: the `synthesis` parameters (A).
      styles: one [batch, in_channels] a modulated layer, in execution order; those of
        the first resolutions alone give their smaller picture.
      noise: planes by layer name; see `noise_planes`.
      dtype: of the convolutions; the picture is float32.
      blend: `synthesis` parameters of the same architecture (B).
      blend_styles: B's style vectors.
      blend_weights: [num_layers], a_i from 0 (A) to 1 (B).
      transform: maps a layer's name and output [batch, r, r, channels] to what the
        following layers see of it, for every layer but the to-RGBs.
      implementation: of the 3×3 convolutions; see `modulated_conv2d`.

    Returns:
      The picture [batch, size, size, 3], nominally in [-1, 1], and every layer's
      output by name (`rgb_*` after adding the skip).
    """
    features: dict[str, Array] = {}
    batch = styles[0].shape[0]
    names = layer_names(2 ** (2 + (len(styles) - 2) // 3))

    def mixed(i, function):
        a = function(params, styles)
        if blend is None:
            return a
        b = function(blend, blend_styles)
        weight = blend_weights[i].astype(a.dtype)
        return (1 - weight) * a + weight * b

    def const(p, _):
        value = p["const"].astype(dtype)
        return jnp.broadcast_to(value, (batch, *value.shape))

    # With the kernels the picture grows as planes, in the columns of the cells.
    planes = pick_implementation(implementation) == "pallas"
    x, packing, image = mixed(0, const), 1, None
    for i, name in enumerate(names):
        if name.startswith("rgb"):
            layer = partial(to_rgb_planes, packing=packing) if planes else to_rgb
        else:
            up, weight = name.startswith("up"), params[name]["weight"].shape
            after = output_packing(
                x.shape, weight, up=up, packing=packing, implementation=implementation
            )
            layer = partial(
                styled_conv,
                noise=noise[name],
                up=up,
                packing=(packing, after),
                implementation=implementation,
            )
        y = mixed(i, lambda p, s, i=i, n=name, x=x, f=layer: f(p[n], x, s[i]))
        if not name.startswith("rgb"):
            if transform is not None:
                y = pack(transform(name, unpack(y, after)), after)
            x, packing = y, after
            features[name] = unpack(x, packing)
            continue
        if image is not None:
            y = y + (upsample_planes(image, packing) if planes else upsample2d(image))
        image = y
        features[name] = picture_of_planes(image) if planes else image
    image = features[names[-1]]
    return image, features


def mapping_shapes(depth: int, z_dim: int, w_dim: int) -> dict:
    """Mapping parameters: weights N(0, 1) / lr_multiplier, biases zero."""
    widths = [z_dim] + [w_dim] * depth
    return {
        f"dense_{i}": {
            "weight": Normal((widths[i], widths[i + 1]), 1 / MAPPING_LR_MULTIPLIER),
            "bias": Full((widths[i + 1],)),
        }
        for i in range(depth)
    }


def synthesis_shapes(channels: Mapping[int, int], w_dim: int) -> dict:
    """Synthesis parameters: weights N(0, 1), style biases one, the rest zero."""
    params = {"const": Normal((4, 4, channels[4]))}
    for name in layer_names(max(channels)):
        r = layer_resolution(name)
        width_in = channels[r // 2] if name.startswith("up") else channels[r]
        rgb = name.startswith("rgb")
        k, width_out = (1, 3) if rgb else (3, channels[r])
        params[name] = {
            "weight": Normal((k, k, width_in, width_out)),
            "affine": {
                "weight": Normal((w_dim, width_in)),
                "bias": Full((width_in,), 1.0),
            },
            "bias": Full((width_out,)),
        }
        if not rgb:
            params[name]["noise_strength"] = Full(())
    return params


def recomputed(function):
    """`function`, whose backward pass computes the layers of each block once more.

    Only the blocks' outputs are kept: less memory for about a third more time.
    """
    policy = jax.checkpoint_policies.save_only_these_names(BLOCK)
    return jax.checkpoint(function, policy=policy)


class Generator(nn.Module):
    """StyleGAN2 generator.

    Attributes:
      size: picture size, a power of two from 8 to 1024.
      channel_multiplier: 2 (config-f) or 1 (config-e).
      channels: channels at 4, 8, … size, instead of the published table.
      mapping_depth: layers of the mapping network, 1 to 8.
      z_dim: width of z.
      w_dim: width of w.
      dtype: of the convolutions; styles, demodulation and the picture are float32.
      remat: see `recomputed`.
    """

    size: int
    channel_multiplier: int = 2
    channels: tuple[int, ...] | None = None
    mapping_depth: int = 8
    z_dim: int = 512
    w_dim: int = 512
    dtype: Any = "float32"
    remat: bool = False

    @property
    def channel_table(self) -> dict[int, int]:
        """Channels by resolution."""
        return channel_table(self.size, self.channel_multiplier, self.channels)

    @property
    def num_ws(self) -> int:
        """Rows of a w+ code."""
        return num_ws(self.size)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Modulated layers in execution order."""
        return layer_names(self.size)

    @property
    def style_dims(self) -> tuple[int, ...]:
        """Length of each style vector, in execution order."""
        table = self.channel_table
        return tuple(
            table[
                layer_resolution(n) // 2 if n.startswith("up") else layer_resolution(n)
            ]
            for n in self.layer_names
        )

    def init_params(self, *, key: Array) -> dict:
        """Fresh parameters: {mapping, synthesis, noise_const, w_avg}."""
        if not 1 <= self.mapping_depth <= 8:
            raise UserError(f"mapping_depth is {self.mapping_depth}; it must be 1 to 8")
        shapes = {
            "mapping": mapping_shapes(self.mapping_depth, self.z_dim, self.w_dim),
            "synthesis": synthesis_shapes(self.channel_table, self.w_dim),
            "noise_const": {
                n: Normal((layer_resolution(n),) * 2) for n in noise_names(self.size)
            },
            "w_avg": Full((self.w_dim,)),
        }
        return initialize(shapes, key=key)

    def setup(self):
        self.params = module_params(self)

    def mapping(self, z: Array) -> Array:
        """z [batch, z_dim] to w [batch, w_dim]."""
        return mapping(self.params["mapping"], z)

    def w_layers(self, codes: Array, space: str) -> Array:
        """Codes of any w space as [batch, num_layers, w_dim]."""
        return self._w_layers(self.check_codes(codes, space), space)

    def styles(self, codes: Any, space: str = "w_plus") -> tuple[Array, ...]:
        """Codes of any space but z as style vectors, one [batch, in] a layer."""
        codes = self.check_codes(codes, space)
        if space == "styles":
            return tuple(codes)
        return style_vectors(self.params["synthesis"], self._w_layers(codes, space))

    def _w_layers(self, codes: Array, space: str) -> Array:
        if space == "w":
            shape = (codes.shape[0], len(self.layer_names), codes.shape[1])
            return jnp.broadcast_to(codes[:, None], shape)
        if space == "w_plus":
            return codes[:, np.array(style_rows(self.size))]
        return codes

    def check_codes(self, codes: Any, space: str) -> Any:
        """The codes, unchanged.

        Raises:
          UserError: an unknown space, or a shape this generator does not take.
        """
        rows = {
            "z": (self.z_dim,),
            "w": (self.w_dim,),
            "w_plus": (self.num_ws, self.w_dim),
            "w_layers": (len(self.layer_names), self.w_dim),
        }
        if space not in SPACES:
            raise UserError(
                f"space is {space!r}; it must be one of {', '.join(SPACES)}"
            )
        if space == "styles":
            got = tuple(s.shape[-1] for s in codes)
            if got != self.style_dims:
                raise UserError(
                    f"styles have lengths {got}; a {self.size} px generator takes "
                    f"{self.style_dims}"
                )
        elif codes.ndim != len(rows[space]) + 1 or codes.shape[1:] != rows[space]:
            raise UserError(
                f"codes have shape {list(codes.shape)}; space {space!r} at "
                f"{self.size} px takes [batch, "
                f"{', '.join(map(str, rows[space]))}]"
                + (": add the batch axis" if codes.shape == rows[space] else "")
            )
        return codes

    def __call__(
        self,
        codes: Any,
        *,
        space: str = "z",
        psi: float | Array = 1.0,
        cutoff: int | None = None,
        mix_codes: Array | None = None,
        mix_from: int | Array | None = None,
        noise: str | Mapping[str, Array] = "const",
        key: Array | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Codes to pictures.

        Args:
          codes: in one of the five spaces; see the module's table.
          space: which.
          psi: truncation towards `w_avg`, for z, w and w_plus.
          cutoff: truncate only this many rows, from the coarsest.
          mix_codes: second codes of the same space z or w (style mixing).
          mix_from: first row that takes the second codes, 1 to num_ws - 1; a scalar
            or one a picture.
          noise: const, random, none, or planes by layer name; see `noise_planes`.
          key: for random noise; one key, or one a picture.

        Returns:
          Pictures [batch, size, size, 3], float32, nominally in [-1, 1], and `out`:
          `w`, `w_plus`, `w_layers` as far as the space passes through them,
          `styles`, and `features` (every layer's output by name).

        Raises:
          UserError: a code of another shape, an unknown space or noise.
        """
        codes = self.check_codes(codes, space)
        out: dict[str, Any] = {}

        def to_w(c):
            return self.mapping(c) if space == "z" else c

        if space in ("z", "w"):
            out["w"] = to_w(codes)
            shape = (out["w"].shape[0], self.num_ws, self.w_dim)
            out["w_plus"] = jnp.broadcast_to(out["w"][:, None], shape)
            if mix_codes is not None:
                second = to_w(self.check_codes(mix_codes, space))[:, None]
                rows = jnp.arange(self.num_ws)[None] < jnp.reshape(mix_from, (-1, 1))
                out["w_plus"] = jnp.where(rows[..., None], out["w_plus"], second)
        elif space == "w_plus":
            out["w_plus"] = codes
        if "w_plus" in out:
            if not (isinstance(psi, (int, float)) and psi == 1):
                w_avg = lax.stop_gradient(self.params["w_avg"])
                out["w_plus"] = truncate(out["w_plus"], w_avg, psi, cutoff)
            out["w_layers"] = self._w_layers(out["w_plus"], "w_plus")
        elif space == "w_layers":
            out["w_layers"] = codes
        if space == "styles":
            out["styles"] = tuple(codes)
        else:
            out["styles"] = style_vectors(self.params["synthesis"], out["w_layers"])
        planes = noise_planes(
            self.size,
            out["styles"][0].shape[0],
            noise,
            const=self.params["noise_const"],
            key=key,
        )
        run = partial(synthesis, dtype=jnp.dtype(self.dtype))
        run = recomputed(run) if self.remat else run
        image, out["features"] = run(self.params["synthesis"], out["styles"], planes)
        return image, out


def interpolate_features(
    generator: Generator,
    base: Params,
    tuned: Params,
    codes: Any,
    alpha: float | Array,
    *,
    space: str = "w_plus",
    noise: str | Mapping[str, Array] = "const",
    key: Array | None = None,
) -> Array:
    """Pictures between two generators (feature interpolation, arXiv 2112.11641).

    Args:
      generator: the architecture of both.
      base: A's parameters.
      tuned: B's parameters.
      codes: in any space but z.
      alpha: 0 gives A, 1 gives B; a scalar or one weight a modulated layer.
      space: of the codes.
      noise: as in `Generator`, the planes being A's.
      key: for random noise.

    Returns:
      [batch, size, size, 3].
    """
    styles = [
        generator.apply({"params": p}, codes, space, method="styles")
        for p in (base, tuned)
    ]
    planes = noise_planes(
        generator.size,
        styles[0][0].shape[0],
        noise,
        const=base["noise_const"],
        key=key,
    )
    weights = jnp.broadcast_to(jnp.asarray(alpha, jnp.float32), len(styles[0]))
    return synthesis(
        base["synthesis"],
        styles[0],
        planes,
        dtype=jnp.dtype(generator.dtype),
        blend=tuned["synthesis"],
        blend_styles=styles[1],
        blend_weights=weights,
    )[0]


# Discriminator


def minibatch_stddev(x: Array, group: int = STDDEV_GROUP) -> Array:
    """Append one channel: the mean standard deviation over groups of pictures.

    The groups are those of the whole (global) batch on one device: sample i falls in
    group `i mod (batch / group)`, so their members are strided.

    Args:
      x: [batch, height, width, channels].
      group: size of a group; smaller batches form one group.

    Returns:
      [batch, height, width, channels + 1].

    Raises:
      UserError: a batch above `group` that is not a multiple of it.
    """
    batch, height, width, channels = x.shape
    size = min(batch, group)
    if batch % size:
        raise UserError(
            f"batch is {batch}; a discriminator takes batches up to {group} or "
            f"multiples of {group}"
        )
    grouped = x.astype(jnp.float32).reshape(
        size, batch // size, height, width, channels
    )
    deviation = jnp.sqrt(jnp.var(grouped, 0) + 1e-8)
    statistic = jnp.mean(deviation, (1, 2, 3))
    column = jnp.tile(statistic, size)[:, None, None, None].astype(x.dtype)
    return jnp.concatenate([x, jnp.broadcast_to(column, (batch, height, width, 1))], -1)


def conv_layer(
    params: Params,
    x: Array,
    *,
    down: bool = False,
    packing: int = 1,
    implementation: str | None = None,
) -> tuple[Array, int]:
    """Equalised convolution; bias and activation where the layer has a bias.

    Returns:
      The output, and the columns of a cell that it comes packed in.
    """
    weight = params["weight"]
    after = output_packing(
        x.shape, weight.shape, down=down, packing=packing, implementation=implementation
    )
    y = activated_conv2d(
        x,
        weight,
        params.get("bias"),
        gain=equalized_gain(weight),
        down=down,
        packing=(packing, after),
        implementation=implementation,
    )
    return y, after


def from_rgb(params: Params, images: Array) -> tuple[Array, int]:
    """Pictures [batch, size, size, 3] to channels, packed as the first block wants.

    Returns:
      [batch, size, size / packing, packing * channels], and the packing.
    """
    p = params["from_rgb"]
    weight, bias = p["weight"], p["bias"]
    gain = jnp.asarray(equalized_gain(weight), images.dtype)
    channels, size = weight.shape[3], images.shape[1]
    packing = output_packing(
        (*images.shape[:3], channels), params[f"block_{size}"]["conv1"]["weight"].shape
    )
    if packing > 1:
        # Each column of a cell has its own block of the weight.
        columns = jnp.eye(packing, dtype=weight.dtype)
        weight = jnp.einsum("pq,xyio->xypiqo", columns, weight)
        weight = weight.reshape(1, 1, 3 * packing, -1)
        bias = jnp.tile(bias, packing)
    y = conv2d(pack(images, packing), weight) * gain
    return fused_leaky_relu(y, bias), packing


def discriminate(
    params: Params, images: Array, *, dtype: Any = jnp.float32, taps: int | None = None
) -> tuple[Array | None, dict[str, Array]]:
    """Logits and every block's output.

    Args:
      params: a discriminator's parameters.
      images: [batch, size, size, 3] in [-1, 1].
      dtype: of the convolutions.
      taps: stop after this many blocks (JoJoGAN's features need no head).

    Returns:
      Logits [batch, 1] float32 (None with `taps`), and features by name: `from_rgb`,
      `block_{r}` for the block that reads resolution r.
    """
    blocks = sorted(
        (n for n in params if n.startswith("block_")),
        key=layer_resolution,
        reverse=True,
    )
    x, packing = from_rgb(params, images.astype(dtype))
    features = {"from_rgb": unpack(x, packing)}
    for name in blocks[:taps]:
        p = params[name]
        y, after = conv_layer(p["conv1"], x, packing=packing)
        y, after = conv_layer(p["conv2"], y, down=True, packing=after)
        skip, packing = conv_layer(p["skip"], x, down=True, packing=packing)
        x = checkpoint_name((y + skip) * jnp.asarray(0.5**0.5, dtype), BLOCK)
        features[name] = unpack(x, packing)
    if taps is not None:
        return None, features
    x = minibatch_stddev(x)
    x, _ = conv_layer(params["final_conv"], x)
    x = x.astype(jnp.float32)
    x = dense(params["dense_0"], x.reshape(x.shape[0], -1))
    x = fused_leaky_relu(x, jnp.zeros(()))
    return dense(params["dense_1"], x), features


class Discriminator(nn.Module):
    """StyleGAN2 discriminator (residual, minibatch standard deviation).

    Attributes:
      size: picture size, a power of two from 8 to 1024.
      channel_multiplier: 2 (config-f) or 1 (config-e).
      channels: channels at 4, 8, … size, instead of the published table.
      dtype: of the convolutions; the head and the logits are float32.
      remat: see `recomputed`.
    """

    size: int
    channel_multiplier: int = 2
    channels: tuple[int, ...] | None = None
    dtype: Any = "float32"
    remat: bool = False

    @property
    def channel_table(self) -> dict[int, int]:
        """Channels by resolution."""
        return channel_table(self.size, self.channel_multiplier, self.channels)

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Names of the features in execution order: from_rgb, block_{size} …"""
        levels = reversed(resolutions(self.size)[1:])
        return ("from_rgb", *(f"block_{r}" for r in levels))

    def init_params(self, *, key: Array) -> dict:
        """Fresh parameters: weights N(0, 1), biases zero."""
        table = self.channel_table

        def layer(*shape):
            return {"weight": Normal(shape), "bias": Full(shape[-1:])}

        shapes = {"from_rgb": layer(1, 1, 3, table[self.size])}
        for r in reversed(resolutions(self.size)[1:]):
            width, below = table[r], table[r // 2]
            shapes[f"block_{r}"] = {
                "conv1": layer(3, 3, width, width),
                "conv2": layer(3, 3, width, below),
                "skip": {"weight": Normal((1, 1, width, below))},
            }
        shapes["final_conv"] = layer(3, 3, table[4] + 1, table[4])
        shapes["dense_0"] = layer(16 * table[4], table[4])
        shapes["dense_1"] = layer(table[4], 1)
        return initialize(shapes, key=key)

    def setup(self):
        self.params = module_params(self)

    def __call__(
        self, images: Array, *, taps: int | None = None
    ) -> tuple[Array | None, dict[str, Array]]:
        """Pictures [batch, size, size, 3] to logits [batch, 1] and `out`.

        `out["features"]` holds `from_rgb` and every `block_{r}`. With `taps`, only that
        many blocks run and the logits are None.

        Raises:
          UserError: pictures of another size, or a batch the stddev groups refuse.
        """
        if images.shape[1:] != (self.size, self.size, 3):
            raise UserError(
                f"images have shape {list(images.shape)}; this discriminator takes "
                f"[batch, {self.size}, {self.size}, 3]"
            )
        run = partial(discriminate, dtype=jnp.dtype(self.dtype), taps=taps)
        run = recomputed(run) if self.remat else run
        logits, features = run(self.params, images)
        return logits, {"features": features}
