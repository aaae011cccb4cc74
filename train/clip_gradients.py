"""Small CLIPs whose gradients lead a generator to the drawings themselves.

A CLIP of `train.clip_heads` knows a cartoon from a photo; a generator that follows it
in `train.nada` finds, after fifty steps, changes that please it and are no cartoon.
Here such models go on to learn where their gradients have to point, at pictures
between photos and drawings and at those of generators that have followed such models.

1. l(x) is NADA's directional loss (Gal et al., arXiv 2108.00946, eq. 3) of a picture x
   and what it was made from, on the whole and on crops, and d(x) how far x is from the
   head's own drawing (LPIPS at 256 px and half the absolute difference). The loss is
   1 - cos(P ∇l, P ∇d), with P the means over squares of 1, 4 and 16 px. Ganz et al.
   (arXiv 2207.11378) align the gradients of classifiers so, with the way to pictures
   of a class.
2. What a generator learns is the sum over heads, and over the models that it follows:
   with J the Jacobian of a generator's pictures by its weights, 1 - cos(Σ Jᵀ∇l, Σ Jᵀ∇d)
   over some heads that one generator has drawn. The cosine is taken for each array of
   the weights and counts by what that array adds to a step of Adam down d, the square
   root of its size times the length of its gradient. An error that heads share moves
   the generator, one that each has of its own is lost in the sum: this loss sees the
   first.
3. Which x: a head's photo, mixed with its drawing; and what generators of earlier runs
   of `train.nada` draw, at each of their checkpoints, for the inversion of that photo.
   Run by run the models learn what to say where the one before it has led (Ross et
   al., arXiv 1011.0686: the data of all runs are kept).
4. Beside that a contrastive loss, by the same direction, of the drawing against x and
   other heads' drawings; 1 - the drawing's cosine; and that of the captions.

    python -m train.heads heads --n 404 --seed 2 --size 64 --drawn-at 256 \\
        --format npy --styles photo,cel,duotone,pencil,paint
    python -m train.clip_gradients --data heads --out runs/guide-1
    python -m train.nada --clip runs/guide-1/model-* --source "a photo" \\
        --target "a cartoon" --batch 8 --phase all --lr 5e-3 --noise none \\
        --lambda-crop 1 --save-every 40 --keep 20 --steps 240 --out runs/nada-1
    python -m train.clip_gradients --data heads --weights runs/guide-1/model-* \\
        --runs runs/nada-1 --out runs/guide-2

On two cores a step of two models takes two to three seconds, the preparation one for
ten to fifteen pictures. OUT/model-1, OUT/model-2 hold the averaged towers in half
precision. In metrics.jsonl: `pixels`, `squares_4`, `squares_16`, the cosines of 1.;
`weights`, that of 2., of the pictures of --runs (0 where a step has none); `truth` and
`here`, 1 - the cosine of NADA's direction for the drawings and for x; with `val_`, of
the held-out heads.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from jaxstyle import images, pipeline, weights
from jaxstyle.encoding import encode_pictures, load_encoder
from jaxstyle.errors import UserError, cli
from jaxstyle.features import clip_text
from jaxstyle.features.clip import CLIP, normalise
from jaxstyle.stylegan2 import Generator, Params
from train import clip_heads, data, loop, nada_losses, optim, sharding
from train.cli import RunOptions, Shared, parse, start, with_out
from train.clip_heads import VALUES, WORDS
from train.measures import judge_size
from train.state import TrainState, create_state, update_ema

PHOTO = VALUES["style"].index("photo")
# Sides of the squares over whose means gradients are compared, and what each counts.
SQUARES = {1: 0.5, 4: 1.0, 16: 0.7}
# Sentences of a style in a step, and crops of a picture beside the whole.
SENTENCES, CROPS = 4, 2
# Cosines are sharpened by this before the softmax of the contrastive loss.
SHARPNESS = 15.0
EMA = 0.98
# Each device draws its own groups with their generators.
RULES = ((r"^frozen/", P()), *sharding.RULES)


@dataclasses.dataclass(frozen=True)
class Options:
    """Small CLIPs whose gradients lead to the drawings."""

    data: tuple[Path, ...]
    """Folders that `train.heads` wrote with --format npy, of photos and other
    styles."""
    weights: tuple[str, ...] = ("clip_heads", "clip_heads_lines")
    """Models that this scheme or `train.clip_heads` has written: goes on from them.
    They learn together, as `train.nada` follows them together."""
    run: Shared = RunOptions(
        steps=400, batch=2, log_every=20, sample_every=0, save_every=100
    )
    together: int = 8
    """Heads in each of --batch groups; those of a group were drawn by one generator."""
    runs: tuple[Path, ...] = ()
    """Runs of `train.nada` on --generator with a sentence that names a style, as "a
    cartoon"; the pictures at all their checkpoints are learned from."""
    generator: str = "heads"
    """The generator that those runs began with."""
    encoder: str = "heads_e4e"
    """Encoder of photos, for it."""
    mixes: int = 1200
    """Pictures between photos and drawings."""
    drawn: int = 56
    """Pictures of each checkpoint of --runs."""
    held_out: int = 40
    """Heads at the end of each folder that are only measured on."""
    lr: float = 6e-4
    """Learning rate, after the first 5 % and before the last 30 % of the steps."""
    weight_decay: float = 0.05
    """AdamW's."""
    lambda_gradient: float = 2.0
    """Weight of the loss on the gradients of pictures."""
    lambda_weights: float = 2.0
    """Weight of that on the gradients of a generator's weights, with --runs."""
    lambda_direction: float = 1.0
    """Weight of what tells drawings from others by their direction."""
    lambda_caption: float = 0.5
    """Weight of the contrastive loss of the captions."""
    noise: float = 0.03
    """Noise on the pictures, which are in [-1, 1]; for most its deviation is less."""
    validate_every: int = 100
    """Steps between measures on the held-out heads."""


