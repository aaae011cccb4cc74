"""CLIP: pictures and sentences as vectors of one space.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
arXiv 2103.00020. Any two transformers of that form: OpenAI's ViT-B/32, B/16, L/14 and
L/14@336, LAION's, and others whose config Hugging Face's `CLIPConfig` describes.
`convert` reads their files; `jaxstyle.features.clip_text` turns words into tokens.

Pictures come in as everywhere, [batch, height, width, 3] in [-1, 1] and of any size;
`CLIP.prepare` makes of them what the vision tower was trained on.
"""

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from PIL import Image

from jaxstyle.errors import UserError
from jaxstyle.init import Full, Normal, initialize, module_params

# Mean and deviation of the colours in [0, 1] of the pictures CLIP learned from.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
# End of a sentence in CLIP's vocabulary, and its largest token.
END = 49407

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
Resize = Literal["antialias", "torch-1.7"]
Params = Mapping[str, Any]


class CLIP(nn.Module):
    """Both towers: `apply({"params": p}, images, method="embed")` gives vectors.

    Each method uses the parameters of its own tower only: with `{"vision": ...}` alone
    pictures can be embedded, and the text tower needs no device memory.

    Attributes:
      image_size: side of the pictures the vision tower takes.
      patch_size: side of the squares they are cut into.
      vision_width, vision_layers, vision_heads, vision_mlp: of the vision transformer.
      text_width, text_layers, text_heads, text_mlp: of the text transformer.
      vocab_size, context_length: tokens it knows, and most tokens of a sentence.
      embed_dim: of the common space.
      vision_activation, text_activation: a key of `ACTIVATIONS`; OpenAI's models have
        quick_gelu, LAION's gelu.
      vision_eps, text_eps: of the layer norms.
      mean, deviation: colours in [0, 1] are normalised with.
      end_token: the token whose state stands for the sentence; None: the largest.
      token_ids: for a table that knows a part of CLIP's vocabulary only, the token of
        each row, ascending; () for all.
      dtype: of the matrix products; norms, softmax and the stream between the layers
        are float32.
    """

    image_size: int = 224
    patch_size: int = 32
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    vision_mlp: int = 3072
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    text_mlp: int = 2048
    vocab_size: int = 49408
    context_length: int = 77
    embed_dim: int = 512
    vision_activation: str = "quick_gelu"
    text_activation: str = "quick_gelu"
    vision_eps: float = 1e-5
    text_eps: float = 1e-5
    mean: tuple[float, ...] = MEAN
    deviation: tuple[float, ...] = DEVIATION
    end_token: int | None = None
    token_ids: tuple[int, ...] = ()
    dtype: Any = "float32"

    def init_params(self, *, key: Array) -> dict:
        """Random towers, scaled as in the paper's code.

        Names: {vision: {patch, class_embedding, position_embedding, norm_in, layers,
        norm_out, projection}, text: {token_embedding, position_embedding, layers,
        norm_out, projection}, logit_scale}. `layers` holds all layers of a tower along
        a first axis.

        Raises:
          UserError: widths that the heads do not divide, an unknown activation.
        """
        self._check()
        v, t, patch = self.vision_width, self.text_width, self.patch_size
        places = (self.image_size // patch) ** 2 + 1
        vision = {
            "patch": {"weight": Normal((patch, patch, 3, v), (patch**2 * 3) ** -0.5)},
            "class_embedding": Normal((v,), v**-0.5),
            "position_embedding": Normal((places, v), v**-0.5),
            "norm_in": _norm_shapes(v),
            "layers": _layer_shapes(self.vision_layers, v, self.vision_mlp),
            "norm_out": _norm_shapes(v),
            "projection": {"weight": Normal((v, self.embed_dim), v**-0.5)},
        }
        text = {
            "token_embedding": Normal((self.vocab_size, t), 0.02),
            "position_embedding": Normal((self.context_length, t), 0.01),
            "layers": _layer_shapes(self.text_layers, t, self.text_mlp),
            "norm_out": _norm_shapes(t),
            "projection": {"weight": Normal((t, self.embed_dim), t**-0.5)},
        }
        scale = Full((), float(np.log(1 / 0.07)))
        shapes = {"vision": vision, "text": text, "logit_scale": scale}
        return initialize(shapes, key=key)

    def _check(self):
        for tower in ("vision", "text"):
            width, heads, activation = (
                getattr(self, f"{tower}_{name}")
                for name in ("width", "heads", "activation")
            )
            if heads < 1 or width % heads:
                raise UserError(
                    f"{tower}_heads is {heads}; it must divide {tower}_width {width}"
                )
            if activation not in ACTIVATIONS:
                raise UserError(
                    f"{tower}_activation is {activation!r}; known are "
                    f"{', '.join(ACTIVATIONS)}"
                )
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise UserError(
                f"image_size {self.image_size} is no multiple of patch_size "
                f"{self.patch_size}"
            )

    def setup(self):
        self.params = module_params(self)

    def prepare(self, images: Array, resize: Resize = "antialias") -> Array:
        """Generated pictures as the vision tower takes them, differentiably.

        Args:
          images: [batch, height, width, 3] in [-1, 1], not clipped.
          resize: see `resize_matrix`.

        Returns:
          The centre square, [batch, image_size, image_size, 3], normalised.
        """
        x = resized(images, self.image_size, resize)
        return ((x + 1) / 2 - jnp.array(self.mean)) / jnp.array(self.deviation)

    def prepare_photo(self, photo: Image.Image) -> np.ndarray:
        """A picture from a file [image_size, image_size, 3], normalised.

        As CLIP's own preparation: Pillow's bicubic reduction of 8-bit values.
        """
        size = self.image_size
        short = min(photo.size)
        shape = [size if n == short else size * n // short for n in photo.size]
        photo = photo.resize(shape, Image.Resampling.BICUBIC)
        left, top = (round((n - size) / 2) for n in shape)
        photo = photo.crop((left, top, left + size, top + size)).convert("RGB")
        x = np.asarray(photo, np.float32) / np.float32(255)
        x = (x - np.float32(self.mean)) / np.float32(self.deviation)
        return x

    def embed(
        self, images: Array, resize: Resize = "antialias", remat: bool = False
    ) -> Array:
        """Unit vectors [batch, embed_dim] of pictures in [-1, 1] of any size."""
        return normalise(self.encode_image(self.prepare(images, resize), remat))

    def embed_text(self, tokens: Array) -> Array:
        """Unit vectors [batch, embed_dim] of sentences."""
        return normalise(self.encode_text(tokens))

    def encode_image(self, pixels: Array, remat: bool = False) -> Array:
        """Vectors [batch, embed_dim] of what `prepare` gives; not normalised."""
        return self.image_features(pixels, remat)[0]

    def image_features(self, pixels: Array, remat: bool = False) -> tuple[Array, dict]:
        """As `encode_image`, and what is between.

        Args:
          pixels: [batch, image_size, image_size, 3], normalised.
          remat: compute the layers again in the backward pass, to save memory.

        Returns:
          Vectors [batch, embed_dim], and {`embedded`: [batch, places, width], `layers`:
          [layers, batch, places, width], `pooled`: [batch, width]}.

        Raises:
          UserError: pictures of another shape.
        """
        size, width, p = self.image_size, self.vision_width, self.params["vision"]
        if pixels.shape[1:] != (size, size, 3):
            raise UserError(
                f"pictures have shape {list(pixels.shape)}; this CLIP takes [batch, "
                f"{size}, {size}, 3]: bring them there with its `prepare`"
            )
        # A convolution whose steps are as wide as its kernel, as one product: the TPU
        # compiler's gradient of such a convolution takes longer than all layers.
        batch, side = pixels.shape[0], self.patch_size
        count = size // side
        cut = pixels.astype(self.dtype).reshape(batch, count, side, count, side, 3)
        patches = jnp.einsum(
            "bhpwqc,pqcv->bhwv",
            cut,
            p["patch"]["weight"].astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        first = jnp.broadcast_to(p["class_embedding"], (batch, 1, width))
        x = jnp.concatenate([first, patches.reshape(batch, -1, width)], 1)
        x = x + p["position_embedding"]
        embedded = _layer_norm(p["norm_in"], x, self.vision_eps)
        x, layers = _transformer(
            p["layers"],
            embedded,
            heads=self.vision_heads,
            activation=ACTIVATIONS[self.vision_activation],
            eps=self.vision_eps,
            causal=False,
            dtype=self.dtype,
            remat=remat,
        )
        pooled = _layer_norm(p["norm_out"], x[:, 0], self.vision_eps)
        out = {"embedded": embedded, "layers": layers, "pooled": pooled}
        return _project(p, pooled), out

    def encode_text(self, tokens: Array) -> Array:
        """Vectors [batch, embed_dim] of sentences; not normalised."""
        return self.text_features(tokens)[0]

    def text_features(self, tokens: Array) -> tuple[Array, dict]:
        """As `encode_text`, and what is between.

        Args:
          tokens: int [batch, length], length at most `context_length`, as
            `clip_text.tokenize` gives them; what follows the end token has no effect.

        Returns:
          As `image_features`, with length for places.

        Raises:
          UserError: longer sentences.
        """
        p, length = self.params["text"], tokens.shape[1]
        if length > self.context_length:
            raise UserError(
                f"sentences of {length} tokens; this CLIP reads at most "
                f"{self.context_length}: shorten them"
            )
        embedded = p["token_embedding"][tokens] + p["position_embedding"][:length]
        x, layers = _transformer(
            p["layers"],
            embedded,
            heads=self.text_heads,
            activation=ACTIVATIONS[self.text_activation],
            eps=self.text_eps,
            causal=True,
            dtype=self.dtype,
        )
        ends = tokens if self.end_token is None else tokens == self.end_token
        place = jnp.argmax(ends, axis=1)
        pooled = jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0]
        pooled = _layer_norm(p["norm_out"], pooled, self.text_eps)
        out = {"embedded": embedded, "layers": layers, "pooled": pooled}
        return _project(p, pooled), out

    def __call__(self, pixels: Array, tokens: Array) -> Array:
        """Similarity [pictures, sentences] times the model's own scale."""
        images = normalise(self.encode_image(pixels))
        texts = normalise(self.encode_text(tokens))
        product = jnp.matmul(images, texts.T, precision=lax.Precision.HIGHEST)
        return jnp.exp(self.params["logit_scale"]) * product


def normalise(x: Array, axis: int = -1) -> Array:
    """Vectors of length 1."""
    return x / jnp.linalg.norm(x, axis=axis, keepdims=True)


def resize_matrix(size: int, target: int, resize: Resize) -> np.ndarray:
    """The matrix [target, size] of a bicubic change of size along one axis.

    Two exist. `antialias` widens the kernel (Keys, a = -0.5) by the scale when it
    makes smaller, as Pillow, torchvision since 0.17 and `jax.image.resize` do.
    `torch-1.7` always weighs four neighbours (a = -0.75) and repeats those at the edge:
    what StyleGAN-NADA's published models were trained with.
    """
    scale = size / target
    centers = (np.arange(target) + 0.5) * scale
    if resize == "antialias":
        distance = np.arange(size) + 0.5 - centers[:, None]
        weights = _keys(distance / max(scale, 1.0), -0.5)
        return weights / weights.sum(1, keepdims=True)
    if resize != "torch-1.7":
        raise UserError(f"resize is {resize!r}; it must be antialias or torch-1.7")
    first = np.floor(centers - 0.5).astype(int) - 1
    matrix = np.zeros((target, size))
    for tap in range(4):
        weight = _keys(centers - 0.5 - (first + tap), -0.75)
        column = np.clip(first + tap, 0, size - 1)
        np.add.at(matrix, (np.arange(target), column), weight)
    return matrix


def _keys(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (IEEE ASSP 29, 1981, eq. 4)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resized(images: Array, size: int, resize: Resize = "antialias") -> Array:
    """The centre square of pictures whose shorter side is brought to `size`.

    Args:
      images: [batch, height, width, channels].
      size: of the result, [batch, size, size, channels] float32.
      resize: see `resize_matrix`.
    """
    height, width = images.shape[1:3]
    short = min(height, width)

    def matrix(n):
        target = size if n == short else size * n // short
        start = round((target - size) / 2)
        return resize_matrix(n, target, resize)[start : start + size]

    return _along_both(images, matrix(height), matrix(width))


def mapper_view(images: Array) -> Array:
    """StyleCLIP's preparation for its latent mapper: [batch, 224, 224, channels].

    Every pixel is repeated 7 x 7 times, then squares of size/32 are averaged. Colours
    stay in [-1, 1]: its CLIP sees them without normalisation.

    Raises:
      UserError: pictures that are not square, or whose side is no multiple of 32.
    """
    size = images.shape[1]
    if images.shape[2] != size or size % 32:
        raise UserError(
            f"pictures have shape {list(images.shape)}; the mapper's CLIP takes "
            "squares whose side is a multiple of 32"
        )
    block = size // 32
    matrix = np.zeros((224, size))
    np.add.at(matrix, (np.arange(7 * size) // block, np.arange(7 * size) // 7), 1)
    return _along_both(images, matrix / block, matrix / block)


def _along_both(images: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    # Two matrix products, in float32 whatever the default of the device: bfloat16
    # would round the pictures themselves.
    return jnp.einsum(
        "bhwc,ph,qw->bpqc",
        images.astype(jnp.float32),
        rows.astype(np.float32),
        columns.astype(np.float32),
        precision=lax.Precision.HIGHEST,
    )


def _norm_shapes(width: int) -> dict:
    return {"scale": Full((width,), 1.0), "bias": Full((width,))}


def _layer_shapes(layers: int, width: int, mlp: int) -> dict:
    """Parameters of all layers of a tower, along a first axis."""

    def dense(wide_in, wide_out, scale):
        weight = Normal((layers, wide_in, wide_out), scale)
        return {"weight": weight, "bias": Full((layers, wide_out))}

    def norm():
        return {"scale": Full((layers, width), 1.0), "bias": Full((layers, width))}

    inner = width**-0.5
    outer = inner * (2 * max(layers, 1)) ** -0.5
    return {
        "norm_1": norm(),
        "query": dense(width, width, inner),
        "key": dense(width, width, inner),
        "value": dense(width, width, inner),
        "out": dense(width, width, outer),
        "norm_2": norm(),
        "mlp_in": dense(width, mlp, (2 * width) ** -0.5),
        "mlp_out": dense(mlp, width, outer),
    }


def _layer_norm(params: Params, x: Array, eps: float) -> Array:
    mean = jnp.mean(x, -1, keepdims=True)
    x = x - mean
    variance = jnp.mean(jnp.square(x), -1, keepdims=True)
    return x * lax.rsqrt(variance + eps) * params["scale"] + params["bias"]


def _dense(params: Params, x: Array, dtype: Any) -> Array:
    weight = params["weight"].astype(dtype)
    product = jnp.matmul(x.astype(dtype), weight, preferred_element_type=jnp.float32)
    return product + params["bias"]


def _project(params: Params, pooled: Array) -> Array:
    # Always exact: losses take differences of these.
    weight = params["projection"]["weight"]
    return jnp.matmul(pooled, weight, precision=lax.Precision.HIGHEST)


def _transformer(
    params: Params,
    x: Array,
    *,
    heads: int,
    activation: Any,
    eps: float,
    causal: bool,
    dtype: Any,
    remat: bool = False,
) -> tuple[Array, Array]:
    """The stream [batch, places, width] after all layers, and after each one."""

    def layer(x, p):
        h = _layer_norm(p["norm_1"], x, eps)
        query, key, value = (
            _dense(p[name], h, dtype).reshape(*x.shape[:2], heads, -1).astype(dtype)
            for name in ("query", "key", "value")
        )
        h = jax.nn.dot_product_attention(query, key, value, is_causal=causal)
        x = x + _dense(p["out"], h.reshape(x.shape), dtype)
        h = activation(_dense(p["mlp_in"], _layer_norm(p["norm_2"], x, eps), dtype))
        x = x + _dense(p["mlp_out"], h, dtype)
        return x, x

    # One layer is compiled, not a dozen.
    return lax.scan(jax.checkpoint(layer) if remat else layer, x, params)
