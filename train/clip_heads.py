"""A small CLIP of drawn heads, so that StyleGAN-NADA runs without anybody's weights.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
arXiv 2103.00020, on the pictures of `train.heads`, whose parameters give the captions:
"a pencil drawing of an old man with short grey hair and a beard".

1. Both towers and the tokenizer are those of `jaxstyle.features.clip`; the table of
   tokens has the words of these captions alone, so any other word is refused.
2. s_ij = exp(t) cos(E(x_i), T(c_j)). The loss is the mean of the cross entropies of the
   rows and of the columns of s (figure 3). As the parameters tell which captions are
   true of which pictures, all true ones of the batch share the probability (as in
   Yang et al., "Unified Contrastive Learning in Image-Text-Label Space", arXiv
   2204.03610, eq. 3), not the picture's own alone.

    python -m train.heads heads --n 1500 --seed 2 --size 64 --format npy \\
        --styles photo,cel,duotone,pencil,paint
    python -m train.clip_heads --data heads --out runs/plain
    python -m train.clip_heads --data heads --out runs/clip --weights runs/plain \\
        --adversary 3
    python -m train.nada --clip runs/clip/model --source "a photo" --target "a cartoon"

Pictures are moved, mirrored, blurred and given noise. That does not keep a generator
which follows this CLIP from pleasing it by changes that nobody would call a drawing:
`--adversary` trains on pictures that are changed so as to deceive it (Madry et al.,
arXiv 1706.06083), after which its gradients point to what a person sees (Santurkar et
al., arXiv 1906.09453). `--mix` adds pictures between styles, of which captions are
true in part, so that what is left of the photo counts against the drawing; `--turn`
turns hues, so that no tint is a style; `--crop` shows places of a picture, as the crops
of `train.nada` do, so that hair and background have a style too. `--weights clip_heads`
goes on from the model in the package.

OUT/model holds the towers in half precision. In metrics.jsonl: `style`, the share of
held-out pictures whose style is named rightly among five; `words`, the same for age,
hair and so on; `retrieval`, how often the nearest of all held-out captions is true,
beside `retrieval_chance`. Words that it has not learned (`named_rightly` too seldom)
are left out of OUT/model.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from PIL import Image, ImageFilter

from jaxstyle import images, weights
from jaxstyle.errors import UserError, cli
from jaxstyle.features import clip_text
from jaxstyle.features.clip import CLIP, normalise
from train import data, loop, optim, sharding
from train.cli import RunOptions, Shared, parse, start, with_out
from train.heads_params import HAIR
from train.heads_render import LABELS
from train.state import TrainState, create_state

# What captions say of a head, and in which words.
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "style": {
        "photo": ("photo", "photograph"),
        "cel": ("cartoon", "cel shaded cartoon"),
        "duotone": ("poster", "print"),
        "pencil": ("pencil drawing", "sketch", "pencil sketch"),
        "paint": ("painting", "oil painting"),
    },
    "sex": {"man": ("man",), "woman": ("woman",)},
    "age": {"young": ("young",), "old": ("old",)},
    "hair": {
        "black": ("black",),
        "brown": ("brown",),
        "blond": ("blond", "blonde"),
        "red": ("red",),
        "grey": ("grey", "gray"),
    },
    "length": {"short": ("short",), "long": ("long",), "none": ("bald",)},
    "beard": {"beard": ("a beard",), "none": ("no beard",)},
    "mood": {"smiling": ("smiling",), "frowning": ("sad",)},
    "skin": {"dark": ("dark skin",), "pale": ("pale skin",)},
}
ANYBODY = ("person", "face", "head")
# Parts of a head that --mix takes from one style or the other.
GROUPS = (
    ("background",),
    ("skin", "ears", "neck"),
    ("eyes", "brows", "lips", "mouth"),
    ("hair", "beard"),
    ("clothes",),
)
VALUES = {name: tuple(values) for name, values in WORDS.items()}
# Where train.nada puts the names of styles.
TEMPLATES = (
    "{}",
    "{} of a person",
    "{} of a face",
    "{} of a man",
    "{} of a woman",
    "{} of a young man",
    "{} of a young woman",
    "{} of an old man",
    "{} of an old woman",
    "{} of a smiling woman",
    "{} of a man with a beard",
    "{} of a woman with long hair",
    "{} of a bald man",
    "{} of a person with dark skin",
    "{} of a person with pale skin",
    "{} of a man with short black hair",
    "{} of a woman with long blond hair",
)
CONTEXT = 22


@dataclasses.dataclass(frozen=True)
class Options:
    """A small CLIP of drawn heads."""

    data: tuple[Path, ...]
    """Folders that `train.heads` wrote with --format npy, in any styles."""
    weights: str = ""
    """A run of this scheme, or a model that one has written (clip_heads ships), of the
    same sizes, to go on from; empty: random towers."""
    run: Shared = RunOptions(
        steps=2000, batch=64, log_every=20, sample_every=0, save_every=100
    )
    held_out: int = 100
    """Heads at the end of each folder that are only measured on."""
    size: int = 64
    """Pixels a side that the vision tower takes."""
    patch: int = 8
    """Pixels a side of its patches."""
    width: int = 96
    """Width of both towers and of the common space."""
    vision_layers: int = 3
    """Layers of the vision tower."""
    text_layers: int = 2
    """Layers of the text tower."""
    lr: float = 1.5e-3
    """Learning rate, after the first 5 % and before the last 15 % of the steps."""
    weight_decay: float = 0.05
    """AdamW's."""
    noise: float = 0.15
    """Highest deviation of the noise on the pictures, which are in [-1, 1]."""
    mix: float = 0.0
    """Share of the pictures that are mixed of a head's styles: its color, its coarse
    and its fine brightness of two each, half of them of its photo and another, by place
    (a box, or parts of the head); a caption is as true of one as its style has a share
    in it."""
    mix_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """How much the shares in color, coarse and fine brightness count in that: 0 0 1
    makes a model that looks at lines alone, to be one of several in `train.nada`."""
    turn: float = 0.0
    """Share of the pictures whose hues are turned; nothing is said of the colors of
    their hair and skin. Against a model that likes tints which no picture has."""
    crop: float = 0.0
    """Share of the pictures of which only a square is shown, a quarter to the whole of
    their side; captions say nothing of it but its style."""
    adversary: float = 0.0
    """Greatest change (L2 norm, of pictures in [-1, 1]) that is made to each picture so
    as to raise the loss, before the towers learn from it; 0: none. 3 is 3.5 levels of
    255 a value at 64 px."""
    adversary_steps: int = 2
    """Steps of the search for it."""
    validate_every: int = 200
    """Steps between measures on the held-out heads."""


