"""The losses of StyleGAN-NADA (Gal et al., arXiv 2108.00946), as pure functions.

Pictures of the frozen generator (`source`) and of the one that learns (`target`) come
from the same codes. CLIP embeds both; `anchors` holds what does not change in a run:

| key            | shape              | what                                          |
| -------------- | ------------------ | --------------------------------------------- |
| `direction`    | [1, embed_dim]     | from source to target class, of length 1      |
| `target`       | [1, embed_dim]     | "a {target}", or the mean picture of the      |
|                |                    | target, of length 1                           |
| `class`        | [1, embed_dim]     | "{target}", of length 1: for the layer choice |
| `angle`        | []                 | cosine of source and target class             |
| `parts`        | [15, embed_dim]    | a direction a part, of length 1               |
| `part_source`, | [15, embed_dim]    | each part's sentence, as it comes             |
| `part_target`  |                    |                                               |

The text's embeddings are averages over templates, see `train.nada_text`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxstyle.errors import UserError
from jaxstyle.features.clip import normalise
from jaxstyle.features.clip_text import Judge
from train.nada_text import PARTS, filled, needed, templates_of

# Side of the patches of both patch losses, and how many of a picture the second takes.
PATCH, SMALL_PATCH, SMALL_PATCHES = 510, 196, 4
# Directions shorter than this count less: two equal pictures have none.
SHORTEST = 1e-4
# Crops of a picture, and the smallest's share of its side.
CROPS, SMALLEST_CROP = 4, 0.25
Anchors = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Terms:
    """Weights of the losses; the paper uses the first alone."""

    lambda_direction: float = 1.0
    """Weight of the directional loss, the paper's."""
    lambda_global: float = 0.0
    """Weight of the global loss: pictures look like "a {target}" (the paper's baseline,
    which loses diversity), or without a text like the mean of --ref."""
    lambda_manifold: float = 0.0
    """Weight of the angle between a picture before and after, held to that of the
    texts."""
    lambda_patch: float = 0.0
    """Weight of the directional loss on patches of 510 px and parts of animals; from
    512 px on."""
    lambda_crop: float = 0.0
    """Weight of the directional and the global loss, by their own weights, on four
    random squares of each picture, so that every place changes; of any size."""


def anchors(
    judge: Judge,
    source: str,
    target: str,
    parts: bool = False,
    templates: Sequence[str] = (),
) -> dict:
    """What a run compares with, from the text.

    Args:
      judge: a CLIP model.
      source, target: classes.
      parts: those of the patch losses too.
      templates: see `train.nada_text.templates_of`.
    """
    templates = templates_of(judge, templates)
    texts = needed(source, target, parts, templates)
    known = dict(zip(texts, judge.encode_texts(texts), strict=True))

    def embeddings(texts):
        return jnp.stack([known[text] for text in texts])

    def in_templates(name):
        return normalise(embeddings(filled(name, templates)))

    before, after = in_templates(source), in_templates(target)
    single = normalise(embeddings([f"a {target}", target]))
    ends = normalise(jnp.mean(before, 0)), normalise(jnp.mean(after, 0))
    found = {
        "direction": direction(before, after),
        "target": single[:1],
        "class": single[1:],
        "angle": _product(*ends),
    }
    if parts:
        names = filled(source, PARTS), filled(target, PARTS)
        found["parts"] = jnp.concatenate(
            [
                direction(in_templates(a), in_templates(b))
                for a, b in zip(*names, strict=True)
            ]
        )
        found["part_source"], found["part_target"] = map(embeddings, names)
    return found


def direction(before: Array, after: Array) -> Array:
    """From the mean of some unit vectors to that of others, [1, embed_dim], length 1.

    For texts both have a row a template; for pictures (paper, section 4.6) the rows
    before are of generated ones and those after of the references.
    """
    step = jnp.mean(after, 0, keepdims=True) - jnp.mean(before, 0, keepdims=True)
    return normalise(step)


def edit_direction(source: Array, target: Array) -> Array:
    """Where each picture moved, [batch, embed_dim].

    Of length 1 but where the pictures are equal: there it is 0, with a gradient, so
    that training starts.
    """
    step = target - source
    squares = jnp.sum(jnp.square(step), -1, keepdims=True)
    return step * lax.rsqrt(squares + SHORTEST**2)


def directional(
    source: Array,
    target: Array,
    wanted: Array,
    kind: Literal["cosine", "mse", "mae"] = "cosine",
) -> Array:
    """The directional loss (eq. 3): pictures move as the text does.

    Args:
      source, target: embeddings [batch, embed_dim] of length 1.
      wanted: direction [1, embed_dim].
      kind: 1 - cosine as published, or a distance of the directions.

    Returns:
      The mean over the batch.
    """
    moved = edit_direction(source, target)
    if kind == "cosine":
        return jnp.mean(1 - _product(moved, wanted))
    if kind == "mse":
        return jnp.mean(jnp.square(moved - wanted))
    return jnp.mean(jnp.abs(moved - wanted))


def to_text(target: Array, wanted: Array) -> Array:
    """The global loss (eq. 1): pictures are near a text, both of length 1.

    The published code divides its logits by 100, the scale of OpenAI's models.
    """
    return jnp.mean(1 - _product(target, wanted))


def manifold(source: Array, target: Array, angle: Array) -> Array:
    """Pictures move as far as the text: distance of the cosines.

    Args:
      source, target: embeddings [batch, embed_dim] of length 1.
      angle: cosine of the two classes' texts.
    """
    cosine = jnp.clip(_product(source, target), -1, 1)
    return jnp.mean(jnp.abs(cosine - angle))


