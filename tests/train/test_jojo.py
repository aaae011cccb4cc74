"""JoJoGAN's step: against the original, across devices, and what its options mean."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import convert
from convert import pt
from convert.stylegan2 import generator_state
from jaxstyle import images, weights
from jaxstyle.align import AlignOptions
from jaxstyle.errors import UserError
from jaxstyle.features.identity import ArcFace
from jaxstyle.stylegan2 import Discriminator, Generator, style_rows
from tests import small_models
from tests.filled import (
    filled_state_dict,
    golden,
    input_array,
    nhwc,
    picture,
    relative_error,
)
from train import fits, jojo, loop, optim, references, sharding, styles
from train.cli import RunOptions
from train.sharding import make_mesh
from train.state import create_state


def optimizer(options):
    return optim.frozen(optim.adam(options.lr), jojo.NOT_TRAINED)


# Parity


@pytest.fixture(scope="module")
def original(request, tmp_path_factory):
    """Networks of a size, through a file and convert."""
    size = request.param
    path = tmp_path_factory.mktemp("original") / "base.pt"
    content = {
        "g_ema": filled_state_dict(f"stylegan2_g_{size}"),
        "d": filled_state_dict(f"stylegan2_d_{size}"),
        "latent_avg": golden(f"stylegan2_g_{size}")["w_mean"][0],
    }
    pt.write(path, content)
    networks, params, _ = convert.load(path)
    path.unlink()
    return size, networks, params


def parity(original, run, steps):
    """One golden run; its losses, gradients and changes within the README's bounds."""
    size, networks, params = original
    generator, judge = networks["generator"], networks["discriminator"]
    data = golden(f"jojogan_{size}")
    config = json.loads(str(data[f"{run}/config"]))
    count = config["batch"]
    options = jojo.Options(
        ref=(Path("r"),) * count,
        alpha=config["ui_alpha"],
        preserve_color=run == "ft_color",
        noise_mode="const",
    )
    keep = jojo.keep_weights(options, size)
    mixed = np.unique(np.array(style_rows(size))[keep < 1])
    assert mixed.tolist() == config["id_swap"]

    rows = np.array(style_rows(size))
    target = picture("target", count, size)
    reference = {
        "codes": input_array("latents", (count, generator.num_ws, 512))[:, rows],
        "features": jojo.describe(options, judge, params["discriminator"], target),
    }
    frozen = {"judge": params["discriminator"]}
    grad = jax.jit(
        jax.value_and_grad(
            lambda p, f, r, z: jojo.loss_fn(
                p,
                f,
                r,
                z,
                options=options,
                generator=generator,
                judge=judge,
                keep=keep,
                noise="const",
            ),
            has_aux=True,
        )
    )
    tx = optimizer(options)
    start = current = params["generator"]
    opt_state = tx.init(start)
    update = jax.jit(lambda g, s, p: optim.apply(tx, g, s, p))
    for i in range(steps):
        z = input_array(f"finetune_z_{i}", (count, 512))
        (loss, _), grads = grad(current, frozen, reference, z)
        expected = data[f"{run}/loss"][i]
        assert abs(loss - expected) < (2e-5 if i == 0 else 1e-3) * expected
        current, opt_state = update(grads, opt_state, current)
        if i == 0:
            state = generator_state(generator, grads)
            norms = [np.linalg.norm(state[k]) for k in data[f"{run}/grad_keys"]]
            assert relative_error(norms, data[f"{run}/grad_norm"]) < 2e-3
            after = generator_state(generator, current)
            before = generator_state(generator, start)
            keys = data[f"{run}/keys"]
            change = [np.linalg.norm(after[k] - before[k]) for k in keys]
            assert relative_error(change, data[f"{run}/delta_1"]) < 2e-3
            assert not any(np.any(after[k] != before[k]) for k in keys if "style" in k)
    return generator, current, data


@pytest.mark.parametrize("original", [64], indirect=True)
def test_discriminator_features_equal_the_original(original):
    size, networks, params = original
    options = jojo.Options(ref=(Path("r"),))
    judge, judge_params = networks["discriminator"], params["discriminator"]
    data = golden(f"jojogan_{size}")
    a, b = (
        jojo.describe(options, judge, judge_params, picture(name, 1, size))
        for name in ("imgA", "imgB")
    )
    assert [list(np.moveaxis(f, -1, 1).shape[1:]) for f in a] == [
        list(s)[-3:] for s in data["feat_shapes"]
    ]
    loss = jojo.distances(options, judge_params, a, b)[0]
    assert relative_error(loss, data["loss_AB"]) < 2e-5
    per_tap = [jnp.mean(jnp.abs(x - y)) for x, y in zip(a, b, strict=True)]
    assert relative_error(per_tap, data["l1_per_layer"]) < 2e-5