# Captions


def facts(head: Mapping[str, Any]) -> np.ndarray:
    """What is true of a head: int8 [len(WORDS)], places in `VALUES`, -1: nothing.

    The first, its style, is open.
    """
    colour = np.linalg.norm(HAIR - np.array(head["hair"]), axis=1).argmin()
    bald = head["hair_line"] == "none"
    smile, frown = (
        head["targets"].get(f"{name}Left", 0) for name in ("mouthSmile", "mouthFrown")
    )
    length = _of(head["hair_length"], (0.1, "short"), (1.0, "long"))
    # HAIR has two browns, one after the other.
    black, *colours = VALUES["hair"]
    colours = (black, colours[0], *colours)
    said = {
        "style": None,
        "sex": _of(head["male"], (0.3, "woman"), (0.7, "man")),
        "age": _of(head["age"], (0.33, "young"), (0.6, "old")),
        "hair": None if bald else colours[colour],
        "length": "none" if bald else length,
        "beard": "beard" if head["beard"] else "none" if head["male"] > 0.7 else None,
        "mood": "smiling" if smile > 0.4 else "frowning" if frown > 0.2 else None,
        "skin": _of(head["melanin"], (0.25, "pale"), (0.6, "dark")),
    }
    places = [
        VALUES[name].index(value) if value else -1 for name, value in said.items()
    ]
    return np.array(places, np.int8)


def _of(value: float, low: tuple[float, str], high: tuple[float, str]) -> str | None:
    """The name of a value that is clearly low or clearly high."""
    return low[1] if value < low[0] else high[1] if value > high[0] else None


def caption(said: Mapping[str, str], rng: np.random.Generator) -> str:
    """A sentence that says all of something: {"style": "cel", "sex": "man", ...}."""

    def word(name: str) -> str:
        words = WORDS[name][said[name]]
        return words[rng.integers(len(words))]

    def named(*names: str) -> list[str]:
        return [word(name) for name in names if name in said]

    features = named("beard", "skin")
    if hair := named("length", "hair") if said.get("length") != "none" else []:
        features.insert(0, " ".join([*hair, "hair"]))
    words = named("mood", "age")
    words += named("length") if said.get("length") == "none" else []
    words += named("sex") or [ANYBODY[rng.integers(len(ANYBODY))]]
    subject = " ".join(words)
    if features:
        subject += " with " + " and ".join(features)
    if "style" not in said:
        return with_article(subject)
    style = word("style")
    if rng.random() < 0.7:
        style = with_article(style)
    nothing = len(said) == 1 and rng.random() < 0.5
    return style if nothing else f"{style} of {with_article(subject)}"