# Data


class Head(NamedTuple):
    """A head in all its styles.

    Attributes:
      facts: int8 [len(WORDS)], of `train.clip_heads`; the first is open.
      labels: of its parts, uint8 [size, size].
      drawings: uint8 [size, size, 3] by style, `photo` among them.
    """

    facts: np.ndarray
    labels: np.ndarray
    drawings: Mapping[str, np.ndarray]


def read_heads(folders: Sequence[Path], held_out: int) -> tuple[list, list]:
    """The heads of some folders: those to learn from, and those held out.

    Raises:
      UserError: a folder without labels, photos or another style, or with fewer heads.
    """
    learned, held = [], []
    for folder in folders:
        facts, found = clip_heads.read_facts(folder), {}
        for name in (*VALUES["style"], "labels"):
            file = Path(folder) / f"{name}.npy"
            if file.is_file():
                found[name] = np.load(file, mmap_mode="r")
        missing = {"photo", "labels"} - set(found)
        if missing or len(found) < 3:
            raise UserError(
                f"--data {folder} holds {', '.join(sorted(found)) or 'nothing'}; it "
                "takes photo.npy, labels.npy and another style, as `python -m "
                "train.heads OUT --format npy --styles photo,cel` writes them"
            )
        counts = {len(found[name]) for name in found} | {len(facts)}
        if len(counts) > 1 or len(facts) <= held_out:
            raise UserError(
                f"--data {folder} has files of {sorted(counts)} heads; --held-out is "
                f"{held_out}: give a folder as train.heads wrote it, with more heads "
                "than that"
            )
        labels = found.pop("labels")
        heads = [
            Head(facts[i], labels[i], {name: found[name][i] for name in found})
            for i in range(len(facts))
        ]
        cut = len(heads) - held_out
        learned, held = learned + heads[:cut], held + heads[cut:]
    sizes = {head.labels.shape for head in learned}
    if len(sizes) > 1:
        given = " ".join(map(str, folders))
        raise UserError(f"--data {given} have pictures of different sizes: {sizes}")
    return learned, held


class Example(NamedTuple):
    """A picture with the way from it to the drawing.

    Attributes:
      source: what it was made from, uint8 [size, size, 3].
      picture: float16 [size, size, 3], nominally in [-1, 1].
      slope: where the drawing lies, float16 [size, size, 3], of mean square 1.
      length: the root of the mean square before.
      code: of the photo's inversion, w_plus [num_ws, w_dim].
      head: whose it is.
      style: that of the drawing, of `VALUES`.
    """

    source: np.ndarray
    picture: np.ndarray
    slope: np.ndarray
    length: np.float32
    code: np.ndarray
    head: Head
    style: str


class Drawn(NamedTuple):
    """Examples that one generator has drawn, or, with `generator` -1, mixes."""

    generator: int
    examples: Sequence[Example]


class Groups(Sequence):
    """A data set with an item for each example, it and others of the same generator.

    Args:
      sets: all examples.
      together: examples in an item.
      folders: where they are from.
    """

    def __init__(self, sets: Sequence[Drawn], together: int, folders: Sequence[Path]):
        self.sets, self.together = sets, together
        self.places = [(i, j) for i, x in enumerate(sets) for j in range(len(x[1]))]
        self.folders = [str(folder) for folder in folders]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Drawn, int, int]:
        i, j = self.places[index]
        return self.sets[i], j, self.together

    def name(self, index: int) -> str:
        """Which one."""
        return f"example {index} of {' '.join(self.folders)}"


