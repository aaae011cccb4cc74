"""DualStyleGAN, stages 1 and 2: an extrinsic path that mixes styles as StyleGAN2 does.

Yang et al., "Pastiche Master" (arXiv 2203.13248), section 3.3.

- Stage 1 trains nothing: the path is made so that it changes next to nothing, and the
  network gives about the style mixing of both codes from row 7 on. `--steps 0` writes
  that as a style; with `--init-noise 0` it is style mixing exactly.
- Stage 2 learns, on faces, to give what style mixing from row l on gives, so that the
  structure of the second code reaches the residual blocks. With codes z1, z2:

      D      0.1 · logistic loss
      R1     every 16 iterations, in full
      G      0.1 · non-saturating loss + Σ 0.5 ‖f(G) - f(g(z1, z2; l))‖₁
             f: relu1_1, relu2_1, relu3_1 of VGG-19 at 256 px
      path   every 4 iterations, in full, in the intrinsic codes

  l is 7 for a twelfth of the iterations, 6 for the next, then 5 (published: 300, 300,
  3000). In every fourth iteration the second code is not that of z2 but what the
  encoder says of its picture, E(g(z2)) in z+, as exemplars are given later.

    python -m train.dual_pretrain --weights weights/ffhq --encoder weights/psp-z-plus \\
        --data ffhq --out runs/pretrain
    python -m train.dual_pretrain --weights weights/ffhq --steps 0 --out runs/stage1

Where paper and code differ, the code is followed: it draws the crossover's target with
other layer noise than the network's picture, passes the color rows of the mix through
T_c, and begins the running mean of path lengths anew with every l. The paper's ablation
without the progress of l is `--no-progressive` (l = 5 at once); that without stage 2 is
`--steps 0`. D and G draw their codes separately here; published: the same.

Look at samples/: z1's faces, those of z2, their mix from row l on, and what we draw,
which should stay like the mix as l goes down. The published batch is 4, on one device.
"""

import dataclasses
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxstyle import losses, weights
from jaxstyle.dualstylegan import to_w_plus
from jaxstyle.encoders import adaptive_pool, encode
from jaxstyle.encoding import Encoder
from jaxstyle.errors import UserError, cli
from jaxstyle.features import judges
from train import data, dual_steps, loop, sharding
from train.cli import RunOptions, Shared, parse, start, with_out
from train.dual_steps import Adversarial, AdversarialOptions, Codes, Rows, Setup
from train.state import TrainState

# Of the whole run a twelfth is at l = 7, and one at 6.
SHARE = 12
LAST_ROW = 5
SAMPLES = 5


@dataclasses.dataclass(frozen=True)
class Options:
    """Stage 2 of DualStyleGAN; --steps 0: stage 1."""

    reading: data.Reading = data.ReadOptions()
    data: str = ""
    """Faces: a folder, .npy file, tfds:NAME:SPLIT, or what train.prepare wrote."""
    weights: str = weights.DEFAULT
    """Generator of faces, and its discriminator if it is there."""
    encoder: str = ""
    """Folder of an encoder to z+; empty: that beside the generator, or named by it."""
    encoder_every: int = 4
    """Iterations between those whose second code is the encoder's; 0: never, and no
    encoder is needed."""
    init_noise: float = 0.01
    """Scale of what a fresh path adds; 0: style mixing exactly."""
    progressive: bool = True
    """Mix from row 7 on, then 6, then 5; without: from 5 on at once."""
    adv_lambda: float = 0.1
    """Weight of the adversarial losses."""
    perceptual_lambda: float = 1.0
    """Weight of the perceptual loss."""
    perceptual_net: str = ""
    """Trunk that sees the pictures: vgg19, vgg16, alexnet or a folder; empty: VGG-19,
    or AlexNet, which ships with us."""
    adversarial: Adversarial = AdversarialOptions()
    mirror: bool = True
    """Flip faces at random."""
    run: Shared = RunOptions(
        steps=3600, batch=4, log_every=50, sample_every=300, save_every=600
    )


def stage_starts(options: Options) -> tuple[int, int]:
    """Iterations with which l = 6 and l = 5 begin."""
    part = options.run.steps // SHARE if options.progressive else 0
    return part, 2 * part


def first_row(options: Options, step: Array) -> Array:
    """l, the first row of the mix that is the second code's, in an iteration: []."""
    six, five = stage_starts(options)
    return LAST_ROW + (step < six).astype(int) + (step < five).astype(int)


def path_mean(options: Options, state: TrainState) -> Array:
    """The running mean of path lengths, which begins at 0 with every l."""
    every = options.adversarial.g_reg_every
    fresh = jnp.zeros((), bool)
    for first in stage_starts(options):
        fresh |= (state.step >= first) & (state.step < first + every)
    return jnp.where(fresh, 0.0, state.extra["path_mean"])


