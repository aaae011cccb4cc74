"""Losses against the original's values and gradients, through converted judges."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from convert import pt
from jaxstyle import losses, weights
from jaxstyle.errors import UserError
from jaxstyle.features.identity import ArcFace
from jaxstyle.features.judges import choose_features
from jaxstyle.features.lpips import LPIPS
from jaxstyle.features.vgg import VGG
from tests.filled import (
    PREFIX,
    draw,
    filled_state_dict,
    golden,
    input_array,
    nhwc,
)
from train import fits

# The README's bounds for a float32 run.
VALUE, NORM, MAP = 1e-5, 5e-4, 1e-3


def rms_error(actual, expected):
    """Relative root mean square of the deviation."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


def picture(name):
    """Two pictures of the rule for DualStyleGAN, [2, 256, 256, 3]."""
    low = draw(PREFIX, f"input:{name}:lo", (2, 3, 16, 16)) * np.float32(0.5)
    high = draw(PREFIX, f"input:{name}:hi", (2, 3, 256, 256)) * np.float32(0.05)
    return nhwc(np.clip(low.repeat(16, 2).repeat(16, 3) + high, -1, 1))


@pytest.fixture(scope="module")
def pair():
    return picture("img_a"), picture("img_b")


def through_file(folder, value, **options):
    """Write a file of torch and convert it: module and parameters of its network."""
    pt.write(folder / "judge.pth", value)
    networks, params, _ = convert.load(folder / "judge.pth", **options)
    ((name, module),) = networks.items()
    return module, jax.tree.map(jnp.asarray, params[name])


def check(name, value, gradient=None):
    """A value, the gradient's norm and its sums over cells of 16 x 16."""
    data = golden("dualstylegan_losses")
    assert abs(value - data[name]) < VALUE * abs(data[name]) + 1e-6, name
    if gradient is not None:
        norm = data[f"{name}_grad_norm"]
        assert abs(np.linalg.norm(gradient) - norm) < NORM * norm, name
        cells = np.asarray(gradient, np.float64).reshape(2, 16, 16, 16, 16, 3)
        expected = nhwc(data[f"{name}_grad_area16"])
        assert rms_error(cells.sum((2, 4)), expected) < MAP, name


# Contextual loss


def contextual_by_matrix(x, y, bandwidth):
    """The definition with whole matrices, in float64."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    mean = y.mean((0, 1, 2))
    values = []
    for a, b in zip(x - mean, y - mean, strict=True):
        a, b = (v.reshape(-1, v.shape[-1]) for v in (a, b))
        a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
        distance = 1 - a @ b.T
        relative = distance / (distance.min(1, keepdims=True) + 1e-5)
        similarity = np.exp((1 - relative) / bandwidth)
        similarity /= similarity.sum(1, keepdims=True)
        values.append(-np.log(similarity.max(0).mean() + 1e-5))
    return np.mean(values)


@pytest.mark.parametrize("bandwidth", [0.2, 0.5])
def test_contextual_loss_of_small_maps(bandwidth, monkeypatch):
    data = golden("dualstylegan_losses")
    x, y = (nhwc(input_array(f"cx_{n}", (2, 8, 6, 6))) for n in "xy")
    name = f"cx_small_h{bandwidth}".replace(".", "")
    # 36 rows as one block, as equal ones, and with a last one that is not full.
    for rows in (256, 12, 25):
        monkeypatch.setattr(losses, "CX_ROWS", rows)
        loss = functools.partial(losses.contextual, y=y, bandwidth=bandwidth)
        value, gradient = jax.jit(jax.value_and_grad(loss))(x)
        assert abs(value - data[name]) < VALUE
        assert rms_error(gradient, nhwc(data[f"{name}_grad"])) < 1e-5
        assert abs(value - contextual_by_matrix(x, y, bandwidth)) < VALUE


def memory_of(batch, side=64, channels=256):
    """Bytes besides arguments and results of a step of the contextual loss."""
    shape = jax.ShapeDtypeStruct((batch, side, side, channels), jnp.float32)
    step = jax.jit(jax.value_and_grad(losses.contextual))
    return step.lower(shape, shape).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_the_contextual_loss():
    """4096 x 4096 positions: a single whole matrix would take 64 MiB."""
    assert memory_of(1) < 100e6
    # A second picture adds its features and some rows, not a second matrix.
    assert memory_of(2) - memory_of(1) < 60e6


def test_contextual_loss_of_a_split_batch():
    """Each device compares its own pictures; only means cross between devices."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    shape = jax.ShapeDtypeStruct((8, 6, 6, 16), jnp.float32, sharding=rows)
    step = jax.jit(jax.value_and_grad(losses.contextual))
    text = step.lower(shape, shape).compile().as_text()
    assert set(re.findall(fits.COLLECTIVES, text)) == {"all-reduce"}


