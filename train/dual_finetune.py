"""DualStyleGAN, stage 3: the extrinsic path learns the style of a set of portraits.

Yang et al., "Pastiche Master" (arXiv 2203.13248), section 3.3. Two kinds of iterations
take turns; e is an exemplar's code in w+, jittered by N(0, 0.1²), S its portrait, z a
random face (of two codes in 9 of 10 batches), i the portrait's face without the style
with its rows from 8 on drawn anew:

    unpaired, G(z, e)
    paired,   G(i, e)   + λ_perc (0.5 ‖f₂(G) - f₂(S)‖₁ + ‖f₃(G) - f₃(S)‖₁)
    both      λ_adv · non-saturating loss
              + λ_CX · contextual loss (f₃, h = 0.2)
              + λ_FM · mean square of the difference of their mean f₂, and of mean f₃
              + λ_ID · (1 - cos) of G's face and the one drawn without the exemplar
              + λ_reg · Σ ‖W‖ over the extrinsic path's arrays but T_s

f₂, f₃ are relu2_1 and relu3_1 of VGG-19 at 256 px. D, R1 and the path length are those
of train.dual_steps; D sees random portraits, in paired iterations S.

    python -m train.dual_finetune --weights runs/pretrain --exemplars runs/codes \\
        --data portraits --id-lambda 1 --reg-lambda 0.015 --batch 32 --accumulate 8

The two weights tuned for a style are λ_ID (more keeps the face) and λ_reg (more keeps
the shapes). Published for cartoon: 1 and 0.015, 1400 iterations of 32 pictures, a
checkpoint every 100 to choose from. Said of the paper, not checked: caricature 4 and
0.005, anime 1 and 0.02.

Where paper and code differ, the code is followed but in this:

- The norms are those of T_c too, most of the sum at the start; `--reg-on modres` takes
  the residual blocks alone, which the paper names.
- The picture without the exemplar mixes its two codes at the same row as G's; published
  is a row of its own, so that identity is asked of other faces: `--crossover separate`.
- The average includes T_s, see train.dual_steps; `--ema published`.
- In an iteration D and G see the same exemplars; published: two draws.

`--no-paired` and `--reg-lambda 0` are the paper's ablations. Look at samples/: the
portraits, faces, and these in the portraits' styles; after too long a run all faces are
the portraits'.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import PurePath
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array

from jaxstyle import images, losses, weights
from jaxstyle.dualstylegan import to_w_plus
from jaxstyle.errors import UserError, cli
from jaxstyle.exemplars import Exemplars
from jaxstyle.features import judges
from jaxstyle.paths import place
from train import data, dual_steps, loop, sharding
from train.cli import RunOptions, Shared, parse, start, with_out
from train.dual_steps import Adversarial, AdversarialOptions, Codes, Rows, Setup
from train.state import TrainState

SAMPLES = 6


@dataclasses.dataclass(frozen=True)
class Options:
    """Stage 3 of DualStyleGAN."""

    data: str
    """Folder with the portraits that the exemplars are named after."""
    weights: str
    """Run of stage 2, or a converted DualStyleGAN with its discriminator."""
    exemplars: str = ""
    """Folder with their codes, as train.destylize writes; empty: --weights."""
    id_lambda: float = 1.0
    """λ_ID, weight of the identity loss."""
    reg_lambda: float = 0.01
    """λ_reg, weight of the norms; 0: none (an ablation of the paper's)."""
    adv_lambda: float = 1.0
    """Weight of the adversarial losses."""
    perceptual_lambda: float = 1.0
    """λ_perc, weight of the perceptual loss of paired iterations."""
    cx_lambda: float = 0.25
    """λ_CX, weight of the contextual loss."""
    fm_lambda: float = 0.25
    """λ_FM, weight of the feature matching."""
    paired: bool = True
    """Also pair exemplars with their own faces."""
    unpaired_every: int = 2
    """Iterations between unpaired ones; the others are paired."""
    reg_on: Literal["path", "modres"] = "path"
    """Norms of the whole path but T_s, or of the residual blocks alone."""
    crossover: Literal["shared", "separate"] = "shared"
    """Row at which two codes of a face mix: one for the picture and for the face that
    its identity is compared with, or one each, as published."""
    jitter: float = 0.1
    """Deviation of the noise on an exemplar's code, in w+."""
    color_from: int = 8
    """Rows of a paired face's code from this on are drawn anew; published: 8, where
    the color rows begin with 7."""
    perceptual_net: str = ""
    """Trunk that sees the pictures: vgg19, vgg16, alexnet or a folder; empty: VGG-19,
    or AlexNet, which ships with us."""
    identity_net: str = ""
    """Identity network; empty: weights/arcface if there, else the one that ships."""
    adversarial: Adversarial = AdversarialOptions()
    mirror: bool = True
    """Flip the portraits that D sees in unpaired iterations at random."""
    reading: data.Reading = data.ReadOptions()
    run: Shared = RunOptions(
        steps=1500, batch=32, log_every=10, sample_every=100, save_every=100, keep=5
    )


# Data


class Portraits(Sequence):
    """The exemplars' numbers, and their portraits, read at first use, as uint8.

    Args:
      files: in the exemplars' order.
      size: pixels a side.
      least: the sequence repeats until it is this long.
    """

    def __init__(self, files: Sequence[epath.Path], size: int, least: int = 1):
        self.files, self.size = list(files), size
        self.repeats = -(-least // len(self.files))
        self.kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.files) * self.repeats

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return np.int32(index % len(self.files))

    def picture(self, index: int) -> np.ndarray:
        """The portrait of an exemplar, float32 [size, size, 3] in [-1, 1]."""
        if index not in self.kept:
            picture = images.to_array(images.open_image(self.files[index]), self.size)
            self.kept[index] = images.to_uint8(picture)
        return self.kept[index].astype(np.float32) / 127.5 - 1

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.files[index % len(self.files)])

    def stamp(self) -> str:
        """Names and sizes of the files."""
        return " ".join(f"{f.name} {f.stat().length}" for f in self.files)