def draw(setup: Setup, state: TrainState, frozen: Any, batch: Any) -> Rows:
    """Codes `z1`, `z2` and keys of noise; the faces of the iteration, `real`."""
    del frozen
    keys = jax.random.split(state.key, 5)
    count, width = setup.batch, setup.generator.z_dim
    return {
        "z1": sharding.sample_normal(keys[0], count, width),
        "z2": sharding.sample_normal(keys[1], count, width),
        "keys": sharding.sample_keys(keys[2], count),
        "target_keys": sharding.sample_keys(keys[3], count),
        "encoded_keys": sharding.sample_keys(keys[4], count),
        "real": batch["image"],
    }


def encoded(
    setup: Setup, encoder: Encoder, base: Any, params: Any, z: Array, keys: Array | None
) -> Array:
    """E(g(z)) as w+ [batch, num_ws, w_dim].

    Args:
      setup: modules.
      encoder: its module.
      base: of the generator.
      params: of the encoder.
      z: [batch, z_dim].
      keys: of the layers' noise, see `Codes`.
    """
    w_plus = dual_steps.rows_of_w(setup.generator, base, z)
    picture = dual_steps.pictures(setup, None, base, Codes(w_plus, None, keys))
    seen = adaptive_pool(picture, encoder.module.size)
    codes = encode(encoder.module, params, seen)
    return to_w_plus(setup.generator, base, codes, "z_plus")


def to_codes(
    setup: Setup,
    options: Options,
    encoder: Encoder | None,
    rows: Rows,
    state: TrainState,
    frozen: Any,
) -> Codes:
    """The codes that G draws from."""
    base = state.params["generator"]
    mapped = partial(dual_steps.rows_of_w, setup.generator, base)
    intrinsic = mapped(rows["z1"])
    if encoder is None:
        return Codes(intrinsic, mapped(rows["z2"]), rows["keys"])
    extrinsic = lax.cond(
        state.step % options.encoder_every == 0,
        lambda z, keys: encoded(setup, encoder, base, frozen["encoder"], z, keys),
        lambda z, keys: mapped(z),
        rows["z2"],
        rows["encoded_keys"],
    )
    return Codes(intrinsic, extrinsic, rows["keys"])


def target(setup: Setup, base: Any, rows: Rows, row: Array) -> Array:
    """g(z1, z2; l), what the network is to draw: [batch, size, size, 3]."""
    mix = {"z": rows["z1"], "z_mix": rows["z2"]}
    mix["mix_from"] = jnp.broadcast_to(row, (len(mix["z"]),))
    w_plus = dual_steps.mixed(setup.generator, base, mix)
    return dual_steps.pictures(
        setup, {}, base, Codes(w_plus, None, rows["target_keys"])
    )


def g_step(setup: Setup, options: Options, features: Any, optimizers, draw, to_codes):
    """The step of G: adversarial and perceptual loss."""

    def see(frozen, images):
        seen = dual_steps.judged(setup, images)
        return features.apply({"params": frozen["features"]}, seen)

    def step(state, frozen, batch):
        rows = {**draw(state, frozen, batch), **dual_steps.show_keys(setup, state)}
        base, row = state.params["generator"], first_row(options, state.step)
        show = dual_steps.shower(setup, state)

        def gradients(rows):
            codes = to_codes(rows, state, frozen)
            wanted = see(frozen, target(setup, base, rows, row))

            def loss(params):
                fake = dual_steps.pictures(setup, params, base, codes)
                logits, _ = setup.discriminator.apply(
                    {"params": state.params["discriminator"]},
                    show(fake, rows.get("show_made")),
                )
                terms = {
                    "g_loss": options.adv_lambda * jnp.mean(jax.nn.softplus(-logits)),
                    "perceptual": options.perceptual_lambda
                    * losses.perceptual(see(frozen, fake), wanted, losses.MIXING_TAPS),
                }
                return sum(terms.values()), terms

            return jax.grad(loss, has_aux=True)(state.params["dual_trained"])

        parts = options.adversarial.accumulate
        grads, out = dual_steps.in_parts(gradients, rows, parts)
        state = dual_steps.update(optimizers, state, "dual_trained", grads)
        return state, dual_steps.averaged(out) | {"mix_from": row}

    return step


def draw_path(setup: Setup, state: TrainState, frozen: Any, batch: Any) -> Rows:
    """Mixed intrinsic codes, and another z for the exemplar's."""
    del frozen, batch
    first, second = jax.random.split(state.key)
    count = dual_steps.path_rows(setup)
    ext = sharding.sample_normal(second, count, setup.generator.z_dim)
    return dual_steps.draw_mixed(setup, first, count) | {"ext": ext}


def path_codes(setup: Setup, rows: Rows, state: TrainState, frozen: Any) -> Codes:
    """The codes of `draw_path`."""
    del frozen
    base = state.params["generator"]
    intrinsic = dual_steps.mixed(setup.generator, base, rows)
    extrinsic = dual_steps.rows_of_w(setup.generator, base, rows["ext"])
    return Codes(intrinsic, extrinsic, rows["keys"])


