"""A small CLIP whose gradients lead a generator to the drawings themselves.

A CLIP of `train.clip_heads` knows a cartoon from a photo; a generator that follows it
in `train.nada` finds, after fifty steps, changes that please it and are no cartoon.
Here such a model goes on to learn where its gradients have to point, at pictures
between photos and drawings and at those of generators that have followed such models.

1. l(x) is NADA's directional loss (Gal et al., arXiv 2108.00946, eq. 3) of a picture x
   and what it was made from, on the whole and on crops, and d(x) how far x is from the
   head's own drawing (LPIPS at 256 px and half the absolute difference). The loss is
   1 - cos(P ∇l, P ∇d), with P the means over squares of 1, 4 and 16 px. Ganz et al.
   (arXiv 2207.11378) align the gradients of classifiers so, with the way to pictures
   of a class.
2. Which x: a head's photo, mixed with its drawing; and what generators of earlier runs
   of `train.nada` draw, at each of their checkpoints, for the inversion of that photo.
   Run by run the model learns what to say where the one before it has led (Ross et
   al., arXiv 1011.0686: the data of all runs are kept).
3. Beside that a contrastive loss, by the same direction, of the drawing against x and
   other heads' drawings; 1 - the drawing's cosine; and that of the captions.

    python -m train.heads heads --n 404 --seed 2 --size 64 --drawn-at 256 \\
        --format npy --styles photo,cel,duotone,pencil,paint
    python -m train.clip_gradients --data heads --out runs/guide-1
    python -m train.nada --clip runs/guide-1/model --source "a photo" \\
        --target "a cartoon" --save-every 20 --keep 20 --out runs/nada-1
    python -m train.clip_gradients --data heads --weights runs/guide-1/model \\
        --runs runs/nada-1 --out runs/guide-2

On two cores a step with clip_heads takes a second, the preparation one for ten to
fifteen pictures. OUT/model holds the averaged towers in half precision. In
metrics.jsonl: `pixels`, `squares_4`, `squares_16`, the cosines of 1.; `truth` and
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


@dataclasses.dataclass(frozen=True)
class Options:
    """A small CLIP whose gradients lead to the drawings."""

    data: tuple[Path, ...]
    """Folders that `train.heads` wrote with --format npy, of photos and other
    styles."""
    weights: str = "clip_heads"
    """A run of this scheme or of `train.clip_heads`, or a model that one has written:
    goes on from it."""
    run: Shared = RunOptions(
        steps=400, batch=16, log_every=20, sample_every=0, save_every=100
    )
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
    """Weight of the loss on the gradients."""
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
      head: whose it is.
      style: that of the drawing, of `VALUES`.
    """

    source: np.ndarray
    picture: np.ndarray
    slope: np.ndarray
    head: Head
    style: str


class Examples(Sequence):
    """Examples as a data set."""

    def __init__(self, examples: Sequence[Example], folders: Sequence[Path]):
        self.examples = examples
        self.folders = [str(folder) for folder in folders]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

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

        Each change is weakened or strengthened a little, from 0.6 to 1.15 times.
        """
        having = [i for i, head in enumerate(self.heads) if style in head.drawings]
        if not having:
            raise UserError(f"--runs has one to the style {style}; --data has no such")
        places = self.rng.permutation(having)[:count]
        changes = self.draw(params, self.codes[places]) - self.inverted[places]
        strength = self.rng.uniform(0.6, 1.15, (len(places), 1, 1, 1))
        return self.examples(places, [style] * len(places), strength * changes)

    def examples(self, places, named, changes: np.ndarray) -> list[Example]:
        """Those of changes [n, size, size, 3] of the heads at some places."""
        heads = [self.heads[i] for i in places]
        photos = values(np.stack([head.drawings["photo"] for head in heads]))
        truths = [h.drawings[s] for h, s in zip(heads, named, strict=True)]
        truths = values(np.stack(truths))
        slopes = self.slopes(photos + changes, truths)
        shown = self.rng.random(len(heads)) < 0.5
        sources = np.where(shown[:, None, None, None], photos, self.inverted[places])
        sources = images.to_uint8(sources)
        pictures = np.clip(values(sources) + changes, -1.3, 1.3).astype(np.float16)
        rows = zip(sources, pictures, slopes, heads, named, strict=True)
        return [Example(*row) for row in rows]

    def slopes(self, pictures: np.ndarray, truths: np.ndarray) -> np.ndarray:
        """Down from pictures to truths, float16 [n, size, size, 3]."""
        model, params = self.lpips
        found = pipeline.in_batches(
            lambda rows: downhill(params["lpips"], *rows, judge=model.lpips),
            (np.float32(pictures), np.float32(truths)),
            min(8, len(pictures)),
        )
        length = np.sqrt(np.square(found).mean((1, 2, 3), keepdims=True))
        return (found / np.maximum(length, 1e-12)).astype(np.float16)


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


def make_transform(tokenizer: Any, module: CLIP):
    """An example to arrays, mirrored half the time, with sentences.

    `before` and `after` [SENTENCES, context] name the photo and the style, `facts` and
    `claims` [2, len(WORDS)] and `tokens` [2, context] are those of source and drawing.
    """

    def sentences(texts):
        tokens = clip_text.tokenize(tokenizer, texts, module)
        return np.pad(tokens, ((0, 0), (0, module.context_length - tokens.shape[1])))

    def transform(example: Example, rng):
        flip = slice(None, None, -1 if rng.random() < 0.5 else 1)
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
            "before": sentences(before),
            "after": sentences(after),
            "tokens": sentences([clip_heads.caption(one, rng) for one in said]),
            "claims": np.stack([clip_heads.claims(one) for one in said]),
            "facts": facts,
        }

    return transform


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


def losses(module: CLIP, params: Any, batch: Mapping, boxes: Array) -> dict[str, Array]:
    """What the model learns from, and what it tells; see the module's docstring.

    Args:
      module, params: the model.
      batch: of `make_transform`, pictures in [-1, 1].
      boxes: of the crops, see `train.nada_losses.crops`.
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
    return found