def open_portraits(
    folder: str, names: Sequence[str], size: int, least: int = 1
) -> Portraits:
    """The portraits of exemplars, by name.

    Raises:
      UserError: some have none.
    """
    files = [place(folder) / name for name in names]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise UserError(
            f"--data {folder} has no picture for {len(missing)} of the {len(files)} "
            f"exemplars, the first {missing[0]}; their names are those of the files "
            "that train.destylize read"
        )
    return Portraits(files, size, least)


def with_other(
    index: np.ndarray, rng: np.random.Generator, portraits: Portraits, mirror: bool
) -> dict[str, np.ndarray]:
    """An exemplar's `index` and `image`, and any portrait as `real`."""
    real = portraits.picture(int(rng.integers(len(portraits.files))))
    flip = mirror and rng.random() < 0.5
    return {
        "index": index,
        "image": portraits.picture(int(index)),
        "real": real[:, ::-1] if flip else real,
    }


# Draws


def is_paired(options: Options, step: Array) -> Array:
    """Whether an iteration is a paired one: []."""
    if not options.paired:
        return jnp.zeros((), bool)
    return step % options.unpaired_every > 0


def real_of(options: Options, state: TrainState, batch: Any) -> Array:
    """The real pictures of an iteration: [batch, size, size, 3]."""
    paired = is_paired(options, state.step)
    return jnp.where(paired, batch["image"], batch["real"])


def draw(
    setup: Setup, options: Options, state: TrainState, frozen: Any, batch: Any
) -> Rows:
    """Faces and jitter of the batch's exemplars, [batch, ...]; `real` and `image`."""
    del frozen
    keys, count, generator = (
        jax.random.split(state.key, 5),
        setup.batch,
        setup.generator,
    )
    rows = dual_steps.draw_mixed(setup, keys[0], count)
    other = dual_steps.draw_mixed(setup, keys[1], count)["mix_from"]
    colors = generator.num_ws - options.color_from
    del rows["path"]
    return rows | {
        "other_mix_from": other,
        "colors": sharding.sample_normal(keys[2], count, colors, generator.z_dim),
        "plain_keys": sharding.sample_keys(keys[3], count),
        "jitter": draw_jitter(setup, options, keys[4], count),
        "index": batch["index"].reshape(-1),
        "image": batch["image"],
        "real": real_of(options, state, batch),
    }