class Changes:
    """Makes examples of heads: changes of their photos, with the way that is left.

    A change is added to the photo or to its inversion, half the time each, since
    `train.nada` sees only what a generator draws. The way left is that of the changed
    photo in both cases: what an inversion lacks of its photo is no part of a style.

    Args:
      heads: see `read_heads`.
      generator, base: the model.
      codes: of the photos' inversions, w_plus [n, num_ws, w_dim].
      rng: draws.
    """

    def __init__(self, heads, generator: Generator, base: Params, codes, rng):
        self.heads, self.generator, self.rng = heads, generator, rng
        self.codes = codes
        self.inverted = self.draw(base, codes)
        self.lpips = weights.load("lpips_alexnet")

    def draw(self, params: Params, codes: np.ndarray) -> np.ndarray:
        """Pictures as `train.nada` sees them on its way."""
        return pipeline.pictures(
            self.generator, params, codes, noise="none", batch=min(8, len(codes))
        )

    def mixes(self, count: int) -> list[Example]:
        """Pictures between photo and drawing, half of them in a tint of their own."""
        places = self.rng.integers(len(self.heads), size=count)
        named, changes = [], []
        for i in places:
            head = self.heads[i]
            styles = [name for name in head.drawings if name != "photo"]
            named.append(styles[self.rng.integers(len(styles))])
            numbers = np.array([VALUES["style"].index(named[-1]), PHOTO])
            pair = np.stack([head.drawings[named[-1]], head.drawings["photo"]])
            shares = clip_heads.drawn_shares(numbers, head.labels, self.rng)
            tint = self.rng.normal(0, 0.08, 3) * (self.rng.random() < 0.5)
            mixed = clip_heads.mixed(pair, shares)
            changes.append(values(mixed) - values(pair[1]) + tint)
        return self.examples(places, named, np.stack(changes))

    def drawn(self, params: Params, style: str, count: int) -> list[Example]:
        """What a generator on its way to a style has made of some heads.

        Each change is weakened or strengthened, from 0.6 to 1.4 times.
        """
        having = [i for i, head in enumerate(self.heads) if style in head.drawings]
        if not having:
            raise UserError(f"--runs has one to the style {style}; --data has no such")
        places = self.rng.permutation(having)[:count]
        changes = self.draw(params, self.codes[places]) - self.inverted[places]
        strength = self.rng.uniform(0.6, 1.4, (len(places), 1, 1, 1))
        return self.examples(places, [style] * len(places), strength * changes)

    def examples(self, places, named, changes: np.ndarray) -> list[Example]:
        """Those of changes [n, size, size, 3] of the heads at some places."""
        heads = [self.heads[i] for i in places]
        photos = values(np.stack([head.drawings["photo"] for head in heads]))
        truths = [h.drawings[s] for h, s in zip(heads, named, strict=True)]
        truths = values(np.stack(truths))
        slopes, lengths = self.slopes(photos + changes, truths)
        shown = self.rng.random(len(heads)) < 0.5
        sources = np.where(shown[:, None, None, None], photos, self.inverted[places])
        sources = images.to_uint8(sources)
        pictures = np.clip(values(sources) + changes, -1.3, 1.3).astype(np.float16)
        codes = self.codes[places]
        rows = zip(sources, pictures, slopes, lengths, codes, heads, named, strict=True)
        return [Example(*row) for row in rows]

    def slopes(self, pictures: np.ndarray, truths: np.ndarray):
        """Down from pictures to truths: `slope` and `length` of an `Example`."""
        model, params = self.lpips
        found = pipeline.in_batches(
            lambda rows: downhill(params["lpips"], *rows, judge=model.lpips),
            (np.float32(pictures), np.float32(truths)),
            min(8, len(pictures)),
        )
        length = np.sqrt(np.square(found).mean((1, 2, 3), keepdims=True))
        slopes = (found / np.maximum(length, 1e-12)).astype(np.float16)
        return slopes, length[:, 0, 0, 0]


@partial(jax.jit, static_argnames="judge")
def downhill(params: Any, pictures: Array, truths: Array, *, judge: Any) -> Array:
    """-∇d, the way to the truths, of the pictures' shape [batch, size, size, 3]."""

    def distance(x):
        seen = judge.apply({"params": params}, judge_size(x), judge_size(truths))
        return jnp.sum(seen) + 0.5 * jnp.sum(jnp.mean(jnp.abs(x - truths), (1, 2, 3)))

    return -jax.grad(distance)(pictures)


