"""e4e's training steps against the original's, and the scheme at toy size."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from convert import pt
from convert.encoder import encoder_state, latent_discriminator_state
from jaxstyle import weights
from tests.filled import filled_state_dict, golden, relative_error
from tests.train import test_psp
from tests.train.test_loop import lines
from train import e4e, encoding, optim
from train.encoding import EncodingOptions, Setup

base, faces = test_psp.base, test_psp.faces


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    """e4e's latent discriminator, through a file."""
    path = tmp_path_factory.mktemp("critic") / "e4e.pt"
    state = dict(filled_state_dict("e4e_latent_discriminator"))
    larger = filled_state_dict("stylegan2_g_64")
    pt.write(
        path,
        {
            "state_dict": {f"decoder.{k}": v for k, v in larger.items()},
            "discriminator_state_dict": state,
            "latent_avg": np.zeros((10, 512), np.float32),
        },
    )
    networks, params, _ = convert.load(path)
    return networks[e4e.CRITIC], params[e4e.CRITIC]


def test_critic_step_equals_the_original(critic):
    module, params = critic
    expected = golden("e4e_latent_discriminator")
    real, fake = expected["real"], expected["fake"]
    tx = optim.adam(2e-5, (0.9, 0.999))

    @jax.jit
    def step(params):
        grad = jax.value_and_grad(
            lambda p: e4e.critic_loss(module, p, real, fake), has_aux=True
        )
        (loss, _), grads = grad(params)
        after, _ = optim.apply(tx, grads, tx.init(params), params)
        penalty = jax.value_and_grad(lambda p: e4e.r1_penalty(module, p, real))
        return loss, grads, after, penalty(after)

    loss, grads, after, (r1, r1_grads) = step(params)
    np.testing.assert_allclose(loss, expected["d_loss"], atol=2e-5)
    np.testing.assert_allclose(r1, expected["r1"], rtol=1e-4)
    np.testing.assert_allclose(5 * 16 * r1, expected["r1_weighted"], rtol=1e-4)
    state = latent_discriminator_state(module, grads)
    penalty = latent_discriminator_state(module, r1_grads)
    for key in state:
        norm = np.linalg.norm(state[key])
        np.testing.assert_allclose(norm, expected[f"grad_norm/{key}"], rtol=0.01)
        if f"r1_grad_norm/{key}" in expected:
            norm = np.linalg.norm(80 * penalty[key])
            np.testing.assert_allclose(norm, expected[f"r1_grad_norm/{key}"], rtol=0.01)
    moved = latent_discriminator_state(module, after)
    first = moved["mlp.6.weight"][0, :16]
    np.testing.assert_allclose(
        first, expected["mlp6_weight_row0_after_adam"], atol=1e-6
    )
    bias = moved["mlp.0.bias"][:16]
    np.testing.assert_allclose(bias, expected["mlp0_bias_after_adam"], atol=1e-6)


def test_pool_equals_the_original():
    draws = random.Random(0)
    pool, count, seen = jnp.zeros((4, 1)), jnp.zeros((), jnp.int32), 0
    for query, wanted in enumerate(golden("e4e_latent_discriminator")["pool_trace"]):
        codes, swap, places = [], [], []
        for sample in range(3):
            codes.append(10 * query + sample + draws.randint(0, 4) / 10)
            swap.append(seen >= 4 and draws.uniform(0, 1) > 0.5)
            places.append(draws.randint(0, 3) if swap[-1] else 0)
            seen += 1
        codes = jnp.array(codes)[:, None]
        given, pool, count = e4e.query_pool(
            pool, count, codes, jnp.array(swap), jnp.array(places)
        )
        np.testing.assert_allclose(given[:, 0], wanted, rtol=1e-6)


@pytest.mark.slow  # half a minute
def test_encoder_step_equals_the_original(critic, tmp_path):
    networks, modules, params, frozen = test_psp.load_original(tmp_path, "e4e_encoder")
    lambdas = {"lpips": 0.8, "l2": 1.0, "id": 0.5, "critic": 0.1, "delta": 2e-4}
    setup = Setup(networks["encoder"], networks["generator"], modules, lambdas)
    module, critic_params = critic
    params[e4e.CRITIC] = critic_params
    options = EncodingOptions(data="", noise_mode="const")
    tx = encoding.make_optimizers(options)["encoder"]

    @jax.jit
    def step(params, frozen, batch, opt_state, stage):
        loss = functools.partial(e4e.loss_fn, setup=setup, critic=module, stage=stage)
        grads, terms, _ = encoding.gradients(
            loss, setup, options, params, ["encoder"], frozen, batch, jax.random.key(0)
        )
        active = e4e.active_parts(setup.encoder, stage)
        grads, before = grads["encoder"], params["encoder"]
        after, opt = optim.apply(tx, grads, opt_state, before, active=active)
        return grads, terms, after, opt

    expected = golden("e4e_step32")
    opt_state = tx.init(params["encoder"])
    names = {"critic": "encoder_discriminator_loss", "delta": "total_delta_loss"}
    names["id_improve"] = "id_improve"
    for stage, frozen_arrays in ((0, 86), (3, 52), (7, 0)):
        start = f"stage{stage}/"
        assert int(expected[f"{start}n_params_without_grad"]) == frozen_arrays
        grads, terms, after, opt = step(
            params,
            frozen,
            {"image": test_psp.images()},
            opt_state,
            jnp.int32(stage),
        )
        for name, value in terms.items():
            wanted = expected[start + names.get(name, f"loss_{name}")]
            np.testing.assert_allclose(value, wanted, rtol=2e-5, atol=2e-5)
        total = encoding.total(lambdas, terms)
        np.testing.assert_allclose(total, expected[f"{start}loss"], atol=2e-5)
        state = encoder_state(networks["encoder"], grads)
        keys = expected["grad_keys"].tolist()
        norms = [np.linalg.norm(state[key]) for key in keys]
        np.testing.assert_allclose(norms, expected[f"{start}grad_norms"], rtol=0.01)
        moved = encoder_state(networks["encoder"], after)
        bias = moved["styles.0.linear.bias"][:32]
        wanted = expected[f"{start}styles.0.linear.bias_after"]
        assert relative_error(bias, wanted) < 1e-4
        # The counts of what has not joined stay at 0.
        counts = opt.inner_states["trained"].inner_state.count
        assert int(counts["style_0"]["dense"]["bias"]) == 1
        joined = [
            k for k in ("style_1", "style_3", "style_7", "lateral_1", "lateral_2")
        ]
        flags = [int(jax.tree.leaves(counts[k])[0]) for k in joined]
        assert flags == {0: [0] * 5, 3: [1, 1, 0, 1, 0], 7: [1] * 5}[stage]