def draw_jitter(setup: Setup, options: Options, key: Array, count: int) -> Array:
    """Noise on exemplars' codes in w+, [count, num_ws, w_dim]."""
    shape = setup.generator.num_ws, setup.generator.w_dim
    return options.jitter * sharding.sample_normal(key, count, *shape)


def draw_path(
    setup: Setup, options: Options, state: TrainState, frozen: Any, batch: Any
) -> Rows:
    """Faces, and any exemplars."""
    del batch
    keys, count = jax.random.split(state.key, 3), dual_steps.path_rows(setup)
    exemplars = len(frozen["codes"]["extrinsic"])
    pick = partial(jax.random.randint, shape=(), minval=0, maxval=exemplars)
    return dual_steps.draw_mixed(setup, keys[0], count) | {
        "index": jax.vmap(pick)(sharding.sample_keys(keys[1], count)),
        "jitter": draw_jitter(setup, options, keys[2], count),
    }


def unpaired_codes(setup: Setup, rows: Rows, state: TrainState, frozen: Any) -> Codes:
    """Random faces and the rows' exemplars."""
    base = state.params["generator"]
    extrinsic = frozen["codes"]["extrinsic"][rows["index"]] + rows["jitter"]
    intrinsic = dual_steps.mixed(setup.generator, base, rows)
    return Codes(intrinsic, extrinsic, rows["keys"])


def to_codes(
    setup: Setup, options: Options, rows: Rows, state: TrainState, frozen: Any
) -> Codes:
    """The codes that G draws from: the exemplars' own faces in paired iterations."""
    codes = unpaired_codes(setup, rows, state, frozen)
    if not options.paired:
        return codes
    z_plus = frozen["codes"]["intrinsic"][rows["index"]]
    z_plus = jnp.concatenate([z_plus[:, : options.color_from], rows["colors"]], 1)
    own = to_w_plus(setup.generator, state.params["generator"], z_plus, "z_plus")
    paired = is_paired(options, state.step)
    return codes._replace(intrinsic=jnp.where(paired, own, codes.intrinsic))


def plain_codes(
    setup: Setup, options: Options, rows: Rows, state: TrainState, codes: Codes
) -> Codes:
    """The codes of the same faces without an exemplar."""
    intrinsic = codes.intrinsic
    if options.crossover == "separate":
        base = state.params["generator"]
        other = dual_steps.mixed(setup.generator, base, rows, "other_mix_from")
        paired = is_paired(options, state.step)
        intrinsic = jnp.where(paired, intrinsic, other)
    return Codes(intrinsic, None, rows["plain_keys"])


# Steps


def norms(options: Options, params: Any) -> Array:
    """The regulariser: []."""
    wanted = ("modres", "color") if options.reg_on == "path" else ("modres",)
    return losses.parameter_norms(
        {n: p for n, p in params.items() if n.startswith(wanted)}
    )


def picture_losses(
    options: Options, seen: Any, wanted: Any, paired: Array | bool
) -> dict[str, Array]:
    """The losses on features, weighted: `perceptual`, `cx`, `fm`."""
    terms = {}
    if options.paired and options.perceptual_lambda:
        value = losses.perceptual(seen, wanted, losses.STYLE_TAPS)
        terms["perceptual"] = jnp.where(paired, options.perceptual_lambda * value, 0.0)
    if options.cx_lambda:
        tap = losses.CX_TAP
        terms["cx"] = options.cx_lambda * losses.contextual(seen[tap], wanted[tap])
    if options.fm_lambda:
        terms["fm"] = options.fm_lambda * losses.feature_matching(seen, wanted)
    return terms


