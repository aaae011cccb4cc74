"""StyleGAN2: adversarial finetuning and training from scratch.

Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN" (arXiv
1912.04958), with the schedule and constants of the common PyTorch version. One
iteration, each line with an Adam update of its own:

    D     mean softplus(-D(x)) + mean softplus(D(G(z)))
    R1    γ/2 · k · E ‖∇ₓ D(x)‖²                           every k = 16 iterations
    G     mean softplus(-D(G(z)))
    path  λ · k · E (‖Jᵀ y‖ - a)²,  y ~ N(0, 1) / √(pixels)     every k = 4 iterations
    EMA   of the generator

Jᵀ y is the gradient of ⟨G(w), y⟩ in w+ (its norm: root of the mean over rows), `a` its
running mean, updated first; the penalty's gradient flows through that update.

    python -m train.stylegan2 --data faces --weights weights/ffhq --steps 600 --batch 32
    python -m train.stylegan2 --data faces --size 64 --steps 100000

The grids in OUT/samples come from the averaged generator at psi 0.7. A finetune takes
on the new domain's colours after some hundred iterations; from scratch, heads appear
after some thousand at 64 px. A batch below 8 tends to collapse.

With few pictures, `--augment` keeps the discriminator from learning them by heart
(ADA, see train.augment); DualStyleGAN finetunes so, for 600 iterations of 32 pictures:

    python -m train.stylegan2 --data portraits --weights weights/ffhq --augment \
        --steps 600 --batch 32

The average code `w_avg` follows the mapping's outputs (decay 0.995, as NVIDIA's code
does; the common PyTorch version leaves it to inference).
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import PurePath
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax import Array

from jaxstyle import weights
from jaxstyle.errors import UserError, cli
from jaxstyle.stylegan2 import Discriminator, Generator
from train import augment, data, loop, optim
from train.cli import RunOptions, Shared, parse, start, with_out, working
from train.sharding import (
    check_batch,
    constrain,
    filled,
    sample_keys,
    sample_normal,
)
from train.state import TrainState, create_state, update_ema

W_AVG_DECAY = 0.995
PATH_DECAY = 0.01
SAMPLES = 16


@dataclasses.dataclass(frozen=True)
class Options:
    """Adversarial training of a StyleGAN2."""

    data: str
    """Folder of pictures, .npy file of uint8 [n, height, width, 3], or
    tfds:NAME:SPLIT; resized to the model's size."""
    run: Shared = RunOptions(
        steps=800_000, batch=16, log_every=50, sample_every=1000, save_every=5000
    )
    weights: str = ""
    """Network folder or run to finetune; empty: from scratch, at --size."""
    size: int = 0
    """Picture size of a model from scratch, a power of two from 8 to 1024."""
    channels: tuple[int, ...] = ()
    """From scratch: channels at 4, 8, … size, instead of the published table."""
    channel_multiplier: int = 2
    """From scratch: 2 for config-f, 1 for config-e."""
    mapping_depth: int = 8
    """From scratch: layers of the mapping network, 1 to 8."""
    w_dim: int = 512
    """From scratch: width of z and w."""
    lr: float = 2e-3
    """Adam's rate, before the scaling for lazy regularisation."""
    r1: Annotated[float, tyro.conf.arg(aliases=["--r1-gamma"])] = 10.0
    """γ, weight of R1."""
    path_regularize: float = 2.0
    """λ, weight of the path length."""
    path_batch_shrink: int = 2
    """The path length runs on the batch divided by this."""
    d_reg_every: int = 16
    """Iterations between R1 updates; 0: none."""
    g_reg_every: int = 4
    """Iterations between path-length updates; 0: none (helps at a small batch)."""
    mixing: float = 0.9
    """Probability that a batch mixes two codes."""
    mirror: bool = True
    """Flip pictures at random."""
    ema_kimg: float = 0.0
    """Half-life of the average in thousands of pictures; 0: a constant decay of
    0.5^(32/10000) an iteration."""
    freeze_d: int = 0
    """Highest-resolution blocks of the discriminator that do not train."""
    freeze_g: bool = False
    """Train the discriminator alone."""
    augmenting: augment.Augmenting = augment.AugmentOptions()
    reading: data.Reading = data.ReadOptions()


class Inputs(NamedTuple):
    """What one step draws.

    Attributes:
      z: [batch, z_dim].
      z_mix: [batch, z_dim], of the rows from `mix_from` on.
      mix_from: [], crossover row, 1 to num_ws - 1; num_ws mixes nothing.
      noise: arguments of the generator: mode or planes, and keys [batch].
      path: [batch, size, size, 3], normal over the root of the number of pixels.
    """

    z: Array
    z_mix: Array
    mix_from: Array
    noise: dict[str, Any]
    path: Array