@pytest.mark.parametrize("original", [64], indirect=True)
@pytest.mark.parametrize(
    "run",
    [
        "ft",
        *(
            pytest.param(r, marks=pytest.mark.slow)
            for r in ("ft_two_refs", "ft_alpha06")
        ),
    ],
)
def test_first_step_equals_the_original(original, run):
    parity(original, run, 1)


@pytest.mark.slow
@pytest.mark.parametrize("original", [64, 256], indirect=True)
def test_five_steps_equal_the_original(original):
    generator, params, data = parity(original, "ft", 5)
    code = input_array("my_w", (1, generator.num_ws, 512))
    image, _ = generator.apply({"params": params}, code, space="w_plus")
    if generator.size == 64:
        expected = nhwc(data["ft/stylized"])
    else:
        factor = generator.size // 64
        image = image.reshape(1, 64, factor, 64, factor, 3).mean((2, 4))
        expected = nhwc(data["ft/stylized/area64"])
    assert np.abs(image - expected).max() < 1e-2 * max(1, np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("original", [1024], indirect=True)
@pytest.mark.parametrize(("run", "steps"), [("ft", 2), ("ft_color", 1)])
def test_1024_equals_the_original(original, run, steps):
    parity(original, run, steps)


# The step on small networks


GENERATOR = Generator(8, channels=(8, 8), mapping_depth=1, z_dim=16, w_dim=16)
JUDGE = Discriminator(8, channels=(8, 8))
IDENTITY = ArcFace(16, units=(1, 1), channels=(4, 8), se_ratio=2, width=8)
# Of the five layers at 8 px the published rows would keep all.
MASK = "11000"


def small_run(
    *, devices=1, style=1, steps=1, refs=1, seed=0, dtype="float32", **fields
):
    """Run the step on random networks; returns the state and the metrics."""
    options = jojo.Options(
        ref=tuple(Path(f"{i}.png") for i in range(refs)),
        run=RunOptions(seed=seed, dtype=dtype),
    )
    options = dataclasses.replace(options, **{"mask": MASK} | fields)
    generator, judge_net = GENERATOR.clone(dtype=dtype), JUDGE.clone(dtype=dtype)
    base = GENERATOR.init_params(key=jax.random.key(1))
    judge = JUDGE.init_params(key=jax.random.key(2))
    keep = jojo.keep_weights(options, 8)
    key = jax.random.key(3)
    pictures = jnp.tanh(jax.random.normal(key, (refs, 8, 8, 3)))
    codes = jax.random.normal(key, (refs, len(GENERATOR.layer_names), 16))
    identity, identity_params = None, None
    if options.id_lambda:
        identity = IDENTITY.clone(dtype=dtype)
        identity_params = IDENTITY.init_params(key=jax.random.key(4))
    frozen = jojo.frozen_of(
        options,
        generator,
        base,
        judge_net,
        judge,
        pictures,
        codes,
        identity_params,
    )
    assert ("identity" in frozen) == bool(options.id_lambda)
    assert ("base" in frozen) == bool(options.id_lambda or options.own_color)
    if options.id_lambda:
        # As later in a training: at its start both draw the same, and the loss is 0.
        frozen["base"] = GENERATOR.init_params(key=jax.random.key(5))
    tx = optimizer(options)
    state = jojo.start_state(options, base, tx)
    step = jojo.make_step(options, generator, judge_net, tx, keep, identity)
    mesh = make_mesh(style=style, devices=jax.devices()[:devices])
    metrics = []
    with jax.set_mesh(mesh):
        jitted = jax.jit(step)
        for i in range(steps):
            key = jax.random.fold_in(jax.random.key(seed), i)
            own = state.replace(key=key, step=jnp.asarray(i))
            state, values = jitted(own, frozen, {})
            # Of styles side by side there is a number each.
            metrics.append(
                {
                    k: v if v.ndim else float(v)
                    for k, v in jax.device_get(values).items()
                }
            )
    return state, metrics


def gradient_norm(state):
    """Norm of the last gradient: with beta1 0 it is Adam's first moment."""
    moment = optax.tree.get(state.opt_state["generator"], "mu")
    return float(optax.tree.norm(moment))


@pytest.mark.parametrize("id_lambda", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_one_and_eight_devices_agree(id_lambda):
    one, first = small_run(mixes=8, id_lambda=id_lambda)
    eight, other = small_run(mixes=8, devices=8, id_lambda=id_lambda)
    assert first[0].keys() == other[0].keys() and ("id" in first[0]) == (id_lambda > 0)
    for name, value in first[0].items():
        assert abs(value - other[0][name]) < 1e-5 * value
    norm = gradient_norm(one)
    assert norm > 0 and abs(norm - gradient_norm(eight)) < 1e-5 * norm
    if id_lambda:
        return
    _, first = small_run(mixes=8, steps=5)
    _, other = small_run(mixes=8, steps=5, devices=8)
    assert abs(first[-1]["loss"] - other[-1]["loss"]) < 1e-3 * first[-1]["loss"]


@pytest.mark.slow
def test_styles_side_by_side_learn_what_each_would_alone():
    together, metrics = small_run(refs=2, separate=True, steps=3, devices=2, style=2)
    on_one, again = small_run(refs=2, separate=True, steps=3)
    assert metrics[0]["loss"].shape == (2,)
    np.testing.assert_allclose(metrics[0]["loss"], again[0]["loss"], 1e-5)
    weight = together.params["generator"]["synthesis"]["conv_8"]["weight"]
    assert weight.shape[0] == 2
    other = on_one.params["generator"]["synthesis"]["conv_8"]["weight"]
    np.testing.assert_allclose(weight, other, rtol=0, atol=3e-3)
    # Different references pull the same base apart.
    assert float(jnp.abs(weight[0] - weight[1]).max()) > 1e-3


def test_colorfulness_equals_its_formula():
    gray = np.linspace(-1, 1, 16).reshape(1, 4, 4, 1).repeat(3, -1)
    # Half the pixels red, half black: r - g is 255 or 0, (r + g) / 2 - b half of that.
    red = np.full((1, 4, 4, 3), -1.0)
    red[:, :2, :, 0] = 1
    found = jojo.colorfulness(jnp.concatenate([gray, red]))
    np.testing.assert_allclose(found, [0, 1.3 * np.hypot(127.5, 63.75)], atol=1e-3)


def test_colourful_references_leave_a_head_its_colours():
    gray = np.linspace(-1, 1, 48).reshape(1, 4, 4, 3).mean(-1, keepdims=True)
    gray = np.repeat(gray, 3, -1)
    tint = np.array([1, 0, 0]) * np.where(np.arange(4) < 2, 1, -1)[:, None, None]
    # r - g spreads by as much, (r + g) / 2 - b by half of it, and means are 0.
    pale, vivid = (gray + c / 127.5 / np.hypot(1, 0.5) * tint for c in (24, 50))
    pictures = jnp.concatenate([gray, pale, vivid])
    options = jojo.Options(ref=(), own_color="auto")
    shares = jojo.own_color_shares(options, pictures)
    np.testing.assert_allclose(shares, [0, 0.5, 1], atol=1e-5)
    options = dataclasses.replace(options, own_color=0.25)
    np.testing.assert_array_equal(jojo.own_color_shares(options, pictures), [0.25] * 3)


@pytest.mark.parametrize("mask_space", ["w", "s"])
def test_a_reference_that_the_base_draws_teaches_no_colour(mask_space):
    """With own colours every mix is as it should be; without, none is."""
    base = GENERATOR.init_params(key=jax.random.key(1))
    for name, layer in base["synthesis"].items():
        if name.startswith("rgb"):  # pictures well within [-1, 1]
            layer["weight"] *= 0.05
    judge = JUDGE.init_params(key=jax.random.key(2))
    codes = jax.random.normal(jax.random.key(3), (2, len(GENERATOR.layer_names), 16))
    pictures, _ = GENERATOR.apply(
        {"params": base}, codes, space="w_layers", noise="none"
    )
    z = jax.random.normal(jax.random.key(4), (6, 16))

    def loss(own_color):
        options = jojo.Options(
            ref=(), mask=MASK, own_color=own_color, mask_space=mask_space
        )
        frozen = jojo.frozen_of(options, GENERATOR, base, JUDGE, judge, pictures, codes)
        return jojo.loss_fn(
            base,
            frozen,
            frozen["reference"],
            z,
            options=options,
            generator=GENERATOR,
            judge=JUDGE,
            keep=jojo.keep_weights(options, 8),
            noise="none",
        )[0]

    assert float(jnp.abs(pictures).max()) < 0.5
    none, half, all_of = loss(0.0), loss(0.5), loss(1.0)
    assert all_of < 1e-5 < 0.2 * none < half < 0.8 * none


@pytest.mark.slow
def test_own_colours_on_one_and_eight_devices_and_side_by_side():
    one, first = small_run(mixes=8, own_color=0.7, steps=2)
    eight, other = small_run(mixes=8, own_color=0.7, steps=2, devices=8)
    assert abs(first[0]["loss"] - other[0]["loss"]) < 1e-5 * first[0]["loss"]
    _, plain = small_run(mixes=8)
    assert first[0]["loss"] != plain[0]["loss"]
    both = {"refs": 2, "separate": True, "own_color": "auto"}
    _, together = small_run(**both, devices=2, style=2)
    _, on_one = small_run(**both)
    np.testing.assert_allclose(together[0]["loss"], on_one[0]["loss"], 1e-5)


def test_only_what_draws_the_picture_trains():
    before = GENERATOR.init_params(key=jax.random.key(1))
    state, _ = small_run(steps=2)
    after = state.params["generator"]
    for part in ("mapping", "noise_const", "w_avg"):
        same = jax.tree.map(
            lambda a, b: bool((a == b).all()), before[part], after[part]
        )
        assert all(jax.tree.leaves(same))
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), before["synthesis"], after["synthesis"]
    )
    assert all(jax.tree.leaves(moved))


