"""VGG, ArcFace, the face descriptor and MoCo against the originals' values."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from convert import pt
from convert.__main__ import main
from jaxstyle import weights
from jaxstyle.encoders import adaptive_pool, resize_corners
from jaxstyle.errors import UserError
from jaxstyle.features.identity import ArcFace, FaceDescriptor
from jaxstyle.features.judges import choose
from jaxstyle.features.lpips import LPIPS
from jaxstyle.features.resnet import ResNet
from jaxstyle.features.vgg import VGG
from tests.filled import draw, filled_state_dict, golden, nhwc, relative_error

BOUND = 5e-5


@pytest.fixture(scope="module")
def pair():
    """The golden pictures X and V, [2, 256, 256, 3]."""
    x = golden("encoder_inputs")["x_u8"].astype(np.float32) / np.float32(127.5) - 1
    return x, np.float32(0.8) * x[:, :, ::-1] + np.float32(0.1)


def through_file(path, value, **options):
    """Write a file of torch and convert it: module and parameters of its network."""
    pt.write(path, value)
    networks, params, _ = convert.load(path, **options)
    path.unlink()
    ((name, module),) = networks.items()
    return module, jax.tree.map(jnp.asarray, params[name])


def cosine_loss(module, params, a, b):
    """1 - cosine of each pair, and its gradient with respect to `a`."""

    def loss(a, params, b):
        target = jax.lax.stop_gradient(
            module.apply({"params": params}, b, method="embed")
        )
        made = module.apply({"params": params}, a, method="embed")
        cosines = jnp.sum(made * target, -1)
        return jnp.mean(1 - cosines), (cosines, made, target)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(a, params, b)


def test_arcface_equals_the_original(tmp_path, pair):
    x, v = pair
    state = dict(filled_state_dict("model_ir_se50"))
    module, params = through_file(tmp_path / "model_ir_se50.pth", state)
    assert module == ArcFace()
    expected = golden("arcface")
    crop = np.moveaxis(module.apply({"params": params}, x, method="crop"), -1, 1)
    assert relative_error(crop.mean((2, 3)), expected["pooled_x_mean"]) < BOUND
    part = expected["pooled_x_slice"]
    assert relative_error(crop[:, :, 50:58, 50:58], part) < BOUND
    (loss, (cosines, on_v, on_x)), gradient = cosine_loss(module, params, v, x)
    assert relative_error(on_x, expected["emb_x"]) < BOUND
    assert relative_error(on_v, expected["emb_variant"]) < BOUND
    np.testing.assert_allclose(loss, expected["id_loss"], atol=2e-5)
    np.testing.assert_allclose(cosines, expected["diff_target"], atol=2e-5)
    shuffled = jnp.mean(1 - jnp.sum(on_v * on_x[::-1], -1))
    np.testing.assert_allclose(shuffled, expected["id_loss_shuffled"], atol=2e-5)
    assert relative_error(np.linalg.norm(gradient), expected["grad_norm"]) < 0.01
    part = nhwc(expected["grad_slice"])
    assert relative_error(gradient[:, 100:108, 100:108], part) < 1e-3
    outside = np.array(gradient)
    outside[:, 35:223, 32:220] = 0
    assert not outside.any()


def test_moco_equals_the_original(tmp_path, pair):
    x, v = pair
    trunk = filled_state_dict("moco_resnet50")
    state = {f"module.encoder_q.{k}": a for k, a in trunk.items()}
    state |= {
        "module.encoder_q.fc.0.weight": np.zeros((8, 2048), np.float32),
        "module.encoder_k.conv1.weight": np.zeros((1, 1, 1, 1), np.float32),
        "module.queue": np.zeros((4, 4), np.float32),
    }
    path = tmp_path / "moco.pth.tar"
    module, params = through_file(path, {"epoch": 800, "state_dict": state})
    assert module == ResNet()
    expected = golden("moco")
    found = cosine_loss(module, params, v, x[::-1])
    (loss, (cosines, on_v, on_x)), gradient = found
    assert relative_error(on_x[::-1], expected["feat"]) < BOUND
    np.testing.assert_allclose(loss, expected["loss"], atol=2e-5)
    np.testing.assert_allclose(cosines, expected["diff_target"], atol=2e-5)
    same = jnp.mean(1 - jnp.sum(on_v * on_x[::-1], -1))
    np.testing.assert_allclose(same, expected["loss_same"], atol=2e-5)
    assert relative_error(np.linalg.norm(gradient), expected["grad_norm"]) < 0.01


def test_resnet_of_torchvision_is_read(tmp_path):
    basic = ResNet(units=(1, 1, 1, 1), bottleneck=False)
    params = basic.init_params(key=jax.random.key(0))
    table = convert.features.resnet_table(basic.units, False)
    state = convert.layouts.to_state(params, table)
    state["fc.weight"] = np.zeros((10, 512), np.float32)
    module, read = through_file(tmp_path / "resnet10.pth", state)
    assert module == basic
    jax.tree.map(np.testing.assert_array_equal, params, read)
    means = basic.apply({"params": params}, jnp.zeros((1, 64, 48, 3)))
    assert means.shape == (1, 512)


def test_vgg19_equals_the_original(tmp_path):
    filled = filled_state_dict("vgg19")
    state = {f"features.{k.split('.', 1)[1]}": a for k, a in filled.items()}
    state["classifier.0.weight"] = np.zeros((2, 2), np.float32)
    module, params = through_file(tmp_path / "vgg19.pth", state)
    assert module == VGG(net="vgg19")
    coarse = draw("golden-v1", "input:img_a:lo", (2, 3, 16, 16)) * np.float32(0.5)
    fine = draw("golden-v1", "input:img_a:hi", (2, 3, 256, 256)) * np.float32(0.05)
    coarse = coarse.repeat(16, 2).repeat(16, 3)
    images = nhwc(np.clip(coarse + fine, -1, 1))
    out = jax.jit(lambda p, x: module.apply({"params": p}, x))(params, images)
    expected = golden("vgg19")
    for name, wanted in expected.items():
        x = np.moveaxis(np.asarray(out[name.split("/")[0]]), -1, 1)
        if name.endswith("/mean_std"):
            got = np.array([x.mean(), x.std()])
        else:
            n, _, h, w = x.shape
            got = x[:, :4].reshape(n, 4, 8, h // 8, 8, w // 8).mean((3, 5))
        assert relative_error(got, wanted) < BOUND, name


def test_vgg16_without_heads_gives_features(tmp_path):
    state = dict(filled_state_dict("vgg16_features"))
    pt.write(tmp_path / "vgg16.pth", state)
    networks, params, report = convert.load(tmp_path / "vgg16.pth")
    assert networks == {"vgg": VGG(net="vgg16")} and len(params["vgg"]) == 13
    assert "--heads" in report.missing[0]
    with pytest.raises(UserError, match="missing keys of the LPIPS heads"):
        convert.load(tmp_path / "vgg16.pth", heads=tmp_path / "vgg16.pth")


def test_alexnet_takes_the_heads_that_ship(tmp_path, capsys):
    pt.write(tmp_path / "alexnet.pth", dict(filled_state_dict("alexnet_features")))
    main([str(tmp_path / "alexnet.pth"), str(tmp_path / "alex")])
    assert "LPIPS: alex and its five heads" in capsys.readouterr().out
    judge = choose("perceptual", str(tmp_path / "alex"))
    assert judge.module == LPIPS()


def test_heads_alone_and_heads_for_nothing_are_refused(tmp_path):
    heads = {f"lin{i}.model.1.weight": np.ones((1, 4, 1, 1)) for i in range(5)}
    pt.write(tmp_path / "heads.pth", heads)
    with pytest.raises(UserError, match="LPIPS heads alone.*--heads"):
        convert.load(tmp_path / "heads.pth")
    pt.write(tmp_path / "age.pt", {"latent": np.ones((18, 512), np.float32)})
    with pytest.raises(UserError, match="--heads is given"):
        convert.load(tmp_path / "age.pt", heads=tmp_path / "heads.pth")


def test_descriptor_equals_the_original():
    inputs = golden("encoder_inputs")
    crops = [inputs["x_u8"][0, :150, :150], inputs["astronaut_512_u8"][30:180, 150:300]]
    model, params = weights.load("face_descriptor")
    assert model.identity == FaceDescriptor()
    x = np.stack(crops).astype(np.float32) / 127.5 - 1
    found = jax.jit(lambda p, x: model.identity.apply({"params": p}, x))(
        params["identity"], x
    )
    assert relative_error(found, golden("face_api")["descriptors"]) < BOUND


def test_descriptor_tells_who_it_is():
    model, params = weights.load("face_descriptor")
    photo = golden("face_alignment")["interior/aligned_u8"] / np.float32(127.5) - 1
    other = golden("encoder_inputs")["x_u8"][0] / np.float32(127.5) - 1
    small = photo.reshape(64, 4, 64, 4, 3).mean((1, 3)).repeat(4, 0).repeat(4, 1)
    shifted = np.roll(photo, 4, 1)
    embed = jax.jit(lambda p, x: model.identity.apply({"params": p}, x, method="embed"))
    e = embed(params["identity"], np.stack([photo, shifted, small, other]))
    np.testing.assert_allclose(jnp.linalg.norm(e, axis=1), 1, rtol=1e-5)
    same, enlarged, different = (float(e[0] @ e[i]) for i in (1, 2, 3))
    assert same > 0.8 and enlarged > 0.5 and different < 0.3


def test_pictures_of_any_size_are_judged(key):
    module = FaceDescriptor(units=(1, 1), channels=(4, 8), width=6)
    params = {"params": module.init_params(key=key)}
    small = jax.random.uniform(key, (2, 64, 64, 3))
    large = small.repeat(4, 1).repeat(4, 2)
    a, b = (module.apply(params, x, method="embed") for x in (small, large))
    np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(UserError, match=r"\[2, 64, 64, 1\].*aligned"):
        module.apply(params, small[..., :1], method="embed")


def test_pooling_equals_the_original():
    expected = golden("encoder_misc")
    x = nhwc(expected["pool_20_in"])
    assert relative_error(adaptive_pool(x, 7), nhwc(expected["pool_20_to_7"])) < 1e-6
    assert relative_error(adaptive_pool(x, 32), nhwc(expected["pool_20_to_32"])) < 1e-6
    larger = resize_corners(x[:, :5, :5], 10, 10)
    wanted = nhwc(expected["bilinear_align_corners_5_to_10"])
    assert relative_error(larger, wanted) < 1e-6
    # What ArcFace's crop is pooled by: windows of two and three pixels.
    ramp = np.arange(188, dtype=np.float32)
    edges = zip(expected["pool_starts"], expected["pool_ends"], strict=True)
    means = [ramp[start:end].mean() for start, end in edges]
    pooled = adaptive_pool(np.broadcast_to(ramp[:, None, None], (1, 188, 188, 1)), 112)
    np.testing.assert_allclose(pooled[0, :, 0, 0], means, rtol=1e-5)


def test_choice_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert choose("perceptual").name == "lpips_alexnet"
    assert "perceptual judge: lpips_alexnet (LPIPS; the published one)" in (
        capsys.readouterr().out
    )
    judge = choose("identity")
    assert judge.name == "face_descriptor"
    assert "convert model_ir_se50.pth to weights/arcface" in capsys.readouterr().out
    small = ArcFace(size=28, units=(1, 1), channels=(4, 8), se_ratio=2, width=6)
    params = {"identity": small.init_params(key=jax.random.key(0))}
    weights.save("weights/arcface", {"identity": small}, params)
    assert choose("identity", dtype="bfloat16").module == small.clone(dtype="bfloat16")
    with pytest.raises(UserError, match="--identity-net is 'lpips_alexnet'"):
        choose("identity", "lpips_alexnet")
    with pytest.raises(UserError, match="no weights/moco; convert moco_v2"):
        choose("similarity")


def test_vendored_networks_have_a_licence():
    for config in weights.ASSETS.glob("*/config.json"):
        source = json.loads(config.read_text())["metadata"].get("source")
        assert source is None or (config.parent / "LICENSE").exists(), config