def schedule(
    setup: Setup,
    options: Options,
    features: Any,
    encoder: Encoder | None,
    optimizers: Any,
    *,
    draw: Any = draw,
    draw_path: Any = draw_path,
    to_codes: Any = to_codes,
) -> list[tuple[int, loop.Step]]:
    """The entries D, R1, G, path length, average for `fit`."""
    draw, draw_path = (partial(f, setup) for f in (draw, draw_path))
    to_codes = partial(to_codes, setup, options, encoder)
    shared = setup.options
    return [
        (1, dual_steps.d_step(setup, optimizers, draw, to_codes)),
        (
            shared.d_reg_every,
            dual_steps.r1_step(setup, optimizers, lambda state, batch: batch["image"]),
        ),
        (1, g_step(setup, options, features, optimizers, draw, to_codes)),
        (
            shared.g_reg_every,
            dual_steps.path_step(
                setup,
                optimizers,
                draw_path,
                partial(path_codes, setup),
                partial(path_mean, options),
            ),
        ),
        (1, dual_steps.ema_step(setup)),
    ]


def make_sample(setup: Setup, options: Options):
    """Fixed codes: z1's faces, z2's, their mix from row l on, and the average's."""

    def sample(state: TrainState, frozen: Any) -> Array:
        base = state.params["generator"]
        z = jax.random.normal(jax.random.key(0), (2, SAMPLES, setup.generator.z_dim))
        first, second = (dual_steps.rows_of_w(setup.generator, base, x) for x in z)
        rows = {"z1": z[0], "z2": z[1], "target_keys": None}
        mix = target(setup, base, rows, first_row(options, state.step))
        drawn = [
            dual_steps.pictures(
                setup, state.ema["dual"], base, Codes(face, style, None)
            )
            for face, style in ((first, None), (second, None), (first, second))
        ]
        return jnp.stack([*drawn[:2], mix, drawn[2]])

    return sample


def write_stage_1(options: Options) -> None:
    """The fresh path and its base as a network folder."""
    networks, params = dual_steps.load_networks(
        options.weights, options.run, options.init_noise
    )
    # What learns is still what is averaged.
    del networks["dual_trained"]
    weights.save(
        options.run.out,
        networks,
        params,
        metadata={"scheme": "dual_pretrain", "base": options.weights},
    )
    print(f"stage 1: {options.run.out}")


def resolve(options: Options) -> Options:
    """Defaults that depend on other options.

    Raises:
      UserError: values that cannot be.
    """
    if options.run.steps and not options.data:
        raise UserError("--data is not given; name faces, or --steps 0 for stage 1")
    if options.encoder_every < 0:
        raise UserError(f"--encoder-every is {options.encoder_every}; it must be >= 0")
    if not options.encoder_every and options.encoder:
        raise UserError("--encoder is given, but --encoder-every 0 never asks it")
    stage = "dual-pretrain" if options.run.steps else "dual-stage1"
    options = with_out(options, f"{stage}-{PurePath(options.weights).name}")
    if options.run.steps and (Path(options.run.out) / "params").exists():
        raise UserError(
            f"--out {options.run.out} holds networks that no run wrote, such as "
            "--steps 0; choose another"
        )
    return options


def train(options: Options, mesh: Any) -> TrainState:
    """The whole run; what `main` calls after reading the command line."""
    run, shared = options.run, options.adversarial
    dual_steps.check(shared, run, mesh)
    networks, params = dual_steps.load_networks(
        options.weights, run, options.init_noise
    )
    generator = networks["generator"]
    setup = Setup(
        shared,
        run.batch,
        options.adv_lambda,
        *(networks[n] for n in ("generator", "dual", "discriminator")),
    )
    encoder, frozen = None, {}
    if options.encoder_every:
        encoder = dual_steps.z_plus_encoder(
            options.encoder, options.weights, generator, run.dtype
        )
        frozen["encoder"] = encoder.params
        encoder = encoder._replace(params=None)
    trunk = judges.choose_features(options.perceptual_net, run.dtype)
    frozen["features"] = trunk.params
    optimizers = dual_steps.make_optimizers(shared)
    reading = options.reading
    source = data.open_source(options.data, generator.size, reading.tfds_folder)
    batches = data.batches(
        source,
        run.batch,
        mesh,
        seed=run.seed,
        transform=data.mirrored if options.mirror else data.plain,
        reading=reading,
    )
    return loop.fit(
        options,
        dual_steps.make_state(shared, run, params, optimizers),
        frozen,
        schedule(setup, options, trunk.module, encoder, optimizers),
        batches,
        networks=networks,
        mesh=mesh,
        metadata={"scheme": "dual_pretrain", "base": options.weights},
        sample=make_sample(setup, options),
        identity={
            "weights": weights.digest(params),
            "judges": weights.digest(frozen),
            "data": data.fingerprint(source),
        },
    )


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.dual_pretrain`."""
    options = resolve(parse(Options, __doc__, args, least_steps=0))
    if not options.run.steps:
        write_stage_1(options)
        return
    train(options, start(options.run))


if __name__ == "__main__":
    main()
