"""The autoencoder learns; the fitted mapping draws codes of the right moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstyle
from jaxstyle.stylegan2 import mapping
from train import warm_start


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_mapping_draws_the_codes_moments(depth):
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(4000, 16)) @ rng.normal(size=(16, 16)) * 0.1 + 2.0
    params = warm_start.gaussian_mapping(codes, depth, 16)
    z = jax.random.normal(jax.random.key(0), (4000, 16))
    drawn = np.asarray(mapping(params, z))
    np.testing.assert_allclose(drawn.mean(0), codes.mean(0), atol=0.06)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(codes.T), atol=0.06)


@pytest.mark.slow
def test_few_steps_make_a_network(tmp_path):
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 255, (12, 1, 1, 3))
    pictures = np.broadcast_to(colors, (12, 32, 32, 3)).astype(np.uint8)
    np.save(tmp_path / "flat.npy", pictures)
    args = f"--data {tmp_path}/flat.npy --out {tmp_path}/run --size 32 --w-dim 16"
    args += " --channels 8 8 8 8 --mapping-depth 2 --steps 8 --batch 8 --log-every 1"
    warm_start.main(args.split())
    lines = (tmp_path / "run/autoencoder/metrics.jsonl").read_text().splitlines()
    losses = [
        float(line.split('"loss": ')[1].split(",")[0].rstrip("}")) for line in lines
    ]
    assert losses[-1] < losses[0]
    model, params = jaxstyle.load(tmp_path / "run/model")
    image, _ = model.generator.apply({"params": params["generator"]}, jnp.ones((1, 16)))
    assert image.shape == (1, 32, 32, 3)