def g_step(setup: Setup, options: Options, features, identity, optimizers, draw):
    """The step of G, of both kinds."""

    def step(state, frozen, batch):
        rows = {**draw(state, frozen, batch), **dual_steps.show_keys(setup, state)}
        base, show = state.params["generator"], dual_steps.shower(setup, state)
        paired = is_paired(options, state.step)

        def see(images):
            return features.apply({"params": frozen["features"]}, images)

        def embed(images):
            variables = {"params": frozen["identity"]}
            return identity.apply(variables, images, method="embed")

        def gradients(rows):
            codes = to_codes(setup, options, rows, state, frozen)
            wanted = see(dual_steps.judged(setup, rows["image"]))
            face = None
            if options.id_lambda:
                plain = plain_codes(setup, options, rows, state, codes)
                face = dual_steps.pictures(setup, None, base, plain)
                face = embed(dual_steps.judged(setup, face))

            def loss(params):
                fake = dual_steps.pictures(setup, params, base, codes)
                logits, _ = setup.discriminator.apply(
                    {"params": state.params["discriminator"]},
                    show(fake, rows.get("show_made")),
                )
                terms = {
                    "g_loss": options.adv_lambda * jnp.mean(jax.nn.softplus(-logits))
                }
                small = dual_steps.judged(setup, fake)
                terms |= picture_losses(options, see(small), wanted, paired)
                if options.id_lambda:
                    value = losses.identity(embed(small), face)
                    terms["identity"] = options.id_lambda * value
                if options.reg_lambda:
                    terms["norms"] = options.reg_lambda * norms(options, params)
                return sum(terms.values()), terms

            return jax.grad(loss, has_aux=True)(state.params["dual_trained"])

        parts = options.adversarial.accumulate
        grads, out = dual_steps.in_parts(gradients, rows, parts)
        state = dual_steps.update(optimizers, state, "dual_trained", grads)
        return state, dual_steps.averaged(out)

    return step


def schedule(
    setup: Setup,
    options: Options,
    features: Any,
    identity: Any,
    optimizers: Any,
    *,
    draw: Any = draw,
    draw_path: Any = draw_path,
) -> list[tuple[int, loop.Step]]:
    """The entries D, R1, G, path length, average for `fit`."""
    draw, draw_path = (partial(f, setup, options) for f in (draw, draw_path))
    codes, shared = partial(to_codes, setup, options), setup.options
    return [
        (1, dual_steps.d_step(setup, optimizers, draw, codes)),
        (
            shared.d_reg_every,
            dual_steps.r1_step(setup, optimizers, partial(real_of, options)),
        ),
        (1, g_step(setup, options, features, identity, optimizers, draw)),
        (
            shared.g_reg_every,
            dual_steps.path_step(
                setup, optimizers, draw_path, partial(unpaired_codes, setup)
            ),
        ),
        (1, dual_steps.ema_step(setup)),
    ]


# Set-up


def make_sample(setup: Setup):
    """Portraits, fixed faces, and these in the portraits' style, by the average."""

    def sample(state: TrainState, frozen: Any) -> Array:
        base, shown = state.params["generator"], frozen["preview"]
        extrinsic = frozen["codes"]["extrinsic"][: len(shown)]
        z = jax.random.normal(jax.random.key(0), (len(shown), setup.generator.z_dim))
        face = 0.7 * dual_steps.rows_of_w(setup.generator, base, z)
        plain, made = (
            dual_steps.pictures(setup, params, base, Codes(face, extrinsic, None))
            for params in (None, state.ema["dual"])
        )
        return jnp.stack([shown, plain, made])

    return sample