# VGG


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """VGG-19 through a file with torchvision's names."""
    state = {
        f"features.{key.split('.', 1)[1]}": value
        for key, value in filled_state_dict("vgg19").items()
    }
    module, params = through_file(tmp_path_factory.mktemp("vgg"), state)
    assert module == VGG(net="vgg19")
    return module, params


def test_features_equal_the_original(vgg, pair):
    module, params = vgg
    data = golden("dualstylegan_losses")
    features = jax.jit(lambda p, x: module.apply({"params": p}, x))(params, pair[0])
    for i in range(1, 6):
        name = f"relu{i}_1"
        feature = np.asarray(features[name])
        stats = [feature.mean(), feature.std()]
        assert rms_error(stats, data[f"vgg_{name}_mean_std"]) < VALUE
        side = feature.shape[1] // 8
        cells = feature[..., :4].reshape(2, 8, side, 8, side, 4).mean((2, 4))
        expected = nhwc(data[f"vgg_{name}_first4_area8"])
        assert rms_error(cells, expected) < VALUE


TERMS = {
    "cx": lambda x, y: losses.contextual(x[losses.CX_TAP], y[losses.CX_TAP]),
    "fm": losses.feature_matching,
    "perc_stage2": lambda x, y: losses.perceptual(x, y, losses.MIXING_TAPS),
    "perc_stage3": lambda x, y: losses.perceptual(x, y, losses.STYLE_TAPS),
}


def test_terms_on_vgg_equal_the_original(vgg, pair):
    module, params = vgg

    @jax.jit
    def all_terms(params, a, b):
        def features(x):
            return module.apply({"params": params}, x)

        target = features(b)
        made, back = jax.vjp(features, a)
        found = {}
        for name, term in TERMS.items():
            value, gradient = jax.value_and_grad(term)(made, target)
            found[name] = value, back(gradient)[0]
        alone = [
            losses.contextual(*(f[losses.CX_TAP][i : i + 1] for f in (made, target)))
            for i in range(2)
        ]
        same = losses.contextual(target[losses.CX_TAP], target[losses.CX_TAP])
        return found, alone, same

    found, alone, same = all_terms(params, *pair)
    for name, (value, gradient) in found.items():
        check(name, value, gradient)
    for i, value in enumerate(alone):
        check(f"cx_sample{i}_alone", value)
    # The mean that both are centred on is that of the batch.
    assert abs(found["cx"][0] - np.mean(alone)) > 1e-6
    # Ill conditioned: the original's own float32 is off by as much.
    assert abs(same - golden("dualstylegan_losses")["cx_identical"]) < 1e-6


def test_choice_of_features(tmp_path, monkeypatch, pair, capsys):
    monkeypatch.chdir(tmp_path)
    shipped = choose_features()
    assert (
        shipped.module == VGG(net="alex")
        and "no weights/vgg19" in capsys.readouterr().out
    )
    assert choose_features("alexnet").name == shipped.name
    with pytest.raises(UserError, match="there is no weights/vgg16"):
        choose_features("vgg16")
    with pytest.raises(UserError, match="holds generator, discriminator"):
        choose_features("heads")
    weights.save("weights/vgg19", {"vgg": shipped.module}, {"vgg": shipped.params})
    for net in ("", "vgg19", "weights/vgg19"):
        assert choose_features(net).name == "weights/vgg19"

    @jax.jit
    def terms(params, a, b):
        def features(x):
            return shipped.module.apply({"params": params}, x)

        def loss(a):
            made, target = features(a), features(b)
            return sum(term(made, target) for term in TERMS.values())

        return jax.value_and_grad(loss)(a)

    # What trains on the default model: pictures of 64 px, brought to 256.
    small = [x[:, ::4, ::4].repeat(4, 1).repeat(4, 2) for x in pair]
    value, gradient = terms(shipped.params, *small)
    assert 0.1 < value < 10 and np.isfinite(gradient).all() and gradient.any()