def with_article(words: str) -> str:
    """`old man` as `an old man`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def chosen(true: np.ndarray, rng: np.random.Generator, share: float = 0.5) -> dict:
    """A random part of what is true of a picture; its style in 6 of 7 captions."""
    shares = [6 / 7 if name == "style" else share for name in WORDS]
    keep = (rng.random(len(WORDS)) < shares) & (true >= 0)
    return {
        name: VALUES[name][place]
        for name, place, kept in zip(WORDS, true, keep, strict=True)
        if kept
    }


def claims(said: Mapping[str, str]) -> np.ndarray:
    """What a caption says, as `facts`; -1: it leaves that open."""
    return np.array(
        [VALUES[n].index(said[n]) if n in said else -1 for n in WORDS], np.int8
    )


def is_true(claims: Array, facts: Array) -> Array:
    """Which captions are true of which pictures, [pictures, captions].

    Args:
      claims: [captions, len(WORDS)].
      facts: [pictures, len(WORDS)].
    """
    claims, facts = claims[None], facts[:, None]
    return ((claims < 0) | (claims == facts)).all(-1)


def vocabulary(tokenizer: Any, names: Sequence[str] = tuple(WORDS)) -> tuple[int, ...]:
    """The tokens of all words of the captions, ascending.

    Args:
      tokenizer: CLIP's.
      names: those of `WORDS` that the captions speak of.
    """
    words = [word for name in names for v in WORDS[name].values() for word in v]
    words += [*ANYBODY, "a an of with and"]
    words += ["hair"] * bool({"hair", "length"} & set(names))
    rows = [tokenizer(word)["input_ids"] for word in words]
    return tuple(sorted({token for row in rows for token in row}))


def forgetting(
    tokenizer: Any, module: CLIP, params: Mapping, shares: Mapping[str, float]
) -> tuple[CLIP, dict, list[str]]:
    """The model without the words that it has failed to learn, and its templates.

    What is named rightly too seldom goes, so that such a word is refused like any other
    that the model does not know.

    Args:
      tokenizer: CLIP's.
      module, params: the model.
      shares: for names of `WORDS` how often held-out pictures are named rightly.
    """
    known = [n for n in WORDS if shares.get(n, 0) >= needed_share(len(WORDS[n]))]
    tokens = vocabulary(tokenizer, known)
    rows = np.array([module.token_ids.index(token) for token in tokens])
    table = np.asarray(params["text"]["token_embedding"])
    text = {**params["text"], "token_embedding": table[rows]}
    module = module.clone(token_ids=tokens, vocab_size=len(tokens))
    templates = [
        template
        for template in TEMPLATES
        if set(tokenizer(template.replace("{}", ""))["input_ids"]) <= set(tokens)
    ]
    return module, {**params, "text": text}, templates


def needed_share(values: int) -> float:
    """A third of the way from chance to certainty."""
    return 1 / values + (1 - 1 / values) / 3


# Data


class Heads(Sequence):
    """Pictures uint8 [n, size, size, 3] of a head, their facts [n, len(WORDS)], labels.

    The first are the item's own, whose style changes from item to item; the others are
    the same head in its folder's other styles. Labels uint8 [size, size] tell the part
    of the head (places in `train.heads_render.LABELS`).

    Args:
      folders: of `train.heads`.
      held_out: heads at the end of each folder.
      train: all but those, or those alone.
    """

    def __init__(self, folders: Sequence[Path], held_out: int, train: bool = True):
        self.folders = [str(folder) for folder in folders]
        by_style: list[list] = [[] for _ in VALUES["style"]]
        for folder in folders:
            true = read_facts(folder)
            cut = len(true) - held_out
            some = slice(cut) if train else slice(cut, None)
            found = {}
            for name in (*VALUES["style"], "labels"):
                file = Path(folder) / f"{name}.npy"
                if not file.is_file():
                    continue
                found[name] = np.load(file, mmap_mode="r")
                if len(found[name]) != len(true) or cut < 1:
                    raise UserError(
                        f"--data {folder} has {len(true)} heads and {len(found[name])} "
                        f"pictures in {file.name}; --held-out is {held_out}: give a "
                        "folder as train.heads wrote it, with more heads than that"
                    )
            labels = found.pop("labels", None)
            if found and labels is None:
                raise UserError(
                    f"--data {folder} has no labels.npy; give a folder as train.heads "
                    "--format npy wrote it"
                )
            for style in found:
                names = [style, *(n for n in found if n != style)]
                of_head = [found[n] for n in names]
                numbers = [VALUES["style"].index(n) for n in names]
                by_style[numbers[0]] += [
                    (of_head, numbers, labels, i, true[i])
                    for i in range(len(true))[some]
                ]
        self.styles = [rows for rows in by_style if rows]
        if not self.styles:
            given = " ".join(map(str, folders))
            raise UserError(
                f"--data {given} holds no STYLE.npy; draw heads with `python -m "
                "train.heads OUT --format npy --styles photo,pencil`"
            )
        self.longest = max(map(len, self.styles))

    def __len__(self) -> int:
        return self.longest * len(self.styles)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = self.styles[index % len(self.styles)]
        pictures, numbers, labels, i, true = rows[index // len(self.styles) % len(rows)]
        all_true = np.tile(true, (len(numbers), 1))
        all_true[:, 0] = numbers
        return np.stack([p[i] for p in pictures]), all_true, labels[i]

    def name(self, index: int) -> str:
        """Which picture."""
        return f"picture {index} of {' '.join(self.folders)}"

    def stamp(self) -> str:
        """How many there are of each style."""
        return " ".join(str(len(rows)) for rows in self.styles)


def read_facts(folder: str | Path) -> np.ndarray:
    """The facts of a folder's heads, int8 [n, len(WORDS)].

    Raises:
      UserError: there is no `heads.jsonl`, or a damaged one.
    """
    path = Path(folder) / "heads.jsonl"
    try:
        with open(path) as lines:
            return np.stack([facts(json.loads(line)) for line in lines])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--data {folder}: {path.name} cannot be read ({error!r}); give a folder "
            "that train.heads wrote"
        ) from None


def make_transform(
    tokenizer: Any,
    module: CLIP,
    noise: float,
    mix: float = 0.0,
    turn: float = 0.0,
    crop: float = 0.0,
    mix_weights: Sequence[float] = (1.0, 1.0, 1.0),
):
    """An item of `Heads` to {image, tokens, facts, shares, claims}, at random.

    `facts` [styles, len(WORDS)] are of the head in each style, `shares` [styles] how
    much of each the picture has, styles as many as there are (those that a folder lacks
    have none); the caption tells of one of them, drawn by their shares.

    Args:
      tokenizer: CLIP's.
      module: for its sizes.
      noise, mix, turn, crop, mix_weights: see `Options`.
    """
    names = list(WORDS)
    colored = [names.index(name) for name in ("hair", "skin")]
    rows = len(VALUES["style"])

    def transform(item, rng):
        pictures, facts, labels = item
        picture, shares = pictures[0], unmixed(len(pictures), labels.shape)
        if len(pictures) > 1 and rng.random() < mix:
            shares = drawn_shares(facts[:, 0], labels, rng)
            picture = mixed(pictures, shares)
        facts = np.pad(facts, ((0, rows - len(facts)), (0, 0)), "edge")
        if rng.random() < crop:
            top, left, side = square(len(labels), rng)
            place = slice(top, top + side), slice(left, left + side)
            picture, shares = picture[place], shares[..., *place]
            facts[:, 1:] = -1
        if rng.random() < turn:
            picture = turned(picture, rng.uniform(0, 2 * np.pi))
            facts[:, colored] = -1
        shares = np.average(shares.mean((2, 3)), axis=1, weights=mix_weights)
        shares = np.pad(shares, (0, rows - len(shares)))
        true = facts[rng.choice(rows, p=shares)]
        said = chosen(true, rng) or {"style": VALUES["style"][true[0]]}
        tokens = clip_text.tokenize(tokenizer, [caption(said, rng)], module)[0]
        tokens = np.pad(tokens, (0, module.context_length - len(tokens)))
        return {
            "image": varied(picture, module.image_size, noise, rng),
            "tokens": tokens,
            "facts": facts,
            "shares": np.float32(shares),
            "claims": claims(said),
        }

    return transform


def unmixed(styles: int, shape: tuple[int, int]) -> np.ndarray:
    """Shares for `mixed` of the first style alone: [styles, 3, height, width]."""
    shares = np.zeros((styles, 3, *shape))
    shares[0] = 1
    return shares


def square(side: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """A square in a larger one, of a quarter to the whole of its side: top, left, side.

    All scales are as likely, small squares are not the most.
    """
    own = max(1, round(side * 4 ** -rng.random()))
    top, left = rng.integers(0, side - own + 1, 2)
    return int(top), int(left), own


def partner(styles: np.ndarray, first: int, rng: np.random.Generator) -> int:
    """Place of the style to mix another of some with.

    Half the time the photo: a generator that draws photos is somewhere between these
    and the style that it is sent to.
    """
    others = np.delete(np.arange(len(styles)), first)
    photos = others[styles[others] == VALUES["style"].index("photo")]
    if len(photos) and rng.random() < 0.5:
        return int(photos[0])
    return int(rng.choice(others))


def drawn_shares(
    styles: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Shares for `mixed`: [styles, 3, side, side].

    Each band is of two styles, half the time the first and another; so one band tells
    nothing sure of the others. How much of each it has is drawn once for an area and
    once for what is around, both near 0 and 1 more often than between. The area is a
    box, or some parts of the head.

    Args:
      styles: at least two, places in `VALUES`.
      labels: of the parts, [side, side].
      rng: draws.
    """
    if rng.random() < 0.5:
        (top, left), size = rng.uniform(-0.25, 0.75, 2), rng.uniform(0.25, 1, 2)
        places = (np.arange(len(labels)) + 0.5) / len(labels)
        rows = (places > top) & (places < top + size[0])
        columns = (places > left) & (places < left + size[1])
        area = rows[:, None] & columns
    else:
        chosen = [group for group in GROUPS if rng.random() < 0.5]
        wanted = [LABELS.index(name) for group in chosen for name in group]
        area = np.isin(labels, wanted)
    shares = np.zeros((len(styles), 3, *labels.shape))
    for band in range(3):
        first = 0 if rng.random() < 0.5 else int(rng.integers(len(styles)))
        share = np.where(area, *rng.beta(0.5, 0.5, 2))
        shares[partner(styles, first, rng), band] = share
        shares[first, band] = 1 - share
    return shares


