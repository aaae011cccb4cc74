"""Two generators as one: shares of layers, mixes, folders."""

import jax
import numpy as np
import pytest

from jaxstyle import blend, weights
from jaxstyle.dualstylegan import DualStyleGAN
from jaxstyle.exemplars import Exemplars
from jaxstyle.stylegan2 import layer_names
from tests.dual_models import CHANNELS, GENERATOR, SIZE, random_params
from tests.small_models import save_base, save_tuned

ALL = ("const", *layer_names(1024))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    base = save_base(folder / "base")
    return base, save_tuned(folder / "tuned", base)


def run(*args):
    blend.main([str(a) for a in args])


def test_shares_are_the_published_ones():
    """Places count the published way; `level` is half a resolution."""
    hard = blend.layer_shares(ALL, 32)
    first = {name for name, share in hard.items() if share == 0}
    assert first == {"const", *layer_names(32)}
    later = blend.layer_shares(ALL, 32, level=1)
    changed = {name for name in hard if hard[name] != later[name]}
    assert changed == {"up_64"}
    smooth = blend.layer_shares(ALL, 32, width=2.0)
    assert smooth["up_32"] == 0.5
    np.testing.assert_allclose(smooth["conv_64"], 1 / (1 + np.exp(-3 / 2)))
    assert smooth["conv_32"] == smooth["rgb_32"] > smooth["up_32"] > smooth["rgb_16"]
    assert blend.layer_shares(ALL, 4, width=1e-3)["conv_1024"] == 1


def test_mixes_are_exact_at_the_ends():
    a, b = ({"x": np.float32([v, 3])} for v in (1e8, 1.25))
    np.testing.assert_array_equal(blend.mix(a, b, 0)["x"], a["x"])
    np.testing.assert_array_equal(blend.mix(a, b, 1)["x"], b["x"])
    trees = [{"x": np.float32([v])} for v in (0, 2, 8)]
    for t, value in ((0, 0), (0.25, 1), (0.5, 2), (0.75, 5), (1, 8)):
        assert blend.way_between(trees, t)["x"] == value


def test_command_swaps_layers(folders, tmp_path, capsys):
    base, tuned = folders
    run(tuned, base, "--resolution", 8, "--out", tmp_path / "toon")
    assert "up_16      1.00" in capsys.readouterr().out
    (_, a), (_, b) = weights.load(tuned), weights.load(base)
    model, made = weights.load(tmp_path / "toon")
    for name, layer in made["generator"]["synthesis"].items():
        source = b if name.endswith("_16") else a
        jax.tree.map(
            np.testing.assert_array_equal, layer, source["generator"]["synthesis"][name]
        )
    for part in ("mapping", "noise_const", "w_avg"):
        jax.tree.map(
            np.testing.assert_array_equal,
            made["generator"][part],
            a["generator"][part],
        )
    assert list(model) == ["generator"]
    assert weights.read_config(tmp_path / "toon")["metadata"]["base"] == base


def test_command_mixes_all_weights(folders, tmp_path):
    base, tuned = folders
    run(base, tuned, "--share", 0.25, "--out", tmp_path / "half")
    a, b, made = (
        weights.load(f)[1]["generator"] for f in (base, tuned, tmp_path / "half")
    )
    got, first, second = (p["synthesis"]["conv_8"]["weight"] for p in (made, a, b))
    np.testing.assert_allclose(got, 0.75 * first + 0.25 * second, atol=1e-6)


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    """Two DualStyleGAN styles on one base, and one on another."""
    folder, found = tmp_path_factory.mktemp("styles"), []
    base = random_params(GENERATOR, np.random.default_rng(0))
    for i, name in enumerate(("ink", "wax", "oil")):
        rng = np.random.default_rng(i)
        networks = {
            "generator": GENERATOR,
            "dual": DualStyleGAN(SIZE, channels=CHANNELS, w_dim=8),
            "exemplars": Exemplars(("a", "b"), num_ws=8, z_dim=8),
        }
        params = {n: random_params(m, rng) for n, m in networks.items()}
        params["generator"] = base if name != "oil" else params["generator"]
        weights.save(folder / name, networks, params, metadata={"space": "z_plus"})
        found.append(str(folder / name))
    return found


def test_styles_on_one_base_mix(styles, tmp_path, capsys):
    run(*styles[:2], "--share", 0.5, "--out", tmp_path / "both")
    model, params = weights.load(tmp_path / "both")
    assert model.exemplars.names == ("ink/a", "ink/b", "wax/a", "wax/b")
    parts = [weights.load(s)[1] for s in styles[:2]]
    codes = [p["exemplars"]["extrinsic"] for p in parts]
    np.testing.assert_array_equal(
        params["exemplars"]["extrinsic"], np.concatenate(codes)
    )
    got, *ends = (p["dual"]["color_7"]["weight"] for p in (params, *parts))
    np.testing.assert_allclose(got, (ends[0] + ends[1]) / 2, atol=1e-6)
    with pytest.raises(SystemExit):
        run(styles[0], styles[2], "--share", 0.5, "--out", tmp_path / "other")
    assert "different base generators" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--out", "x"], "either --resolution"),
        (["--out", "x", "--resolution", "16"], "must be one of 4, 8"),
        (["--resolution", "8"], "--out is not given"),
        (["--out", "x", "--share", "1", "--width", "2"], "go with --resolution"),
        (["--out", "x", "--resolution", "8", "--width", "0"], "above 0"),
    ],
)
def test_mistakes(folders, capsys, flags, message):
    with pytest.raises(SystemExit):
        run(*folders, *flags)
    assert message in capsys.readouterr().err


def test_other_architectures(folders, styles, capsys):
    with pytest.raises(SystemExit):
        run(folders[0], styles[0], "--share", 1, "--out", "x")
    assert "both must be of one architecture" in capsys.readouterr().err
