"""Encoders: a picture to latent codes of a StyleGAN2.

One trunk, IR-SE50 (residual blocks with squeeze and excitation) or for things that are
no faces ResNet-34 (`blocks="resnet"`), under four readings:

- `GradualStyleEncoder`: pSp (Richardson et al., arXiv 2008.00951), w+ row by row;
- `Encoder4Editing`: e4e (Tov et al., arXiv 2102.02766), one w and offsets from it;
- `BackboneWEncoder`, `BackboneWPlusEncoder`: pSp's baselines without a pyramid.

ReStyle's encoders (Alaluf et al., arXiv 2104.02699) are pSp's and e4e's with
`level_rows=()`, all rows reading the last stage, and six input channels: the picture,
and what the codes so far make of it (`refine`).

pSp and e4e read a feature pyramid: the coarse rows from the last stage, the middle
and fine rows from maps of twice and four times its size. Codes are offsets from the
average code unless the encoder was trained otherwise; `encode` adds it.

Depth, widths and picture size are fields, so a small encoder is the same code. Batch
normalisation runs on stored statistics, or with `train=True` on those of the batch:
over a batch sharded on several devices they are those of the global batch.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxstyle.errors import UserError
from jaxstyle.init import Full, Normal, initialize, module_params

BN_EPSILON = 1e-5
BN_MOMENTUM = 0.1
Params = Mapping[str, Any]


# Layers


def conv(x: Array, weight: Array, *, stride: int = 1) -> Array:
    """Convolution [b, h, w, in] with [k, k, in, out], padded as in PyTorch.

    The padding is k // 2 on all sides; XLA's "SAME" pads even sizes on one side only
    under a stride, which shifts the picture by a pixel.
    """
    pad = (weight.shape[0] // 2,) * 2
    return lax.conv_general_dilated(
        x,
        weight.astype(x.dtype),
        (stride, stride),
        (pad, pad),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def batch_norm(params: Params, x: Array, train: bool) -> tuple[Array, dict]:
    """Batch normalisation over all axes but the last, in float32.

    Args:
      params: `scale`, `bias` and the running statistics `mean`, `var`, all [channels].
      x: [..., channels].
      train: use the batch's statistics and return the new running ones; the running
        variance takes the unbiased estimate, as PyTorch's does.

    Returns:
      The result in x's dtype, and {} or {"mean", "var"}.
    """
    y = x.astype(jnp.float32)
    if train:
        axes = tuple(range(x.ndim - 1))
        mean, var = jnp.mean(y, axes), jnp.var(y, axes)
        count = x.size // x.shape[-1]
        new = {"mean": mean, "var": var * (count / max(count - 1, 1))}
        stats = {
            k: lax.stop_gradient((1 - BN_MOMENTUM) * params[k] + BN_MOMENTUM * new[k])
            for k in new
        }
    else:
        mean, var = (lax.stop_gradient(params[k]) for k in ("mean", "var"))
        stats = {}
    factor = params["scale"] * lax.rsqrt(var + BN_EPSILON)
    y = y * factor + (params["bias"] - mean * factor)
    return y.astype(x.dtype), stats


def prelu(slope: Array, x: Array) -> Array:
    """x where positive, else slope [channels] times x."""
    return jnp.where(x > 0, x, slope.astype(x.dtype) * x)


def squeeze_excite(params: Params, x: Array) -> Array:
    """Scale each channel by a factor in (0, 1) computed from all channels' means."""
    y = jnp.mean(x.astype(jnp.float32), (1, 2))
    y = jax.nn.sigmoid(jax.nn.relu(y @ params["down"]) @ params["up"])
    return x * y[:, None, None].astype(x.dtype)


def equal_dense(params: Params, x: Array) -> Array:
    """Linear layer whose weight [in, out] is scaled by 1 / sqrt(in) when used."""
    weight = params["weight"]
    return x @ (weight / np.sqrt(weight.shape[0])) + params["bias"]