def test_stages():
    options = e4e.Options(common=EncodingOptions(data=""))
    stages = [
        int(e4e.stage_at(options, 18, jnp.int32(s)))
        for s in (0, 19_999, 20_000, 21_999, 22_000, 52_000, 300_000)
    ]
    assert stages == [0, 0, 1, 1, 2, 17, 17]
    options = e4e.Options(common=EncodingOptions(data=""), progressive=False)
    assert int(e4e.stage_at(options, 18, jnp.int32(0))) == 17
    assert not e4e.lambdas_of(options)["delta"]


def train(base, out, *flags):
    flags = [*test_psp.SMALL, "--weights", base, "--out", out, *flags]
    e4e.main([str(f) for f in flags])
    return lines(out)


@pytest.mark.slow
def test_run_adds_rows_one_by_one(base, faces, tmp_path, quick_compile):
    out = tmp_path / "run"
    flags = ["--data", faces, "--id-lambda", 0, "--progressive-start", 2]
    flags += ["--progressive-every", 1, "--w-pool", 4, "--lr", 1e-3]
    written = train(base, out, *flags, "--val-data", faces)
    assert [w["stage"] for w in written] == [0, 0, 1, 2]
    assert {"loss", "l2", "critic", "delta", "d_loss", "d_r1"} <= set(written[-1])
    assert written[0]["delta"] == 0 < written[-1]["delta"]
    model, params = weights.load(out)
    assert set(model) == {"encoder", "generator", e4e.CRITIC}
    # The same seed's start, row by row: rows that have not joined have not moved.
    options = e4e.Options(
        common=EncodingOptions(
            data="",
            weights=str(base),
            encoder_size=32,
            encoder_units=(1, 1, 1),
            encoder_channels=(16, 16, 16),
        ),
        lpips_lambda=0.0,
        id_lambda=0.0,
    )
    _, _, before, _ = e4e.make_setup(options)
    for row, moved in ((0, True), (2, True), (3, False), (5, False)):
        a, b = (p["encoder"][f"style_{row}"]["dense"]["bias"] for p in (before, params))
        assert (not np.array_equal(a, b)) == moved, row


@pytest.mark.slow  # a minute of compiling
def test_restyle_and_continuing(base, faces, tmp_path, quick_compile):
    flags = ["--data", faces, "--id-lambda", 0, "--restyle", 2]
    flags += ["--encoder-blocks", "resnet"]
    whole = train(base, tmp_path / "whole", *flags)
    train(base, tmp_path / "parts", *flags, "--steps", 2)
    parts = train(base, tmp_path / "parts", *flags)
    assert parts[-1]["loss"] == whole[-1]["loss"]
    encoder = weights.load(tmp_path / "parts")[0].encoder
    assert encoder.level_rows == () and encoder.blocks == "resnet"


@pytest.mark.slow  # half a minute of compiling
def test_steps_are_the_same_on_one_device_and_on_eight(base, faces):
    """Critic, its regularisation, encoder: the losses of the first iteration."""
    options = e4e.Options(
        common=EncodingOptions(
            data=str(faces),
            weights=str(base),
            encoder_size=32,
            encoder_units=(1, 1, 1),
            encoder_channels=(16, 16, 16),
        ),
        id_lambda=0.0,
        progressive_start=0,
        w_pool=4,
        run=e4e.RunOptions(batch=8),
    )
    setup, critic, params, frozen = e4e.make_setup(options)
    optimizers = e4e.make_optimizers(options)
    state = e4e.make_state(options, params, optimizers)
    steps = [step for _, step in e4e.schedule(options, setup, critic, optimizers)]
    batch = {"image": jax.random.uniform(jax.random.key(1), (8, 32, 32, 3))}
    results = test_psp.on_one_and_eight(steps, state, frozen, batch)
    (_, first), (_, second) = results
    assert {"d_loss", "d_r1", "loss", "lpips", "l2", "critic", "delta"} <= set(first)
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow  # half a minute of compiling
def test_generated_pictures_and_their_codes(base, tmp_path, quick_compile):
    flags = ["--data", "generated", "--id-lambda", 0, "--code-lambda", 0.5]
    written = train(base, tmp_path / "run", *flags, "--steps", 2)
    assert {"code", "l2", "critic"} <= set(written[-1])


def test_mistakes_are_explained(base, faces, tmp_path, capsys):
    for flags, message in (
        (["--optimizer", "adam"], "use ranger"),
        (["--progressive-every", 0], "--progressive-every is 0"),
    ):
        with pytest.raises(SystemExit):
            train(base, tmp_path / "run", "--data", faces, *flags)
        assert message in capsys.readouterr().err
