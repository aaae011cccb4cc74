"""StyleCLIP's latent mapper, as StyleGAN-NADA trains it: codes follow a text.

Patashnik et al., "StyleCLIP", arXiv 2103.17249, section 5, with the norm term of Gal et
al., arXiv 2108.00946. For changes that a finetuned generator makes to a part of its
pictures only (the paper's dogs that became cats or did not), the mapper moves all codes
to where it does; on a generator that nobody finetuned it is an edit by a text.

1. w' = w + 0.1 M(w), x = G(w), x' = G(w'); G is frozen.
2. L = l_clip sum_m (1 - cos(E_m(x'), T_m(text))) + l_latent |w' - w|^2 / n
       + l_norm (|E_1(x')| - |E_1(x)|)^2 + l_id (1 - cos(R(x'), R(x))):
   CLIP's E and T, R an identity network; the text as it is, in no template.

    python -m train.mapper --weights runs/nada-dog-cat --target "a cat" --id-lambda 0
    python -m train.mapper --target "a pencil drawing" --clip clip_heads
    python -m jaxstyle.stylize me.jpg --weights runs/sketch --mapper runs/mapper-x

The codes are random w truncated by --psi, new ones in each step (the published code
draws 5000 once), or those of --codes. Defaults are the published ones, but for what the
network's first operation divides by (--norm) and how pictures are made small for CLIP
(--view); both have the published way as an option. A few thousand steps are a start.

Look at samples/: above G(w), below G(w').
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxstyle import losses, pipeline, weights
from jaxstyle.errors import UserError, cli
from jaxstyle.features.clip import mapper_view, normalise
from jaxstyle.features.clip_text import Judge
from jaxstyle.features.judges import choose
from jaxstyle.mapper import GROUPS, Mapper
from jaxstyle.stylegan2 import Generator
from train import optim, sharding
from train.cli import RunOptions, Shared, parse, start, with_out, working
from train.loop import check_folder, fit
from train.nada import SMALL_CLIP, load_judges
from train.nada_losses import to_text
from train.state import TrainState, create_state

SHOWN = 5
VIEW_SIZE = 224


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of train.mapper; the defaults are the published ones."""

    target: str
    """What the pictures are to be, in words: "a cat", "an old man"."""
    weights: str = weights.DEFAULT
    """The generator, whose codes move: a name we ship, a folder, or a run."""
    clip: tuple[str, ...] = ()
    """CLIP models, as in train.nada. Not given: ViT-B/32 and ViT-B/16 as published; for
    the model in the package the small one beside it."""
    clip_weights: tuple[float, ...] = ()
    """Weight of each model's loss; not given: 1."""
    text_embeddings: tuple[Path, ...] = ()
    """Files of python -m train.nada_text, one a CLIP model: no text tower is loaded."""
    vocabulary: str = ""
    """Tokenizer files, see train.nada_text."""
    download: bool = False
    """Fetch hub ids that are not in the local cache."""
    codes: str = ""
    """Codes to move instead of random ones: an .npz of jaxstyle.invert."""
    psi: float = 0.7
    """Truncation of random codes."""
    groups: tuple[Literal[GROUPS], ...] = GROUPS
    """Rows that move: coarse, middle, fine."""
    norm: Literal["width", "rows"] = "width"
    """What a code is divided by first: the length of each row; or as published over the
    rows, which leaves of a w nothing but signs."""
    view: Literal["clip", "styleclip"] = "clip"
    """How CLIP sees pictures: as it was trained; or as published, repeated and averaged
    to 224 px, in [-1, 1]."""
    clip_lambda: float = 1.0
    """Weight of the distance to the text."""
    id_lambda: float = 0.1
    """Weight of the change of identity; 0 for anything but faces."""
    latent_l2_lambda: float = 0.8
    """Weight of the squared move of the codes."""
    norm_lambda: float = 0.5
    """Weight of the squared change of the length of the first CLIP's vector."""
    identity_net: str = ""
    """Identity network; empty: weights/arcface if there, else the one we ship."""
    lr: float = 0.5
    """Rate; the layers' weights count a hundredth of it."""
    optim: Literal["ranger", "adam"] = "ranger"
    """Optimiser."""
    validate_every: int = 1000
    """Steps between losses on fixed codes; the state with the lowest `val_loss` is kept
    in OUT/best. 0: only at the end."""
    validate_count: int = 8
    """Fixed codes."""
    run: Shared = RunOptions(
        steps=50_000, batch=2, log_every=50, sample_every=500, save_every=2000
    )


