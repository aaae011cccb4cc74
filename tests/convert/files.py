"""Small files for the tests of `convert`: a whole one takes a few kilobytes."""

import functools

import jax
import numpy as np

import convert
from convert import pt, stylegan2
from convert.layouts import to_state
from jaxstyle.encoders import (
    BackboneWEncoder,
    BackboneWPlusEncoder,
    Encoder4Editing,
    GradualStyleEncoder,
)
from jaxstyle.stylegan2 import Discriminator, Generator

SIZE, CHANNELS, WIDTH, DEPTH = 16, (8, 6, 4), 8, 2


@functools.cache
def small_networks():
    """A generator and a discriminator with every parameter random."""
    networks = {
        "generator": Generator(
            size=SIZE, channels=CHANNELS, mapping_depth=DEPTH, z_dim=WIDTH, w_dim=WIDTH
        ),
        "discriminator": Discriminator(size=SIZE, channels=CHANNELS),
    }
    rng = np.random.default_rng(0)
    params = {
        name: jax.tree.map(
            lambda x: rng.standard_normal(x.shape, np.float32),
            jax.eval_shape(lambda m=module: m.init_params(key=jax.random.key(0))),
        )
        for name, module in networks.items()
    }
    return networks, params


def small_object():
    """What rosinality's training script saves: fresh dicts of shared arrays."""
    value = convert.to_pt(*small_networks())
    return {k: dict(v) if isinstance(v, dict) else v for k, v in value.items()}


def write_small(path, *, legacy=False, **changes):
    """`small_object` in a file, with entries replaced or, by None, left out."""
    value = {k: v for k, v in (small_object() | changes).items() if v is not None}
    pt.write(path, value, legacy=legacy)
    return path


def small_nvidia():
    """State dicts of `small_networks` under NVIDIA's names."""
    _, params = small_networks()
    tables = {
        "generator": stylegan2.nvidia_generator_table(SIZE, DEPTH),
        "discriminator": stylegan2.nvidia_discriminator_table(SIZE),
    }
    return tuple(to_state(params[name], table) for name, table in tables.items())


def small_encoder_object(kind):
    """A pSp or e4e file of a small encoder: `psp`, `e4e`, `w` or `w_plus`."""
    cls = {
        "psp": GradualStyleEncoder,
        "e4e": Encoder4Editing,
        "w": BackboneWEncoder,
        "w_plus": BackboneWPlusEncoder,
    }[kind]
    pyramid = kind in ("psp", "e4e")
    module = cls(
        num_styles=8 if pyramid else 3,
        **({"size": 32} if pyramid else {}),
        units=(2, 1, 1, 1),
        channels=(4, 6, 8, 10),
        se_ratio=2,
        w_dim=WIDTH,
    )
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32),
        jax.eval_shape(lambda: module.init_params(key=jax.random.key(0))),
    )
    return convert.to_pt({"encoder": module}, {"encoder": params})
