"""StyleGAN-NADA: a sentence, or a few pictures, move a generator to another domain.

Gal et al., "StyleGAN-NADA: CLIP-Guided Domain Adaptation of Image Generators", arXiv
2108.00946.

1. A frozen and a learning generator start equal and draw the same codes.
2. theta = argmin 1 - cos(E(G(w; theta)) - E(G(w)), T(target) - T(source)), E and T
   CLIP's embeddings of pictures and text (eq. 3): every picture moves as the text does.
3. For changes of shape, the layers that train are chosen anew in each step (section
   4.2): those whose codes move most when they follow the target text.
4. With pictures instead of a text (section 4.6), the direction is that from generated
   pictures to them.

    python -m train.nada --source photo --target sketch --clip ViT-B/32
    python -m train.nada --ref a.png b.png c.png --clip ViT-B/32 ViT-B/16
    python -m train.nada --preset pixar
    python -m jaxstyle.stylize me.jpg --weights runs/nada-photo-sketch

No picture is needed, no discriminator, and no more than a few hundred steps. CLIP's
weights do not ship with us: give OpenAI's ViT-B-32.pt, a folder of Hugging Face's, or a
name that is in their cache. What ships are small CLIPs of the heads that the model in
the package draws (`train.clip_heads`), some of which look at lines. They are that
model's default, with settings of its own, and know the words of their captions alone:

    python -m train.nada --source "a photo" --target "a pencil drawing"

Look at samples/: the upper row is the frozen generator,
and people in the lower one should stay themselves. If all become one, stop earlier.

On many chips the batch is split over the `data` axis; CLIP and both generators are on
all. The published batch is 2, with no rule for other rates at larger ones: nor have we.
Several texts are learned side by side, a style each, with no collective in the step:

    python -m train.nada --source photo --target sketch "Mona Lisa painting" anime
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from etils import epath
from jax import Array
from jax.sharding import PartitionSpec as P

from convert.clip import load_clip
from jaxstyle import images, weights
from jaxstyle.errors import UserError, cli
from jaxstyle.features.clip import Resize
from jaxstyle.features.clip_text import Judge
from jaxstyle.paths import place
from jaxstyle.stylegan2 import Generator
from train import nada_layers, nada_losses, optim, references, sharding, styles
from train.cli import (
    RunOptions,
    Shared,
    as_flags,
    parse,
    start,
    with_out,
    with_profile,
    working,
)
from train.loop import check_folder, fit
from train.nada_losses import Terms
from train.state import TrainState, create_state

# The published code scales rate and betas for a lazy regularisation that it leaves out.
LAZY = 4 / 5
GRID = 5
# Judges the model in the package; see train.clip_heads.
SMALL_CLIP = "clip_heads"
# Steps with pictures as the target, published as 400 to 600.
PICTURE_STEPS = 500
# Texts after the paper's figures; settings as published for the kind of change: style
# 200-400 steps with all layers, identity 150-200, shape with a choice of layers.
PRESETS: dict[str, dict[str, Any]] = {
    "sketch": {"source": "photo", "target": ("sketch",), "steps": 300},
    "pixar": {"source": "photo", "target": ("3d render in the style of Pixar",)},
    "disney": {"source": "human", "target": ("Disney princess",)},
    "mona-lisa": {"source": "photo", "target": ("Mona Lisa painting",), "steps": 200},
    "modigliani": {"source": "photo", "target": ("Amedeo Modigliani painting",)},
    "picasso": {"source": "photo", "target": ("cubism painting by Pablo Picasso",)},
    "botero": {"source": "photo", "target": ("Fernando Botero painting",)},
    "elf": {"source": "human", "target": ("Tolkien elf",), "steps": 200},
    "werewolf": {"source": "human", "target": ("werewolf",), "improve_shape": True},
    "zombie": {"source": "human", "target": ("zombie",), "improve_shape": True},
    "ghost-car": {
        "source": "car",
        "target": ("ghost car",),
        "steps": 450,
        "clip": ("ViT-B/32", "ViT-B/16"),
    },
    "dog-to-cat": {
        "source": "dog",
        "target": ("cat",),
        "steps": 1000,
        "choose_steps": 1,
        "choose": 3,
    },
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of train.nada; the defaults are the published ones."""

    source: str = ""
    """What the generator draws now, in a word or a few: photo, dog, human."""
    target: tuple[str, ...] = ()
    """What it is to draw: sketch, "Mona Lisa painting". Several become a style each,
    side by side over the axis `style`, and a folder OUT/styles/NAME each."""
    ref: tuple[epath.Path, ...] = ()
    """Pictures of the target instead of texts: about three, not aligned."""
    preset: Literal[tuple(PRESETS)] | None = None
    """Source, target and settings for a known change; flags of your own win."""
    weights: str = weights.DEFAULT
    """Base networks: a name we ship, a converted folder, or a run."""
    profile: bool = True
    """Where no --clip is named, take the defaults that the weights recommend for
    themselves (`nada` in their config.json, besides with --ref `nada_pictures` and
    with a --target that is in `nada_targets` what stands there; printed);
    --no-profile: the published ones."""
    clip: tuple[str, ...] = ()
    """CLIP models: files, folders, names (ViT-B/32, ViT-B/16, ViT-L/14) or hub ids in
    the local cache. Not given: as published, ViT-B/32, and ViT-B/16 too for changes of
    shape and for pictures; for the model in the package the small one beside it."""
    clip_weights: tuple[float, ...] = ()
    """Weight of each model's loss; not given: 1."""
    text_embeddings: tuple[Path, ...] = ()
    """Files of python -m train.nada_text, one a CLIP model: no text tower is loaded."""
    vocabulary: str = ""
    """Tokenizer files, see train.nada_text."""
    templates: tuple[str, ...] = ()
    """Sentences whose embeddings are averaged, with {} for --source and --target. Not
    given: those of a CLIP's own captions, else the published 79."""
    download: bool = False
    """Fetch hub ids that are not in the local cache."""
    resize: Resize = "antialias"
    """How pictures are made small for CLIP; torch-1.7: as for the published models."""
    terms: Annotated[Terms, tyro.conf.OmitArgPrefixes] = Terms()
    lambda_texture: float = 0.0
    """Refused: the published code never reaches this term."""
    improve_shape: bool = False
    """The notebook's settings for changes of shape: two CLIP models, a choice of two
    thirds of the layers, style mixing in 9 of 10 steps."""
    phase: nada_layers.Phase = "default"
    """Layers that train when none are chosen: all convolutions; texture, shape,
    shape_expanded, no_fine: some of them; all: the to-RGBs too."""
    choose_steps: int = 0
    """Steps of the codes by which layers are chosen anew each time; 0: no choice."""
    choose: int = 0
    """Rows of codes whose layers train in a step; 0: two thirds of them."""
    choose_batch: int = 8
    """Codes that the choice looks at."""
    layer_map: nada_layers.LayerMap = "peer"
    """Which layer a row stands for: the published table, which is off by one, or the
    layer that the row drives."""
    idle: Literal["keep", "decay"] = "keep"
    """Adam's moments of layers that are not chosen: keep them (PyTorch 2), or let them
    decay (PyTorch 1.7, the published models); with few layers decay makes the first
    steps of a layer up to 11 times as large."""
    mixing: float = 0.0
    """Share of the steps whose codes are mixed of two."""
    crossover: Literal["shared", "separate"] = "shared"
    """Row at which mixed codes change: one for both generators, or one each as
    published, which moves pictures for another reason than the text."""
    noise: Literal["separate", "shared", "const", "none"] = "separate"
    """Noise planes of the two generators: drawn for each as published; the same for
    both, but in the first step; the stored ones; or none."""
    ref_batch: int = 16
    """Generated pictures that the direction to --ref starts from."""
    lr: float = 2e-3
    """Adam's learning rate (betas 0 and 0.99), all three scaled by 4/5 as published."""
    sample_psi: float = 0.7
    """Truncation of the sample grids and of the fixed pictures."""
    validate_every: int = 0
    """Steps between measures on fixed codes, `val_loss` and `val_diversity` (a share of
    the base's); the state with the lowest loss is kept in OUT/best. 0: only at the
    end."""
    validate_count: int = 16
    """Fixed codes."""
    stop_score: float = 0.0
    """Stop when the fixed pictures' mean cosine with --target (`val_score`) reaches
    this; 0: never."""
    stop_diversity: float = 0.0
    """Stop when `val_diversity` falls below this; 0: never."""
    patience: int = 0
    """Several targets: a style learns no longer once its loss, averaged over about ten
    steps, has not fallen for so many; 0: all learn to the end."""
    run: Shared = RunOptions(
        steps=300, batch=2, log_every=10, sample_every=50, save_every=50, keep=0
    )