def test_style_space_mixing_leaves_the_affine_maps_alone():
    before = GENERATOR.init_params(key=jax.random.key(1))["synthesis"]
    state, _ = small_run(mask_space="s")
    after = state.params["generator"]["synthesis"]
    for name in GENERATOR.layer_names:
        np.testing.assert_array_equal(
            before[name]["affine"]["weight"], after[name]["affine"]["weight"]
        )
        assert (before[name]["weight"] != after[name]["weight"]).any()


@pytest.mark.slow
def test_both_mask_spaces_start_at_the_same_loss():
    # Affine maps commute with a 0/1 choice of codes.
    _, w = small_run(mask="01101", mixes=2)
    _, s = small_run(mask="01101", mixes=2, mask_space="s")
    assert abs(w[0]["loss"] - s[0]["loss"]) < 1e-5 * w[0]["loss"]


@pytest.mark.slow
def test_a_full_mask_leaves_nothing_random():
    losses = [small_run(mask="all", seed=i, noise_mode="none")[1] for i in (0, 1)]
    assert losses[0] == losses[1]
    losses = [small_run(mask="none", seed=i, noise_mode="none")[1] for i in (0, 1)]
    assert losses[0] != losses[1]


def test_alpha_zero_mixes_nothing():
    _, zero = small_run(alpha=0.0, noise_mode="none")
    _, everything = small_run(mask="all", noise_mode="none")
    assert zero == everything