# Other judges


@pytest.mark.slow
def test_identity_equals_the_original(tmp_path, pair):
    state = dict(filled_state_dict("dualstylegan_irse50"))
    module, params = through_file(tmp_path, state)
    assert module == ArcFace()

    @jax.jit
    def run(params, a, b):
        def loss(a):
            one, other = (
                module.apply({"params": params}, x, method="embed") for x in (a, b)
            )
            return losses.identity(one, other), (one, other)

        return jax.value_and_grad(loss, has_aux=True)(a)

    (value, embedded), gradient = run(params, *pair)
    check("id", value, gradient)
    data = golden("dualstylegan_losses")
    for name, vectors in zip("ab", embedded, strict=True):
        assert rms_error(vectors, data[f"id_embedding_{name}"]) < 2e-5


@pytest.mark.slow
def test_lpips_equals_the_original(tmp_path, pair):
    trunk, heads = {}, {}
    for key, value in filled_state_dict("dualstylegan_lpips_vgg").items():
        if key.startswith("net."):
            trunk[f"features.{key.split('.', 2)[2]}"] = value
        elif key.startswith("lin"):
            heads[key] = value
    pt.write(tmp_path / "heads.pth", heads)
    module, params = through_file(tmp_path, trunk, heads=tmp_path / "heads.pth")
    assert module == LPIPS(net="vgg")

    @jax.jit
    def run(params, a, b):
        def loss(a):
            values = module.apply({"params": params}, b, a)
            return jnp.sum(values), values

        return jax.value_and_grad(loss, has_aux=True)(a)

    (_, values), gradient = run(params, *pair)
    data = golden("dualstylegan_losses")
    assert rms_error(values, data["lpips_per_sample"]) < VALUE
    norm = data["lpips_grad_norm"]
    assert abs(np.linalg.norm(gradient) - norm) < NORM * norm
    cells = np.asarray(gradient, np.float64).reshape(2, 16, 16, 16, 16, 3).sum((2, 4))
    assert rms_error(cells, nhwc(data["lpips_grad_area16"])) < MAP


# Regularisers


def test_deviation_of_rows():
    codes = input_array("latent18", (2, 18, 512))
    deviation = jax.jit(jax.value_and_grad(losses.row_deviation))
    value, gradient = deviation(codes)
    check("std_reg", value)
    expected = golden("dualstylegan_losses")["std_reg_grad_first8"]
    assert rms_error(gradient[..., :8], expected) < VALUE
    same = jnp.ones((1, 4, 3))
    value, gradient = deviation(same)
    assert value == 0 and not gradient.any()


def test_noise():
    data = golden("dualstylegan_losses")
    planes = [input_array(f"noise{r}", (2, 1, r, r))[:, 0] for r in (4, 8, 16, 32)]
    value, gradient = jax.jit(jax.value_and_grad(losses.noise_correlation))(planes)
    check("noise_reg", value)
    expected = data["noise_reg_grad16"][:, 0]
    assert rms_error(gradient[2], expected) < VALUE
    normalized = losses.normalized_noise(planes[1])
    assert rms_error(normalized, data["noise_normalized8"][:, 0]) < 1e-6


def test_norms_of_parameters():
    tree = {"a": jnp.array([3.0, 4.0]), "b": {"zero": jnp.zeros(5), "c": -jnp.ones(())}}
    value, gradient = jax.value_and_grad(losses.parameter_norms)(tree)
    # Not squared, and nothing undefined at zero.
    assert value == 6
    np.testing.assert_allclose(gradient["a"], [0.6, 0.8])
    assert not gradient["b"]["zero"].any() and gradient["b"]["c"] == -1
    assert losses.parameter_norms({}) == 0
