"""Encoders against pSp's and e4e's own, from files in their layout."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from convert import pt
from convert.encoder import encoder_state, official_type
from jaxstyle import pipeline, weights
from jaxstyle.encoders import (
    BackboneWEncoder,
    BackboneWPlusEncoder,
    Encoder4Editing,
    GradualStyleEncoder,
    adaptive_pool,
    batch_norm,
    encode,
    merge_batch_stats,
    refine,
    resize_corners,
)
from jaxstyle.encoding import encode_pictures, load_encoder
from jaxstyle.errors import UserError
from tests.filled import (
    GOLDEN,
    draw,
    fill_array,
    filled_state_dict,
    golden,
    relative_error,
)
from train.measures import all_distances, describe, own_nearer

BOUND = 5e-5
AVERAGE = 0.3 * draw("golden-v1", "latent_avg", (512,))


@functools.cache
def pictures():
    """The golden input X, [2, 256, 256, 3]."""
    x = golden("encoder_inputs")["x_u8"]
    return x.astype(np.float32) / np.float32(127.5) - 1


def through_file(folder, state, options, *, legacy=False, critic=None):
    """Write a checkpoint in the original layout and convert it."""
    rows = max(1, sum(k.endswith(".linear.weight") for k in state))
    value = {
        "state_dict": {f"encoder.{k}": v for k, v in state.items()},
        "latent_avg": np.repeat(AVERAGE[None], rows, 0),
        "opts": {"start_from_latent_avg": True} | options,
    }
    if critic is not None:
        value["discriminator_state_dict"] = critic
    path = folder / "encoder.pt"
    pt.write(path, value, legacy=legacy)
    networks, params, _ = convert.load(path)
    path.unlink()
    return networks, jax.tree.map(jnp.asarray, params)


encode_jit = jax.jit(encode, static_argnums=0)


def apply(module, params, images, **options):
    call = jax.jit(lambda p, x: module.apply({"params": p}, x, **options))
    return call(params, images)


def check_psp(folder, styles, *, legacy):
    """Codes, features and batch statistics of a pSp encoder with some of its rows."""
    state = filled_state_dict("psp_encoder", styles=styles)
    options = {"encoder_type": "GradualStyleEncoder"}
    networks, params = through_file(folder, state, options, legacy=legacy)
    module, params = networks["encoder"], params["encoder"]
    assert module == GradualStyleEncoder(num_styles=styles)
    expected = golden("psp_encoder")

    codes, out = apply(module, params, pictures())
    assert relative_error(codes, expected["codes"][:, :styles]) < BOUND
    for ours, theirs in (
        ("input", "input_layer"),
        ("stage_0", "b2"),
        ("stage_1", "c1"),
        ("stage_2", "c2"),
        ("stage_3", "c3"),
        ("level_1", "p2"),
        ("level_2", "p1"),
    ):
        x = np.moveaxis(np.asarray(out["features"][ours]), -1, 1)
        part = expected[f"{theirs}_slice"]
        assert relative_error(x[:, :4, :4, :4], part) < BOUND, theirs
        stats = np.array([x.mean(), x.std(ddof=1), x.min(), x.max()])
        assert relative_error(stats, expected[f"{theirs}_stats"]) < BOUND, theirs

    codes, out = apply(module, params, pictures(), train=True)
    wanted = expected["codes_train_mode"][:, :styles]
    assert relative_error(codes, wanted) < BOUND
    merged = merge_batch_stats(params, out["batch_stats"])
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for key, got in (
        ("input_layer.1.running_mean", merged["input"]["norm"]["mean"]),
        ("input_layer.1.running_var", merged["input"]["norm"]["var"]),
        (
            "body.3.shortcut_layer.1.running_var",
            merged["body_3"]["shortcut"]["norm"]["var"],
        ),
        ("body.23.res_layer.4.running_mean", merged["body_23"]["norm2"]["mean"]),
        ("body.23.res_layer.4.running_var", merged["body_23"]["norm2"]["var"]),
    ):
        assert relative_error(got, expected[f"after_train_forward/{key}"]) < BOUND, key


def check_e4e(folder, styles, *, legacy):
    """Codes of an e4e encoder at its stages, and its critic."""
    state = filled_state_dict("e4e_encoder", styles=styles)
    critic = filled_state_dict("e4e_latent_discriminator")
    networks, params = through_file(
        folder,
        state,
        {"encoder_type": "Encoder4Editing"},
        legacy=legacy,
        critic=critic,
    )
    module = networks["encoder"]
    assert module == Encoder4Editing(num_styles=styles)
    expected = golden("e4e_encoder")
    stages = [(0, 2), (2, 4), (5, 7), (None, styles)]
    if styles == 18:
        stages.append((17, 18))
    for stage, rows in stages:
        name = f"stage{stage}" if rows < styles else "stage18"
        codes, _ = apply(module, params["encoder"], pictures(), stage=stage)
        assert codes.shape == (2, styles, 512)
        assert relative_error(codes[:, :rows], expected[name][:, :rows]) < BOUND, stage
        if rows < styles:
            assert (codes[:, rows:] == codes[:, :1]).all()

    expected = golden("e4e_latent_discriminator")
    judge = functools.partial(
        networks["latent_discriminator"].apply,
        {"params": params["latent_discriminator"]},
    )
    for name in ("real", "fake"):
        logits = judge(expected[name])
        assert relative_error(logits, expected[f"{name}_pred"]) < BOUND


def test_psp_equals_the_original(tmp_path):
    check_psp(tmp_path, 8, legacy=False)


def test_e4e_equals_the_original(tmp_path):
    check_e4e(tmp_path, 8, legacy=True)


@pytest.mark.slow  # half a minute
def test_encoder_of_cars_equals_the_original(tmp_path):
    """It sees 192 of 256 rows; the values are of e4e's module on those."""
    state = filled_state_dict("e4e_encoder", styles=8)
    options = {"encoder_type": "Encoder4Editing", "dataset_type": "cars_encode"}
    networks, params = through_file(tmp_path, state, options)
    module, params = networks["encoder"], params["encoder"]
    assert module == Encoder4Editing(num_styles=8, rows=(32, 224))
    codes, _ = apply(module, params, pictures())
    assert relative_error(codes, golden("e4e_cars")["codes8"]) < BOUND