def digest(heads: Sequence[Head], runs: Sequence[Path]) -> str:
    """Sixteen hex digits that change with a head, or with the checkpoints of a run."""
    sha = hashlib.sha256()
    for head in heads:
        sha.update(head.facts)
        for name, drawing in sorted(head.drawings.items()):
            sha.update(name.encode())
            sha.update(np.ascontiguousarray(drawing))
    for run in runs:
        sha.update(str(weights.checkpoint_steps(run)).encode())
    return sha.hexdigest()[:16]


def values(picture: np.ndarray) -> np.ndarray:
    """uint8 to [-1, 1]."""
    return picture / np.float32(127.5) - 1


def style_of(run: Path) -> str:
    """Which style of `VALUES` a run of `train.nada` goes to.

    Raises:
      UserError: no such run, or its target is none of the styles' words.
    """
    target = weights.read_config(run)["metadata"].get("target", "")
    styles = {
        style: words for style, words in WORDS["style"].items() if style != "photo"
    }
    for style, words in styles.items():
        if target.removeprefix("a ").removeprefix("an ") in words:
            return style
    known = ", ".join(word for words in styles.values() for word in words)
    raise UserError(
        f"--runs {run} went to {target!r}; the styles of train.heads are called {known}"
    )


def generators(runs: Sequence[Path], base: Params) -> Iterator[tuple[Params, str]]:
    """The generators at all checkpoints of the runs, and the style they go to.

    Raises:
      UserError: a folder that is no run of `train.nada` that moves one generator, has
        no checkpoints, or began with another generator.
    """
    for run in runs:
        metadata = weights.read_config(run)["metadata"]
        if metadata.get("scheme") != "nada" or "styles" in metadata:
            raise UserError(
                f"--runs {run} is no run of train.nada with one --target; give such"
            )
        style, steps = style_of(run), weights.checkpoint_steps(run)
        if not steps:
            raise UserError(
                f"--runs {run} holds no checkpoints; give the folder of a run of "
                "train.nada"
            )
        for step in steps:
            params = weights.load(run, step=step)[1]["generator"]
            if not _same(params["mapping"], base["mapping"]):
                raise UserError(
                    f"--runs {run} began with another generator than --generator; give "
                    "the one that it began with"
                )
            yield params, style


def _same(a: Any, b: Any) -> bool:
    shapes = jax.tree.map(np.shape, (a, b))
    return shapes[0] == shapes[1] and all(
        jax.tree.leaves(jax.tree.map(np.array_equal, a, b))
    )