def load_exemplars(options: Options, generator: Any) -> tuple[Exemplars, Any]:
    """The exemplars' table and its codes.

    Raises:
      UserError: none there, of another generator, or without what training needs.
    """
    where = options.exemplars or options.weights
    if "exemplars" not in weights.read_config(where)["networks"]:
        raise UserError(
            f"{where} holds no exemplars; name the folder of train.destylize with "
            "--exemplars"
        )
    model, params = weights.load(where)
    module, codes = model.exemplars, params["exemplars"]
    if (module.num_ws, module.z_dim) != (generator.num_ws, generator.z_dim):
        raise UserError(
            f"the exemplars of {where} have {module.num_ws} rows of {module.z_dim}; "
            f"the generator takes {generator.num_ws} of {generator.z_dim}"
        )
    needed = ["extrinsic", *(["intrinsic"] if options.paired else [])]
    if lacking := [n for n in needed if n not in codes]:
        raise UserError(
            f"the exemplars of {where} have no {' and no '.join(lacking)} codes; run "
            "train.destylize" + (", or --no-paired" if "intrinsic" in lacking else "")
        )
    return module, codes


def check(options: Options, num_ws: int) -> None:
    """Refuse values that cannot be.

    Raises:
      UserError: naming the option.
    """
    if options.unpaired_every < 1:
        raise UserError(
            f"--unpaired-every is {options.unpaired_every}; it must be at least 1 "
            "(--no-paired: all are)"
        )
    if not 1 <= options.color_from <= num_ws:
        raise UserError(
            f"--color-from is {options.color_from}; it must be 1 to {num_ws} (no row)"
        )
    for name in ("id", "reg", "adv", "perceptual", "cx", "fm"):
        if getattr(options, f"{name}_lambda") < 0:
            value = getattr(options, f"{name}_lambda")
            raise UserError(f"--{name}-lambda is {value}; it must not be negative")


def train(options: Options, mesh: Any) -> TrainState:
    """The whole run; what `main` calls after reading the command line."""
    run, shared = options.run, options.adversarial
    dual_steps.check(shared, run, mesh)
    networks, params = dual_steps.load_networks(options.weights, run)
    generator = networks["generator"]
    check(options, generator.num_ws)
    exemplars, codes = load_exemplars(options, generator)
    portraits = open_portraits(
        options.data, exemplars.names, generator.size, least=run.batch
    )
    trunk = judges.choose_features(options.perceptual_net, run.dtype)
    frozen = {"features": trunk.params}
    identity = None
    if options.id_lambda:
        judge = judges.choose("identity", options.identity_net, run.dtype)
        identity, frozen["identity"] = judge.module, judge.params
    digests = {
        "weights": weights.digest(params),
        "exemplars": weights.digest(codes),
        "judges": weights.digest(frozen),
        "data": data.fingerprint(portraits),
    }
    base = params["generator"]
    mapped = jax.jit(partial(to_w_plus, generator, space="z_plus"))
    frozen["codes"] = {"extrinsic": mapped(base, codes["extrinsic"])}
    if options.paired:
        frozen["codes"]["intrinsic"] = codes["intrinsic"]
    count = min(SAMPLES, len(portraits.files))
    frozen["preview"] = jnp.stack([portraits.picture(i) for i in range(count)])
    batches = data.batches(
        portraits,
        run.batch,
        mesh,
        seed=run.seed,
        transform=partial(with_other, portraits=portraits, mirror=options.mirror),
        reading=options.reading,
    )
    setup = Setup(
        shared,
        run.batch,
        options.adv_lambda,
        *(networks[n] for n in ("generator", "dual", "discriminator")),
    )
    optimizers = dual_steps.make_optimizers(shared)
    networks["exemplars"], params["exemplars"] = exemplars, codes
    return loop.fit(
        options,
        dual_steps.make_state(shared, run, params, optimizers),
        frozen,
        schedule(setup, options, trunk.module, identity, optimizers),
        batches,
        networks=networks,
        mesh=mesh,
        metadata={"scheme": "dual_finetune", "base": options.weights},
        sample=make_sample(setup),
        identity=digests,
    )


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.dual_finetune`."""
    options = parse(Options, __doc__, args)
    options = with_out(options, f"dual-{PurePath(options.data).name}")
    train(options, start(options.run))
    if jax.process_index() == 0:
        print(
            "now: python -m jaxstyle.stylize me.jpg --style-id 0 --weights "
            f"{options.run.out}; python -m train.refine_exstyle makes its codes better"
        )


if __name__ == "__main__":
    main()
