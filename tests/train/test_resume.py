"""Going on from e4e's training checkpoints, against its own optimisers."""

import json

import jax
import numpy as np
import pytest

import convert
from convert import pt
from convert.__main__ import main as convert_main
from convert.encoder import encoder_state, latent_discriminator_state, module_table
from convert.layouts import to_params
from convert.training import Network
from jaxstyle import weights
from jaxstyle.errors import UserError
from tests.filled import draw, golden, write_psp
from tests.train import test_psp
from tests.train.test_loop import lines
from train import e4e, encoding, optim
from train.encoding import EncodingOptions
from train.resume import resume
from train.state import create_state

faces = test_psp.faces
PREFIX = "golden-v1/resume"


def drawn(kind, key, shape):
    return draw(PREFIX, f"{kind}:{key}", tuple(shape))


def updates(key):
    """How many the file says that a parameter of the encoder has had."""
    if key.startswith(("styles.3", "latlayer")):
        return 0
    return 4 if key.startswith(("styles.1", "styles.2")) else 9


def network(meta, kind):
    """A state dict filled by the rule; batch norms as PyTorch makes them."""
    state = {}
    for key, shape in meta:
        if key.endswith(("running_mean", "num_batches_tracked")):
            state[key] = np.zeros(shape, np.float32)
        elif key.endswith("running_var"):
            state[key] = np.ones(shape, np.float32)
        else:
            state[key] = np.float32(0.2) * drawn(kind, key, shape)
    return state


def optimizer(kind, parameters, state, count, slots):
    """An optimiser's state dict as PyTorch writes it."""
    states = {}
    for number, key in enumerate(parameters):
        if not count(key):
            continue
        steps = count(key)
        one = {"step": steps if kind == "enc" else np.array(steps, np.float32)}
        for slot in slots:
            array = drawn(f"{kind}:{slot}", key, state[key].shape)
            scale = {"exp_avg": 0.1, "exp_avg_sq": 0.01, "slow_buffer": 0.2}[slot]
            array = array * array if slot == "exp_avg_sq" else array
            one[slot] = np.float32(scale) * array
        states[number] = one
    group = {"lr": 1e-4, "params": list(range(len(parameters)))}
    return {"state": states, "param_groups": [group]}


@pytest.fixture
def checkpoint(tmp_path):
    """e4e's checkpoint with its training data, and what it was made from."""
    expected = golden("e4e_resume")
    meta = json.loads(str(expected.pop("meta")))
    encoder, critic = network(meta["encoder"], "enc"), network(meta["critic"], "d")
    slots = ("exp_avg", "exp_avg_sq", "slow_buffer")
    names = meta["encoder_parameters"]
    path = write_psp(
        tmp_path / "e4e.pt",
        encoder,
        latent_avg=np.zeros((4, 16), np.float32),
        opts={"encoder_type": "Encoder4Editing", "start_from_latent_avg": True},
        global_step=7,
        best_val_loss=0.5,
        optimizer=optimizer("enc", names, encoder, updates, slots),
        discriminator_state_dict=critic,
        discriminator_optimizer_state_dict=optimizer(
            "d", list(critic), critic, lambda _: 9, slots[:2]
        ),
    )
    return path, expected, encoder, critic, names


def test_optimisers_go_on_as_the_original_ones(checkpoint, tmp_path, capsys):
    path, expected, encoder_arrays, critic_arrays, names = checkpoint
    out = tmp_path / "e4e"
    convert_main([str(path), str(out)])
    said = capsys.readouterr().out
    assert "step 8, optimisers of encoder, latent_discriminator" in said
    model, params = weights.load(out)
    module, critic = model["encoder"], model[e4e.CRITIC]
    table = module_table(module, params["encoder"])
    assert Network("encoder", encoder_arrays, table).parameters() == names

    tx = encoding.make_optimizers(EncodingOptions(data=""))["encoder"]
    optimizers = {"encoder": tx, e4e.CRITIC: optim.adam(2e-5, (0.9, 0.999))}
    state = create_state(params, optimizers, key=jax.random.key(0))
    state = resume(state, str(out), "ranger", 100)
    assert int(state.step) == 8

    def gradients(start, step, arrays, table):
        # Buffers have none; their zeros keep the tree whole.
        drawn_or_0 = {
            key: np.float32(0.1) * drawn(f"{start}:{step}", key, value.shape)
            if not key.endswith(("running_mean", "running_var"))
            else np.zeros_like(value)
            for key, value in arrays.items()
            if key in table
        }
        return to_params(drawn_or_0, table, "gradient")

    table_of_critic = convert.encoder.latent_discriminator_table(critic.depth)
    params, opt = dict(state.params), dict(state.opt_state)
    step = {
        name: jax.jit(lambda g, o, p, tx=tx: optim.apply(tx, g, o, p))
        for name, tx in optimizers.items()
    }
    for i in range(8, 13):
        for name, grads in (
            ("encoder", gradients("grad", i, encoder_arrays, table)),
            (e4e.CRITIC, gradients("dgrad", i, critic_arrays, table_of_critic)),
        ):
            if name == "encoder":
                grads["w_avg"] = np.zeros((4, 16), np.float32)
            params[name], opt[name] = step[name](grads, opt[name], params[name])
    ours = encoder_state(module, params["encoder"])
    theirs = latent_discriminator_state(critic, params[e4e.CRITIC])
    assert len(expected) == 49
    for key, wanted in expected.items():
        part, _, rest = key.partition("/")
        got = (ours if part == "encoder" else theirs)[rest].ravel()[:8]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6, err_msg=key)


