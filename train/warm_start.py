"""A first generator from an autoencoder, to spare adversarial training its beginning.

From scratch, StyleGAN2 on one kind of aligned pictures wants millions of them before
its heads look like heads; on a few CPU cores that is a day. Two cheaper steps bring the
generator near:

    1. autoencoder    w = E(x),  min ‖G(w) - x‖² + LPIPS(G(w), x)
    2. mapping        M(z) gets the mean and covariance of E(x) over the pictures

E is a small convolutional encoder to one w row of length √w_dim. The second step is in
closed form, see `gaussian_mapping`. The noise of G stays off.

    python -m train.warm_start --data heads/photo.npy --size 64 --mapping-depth 2 \
        --channels 128 128 128 64 32 --steps 5000 --out runs/warm
    python -m train.stylegan2 --weights runs/warm/model --data heads/photo.npy ...

OUT/model holds the generator with its average code, OUT/heads.png new heads. Look at
OUT/autoencoder/samples too (each picture above its reconstruction): LPIPS falls below
0.06 after 30,000 pictures of 64 px. About 25 minutes on two cores; the adversarial
polish makes the pictures sharp.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxstyle import images, weights
from jaxstyle.errors import UserError, cli
from jaxstyle.features.lpips import LPIPS
from jaxstyle.init import Full, Normal, initialize
from jaxstyle.invert import for_lpips
from jaxstyle.stylegan2 import MAPPING_LR_MULTIPLIER, Generator, pixel_norm
from train import data, loop, optim, sharding
from train.cli import RunOptions, Shared, parse, start, with_out
from train.state import TrainState, create_state, update_ema

WIDTHS = (32, 64, 96, 128)
SAMPLES = 16
SHIFT = 8.0


@dataclasses.dataclass(frozen=True)
class Options:
    """Warm start of a generator by an autoencoder."""

    data: str
    """Folder of pictures or .npy file of uint8 [n, height, width, 3]."""
    run: Shared = RunOptions(
        steps=5000, batch=16, log_every=50, sample_every=500, save_every=1000
    )
    size: int = 64
    """Picture size, a power of two from 32."""
    channels: tuple[int, ...] = ()
    """Channels at 4, 8, … size, instead of the published table."""
    mapping_depth: int = 8
    """Layers of the mapping network, 1 to 8."""
    w_dim: int = 512
    """Width of z and w."""
    lr: float = 2e-3
    """Adam's rate for the autoencoder."""
    lpips: float = 1.0
    """Weight of LPIPS; the squared error has weight 1."""
    ema_kimg: float = 2.0
    """Half-life of the averages in thousands of pictures."""


# Encoder


def init_encoder(size: int, w_dim: int, *, key: Array) -> dict:
    """Parameters of the encoder: `conv_0` .. and `dense`."""
    shapes, width = {}, 3
    for i, out in enumerate(WIDTHS):
        fan_in = 9 * 4 * width
        shapes[f"conv_{i}"] = {
            "weight": Normal((3, 3, 4 * width, out), (2 / fan_in) ** 0.5),
            "bias": Full((out,)),
        }
        width = out
    flat = (size >> len(WIDTHS)) ** 2 * width
    shapes["dense"] = {"weight": Normal((flat, w_dim), (1 / flat) ** 0.5)}
    return initialize(shapes, key=key)