@pytest.mark.slow
def test_a_fixed_set_of_codes_repeats():
    _, metrics = small_run(codes=2, steps=4, lr=1e-30, noise_mode="none")
    losses = [m["loss"] for m in metrics]
    assert losses[:2] == losses[2:] and losses[0] != losses[1]


@pytest.mark.slow
def test_bfloat16_trains():
    _, metrics = small_run(steps=20, mask="all", dtype="bfloat16", noise_mode="none")
    losses = [m["loss"] for m in metrics]
    assert np.isfinite(losses).all() and losses[-1] < 0.9 * losses[0]


# The identity loss


def both_losses(mask_space):
    """The loss with and without its identity term, and what it is made of."""
    options = jojo.Options(
        ref=(Path("0.png"),), mask="01101", id_lambda=0.3, mask_space=mask_space
    )
    trained, base = (GENERATOR.init_params(key=jax.random.key(i)) for i in (1, 5))
    base = {**base, "mapping": trained["mapping"]}
    judge = JUDGE.init_params(key=jax.random.key(2))
    identity = IDENTITY.init_params(key=jax.random.key(4))
    key = jax.random.key(3)
    codes = jax.random.normal(key, (1, len(GENERATOR.layer_names), 16))
    pictures = jnp.tanh(jax.random.normal(key, (1, 8, 8, 3)))
    frozen = jojo.frozen_of(
        options, GENERATOR, base, JUDGE, judge, pictures, codes, identity
    )
    z = jax.random.normal(jax.random.fold_in(key, 1), (2, 16))
    reference = frozen.pop("reference")

    def loss(params, frozen, weight):
        return jojo.loss_fn(
            params,
            frozen,
            reference,
            z,
            options=dataclasses.replace(options, id_lambda=weight),
            generator=GENERATOR,
            judge=JUDGE,
            keep=jojo.keep_weights(options, 8),
            noise="none",
            identity=IDENTITY,
        )

    return loss, trained, base, frozen, codes, z