def test_what_cannot_be_gone_on_from_is_explained(checkpoint, tmp_path):
    path, *_ = checkpoint
    out = tmp_path / "e4e"
    convert_main([str(path), str(out)])
    _, params = weights.load(out)
    options = EncodingOptions(data="", weights=str(out), resume=True)
    optimizers = encoding.make_optimizers(options)
    optimizers[e4e.CRITIC] = optim.adam(2e-5, (0.9, 0.999))
    state = create_state(params, optimizers, key=jax.random.key(0))
    assert int(encoding.begin(options, state, 9).step) == 8
    with pytest.raises(UserError, match="--steps is 8.*has had 8"):
        encoding.begin(options, state, 8)
    with pytest.raises(UserError, match="trained by ranger"):
        resume(state, str(out), "adam", 100)
    with pytest.raises(UserError, match="optimisers of encoder, latent_discr"):
        alone = {"encoder": optimizers["encoder"]}
        resume(
            create_state(params, alone, key=jax.random.key(0)), str(out), "ranger", 9
        )
    (out / "training.npz").unlink()
    with pytest.raises(UserError, match="holds no training data.*--first-step"):
        resume(state, str(out), "ranger", 100)
    # A damaged file.
    value = pt.read(path)
    for change, message in (
        ({"param_groups": [{"params": [0, 1]}]}, "moves 2 parameters.*have 45"),
        ({"state": {0: {"step": -3}}}, "step of input_layer.0.weight is no count"),
        (
            {"state": {0: {"step": 3, "exp_avg": np.ones(2, np.float32)}}},
            "exp_avg of input_layer.0.weight in optimizer does not fit",
        ),
        ({"param_groups": 3}, "holds no numbered parameters"),
    ):
        damaged = value | {"optimizer": value["optimizer"] | change}
        pt.write(tmp_path / "damaged.pt", damaged)
        with pytest.raises(UserError, match=message):
            convert.load(tmp_path / "damaged.pt")


@pytest.mark.slow  # half a minute of compiling
def test_a_training_goes_on(faces, tmp_path, quick_compile):
    """A whole run: from a checkpoint that has all networks, at its step and stage."""
    base = tmp_path / "start"
    generator = test_psp.Generator(8, channels=(8, 8), z_dim=16, w_dim=16)
    encoder = e4e.Encoder4Editing(
        num_styles=4,
        size=32,
        units=(1, 1, 1),
        channels=(16, 16, 16),
        w_dim=16,
        level_rows=(3,),
    )
    critic = e4e.LatentDiscriminator(w_dim=16)
    networks = {"generator": generator, "encoder": encoder, e4e.CRITIC: critic}
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        name: module.init_params(key=key)
        for key, (name, module) in zip(keys, networks.items(), strict=True)
    }
    weights.save(base, networks, params)
    bias = params["encoder"]["style_0"]["dense"]["bias"]
    arrays = {"count": np.array(9), "mean": 0 * bias, "square": 0 * bias, "slow": bias}
    arrays = {f"encoder/{k}/style_0/dense/bias": v for k, v in arrays.items()}
    np.savez(base / "training.npz", step=np.array(5), **arrays)
    out = tmp_path / "run"
    flags = [*test_psp.SMALL, "--weights", base, "--out", out, "--data", faces]
    flags += ["--id-lambda", 0, "--progressive-start", 3, "--progressive-every", 2]
    e4e.main([str(f) for f in [*flags, "--steps", 8, "--resume"]])
    written = lines(out)
    assert [w["step"] for w in written] == [6, 7, 8]
    assert [w["stage"] for w in written] == [2, 2, 3]
    with pytest.raises(SystemExit):
        e4e.main([str(f) for f in [*flags, "--resume", "--first-step", 2]])
