"""pSp's training step against the original's, and the scheme at toy size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import convert
from convert import pt
from convert.encoder import encoder_state
from convert.stylegan2 import generator_state
from jaxstyle import edits, weights
from jaxstyle.encoders import GradualStyleEncoder, batch_stats
from jaxstyle.errors import UserError
from jaxstyle.features.identity import ArcFace
from jaxstyle.stylegan2 import Generator
from tests.filled import (
    draw,
    filled_state_dict,
    golden,
    nhwc,
    relative_error,
    write_psp,
)
from tests.train.test_loop import lines, mesh_of
from train import encoding, optim, psp
from train.encoding import EncodingOptions, Setup

AVERAGE = np.float32(0.3) * draw("golden-v1", "latent_avg", (512,))


# Parity


def moco():
    trunk = filled_state_dict("moco_resnet50")
    return {"state_dict": {f"module.encoder_q.{k}": v for k, v in trunk.items()}}


# The network of each role, and the file that it is read from.
JUDGES = {
    "perceptual": ("lpips", lambda: dict(filled_state_dict("alexnet_features"))),
    "identity": ("identity", lambda: dict(filled_state_dict("model_ir_se50"))),
    "similarity": ("resnet", moco),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """pSp's networks."""
    return load_original(tmp_path_factory.mktemp("files"), "psp_encoder")


def decoder_of_32():
    """The first layers of the filled 64 px generator."""
    larger = filled_state_dict("stylegan2_g_64")
    dropped = ("convs.6.", "convs.7.", "to_rgbs.3.", "noises.noise_7", "noises.noise_8")
    return {k: v for k, v in larger.items() if not k.startswith(dropped)}


def load_original(folder, manifest, styles=8, decoder=None, judges=JUDGES):
    """Encoder, decoder (of 32 px for 8 rows) and judges, through files."""
    decoder = decoder or decoder_of_32()
    path = write_psp(
        folder / "psp.pt",
        filled_state_dict(manifest, styles=styles),
        decoder=decoder,
        latent_avg=np.repeat(AVERAGE[None], styles, 0),
        opts={"stylegan_size": 32} if "e4e" in manifest else {},
    )
    networks, params, _ = convert.load(path)
    modules, frozen = {}, {}
    for role in judges:
        network, make = JUDGES[role]
        pt.write(folder / f"{role}.pth", make())
        found, values, _ = convert.load(folder / f"{role}.pth")
        modules[role], frozen[role] = found[network], values[network]
    # The drawn arrays and the files are as large again.
    filled_state_dict.cache_clear()
    for file in folder.iterdir():
        file.unlink()
    return networks, modules, jax.tree.map(jnp.asarray, params), frozen


def images():
    x = golden("encoder_inputs")["x_u8"].astype(np.float32) / np.float32(127.5) - 1
    return jnp.asarray(x)


CONFIGS = {
    "encode": "ffhq_encode",
    "frontalize": "ffhq_frontalize",
    "toonify": "toonify",
    "moco": "things",
}


def check_step(original, expected, name, bound=1e-4):
    """One golden configuration: losses, gradient norms, the Ranger update."""
    networks, modules, params, frozen = original
    lambdas = psp.TASKS[CONFIGS[name]].lambdas
    setup = Setup(networks["encoder"], networks["generator"], modules, lambdas)
    options = EncodingOptions(data="", noise_mode="const")
    optimizers = encoding.make_optimizers(options)
    tx = optimizers["encoder"]

    def loss(trained, params, frozen, batch, before, noise):
        return psp.loss_fn(trained, params, frozen, batch, before, setup, noise)

    @jax.jit
    def step(params, frozen, batch):
        key, before = jax.random.key(0), params["encoder"]
        grads, terms, _ = encoding.gradients(
            loss, setup, options, params, ["encoder"], frozen, batch, key
        )
        # In here the fresh state is no memory.
        after, _ = optim.apply(tx, grads["encoder"], tx.init(before), before)
        return grads["encoder"], terms, after

    before = params["encoder"]
    grads, terms, after = step(params, frozen, {"image": images()})
    total = encoding.total(lambdas, terms)
    np.testing.assert_allclose(total, expected[f"{name}/loss"], rtol=2e-5, atol=2e-5)
    improve = "id_improve" if "id" in terms else "similarity_improve"
    theirs = {"similarity": "loss_moco", improve: "id_improve"}
    for term, value in terms.items():
        wanted = expected[f"{name}/{theirs.get(term, f'loss_{term}')}"]
        tolerance = {"rtol": 2e-5} if "lpips" in term or term == "w_norm" else {}
        np.testing.assert_allclose(
            value, wanted, **{"rtol": 0, "atol": 2e-5} | tolerance
        )
    module = networks["encoder"]
    states = [encoder_state(module, t) for t in (grads, before, after)]
    keys = expected["grad_keys"].tolist()
    norms = np.array([np.linalg.norm(states[0][k]) for k in keys])
    np.testing.assert_allclose(norms, expected[f"{name}/grad_norms"], rtol=0.01)
    everything = np.sqrt(sum(np.sum(np.square(g)) for g in states[0].values()))
    np.testing.assert_allclose(
        everything, expected[f"{name}/grad_norm_total"], rtol=0.01
    )
    changes = expected[f"{name}/update_norms"]
    for key, wanted in zip(keys, changes, strict=True):
        convolution = key.endswith("weight") and states[1][key].ndim == 4
        if convolution and "fc1" not in key and "shortcut" not in key:
            change = np.linalg.norm(states[2][key] - states[1][key])
            np.testing.assert_allclose(change, wanted, rtol=0.02, err_msg=key)
    bias = states[2]["styles.0.linear.bias"][:32]
    wanted = expected[f"{name}/styles.0.linear.bias_after"]
    assert relative_error(bias, wanted) < bound