def judge_fn(options: Options, module: Any):
    """A function (params, pictures) -> unit vectors for one CLIP model."""

    def embed(params, x):
        return module.apply(
            {"params": params}, x, options.resize, options.run.remat, method="embed"
        )

    return embed


def loss_fn(
    synthesis: Any,
    frozen: Mapping[str, Any],
    source: Array,
    codes: Array,
    *,
    options: Options,
    generator: Generator,
    modules: Sequence[Any],
    noise: Any,
    key: Array | None = None,
    patch_key: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The loss of the learning generator's pictures, over all CLIP models.

    Args:
      synthesis: parameters that learn.
      frozen: `base`, `clip` and `anchors`, the latter two by number.
      source: pictures of the frozen generator.
      codes: w+ of the same pictures [batch, num_ws, w_dim].
      options: of the scheme.
      generator: architecture.
      modules: CLIP models.
      noise: as in `Generator`.
      key: for random noise.
      patch_key: for patches and crops.
    """
    params = {**frozen["base"], "synthesis": synthesis}
    target, _ = generator.apply(
        {"params": params}, codes, space="w_plus", noise=noise, key=key
    )
    total, metrics = 0.0, {}
    for i, (module, weight) in enumerate(
        zip(modules, clip_weights(options), strict=True)
    ):
        value, found = nada_losses.loss(
            partial(judge_fn(options, module), frozen["clip"][str(i)]),
            frozen["anchors"][str(i)],
            options.terms,
            source,
            target,
            key=patch_key,
            size=module.image_size,
        )
        total += weight * value
        suffix = f"/{i}" if len(modules) > 1 else ""
        metrics |= {f"{name}{suffix}": x for name, x in found.items()}
    return total, metrics


def choice(
    synthesis: Any,
    frozen: Mapping[str, Any],
    w: Array,
    *,
    options: Options,
    generator: Generator,
    modules: Sequence[Any],
    noise: Any,
    key: Array | None = None,
) -> Array:
    """How far each row of the codes moves towards the target text: [num_ws].

    Args:
      synthesis: parameters that learn.
      frozen: as for `loss_fn`.
      w: codes [batch, w_dim].
      options, generator, modules, noise: as for `loss_fn`.
      key: one key a picture, for random noise.
    """
    params = {**frozen["base"], "synthesis": jax.lax.stop_gradient(synthesis)}

    def loss(codes, step):
        keys = None
        if key is not None:
            keys = jax.vmap(lambda k: jax.random.fold_in(k, step))(key)
        image, _ = generator.apply(
            {"params": params}, codes, space="w_plus", noise=noise, key=keys
        )
        pairs = enumerate(zip(modules, clip_weights(options), strict=True))
        return sum(
            weight
            * nada_losses.to_text(
                judge_fn(options, module)(frozen["clip"][str(i)], image),
                frozen["anchors"][str(i)]["class"],
            )
            for i, (module, weight) in pairs
        )

    return nada_layers.scores(loss, w, generator.num_ws, options.choose_steps)


def clip_weights(options: Options) -> tuple[float, ...]:
    """A weight for each CLIP model."""
    return options.clip_weights or (1.0,) * len(options.clip)


def mixed_codes(
    options: Options, generator: Generator, base: Any, key: Array
) -> tuple[Array, Array]:
    """Codes w+ of a step for the frozen and the learning generator.

    Both [batch, num_ws, w_dim], equal unless crossovers are drawn separately.
    """
    rows, batch = generator.num_ws, options.run.batch

    def draw(i):
        z = sharding.sample_normal(jax.random.fold_in(key, i), batch, generator.z_dim)
        return generator.apply({"params": base}, z, method="mapping")[:, None]

    first = jnp.broadcast_to(draw(0), (batch, rows, generator.w_dim))
    if not options.mixing:
        return first, first
    second = draw(1)
    keys = jax.random.split(jax.random.fold_in(key, 2), 3)
    mixes = jax.random.bernoulli(keys[0], options.mixing)

    def mixed(key):
        row = jnp.where(mixes, jax.random.randint(key, (), 1, rows), rows)
        return jnp.where((jnp.arange(rows) < row)[None, :, None], first, second)

    source = mixed(keys[1])
    return source, source if options.crossover == "shared" else mixed(keys[2])


def make_step(options: Options, generator: Generator, modules: Sequence[Any], tx: Any):
    """The step of the scheme."""
    noise = "random" if options.noise in ("separate", "shared") else options.noise
    shared = {
        "options": options,
        "generator": generator,
        "modules": modules,
        "noise": noise,
    }
    size, phase = generator.size, nada_layers.phase_mask(generator.size, options.phase)

    def one(params, opt_state, anchors, key, number, frozen):
        synthesis, frozen = params["synthesis"], {**frozen, "anchors": anchors}

        def keys(i, batch=options.run.batch):
            return sharding.sample_keys(jax.random.fold_in(key, i), batch)

        active, metrics = phase, {}
        if options.choose_steps:
            count = options.choose_batch
            z = sharding.sample_normal(
                jax.random.fold_in(key, 0), count, generator.z_dim
            )
            w = generator.apply({"params": frozen["base"]}, z, method="mapping")
            scores = choice(synthesis, frozen, w, key=keys(1, count), **shared)
            active = nada_layers.chosen_mask(
                size, scores, options.choose, options.layer_map
            )
        before, after = mixed_codes(
            options, generator, frozen["base"], jax.random.fold_in(key, 2)
        )
        source_keys, target_keys = keys(3), keys(4)
        if options.noise == "shared":
            # In the first step equal noise would make equal pictures: no direction.
            target_keys = jnp.where(number == 0, target_keys, source_keys)
        source, _ = generator.apply(
            {"params": frozen["base"]},
            before,
            space="w_plus",
            noise=noise,
            key=source_keys,
        )
        (loss, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            synthesis,
            frozen,
            jax.lax.stop_gradient(source),
            after,
            key=target_keys,
            patch_key=jax.random.fold_in(key, 5),
            **shared,
        )
        synthesis, opt_state = optim.apply(
            tx, grads, opt_state, synthesis, active=active
        )
        metrics = {"loss": loss} | terms
        if options.choose_steps:
            metrics |= {f"trains/{n}": x for n, x in active.items() if n != "const"}
        return {**params, "synthesis": synthesis}, opt_state, metrics

    def step(state: TrainState, frozen: Any, _: Any) -> tuple[TrainState, dict]:
        before = state.params["generator"], state.opt_state["generator"]
        # Equal draws: what is the same for all styles is computed once, and each learns
        # what it would alone.
        update = styles.side_by_side(one, own_draws=False) if many(options) else one
        shared = {name: frozen[name] for name in ("base", "clip")}
        *after, metrics = update(
            *before, frozen["anchors"], state.key, state.step, shared
        )
        if options.patience:
            after, learns = styles.held(state, options.patience, tuple(after), before)
            extra = styles.progress(state, metrics["loss"], learns)
            state = state.replace(extra=extra)
            metrics |= {"learns": learns.astype(jnp.float32)}
        params, opt_state = after
        state = state.replace(
            params={"generator": params}, opt_state={"generator": opt_state}
        )
        return state, metrics

    return step


def many(options: Options) -> bool:
    """Whether several styles are learned side by side."""
    return len(options.target) > 1


def optimizer(options: Options) -> Any:
    """Adam as published, which may skip layers."""
    return nada_layers.masked_adam(options.lr * LAZY, 0.99**LAZY, idle=options.idle)


def start_state(options: Options, base: Any, tx: Any) -> TrainState:
    """A copy of the base whose synthesis network trains."""
    trained, extra, init = base, {}, tx.init
    if many(options):
        count = len(options.target)
        trained, init = styles.copies(base, count), jax.vmap(tx.init)
        extra = styles.start_progress(count) if options.patience else {}
    key = jax.random.key(options.run.seed)
    state = create_state({"generator": trained}, {}, key=key, extra=extra)
    return state.replace(opt_state={"generator": init(trained["synthesis"])})


def frozen_of(
    options: Options, generator: Generator, base: Any, judges: Sequence[Judge]
) -> dict[str, Any]:
    """What a run never changes: the base, CLIP's vision towers, where to go."""
    found = [anchors_of(options, generator, base, judge) for judge in judges]
    key = jax.random.fold_in(jax.random.key(options.run.seed), 1)
    shape = max(options.validate_count, GRID), generator.z_dim
    return {
        "base": base,
        "clip": {
            str(i): {"vision": judge.params["vision"]} for i, judge in enumerate(judges)
        },
        "anchors": {str(i): anchors for i, anchors in enumerate(found)},
        "z": jax.random.normal(key, shape),
    }


def anchors_of(
    options: Options, generator: Generator, base: Any, judge: Judge
) -> dict[str, Array]:
    """Directions and texts for one CLIP model; see `nada_losses`.

    Of several targets, with a leading axis of styles.
    """
    found: dict[str, Array] = {}
    if options.source:
        each = [
            nada_losses.anchors(
                judge,
                options.source,
                target,
                bool(options.terms.lambda_patch),
                options.templates,
            )
            for target in options.target
        ]
        found = jax.tree.map(lambda *x: jnp.stack(x), *each)
        if not many(options):
            found = jax.tree.map(lambda x: x[0], found)
    if not options.ref:
        return found
    module, vision = judge.module, {"vision": judge.params["vision"]}
    photos = [module.prepare_photo(images.open_image(path)) for path in options.ref]
    key = jax.random.fold_in(jax.random.key(options.run.seed), 2)
    z = jax.random.normal(key, (options.ref_batch, generator.z_dim))

    @jax.jit
    def embed(vision, base, photos, z):
        drawn, _ = generator.apply({"params": base}, z, noise="random", key=key)
        after = module.apply({"params": vision}, photos, method="encode_image")
        before = judge_fn(options, module)(vision, drawn)
        return before, nada_losses.normalise(after)

    before, after = embed(vision, base, jnp.stack(photos), z)
    found["direction"] = nada_losses.direction(before, after)
    if not options.source:
        found["target"] = nada_losses.normalise(jnp.mean(after, 0, keepdims=True))
    return found


def make_sample(options: Options, generator: Generator):
    """Fixed codes: the frozen generator's pictures above, the learning ones' below."""

    def sample(state: TrainState, frozen: Any) -> Array:
        learning = [state.params["generator"]]
        if many(options):
            shown = range(min(GRID, len(options.target)))
            learning = [jax.tree.map(lambda x, i=i: x[i], *learning) for i in shown]
        rows = [
            generator.apply(
                {"params": params}, frozen["z"][:GRID], psi=options.sample_psi
            )[0]
            for params in (frozen["base"], *learning)
        ]
        return jnp.stack(rows)

    return sample


def make_validate(options: Options, generator: Generator, modules: Sequence[Any]):
    """The loss on fixed codes, and how different from each other their pictures are.

    `val_loss` chooses the best state; `val_diversity` is a share of the base's, and
    falls when all pictures become one. Of several styles, means, and beside them the
    values of each.
    """

    def embeddings(clip, pictures):
        return [
            judge_fn(options, module)(clip[str(i)], pictures)
            for i, module in enumerate(modules)
        ]

    def spread(seen):
        """Sum over the models of the mean 1 - cosine of two different pictures."""
        count = seen[0].shape[0]
        # From the deviations: 1 - cosine is rounding where the pictures are much alike.
        return sum(jnp.sum(jnp.square(x - jnp.mean(x, 0))) / (count - 1) for x in seen)

    def measure(params, anchors, frozen):
        frozen = {**frozen, "anchors": anchors}
        z = sharding.constrain(frozen["z"][: options.validate_count])
        apply = partial(generator.apply, psi=options.sample_psi)
        source, out = apply({"params": frozen["base"]}, z)
        target, _ = apply({"params": params}, z)
        seen = embeddings(frozen["clip"], target)
        loss, _ = loss_fn(
            params["synthesis"],
            frozen,
            source,
            out["w_plus"],
            options=options,
            generator=generator,
            modules=modules,
            noise="const",
            patch_key=jax.random.key(0),
        )
        ratio = spread(seen) / spread(embeddings(frozen["clip"], source))
        values = {"val_loss": loss, "val_diversity": ratio}
        if options.target:
            texts = [frozen["anchors"][str(i)]["class"] for i in range(len(modules))]
            scores = [
                1 - nada_losses.to_text(*x) for x in zip(seen, texts, strict=True)
            ]
            values["val_score"] = jnp.mean(jnp.stack(scores))
        return values

    @jax.jit
    def measured(params, frozen):
        shared = {name: frozen[name] for name in ("base", "clip", "z")}
        if not many(options):
            return measure(params, frozen["anchors"], shared)
        found = styles.each_alone(measure, (0, 0, None))(
            params, frozen["anchors"], shared
        )
        # Every process reads the values of all styles.
        return jax.tree.map(lambda x: sharding.constrain(x, None), found)

    def validate(state: TrainState, frozen: Any) -> dict[str, float]:
        found = jax.device_get(measured(state.params["generator"], frozen))
        values = {name: float(np.mean(value)) for name, value in found.items()}
        stops = found["val_diversity"] < options.stop_diversity
        if options.stop_score:
            stops |= found["val_score"] >= options.stop_score
        if many(options):
            values |= {
                f"{name}/{style}": float(value)
                for name, each in found.items()
                for style, value in zip(style_names(options), each, strict=True)
            }
        return values | {"finished": bool(np.all(stops))}

    return validate


def style_names(options: Options) -> list[str]:
    """A name for each target, for its folder."""
    return [re.sub(r"[^\w-]+", "-", target).strip("-") for target in options.target]


def sharding_rules(options: Options) -> tuple:
    """The usual layouts; with several targets, everything of a style over `style`."""
    if not many(options):
        return sharding.RULES
    return (r"^(step|key|frozen/(base|clip|z))", P()), (r"", P("style"))


def read(args: list[str] | None) -> Options:
    """The options of a command line, over those of the weights, over a preset's.

    Raises:
      UserError: the weights recommend an option that does not exist.
    """
    options = parse(Options, __doc__, args)
    wanted: dict[str, Any] = {}
    if options.preset:
        wanted = dict(PRESETS[options.preset])
        print(f"preset {options.preset}: {as_flags(wanted)}", flush=True)
    elif options.ref:
        wanted = {"steps": PICTURE_STEPS}
    if options.profile and not options.clip:
        metadata = weights.read_config(options.weights)["metadata"]
        profile = dict(metadata.get("nada", {}))
        if options.ref:
            profile |= metadata.get("nada_pictures", {})
        elif len(options.target) == 1:
            target = re.sub("^an? ", "", options.target[0])
            profile |= metadata.get("nada_targets", {}).get(target, {})
        chooses = {"choose_steps", "improve_shape"} & wanted.keys()
        if chooses or options.choose_steps or options.improve_shape:
            profile.pop("phase", None)  # both choose the layers
        if profile:
            print(f"defaults of {options.weights}: {as_flags(profile)}", flush=True)
        wanted |= profile
    if not wanted:
        return options
    default = with_profile(Options(weights=options.weights), wanted, "nada")
    return parse(Options, __doc__, args, default)


def resolve(options: Options, size: int) -> Options:
    """Defaults that depend on other options and on the size of the pictures.

    Raises:
      UserError: values that cannot be.
    """
    if options.lambda_texture:
        raise UserError(
            "--lambda-texture is refused: the published code never hands a texture "
            "picture to this term, so no published result used it, and it needs CLIP's "
            "RN50; use --ref for a texture you have a picture of"
        )
    if bool(options.source) != bool(options.target):
        raise UserError("--source and --target go together; give both or neither")
    if not options.source and not options.ref:
        raise UserError(
            "nothing says where to go: give --source and --target, --ref, or --preset"
        )
    if not options.clip:
        clip = ("ViT-B/32", "ViT-B/16")
        if options.weights == weights.DEFAULT:
            clip = (SMALL_CLIP,)
        elif not options.improve_shape and not options.ref:
            clip = clip[:1]
        options = dataclasses.replace(options, clip=clip)
    if options.improve_shape:
        options = dataclasses.replace(
            options,
            choose_steps=options.choose_steps or 1,
            mixing=options.mixing or 0.9,
        )
    check_choice(options)
    rows = len(nada_layers.row_layers(size, "peer"))
    if not options.choose:
        options = dataclasses.replace(options, choose=2 * rows // 3)
    for flag, value, low, high in (
        ("--choose", options.choose, 1, rows),
        ("--choose-steps", options.choose_steps, 0, 1000),
        ("--choose-batch", options.choose_batch, 1, 1 << 16),
        ("--ref-batch", options.ref_batch, 1, 1 << 16),
        ("--validate-count", options.validate_count, 2, 1 << 16),
        ("--mixing", options.mixing, 0, 1),
    ):
        if not low <= value <= high:
            raise UserError(
                f"{flag} is {value}; it must be from {low} to {high} at {size} px"
            )
    stops = options.stop_score or options.stop_diversity
    if stops and not options.validate_every:
        raise UserError(
            "--stop-score and --stop-diversity look at fixed pictures: say how often, "
            "e.g. --validate-every 10"
        )
    if options.stop_score and not options.target:
        raise UserError("--stop-score compares with --target, which is not given")
    terms = dataclasses.asdict(options.terms)
    if not any(terms.values()):
        raise UserError("all --lambda-… are 0: there is nothing to learn from")
    if options.terms.lambda_crop and not (
        options.terms.lambda_direction or options.terms.lambda_global
    ):
        raise UserError(
            f"--lambda-crop is {options.terms.lambda_crop}, and on crops are the "
            "directional and the global loss, whose weights are 0: give one of them"
        )
    if options.terms.lambda_patch and size <= nada_losses.PATCH:
        raise UserError(
            f"--lambda-patch is {options.terms.lambda_patch}; its patches have "
            f"{nada_losses.PATCH} px and the pictures {size}: leave it 0"
        )
    texts = options.choose_steps or any(
        value
        for name, value in terms.items()
        if name not in ("lambda_direction", "lambda_global", "lambda_crop")
    )
    if texts and not options.source:
        raise UserError(
            "--source and --target are needed beside --ref: a choice of layers, "
            "--lambda-manifold and --lambda-patch compare with texts"
        )
    for name in ("clip_weights", "text_embeddings"):
        given = getattr(options, name)
        if given and len(given) != len(options.clip):
            raise UserError(
                f"--{name.replace('_', '-')} has {len(given)} entries for "
                f"{len(options.clip)} CLIP models; give one each"
            )
    check_targets(options)
    for path in options.ref:
        if not place(path).is_file():
            raise UserError(f"--ref {path} is not a file; give a picture")
    named = [p.stem for p in options.ref[:3]]
    texts = [options.source, *options.target[:3]] if not named else named
    return with_out(options, "nada-" + "-".join(texts))


def check_choice(options: Options) -> None:
    """Refuse what a choice of layers, or its absence, would ignore.

    Raises:
      UserError: naming the options.
    """
    if options.choose_steps:
        if options.phase != "default":
            chooses = "--improve-shape" if options.improve_shape else "--choose-steps"
            raise UserError(
                f"--phase is {options.phase}, but {chooses} chooses the layers anew "
                "in each step; leave one of them out"
            )
        return
    for name in ("choose", "choose_batch", "layer_map"):
        value, default = getattr(options, name), getattr(Options, name)
        if value != default:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} is {value}, but --choose-steps is 0: no layers are chosen; "
                f"add --choose-steps 1, or {flag} {default}"
            )


