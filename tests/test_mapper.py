"""The latent mapper: by hand, and what it does to codes in the commands."""

import jax
import numpy as np
import pytest

from jaxstyle import edits, mapper, weights
from jaxstyle.errors import UserError
from jaxstyle.mapper import Mapper
from jaxstyle.stylegan2 import Generator
from tests.dual_models import random_params

MODULE = Mapper(num_ws=6, w_dim=4, depth=2)
GENERATOR = Generator(16, channels=(2, 2, 2), mapping_depth=1, z_dim=4, w_dim=4)


@pytest.fixture(scope="module")
def params():
    params = random_params(MODULE, np.random.default_rng(0))
    # As large as fresh ones are: 1 / 0.01.
    return jax.tree.map(lambda p: 100 * p, params)


def by_hand(params, codes, norm):
    """w + 0.1 M(w) in float64; rows 0, 1-2 and 3-5 are the three groups."""
    moved = np.array(codes, np.float64)
    for group, rows in (("coarse", [0]), ("middle", [1, 2]), ("fine", [3, 4, 5])):
        x = np.array(codes[:, rows], np.float64)
        axis = 2 if norm == "width" else 1
        x /= np.sqrt(np.mean(x**2, axis, keepdims=True) + 1e-8)
        for i in range(MODULE.depth):
            layer = params[group][f"dense_{i}"]
            x = x @ (np.float64(layer["weight"]) * 0.01 / 2) + 0.01 * layer["bias"]
            x = np.where(x > 0, x, 0.2 * x) * np.sqrt(2)
        moved[:, rows] += 0.1 * x
    return moved


@pytest.mark.parametrize("norm", ["width", "rows"])
def test_moves_by_hand(params, norm):
    codes = np.random.default_rng(1).standard_normal((2, 6, 4), np.float32)
    module = MODULE.clone(norm=norm)
    got = mapper.move((module, params), codes)
    np.testing.assert_allclose(got, by_hand(params, codes, norm), rtol=1e-5, atol=1e-6)
    twice = mapper.move((module, params), codes, 2.0)
    np.testing.assert_allclose(twice - codes, 2 * (got - codes), atol=1e-5)
    np.testing.assert_array_equal(mapper.move((module, params), codes, 0), codes)


def test_groups_that_stay():
    module = MODULE.clone(groups=("middle",))
    params = random_params(module, np.random.default_rng(0))
    assert list(params) == ["middle"]
    codes = np.ones((1, 6, 4), np.float32)
    moves = module.apply({"params": params}, codes, method="moves")[0]
    assert (moves[:1] == 0).all() and (moves[3:] == 0).all() and (moves[1:3] != 0).all()
    with pytest.raises(UserError, match="coarse, middle, fine"):
        MODULE.clone(groups=("all",)).init_params(key=jax.random.key(0))


def test_moves_of_options(params, tmp_path):
    weights.save(tmp_path / "old", {"mapper": MODULE}, {"mapper": params})
    direction = np.ones((1, 4), np.float32)
    np.savez(tmp_path / "age.npz", direction=direction)
    options = edits.MoveOptions(
        edit=("age:+2",),
        directions=str(tmp_path),
        mapper=str(tmp_path / "old"),
        mapper_strength=0.5,
    )
    codes = np.random.default_rng(1).standard_normal((3, 6, 4), np.float32)
    moves = edits.read_moves(options, GENERATOR)
    assert moves.label == "old+0.5_age+2"
    expected = mapper.move((MODULE, params), codes, 0.5) + 2 * direction
    np.testing.assert_allclose(moves.apply(codes), expected, atol=1e-6)
    nothing = edits.read_moves(edits.MoveOptions(), GENERATOR)
    assert nothing.label == ""
    np.testing.assert_array_equal(nothing.apply(codes), codes)
    with pytest.raises(UserError, match="moves codes of 6 rows"):
        mapper.load(str(tmp_path / "old"), GENERATOR.clone(size=8, channels=(2, 2)))
    with pytest.raises(UserError, match="must be a run of python -m train.mapper"):
        mapper.load("lpips_alexnet", GENERATOR)
    with pytest.raises(UserError, match="no --mapper"):
        edits.read_moves(edits.MoveOptions(mapper_strength=2.0), GENERATOR)
