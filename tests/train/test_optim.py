import jax
import numpy as np
import pytest

from tests.filled import golden
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


def torch_order(name, array):
    """A golden array [.., out, in ..] as ours."""
    axes = {"vec": (0,), "mat": (1, 0), "conv": (2, 3, 1, 0)}[name]
    return np.transpose(array, axes)


def test_ranger_equals_the_original():
    expected = golden("ranger")
    names = ("vec", "mat", "conv")
    params = {n: torch_order(n, expected[f"p0/{n}"]) for n in names}
    tx = optim.ranger(float(expected["lr"]))
    state, step = tx.init(params), jax.jit(lambda *a: optim.apply(tx, *a))
    for i in range(20):
        grads = {n: torch_order(n, expected[f"grads/{n}"][i]) for n in names}
        params, state = step(grads, state, params)
        for n in names:
            wanted = torch_order(n, expected[f"traj/{n}"][i])
            np.testing.assert_allclose(params[n], wanted, rtol=0, atol=5e-6)


def test_ranger_counts_each_parameter_alone():
    """A parameter that joins later starts as if it were the first step."""
    tx = optim.frozen(optim.ranger(0.1), [r"body/var"])
    value = np.array([1.0, -2.0], np.float32)
    params = {"body": {"w": value, "var": value}, "head": {"w": value}}
    grads = jax.tree.map(np.ones_like, params)
    step = jax.jit(lambda g, s, p, flag: optim.apply(tx, g, s, p, active=flag))
    state = tx.init(params)
    early = []
    for i in range(30):
        # The frozen statistics move on their own; the lookahead must not see them.
        params["body"]["var"] = params["body"]["var"] + 1
        params, state = step(grads, state, params, {"head": np.bool_(i >= 10)})
        early.append(params)
    np.testing.assert_array_equal(early[9]["head"]["w"], value)
    for i in range(20):
        late, first = early[10 + i]["head"]["w"], early[i]["body"]["w"]
        np.testing.assert_allclose(late, first, rtol=1e-6)
    np.testing.assert_array_equal(early[-1]["body"]["var"], value + 30)


def test_ranger_centres_over_the_whole_array():
    tx = optim.ranger(1.0, whole=["const"])
    params = {"const": np.zeros((2, 2), np.float32), "w": np.zeros((2, 2), np.float32)}
    grads = jax.tree.map(lambda _: np.array([[1.0, 2.0], [3.0, 6.0]]), params)
    moved, _ = optim.apply(tx, grads, tx.init(params), params)
    np.testing.assert_allclose(moved["const"], [[2, 1], [0, -3]], atol=1e-6)
    np.testing.assert_allclose(moved["w"], [[1, 2], [-1, -2]], atol=1e-6)
