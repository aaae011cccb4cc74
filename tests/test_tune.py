"""Pivotal tuning: the generator itself moves towards a photo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstyle import tune, weights
from jaxstyle.errors import UserError
from jaxstyle.pipeline import pictures
from tests.small_models import GENERATOR, save_base


def setting():
    """Two generators that differ in their synthesis network, codes, the second's
    pictures of them."""
    base, other = (GENERATOR.init_params(key=jax.random.key(i)) for i in (0, 1))
    other = base | {"synthesis": other["synthesis"]}
    shape = (2, GENERATOR.num_ws, GENERATOR.w_dim)
    codes = np.asarray(jax.random.normal(jax.random.key(2), shape))
    return base, codes, np.clip(pictures(GENERATOR, other, codes), -1, 1)


def test_moves_towards_each_photo_and_leaves_the_rest():
    base, codes, photos = setting()
    kept = jax.tree.map(np.array, base)
    options = tune.TuneOptions(40, 1e-2)
    found = tune.tune(GENERATOR, base, photos, codes, options, progress=False)
    jax.tree.map(np.testing.assert_array_equal, kept, base)
    before = pictures(GENERATOR, base, codes)
    for i, params in enumerate(found):
        assert params["mapping"] is base["mapping"]
        assert params["noise_const"] is base["noise_const"]
        after = pictures(GENERATOR, params, codes[i : i + 1])[0]
        near, far = (np.square(x - photos[i]).mean() for x in (after, before[i]))
        assert near < 0.5 * far
    # Alone it goes as in company.
    (alone,) = tune.tune(
        GENERATOR, base, photos[1:], codes[1:], options, progress=False
    )
    jax.tree.map(np.testing.assert_array_equal, alone, found[1])


def test_without_steps_the_generator_stays():
    base, codes, photos = setting()
    found = tune.tune(GENERATOR, base, photos, codes, tune.TuneOptions(0, 1e-3))
    assert all(params is base for params in found)


def test_a_style_moves_as_its_base_did():
    base, other, style = (
        GENERATOR.init_params(key=jax.random.key(i)) for i in range(3)
    )
    found = tune.moved(style, base, other)
    jax.tree.map(
        lambda f, s, b, o: np.testing.assert_allclose(f, s + o - b, atol=1e-6),
        *(p["synthesis"] for p in (found, style, base, other)),
    )
    jax.tree.map(np.testing.assert_array_equal, found["mapping"], style["mapping"])
    of_base = tune.moved(base, base, other)["synthesis"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        of_base,
        other["synthesis"],
    )


def test_the_model_recommends_and_the_user_decides(tmp_path):
    plain = save_base(tmp_path / "plain")
    model, params = weights.load(plain)
    advice = {"invert": {"tune": 7, "tune_lr": 0.02}}
    wise = str(tmp_path / "wise")
    weights.save(wise, dict(model), params, metadata=advice)
    assert tune.resolved(tune.TuneOptions(), plain) == tune.TuneOptions(0, 3e-4)
    assert tune.resolved(tune.TuneOptions(), wise) == tune.TuneOptions(7, 0.02)
    given = tune.TuneOptions(9, 0.5)
    assert tune.resolved(given, wise) == given
    assert tune.resolved(tune.TuneOptions(0), wise).tune == 0
    for wrong, message in (
        (tune.TuneOptions(tune=-1), "--tune is -1"),
        (tune.TuneOptions(tune_lr=0.0), "--tune-lr is 0"),
        (tune.TuneOptions(tune_lr=float("nan")), "--tune-lr is nan"),
    ):
        with pytest.raises(UserError, match=message):
            tune.resolved(wrong, wise)
    for steps, name in ((0, wise), (None, plain)):
        with pytest.raises(UserError, match="--tune-lr is 0.5, but nothing is tuned"):
            tune.resolved(tune.TuneOptions(steps, 0.5), name)


def test_photos_of_any_size():
    base, codes, _ = setting()
    photos = jnp.zeros((1, 40, 40, 3))
    options = tune.TuneOptions(1, 1e-3)
    (found,) = tune.tune(GENERATOR, base, photos, codes[:1], options, progress=False)
    assert pictures(GENERATOR, found, codes[:1]).shape == (1, 16, 16, 3)