def draw_inputs(generator: Generator, mixing: float, key: Array, batch: int) -> Inputs:
    """Codes, noise and path-length noise, sample by sample from its global index.

    Args:
      generator: gives the widths.
      mixing: probability of two codes; the crossover is the batch's, 1 to num_ws - 1.
      key: of the step.
      batch: global batch.
    """
    k1, k2, k3, k4, k5, k6 = jax.random.split(key, 6)
    row = jax.random.randint(k3, (), 1, generator.num_ws)
    size = generator.size
    return Inputs(
        z=sample_normal(k1, batch, generator.z_dim),
        z_mix=sample_normal(k2, batch, generator.z_dim),
        mix_from=jnp.where(jax.random.uniform(k4) < mixing, row, generator.num_ws),
        noise={"noise": "random", "key": sample_keys(k5, batch)},
        path=sample_normal(k6, batch, size, size, 3) / size,
    )


def codes(generator: Generator, params: Any, inputs: Inputs) -> tuple[Array, Array]:
    """w+ [batch, num_ws, w_dim] with style mixing, and the first w [batch, w_dim]."""
    first, second = (
        generator.apply({"params": params}, z, method="mapping")
        for z in (inputs.z, inputs.z_mix)
    )
    rows = jnp.arange(generator.num_ws)[:, None] < inputs.mix_from
    return jnp.where(rows, first[:, None], second[:, None]), first


def pictures(generator: Generator, params: Any, w_plus: Array, inputs: Inputs) -> Array:
    """G(w+) with the inputs' noise, [batch, size, size, 3]."""
    variables = {"params": params}
    return generator.apply(variables, w_plus, space="w_plus", **inputs.noise)[0]


# Losses


def unchanged(images: Array) -> Array:
    """What the discriminator sees of pictures without augmentation."""
    return images


def discriminator_loss(discriminator: Discriminator, params: Any, real, fake):
    """Logistic loss []; also the logits of both, {name: [batch, 1]}."""
    on_real, _ = discriminator.apply({"params": params}, real)
    on_fake, _ = discriminator.apply({"params": params}, fake)
    loss = jnp.mean(jax.nn.softplus(-on_real)) + jnp.mean(jax.nn.softplus(on_fake))
    return loss, {"real_score": on_real, "fake_score": on_fake}


def r1_penalty(
    discriminator: Discriminator, params: Any, real: Array, show: Any = unchanged
) -> Array:
    """E ‖∇ₓ D(x)‖² (Mescheder et al. 2018, equation 9, without γ/2): [].

    With augmentation, x is the picture before it.

    Args:
      discriminator: the architecture.
      params: its parameters.
      real: [batch, size, size, 3].
      show: pictures as the discriminator sees them.
    """

    def score(x):
        return jnp.sum(discriminator.apply({"params": params}, show(x))[0])

    gradient = jax.grad(score)(real)
    return jnp.mean(jnp.sum(jnp.square(gradient), (1, 2, 3)))


def generator_loss(
    generator,
    discriminator,
    params: Any,
    d_params: Any,
    inputs: Inputs,
    show: Any = unchanged,
):
    """Non-saturating loss [] and the codes w [batch, w_dim]; `show` as in R1."""
    w_plus, w = codes(generator, params, inputs)
    fake = constrain(pictures(generator, params, w_plus, inputs))
    logits, _ = discriminator.apply({"params": d_params}, show(fake))
    return jnp.mean(jax.nn.softplus(-logits)), w


def path_penalty(
    generator: Generator,
    params: Any,
    mean: Array,
    inputs: Inputs,
    count: int | None = None,
):
    """Path-length penalty (appendix B, equation 4).

    Args:
      generator: the architecture.
      params: its parameters.
      mean: [], running mean of the lengths.
      inputs: codes, noise and y.
      count: how many of them count, from the first on; None: all.

    Returns:
      The penalty [], and the updated mean [] and the lengths [count].
    """

    def projection(w_plus):
        return jnp.sum(pictures(generator, params, w_plus, inputs) * inputs.path)

    gradient = jax.grad(projection)(codes(generator, params, inputs)[0])
    lengths = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(gradient[:count]), 2), 1))
    mean = mean + PATH_DECAY * (jnp.mean(lengths) - mean)
    return jnp.mean(jnp.square(lengths - mean)), (mean, lengths)


# Steps