def patch_centers(key: Array, shape: tuple[int, ...], count: int, size: int) -> Array:
    """Where patches lie: (x, y) [batch * count, 2], a picture's in a row.

    Args:
      key: random key.
      shape: of the pictures [batch, height, width, channels].
      count: patches of each picture.
      size: of a patch.

    Raises:
      UserError: pictures too small for the patches.
    """
    batch, height, width = shape[:3]
    if min(height, width) <= size:
        raise UserError(
            f"pictures have {width} x {height} pixels; the patch loss cuts squares of "
            f"{size} out of them: leave --lambda-patch 0 below {size + 2} px"
        )
    half = size // 2
    high = jnp.array([width, height]) - half
    return jax.random.randint(key, (batch * count, 2), half, high)


def patches(images: Array, centers: Array, size: int) -> Array:
    """Squares [len(centers), size, size, channels] cut out of pictures.

    Args:
      images: [batch, height, width, channels].
      centers: (x, y) of each patch, a picture's in a row.
      size: side.
    """
    images = jnp.repeat(images, len(centers) // len(images), 0)

    def cut(image, center):
        place = center[1] - size // 2, center[0] - size // 2, 0
        return lax.dynamic_slice(image, place, (size, size, image.shape[-1]))

    return jax.vmap(cut)(images, centers)


def patch_directional(source: Array, target: Array, parts: Array) -> Array:
    """The directional loss on patches, each part by how well its direction fits.

    Args:
      source, target: embeddings [patches, embed_dim] of the same places, of length 1.
      parts: directions [parts, embed_dim].
    """
    fit = _product_all(edit_direction(source, target), parts)
    return jnp.mean((1 - fit) * jax.nn.softmax(fit, -1))


def crop_boxes(key: Array, count: int) -> Array:
    """Random squares within a picture, (top, left, side) as shares of it: [count, 3].

    All scales from `SMALLEST_CROP` to 1 are as likely.
    """
    scale, top, left = jax.random.uniform(key, (3, count))
    side = SMALLEST_CROP**scale
    return jnp.stack([top * (1 - side), left * (1 - side), side], -1)


def crops(images: Array, boxes: Array, size: int) -> Array:
    """Squares of pictures, resized as CLIPstyler's (Kwon & Ye, arXiv 2112.00374).

    Its `L_patch` has crops of one size, turned in perspective; these have many.

    Args:
      images: [batch, height, width, channels].
      boxes: (top, left, side) as shares [batch * n, 3], a picture's in a row.
      size: side of the results.

    Returns:
      [batch * n, size, size, channels], bilinear.
    """
    images = jnp.repeat(images, len(boxes) // len(images), 0)

    def cut(image, box):
        sides = jnp.array(image.shape[:2], box.dtype)
        scale = size / (box[2] * sides)
        shift = -box[:2] * sides * scale
        return jax.image.scale_and_translate(
            image, (size, size, image.shape[-1]), (0, 1), scale, shift, "linear"
        )

    return jax.vmap(cut)(images, boxes)


def patch_similarity(
    source: Array, target: Array, part_source: Array, part_target: Array
) -> Array:
    """How alike patches are to the parts' texts, before and after: mean distance.

    The published code defines it and never uses it.

    Args:
      source, target: embeddings [patches, embed_dim] of length 1.
      part_source, part_target: embeddings [parts, embed_dim], as they come.
    """
    before = _product_all(source, part_source)
    return jnp.mean(jnp.abs(before - _product_all(target, part_target)))


def loss(
    embed: Callable[[Array], Array],
    given: Anchors,
    terms: Terms,
    source: Array,
    target: Array,
    *,
    key: Array | None = None,
    centers: Array | None = None,
    size: int | None = None,
) -> tuple[Array, dict[str, Any]]:
    """The weighted sum for one CLIP model.

    Args:
      embed: pictures to unit vectors.
      given: of `anchors`.
      terms: weights.
      source: pictures [batch, height, width, 3] of the frozen generator.
      target: those of the one that learns.
      key: draws the places of patches and crops.
      centers: those of patches themselves.
      size: side of the crops; None: that of the pictures.

    Returns:
      The loss, and its terms by name, without weights.
    """
    found = {}
    after = embed(target)
    before = None
    if terms.lambda_direction or terms.lambda_manifold:
        before = lax.stop_gradient(embed(source))
    if terms.lambda_direction:
        found["direction"] = directional(before, after, given["direction"])
    if terms.lambda_global:
        found["global"] = to_text(after, given["target"])
    if terms.lambda_manifold:
        found["manifold"] = manifold(before, after, given["angle"])
    if terms.lambda_patch:
        if centers is None:
            centers = patch_centers(key, target.shape, 1, PATCH)
        cut = [embed(patches(x, centers, PATCH)) for x in (source, target)]
        cut[0] = lax.stop_gradient(cut[0])
        found["patch"] = patch_directional(*cut, given["parts"])
    if terms.lambda_crop:
        boxes = crop_boxes(jax.random.fold_in(key, 1), CROPS * len(target))
        cut = [embed(crops(x, boxes, size or x.shape[1])) for x in (source, target)]
        found["crop"] = jnp.zeros(())
        if terms.lambda_direction:
            move = directional(lax.stop_gradient(cut[0]), cut[1], given["direction"])
            found["crop"] += terms.lambda_direction * move
        if terms.lambda_global:
            found["crop"] += terms.lambda_global * to_text(cut[1], given["target"])
    total = sum(getattr(terms, f"lambda_{name}") * x for name, x in found.items())
    return total, found


def _product(a: Array, b: Array) -> Array:
    """Inner products of rows; losses are differences of these, so always exact."""
    return jnp.sum(a * b, -1)


def _product_all(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST)