@pytest.mark.slow  # 1.1 GB of weights each
@pytest.mark.parametrize("check", [check_psp, check_e4e])
def test_all_18_styles(tmp_path, check):
    check(tmp_path, 18, legacy=check is check_psp)


@pytest.mark.parametrize(
    "name, encoder_type, expected_module",
    [
        (
            "psp_backbone_w",
            "BackboneEncoderUsingLastLayerIntoW",
            BackboneWEncoder(num_styles=18),
        ),
        (
            "psp_backbone_wplus",
            "BackboneEncoderUsingLastLayerIntoWPlus",
            BackboneWPlusEncoder(num_styles=18),
        ),
    ],
)
def test_backbones_equal_the_original(tmp_path, name, encoder_type, expected_module):
    networks, params = through_file(
        tmp_path, filled_state_dict(name), {"encoder_type": encoder_type}
    )
    module, params = networks["encoder"], params["encoder"]
    assert module == expected_module
    codes, _ = apply(module, params, pictures())
    assert relative_error(codes, golden("psp_backbones")[name]) < BOUND
    w_plus = encode_jit(module, params, pictures())
    wanted = (codes if codes.ndim == 3 else codes[:, None]) + AVERAGE
    assert w_plus.shape == (2, 18, 512)
    np.testing.assert_allclose(w_plus, jnp.broadcast_to(wanted, w_plus.shape), 1e-4)


