"""A random base generator and a finetuned one, small enough for every test."""

import jax

from jaxstyle import weights
from jaxstyle.encoders import GradualStyleEncoder
from jaxstyle.stylegan2 import Discriminator, Generator

GENERATOR = Generator(16, channels=(8, 8, 8), mapping_depth=2, z_dim=12, w_dim=16)


def save_base(path, *, size=16, seed=0):
    """Write generator and discriminator of `size` px; returns the path as text."""
    channels = (8,) * (size.bit_length() - 2)
    generator = GENERATOR.clone(size=size, channels=channels)
    discriminator = Discriminator(size, channels=channels)
    networks = {"generator": generator, "discriminator": discriminator}
    params = {
        name: module.init_params(key=jax.random.fold_in(jax.random.key(seed), i))
        for i, (name, module) in enumerate(networks.items())
    }
    params["generator"]["w_avg"] = params["generator"]["w_avg"] + 0.1
    weights.save(path, networks, params)
    return str(path)


def save_tuned(path, base, *, seed=1, **metadata):
    """Write a generator with other synthesis weights than the one in `base`."""
    model, params = weights.load(base)
    fresh = model.generator.init_params(key=jax.random.key(seed))
    tuned = params["generator"] | {"synthesis": fresh["synthesis"]}
    metadata = {"scheme": "jojo", "base": str(base)} | metadata
    weights.save(
        path, {"generator": model.generator}, {"generator": tuned}, metadata=metadata
    )
    return str(path)


def save_encoder(path, channels=3, rows=(), **metadata):
    """An untrained encoder for the 16 px generator that reads 32 px; its path."""
    encoder = GradualStyleEncoder(
        num_styles=6,
        size=32,
        units=(1, 1),
        channels=(8, 8),
        in_channels=channels,
        se_ratio=4,
        w_dim=16,
        level_rows=() if channels == 6 else (3,),
        rows=rows,
    )
    params = {"encoder": encoder.init_params(key=jax.random.key(0))}
    weights.save(path, {"encoder": encoder}, params, metadata=metadata)
    return str(path)