def encode(params: dict, images: Array) -> Array:
    """Pictures [batch, size, size, 3] to w [batch, w_dim] of length √w_dim.

    Each layer folds 2 × 2 pixels into channels before a 3 × 3 convolution, which is
    cheaper on a CPU than convolving with a stride.
    """
    x = images
    for i in range(len(WIDTHS)):
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, height // 2, width // 2, 4 * channels)
        layer = params[f"conv_{i}"]
        x = jax.lax.conv_general_dilated(
            x,
            layer["weight"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.leaky_relu(x + layer["bias"], 0.2)
    return pixel_norm(x.reshape(x.shape[0], -1) @ params["dense"]["weight"])


def decode(generator: Generator, params: dict, w: Array) -> Array:
    """G(w) without noise, [batch, size, size, 3]."""
    return generator.apply({"params": params}, w, space="w", noise="none")[0]


# Losses and steps


def reconstruction_loss(generator, params, lpips_params, images, lpips_weight):
    """Squared error plus weighted LPIPS [], and both terms by name."""
    codes = encode(params["encoder"], images)
    drawn = decode(generator, params["generator"], codes)
    square = jnp.mean(jnp.square(drawn - images))
    distance = LPIPS().apply(
        {"params": lpips_params}, for_lpips(drawn), for_lpips(images)
    )
    distance = jnp.mean(distance)
    return square + lpips_weight * distance, {"l2": square, "lpips": distance}


def autoencoder_step(generator: Generator, tx, options: Options):
    """The step of stage 1 for `fit`; it trains encoder and synthesis."""
    decay = 0.5 ** (options.run.batch / (options.ema_kimg * 1000))

    def step(state: TrainState, frozen, batch):
        def loss(params):
            return reconstruction_loss(
                generator, params, frozen["lpips"], batch["image"], options.lpips
            )

        grad = jax.value_and_grad(loss, has_aux=True)
        (value, terms), grads = grad(state.params)
        params, opt = optim.apply(tx, grads, state.opt_state["all"], state.params)
        ema = update_ema(state.ema, params, decay)
        state = state.replace(params=params, opt_state={"all": opt}, ema=ema)
        return state, {"loss": value} | terms

    return step


def gaussian_mapping(codes: np.ndarray, depth: int, z_dim: int) -> dict:
    """A mapping network whose outputs have the mean and covariance of given codes.

    The last activation f is one-to-one, so a normal distribution is fitted to f⁻¹(w)
    and its linear map written into the last layer. Layers before it pass z on: a bias
    of `SHIFT` standard deviations keeps it on the straight side of their activations.

    Args:
      codes: [n, w_dim].
      depth: layers of the mapping network.
      z_dim: width of z; must be that of w.

    Returns:
      Parameters {dense_0: {weight, bias}, …} as the generator stores them.
    """
    width = codes.shape[1]
    if z_dim != width:
        raise UserError(f"z_dim is {z_dim}; the fit needs that of w, {width}")
    before = codes.astype(np.float64) / np.sqrt(2)
    before = np.where(before > 0, before, before / 0.2)
    mean = before.mean(0)
    values, vectors = np.linalg.eigh(np.cov(before.T))
    spread = (vectors * np.sqrt(np.maximum(values, 0))).T  # z @ spread
    offset, layers = 0.0, []
    for i in range(depth - 1):
        # Each passes on √2 (x + shift), the next divides by √2.
        gain = 1.0 if i == 0 else 1 / np.sqrt(2)
        shift = SHIFT if i == 0 else 0.0
        layers.append((np.eye(width) * gain, np.full(width, shift)))
        offset = SHIFT * np.sqrt(2)
    gain = 1.0 if depth == 1 else 1 / np.sqrt(2)
    layers.append((spread * gain, mean - offset * gain * spread.sum(0)))
    scale = MAPPING_LR_MULTIPLIER / np.sqrt(width)
    return {
        f"dense_{i}": {
            "weight": (weight / scale).astype(np.float32),
            "bias": (bias / MAPPING_LR_MULTIPLIER).astype(np.float32),
        }
        for i, (weight, bias) in enumerate(layers)
    }


# Set-up


def make_generator(options: Options) -> Generator:
    """The generator that the options describe."""
    if options.size < 32:
        raise UserError(
            f"--size is {options.size}; LPIPS needs pictures of at least 32 px"
        )
    channels = options.channels or None
    width = options.w_dim
    return Generator(options.size, 2, channels, options.mapping_depth, width, width)


def make_state(options: Options, generator: Generator, tx) -> TrainState:
    """The state before the first iteration of stage 1."""
    keys = jax.random.split(jax.random.key(options.run.seed), 3)
    params = {
        "generator": generator.init_params(key=keys[0]),
        "encoder": init_encoder(options.size, options.w_dim, key=keys[1]),
    }
    state = create_state(params, {}, key=keys[2], ema=params)
    return state.replace(opt_state={"all": tx.init(params)})


def autoencode(options: Options, mesh, source) -> TrainState:
    """Stage 1, in OUT/autoencoder."""
    generator = make_generator(options)
    tx = optim.adam(options.lr, (0.5, 0.99))
    shown = jnp.stack(
        [jnp.asarray(source[i]) for i in range(min(SAMPLES, len(source)))]
    )
    _, lpips = weights.load("lpips_alexnet")

    def sample(state, frozen):
        codes = encode(state.ema["encoder"], frozen["shown"])
        drawn = decode(generator, state.ema["generator"], codes)
        return jnp.stack([frozen["shown"], drawn])

    run = dataclasses.replace(options.run, out=f"{options.run.out}/autoencoder")
    return loop.fit(
        dataclasses.replace(options, run=run),
        make_state(options, generator, tx),
        {"lpips": lpips["lpips"], "shown": shown},
        [(1, autoencoder_step(generator, tx, options))],
        data.batches(source, run.batch, mesh, seed=run.seed, transform=data.mirrored),
        networks={"generator": generator},
        mesh=mesh,
        metadata={"scheme": "warm_start"},
        sample=sample,
        identity={"data": data.fingerprint(source)},
    )


def encode_all(params: dict, source, limit: int = 20_000) -> np.ndarray:
    """Codes [n, w_dim] of the first pictures of a source."""
    run, codes = jax.jit(encode), []
    count = min(len(source), limit)
    for begin in range(0, count, 64):
        images = np.stack([source[i] for i in range(begin, min(begin + 64, count))])
        codes.append(np.asarray(run(params, images)))
    return np.concatenate(codes)


def train(options: Options, mesh) -> Path:
    """Both stages; returns the folder of the network."""
    source = data.open_source(options.data, options.size)
    ema = sharding.fetch(autoencode(options, mesh, source).ema)
    generator = make_generator(options)
    codes = encode_all(ema["encoder"], source)
    mapping = gaussian_mapping(codes, options.mapping_depth, options.w_dim)
    params = ema["generator"] | {"mapping": mapping, "w_avg": codes.mean(0)}
    model = Path(options.run.out) / "model"
    if jax.process_index():
        return model
    networks, params = {"generator": generator}, {"generator": params}
    metadata = {"scheme": "warm_start"}
    weights.save(model, networks, params, metadata=metadata, overwrite=True)
    z = jax.random.normal(jax.random.key(0), (SAMPLES, options.w_dim))
    drawn = decode(generator, params["generator"], to_w(generator, params, z))
    images.save_image(model.parent / "heads.png", images.grid(np.asarray(drawn), 4))
    return model


def to_w(generator: Generator, params: dict, z: Array) -> Array:
    """The mapping network alone."""
    variables = {"params": params["generator"]}
    return generator.apply(variables, z, method="mapping")


@cli
def main(args: list[str] | None = None) -> None:
    """Command line."""
    options = parse(Options, __doc__, args)
    options = with_out(options, f"warm_start-{Path(options.data).stem}")
    mesh = start(options.run)
    print(f"network: {train(options, mesh)}")


if __name__ == "__main__":
    main()