def resize_corners(x: Array, height: int, width: int) -> Array:
    """Bilinear resize [b, h, w, c] to [b, height, width, c] that keeps corner pixels.

    PyTorch's `align_corners=True`; `jax.image.resize` aligns pixel edges instead.
    """
    matrices = []
    for old, new in zip(x.shape[1:3], (height, width), strict=True):
        at = np.linspace(0, old - 1, new)
        matrices.append(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old))))
    return _resample(x, *matrices)


def adaptive_pool(x: Array, size: int) -> Array:
    """Average [b, h, w, c] over size × size windows, which overlap if uneven.

    A smaller picture is enlarged by repeating pixels.
    """
    b, height, width, c = x.shape
    if height % size == width % size == 0:
        x = x.reshape(b, size, height // size, size, width // size, c)
        return x.mean((2, 4))
    if size % height == size % width == 0:
        return jnp.repeat(jnp.repeat(x, size // height, 1), size // width, 2)
    return _resample(x, _windows(height, size), _windows(width, size))


def _windows(old: int, size: int) -> np.ndarray:
    start = np.arange(size) * old // size
    end = -(-(np.arange(size) + 1) * old // size)
    column = np.arange(old)
    inside = (column >= start[:, None]) & (column < end[:, None])
    return inside / (end - start)[:, None]


def _resample(x: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    rows, columns = jnp.asarray(rows, x.dtype), jnp.asarray(columns, x.dtype)
    return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns)


# Trunk


def trunk(
    params: Params, images: Array, units: tuple[int, ...], *, train: bool, dtype: Any
) -> tuple[dict[str, Array], dict]:
    """IR-SE trunk; or, if its blocks have no `se`, ReStyle's ResNet without a max pool.

    Args:
      params: with `input` and `body_0` .. .
      images: [batch, size, size, in_channels].
      units: residual blocks in each stage; each stage halves the size.
      train: see `batch_norm`.
      dtype: of the convolutions.

    Returns:
      Features `input`, `stage_0`, `stage_1` .. and the new running statistics.
    """
    stats: dict[str, Any] = {}
    layer, resnet = params["input"], "se" not in params["body_0"]
    block = _basic_block if resnet else _block
    x = conv(images.astype(dtype), layer["conv"], stride=2 if resnet else 1)
    x, norm = batch_norm(layer["norm"], x, train)
    stats["input"] = {"norm": norm}
    x = prelu(layer["slope"], x)
    features, i = {"input": x}, 0
    for stage, count in enumerate(units):
        for unit in range(count):
            # A ResNet has halved the picture before its first stage.
            halves = unit == 0 and not (resnet and stage == 0)
            stride = 2 if halves else 1
            x, stats[f"body_{i}"] = block(params[f"body_{i}"], x, stride, train)
            i += 1
        features[f"stage_{stage}"] = x
    return features, stats


def _block(params: Params, x: Array, stride: int, train: bool) -> tuple[Array, dict]:
    stats = {}
    y, stats["norm1"] = batch_norm(params["norm1"], x, train)
    y = prelu(params["slope"], conv(y, params["conv1"]))
    y = conv(y, params["conv2"], stride=stride)
    y, stats["norm2"] = batch_norm(params["norm2"], y, train)
    y = squeeze_excite(params["se"], y)
    x, more = _shortcut(params, x, stride, train)
    return y + x, stats | more


def _basic_block(
    params: Params, x: Array, stride: int, train: bool
) -> tuple[Array, dict]:
    """ResNet's block of two convolutions (He et al., arXiv 1512.03385)."""
    stats = {}
    y = conv(x, params["conv1"], stride=stride)
    y, stats["norm1"] = batch_norm(params["norm1"], y, train)
    y = conv(jax.nn.relu(y), params["conv2"])
    y, stats["norm2"] = batch_norm(params["norm2"], y, train)
    x, more = _shortcut(params, x, stride, train)
    return jax.nn.relu(y + x), stats | more


def _shortcut(params: Params, x: Array, stride: int, train: bool) -> tuple[Array, dict]:
    if "shortcut" not in params:
        return x[:, ::stride, ::stride], {}
    x = conv(x, params["shortcut"]["conv"], stride=stride)
    x, norm = batch_norm(params["shortcut"]["norm"], x, train)
    return x, {"shortcut": {"norm": norm}}


def norm_shapes(width: int) -> dict:
    return {
        "scale": Full((width,), 1.0),
        "bias": Full((width,)),
        "mean": Full((width,)),
        "var": Full((width,), 1.0),
    }


def _conv_shape(k: int, width_in: int, width_out: int, gain: float = 2.0) -> Normal:
    return Normal((k, k, width_in, width_out), (gain / (k * k * width_in)) ** 0.5)


def _equal_dense_shapes(width_in: int, width_out: int) -> dict:
    return {"weight": Normal((width_in, width_out)), "bias": Full((width_out,))}


def trunk_shapes(
    in_channels: int,
    units: tuple[int, ...],
    channels: tuple[int, ...],
    se_ratio: int,
    blocks: str = "ir_se",
) -> dict:
    """Parameters of `trunk`; `blocks` is `ir_se` or `resnet`.

    Raises:
      UserError: other blocks, units for more or fewer stages than channels, or fewer
        channels than the squeeze divides by.
    """
    if blocks not in ("ir_se", "resnet"):
        raise UserError(f"blocks is {blocks!r}; it must be ir_se or resnet")
    few = blocks == "ir_se" and min(channels) < se_ratio
    if few or len(units) != len(channels):
        raise UserError(
            f"units {units}, channels {channels}: as many of both, and channels of at "
            f"least se_ratio, {se_ratio}"
        )
    width, resnet = channels[0], blocks == "resnet"
    shapes: dict[str, Any] = {
        "input": {
            "conv": _conv_shape(7 if resnet else 3, in_channels, width),
            "norm": norm_shapes(width),
            "slope": Full((width,), 0.25),
        }
    }
    for count, width_out in zip(units, channels, strict=True):
        for _ in range(count):
            block = {
                "norm1": norm_shapes(width_out if resnet else width),
                "conv1": _conv_shape(3, width, width_out),
                "conv2": _conv_shape(3, width_out, width_out),
                "norm2": norm_shapes(width_out),
            }
            if not resnet:
                hidden = width_out // se_ratio
                block["slope"] = Full((width_out,), 0.25)
                block["se"] = {
                    "down": Normal((width_out, hidden), width_out**-0.5),
                    "up": Normal((hidden, width_out), hidden**-0.5),
                }
            if width != width_out:
                block["shortcut"] = {
                    "conv": _conv_shape(1, width, width_out),
                    "norm": norm_shapes(width_out),
                }
            shapes[f"body_{len(shapes) - 1}"] = block
            width = width_out
    return shapes


def merge_batch_stats(params: Params, stats: Params) -> dict:
    """`params` with the running statistics of a training pass in their places."""
    merged = dict(params)
    for name, value in stats.items():
        nested = isinstance(value, Mapping)
        merged[name] = merge_batch_stats(params[name], value) if nested else value
    return merged


def batch_stats(params: Params) -> dict:
    """The running statistics in a tree, nested as a training pass gives them."""
    nested = {k: batch_stats(v) for k, v in params.items() if isinstance(v, Mapping)}
    own = {k: params[k] for k in ("mean", "var") if k in params}
    return own | {k: v for k, v in nested.items() if v}


# Heads


def map_to_styles(params: list[Params], x: Array) -> Array:
    """The map2style heads of rows that read the same map.

    Each head is a chain of 3×3 convolutions of stride 2 down to one pixel, with
    leaky ReLU (slope 0.01), and an equalised linear layer. The first convolutions,
    most of the work, run as one over all heads: on two CPU cores the eleven fine rows
    take half the time of separate ones (grouped ones later on would take four times).

    Args:
      params: one dict a row, `conv_0` .. and `dense`.
      x: [batch, height, width, channels].

    Returns:
      [batch, rows, w_dim], float32.
    """

    def layer(x, weight, bias):
        return jax.nn.leaky_relu(conv(x, weight, stride=2) + bias.astype(x.dtype), 0.01)

    first = [
        jnp.concatenate([p["conv_0"][k] for p in params], -1)
        for k in ("weight", "bias")
    ]
    rows = []
    for head, y in zip(
        params, jnp.split(layer(x, *first), len(params), -1), strict=True
    ):
        for i in range(1, len(head) - 1):
            y = layer(y, **head[f"conv_{i}"])
        rows.append(equal_dense(head["dense"], y[:, 0, 0].astype(jnp.float32)))
    return jnp.stack(rows, 1)


def pyramid(
    params: Params, features: Mapping[str, Array], levels: int
) -> tuple[Array, ...]:
    """Maps the heads read: the last stage, and finer ones with its detail mixed in.

    Returns:
      `levels` maps [batch, h, w, channels], each twice the size of the one before.
    """
    stages = [v for k, v in features.items() if k.startswith("stage")][::-1]
    maps = [stages[0]]
    for k in range(1, levels):
        lateral = params[f"lateral_{k}"]
        y = conv(stages[k], lateral["weight"]) + lateral["bias"].astype(maps[0].dtype)
        maps.append(resize_corners(maps[-1], *y.shape[1:3]) + y)
    return tuple(maps)


def level_of(row: int, level_rows: tuple[int, ...]) -> int:
    """Which map of the pyramid a row reads: 0 for coarse, 1 middle, 2 fine."""
    return sum(row >= first for first in level_rows)


def style_rows(
    params: Params, maps: tuple[Array, ...], rows: int, level_rows: tuple[int, ...]
) -> Array:
    """The first `rows` rows from the maps of `pyramid`: [batch, rows, w_dim]."""
    edges = [0, *(min(r, rows) for r in level_rows[: len(maps) - 1]), rows]
    parts = [
        map_to_styles([params[f"style_{i}"] for i in range(start, end)], x)
        for x, start, end in zip(maps, edges[:-1], edges[1:], strict=True)
        if end > start
    ]
    return jnp.concatenate(parts, 1)


# Modules


def _init_params(encoder: nn.Module, heads: Mapping[str, Any], key: Array) -> dict:
    shapes = trunk_shapes(
        encoder.in_channels,
        encoder.units,
        encoder.channels,
        encoder.se_ratio,
        encoder.blocks,
    )
    shapes |= heads
    shapes["w_avg"] = Full((encoder.num_styles, encoder.w_dim))
    return initialize(shapes, key=key)


def _pyramid_params(encoder: nn.Module, key: Array) -> dict:
    channels, rows = encoder.channels, encoder.level_rows
    levels = len(rows) + 1
    width = encoder.head_channels or encoder.w_dim
    last = encoder.size >> len(encoder.units)
    if levels > len(channels) or last < 2 or list(rows) != sorted(set(rows)):
        raise UserError(
            f"size {encoder.size}, units {encoder.units}, level_rows {rows}: the last "
            "stage must keep 2 pixels, level_rows must rise and be fewer than stages"
        )

    def layer(k, width_in, width_out, gain=1 / 3):
        # The gain of PyTorch's default, which the published heads start from.
        return {
            "weight": _conv_shape(k, width_in, width_out, gain),
            "bias": Full((width_out,)),
        }

    heads = {
        f"lateral_{k}": layer(1, channels[-1 - k], channels[-1])
        for k in range(1, levels)
    }
    for row in range(encoder.num_styles):
        spatial = last << level_of(row, rows)
        widths = [channels[-1]] + [width] * (spatial.bit_length() - 1)
        head = {
            f"conv_{i}": layer(3, widths[i], widths[i + 1])
            for i in range(len(widths) - 1)
        }
        head["dense"] = _equal_dense_shapes(width, encoder.w_dim)
        heads[f"style_{row}"] = head
    return _init_params(encoder, heads, key)


def _features(encoder: nn.Module, params: Params, images: Array, train: bool):
    wanted = (encoder.size, encoder.size, encoder.in_channels)
    if images.shape[1:] != wanted:
        raise UserError(
            f"images have shape {list(images.shape)}; this encoder takes "
            f"[batch, {', '.join(map(str, wanted))}]"
        )
    if encoder.rows:
        images = images[:, slice(*encoder.rows)]
    return trunk(params, images, encoder.units, train=train, dtype=encoder.dtype)


def _out(features: Mapping[str, Array], stats: dict, train: bool) -> dict:
    return {"features": features} | ({"batch_stats": stats} if train else {})


class GradualStyleEncoder(nn.Module):
    """pSp's encoder: every row of w+ has its own head on a feature pyramid.

    Attributes:
      num_styles: rows of the codes: 18, 14, 10 for generators of 1024, 256, 64 px.
      size: height and width of the pictures.
      in_channels: 3; 1 for sketches, the number of classes for label maps.
      units: residual blocks in each stage; each stage halves the size.
      channels: width of each stage.
      se_ratio: squeeze of the channel attention.
      w_dim: width of a code.
      level_rows: first row that reads the pyramid's second (middle) map, third (fine).
      head_channels: of the convolutions of each row's head; 0: w_dim, as published.
      start_from_w_avg: whether codes are offsets from `w_avg`.
      blocks: of the trunk: `ir_se`, or `resnet` as ReStyle's for things but faces.
      rows: first of the rows it sees, and the one after the last; empty: all. Pictures
        of cars are wide and lie in a square one.
      dtype: of the convolutions; normalisation and linear layers are float32.
    """

    num_styles: int = 18
    size: int = 256
    in_channels: int = 3
    units: tuple[int, ...] = (3, 4, 14, 3)
    channels: tuple[int, ...] = (64, 128, 256, 512)
    se_ratio: int = 16
    w_dim: int = 512
    level_rows: tuple[int, ...] = (3, 7)
    head_channels: int = 0
    start_from_w_avg: bool = True
    blocks: str = "ir_se"
    rows: tuple[int, ...] = ()
    dtype: Any = "float32"

    def init_params(self, *, key: Array) -> dict:
        """Fresh parameters: {input, body_*, lateral_*, style_*, w_avg}."""
        return _pyramid_params(self, key)

    def setup(self):
        self.params = module_params(self)

    def __call__(self, images: Array, *, train: bool = False) -> tuple[Array, dict]:
        """Pictures to codes without the average.

        Args:
          images: [batch, size, size, in_channels], colours in [-1, 1].
          train: normalise over the batch; `out["batch_stats"]` then holds the new
            running statistics for `merge_batch_stats`.

        Returns:
          Codes [batch, num_styles, w_dim], float32, and `out["features"]`: `input`,
          `stage_0` .. of the trunk and the pyramid's maps `level_0` (coarse) .. .
        """
        features, stats = _features(self, self.params, images, train)
        levels = level_of(self.num_styles - 1, self.level_rows) + 1
        maps = pyramid(self.params, features, levels)
        codes = style_rows(self.params, maps, self.num_styles, self.level_rows)
        features |= {f"level_{k}": x for k, x in enumerate(maps)}
        return codes, _out(features, stats, train)


class Encoder4Editing(nn.Module):
    """e4e's encoder: one base code for all rows, and an offset for each other row.

    Parameters and fields are those of `GradualStyleEncoder`; training enables one
    offset after the other, so that codes stay near W, where edits work.
    """

    num_styles: int = 18
    size: int = 256
    in_channels: int = 3
    units: tuple[int, ...] = (3, 4, 14, 3)
    channels: tuple[int, ...] = (64, 128, 256, 512)
    se_ratio: int = 16
    w_dim: int = 512
    level_rows: tuple[int, ...] = (3, 7)
    head_channels: int = 0
    start_from_w_avg: bool = True
    blocks: str = "ir_se"
    rows: tuple[int, ...] = ()
    dtype: Any = "float32"

    def init_params(self, *, key: Array) -> dict:
        """Fresh parameters: {input, body_*, lateral_*, style_*, w_avg}."""
        return _pyramid_params(self, key)

    def setup(self):
        self.params = module_params(self)

    def __call__(
        self, images: Array, *, stage: int | Array | None = None, train: bool = False
    ) -> tuple[Array, dict]:
        """Pictures to codes without the average; see `GradualStyleEncoder`.

        Args:
          images: [batch, size, size, in_channels].
          stage: rows 1 .. stage get their offsets: 0 gives a single w, None all. Of an
            int only the parts of the network that these rows need are run; of an array
            [] all are, and the offsets that are not wanted are masked.
          train: see `GradualStyleEncoder`.
        """
        features, stats = _features(self, self.params, images, train)
        last = self.num_styles - 1
        if isinstance(stage, int):
            last = min(stage, last)
        maps = pyramid(self.params, features, level_of(last, self.level_rows) + 1)
        rows = style_rows(self.params, maps, last + 1, self.level_rows)
        base, offsets = rows[:, :1], rows[:, 1:]
        if isinstance(stage, Array):
            wanted = jnp.arange(1, self.num_styles) <= stage
            offsets = jnp.where(wanted[:, None], offsets, 0.0)
        offsets = jnp.pad(offsets, ((0, 0), (1, self.num_styles - 1 - last), (0, 0)))
        features |= {f"level_{k}": x for k, x in enumerate(maps)}
        return base + offsets, _out(features, stats, train)


class BackboneWEncoder(nn.Module):
    """pSp's W baseline: one code from the mean of the last stage.

    Fields are those of `GradualStyleEncoder`; `encode` repeats the code to
    `num_styles` rows.
    """

    num_styles: int = 18
    size: int = 256
    in_channels: int = 3
    units: tuple[int, ...] = (3, 4, 14, 3)
    channels: tuple[int, ...] = (64, 128, 256, 512)
    se_ratio: int = 16
    w_dim: int = 512
    start_from_w_avg: bool = True
    blocks: str = "ir_se"
    rows: tuple[int, ...] = ()
    dtype: Any = "float32"

    def init_params(self, *, key: Array) -> dict:
        """Fresh parameters: {input, body_*, dense, w_avg}."""
        heads = {"dense": _equal_dense_shapes(self.channels[-1], self.w_dim)}
        return _init_params(self, heads, key)

    def setup(self):
        self.params = module_params(self)

    def __call__(self, images: Array, *, train: bool = False) -> tuple[Array, dict]:
        """Pictures to codes [batch, w_dim] without the average, and `out`."""
        features, stats = _features(self, self.params, images, train)
        x = features[f"stage_{len(self.units) - 1}"].astype(jnp.float32)
        codes = equal_dense(self.params["dense"], jnp.mean(x, (1, 2)))
        return codes, _out(features, stats, train)


class BackboneWPlusEncoder(nn.Module):
    """pSp's naive W+ baseline: all rows from one linear layer on the last stage.

    Fields are those of `GradualStyleEncoder`, and:

    Attributes:
      pool: the last stage is averaged to pool × pool pixels.
    """

    num_styles: int = 18
    size: int = 256
    in_channels: int = 3
    units: tuple[int, ...] = (3, 4, 14, 3)
    channels: tuple[int, ...] = (64, 128, 256, 512)
    se_ratio: int = 16
    w_dim: int = 512
    pool: int = 7
    start_from_w_avg: bool = True
    blocks: str = "ir_se"
    rows: tuple[int, ...] = ()
    dtype: Any = "float32"

    def init_params(self, *, key: Array) -> dict:
        """Fresh parameters: {input, body_*, norm, hidden, dense, w_avg}.

        `hidden` reads the pooled map flattened in H, W, C order.
        """
        flat = self.pool**2 * self.channels[-1]
        heads = {
            "norm": norm_shapes(self.channels[-1]),
            "hidden": {
                "weight": Normal((flat, self.w_dim), (1 / (3 * flat)) ** 0.5),
                "bias": Full((self.w_dim,)),
            },
            "dense": _equal_dense_shapes(self.w_dim, self.w_dim * self.num_styles),
        }
        return _init_params(self, heads, key)

    def setup(self):
        self.params = module_params(self)

    def __call__(self, images: Array, *, train: bool = False) -> tuple[Array, dict]:
        """Pictures to codes [batch, num_styles, w_dim] without the average."""
        features, stats = _features(self, self.params, images, train)
        x = features[f"stage_{len(self.units) - 1}"].astype(jnp.float32)
        x, norm = batch_norm(self.params["norm"], x, train)
        stats["norm"] = norm
        x = adaptive_pool(x, self.pool).reshape(x.shape[0], -1)
        x = x @ self.params["hidden"]["weight"] + self.params["hidden"]["bias"]
        codes = equal_dense(self.params["dense"], x)
        codes = codes.reshape(-1, self.num_styles, self.w_dim)
        return codes, _out(features, stats, train)


def encode(encoder: nn.Module, params: Params, images: Array) -> Array:
    """Pictures [batch, size, size, in_channels] to w+ [batch, num_styles, w_dim].

    The average code is added where the encoder starts from it, and a single code is
    repeated to all rows.
    """
    codes, _ = encoder.apply({"params": params}, images)
    return full_codes(encoder, params, codes)


def full_codes(encoder: nn.Module, params: Params, codes: Array) -> Array:
    """What an encoder gives as codes [batch, num_styles, w_dim]; see `encode`."""
    if codes.ndim == 2:
        codes = jnp.repeat(codes[:, None], encoder.num_styles, 1)
    if encoder.start_from_w_avg:
        codes = codes + lax.stop_gradient(params["w_avg"])
    return codes


def refine(
    encoder: nn.Module,
    params: Params,
    generator: nn.Module,
    generator_params: Params,
    images: Array,
    steps: int = 5,
) -> Array:
    """ReStyle: codes improved step by step (Alaluf et al., section 3.1).

    From the average code on, the encoder sees the pictures and what the generator makes
    of the codes so far, and gives offsets for the codes.

    Args:
      encoder, params: with six input channels.
      generator, generator_params: with fixed noise.
      images: [batch, size, size, 3].
      steps: refinements.

    Returns:
      [batch, num_styles, w_dim].
    """
    codes = jnp.repeat(params["w_avg"][None], images.shape[0], 0)
    for step in range(steps):
        # The first picture is the same for all.
        variables, shown = {"params": generator_params}, codes if step else codes[:1]
        made, _ = generator.apply(variables, shown, space="w_plus")
        made = jnp.broadcast_to(adaptive_pool(made, encoder.size), images.shape)
        both = jnp.concatenate([images, made], -1)
        codes = codes + encoder.apply({"params": params}, both)[0]
    return codes


class LatentDiscriminator(nn.Module):
    """e4e's critic, which tells codes of the mapping network from encoded ones.

    Attributes:
      w_dim: width of a code and of the layers.
      depth: number of linear layers.
    """

    w_dim: int = 512
    depth: int = 4

    def init_params(self, *, key: Array) -> dict:
        """Fresh parameters: `dense_0` .. with `weight` [in, out] and `bias`."""
        widths = [self.w_dim] * self.depth + [1]
        shapes = {
            f"dense_{i}": {
                "weight": Normal((self.w_dim, width), (1 / (3 * self.w_dim)) ** 0.5),
                "bias": Full((width,)),
            }
            for i, width in enumerate(widths[1:])
        }
        return initialize(shapes, key=key)

    def setup(self):
        self.params = module_params(self)

    def __call__(self, codes: Array) -> Array:
        """Codes [batch, w_dim] to logits [batch, 1]."""
        x = codes
        for i in range(self.depth):
            if i:
                x = jax.nn.leaky_relu(x, 0.2)
            layer = self.params[f"dense_{i}"]
            x = x @ layer["weight"] + layer["bias"]
        return x