def total(options: Options, found: Mapping[str, Array]) -> Array:
    """The weighted sum."""
    names = ("gradient", "direction", "caption")
    return sum(getattr(options, f"lambda_{name}") * found[name] for name in names)


def floats(batch: Mapping) -> dict:
    """Pictures of a batch to float32, in [-1, 1]."""
    levels = {name: batch[name] for name in ("source", "drawing")}
    halves = {name: batch[name] for name in ("picture", "slope")}
    return (
        dict(batch)
        | {n: jnp.asarray(x, jnp.float32) / 127.5 - 1 for n, x in levels.items()}
        | {n: jnp.asarray(x, jnp.float32) for n, x in halves.items()}
    )


def make_step(module: CLIP, tx: optax.GradientTransformation, options: Options):
    """The step of the scheme for `fit`."""

    def step(state: TrainState, _: Any, batch: Any) -> tuple[TrainState, dict]:
        batch, keys = floats(batch), jax.random.split(state.key, 5)
        count, shape = len(batch["source"]), batch["source"].shape[1:]
        # One shift and one deviation for all three pictures of a head.
        draws = sharding.sample_normal(keys[0], count, 2)[:, :, None, None, None]
        shift, deviation = 0.02 * draws[:, 0], options.noise / 2 * jnp.abs(draws[:, 1])
        for key, name in zip(keys[1:4], ("source", "picture", "drawing"), strict=True):
            noise = sharding.sample_normal(key, count, *shape)
            batch[name] += shift + deviation * noise
        boxes = nada_losses.crop_boxes(keys[4], count * CROPS)

        def loss(params):
            found = losses(module, params, batch, boxes)
            return total(options, found), found

        params, opt_state = state.params["clip"], state.opt_state["clip"]
        (value, found), grads = jax.value_and_grad(loss, has_aux=True)(params)
        params, opt_state = optim.apply(tx, grads, opt_state, params)
        state = state.replace(
            params={"clip": params},
            opt_state={"clip": opt_state},
            ema={"clip": update_ema(state.ema["clip"], params, EMA)},
        )
        return state, found | {"loss": value}

    return step


def optimizer(options: Options) -> optax.GradientTransformation:
    """That of `train.clip_heads`, with a longer fall, after steep gradients are cut."""
    return optax.chain(
        optax.clip_by_global_norm(5.0), clip_heads.optimizer(options, fall=0.3)
    )


