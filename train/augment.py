"""Adaptive augmentation of what a discriminator sees (ADA).

Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data" (arXiv
2006.06676): each transform below is applied to a picture with probability p, to real
ones and to generated ones alike, and p follows how sure the discriminator is of real
pictures (section 3, appendix B). Geometry and colour, the two groups of the
common PyTorch version that DualStyleGAN finetunes with; no filtering, no cutout.

`VARIANTS` differ in the geometry: `published` is that PyTorch version as DualStyleGAN
has it, where translations are of at most an eighth of a *pixel* (and a normal draw of
that deviation, equal for both axes) and quarter turns are switched off; `paper` moves
by fractions of the size and turns by 0 to 3 quarters.

The PyTorch version pads as far as the transforms of the batch at hand need. Here the
margin is fixed, so that one compilation serves all; what a transform fetches from
beyond it is mirrored once more.

A scheme nests `AugmentOptions` in its own, keeps `start_extra` in its state, passes
pictures through `shown` on their way to the discriminator, and after its update calls
`learned` with what that said of real ones.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax import Array, lax

from jaxstyle.errors import UserError
from pallas_ops.adjoint import linear_pair

VARIANTS = ("published", "paper")
TARGET, LENGTH, EVERY = 0.6, 500_000, 8
# The low-pass of the wavelet sym6: up by 2 and down again with it changes nothing.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
TAPS = len(SYM6)
# Pixels of the picture's surroundings that the filter on the way down sees.
EDGE = TAPS // 4


@dataclasses.dataclass(frozen=True)
class AugmentOptions:
    """Augmentation, and what controls it."""

    augment: bool = False
    """Show the discriminator transformed pictures (ADA), for small data sets."""
    augment_p: float = 0.0
    """A fixed probability of each transform; 0: adaptive, from 0 on."""
    ada_target: float = TARGET
    """Mean sign of the discriminator on real pictures above which p rises."""
    ada_length: int = LENGTH
    """Pictures in which p goes from 0 to 1."""
    ada_every: int = EVERY
    """Iterations between changes of p. The published code takes 8 whatever its flag
    of this name says."""
    augment_geometry: Literal[VARIANTS] = VARIANTS[0]
    """Translations of an eighth of a pixel and no quarter turns, as the published
    code has it; or an eighth of the picture, and turns."""


Augmenting = Annotated[AugmentOptions, tyro.conf.OmitArgPrefixes]

# Transforms, drawn for one picture; vmap draws a batch


def _move(x: Array, y: Array) -> Array:
    return jnp.eye(3).at[:2, 2].set(jnp.stack([x, y]))


def _scale(x: Array, y: Array) -> Array:
    return jnp.diag(jnp.stack([x, y, jnp.ones_like(x)]))


def _turn(angle: Array) -> Array:
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.eye(3).at[:2, :2].set(jnp.array([[cos, -sin], [sin, cos]]))


def draw_affine(key: Array, p: Array, size: int, variant: str = "published") -> Array:
    """Where each pixel of the new picture lies in the old one: [3, 3].

    In pixels from the centre. Composed of the inverses of the transforms, each of which
    happens with probability `p`.

    Args:
      key: of the picture.
      p: probability, [].
      size: of the picture.
      variant: one of `VARIANTS`.

    Raises:
      UserError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise UserError(f"variant is {variant!r}; it must be {' or '.join(VARIANTS)}")
    paper = variant == "paper"
    keys = iter(jax.random.split(key, 32))
    inverse = jnp.eye(3)

    def normal(deviation):
        return deviation * jax.random.normal(next(keys))

    def uniform(high):
        return jax.random.uniform(next(keys), minval=-high, maxval=high)

    def add(step, probability=p):
        nonlocal inverse
        happens = jax.random.bernoulli(next(keys), probability)
        inverse = inverse @ jnp.where(happens, step, jnp.eye(3))

    one = jnp.ones(())
    add(_scale(jnp.where(jax.random.bernoulli(next(keys)), -one, one), one))
    if paper:
        add(_turn(jax.random.randint(next(keys), (), 0, 4) * (math.pi / 2)))
        add(_move(*(-jnp.round(uniform(0.125) * size) for _ in range(2))))
    else:
        add(_move(*(-jnp.round(t * size) / size for t in [uniform(0.125)] * 2)))
    factor = jnp.exp(-normal(0.2 * math.log(2)))
    add(_scale(factor, factor))
    # Both turns together happen with probability p.
    turning = 1 - jnp.sqrt(1 - p)
    add(_turn(uniform(math.pi)), turning)
    factor = jnp.exp(-normal(0.2 * math.log(2)))
    add(_scale(factor, 1 / factor))
    add(_turn(uniform(math.pi)), turning)
    if paper:
        add(_move(*(-normal(0.125) * size for _ in range(2))))
    else:
        add(_move(*[-normal(0.125)] * 2))
    return inverse