@pytest.mark.parametrize("channels", [1, 19])
def test_sketch_and_label_inputs_equal_the_original(tmp_path, channels):
    # The rows are independent of each other; the first tells about the new input.
    manifest = json.loads((GOLDEN / "manifests" / "psp_encoder.json").read_text())
    state = {}
    for key, shape, dtype, fill, _ in manifest["entries"]:
        if key.startswith("styles.") and not key.startswith("styles.0."):
            continue
        if key == "input_layer.0.weight":
            shape, fill = [64, channels, 3, 3], ["normal", (9 * channels) ** -0.5, 0]
        prefix = f"golden-v1/psp_encoder_nc{channels}"
        state[key] = fill_array(prefix, key, shape, dtype, fill)
    if channels == 1:
        images = (pictures()[..., :1] + 1) / 2
    else:
        red = golden("encoder_inputs")["x_u8"][..., 0].astype(np.int64)
        images = np.eye(channels, dtype=np.float32)[red * channels // 256]
    options = {"encoder_type": "GradualStyleEncoder", "input_nc": str(channels)}
    networks, params = through_file(tmp_path, state, options)
    assert networks["encoder"].in_channels == channels
    codes, _ = apply(networks["encoder"], params["encoder"], images)
    expected = golden("psp_backbones")[f"codes8_nc{channels}"][:, :1]
    assert relative_error(codes, expected) < BOUND


def restyle_state(kind):
    """A ReStyle encoder: six channels, eight rows that all read the last stage."""
    manifest = json.loads((GOLDEN / "manifests" / "psp_encoder.json").read_text())
    rows, state = {}, {}
    for key, shape, dtype, fill, _ in manifest["entries"]:
        if key.startswith("latlayer"):
            continue
        if key.startswith("styles."):
            if key.startswith("styles.0."):
                rows[key.removeprefix("styles.0.")] = shape, dtype, fill
            continue
        if key == "input_layer.0.weight":
            shape, fill = [64, 6, 3, 3], ["normal", 54**-0.5, 0]
        state[key] = shape, dtype, fill
    for i in range(8):
        state |= {f"styles.{i}.{key}": value for key, value in rows.items()}
    prefix = f"golden-v1/restyle_{kind}_encoder"
    return {key: fill_array(prefix, key, *value) for key, value in state.items()}


@pytest.mark.parametrize(
    "kind, encoder_type",
    [
        # Also refines twice, which takes long to compile.
        pytest.param("psp", "BackboneEncoder", marks=pytest.mark.slow),
        ("e4e", "ProgressiveBackboneEncoder"),
    ],
)
def test_restyle_equals_the_original(tmp_path, kind, encoder_type):
    options = {"encoder_type": encoder_type, "input_nc": 6}
    networks, params = through_file(tmp_path, restyle_state(kind), options)
    module, params = networks["encoder"], params["encoder"]
    classes = {"psp": GradualStyleEncoder, "e4e": Encoder4Editing}
    assert module == classes[kind](num_styles=8, in_channels=6, level_rows=())
    assert official_type(module) == encoder_type
    expected = golden("restyle")
    x = pictures()
    v = np.float32(0.8) * x[:, :, ::-1] + np.float32(0.1)
    codes, _ = apply(module, params, np.concatenate([x, v], -1))
    assert relative_error(codes, expected[f"restyle_{kind}_encoder_codes8"]) < BOUND
    if kind == "e4e":
        return
    larger = filled_state_dict("stylegan2_g_64")
    dropped = ("convs.6.", "convs.7.", "to_rgbs.3.", "noises.noise_7", "noises.noise_8")
    state = {k: v for k, v in larger.items() if not k.startswith(dropped)}
    pt.write(tmp_path / "g.pt", {"g_ema": state, "latent_avg": AVERAGE})
    networks, decoder, _ = convert.load(tmp_path / "g.pt")
    decoder = jax.tree.map(jnp.asarray, decoder["generator"])
    run = jax.jit(
        lambda p, g, x, n: refine(module, p, networks["generator"], g, x, n),
        static_argnums=3,
    )
    for steps in (1, 2):
        codes = run(params, decoder, x, steps)
        wanted = expected[f"restyle_latent_step{steps}"]
        assert relative_error(codes, wanted) < BOUND, steps


def resnet_state(pyramid):
    """ReStyle's encoder on ResNet-34, eight rows."""
    state = filled_state_dict("restyle_resnet_encoder")
    if pyramid:
        return dict(state)
    finer = re.compile(r"latlayer|styles\.\d+\.convs\.(8|10)\.")
    return {k: v for k, v in state.items() if not finer.match(k)}


@pytest.mark.parametrize(
    "name, encoder_type",
    [
        ("backbone", "ResNetBackboneEncoder"),
        pytest.param("gradual", "ResNetGradualStyleEncoder", marks=pytest.mark.slow),
        pytest.param(
            "progressive", "ResNetProgressiveBackboneEncoder", marks=pytest.mark.slow
        ),
    ],
)
def test_restyle_on_resnet_equals_the_original(tmp_path, name, encoder_type):
    """The values are of restyle-encoder's modules, filled by the manifest's rule."""
    state, options = resnet_state(name == "gradual"), {"encoder_type": encoder_type}
    networks, params = through_file(tmp_path, state, options)
    module, params = networks["encoder"], params["encoder"]
    kind = Encoder4Editing if name == "progressive" else GradualStyleEncoder
    assert module == kind(
        num_styles=8,
        in_channels=6,
        units=(3, 4, 6, 3),
        level_rows=(3, 7) if name == "gradual" else (),
        blocks="resnet",
    )
    assert official_type(module) == encoder_type
    again = encoder_state(module, params)
    assert again.keys() == state.keys()
    for key in ("relu.weight", "body.3.downsample.1.running_var", "conv1.weight"):
        np.testing.assert_array_equal(again[key], state[key])
    expected, x = golden("restyle_resnet"), pictures()
    both = np.concatenate([x, np.float32(0.8) * x[:, :, ::-1] + np.float32(0.1)], -1)
    codes, out = apply(module, params, both)
    assert relative_error(codes, expected[name]) < BOUND
    for stage in range(4):
        part = np.moveaxis(np.asarray(out["features"][f"stage_{stage}"]), -1, 1)
        wanted = expected[f"stage_{stage}_slice"]
        assert relative_error(part[:, :4, :4, :4], wanted) < BOUND, stage


@pytest.mark.slow  # half a minute
def test_restyle_on_resnet_trains_as_the_original(tmp_path):
    options = {"encoder_type": "ResNetBackboneEncoder"}
    networks, params = through_file(tmp_path, resnet_state(False), options)
    module, params = networks["encoder"], params["encoder"]
    expected, x = golden("restyle_resnet"), pictures()
    both = np.concatenate([x, np.float32(0.8) * x[:, :, ::-1] + np.float32(0.1)], -1)
    codes, out = apply(module, params, both, train=True)
    assert relative_error(codes, expected["backbone_train"]) < BOUND
    merged = encoder_state(module, merge_batch_stats(params, out["batch_stats"]))
    for key, wanted in expected.items():
        if key.startswith("after/"):
            got = merged[key.removeprefix("after/")]
            assert relative_error(got, wanted) < BOUND, key


# A small encoder is the same code


SMALL = {
    "size": 32,
    "units": (2, 1),
    "channels": (8, 16),
    "se_ratio": 4,
    "w_dim": 12,
    "num_styles": 5,
}


@pytest.mark.parametrize(
    "kind", [GradualStyleEncoder, BackboneWEncoder, BackboneWPlusEncoder]
)
def test_rows_that_an_encoder_sees(kind, key):
    fields = {"level_rows": (3,)} if kind is GradualStyleEncoder else {}
    module = kind(rows=(4, 28), **SMALL, **fields)
    params = module.init_params(key=key)
    images = np.array(jax.random.normal(key, (2, 32, 32, 3)))
    codes, _ = apply(module, params, images)
    images[:, :4], images[:, 28:] = 7, -7
    again, _ = apply(module, params, images)
    np.testing.assert_array_equal(codes, again)
    assert not np.array_equal(apply(module.clone(rows=()), params, images)[0], codes)


@pytest.mark.parametrize("kind", [GradualStyleEncoder, Encoder4Editing])
def test_small_encoder(kind, key):
    module = kind(level_rows=(3,), **SMALL)
    params = module.init_params(key=key)
    # The last stage has 8 pixels and the map before it 16: three and four halvings.
    assert [n for n in params["style_2"] if n.startswith("conv")][-1] == "conv_2"
    assert [n for n in params["style_3"] if n.startswith("conv")][-1] == "conv_3"
    images = jax.random.normal(key, (3, 32, 32, 3))
    codes, out = apply(module, params, images)
    assert codes.shape == (3, 5, 12) and "batch_stats" not in out
    alone, _ = apply(module, params, images[1:2])
    np.testing.assert_allclose(alone, codes[1:2], rtol=1e-4, atol=1e-5)
    half, _ = apply(module.clone(dtype="bfloat16"), params, images)
    assert half.dtype == jnp.float32
    assert relative_error(half, np.asarray(codes)) < 0.05


@pytest.mark.parametrize("kind", [GradualStyleEncoder, Encoder4Editing])
def test_narrow_heads(kind, key):
    module = kind(level_rows=(3,), head_channels=6, **SMALL)
    params = module.init_params(key=key)
    head = jax.tree.map(jnp.shape, params["style_3"])
    assert head["conv_0"]["weight"] == (3, 3, 16, 6)
    assert head["conv_3"]["weight"] == (3, 3, 6, 6)
    assert head["dense"] == {"weight": (6, 12), "bias": (12,)}
    images = jax.random.normal(key, (2, 32, 32, 3))
    assert apply(module, params, images)[0].shape == (2, 5, 12)


def test_codes_start_from_the_average(key):
    module = Encoder4Editing(level_rows=(3,), **SMALL)
    params = module.init_params(key=key)
    params["w_avg"] = jax.random.normal(key, (5, 12))
    images = jax.random.normal(key, (1, 32, 32, 3))
    codes, _ = apply(module, params, images)
    added = encode_jit(module, params, images)
    np.testing.assert_allclose(added, codes + params["w_avg"], rtol=1e-4, atol=1e-5)
    plain = encode_jit(module.clone(start_from_w_avg=False), params, images)
    np.testing.assert_allclose(plain, codes, rtol=1e-4, atol=1e-5)


def test_stage_runs_only_what_its_rows_need(key):
    module = Encoder4Editing(level_rows=(3,), **SMALL)
    params = module.init_params(key=key)
    images = jax.random.normal(key, (2, 32, 32, 3))

    def loss(params):
        codes, out = module.apply({"params": params}, images, stage=1, train=True)
        return jnp.sum(jnp.square(codes)), out["batch_stats"]

    gradients, stats = jax.jit(jax.grad(loss, has_aux=True))(params)
    size = {
        k: sum(map(jnp.linalg.norm, map(jnp.ravel, jax.tree.leaves(v))))
        for k, v in gradients.items()
    }
    assert size["style_0"] > 0 and size["style_1"] > 0 and size["body_0"] > 0
    assert size["style_2"] == size["style_4"] == size["lateral_1"] == 0
    # The running statistics and the average are no weights.
    assert (gradients["input"]["norm"]["var"] == 0).all() and size["w_avg"] == 0
    assert not (stats["input"]["norm"]["mean"] == 0).all()


def test_running_variance_is_the_unbiased_one():
    params = {
        "scale": np.ones(1),
        "bias": np.zeros(1),
        "mean": np.zeros(1),
        "var": np.ones(1),
    }
    x = jnp.array([[1.0], [3.0]])
    y, stats = batch_norm(params, x, True)
    np.testing.assert_allclose(y, [[-1], [1]], rtol=1e-4)
    np.testing.assert_allclose(stats["mean"], [0.2], rtol=1e-6)
    np.testing.assert_allclose(stats["var"], [0.9 + 0.1 * 2], rtol=1e-6)


def test_resampling_by_hand():
    x = jnp.arange(3.0)[None, :, None, None] * jnp.ones((1, 3, 3, 1))
    np.testing.assert_allclose(resize_corners(x, 5, 5)[0, :, 2, 0], [0, 0.5, 1, 1.5, 2])
    x = jnp.arange(5.0)[None, :, None, None] * jnp.ones((1, 5, 5, 1))
    # Windows 0..1, 1..3, 3..4 overlap.
    np.testing.assert_allclose(adaptive_pool(x, 3)[0, :, 0, 0], [0.5, 2, 3.5])


def test_refuses_what_does_not_fit(key):
    module = GradualStyleEncoder(level_rows=(3,), **SMALL)
    with pytest.raises(UserError, match=r"\[1, 64, 64, 3\].*\[batch, 32, 32, 3\]"):
        module.apply({"params": module.init_params(key=key)}, jnp.zeros((1, 64, 64, 3)))
    with pytest.raises(UserError, match=r"level_rows \(3, 7\)"):
        GradualStyleEncoder(**SMALL).init_params(key=key)


@pytest.mark.parametrize("name", ["heads_e4e", "heads_z_plus"])
def test_what_ships_inverts_the_embedded_model(name):
    """Each of eight drawn heads is found again, nearer than the average head is."""
    generator, params = pipeline.load_generator("heads")
    metadata = weights.read_config("heads")["metadata"]
    assert name in (metadata["encoder"], metadata["z_plus_encoder"])
    judge = weights.load("lpips_alexnet")[1]["lpips"]
    z = pipeline.seed_codes(range(8), generator.z_dim)
    heads, _ = generator.apply({"params": params}, z, psi=0.7)
    codes = encode_pictures(
        load_encoder(name, generator), generator, params, heads, batch=8
    )
    found = pipeline.pictures(generator, params, codes)
    average = jnp.broadcast_to(params["w_avg"], codes.shape)
    average = pipeline.pictures(generator, params, average)
    wanted = describe(judge, heads)
    own, plain = (
        np.asarray(all_distances(judge, describe(judge, x), wanted))
        for x in (found, average)
    )
    assert own_nearer(own) == 1
    assert np.diagonal(own).mean() < 0.35 * np.diagonal(plain).mean()
    size = sum(f.stat().st_size for f in Path(weights.resolve(name)).rglob("*"))
    assert size < 2.5e6