@pytest.mark.slow
@pytest.mark.parametrize("mask_space", ["w", "s"])
def test_identity_loss_equals_its_formula(mask_space):
    loss, trained, base, frozen, codes, z = both_losses(mask_space)
    plain, nothing = loss(trained, frozen, 0.0)
    value, terms = loss(trained, frozen, 0.3)
    w = GENERATOR.apply({"params": trained}, z, method="mapping")
    mask = np.array([0, 1, 1, 0, 1])[:, None]
    mixed = mask * codes + (1 - mask) * w[:, None]
    affine = base if mask_space == "s" else trained
    styles = [
        mixed[:, i] @ a["weight"] / 4 + a["bias"]
        for i, a in enumerate(
            affine["synthesis"][name]["affine"] for name in GENERATOR.layer_names
        )
    ]
    made, _ = GENERATOR.apply({"params": trained}, styles, space="styles", noise="none")
    drawn, _ = GENERATOR.apply({"params": base}, mixed, space="w_layers", noise="none")
    variables = {"params": frozen["identity"]}
    a, b = (
        np.asarray(IDENTITY.apply(variables, x, method="embed")) for x in (made, drawn)
    )
    cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    assert not nothing and abs(terms["perceptual"] - plain) < 1e-6
    assert 0.01 < terms["id"] and abs(terms["id"] - (1 - cosine).mean()) < 1e-5
    assert abs(value - (plain + 0.3 * terms["id"])) < 1e-6


def test_identity_loss_teaches_the_trained_generator_alone():
    loss, trained, _, frozen, *_ = both_losses("w")
    grad = jax.jit(jax.grad(lambda p, f: loss(p, f, 0.3)[1]["id"], (0, 1)))
    learned, given = grad(trained, frozen)
    assert all((g == 0).all() for g in jax.tree.leaves(given["base"]))
    for name, part in learned.items():
        moves = [bool((g != 0).any()) for g in jax.tree.leaves(part)]
        assert any(moves) == (name == "synthesis")


@pytest.mark.slow
def test_styles_side_by_side_with_the_identity_loss():
    _, (metrics,) = small_run(refs=2, separate=True, devices=2, style=2, id_lambda=0.5)
    expected = metrics["perceptual"] + 0.5 * metrics["id"]
    assert metrics["id"].min() > 0.01
    np.testing.assert_allclose(metrics["loss"], expected, atol=1e-5)


@pytest.mark.parametrize(
    "own_color", [0.0, pytest.param("auto", marks=pytest.mark.slow)]
)
def test_styles_side_by_side_need_no_collective(quick_compile, own_color):
    options = jojo.Options(
        ref=(Path("a"), Path("b")),
        separate=True,
        mask=MASK,
        mixes=2,
        patience=3,
        own_color=own_color,
    )
    base = GENERATOR.init_params(key=jax.random.key(1))
    codes = jnp.zeros((2, len(GENERATOR.layer_names), 16))
    judge_params = JUDGE.init_params(key=jax.random.key(2))
    tx = optimizer(options)
    state, frozen = jax.eval_shape(
        lambda: (
            jojo.start_state(options, base, tx),
            jojo.frozen_of(
                options,
                GENERATOR,
                base,
                JUDGE,
                judge_params,
                jnp.zeros((2, 8, 8, 3)),
                codes,
            ),
        )
    )
    mesh = make_mesh(style=2, devices=jax.devices()[:2])
    rules = jojo.sharding_rules(options)
    layout = sharding.shardings(state, mesh, rules)
    of_frozen = sharding.shardings({"frozen": frozen}, mesh, rules)["frozen"]
    keep = jojo.keep_weights(options, 8)
    step = jojo.make_step(options, GENERATOR, JUDGE, tx, keep)
    with jax.set_mesh(mesh):
        entry = loop._jit(step, 0, layout, of_frozen, mesh)
        args = fits.abstract(state, layout), fits.abstract(frozen, of_frozen), {}
        text = entry.lower(*args).compile().as_text()
    assert "convolution" in text or "dot" in text
    assert not re.findall(fits.COLLECTIVES, text)