def check_targets(options: Options) -> None:
    """Refuse several targets that cannot be learned side by side.

    Raises:
      UserError: naming the option.
    """
    count, chips = len(options.target), options.run.mesh_style
    if many(options) and options.ref:
        raise UserError(
            "--ref is where one style goes; give it without several --target"
        )
    if options.patience and not many(options):
        raise UserError(
            "--patience is for several --target; --validate-every with --stop-score or "
            "--stop-diversity ends a single one"
        )
    if chips > 1 and count % chips:
        raise UserError(
            f"{count} --target do not divide over --mesh-style {chips}; give a "
            "multiple of it, or another mesh"
        )
    names = style_names(options)
    if alike := sorted({n for n in names if names.count(n) > 1 or not n}):
        raise UserError(
            f"--target has several for one folder {alike}; give each its own words"
        )


def load_judges(options: Options) -> list[Judge]:
    """The CLIP models."""
    files = options.text_embeddings or (None,) * len(options.clip)
    return [
        load_clip(
            source,
            vocabulary=options.vocabulary or None,
            texts=file,
            download=options.download,
            dtype=options.run.dtype,
        )
        for source, file in zip(options.clip, files, strict=True)
    ]


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.nada`."""
    options = read(args)
    mesh = start(options.run)
    model, params = weights.load(options.weights)
    generator = working(model["generator"], options.run)
    base = params["generator"]
    options = resolve(options, generator.size)
    judges = load_judges(options)
    metadata = {
        "scheme": "nada",
        "base": options.weights,
        "source": options.source,
        "target": ", ".join(options.target),
        "references": [str(p) for p in options.ref],
        "clip": list(options.clip),
    }
    identity = {"weights": weights.digest(base)} | {
        f"clip_{i}": weights.digest(judge.params["vision"])
        for i, judge in enumerate(judges)
    }
    if many(options):
        metadata["styles"] = style_names(options)
    if options.ref:
        identity["reference"] = references.digest(options.ref)
    check_folder(options, metadata, identity)
    frozen = frozen_of(options, generator, base, judges)
    modules = [judge.module for judge in judges]
    # Text towers and whatever else was loaded are not to stay in the device's memory.
    del judges, params
    tx = optimizer(options)
    rules = sharding_rules(options)

    def make(base, frozen):
        return start_state(options, base, tx), frozen

    if options.run.compile_for:
        state = jax.eval_shape(make, base, frozen)[0]
    else:
        state, frozen = sharding.built(make, mesh, rules, base, frozen)
    state = fit(
        options,
        state,
        frozen,
        [(1, make_step(options, generator, modules, tx))],
        None,
        networks={"generator": generator},
        mesh=mesh,
        metadata=metadata,
        identity=identity,
        sample=make_sample(options, generator),
        rules=rules,
        validate=(
            options.validate_every,
            make_validate(options, generator, modules),
        ),
    )
    which = options.run.out
    if many(options):
        folder, names = epath.Path(options.run.out) / "styles", metadata.pop("styles")
        each = {
            name: metadata | {"target": target}
            for name, target in zip(names, options.target, strict=True)
        }
        styles.write(folder, state, 0, each, {"generator": generator})
        which = folder / names[0]
    if jax.process_index() == 0:
        print(f"now: python -m jaxstyle.stylize me.jpg --weights {which}")


if __name__ == "__main__":
    main()