def draw_color(key: Array, p: Array) -> Array:
    """How colours in [-1, 1] change, a map of [r, g, b, 1]: [4, 4].

    Brightness, contrast, luma flip, hue, saturation, each with probability `p`.
    """
    keys = iter(jax.random.split(key, 16))
    color, eye = jnp.eye(4), jnp.eye(4)
    axis = jnp.array([1.0, 1.0, 1.0, 0.0]) / math.sqrt(3)
    gray = jnp.outer(axis, axis)

    def normal(deviation):
        return deviation * jax.random.normal(next(keys))

    def add(step):
        nonlocal color
        happens = jax.random.bernoulli(next(keys), p)
        color = jnp.where(happens, step, eye) @ color

    add(eye.at[:3, 3].set(normal(0.2)))
    add(jnp.diag(jnp.append(jnp.full(3, jnp.exp(normal(0.5 * math.log(2)))), 1.0)))
    add(eye - 2 * gray * jax.random.bernoulli(next(keys)))
    angle = jax.random.uniform(next(keys), minval=-math.pi, maxval=math.pi)
    cross = jnp.cross(jnp.eye(3), axis[:3]).T
    turn = jnp.cos(angle) * jnp.eye(3) + jnp.sin(angle) * cross
    add(eye.at[:3, :3].set(turn + (1 - jnp.cos(angle)) * gray[:3, :3]))
    add(gray + (eye - gray) * jnp.exp(normal(math.log(2))))
    return color


# Application


def _finer(x: Array, axis: int) -> Array:
    """Twice the samples along an axis, by the filter; there are zeros beyond."""
    pads, size = [(0, 0)] * x.ndim, x.shape[axis]
    pads[axis] = (TAPS // 4, TAPS // 4)
    padded = jnp.pad(x, pads)

    def every_other(first):
        taps = SYM6[::-1][first::2]
        places = range(first, first + len(taps))
        parts = (lax.slice_in_dim(padded, i, i + size, axis=axis) for i in places)
        return sum(tap * part for tap, part in zip(taps, parts, strict=True))

    both = jnp.stack([every_other(0), every_other(1)], axis + 1)
    return both.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])


