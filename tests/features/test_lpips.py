"""LPIPS against the original's values, with filled trunks and the real heads."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from convert import pt
from jaxstyle import weights
from jaxstyle.errors import UserError
from jaxstyle.features.lpips import LPIPS
from tests.filled import filled_state_dict, golden, relative_error
from train import fits
from train.sharding import batch_sharding, make_mesh, replicated


@pytest.fixture(scope="module")
def pair():
    """The golden pictures X and V, [2, 256, 256, 3]."""
    x = golden("encoder_inputs")["x_u8"].astype(np.float32) / np.float32(127.5) - 1
    return jnp.asarray(x), jnp.asarray(0.8 * x[:, :, ::-1] + 0.1)


def heads(net):
    """The real heads under their published names."""
    if net == "vgg":
        return golden("lpips_vgg_heads")
    _, params = weights.load("lpips_alexnet")
    values = [params["lpips"][f"head_{i}"] for i in range(5)]
    return {
        f"lin{i}.model.1.weight": np.reshape(np.asarray(v), (1, -1, 1, 1))
        for i, v in enumerate(values)
    }


@pytest.mark.parametrize(
    "net, manifest", [("alex", "alexnet_features"), ("vgg", "vgg16_features")]
)
def test_equals_the_original(net, manifest, pair, tmp_path):
    expected = golden("lpips")
    pt.write(tmp_path / "trunk.pth", dict(filled_state_dict(manifest)))
    pt.write(tmp_path / "heads.pth", heads(net), legacy=True)
    networks, params, _ = convert.load(
        tmp_path / "trunk.pth", heads=tmp_path / "heads.pth"
    )
    module, params = networks["lpips"], params["lpips"]
    assert module == LPIPS(net=net)

    @jax.jit
    def value_and_gradient(params, a, b):
        def mean(a):
            values = module.apply({"params": params}, a, b)
            return values.mean(), values

        return jax.value_and_grad(mean, has_aux=True)(a)

    (_, values), gradient = value_and_gradient(params, *pair)
    assert relative_error(values, expected[f"{net}_per_image"]) < 2e-5
    assert relative_error(values.mean(), expected[f"{net}_value"]) < 2e-5
    norm = np.linalg.norm(gradient)
    assert relative_error(norm, expected[f"{net}_grad_norm"]) < 1e-4
    part = expected[f"{net}_grad_slice"].transpose(0, 2, 3, 1)
    assert relative_error(gradient[:, 100:104, 100:104], part) < 1e-4
    crop = [image[:, 35:223, 32:220] for image in pair]
    values = jax.jit(lambda p, a, b: module.apply({"params": p}, a, b))(params, *crop)
    assert relative_error(values.mean(), expected[f"{net}_crop"]) < 2e-5


def test_shipped_weights_judge_as_known(pair):
    model, params = weights.load("lpips_alexnet")
    params = {"params": params["lpips"]}
    a, b = (image[1:, 96:160, 96:160] for image in pair)
    noisy = a + 0.2 * jax.random.normal(jax.random.key(0), a.shape)
    slightly = a + 0.05 * jax.random.normal(jax.random.key(0), a.shape)
    distances = [
        float(model.lpips.apply(params, a, x)[0]) for x in (a, slightly, noisy)
    ]
    assert distances[0] == 0 and 0 < distances[1] < distances[2] < 1
    target = model.lpips.apply(params, b, method="features")
    kept = model.lpips.apply(params, a, target, method="feature_distance")
    np.testing.assert_allclose(kept, model.lpips.apply(params, a, b), rtol=1e-5)


@pytest.mark.slow
def test_gradient_of_black_pictures_is_finite():
    module = LPIPS()
    params = module.init_params(key=jax.random.key(0))
    # Biases below zero: every column after the ReLU is empty.
    params = {k: v for k, v in params.items()}
    params["conv_0"] = params["conv_0"] | {"bias": jnp.full(64, -100.0)}
    black = -jnp.ones((1, 32, 32, 3))

    def loss(image):
        return module.apply({"params": params}, image, black + 1).sum()

    assert np.isfinite(jax.grad(loss)(black)).all()


@pytest.mark.slow
def test_each_picture_is_judged_alone(key):
    module = LPIPS()
    params = {"params": module.init_params(key=key)}
    a, b = jax.random.uniform(key, (2, 3, 37, 45, 3))
    together = module.apply(params, a, b)
    assert together.shape == (3,)
    for i in range(3):
        alone = module.apply(params, a[i : i + 1], b[i : i + 1])[0]
        np.testing.assert_allclose(alone, together[i], rtol=1e-5)


def test_devices_that_share_a_batch_exchange_nothing(quick_compile):
    module, mesh = LPIPS(), make_mesh(devices=jax.devices()[:2])
    params = jax.eval_shape(lambda: module.init_params(key=jax.random.key(0)))
    pictures = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    args = [
        jax.tree.map(
            lambda x, to=to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), arg
        )
        for arg, to in (
            (params, replicated(mesh)),
            *[(pictures, batch_sharding(mesh, 4))] * 2,
        )
    ]

    def slope(params, a, b):
        return jax.grad(lambda a: module.apply({"params": params}, a, b).sum())(a)

    with jax.set_mesh(mesh):
        text = jax.jit(slope).lower(*args).compile().as_text()
    assert "convolution" in text and not re.findall(fits.COLLECTIVES, text)


def test_refuses_what_it_cannot_judge(key):
    params = {"params": LPIPS().init_params(key=key)}
    with pytest.raises(UserError, match=r"shape \[16, 64, 3\].*at least 32"):
        LPIPS().apply(params, *jnp.zeros((2, 1, 16, 64, 3)))
    with pytest.raises(UserError, match="squeeze.*alex, vgg"):
        LPIPS(net="squeeze").init_params(key=key)