def test_reconstruction_equals_the_original(original):
    networks, modules, params, _ = original
    expected = golden("psp_step32")
    setup = Setup(networks["encoder"], networks["generator"], modules, {})
    run = jax.jit(
        lambda p, x: encoding.run(setup, p, x, noise="const"),
    )
    passed = run(params, images())
    assert relative_error(passed.codes, expected["eval_latents"]) < 5e-5
    small = np.asarray(passed.image)[:, ::8, ::8]
    assert relative_error(small, nhwc(expected["eval_image_full"])) < 1e-4
    check_mixing(networks["generator"], params, passed.codes, expected)


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize("name", CONFIGS)
def test_steps_equal_the_original(original, name):
    check_step(original, golden("psp_step32"), name)


@pytest.mark.slow  # 8 GB
def test_step_at_256_px_equals_the_original(tmp_path):
    decoder = filled_state_dict("stylegan2_g_256")
    roles = ("perceptual", "identity")
    loaded = load_original(tmp_path, "psp_encoder", 14, decoder, roles)
    expected = golden("psp_step256")
    networks, _, params, _ = loaded
    setup = Setup(networks["encoder"], networks["generator"], {}, {})
    run = jax.jit(lambda p, x: encoding.run(setup, p, x, noise="const"))
    passed = run(params, images())
    assert relative_error(passed.codes, expected["eval_latents"]) < 5e-5
    part, wanted = passed.image[:, 96:128, 96:128], expected["eval_image_pooled_slice"]
    assert relative_error(part, nhwc(wanted)) < 1e-4
    check_mixing(networks["generator"], params, passed.codes, expected)
    check_step(loaded, expected, "encode")


def check_mixing(generator, params, codes, expected):
    """Rows of a random code in those of a picture."""
    variables = {"params": params["generator"]}
    w = generator.apply(variables, expected["inject_z"], method="mapping")
    assert relative_error(w, expected["inject_w"]) < 5e-5
    rows, other = list(expected["mix_mask"]), jnp.repeat(w[:, None], codes.shape[1], 1)
    for alpha, name in ((0.3, "mix_alpha03_tail"), (1.0, "mix_replace_tail")):
        mixed = edits.mix_rows(np.asarray(codes), np.asarray(other), rows, alpha)
        assert relative_error(mixed[:, rows[0] :], expected[name]) < 5e-5
        np.testing.assert_array_equal(mixed[:, : rows[0]], codes[:, : rows[0]])


@pytest.mark.slow  # half a minute of compiling
def test_gain_of_identity_equals_the_original(original):
    """Of three pictures: what is made, what is wanted, what was shown."""
    _, modules, _, frozen = original
    setup = Setup(None, None, modules, {"id": 1.0})
    x = images()
    v = 0.8 * x[:, :, ::-1] + 0.1
    losses = jax.jit(functools.partial(encoding.picture_losses, setup))
    expected = golden("arcface")
    terms = losses(frozen, v, x[::-1], x)
    gain = jnp.mean(terms["id_improve"])
    np.testing.assert_allclose(gain, expected["id_improvement_shuffled"], atol=2e-5)
    loss = jnp.mean(terms["id"])
    np.testing.assert_allclose(loss, expected["id_loss_shuffled"], atol=2e-5)
    assert "id_improve" not in losses(frozen, v, x, x[..., :1])


