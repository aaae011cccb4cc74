"""A face model, an encoder to z+, judges and portraits small enough for every test."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxstyle import weights
from jaxstyle.encoders import GradualStyleEncoder
from jaxstyle.features.identity import ArcFace
from jaxstyle.features.lpips import LPIPS
from jaxstyle.images import save_image
from jaxstyle.stylegan2 import Discriminator, Generator

SIZE, CHANNELS = 32, (4, 4, 4, 4)
GENERATOR = Generator(SIZE, channels=CHANNELS, mapping_depth=1, z_dim=8, w_dim=8)
ENCODER = GradualStyleEncoder(
    num_styles=8,
    size=32,
    units=(1, 1, 1, 1),
    channels=(2, 2, 2, 2),
    se_ratio=2,
    w_dim=8,
    start_from_w_avg=False,
)
IDENTITY = ArcFace(size=16, units=(1, 1), channels=(2, 2), se_ratio=2, width=4)


def save_all(folder):
    """Write `base`, `portrait`, `encoder`, `identity` and `pictures`; the folder.

    The judges of features are those that ship.
    """
    base = {
        "generator": GENERATOR,
        "discriminator": Discriminator(SIZE, channels=CHANNELS),
    }
    for name, networks, more in (
        ("base", base, {}),
        ("portrait", {"generator": GENERATOR}, {}),
        ("encoder", {"encoder": ENCODER}, {"space": "z_plus"}),
        ("identity", {"identity": IDENTITY}, {}),
    ):
        key = jax.random.key(len(name))
        params = {
            n: jax.jit(m.init_params)(key=jax.random.fold_in(key, i))
            for i, (n, m) in enumerate(networks.items())
        }
        weights.save(folder / name, networks, params, metadata=more)
    rng = np.random.default_rng(0)
    for i in (2, 10, 1):
        coarse = rng.uniform(-1, 1, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
        save_image(folder / "pictures" / f"{i}.png", coarse)
    return folder


def save_exemplars(folder, names=("1.png", "2.png", "10.png")):
    """Write a table of random codes; its path as text."""
    from jaxstyle.exemplars import Exemplars

    kinds = ("extrinsic", "intrinsic")
    module = Exemplars(names=names, num_ws=8, z_dim=8, codes=kinds)
    shape = (len(names), 8, 8)
    params = {
        kind: jax.random.normal(jax.random.key(i), shape)
        for i, kind in enumerate(kinds)
    }
    weights.save(folder, {"exemplars": module}, {"exemplars": params})
    return str(folder)


def tiny_lpips(folder):
    """Write an LPIPS of AlexNet's shape; its path as text."""
    module = LPIPS()
    params = jax.tree.map(jnp.asarray, module.init_params(key=jax.random.key(0)))
    weights.save(folder, {"lpips": module}, {"lpips": params})
    return str(folder)