@pytest.mark.parametrize(
    "own_color", [0.0, pytest.param("auto", marks=pytest.mark.slow)]
)
def test_styles_begin_on_their_own_devices(quick_compile, own_color):
    """Each device makes its styles and their features, and no other ever holds them."""
    options = jojo.Options(
        ref=tuple(map(Path, "abcdefghij")),
        separate=True,
        mask=MASK,
        own_color=own_color,
    )
    base = GENERATOR.init_params(key=jax.random.key(1))
    judge_params = JUDGE.init_params(key=jax.random.key(2))
    pictures = jnp.tanh(jax.random.normal(jax.random.key(3), (10, 8, 8, 3)))
    codes = jnp.zeros((10, len(GENERATOR.layer_names), 16))
    tx = optimizer(options)

    def make(base, *arrays):
        frozen = jojo.frozen_of(options, GENERATOR, base, JUDGE, *arrays)
        return jojo.start_state(options, base, tx), frozen

    arrays = base, judge_params, pictures, codes
    specs = P(), P(), P("style"), P("style")
    mesh = make_mesh(style=2, devices=jax.devices()[:2])
    rules = jojo.sharding_rules(options)
    state, frozen = sharding.built(make, mesh, rules, *arrays, specs=specs)
    layout, of_frozen = sharding.layouts(state, frozen, mesh, rules)
    lies = jax.tree.map(lambda x, to: x.sharding == to, frozen, of_frozen)
    assert all(jax.tree.leaves(lies))
    split = [state.params, state.opt_state, frozen["reference"]]
    for leaf in jax.tree.leaves(split):
        assert [shard.data.shape[0] for shard in leaf.addressable_shards] == [5, 5]
    # The run takes them over: nobody holds a second copy.
    taken = sharding.place(state, layout, take=True)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a is b, taken, state)))
    if own_color:
        inverted, _ = GENERATOR.apply(
            {"params": base}, codes, space="w_layers", noise="none"
        )
        taught = {"pictures": pictures, "inverted": inverted}
    else:
        taught = {"features": jojo.describe(options, JUDGE, judge_params, pictures)}
    for name, whole in taught.items():
        jax.tree.map(
            lambda some, all_of: np.testing.assert_allclose(
                some[:, 0], all_of, atol=1e-5
            ),
            frozen["reference"][name],
            whole,
        )
    jax.tree.map(np.testing.assert_array_equal, frozen["judge"], judge_params)

    def describe(params, pictures):
        of = partial(jojo.describe, options, JUDGE)
        return styles.a_few_at_a_time(of, params, pictures, 2)

    with jax.set_mesh(mesh):
        split = jax.device_put(pictures, NamedSharding(mesh, P("style")))
        text = jax.jit(describe).lower(judge_params, split).compile().as_text()
    assert not re.findall(fits.COLLECTIVES, text)


def test_a_style_that_falls_no_more_stops():
    idle = create_state(
        {},
        {},
        key=jax.random.key(0),
        extra={
            "mean": jnp.array([1.0, 1.0]),
            "lowest": jnp.array([0.9, 2.0]),
            "idle": jnp.array([4, 4]),
        },
    ).replace(step=jnp.asarray(9))
    learns = jnp.array([False, True])
    after = styles.progress(idle, jnp.array([0.0, 1.0]), learns)
    # What has stopped stays so, whatever its loss does; the other falls.
    assert after["idle"].tolist() == [4, 0]
    np.testing.assert_allclose(after["mean"], [0.9, 1.0])
    np.testing.assert_allclose(after["lowest"], [0.9, 1.0])


def test_groups():
    options = jojo.Options(
        ref=tuple(Path(f"{i}.png") for i in range(5)),
        separate=True,
        group=2,
        run=RunOptions(out="o"),
    )
    parts = jojo.groups(options)
    assert [p.run.out for p, _ in parts] == [f"o/groups/00{i}" for i in range(3)]
    # The last is filled up with a style that the one before has learned.
    assert [[r.stem for r in p.ref] for p, _ in parts] == [
        ["0", "1"],
        ["2", "3"],
        ["3", "4"],
    ]
    assert [known for _, known in parts] == [0, 0, 1]
    (whole,) = jojo.groups(dataclasses.replace(options, group=0))
    assert whole[0].run.out == "o" and whole[1] == 0


def reference_options(tmp_path, **values):
    """Options with a picture of noise as their reference."""
    ref = tmp_path / "art.png"
    if not ref.exists():
        images.save_image(ref, np.asarray(picture("art", 1, 16))[0])
    align = AlignOptions(align=False)
    run = RunOptions(out=str(tmp_path / "run"))
    return jojo.Options(ref=(ref,), align=align, run=run, **values)