def mixed(pictures: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """A picture between some, uint8 [h, w, 3].

    A model that has only seen whole styles calls a picture a pencil drawing for its
    hatching alone, its lack of color alone, or its face alone, whichever a generator
    learns most easily. Labels in proportion: mixup (Zhang et al., arXiv 1710.09412);
    boxes: CutMix (Yun et al., arXiv 1905.04899).

    Args:
      pictures: uint8 [styles, h, w, 3], of the same head.
      shares: of each in the color, and in the coarse and the fine brightness:
        [styles, 3, h, w], or [styles, 3, 1, 1] for the same everywhere.
    """

    def bands(picture):
        image = Image.fromarray(picture)
        grey = image.convert("L")
        coarse = grey.filter(ImageFilter.GaussianBlur(len(picture) / 32))
        x, grey, coarse = (np.asarray(i, np.float32) for i in (image, grey, coarse))
        return x - grey[..., None], coarse[..., None], (grey - coarse)[..., None]

    x = 0
    for picture, own in zip(pictures, shares, strict=True):
        if own.any():
            pairs = zip(own, bands(picture), strict=True)
            x = x + sum(share[..., None] * band for share, band in pairs)
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


# Brightness as Image.convert("L") weighs it.
_LUMA = np.float32([0.299, 0.587, 0.114])


def turned(picture: np.ndarray, angle: float) -> np.ndarray:
    """A picture, uint8 [h, w, 3], whose hues are turned by an angle in radians.

    Brightness stays: the colors turn about grey, then what that adds to the brightness
    is taken off (what leaves 0 to 255 is cut).
    """
    x = picture.astype(np.float32)
    luma = x @ _LUMA
    color = x - luma[..., None]
    axis = np.cross(np.eye(3), np.full(3, 3**-0.5))
    color = color @ np.float32(
        np.cos(angle) * np.eye(3) + np.sin(angle) * axis + (1 - np.cos(angle)) / 3
    )
    color -= (color @ _LUMA)[..., None]
    return np.clip(np.rint(luma[..., None] + color), 0, 255).astype(np.uint8)


def varied(
    picture: np.ndarray, size: int, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """A picture moved, mirrored, blurred and noisy, float32 [size, size, 3]."""
    side = picture.shape[0]
    zoom = rng.uniform(0.85, 1)
    left, top = rng.uniform(0, 1 - zoom, 2)
    box = tuple(side * x for x in (left, top, left + zoom, top + zoom))
    small = int(size * rng.uniform(0.45, 1)) if rng.random() < 0.5 else size
    image = Image.fromarray(picture)
    image = image.resize((small, small), Image.Resampling.BILINEAR, box)
    if small != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    x = images.to_array(image)
    x = x * rng.uniform(0.85, 1.15) + rng.uniform(-0.1, 0.1)
    x = x[:, ::-1] if rng.random() < 0.5 else x
    x = x + rng.uniform(0, noise) * rng.standard_normal(x.shape, np.float32)
    return np.ascontiguousarray(x, np.float32)


# Loss and step


def contrastive_loss(logits: Array, true: Array) -> Array:
    """Cross entropy of the rows and of the columns, shared among what is true.

    Args:
      logits: [pictures, captions].
      true: how far a caption is true of a picture, from 0 to 1 (or as `is_true`); above
        0 somewhere in each row and column.
    """
    true = true.astype(logits.dtype)

    def along(axis):
        target = true / jnp.sum(true, axis, keepdims=True)
        return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(logits, axis), axis))

    return (along(0) + along(1)) / 2