def make_validate(module: CLIP, options: Options, held: Sequence, transform):
    """The losses on the held-out heads' examples, `val_loss` their weighted sum."""
    rng, size = np.random.default_rng(0), options.run.batch
    items = [transform(example, rng) for example in held]
    every = {name: np.stack([item[name] for item in items]) for name in items[0]}
    measure = jax.jit(partial(losses, module))

    def validate(state: TrainState, _: Any) -> dict[str, float]:
        found = []
        for i in range(0, len(items) - size + 1, size):
            batch = {n: x[i : i + size] for n, x in every.items()}
            boxes = nada_losses.crop_boxes(jax.random.key(i), size * CROPS)
            found.append(measure(state.ema["clip"], floats(batch), boxes))
        mean = {n: float(np.mean([one[n] for one in found])) for n in found[0]}
        named = {f"val_{name}": x for name, x in mean.items()}
        return named | {"val_loss": total(options, mean)}

    return validate


def first_model(options: Options, tokenizer: Any, key: Array) -> tuple[CLIP, dict]:
    """The model of `--weights` with all words of the captions.

    Raises:
      UserError: it is none of drawn heads.
    """
    model, _ = weights.load(options.weights)
    scheme = weights.read_config(options.weights)["metadata"].get("scheme")
    if "clip" not in model or scheme not in ("clip_heads", "clip_gradients"):
        raise UserError(
            f"--weights is {options.weights}; it must be a run of train.clip_heads or "
            "train.clip_gradients, or the model that one has written"
        )
    tokens = clip_heads.vocabulary(tokenizer)
    module = model["clip"].clone(
        token_ids=tokens, vocab_size=len(tokens), dtype=options.run.dtype
    )
    return module, clip_heads.first_params(options, module, key)


def make_examples(
    options: Options, heads: Sequence[Head], mixes: int, drawn: int, seed: int
) -> list[Example]:
    """Examples of some heads: mixed ones, and so many of each checkpoint of --runs."""
    model, params = weights.load(options.generator)
    generator, base = model["generator"], params["generator"]
    encoder = load_encoder(options.encoder, generator)
    if heads[0].labels.shape != (generator.size, generator.size):
        raise UserError(
            f"--data has pictures of {len(heads[0].labels)} px, --generator "
            f"{options.generator} draws {generator.size}: draw heads with `python -m "
            f"train.heads OUT --size {generator.size}`"
        )
    photos = np.stack([head.drawings["photo"] for head in heads])
    codes = encode_pictures(encoder, generator, base, values(photos), batch=8)
    make = Changes(heads, generator, base, codes, np.random.default_rng(seed))
    examples = make.mixes(mixes)
    for params, style in generators(options.runs, base):
        examples += make.drawn(params, style, drawn)
    return examples


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.clip_gradients`."""
    options = with_out(parse(Options, __doc__, args), "clip_gradients")
    run = options.run
    if options.held_out < 2:
        raise UserError(f"--held-out is {options.held_out}; it must be at least 2")
    if min(options.mixes, options.drawn) < 1:
        raise UserError(
            f"--mixes is {options.mixes} and --drawn {options.drawn}; both must be at "
            "least 1"
        )
    mesh = start(run)
    tokenizer = clip_text.load_tokenizer()
    keys = jax.random.split(jax.random.key(run.seed))
    module, params = first_model(options, tokenizer, keys[0])
    params = {"clip": params}
    heads, held = read_heads(options.data, options.held_out)
    metadata = {"scheme": "clip_gradients", "templates": list(clip_heads.TEMPLATES)}
    identity = {
        "data": digest(heads, options.runs),
        "weights": weights.digest(params),
    }
    loop.check_folder(options, metadata, identity)
    if jax.process_index() == 0:
        print(f"drawing and comparing pictures of {len(heads) + len(held)} heads")
    examples = make_examples(options, heads, options.mixes, options.drawn, run.seed)
    measured = make_examples(options, held, 4 * run.batch, len(held), seed=0)
    transform = make_transform(tokenizer, module)
    batches = data.batches(
        Examples(examples, options.data),
        run.batch,
        mesh,
        seed=run.seed,
        transform=transform,
    )
    tx = optimizer(options)
    state = loop.fit(
        options,
        create_state(params, {"clip": tx}, key=keys[1], ema=("clip",)),
        {},
        [(1, make_step(module, tx, options))],
        batches,
        networks={"clip": module},
        mesh=mesh,
        metadata=metadata,
        identity=identity,
        validate=(
            options.validate_every,
            make_validate(module, options, measured, transform),
        ),
    )
    params = sharding.fetch(state.ema["clip"])
    if jax.process_index() == 0:
        pictures = clip_heads.Heads(options.data, options.held_out, train=False)
        clip_heads.write_model(run.out, tokenizer, module, params, pictures, metadata)


if __name__ == "__main__":
    main()