def _coarser(x: Array, axis: int) -> Array:
    """Every other sample along an axis, filtered: the transpose of `_finer`."""
    pads, size = [(0, 0)] * x.ndim, x.shape[axis]
    pads[axis] = (TAPS // 2 - 1, TAPS // 2)
    padded = jnp.pad(x, pads)
    parts = (lax.slice_in_dim(padded, i, i + size, 2, axis) for i in range(TAPS))
    return sum(tap * part for tap, part in zip(SYM6, parts, strict=True))


# Up and down along an axis, each the other's gradient.
UP_DOWN = {
    axis: linear_pair(partial(_finer, axis=axis), partial(_coarser, axis=axis))
    for axis in (1, 2)
}


def _mirrored(at: Array, size: int) -> Array:
    """Coordinates folded into [0, size - 1] as by mirrors at both ends."""
    period = 2 * (size - 1)
    rest = jnp.mod(at, period)
    return jnp.minimum(rest, period - rest)


def _bilinear(image: Array, x: Array, y: Array) -> Array:
    """Values of a picture [height, width, c] at pixel coordinates [h, w]."""
    height, width, channels = image.shape
    x, y = _mirrored(x, width), _mirrored(y, height)
    left = jnp.clip(jnp.floor(x), 0, width - 2)
    top = jnp.clip(jnp.floor(y), 0, height - 2)
    right_share, lower_share = (x - left)[..., None], (y - top)[..., None]
    flat = image.reshape(-1, channels)
    first = top.astype(jnp.int32) * width + left.astype(jnp.int32)
    upper, lower = (
        flat[first + row] * (1 - right_share) + flat[first + row + 1] * right_share
        for row in (0, width)
    )
    return upper * (1 - lower_share) + lower * lower_share


def apply_affine(images: Array, inverse: Array, *, margin: int | None = None) -> Array:
    """Pictures transformed in twice their resolution.

    Args:
      images: [batch, size, size, channels].
      inverse: of each picture, see `draw_affine`: [batch, 3, 3].
      margin: pixels mirrored around the picture before it is filtered, at most size -
        1; None: the most at up to 256 px, half the size above, where memory counts.
    """
    batch, size = images.shape[:2]
    if margin is None:
        margin = size - 1 if size <= 256 else size // 2
    if not EDGE <= margin < size:
        raise UserError(f"margin is {margin}; it must be {EDGE} to {size - 1}")
    ends = (margin, margin)
    x = jnp.pad(images, ((0, 0), ends, ends, (0, 0)), mode="reflect")
    for axis in (2, 1):
        up, _ = UP_DOWN[axis]
        x = up(x)
    # Centres of the new pixels, those of the surroundings included, from the middle.
    count = 2 * (size + 2 * EDGE)
    place = jnp.arange(count) + 0.5 - count / 2
    column, row = jnp.meshgrid(place, place)
    # The two resolutions' pixels lie half a fine pixel apart.
    grid = jnp.stack([(column + 0.5) / 2, (row + 0.5) / 2, jnp.ones_like(row)])
    moved = jnp.einsum(
        "bij,jhw->bihw", inverse[:, :2], grid, precision=lax.Precision.HIGHEST
    )
    moved = 2 * moved - 0.5 + x.shape[1] / 2 - 0.5
    x = jax.vmap(_bilinear)(x, moved[:, 0], moved[:, 1])
    for axis in (2, 1):
        _, down = UP_DOWN[axis]
        x = down(x)
    return x[:, EDGE:-EDGE, EDGE:-EDGE]


def apply_color(images: Array, color: Array) -> Array:
    """Pictures [batch, h, w, 3] with their colours mapped by [batch, 4, 4]."""
    mapped = jnp.einsum(
        "bhwi,boi->bhwo", images, color[:, :3, :3], precision=lax.Precision.HIGHEST
    )
    return mapped + color[:, None, None, :3, 3]


def augment(
    images: Array,
    p: Array,
    *,
    keys: Array,
    variant: str = "published",
    margin: int | None = None,
) -> Array:
    """Pictures as the discriminator is to see them.

    Args:
      images: [batch, size, size, 3].
      p: probability of each transform, [].
      keys: one a picture, [batch]; see `train.sharding.sample_keys`.
      variant: one of `VARIANTS`.
      margin: see `apply_affine`.
    """
    size = images.shape[1]

    def draw(key):
        geometry, color = jax.random.split(key)
        return draw_affine(geometry, p, size, variant), draw_color(color, p)

    inverse, color = jax.vmap(draw)(keys)
    return apply_color(apply_affine(images, inverse, margin=margin), color)


# Control


class Control(NamedTuple):
    """State of the controller, in the `extra` of a training state.

    Attributes:
      p: probability of each transform, [].
      signs: sum of the signs of D on real pictures since p was changed last, [].
      seen: their number, [].
      calls: batches since then, int32 [].
    """

    p: Array
    signs: Array
    seen: Array
    calls: Array


def start_control(p: float = 0.0) -> Control:
    """A controller that has seen nothing."""
    zero = jnp.zeros(())
    return Control(jnp.asarray(p, jnp.float32), zero, zero, jnp.zeros((), jnp.int32))


def control(
    state: Control,
    logits: Array,
    *,
    target: float = TARGET,
    length: int = LENGTH,
    every: int = EVERY,
) -> Control:
    """Learn from the discriminator's logits [batch, 1] of real pictures.

    Every so many calls p rises if the mean sign is above the target, and falls if not,
    by the number of pictures seen over `length`: from 0 to 1 in that many pictures.
    """
    signs = state.signs + jnp.sum(jnp.sign(logits))
    seen = state.seen + logits.shape[0]
    calls = state.calls + 1
    step = jnp.where(signs / seen > target, 1.0, -1.0) * seen / length
    done = calls % every == 0
    fresh = Control(jnp.clip(state.p + step, 0, 1), 0.0 * signs, 0.0 * seen, 0 * calls)
    kept = Control(state.p, signs, seen, calls)
    return jax.tree.map(lambda a, b: jnp.where(done, a, b), fresh, kept)


# In a scheme


def check(options: AugmentOptions) -> None:
    """Refuse values that cannot be.

    Raises:
      UserError: naming the option.
    """
    if not 0 <= options.augment_p <= 1:
        raise UserError(f"--augment-p is {options.augment_p}; it must be 0 to 1")
    if options.augment_p and not options.augment:
        raise UserError("--augment-p is given without --augment; give both")
    for name in ("ada_length", "ada_every"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {getattr(options, name)}; it must be above 0")


def start_extra(options: AugmentOptions) -> dict[str, Control]:
    """What a training state carries in `extra`: the controller, if there is one."""
    return {"ada": start_control(options.augment_p)} if options.augment else {}


def shown(
    options: AugmentOptions, extra: Mapping[str, Any], images: Array, keys: Array
) -> Array:
    """Pictures [batch, size, size, 3] as the discriminator sees them.

    Args:
      options: without `augment` the pictures come back as they are.
      extra: of the training state.
      images: pictures.
      keys: one a picture, [batch].
    """
    if not options.augment:
        return images
    variant = options.augment_geometry
    return augment(images, extra["ada"].p, keys=keys, variant=variant)


def learned(
    options: AugmentOptions, extra: Mapping[str, Any], logits: Array
) -> tuple[dict[str, Any], dict[str, Array]]:
    """`extra` after the discriminator said [batch, 1] of real pictures; metrics."""
    if not options.augment or options.augment_p:
        return dict(extra), {}
    state = control(
        extra["ada"],
        logits,
        target=options.ada_target,
        length=options.ada_length,
        every=options.ada_every,
    )
    metrics = {"ada_p": state.p, "ada_sign": jnp.mean(jnp.sign(logits))}
    return {**extra, "ada": state}, metrics