def attacked(loss: Any, image: Array, radius: float, steps: int, key: Array) -> Array:
    """Pictures changed so as to raise the loss: projected gradient ascent.

    Madry et al. (arXiv 1706.06083), section 2.1, in the L2 norm: from a random change
    on, steps of 2.5 `radius` / `steps` along the gradient, each picture's brought back
    to a length of at most `radius`.

    Args:
      loss: of pictures.
      image: [batch, size, size, 3].
      radius: of the ball.
      steps: in it.
      key: of the first change.
    """

    def length(x):
        return jnp.linalg.norm(x.reshape(len(x), -1), axis=1)[:, None, None, None]

    def inside(x):
        return x * jnp.minimum(1, radius / jnp.maximum(length(x), 1e-12))

    def move(_, change):
        slope = jax.grad(loss)(image + change)
        slope /= jnp.maximum(length(slope), 1e-12)
        return inside(change + 2.5 * radius / steps * slope)

    first = inside(jax.random.normal(key, image.shape, image.dtype))
    return image + lax.fori_loop(0, steps, move, first)


def make_step(module: CLIP, tx: optax.GradientTransformation, options: Options):
    """The step of the scheme for `fit`."""

    def step(state: TrainState, _: Any, batch: Any) -> tuple[TrainState, dict]:
        # [pictures, captions] for each of the styles that a picture is mixed of.
        true = jax.vmap(is_true, (None, 1))(batch["claims"], batch["facts"])
        true = jnp.einsum("spc,ps->pc", true.astype(jnp.float32), batch["shares"])

        def loss(params, image):
            apply = jax.tree_util.Partial(module.apply, {"params": params})
            logits = apply(module.prepare(image), batch["tokens"])
            return contrastive_loss(logits, true)

        params, opt_state = state.params["clip"], state.opt_state["clip"]
        image = batch["image"]
        if options.adversary:
            image = attacked(
                partial(loss, params),
                image,
                options.adversary,
                options.adversary_steps,
                state.key,
            )
        value, grads = jax.value_and_grad(loss)(params, image)
        params, opt_state = optim.apply(tx, grads, opt_state, params)
        # As published, the scale stays below 100.
        scale = jnp.minimum(params["logit_scale"], jnp.log(100.0))
        params = params | {"logit_scale": scale}
        metrics = {"loss": value, "scale": jnp.exp(scale)}
        state = state.replace(params={"clip": params}, opt_state={"clip": opt_state})
        return state, metrics

    return step