def test_decoder_is_updated_in_the_layout_of_the_original():
    """A first update of Ranger, arrays as in PyTorch: less lr times the centred."""
    options = EncodingOptions(data="", train_decoder=True, lr=0.5)
    tx = encoding.make_optimizers(options)["generator"]
    generator = Generator(16, channels=(8, 8, 8), mapping_depth=2, z_dim=16, w_dim=16)
    before = generator.init_params(key=jax.random.key(0))
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), before)
    after, _ = optim.apply(tx, grads, tx.init(before), before)
    states = (jax.tree.map(np.asarray, tree) for tree in (before, grads, after))
    before, grads, after = (generator_state(generator, tree) for tree in states)
    for key, g in grads.items():
        if key.startswith("noises") or key.endswith("kernel"):
            np.testing.assert_array_equal(after[key], before[key])
            continue
        if g.ndim > 1:
            g = g - g.mean(tuple(range(1, g.ndim)), keepdims=True)
        wanted = before[key] - np.float32(0.5) * g
        assert relative_error(after[key], wanted) < 1e-6, key


def test_norm_of_codes_equals_the_original():
    expected = golden("encoder_misc")
    whole = draw("golden-v1", "wnorm", (3, 18, 512))
    codes = expected["wn_latent_first2"]
    np.testing.assert_allclose(whole[:, :2, :8], codes, atol=1e-6)
    np.testing.assert_allclose(
        np.mean(psp.w_norm(whole)), expected["wn_no_avg"], rtol=1e-6
    )
    average = np.float32(1.0)
    norm = psp.w_norm(codes, average)
    by_hand = np.sqrt(np.sum(np.square(codes - average), (1, 2)))
    np.testing.assert_allclose(norm, by_hand, rtol=1e-6)
    zero = jax.grad(lambda x: psp.w_norm(x).sum())(jnp.zeros((1, 2, 3)))
    assert not np.asarray(zero).any()


# The scheme at toy size


