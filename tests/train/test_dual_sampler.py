"""The sampler's matching against the original's, and a run of its training."""

import functools

import jax
import numpy as np
import pytest

import convert
from convert import pt
from jaxstyle import weights
from jaxstyle.exemplars import Exemplars
from tests.filled import filled_state_dict, golden, input_array, relative_error
from train import dual_sampler


def test_an_epoch_equals_the_original(tmp_path):
    state = {
        part: filled_state_dict(f"dualstylegan_sampler_{part}")
        for part in ("color", "structure")
    }
    pt.write(tmp_path / "sampler.pt", state)
    networks, params, _ = convert.load(tmp_path / "sampler.pt")
    data, expected = input_array("sampler_data", (256, 3584)), "dualstylegan_sampler"
    expected = golden(expected)
    noise = [input_array(f"sampler_epoch_e{i}", (128, 128)) for i in range(4)]
    run = jax.jit(functools.partial(dual_sampler.epoch, networks["sampler_structure"]))
    new, losses = run(
        params["sampler_structure"],
        data.reshape(256, 7, 512),
        np.stack(noise),
        np.arange(256)[::-1],
        1e-3,
    )
    assert relative_error(losses, expected["epoch_losses"]) < 1e-5
    rms = np.sqrt(np.mean(np.square(new["dense_0"]["weight"], dtype=np.float64)))
    assert abs(rms - expected["epoch_lin1_rms_after"]) < 1e-6
    mean = new["norm_1"]["mean"]
    assert relative_error(mean, expected["epoch_bn2_running_mean_after"]) < 1e-4


def test_data():
    codes = np.arange(3 * 8 * 2, dtype=np.float32).reshape(3, 8, 2)
    key = jax.random.key(0)
    data = dual_sampler.make_data(codes, 0.0, key=key)
    assert data["sampler_structure"].shape == (999, 7, 2)
    np.testing.assert_array_equal(data["sampler_color"][5], codes[2, 7:])
    noise = dual_sampler.make_data(codes, 0.05, key=key)["sampler_color"]
    assert abs((noise - data["sampler_color"]).std() - 0.05) < 0.003
    # The published code leaves nothing of more than a thousand.
    many = dual_sampler.make_data(np.zeros((1001, 8, 2)), 0.0, key=key)
    assert len(many["sampler_color"]) == 1001


@pytest.fixture
def style(tmp_path):
    """A style folder with exemplars around two points."""
    module = Exemplars(
        names=tuple("abcdef"), num_ws=8, z_dim=4, codes=("extrinsic", "refined")
    )
    codes = jax.random.normal(jax.random.key(0), (6, 8, 4)) * 0.1
    codes = codes.at[::2].add(1.0).at[1::2].add(-1.0)
    params = {"extrinsic": codes * 5, "refined": codes}
    weights.save(tmp_path / "style", {"exemplars": module}, {"exemplars": params})
    return tmp_path / "style"


@pytest.mark.slow
def test_a_run_learns_the_codes_and_goes_on(style, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--weights", str(style), "--out", str(out), "--lr", "0.02"]
    flags += ["--mesh-data", "1"]
    dual_sampler.main([*flags, "--steps", "15"])
    dual_sampler.main([*flags, "--steps", "40"])
    assert "continuing" in capsys.readouterr().out
    model, params = weights.load(out)
    assert set(model) == {"sampler_structure", "sampler_color"}
    z = jax.random.normal(jax.random.key(1), (256, 128))
    codes, _ = model.sampler_structure.apply({"params": params["sampler_structure"]}, z)
    assert codes.shape == (256, 7, 4)
    # Two clusters, and codes near one or the other.
    level = np.asarray(codes).mean((1, 2))
    near = np.minimum(np.abs(level - 1), np.abs(level + 1))
    assert np.median(near) < 0.3
    assert 0.2 < (level > 0).mean() < 0.8
    # The same in one go.
    whole = tmp_path / "whole"
    flags[3] = str(whole)
    dual_sampler.main([*flags, "--steps", "40"])
    _, again = weights.load(whole)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, again
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--codes", "intrinsic"], "holds extrinsic, refined"),
        (["--batch", "2000"], "the data have 996 codes"),
    ],
)
def test_mistakes(style, tmp_path, capsys, flags, message):
    out = str(tmp_path / "run")
    with pytest.raises(SystemExit):
        dual_sampler.main(["--weights", str(style), "--out", out, *flags])
    assert message in capsys.readouterr().err