def test_references_are_prepared_anew_for_others(tmp_path, monkeypatch):
    model, params = weights.load(small_models.save_base(tmp_path / "base"))
    generator, base = model.generator, params["generator"]
    made = []

    def inverted(options, generator, base, pictures):
        made.append(options)
        return jnp.full((1, generator.num_ws, generator.w_dim), float(len(made)))

    monkeypatch.setattr(references, "inverted", inverted)

    def prepared(weights="ab", **values):
        options = reference_options(tmp_path, **values)
        identity = {"reference": references.digest(options.ref), "weights": weights}
        return references.prepare(options, generator, base, identity)

    first = prepared()
    jax.tree.map(np.testing.assert_array_equal, first, prepared(lr=1.0))
    assert len(made) == 1
    # What a run left that ended before its first checkpoint is of no use to another.
    mean = np.broadcast_to(base["w_avg"], first[1].shape)
    np.testing.assert_array_equal(prepared(inversion="mean")[1], mean)
    assert (prepared()[1] == 2).all()
    assert (prepared(weights="cd")[1] == 3).all()
    assert (prepared(inversion_steps=9)[1] == 4).all()
    images.save_image(tmp_path / "art.png", np.asarray(picture("other", 1, 16))[0])
    other = prepared(inversion_steps=9)
    assert (other[1] == 5).all() and (other[0] != first[0]).any()
    # So is what was written before it was said what it was made from.
    cache = tmp_path / "run" / "references" / "codes.npz"
    np.savez(cache, pictures=first[0], w_layers=first[1])
    assert (prepared(inversion_steps=9)[1] == 6).all()


def test_compiling_for_chips_leaves_nothing_in_the_folder(tmp_path, monkeypatch):
    base = small_models.save_base(tmp_path / "base")
    options = reference_options(tmp_path, inversion="mean")
    found = {}

    def report(run, entry, state, frozen, every, batch, rules):
        found.update(frozen["preview"])
        return []

    monkeypatch.setattr(fits, "report", report)
    args = ["--ref", options.ref[0], "--no-align", "--weights", base, "--mask", "0-3"]
    args += ["--out", options.run.out, "--compile-for", "v5e:2x2"]
    with pytest.raises(fits.Compiled):
        jojo.main([str(a) for a in args])
    assert not Path(options.run.out).exists()
    model, params = weights.load(base)
    real = references.prepare(options, model.generator, params["generator"], {})
    assert [found[n].shape for n in ("references", "codes")] == [x.shape for x in real]


@pytest.mark.slow
def test_inversion_is_split_over_the_devices(tmp_path, quick_compile):
    model, params = weights.load(small_models.save_base(tmp_path / "base"))
    pictures = np.random.default_rng(0).uniform(-1, 1, (6, 16, 16, 3))
    codes = []
    for separate in (True, False):
        options = jojo.Options(
            ref=(Path("r"),) * 6, separate=separate, inversion_steps=3
        )
        codes.append(
            references.inverted(
                options, model.generator, params["generator"], np.float32(pictures)
            )
        )
    assert codes[0].shape == (6, 6, 16)
    np.testing.assert_allclose(*codes, atol=1e-5)