SMALL = (
    "--encoder-size 32 --encoder-units 1 1 1 --encoder-channels 16 16 16 --batch 8 "
    "--log-every 1 --sample-every 0 --val-every 2 --steps 4 --lpips-lambda 0 "
    "--mesh-data 1"
).split()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random 16 px generator."""
    folder = tmp_path_factory.mktemp("base") / "generator"
    generator = Generator(16, channels=(8, 8, 8), mapping_depth=2, z_dim=16, w_dim=16)
    params = generator.init_params(key=jax.random.key(0))
    weights.save(folder, {"generator": generator}, {"generator": params})
    return folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for i in range(10):
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def judge(base):
    """A folder with a small identity network."""
    folder = base.parent / "judge"
    module = ArcFace(size=16, units=(1,), channels=(16,), width=6)
    params = module.init_params(key=jax.random.key(0))
    weights.save(folder, {"identity": module}, {"identity": params})
    return folder


def train(base, out, *flags):
    flags = [*SMALL, "--weights", base, "--out", out, *flags]
    psp.main([str(f) for f in flags])
    return lines(out)


@pytest.mark.slow
def test_run_validates_keeps_the_best_and_goes_on(
    base, faces, tmp_path, quick_compile, capsys
):
    out = tmp_path / "run"
    flags = ["--data", faces, "--val-data", faces, "--id-lambda", 0, "--lr", 1e-3]
    written = train(base, out, *flags)
    assert {"loss", "l2"} <= set(written[-1])
    assert "val_loss" in written[-1] and "random weights" in capsys.readouterr().out
    model, params = weights.load(out)
    assert model.encoder.num_styles == 6 and "generator" in model
    best, _ = weights.load(out / "best")
    assert best.encoder == model.encoder
    # The generator stays, the running statistics move.
    _, before = weights.load(base)
    jax.tree.map(
        np.testing.assert_array_equal, before["generator"], params["generator"]
    )
    moved = jax.tree.leaves(batch_stats(params["encoder"]))
    assert any(np.abs(x).max() > 1e-3 for x in moved)
    # The run folder is a start for another task.
    more = train(out, tmp_path / "more", "--data", faces, "--id-lambda", 0)
    assert "goes on from" in capsys.readouterr().out
    assert more[0]["l2"] < written[0]["l2"] * 1.5
    # Straight and in two parts is the same.
    train(base, tmp_path / "parts", *flags, "--steps", 2)
    train(base, tmp_path / "parts", *flags)
    _, parts = weights.load(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, parts["encoder"], params["encoder"])


@pytest.mark.parametrize(
    "flags",
    [
        "--task celebs_sketch_to_face --source DATA --encoder w_plus",
        pytest.param(
            "--task celebs_super_resolution --id-lambda 0 --factors 2 4 --encoder w "
            "--space w",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--data generated --space z_plus --code-lambda 1 --id-lambda 0",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--task ffhq_frontalize --source DATA --train-decoder",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tasks_run(flags, base, judge, faces, tmp_path, quick_compile):
    flags = flags.replace("DATA", str(faces)).split()
    flags += ["--lpips-crop-lambda", "0", "--identity-net", str(judge)]
    if "--data" not in flags:
        flags += ["--data", str(faces)]
    written = train(base, tmp_path / "run", *flags, "--steps", 2, "--seed", 3)
    assert np.isfinite(written[-1]["loss"])
    _, before = weights.load(base)
    _, after = weights.load(tmp_path / "run")
    change = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), before["generator"], after["generator"]
    )
    moved = max(jax.tree.leaves(change)) > 0
    assert moved == ("--train-decoder" in flags)
    assert change["w_avg"] == 0 and max(change["noise_const"].values()) == 0


@pytest.mark.slow
def test_label_maps_and_restyle(base, faces, tmp_path, quick_compile):
    source = tmp_path / "labels"
    source.mkdir()
    for i in range(10):
        Image.new("L", (8, 8), i % 3).save(source / f"{i}.png")
    flags = ["--task", "celebs_seg_to_face", "--data", faces, "--source", source]
    train(base, tmp_path / "seg", *flags, "--classes", 3, "--steps", 2)
    assert weights.load(tmp_path / "seg")[0].encoder.in_channels == 3
    flags = ["--data", faces, "--id-lambda", 0, "--restyle", 2, "--steps", 2]
    written = train(base, tmp_path / "restyle", *flags)
    encoder = weights.load(tmp_path / "restyle")[0].encoder
    assert encoder.in_channels == 6 and encoder.level_rows == ()
    assert np.isfinite(written[-1]["loss"])


@pytest.mark.slow
def test_loss_falls(base, faces, tmp_path):
    flags = ["--data", faces, "--id-lambda", 0, "--lr", 3e-3, "--steps", 40]
    flags += ["--optimizer", "adam"]
    written = train(base, tmp_path / "run", *flags)
    first = np.mean([w["loss"] for w in written[:5]])
    assert np.mean([w["loss"] for w in written[-5:]]) < 0.9 * first


def on_one_and_eight(make_steps, state, frozen, batch):
    """States and metrics after the first iteration on meshes of 1 and 8 devices."""
    results = []
    for devices in (1, 8):
        mesh = mesh_of(devices)
        with jax.set_mesh(mesh):
            layout = encoding.sharding.shardings(state, mesh)
            placed = encoding.sharding.place(state, layout)
            sharded = encoding.sharding.global_batch(batch, mesh)
            metrics = {}
            for step in make_steps:
                placed, values = jax.jit(step)(placed, frozen, sharded)
                metrics |= values
            results.append(jax.device_get((placed, metrics)))
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    "lambdas",
    [
        {"id_lambda": 0.0, "lpips_lambda": 0.0},
        # All losses of ffhq_encode: half a minute of compiling.
        pytest.param({"w_norm_lambda": 0.005}, marks=pytest.mark.slow),
    ],
)
def test_step_is_the_same_on_one_device_and_on_eight(base, faces, judge, lambdas):
    """Batch statistics are those of the global batch."""
    options = psp.Options(
        common=EncodingOptions(
            data=str(faces),
            weights=str(base),
            encoder_size=32,
            encoder_units=(1, 1, 1),
            encoder_channels=(16, 16, 16),
            identity_net=str(judge),
        ),
        run=psp.RunOptions(batch=8),
        **lambdas,
    )
    setup, params, frozen = psp.make_setup(options)
    optimizers = encoding.make_optimizers(options.common)
    batch = {"image": jax.random.uniform(jax.random.key(1), (8, 32, 32, 3))}
    state = psp.create_state(params, optimizers, key=jax.random.key(0))
    step = psp.make_step(options, setup, optimizers)
    (one, first), (eight, second) = on_one_and_eight([step], state, frozen, batch)
    assert len(first) == 2 if "id_lambda" in lambdas else 6
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, rtol=1e-5, err_msg=name)
    for a, b in zip(
        jax.tree.leaves(batch_stats(one.params["encoder"])),
        jax.tree.leaves(batch_stats(eight.params["encoder"])),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_trunk_starts_from_arcface(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    judge = ArcFace(size=56, units=(1, 2, 1), channels=(16, 16, 32), width=6)
    params = {"identity": judge.init_params(key=jax.random.key(5))}
    weights.save("weights/arcface", {"identity": judge}, params)
    options = EncodingOptions(
        data="",
        weights=str(base),
        encoder_size=32,
        encoder_units=judge.units,
        encoder_channels=judge.channels,
    )
    make = functools.partial(GradualStyleEncoder)
    for channels, restyle in ((3, 0), (1, 0), (3, 2)):
        now = dataclasses.replace(options, restyle=restyle)
        _, made = encoding.make_networks(now, make, channels, psp.RunOptions())
        assert "from weights/arcface" in capsys.readouterr().out
        body = made["encoder"]["body_1"]["conv1"]
        np.testing.assert_array_equal(body, params["identity"]["body_1"]["conv1"])
        first = made["encoder"]["input"]["conv"]
        same = first[:, :, :3] == params["identity"]["input"]["conv"]
        assert np.all(same) == (channels == 3)
        if restyle:
            assert first.shape[2] == 6 and 0.8 < first[:, :, 3:].std() < 1.2


def test_an_encoder_that_goes_on_keeps_its_shape(base, tmp_path):
    """Its own shape may be asked for again, and no other."""
    shape = {"size": 32, "units": (1, 1, 1), "channels": (16, 16, 16)}
    own = GradualStyleEncoder(num_styles=6, w_dim=16, head_channels=8, **shape)
    params = own.init_params(key=jax.random.key(0))
    weights.save(tmp_path / "encoder", {"encoder": own}, {"encoder": params})
    given = {"weights": str(base), "start": str(tmp_path / "encoder")}
    shape = {f"encoder_{name}": value for name, value in shape.items()}

    def encoder(**asked):
        options = EncodingOptions(data="", **given, **asked)
        make = GradualStyleEncoder
        return encoding.make_networks(options, make, 3, psp.RunOptions())[0]["encoder"]

    assert encoder() == encoder(**shape, encoder_head_channels=8) == own
    for name, value in (
        ("encoder_size", 64),
        ("encoder_blocks", "resnet"),
        ("encoder_units", (1, 2, 1)),
        ("encoder_channels", (16, 16, 32)),
        ("encoder_head_channels", 4),
        ("encoder_rows", (8, 24)),
    ):
        flag = f"--{name.replace('_', '-')} is"
        with pytest.raises(UserError, match=f"{flag} .*, but the encoder of --start"):
            encoder(**shape | {name: value})


def test_fewer_pictures_to_validate_on_than_devices(base, faces, tmp_path, capsys):
    np.save(tmp_path / "few.npy", np.zeros((3, 32, 32, 3), np.uint8))
    flags = ["--data", faces, "--id-lambda", 0, "--mesh-data", 8]
    with pytest.raises(SystemExit):
        train(base, tmp_path / "run", *flags, "--val-data", tmp_path / "few.npy")
    error = capsys.readouterr().err
    assert "--val-data is" in error and "only 3 pictures for 8 devices" in error


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--space w", "needs --encoder w"),
        ("--encoder w --encoder-head-channels 8", "has no head for each row"),
        ("--encoder-head-channels -1", "--encoder-head-channels is -1"),
        ("--similarity-lambda 1", "both above 0"),
        ("--code-lambda 1", "only --data generated"),
        ("--encoder-rows 4 28", "show no faces: use --task things"),
        ("--task things --encoder-rows 4 27", "a multiple of 8 apart"),
        ("--first-step 9", "from 0 to below --steps"),
        ("--resume", "holds no training data"),
        ("--restyle 2 --no-start-from-w-avg", "begins at the average code"),
        ("--restyle 2 --inputs sketch", "sketch have 1 channels: leave it out"),
        ("--trunk-net lpips_alexnet --id-lambda 0", "has other shapes"),
        ("--data generated --inputs sketch", "their own inputs"),
        ("--identity-net lpips_alexnet", "must hold a network named 'identity'"),
        ("--source x", "the task's inputs are --data"),
        ("--id-lambda 0 --l2-lambda 0 --lpips-lambda 0", "nothing to learn from"),
    ],
)
def test_mistakes_are_explained(flags, message, base, faces, tmp_path, capsys):
    flags = flags.split()
    if "--data" not in flags:
        flags += ["--data", str(faces)]
    with pytest.raises(SystemExit):
        train(base, tmp_path / "run", *flags)
    assert message in capsys.readouterr().err