def embedded(options: Options, module: Any, params: Any, pictures: Array) -> Array:
    """CLIP's vectors [batch, embed_dim] of pictures, not normalised."""
    if options.view == "styleclip":
        pixels = mapper_view(pictures)
    else:
        pixels = module.apply({"params": params}, pictures, method="prepare")
    return module.apply(
        {"params": params}, pixels, options.run.remat, method="encode_image"
    )


def loss_fn(
    params: Any,
    frozen: Mapping[str, Any],
    codes: Array,
    *,
    options: Options,
    mapper: Mapper,
    generator: Generator,
    modules: Sequence[Any],
    identity: Any,
) -> tuple[Array, dict[str, Array]]:
    """The loss of moved codes, and its terms by name, without weights.

    Args:
      params: of the mapper.
      frozen: `generator`, `clip` and `text` (unit vectors [1, embed_dim]) by number,
        and `identity` where it has a weight.
      codes: w+ [batch, num_ws, w_dim].
      options: of the scheme.
      mapper, generator, modules, identity: architectures.
    """
    moved = mapper.apply({"params": params}, codes)

    def draw(codes):
        variables = {"params": frozen["generator"]}
        return generator.apply(variables, codes, space="w_plus")[0]

    after, terms, total = draw(moved), {}, jnp.zeros(())
    before = jax.lax.stop_gradient(draw(codes))
    seen = [
        embedded(options, module, frozen["clip"][str(i)], after)
        for i, module in enumerate(modules)
    ]
    given = options.clip_weights or (1.0,) * len(modules)
    if options.clip_lambda:
        terms["clip"] = sum(
            weight * to_text(normalise(x), frozen["text"][str(i)])
            for i, (x, weight) in enumerate(zip(seen, given, strict=True))
        )
        total += options.clip_lambda * terms["clip"]
    if options.latent_l2_lambda:
        terms["latent"] = jnp.mean(jnp.square(moved - codes))
        total += options.latent_l2_lambda * terms["latent"]
    if options.norm_lambda:
        start = embedded(options, modules[0], frozen["clip"]["0"], before)
        lengths = [jnp.linalg.norm(x, axis=-1) for x in (start, seen[0])]
        terms["norm"] = jnp.mean(jnp.square(lengths[1] - lengths[0]))
        total += options.norm_lambda * terms["norm"]
    if options.id_lambda:
        faces = [
            identity.apply({"params": frozen["identity"]}, x, method="embed")
            for x in (after, before)
        ]
        terms["id"] = losses.identity(*faces)
        total += options.id_lambda * terms["id"]
    return total, terms


def drawn_codes(
    options: Options, generator: Generator, frozen: Any, key: Array, count: int
) -> Array:
    """Codes w+ [count, num_ws, w_dim] of a step: random ones, or some of `--codes`."""
    if "codes" in frozen:
        chosen = jax.random.randint(key, (count,), 0, len(frozen["codes"]))
        return sharding.constrain(frozen["codes"][chosen])
    z = sharding.sample_normal(key, count, generator.z_dim)
    _, out = generator.apply({"params": frozen["generator"]}, z, psi=options.psi)
    return out["w_plus"]


def make_step(options: Options, tx: Any, networks: Mapping[str, Any]):
    """The step of the scheme; `networks` are the architectures of `loss_fn`."""

    def step(state: TrainState, frozen: Any, _: Any) -> tuple[TrainState, dict]:
        codes = drawn_codes(
            options, networks["generator"], frozen, state.key, options.run.batch
        )
        (loss, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params["mapper"], frozen, codes, options=options, **networks
        )
        params, opt_state = optim.apply(
            tx, grads, state.opt_state["mapper"], state.params["mapper"]
        )
        state = state.replace(
            params={"mapper": params}, opt_state={"mapper": opt_state}
        )
        return state, {"loss": loss} | terms

    return step


def make_validate(options: Options, networks: Mapping[str, Any]):
    """The loss on fixed codes."""

    @jax.jit
    def measure(params, frozen):
        loss, terms = loss_fn(
            params,
            frozen,
            sharding.constrain(frozen["fixed"]),
            options=options,
            **networks,
        )
        return {"val_loss": loss} | {f"val_{k}": v for k, v in terms.items()}

    def validate(state: TrainState, frozen: Any) -> dict[str, float]:
        values = measure(state.params["mapper"], frozen)
        return {name: float(value) for name, value in values.items()}

    return validate


def make_sample(mapper: Mapper, generator: Generator):
    """Pictures of fixed codes above, of the moved ones below."""

    def sample(state: TrainState, frozen: Any) -> Array:
        codes = frozen["fixed"][:SHOWN]
        moved = mapper.apply({"params": state.params["mapper"]}, codes)
        variables = {"params": frozen["generator"]}
        return jnp.stack(
            [generator.apply(variables, c, space="w_plus")[0] for c in (codes, moved)]
        )

    return sample


