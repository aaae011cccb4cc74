"""Adaptive augmentation against the original's pictures and its controller."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstyle.errors import UserError
from tests.filled import golden, input_array, nhwc, picture, relative_error
from train import augment


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(picture("real", 3, 64))


@pytest.mark.parametrize("margin", [None, 40])
def test_equals_the_original(images, margin):
    data = golden("stylegan2_ada_augment")
    apply = jax.jit(functools.partial(augment.apply_affine, margin=margin))
    moved = apply(images, data["G_inverse"])
    assert relative_error(moved, nhwc(data["affine_only"])) < 2e-5
    colored = augment.apply_color(moved, data["C"])
    assert relative_error(colored, nhwc(data["augmented"])) < 2e-5


def test_controller_equals_the_original():
    state, expected = augment.start_control(), golden("stylegan2_ada_augment")
    step = jax.jit(augment.control)
    for i, p in enumerate(expected["controller_p"]):
        logits = input_array(f"ada_pred_{i}", (16, 1)) + (2 if i < 16 else -2)
        state = step(state, logits)
        assert abs(state.p - p) < 1e-9
    assert state.calls == 0
    for p, logits in ((1.0, 1.0), (0.0, -1.0)):
        state = augment.start_control(p)
        state = step(state, jnp.full((16, 1), logits))
        for _ in range(7):
            state = step(state, jnp.full((16, 1), logits))
        assert state.p == p


@pytest.mark.slow
def test_nothing_happens_at_0(images):
    keys = jax.random.split(jax.random.key(0), 3)
    for variant in augment.VARIANTS:
        run = jax.jit(functools.partial(augment.augment, variant=variant))
        same = run(images, 0.0, keys=keys)
        # The filter up and down again is the identity.
        np.testing.assert_allclose(same, images, atol=2e-6)
        changed = run(images, 1.0, keys=keys)
        assert min(np.abs(changed - images).mean((1, 2, 3))) > 0.05


def test_each_picture_has_its_own_draw(images):
    keys = jax.random.split(jax.random.key(0), 3)
    run = jax.jit(augment.augment)
    alone = run(images, 0.7, keys=keys)[2]
    np.testing.assert_allclose(
        run(images[::-1], 0.7, keys=keys[::-1])[0], alone, atol=1e-5
    )


def test_beyond_the_margin_lie_mirrors(images):
    far = jnp.tile(jnp.eye(3).at[0, 2].set(200.0), (3, 1, 1))
    moved = augment.apply_affine(images, far, margin=20)
    assert np.abs(moved).max() < 1.5 and moved.std() > 0.1
    for margin in (2, 64):
        with pytest.raises(UserError, match="margin is"):
            augment.apply_affine(images, far, margin=margin)


@functools.partial(jax.jit, static_argnames=("variant",))
def drawn(p, *, variant="published"):
    keys = jax.random.split(jax.random.key(3), 4000)
    affine = jax.vmap(lambda k: augment.draw_affine(k, p, 64, variant))(keys)
    return affine, jax.vmap(lambda k: augment.draw_color(k, p))(keys)


@pytest.mark.parametrize("variant", augment.VARIANTS)
def test_draws(variant):
    """Shares and deviations of what is drawn, against the published numbers."""
    affine, color = (np.asarray(x) for x in drawn(0.3, variant=variant))
    whole = np.linalg.det(affine[:, :2, :2])
    # Mirrored: half of 0.3. Quarter turns and scalings do not change the sign.
    assert abs((whole < 0).mean() - 0.15) < 0.03
    # Isotropic scaling alone changes the area: 2 ** N(0, 0.2), squared.
    scaled = np.abs(np.abs(whole) - 1) > 1e-4
    assert abs(scaled.mean() - 0.3) < 0.03
    assert abs(np.log2(np.abs(whole[scaled])).std() - 0.4) < 0.03
    moved = np.abs(affine[:, :2, 2]).max(1)
    if variant == "paper":
        assert 4 < moved[moved > 0.5].mean() < 12
    else:
        # An eighth of a pixel, the published slip.
        assert moved.max() < 1.5
    # Colours of gray stay gray, but for brightness and the flip.
    gray = np.array([0.5, 0.5, 0.5, 1])
    out = color @ gray
    assert np.ptp(out[:, :3], 1).max() < 1e-5
    assert abs((np.abs(out[:, 0] - 0.5) < 1e-6).mean() - 0.7 * 0.7 * 0.85) < 0.04
    ident = np.abs(color - np.eye(4)).max((1, 2)) < 1e-6
    assert abs(ident.mean() - 0.7**4 * 0.85) < 0.03
    assert (np.abs(drawn(0.0, variant=variant)[0] - np.eye(3)) < 1e-6).all()


def test_unknown_variant():
    with pytest.raises(UserError, match="published or paper"):
        augment.draw_affine(jax.random.key(0), 0.5, 64, "nvidia")


def test_gradients_of_any_order(images):
    """R1 differentiates D of augmented pictures twice."""
    small = images[:1, ::4, ::4]
    key = jax.random.split(jax.random.key(1), 1)

    def penalty(weight):
        def score(x):
            return jnp.sum(jnp.tanh(weight * augment.augment(x, 1.0, keys=key)))

        return jnp.sum(jnp.square(jax.grad(score)(small)))

    slope = jax.jit(jax.grad(penalty))
    numeric = (penalty(1.01) - penalty(0.99)) / 0.02
    assert abs(slope(1.0) - numeric) < 0.02 * abs(numeric)


@pytest.mark.parametrize("axis", [1, 2])
def test_the_filters_are_each_others_gradients(axis):
    up, down = augment.UP_DOWN[axis]
    x = jax.random.normal(jax.random.key(0), (2, 10, 10, 3))
    y = jax.random.normal(jax.random.key(1), up(x).shape)
    assert y.shape[axis] == 20 and down(y).shape == x.shape
    np.testing.assert_allclose(jnp.sum(up(x) * y), jnp.sum(x * down(y)), rtol=1e-4)
    # What XLA derives from the sums themselves.
    for filtered, own, by, at in (
        (augment._finer, up, y, x),
        (augment._coarser, down, x, y),
    ):
        _, derived = jax.vjp(lambda v, f=filtered: f(v, axis), at)
        _, given = jax.vjp(own, at)
        np.testing.assert_allclose(given(by)[0], derived(by)[0], atol=1e-5)


def test_in_a_scheme():
    """The options decide; p is part of the state and moves by its own rule."""
    images, logits = jnp.ones((2, 8, 8, 3)), jnp.ones((4, 1))
    off = augment.AugmentOptions()
    assert augment.start_extra(off) == {}
    assert augment.shown(off, {}, images, None) is images
    assert augment.learned(off, {"other": 1}, logits) == ({"other": 1}, {})
    fixed = augment.AugmentOptions(augment=True, augment_p=0.25)
    extra = augment.start_extra(fixed)
    assert augment.learned(fixed, extra, logits) == (extra, {})
    assert extra["ada"].p == 0.25
    on = augment.AugmentOptions(augment=True, ada_length=16, ada_every=1)
    extra, metrics = augment.learned(on, augment.start_extra(on) | {"a": 1}, logits)
    assert extra["a"] == 1 and extra["ada"].p == metrics["ada_p"] == 0.25
    assert metrics["ada_sign"] == 1
    for wrong in ({"augment_p": 2.0}, {"augment_p": 0.5}, {"ada_length": 0}):
        with pytest.raises(UserError, match="--a"):
            augment.check(augment.AugmentOptions(**wrong))
