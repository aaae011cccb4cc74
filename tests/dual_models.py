"""A face model, an encoder to z+, judges and portraits small enough for every test."""

import jax
import numpy as np

from jaxstyle import weights
from jaxstyle.dualstylegan import DualStyleGAN
from jaxstyle.encoders import GradualStyleEncoder
from jaxstyle.exemplars import Exemplars, Sampler
from jaxstyle.features.identity import ArcFace
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
STYLE_NAMES = ("b.jpg", "a.jpg", "c.jpg")
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
        rng = np.random.default_rng(len(name))
        # Codes about as large as a mapping network takes, not thousands.
        scale = 0.4 if name == "encoder" else 1.0
        params = {n: random_params(m, rng, scale) for n, m in networks.items()}
        weights.save(folder / name, networks, params, metadata=more)
    rng = np.random.default_rng(0)
    for i in (2, 10, 1):
        coarse = rng.uniform(-1, 1, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
        save_image(folder / "pictures" / f"{i}.png", coarse)
    return folder


def save_style(path):
    """Write a style as the converter does, with an encoder and samplers; its path."""
    key, shape = jax.random.key(0), {"size": 32, "channels": (6, 6, 4, 4), "w_dim": 8}
    networks = {
        "generator": Generator(mapping_depth=2, z_dim=8, **shape),
        "dual": DualStyleGAN(**shape),
        "encoder": ENCODER.clone(channels=(4, 6, 8, 10)),
        "exemplars": Exemplars(names=STYLE_NAMES, num_ws=8, z_dim=8),
        "sampler_structure": Sampler(rows=7, w_dim=8, z_dim=4, width=4),
        "sampler_color": Sampler(rows=1, w_dim=8, z_dim=4, width=4),
    }
    params = {name: m.init_params(key=key) for name, m in networks.items()}
    params["dual"] = networks["dual"].init_params(key=key, init_noise=1.0)
    params["exemplars"] = {"extrinsic": jax.random.normal(key, (3, 8, 8))}
    weights.save(path, networks, params, metadata={"space": "z_plus"})
    return str(path)


def save_exemplars(folder, names=("1.png", "2.png", "10.png")):
    """Write a table of random codes; its path as text."""
    kinds = ("extrinsic", "intrinsic")
    module = Exemplars(names=names, num_ws=8, z_dim=8, codes=kinds)
    shape = (len(names), 8, 8)
    rng = np.random.default_rng(0)
    params = {kind: rng.standard_normal(shape, np.float32) for kind in kinds}
    weights.save(folder, {"exemplars": module}, {"exemplars": params})
    return str(folder)


def random_params(module, rng, scale=1.0):
    """Normal parameters, without a program to compile; variances are positive."""
    shapes = jax.eval_shape(lambda: module.init_params(key=jax.random.key(0)))

    def draw(path, shape):
        values = rng.standard_normal(shape.shape, np.float32)
        positive = jax.tree_util.keystr(path).endswith("['var']")
        return np.abs(values) + 0.5 if positive else scale * values

    return jax.tree_util.tree_map_with_path(draw, shapes)