class Transform:
    """Arrays of a group of examples, each mirrored half the time, with sentences.

    `before` and `after` [SENTENCES, context] name the photo and the style, `facts` and
    `claims` [2, len(WORDS)] and `tokens` [2, context] are those of source and drawing,
    each with an axis [together] before them; `generator` is that of `Drawn`.
    """

    def __init__(self, tokenizer: Any, module: CLIP):
        self.tokenizer, self.module = tokenizer, module

    def __call__(self, item: tuple[Drawn, int, int], rng) -> dict[str, np.ndarray]:
        """An item of `Groups` with others of its generator, drawn without order."""
        drawn, place, together = item
        others = [i for i in range(len(drawn.examples)) if i != place]
        few = len(others) < together - 1
        others = rng.choice(others or [place], together - 1, replace=few)
        return self.rows(drawn, [place, *others], rng)

    def rows(self, drawn: Drawn, places: Sequence[int], rng) -> dict[str, np.ndarray]:
        """Some examples of a generator."""
        rows = [self.example(drawn.examples[i], rng) for i in places]
        stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return stacked | {"generator": np.int32(drawn.generator)}

    def example(self, example: Example, rng) -> dict[str, np.ndarray]:
        """One example."""
        mirrored = rng.random() < 0.5
        flip = slice(None, None, -1 if mirrored else 1)
        facts = np.stack([example.head.facts] * 2)
        facts[:, 0] = PHOTO, VALUES["style"].index(example.style)
        said = []
        for row in facts:
            style = {"style": VALUES["style"][row[0]]}
            whole = rng.random() < 0.5
            said.append(style if whole else clip_heads.chosen(row, rng) or style)
        templates = rng.choice(clip_heads.TEMPLATES, SENTENCES)
        before, after = (
            [t.replace("{}", f"a {rng.choice(WORDS['style'][s])}") for t in templates]
            for s in ("photo", example.style)
        )
        return {
            "source": example.source[:, flip],
            "picture": example.picture[:, flip],
            "slope": example.slope[:, flip],
            "drawing": example.head.drawings[example.style][:, flip],
            "mirrored": np.bool_(mirrored),
            "length": np.float32(example.length),
            "code": example.code,
            "before": self.sentences(before),
            "after": self.sentences(after),
            "tokens": self.sentences([clip_heads.caption(one, rng) for one in said]),
            "claims": np.stack([clip_heads.claims(one) for one in said]),
            "facts": facts,
        }

    def sentences(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens [len(texts), context]."""
        tokens = clip_text.tokenize(self.tokenizer, texts, self.module)
        length = self.module.context_length - tokens.shape[1]
        return np.pad(tokens, ((0, 0), (0, length)))


# Loss and step


def alignment(a: Array, b: Array, square: int) -> Array:
    """Cosine of two maps [batch, h, w, channels], by means over squares: [batch]."""

    def pooled(x):
        n, h, w, c = x.shape
        side = min(square, h)
        x = x.reshape(n, h // side, side, w // side, side, c).mean((2, 4))
        return x.reshape(n, -1)

    a, b = pooled(a), pooled(b)
    lengths = jnp.sum(a * a, -1), jnp.sum(b * b, -1)
    return jnp.sum(a * b, -1) * lax.rsqrt(lengths[0] * lengths[1] + 1e-20)


def pull(generator: Generator, ways: Mapping, batch: Mapping, slopes: Array) -> Params:
    """Gradients of the weights of each group's generator by those of its pictures.

    Args:
      generator: the module.
      ways: `base`, the parameters of the generator that all began as, and `synthesis`,
        what moved, arrays [generators, ...].
      batch: `generator` [groups], `code` [groups, together, num_ws, w_dim] and
        `mirrored` [groups, together].
      slopes: by the pictures, [groups, together, size, size, 3].

    Returns:
      Like `synthesis`, arrays [groups, ...]; a group of mixes has those of the first
      generator, which mean nothing.
    """

    def of_group(number, codes, slopes):
        synthesis = jax.tree.map(lambda x: x[number], ways["synthesis"])

        def draw(synthesis):
            params = {**ways["base"], "synthesis": synthesis}
            return generator.apply(
                {"params": params}, codes, space="w_plus", noise="none"
            )[0]

        return jax.vjp(draw, synthesis)[1](slopes)[0]

    mirrored = batch["mirrored"][..., None, None, None]
    slopes = jnp.where(mirrored, slopes[:, :, :, ::-1], slopes)
    return jax.vmap(of_group)(jnp.maximum(batch["generator"], 0), batch["code"], slopes)


def weights_alignment(found: Params, wanted: Params) -> Array:
    """How much of a step of Adam down `wanted` one down `found` has, [groups].

    The mean of the arrays' cosines, each counted by the square root of its size times
    the length of what is wanted there.

    Args:
      found, wanted: of `pull`.
    """

    def of_array(a, b):
        a, b = (x.reshape(len(x), -1) for x in (a, b))
        lengths = jnp.sum(a * a, -1), jnp.sum(b * b, -1)
        cosine = jnp.sum(a * b, -1) * lax.rsqrt(lengths[0] * lengths[1] + 1e-30)
        return cosine, jnp.sqrt(a.shape[1] * lengths[1])

    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    cosines, shares = map(jnp.stack, zip(*(of_array(*x) for x in pairs), strict=True))
    return jnp.sum(cosines * shares, 0) / jnp.maximum(jnp.sum(shares, 0), 1e-20)


def views(images: Array, boxes: Array, size: int) -> Array:
    """The wholes of some pictures, then crops: [batch (1 + CROPS), size, size, 3]."""
    whole = jnp.tile(jnp.array([[0.0, 0.0, 1.0]]), (len(images), 1))
    cut = partial(nada_losses.crops, images, size=size)
    return jnp.concatenate([cut(boxes=whole), cut(boxes=boxes)])


def cosine(source: Array, target: Array, wanted: Array) -> Array:
    """Of the direction from one embedding to the other with a wanted one."""
    return jnp.sum(nada_losses.edit_direction(source, target) * wanted, -1)


def told_apart(source: Array, x: Array, truth: Array, wanted: Array) -> Array:
    """Cross entropy of the own drawing against x and other heads' drawings.

    Args:
      source, x, truth: embeddings [batch, embed_dim].
      wanted: directions [batch, embed_dim].
    """
    all_drawings = jax.vmap(lambda s, d: cosine(s, truth, d))(source, wanted)
    here = cosine(source, x, wanted)[:, None]
    logits = SHARPNESS * jnp.concatenate([all_drawings, here], 1)
    own = jnp.diagonal(jax.nn.log_softmax(logits, 1))
    return -jnp.mean(own)


def losses_of_one(module: CLIP, params: Any, batch: Mapping, boxes: Array):
    """What one model learns from and tells, but the weights of a generator.

    Args:
      module, params: the model.
      batch: examples [batch, ...] of `Transform`, pictures in [-1, 1].
      boxes: of the crops, see `train.nada_losses.crops`.

    Returns:
      Losses and measures by name; NADA's gradient by the pictures, of their shape.
    """
    count = len(batch["source"])

    def embed(x):
        return module.apply({"params": params}, x, method="embed")

    def text(tokens):
        return normalise(module.apply({"params": params}, tokens, method="encode_text"))

    def mean_text(tokens):
        rows = text(tokens.reshape(-1, tokens.shape[-1]))
        return rows.reshape(*tokens.shape[:2], -1).mean(1)

    wanted = normalise(mean_text(batch["after"]) - mean_text(batch["before"]))
    everywhere = jnp.concatenate([wanted, jnp.repeat(wanted, CROPS, 0)])
    weight = jnp.concatenate([jnp.ones(count), jnp.full(count * CROPS, 1 / CROPS)])
    see = partial(views, boxes=boxes, size=module.image_size)
    source, truth = embed(see(batch["source"])), embed(see(batch["drawing"]))

    def of_nada(x):
        seen = embed(see(x))
        loss = 1 - cosine(source, seen, everywhere)
        return jnp.sum(weight * loss), (seen, loss)

    slope, (x, here) = jax.grad(of_nada, has_aux=True)(batch["picture"])
    found = {}
    for side in SQUARES:
        name = f"squares_{side}" if side > 1 else "pixels"
        found[name] = jnp.mean(alignment(-slope, batch["slope"], side))
    kept = zip(SQUARES.values(), found.values(), strict=True)
    found["gradient"] = sum(share * (1 - x) for share, x in kept)
    found["truth"] = jnp.mean(1 - cosine(source, truth, everywhere))
    found["here"] = jnp.mean(here)
    # The wholes, and the first crop of each.
    crop = slice(count, None, CROPS)
    apart = [
        told_apart(source[part], x[part], truth[part], wanted)
        for part in (slice(count), crop)
    ]
    found["direction"] = sum(apart) / 2 + found["truth"]
    shown = jnp.stack([source[:count], truth[:count]], 1).reshape(2 * count, -1)
    captions = text(batch["tokens"].reshape(2 * count, -1))
    scale = jnp.minimum(jnp.exp(params["logit_scale"]), 100.0)
    true = clip_heads.is_true(
        batch["claims"].reshape(2 * count, -1), batch["facts"].reshape(2 * count, -1)
    )
    logits = scale * shown @ captions.T
    found["caption"] = clip_heads.contrastive_loss(logits, true)
    return found, slope


def losses(
    modules: Mapping[str, CLIP],
    params: Mapping[str, Any],
    batch: Mapping,
    boxes: Array,
    generator: Generator,
    ways: Mapping,
) -> dict[str, Array]:
    """What the models learn from and tell, means over them; see the module's docstring.

    Args:
      modules, params: the models by name.
      batch: of `Transform`, groups [groups, together, ...], pictures in [-1, 1].
      boxes: of the crops, see `train.nada_losses.crops`.
      generator, ways: see `pull`; an empty `ways` has no generators.
    """
    flat = {n: x.reshape(-1, *x.shape[2:]) for n, x in batch.items() if x.ndim > 1}
    each = [losses_of_one(modules[n], params[n], flat, boxes) for n in modules]
    found = jax.tree.map(lambda *x: sum(x) / len(x), *(losses for losses, _ in each))
    found["weights"], found["generator"] = jnp.zeros(()), jnp.zeros(())
    if ways:
        down = -sum(slope for _, slope in each).reshape(batch["slope"].shape)
        length = batch["length"][..., None, None, None]
        wanted = pull(generator, ways, batch, length * batch["slope"])
        aligned = weights_alignment(pull(generator, ways, batch, down), wanted)
        moved = batch["generator"] >= 0
        share = moved / jnp.maximum(jnp.sum(moved), 1)
        found["weights"] = jnp.sum(share * aligned)
        found["generator"] = jnp.sum(share * (1 - aligned))
    return found


def total(options: Options, found: Mapping[str, Array]) -> Array:
    """The weighted sum."""
    names = ("gradient", "direction", "caption")
    kept = sum(getattr(options, f"lambda_{name}") * found[name] for name in names)
    return kept + options.lambda_weights * found["generator"]


def floats(batch: Mapping) -> dict:
    """Pictures of a batch to float32, in [-1, 1]."""
    levels = {name: batch[name] for name in ("source", "drawing")}
    halves = {name: batch[name] for name in ("picture", "slope")}
    return (
        dict(batch)
        | {n: jnp.asarray(x, jnp.float32) / 127.5 - 1 for n, x in levels.items()}
        | {n: jnp.asarray(x, jnp.float32) for n, x in halves.items()}
    )


def make_step(
    modules: Mapping[str, CLIP],
    generator: Generator,
    tx: optax.GradientTransformation,
    options: Options,
):
    """The step of the scheme for `fit`."""

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict]:
        batch, keys = floats(batch), jax.random.split(state.key, 5)
        shape = batch["source"].shape
        # One shift and one deviation for all three pictures of a head.
        draws = sharding.sample_normal(keys[0], *shape[:2], 2)[..., None, None, None]
        shift = 0.02 * draws[:, :, 0]
        deviation = options.noise / 2 * jnp.abs(draws[:, :, 1])
        for key, name in zip(keys[1:4], ("source", "picture", "drawing"), strict=True):
            noise = sharding.sample_normal(key, *shape)
            batch[name] += shift + deviation * noise
        boxes = nada_losses.crop_boxes(keys[4], shape[0] * shape[1] * CROPS)

        def loss(params):
            found = losses(modules, params, batch, boxes, generator, frozen)
            return total(options, found), found

        (value, found), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        params, opt_state = {}, {}
        for name in modules:
            params[name], opt_state[name] = optim.apply(
                tx, grads[name], state.opt_state[name], state.params[name]
            )
        state = state.replace(
            params=params, opt_state=opt_state, ema=update_ema(state.ema, params, EMA)
        )
        return state, found | {"loss": value}

    return step


def optimizer(options: Options) -> optax.GradientTransformation:
    """That of `train.clip_heads`, with a longer fall, after steep gradients are cut."""
    return optax.chain(
        optax.clip_by_global_norm(5.0), clip_heads.optimizer(options, fall=0.3)
    )


def make_validate(
    modules: Mapping[str, CLIP],
    generator: Generator,
    options: Options,
    held: Sequence[Drawn],
    transform: Transform,
):
    """The losses on the held-out heads' examples, `val_loss` their weighted sum."""
    rng = np.random.default_rng(0)
    size = min([options.together, *(len(drawn.examples) for drawn in held)])
    items = [
        transform.rows(drawn, range(i, i + size), rng)
        for drawn in held
        for i in range(0, len(drawn.examples) - size + 1, size)
    ]
    boxes = [
        nada_losses.crop_boxes(jax.random.key(i), size * CROPS)
        for i in range(len(items))
    ]
    measure = jax.jit(partial(losses, modules, generator=generator))

    def validate(state: TrainState, frozen: Any) -> dict[str, float]:
        found = []
        for item, box in zip(items, boxes, strict=True):
            batch = floats({name: x[None] for name, x in item.items()})
            found.append(measure(state.ema, batch, box, ways=frozen))
        mean = {n: float(np.mean([one[n] for one in found])) for n in found[0]}
        # Mixes have no generator: what they add to its means is 0.
        moved = np.mean([item["generator"] >= 0 for item in items])
        for name in ("weights", "generator"):
            mean[name] /= max(moved, 1 / len(items))
        named = {f"val_{name}": x for name, x in mean.items()}
        return named | {"val_loss": total(options, mean)}

    return validate


def first_models(
    options: Options, tokenizer: Any, key: Array
) -> tuple[dict[str, CLIP], dict[str, Any]]:
    """The models of `--weights` with all words of the captions, `clip_1`, `clip_2`, …

    Raises:
      UserError: one is none of drawn heads.
    """
    tokens = clip_heads.vocabulary(tokenizer)
    modules, params = {}, {}
    for number, path in enumerate(options.weights, 1):
        model, _ = weights.load(path)
        scheme = weights.read_config(path)["metadata"].get("scheme")
        if "clip" not in model or scheme not in ("clip_heads", "clip_gradients"):
            raise UserError(
                f"--weights is {path}; it must be a model that train.clip_heads or "
                "train.clip_gradients has written, RUN/model or RUN/model-1"
            )
        module = model["clip"].clone(
            token_ids=tokens, vocab_size=len(tokens), dtype=options.run.dtype
        )
        name = f"clip_{number}"
        modules[name] = module
        params[name] = clip_heads.first_params(
            path, module, jax.random.fold_in(key, number)
        )
    return modules, params


class Material(NamedTuple):
    """What is learned from and measured on.

    Attributes:
      generator: the module.
      ways: see `pull`; empty without --runs.
      learned, held: examples, of heads to learn from and held out.
    """

    generator: Generator
    ways: dict
    learned: list[Drawn]
    held: list[Drawn]


def make_material(
    options: Options, heads: Sequence[Head], held: Sequence[Head]
) -> Material:
    """Examples of the heads: mixed ones, and some of each checkpoint of --runs."""
    model, params = weights.load(options.generator)
    generator, base = model["generator"], params["generator"]
    encoder = load_encoder(options.encoder, generator)
    if heads[0].labels.shape != (generator.size, generator.size):
        raise UserError(
            f"--data has pictures of {len(heads[0].labels)} px, --generator "
            f"{options.generator} draws {generator.size}: draw heads with `python -m "
            f"train.heads OUT --size {generator.size}`"
        )

    def changes(heads, seed):
        photos = np.stack([head.drawings["photo"] for head in heads])
        codes = encode_pictures(encoder, generator, base, values(photos), batch=8)
        return Changes(heads, generator, base, codes, np.random.default_rng(seed))

    learning, measuring = changes(heads, options.run.seed), changes(held, seed=0)
    learned = [Drawn(-1, learning.mixes(options.mixes))]
    measured = [Drawn(-1, measuring.mixes(8 * options.together))]
    moved = []
    for number, (drawn, style) in enumerate(generators(options.runs, base)):
        learned.append(Drawn(number, learning.drawn(drawn, style, options.drawn)))
        few = measuring.drawn(drawn, style, options.together)
        measured.append(Drawn(number, few))
        moved.append(drawn["synthesis"])
    ways = {}
    if moved:
        still = {name: x for name, x in base.items() if name != "synthesis"}
        synthesis = jax.tree.map(lambda *x: np.stack(x).astype(np.float32), *moved)
        ways = {"base": still, "synthesis": synthesis}
    return Material(generator, ways, learned, measured)


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.clip_gradients`."""
    options = with_out(parse(Options, __doc__, args), "clip_gradients")
    run = options.run
    if options.held_out < 2:
        raise UserError(f"--held-out is {options.held_out}; it must be at least 2")
    for name in ("mixes", "drawn", "together"):
        if getattr(options, name) < 1:
            raise UserError(
                f"--{name} is {getattr(options, name)}; it must be at least 1"
            )
    mesh = start(run)
    tokenizer = clip_text.load_tokenizer()
    keys = jax.random.split(jax.random.key(run.seed))
    modules, params = first_models(options, tokenizer, keys[0])
    heads, held = read_heads(options.data, options.held_out)
    metadata = {"scheme": "clip_gradients", "templates": list(clip_heads.TEMPLATES)}
    identity = {
        "data": digest(heads, options.runs),
        "weights": weights.digest(params),
    }
    loop.check_folder(options, metadata, identity)
    if jax.process_index() == 0:
        print(f"drawing and comparing pictures of {len(heads) + len(held)} heads")
    material = make_material(options, heads, held)
    transform = Transform(tokenizer, next(iter(modules.values())))
    batches = data.batches(
        Groups(material.learned, options.together, options.data),
        run.batch,
        mesh,
        seed=run.seed,
        transform=transform,
    )
    tx = optimizer(options)
    state = loop.fit(
        options,
        create_state(
            params, dict.fromkeys(modules, tx), key=keys[1], ema=tuple(modules)
        ),
        material.ways,
        [(1, make_step(modules, material.generator, tx, options))],
        batches,
        networks=modules,
        mesh=mesh,
        metadata=metadata,
        identity=identity,
        rules=RULES,
        validate=(
            options.validate_every,
            make_validate(
                modules, material.generator, options, material.held, transform
            ),
        ),
    )
    averaged = sharding.fetch(state.ema)
    if jax.process_index() == 0:
        pictures = clip_heads.Heads(options.data, options.held_out, train=False)
        for number, (name, module) in enumerate(modules.items(), 1):
            clip_heads.write_model(
                f"{run.out}/model-{number}",
                tokenizer,
                module,
                averaged[name],
                pictures,
                metadata,
            )


if __name__ == "__main__":
    main()
