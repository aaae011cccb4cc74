import jax
import numpy as np
import pytest

from train import optim
from train.state import update_ema


@pytest.mark.parametrize("every, factor", [(0, 1), (4, 4 / 5), (16, 16 / 17)])
def test_adam_under_lazy_regularisation(every, factor):
    lr, beta = 0.1 * factor, 0.99**factor
    params = {"a": np.float32(1.0)}
    tx = optim.adam(0.1, lazy_every=every)
    state, expected, second = tx.init(params), 1.0, 0.0
    for i, grad in enumerate([0.5, -2.0, 0.1], start=1):
        params, state = optim.apply(tx, {"a": np.float32(grad)}, state, params)
        second = beta * second + (1 - beta) * grad**2
        expected -= lr * grad / (np.sqrt(second / (1 - beta**i)) + 1e-8)
        np.testing.assert_allclose(params["a"], expected, 1e-5)


def test_frozen_parameters_keep_no_moments():
    params = {"a": {"w": np.ones(5)}, "ab": {"w": np.ones(7)}}
    tx = optim.frozen(optim.adam(0.1), ["a/"])
    state = tx.init(params)
    assert not any(np.shape(x) == (5,) for x in jax.tree.leaves(state))
    moved, _ = optim.apply(tx, params, state, params)
    np.testing.assert_array_equal(moved["a"]["w"], params["a"]["w"])
    assert (moved["ab"]["w"] < 1).all()


def test_parameters_without_gradient_stay():
    params = {"noise_const": np.float32(0.3)}
    tx = optim.adam(0.1)
    moved, _ = optim.apply(tx, {"noise_const": np.float32(0)}, tx.init(params), params)
    assert moved["noise_const"] == params["noise_const"]


def test_average_is_exact_where_equal():
    value = np.float32(0.1) * np.arange(100, dtype=np.float32)
    np.testing.assert_array_equal(update_ema(value, value, 0.998), value)
    np.testing.assert_allclose(update_ema(1.0, 2.0, 0.75), 1.25)