@pytest.mark.slow
def test_each_style_becomes_a_folder(tmp_path, capsys):
    base = small_models.save_base(tmp_path / "base")
    (tmp_path / "art").mkdir()
    for name in "abc":
        art = np.asarray(picture(name, 1, 16))[0]
        images.save_image(tmp_path / "art" / f"{name}.png", art)
    args = ["--ref", tmp_path / "art", "--separate", "--group", 2, "--no-align"]
    args += ["--weights", base, "--inversion", "mean", "--mask", "0-3", "--steps", 3]
    args += ["--mesh-style", 2, "--mesh-data", 1, "--patience", 9, "--log-every", 1]
    args += ["--sample-every", 0, "--out", tmp_path / "run"]
    jojo.main([str(a) for a in args])
    styles = sorted(p.name for p in (tmp_path / "run" / "styles").iterdir())
    assert styles == ["a", "b", "c"]
    groups = [tmp_path / "run" / "groups" / f"00{i}" for i in range(2)]
    for name, group in (("a", 0), ("b", 0), ("c", 1)):
        model, params = weights.load(str(tmp_path / "run" / "styles" / name))
        _, same = weights.load(str(groups[group]), style=name)
        jax.tree.map(np.testing.assert_array_equal, params, same)
    line = json.loads((groups[1] / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss", "loss/b", "loss/c", "learns", "learns/c"} <= line.keys()
    # Nothing is done twice.
    jojo.main([str(a) for a in args])
    assert "at step 3 already" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_with_an_identity_loss_goes_on(tmp_path, capsys):
    base = small_models.save_base(tmp_path / "base")
    judge = {"identity": IDENTITY.init_params(key=jax.random.key(0))}
    weights.save(tmp_path / "judge", {"identity": IDENTITY}, judge)
    ref = tmp_path / "art.png"
    images.save_image(ref, np.asarray(picture("art", 1, 16))[0])
    args = ["--ref", ref, "--no-align", "--weights", base, "--inversion", "mean"]
    args += ["--mask", "0-3", "--id-lambda", 0.5, "--identity-net", tmp_path / "judge"]
    args += ["--log-every", 1, "--sample-every", 0]

    def trained(name, *steps):
        for n in steps:
            out = [*args, "--out", tmp_path / name, "--steps", n]
            jojo.main([str(a) for a in out])
        return weights.load(str(tmp_path / name))[1]

    straight, resumed = trained("straight", 4), trained("resumed", 2, 4)
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    assert "named by --identity-net" in capsys.readouterr().out
    lines = (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()
    ids = [json.loads(line)["id"] for line in lines]
    assert abs(ids[0]) < 1e-6 < ids[-1]
    other = IDENTITY.init_params(key=jax.random.key(1))
    weights.save(
        tmp_path / "judge", {"identity": IDENTITY}, {"identity": other}, overwrite=True
    )
    with pytest.raises(SystemExit):
        trained("straight", 6)
    assert "another judges" in capsys.readouterr().err


def test_lpips_stands_in_for_the_discriminator(capsys):
    options = jojo.Options(ref=(Path("a.png"),), perceptual="lpips")
    judge, params = jojo.load_judge(options, {}, {})
    assert "perceptual judge: lpips_alexnet" in capsys.readouterr().out
    pictures = picture("imgA", 1, 16), picture("imgB", 1, 16)
    a, b = (jojo.describe(options, judge, params, x) for x in pictures)
    assert float(jojo.distances(options, params, a, a)[0]) == 0
    assert float(jojo.distances(options, params, a, b)[0]) > 0.05


def test_weights_without_a_discriminator_name_the_way_out():
    options = jojo.Options(ref=(Path("a.png"),))
    with pytest.raises(UserError, match="--perceptual lpips"):
        jojo.load_judge(options, {"generator": GENERATOR}, {})


def test_masks_and_alpha_are_checked():
    options = jojo.Options(ref=(Path("a.png"),))
    with pytest.raises(UserError, match="give one"):
        jojo.keep_weights(
            dataclasses.replace(options, mask="all", preserve_color=True), 64
        )
    with pytest.raises(UserError, match="from 0 to 1"):
        jojo.keep_weights(dataclasses.replace(options, alpha=1.5), 64)
    with pytest.raises(UserError, match="14 digits"):
        jojo.keep_weights(dataclasses.replace(options, mask="0110"), 64)
    with pytest.raises(UserError, match="is not a file"):
        jojo.resolve(options)
    with pytest.raises(UserError, match="--perceptual-net is 'heads'"):
        lpips = dataclasses.replace(options, perceptual="lpips", perceptual_net="heads")
        jojo.load_judge(lpips, {}, {})
    here = dataclasses.replace(options, ref=(Path(__file__),))
    with pytest.raises(UserError, match="use --mixes"):
        jojo.resolve(dataclasses.replace(here, run=RunOptions(batch=3)))
    with pytest.raises(UserError, match="--id-lambda is -1"):
        jojo.resolve(dataclasses.replace(here, id_lambda=-1.0))
    with pytest.raises(UserError, match="--own-color is 1.5"):
        jojo.resolve(dataclasses.replace(here, own_color=1.5))
    assert jojo.resolve(here).run.out == "runs/jojo-test_jojo"


def test_weights_recommend_defaults(tmp_path, capsys):
    networks = {"generator": GENERATOR}
    params = {"generator": GENERATOR.init_params(key=jax.random.key(0))}

    def saved(name, **wanted):
        metadata = {"jojo": wanted}
        weights.save(tmp_path / name, networks, params, metadata=metadata)
        return ["--ref", "a.png", "--weights", str(tmp_path / name)]

    assert jojo.read(saved("colours", own_color="auto")).own_color == "auto"
    args = saved("base", perceptual="lpips", steps=100, mask="0-2")
    options = jojo.read(args)
    assert (options.perceptual, options.run.steps, options.mask) == (
        "lpips",
        100,
        "0-2",
    )
    assert "--perceptual lpips" in capsys.readouterr().out
    assert jojo.read([*args, "--steps", "7", "--mask", "all"]).run.steps == 7
    assert jojo.read([*args, "--preserve-color"]).mask == ""
    assert jojo.read([*args, "--no-profile"]).perceptual == "discriminator"
    with pytest.raises(UserError, match="recommend styel"):
        jojo.read(saved("wrong", styel=1))