def resolve(options: Options) -> Options:
    """Defaults that depend on other options.

    Raises:
      UserError: values that cannot be.
    """
    if not options.target.strip():
        raise UserError('--target is empty; say what to become, such as "a cat"')
    if not options.clip:
        clip = ("ViT-B/32", "ViT-B/16")
        if options.weights == weights.DEFAULT:
            clip = (SMALL_CLIP,)
        options = dataclasses.replace(options, clip=clip)
    for name in ("clip_weights", "text_embeddings"):
        given = getattr(options, name)
        if given and len(given) != len(options.clip):
            raise UserError(
                f"--{name.replace('_', '-')} has {len(given)} entries for "
                f"{len(options.clip)} CLIP models; give one each"
            )
    if not options.clip_lambda:
        raise UserError("--clip-lambda is 0: there is no text to follow")
    for name in ("validate_count", "validate_every"):
        value, low = getattr(options, name), int(name == "validate_count")
        if value < low:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {value}; it must be at least {low}")
    if not options.groups:
        raise UserError(f"--groups is empty; give some of {', '.join(GROUPS)}")
    return with_out(options, f"mapper-{options.target}")


def check_view(options: Options, judges: Sequence[Judge]) -> None:
    """Refuse StyleCLIP's view for other CLIP models than those it was made for.

    Raises:
      UserError: a model that reads pictures of another size.
    """
    if options.view == "clip":
        return
    for name, judge in zip(options.clip, judges, strict=True):
        if judge.module.image_size != VIEW_SIZE:
            raise UserError(
                f"--view is styleclip, which makes pictures of {VIEW_SIZE} px, but "
                f"--clip {name} reads {judge.module.image_size}: leave --view at clip"
            )


def frozen_of(
    options: Options, generator: Generator, base: Any, judges: Sequence[Judge]
) -> dict[str, Any]:
    """What a run never changes: generator, CLIP's vision towers, texts, codes."""
    frozen = {
        "generator": base,
        "clip": {
            str(i): {"vision": judge.params["vision"]} for i, judge in enumerate(judges)
        },
        "text": {
            str(i): normalise(judge.encode_texts([options.target]))
            for i, judge in enumerate(judges)
        },
    }
    if options.codes:
        codes, space = pipeline.read_codes(options.codes, generator)
        if space == "styles":
            raise UserError(f"--codes {options.codes} holds style vectors, not codes")
        frozen["codes"] = jnp.asarray(pipeline.to_w_plus(generator, base, codes, space))
    key = jax.random.fold_in(jax.random.key(options.run.seed), 1)
    count = max(options.validate_count, SHOWN)
    frozen["fixed"] = jax.jit(partial(drawn_codes, options, generator, count=count))(
        frozen, key
    )
    return frozen


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.mapper`."""
    options = resolve(parse(Options, __doc__, args))
    mesh = start(options.run)
    model, params = weights.load(options.weights)
    generator, base = working(model["generator"], options.run), params["generator"]
    judges = load_judges(options)
    check_view(options, judges)
    mapper = Mapper(
        num_ws=generator.num_ws,
        w_dim=generator.w_dim,
        groups=options.groups,
        norm=options.norm,
    )
    metadata = {
        "scheme": "mapper",
        "base": options.weights,
        "target": options.target,
        "clip": list(options.clip),
    }
    identity = {"weights": weights.digest(base)} | {
        f"clip_{i}": weights.digest(judge.params["vision"])
        for i, judge in enumerate(judges)
    }
    check_folder(options, metadata, identity)
    frozen = frozen_of(options, generator, base, judges)
    face = None
    if options.id_lambda:
        face = choose("identity", options.identity_net)
        frozen["identity"] = face.params
    networks = {
        "mapper": mapper,
        "generator": generator,
        "modules": [judge.module for judge in judges],
        "identity": face and face.module,
    }
    # Text towers are not to stay in the device's memory.
    del judges, params
    tx = optim.ranger(options.lr)
    if options.optim == "adam":
        tx = optax.adam(options.lr)
    key = jax.random.key(options.run.seed)
    fit(
        options,
        create_state({"mapper": mapper.init_params(key=key)}, {"mapper": tx}, key=key),
        frozen,
        [(1, make_step(options, tx, networks))],
        None,
        networks={"mapper": mapper},
        mesh=mesh,
        metadata=metadata,
        identity=identity,
        sample=make_sample(mapper, generator),
        validate=(options.validate_every, make_validate(options, networks)),
    )
    if jax.process_index() == 0:
        print(
            f"now: python -m jaxstyle.generate --weights {options.weights} --mapper "
            f"{options.run.out}"
        )


if __name__ == "__main__":
    main()
