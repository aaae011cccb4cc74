"""Pictures, codes and logits of NVIDIA's networks from a pickle of ours."""

from functools import partial

import jax
import numpy as np
import pytest

import convert
from jaxstyle.errors import UserError
from jaxstyle.stylegan2 import mapping
from tests.convert.files import small_networks, small_nvidia
from tests.filled import (
    filled_state_dict,
    golden,
    input_array,
    nhwc,
    picture,
    relative_error,
    write_nvidia,
)

# The bound of the golden data: 2e-5 of the largest reference value.
BOUND = 2e-5


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Networks and parameters of the golden snapshot."""
    path = tmp_path_factory.mktemp("nvidia") / "network-snapshot.pkl"
    write_nvidia(
        path,
        G_ema=filled_state_dict("nvidia_ada_g_64"),
        D=filled_state_dict("nvidia_ada_d_64"),
    )
    return convert.load(path)


@pytest.fixture(scope="module")
def generator(converted):
    """Call the generator: `generator(codes, space="w_plus", …)`."""
    networks, params, _ = converted

    def call(codes, **kwargs):
        apply = partial(networks["generator"].apply, **kwargs)
        return jax.jit(apply)({"params": params["generator"]}, codes)

    return call


def test_mapping(generator):
    z, expected = input_array("z", (2, 512)), golden("nvidia_ada_64")
    w = generator(z, method="mapping")
    assert relative_error(w, expected["ws_row0"]) < BOUND


def test_truncation(generator):
    z, expected = input_array("z", (2, 512)), golden("nvidia_ada_64")
    _, out = generator(z, psi=0.7)
    for row in (0, 9):
        assert relative_error(out["w_plus"][:, row], expected["ws_psi07"]) < BOUND
    _, out = generator(z[:1], psi=0.7, cutoff=4)
    assert relative_error(out["w_plus"], expected["ws_psi07_cut4"]) < BOUND


@pytest.mark.parametrize("noise", ["const", "none"])
def test_pictures(generator, noise):
    name = {"const": "img_wplus", "none": "img_wplus_nonoise"}[noise]
    codes = input_array("wplus", (1, 10, 512))
    image, _ = generator(codes, space="w_plus", noise=noise)
    assert relative_error(image, nhwc(golden("nvidia_ada_64")[name])) < BOUND


@pytest.mark.parametrize("batch", [4, 8])
def test_logits(converted, batch):
    networks, params, _ = converted
    logits, _ = jax.jit(networks["discriminator"].apply)(
        {"params": params["discriminator"]}, picture("real", 8, 64)[:batch]
    )
    expected = golden("nvidia_ada_64")[f"logits_b{batch}"]
    assert relative_error(logits, expected) < BOUND


def test_report(tmp_path):
    g, d = small_nvidia()
    g = {k: v for k, v in g.items() if k != "mapping.w_avg"}
    path = write_nvidia(
        tmp_path / "a.pkl", attributes={"conv_clamp": 256, "group_size": 8}, G=g, D=d
    )
    networks, params, report = convert.load(path)
    assert networks == small_networks()[0]
    text = "\n".join(report.lines())
    assert "clamps its layers at 256" in text
    assert "over 8 pictures, ours over 4" in text
    assert "no average latent: estimated from 10,000 codes" in text
    again = convert.load(path)[1]["generator"]["w_avg"]
    assert (again == params["generator"]["w_avg"]).all()
    z = jax.random.normal(jax.random.key(1), (10_000, networks["generator"].z_dim))
    w = mapping(params["generator"]["mapping"], z)
    assert np.abs(np.mean(w, 0) - again).max() < 0.1 * np.std(w)

    write_nvidia(tmp_path / "b.pkl", G=g, G_ema=g)
    networks, _, report = convert.load(tmp_path / "b.pkl")
    assert set(networks) == {"generator"}
    assert "G: raw training weights" in "\n".join(report.lines())
    assert "--perceptual lpips" in "\n".join(report.lines())


def test_every_missing_key_is_named(tmp_path):
    g, d = small_nvidia()
    for state, name in ((g, "G_ema"), (d, "D")):
        for key in state:
            if key in ("mapping.w_avg",) or key.startswith("mapping.fc1"):
                continue
            less = {k: v for k, v in state.items() if k != key}
            path = write_nvidia(tmp_path / "a.pkl", **{name: less})
            with pytest.raises(UserError, match="missing keys") as error:
                convert.load(path)
            assert key in str(error.value)