def optimizer(options: Any, fall: float = 0.15) -> optax.GradientTransformation:
    """AdamW as published, the rate rising for 5 % of the steps.

    Args:
      options: with `run.steps`, `lr` and `weight_decay`.
      fall: share of the steps, at the end, in which it falls.
    """
    steps = options.run.steps

    def rate(step):
        up, down = step / max(0.05 * steps, 1), (steps - step) / max(fall * steps, 1)
        return options.lr * jnp.clip(jnp.minimum(up, down), 0, 1)

    return optax.adamw(
        rate, 0.9, 0.98, eps=1e-6, weight_decay=options.weight_decay, mask=_is_matrix
    )


def _is_matrix(params: Any) -> Any:
    """Norms, biases and the scale do not decay; layers lie along a first axis."""

    def decays(path, _):
        return optim.path_name(path).endswith(("weight", "token_embedding"))

    return jax.tree_util.tree_map_with_path(decays, params)


# What it has learned


def measured(held: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Up to 1000 held-out pictures [n, size, size, 3] and their facts."""
    items = [held[i] for i in range(min(len(held), 1000))]
    shown = [images.to_array(Image.fromarray(pictures[0])) for pictures, *_ in items]
    return np.stack(shown), np.stack([facts[0] for _, facts, _ in items])


def what_it_names(module: CLIP, params: Any, held: Sequence) -> dict[str, float]:
    """For each of `WORDS` with several values how often it is named rightly."""
    pictures, true = measured(held)
    judge = clip_text.Judge("trained", module, params)
    seen = embed_all(module, params, pictures)
    shares = {name: named_rightly(judge, seen, true, name) for name in WORDS}
    return {name: round(share, 3) for name, share in shares.items() if share}


def make_validate(module: CLIP, held: Sequence, seed: int = 0):
    """The measures of metrics.jsonl on the held-out heads; `val_loss` among them."""
    pictures, true = measured(held)
    rng, count = np.random.default_rng(seed), len(true)
    said = [chosen(row, rng, 0.7) or {"style": VALUES["style"][row[0]]} for row in true]
    captions = [caption(one, rng) for one in said]
    correct = np.asarray(is_true(np.stack([claims(one) for one in said]), true))

    def measure(params: Any) -> dict[str, float]:
        judge = clip_text.Judge("trained", module, params)
        seen = embed_all(module, params, pictures)
        texts = np.asarray(normalise(judge.encode_texts(captions)))
        products = seen @ texts.T
        scale = np.exp(float(params["logit_scale"]))
        found = {
            "val_loss": float(contrastive_loss(jnp.asarray(scale * products), correct)),
            "retrieval": float(correct[np.arange(count), products.argmax(1)].mean()),
            "retrieval_chance": float(correct.mean()),
        }
        shares = what_it_names(module, params, held)
        found["style"] = shares.pop("style", 0.0)
        found["words"] = float(np.mean([*shares.values()] or [0.0]))
        return found | {f"word/{name}": share for name, share in shares.items()}

    return lambda state, _: measure(state.params["clip"])


def named_rightly(judge, seen: np.ndarray, true: np.ndarray, name: str) -> float | None:
    """Share of pictures whose value the nearest of the values' sentences names.

    The mean over the values, so that chance is one over their number. None: nothing
    to choose from.

    Args:
      judge: the CLIP.
      seen: unit vectors [pictures, embed_dim].
      true: facts [pictures, len(WORDS)].
      name: of `WORDS`.
    """
    column, rng = true[:, list(WORDS).index(name)], np.random.default_rng(0)
    values = [v for i, v in enumerate(VALUES[name]) if (column == i).any()]
    if len(values) < 2:
        return None
    sentences = [
        [caption({name: value}, rng) for _ in range(4)]
        if name == "style"
        else [caption({"style": s, name: value}, rng) for s in VALUES["style"]]
        for value in values
    ]
    ends = [
        normalise(jnp.mean(normalise(judge.encode_texts(texts)), 0))
        for texts in sentences
    ]
    nearest = np.argmax(seen @ np.stack(ends).T, 1)
    places = [VALUES[name].index(value) for value in values]
    shares = [(nearest[column == p] == i).mean() for i, p in enumerate(places)]
    return float(np.mean(shares))


def embed_all(module: CLIP, params: Any, pictures: np.ndarray) -> np.ndarray:
    """Unit vectors [n, embed_dim] of pictures [n, size, size, 3]."""
    parts = [
        _embed(module, {"vision": params["vision"]}, pictures[i : i + 100])
        for i in range(0, len(pictures), 100)
    ]
    return np.concatenate([np.asarray(part) for part in parts])


def _embed_of(module: CLIP, params: Any, pictures: Array) -> Array:
    return module.apply({"params": params}, pictures, method="embed")


_embed = jax.jit(_embed_of, static_argnums=0)


def make_module(options: Options, tokenizer: Any) -> CLIP:
    """The towers that the options describe, with the captions' tokens."""
    tokens, width = vocabulary(tokenizer), options.width
    heads = max(width // 32, 1)
    return CLIP(
        image_size=options.size,
        patch_size=options.patch,
        vision_width=width,
        vision_layers=options.vision_layers,
        vision_heads=heads,
        vision_mlp=4 * width,
        text_width=width,
        text_layers=options.text_layers,
        text_heads=heads,
        text_mlp=4 * width,
        vocab_size=len(tokens),
        context_length=CONTEXT,
        embed_dim=width,
        token_ids=tokens,
        mean=(0.5, 0.5, 0.5),
        deviation=(0.5, 0.5, 0.5),
        dtype=options.run.dtype,
    )


def first_params(path: str | None, module: CLIP, key: Array) -> Any:
    """Random towers, or those of `--weights`; words that these lack begin at random.

    Raises:
      UserError: these are no CLIP, or one of other sizes.
    """
    params = module.init_params(key=key)
    if not path:
        return params
    model, found = weights.load(path)
    words = {"token_ids": module.token_ids, "vocab_size": module.vocab_size}
    if (
        "clip" not in model
        or model["clip"].clone(dtype=module.dtype, **words) != module
    ):
        raise UserError(
            f"--weights is {path}; it must be a run of train.clip_heads of "
            "the same sizes, or the model that one has written"
        )
    known = [module.token_ids.index(token) for token in model["clip"].token_ids]
    found, table = found["clip"], params["text"]["token_embedding"]
    table = table.at[np.array(known)].set(found["text"]["token_embedding"])
    return found | {"text": found["text"] | {"token_embedding": table}}


def write_model(
    folder: str | Path,
    tokenizer: Any,
    module: CLIP,
    params: Any,
    held: Sequence,
    metadata: Mapping[str, Any],
) -> None:
    """Write a model, without the words that it has not learned.

    Args:
      folder: where to.
      tokenizer: CLIP's.
      module, params: the model.
      held: held-out items of `Heads`.
      metadata: of the run.
    """
    shares = what_it_names(module, params, held)
    module, params, templates = forgetting(tokenizer, module, params, shares)
    print(f"named rightly: {shares}; the other words are left out of the model")
    weights.save(
        folder,
        {"clip": module},
        {"clip": params},
        metadata={**metadata, "templates": templates, "named": shares},
        dtype="float16",
        overwrite=True,
    )
    print(f"network: {folder}")


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.clip_heads`."""
    options = with_out(parse(Options, __doc__, args), "clip_heads")
    if options.held_out < 2:
        raise UserError(f"--held-out is {options.held_out}; it must be at least 2")
    for name in ("mix", "turn", "crop"):
        if not 0 <= (share := getattr(options, name)) <= 1:
            raise UserError(f"--{name} is {share:g}; it is a share, from 0 to 1")
    if min(options.mix_weights) < 0 or not any(options.mix_weights):
        given = " ".join(f"{x:g}" for x in options.mix_weights)
        raise UserError(
            f"--mix-weights is {given}; give three weights from 0, one of them above it"
        )
    if options.adversary < 0 or options.adversary_steps < 1:
        raise UserError(
            f"--adversary is {options.adversary:g} and --adversary-steps "
            f"{options.adversary_steps}; give a length from 0 and at least one step"
        )
    mesh = start(options.run)
    tokenizer = clip_text.load_tokenizer()
    module = make_module(options, tokenizer)
    source = Heads(options.data, options.held_out)
    held = Heads(options.data, options.held_out, train=False)
    tx = optimizer(options)
    keys = jax.random.split(jax.random.key(options.run.seed))
    params = {"clip": first_params(options.weights, module, keys[0])}
    metadata = {"scheme": "clip_heads", "templates": list(TEMPLATES)}
    batches = data.batches(
        source,
        options.run.batch,
        mesh,
        seed=options.run.seed,
        transform=make_transform(
            tokenizer,
            module,
            options.noise,
            options.mix,
            options.turn,
            options.crop,
            options.mix_weights,
        ),
    )
    state = loop.fit(
        options,
        create_state(params, {"clip": tx}, key=keys[1]),
        {},
        [(1, make_step(module, tx, options))],
        batches,
        networks={"clip": module},
        mesh=mesh,
        metadata=metadata,
        identity={
            "data": data.fingerprint(source),
            "weights": weights.digest(params) if options.weights else "",
        },
        validate=(options.validate_every, make_validate(module, held)),
    )
    params = sharding.fetch(state.params["clip"])
    if jax.process_index() == 0:
        folder = f"{options.run.out}/model"
        write_model(folder, tokenizer, module, params, held, metadata)


if __name__ == "__main__":
    main()