def schedule(
    generator: Generator,
    discriminator: Discriminator,
    optimizers: dict[str, Any],
    options: Options,
    draw: Callable[[Generator, float, Array, int], Inputs] = draw_inputs,
) -> list[tuple[int, loop.Step]]:
    """The entries D, R1, G, path length, EMA for `fit`.

    Args:
      generator, discriminator: the architectures.
      optimizers: by network name.
      options: weights and intervals.
      draw: makes a step's random inputs.
    """

    def update(state, name, grads):
        tx, params = optimizers[name], state.params[name]
        params, opt = optim.apply(tx, grads, state.opt_state[name], params)
        return state.replace(
            params=state.params | {name: params},
            opt_state=state.opt_state | {name: opt},
        )

    def showing(state, i, batch):
        """How the discriminator sees a batch; p is that of the state."""
        key = jax.random.fold_in(state.key, i)
        return functools.partial(
            augment.shown,
            options.augmenting,
            state.extra,
            keys=sample_keys(key, batch) if options.augmenting.augment else None,
        )

    def d_step(state, frozen, batch):
        real = batch["image"]
        inputs = draw(generator, options.mixing, state.key, real.shape[0])
        g_params = state.params["generator"]
        w_plus, _ = codes(generator, g_params, inputs)
        fake = constrain(pictures(generator, g_params, w_plus, inputs))
        fake = showing(state, 1, len(real))(fake)
        real = showing(state, 2, len(real))(real)

        def loss(params):
            return discriminator_loss(discriminator, params, real, fake)

        grad = jax.value_and_grad(loss, has_aux=True)
        (value, logits), grads = grad(state.params["discriminator"])
        extra, metrics = augment.learned(
            options.augmenting, state.extra, logits["real_score"]
        )
        state = update(state, "discriminator", grads).replace(extra=extra)
        metrics |= {name: jnp.mean(x) for name, x in logits.items()}
        return state, {"d_loss": value} | metrics

    def r1_step(state, frozen, batch):
        weight, real = options.r1 / 2 * options.d_reg_every, batch["image"]
        show = showing(state, 1, len(real))

        def loss(params):
            value = r1_penalty(discriminator, params, real, show)
            return weight * value, value

        grads, value = jax.grad(loss, has_aux=True)(state.params["discriminator"])
        return update(state, "discriminator", grads), {"r1": value}

    def g_step(state, frozen, batch):
        inputs = draw(generator, options.mixing, state.key, options.run.batch)
        show = showing(state, 1, options.run.batch)

        def loss(params):
            d_params = state.params["discriminator"]
            return generator_loss(
                generator, discriminator, params, d_params, inputs, show
            )

        grad = jax.value_and_grad(loss, has_aux=True)
        (value, w), grads = grad(state.params["generator"])
        state = update(state, "generator", grads)
        params = state.params["generator"]
        average = update_ema(params["w_avg"], jnp.mean(w, 0), W_AVG_DECAY)
        params = state.params | {"generator": params | {"w_avg": average}}
        return state.replace(params=params), {"g_loss": value}

    def path_step(state, frozen, batch):
        count = max(1, options.run.batch // options.path_batch_shrink)
        inputs = draw(generator, options.mixing, state.key, filled(count))
        weight = options.path_regularize * options.g_reg_every

        def loss(params):
            mean = state.extra["path_mean"]
            value, out = path_penalty(generator, params, mean, inputs, count)
            return weight * value, (value, *out)

        grad = jax.grad(loss, has_aux=True)
        grads, (value, mean, lengths) = grad(state.params["generator"])
        state = update(state, "generator", grads)
        metrics = {"path": value, "path_mean": mean, "path_length": jnp.mean(lengths)}
        return state.replace(extra=state.extra | {"path_mean": mean}), metrics

    def ema_step(state, frozen, batch):
        decay = 0.5 ** (32 / 10_000)
        if options.ema_kimg:
            decay = 0.5 ** (options.run.batch / (options.ema_kimg * 1000))
        params = state.params["generator"]
        ema = {"generator": update_ema(state.ema["generator"], params, decay)}
        return state.replace(ema=ema), {}

    trains_g = int(not options.freeze_g)
    return [
        (1, d_step),
        (options.d_reg_every, r1_step),
        (trains_g, g_step),
        (trains_g * options.g_reg_every, path_step),
        (trains_g, ema_step),
    ]


# Set-up


def make_networks(options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """The generator and discriminator and their first parameters, by name.

    Weights without a discriminator get a fresh one.

    Raises:
      UserError: neither weights nor a size, or weights of another shape than asked for.
    """
    if not options.weights:
        if not options.size:
            raise UserError(
                "--size is not given; give --weights to finetune, or --size to train "
                "from scratch"
            )
        channels = options.channels or None
        shared = (options.size, options.channel_multiplier, channels)
        width = options.w_dim
        networks = {
            "generator": Generator(*shared, options.mapping_depth, width, width),
            "discriminator": Discriminator(*shared),
        }
        networks = {n: working(m, options.run) for n, m in networks.items()}
        keys = jax.random.split(jax.random.key(options.run.seed), 2)
        params = {
            name: jax.jit(lambda key, m=network: m.init_params(key=key))(key)
            for (name, network), key in zip(networks.items(), keys, strict=True)
        }
        return networks, params
    model, params = weights.load(options.weights)
    generator = model.generator
    size = generator.size
    for name, found in (
        ("size", size),
        ("channels", tuple(generator.channel_table.values())),
        ("channel_multiplier", generator.channel_multiplier),
        ("mapping_depth", generator.mapping_depth),
        ("w_dim", generator.w_dim),
    ):
        asked, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if asked not in (getattr(Options, name), found):
            raise UserError(
                f"{flag} is {asked}, but --weights {options.weights} have {found}; "
                f"leave {flag} out"
            )
    if "discriminator" in model:
        discriminator = model.discriminator
    else:
        print(f"{options.weights} hold no discriminator: a fresh one is trained")
        shape = (size, generator.channel_multiplier, generator.channels)
        discriminator = Discriminator(*shape)
        key = jax.random.key(options.run.seed)
        params["discriminator"] = discriminator.init_params(key=key)
    networks = {"generator": generator, "discriminator": discriminator}
    networks = {n: working(m, options.run) for n, m in networks.items()}
    return networks, {name: params[name] for name in networks}


def make_optimizers(options: Options, discriminator: Discriminator) -> dict[str, Any]:
    """Adam for each network that trains.

    Raises:
      UserError: more blocks to freeze than there are.
    """
    d = optim.adam(options.lr, lazy_every=options.d_reg_every)
    blocks = [r for r in sorted(discriminator.channel_table, reverse=True) if r > 4]
    if not 0 <= options.freeze_d <= len(blocks):
        raise UserError(
            f"--freeze-d is {options.freeze_d}; this discriminator has {len(blocks)} "
            "blocks"
        )
    if options.freeze_d:
        names = [f"block_{r}" for r in blocks[: options.freeze_d]]
        d = optim.frozen(d, [f"({'|'.join(['from_rgb', *names])})/"])
    g = optim.adam(options.lr, lazy_every=options.g_reg_every)
    return {"discriminator": d} | ({} if options.freeze_g else {"generator": g})


def make_state(options: Options, params: Any, optimizers: Any) -> TrainState:
    """The state before the first iteration."""
    return create_state(
        params,
        optimizers,
        key=jax.random.key(options.run.seed),
        ema=["generator"],
        extra={"path_mean": jnp.zeros(())} | augment.start_extra(options.augmenting),
    )


def train(options: Options, mesh: Any) -> TrainState:
    """The whole run; what `main` calls after reading the command line."""
    check_batch(options.run.batch, mesh)
    augment.check(options.augmenting)
    networks, params = make_networks(options)
    generator, discriminator = networks["generator"], networks["discriminator"]
    optimizers = make_optimizers(options, discriminator)
    reading = options.reading
    source = data.open_source(options.data, generator.size, reading.tfds_folder)
    batches = data.batches(
        source,
        options.run.batch,
        mesh,
        seed=options.run.seed,
        transform=data.mirrored if options.mirror else data.plain,
        reading=reading,
    )
    identity = {"data": data.fingerprint(source)}
    if options.weights:
        identity["weights"] = weights.digest(params)

    def sample(state, frozen):
        z = sample_normal(jax.random.key(0), SAMPLES, generator.z_dim)
        variables = {"params": state.ema["generator"]}
        return generator.apply(variables, z, psi=0.7)[0]

    return loop.fit(
        options,
        make_state(options, params, optimizers),
        {},
        schedule(generator, discriminator, optimizers, options),
        batches,
        networks=networks,
        mesh=mesh,
        metadata={"scheme": "stylegan2"},
        sample=sample,
        identity=identity,
    )


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.stylegan2`."""
    options = parse(Options, __doc__, args)
    options = with_out(options, f"stylegan2-{PurePath(options.data).stem}")
    train(options, start(options.run))


if __name__ == "__main__":
    main()
