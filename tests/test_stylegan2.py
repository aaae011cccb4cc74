"""The generator and discriminator against the original's outputs, through convert."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from convert import pt
from convert.stylegan2 import generator_state
from jaxstyle import stylegan2
from jaxstyle.errors import UserError
from jaxstyle.stylegan2 import Discriminator, Generator
from tests import filled
from tests.filled import golden, input_array, nhwc, picture, relative_error

EXACT = 2e-5
SIZES = [
    64,
    pytest.param(256, marks=pytest.mark.slow),
    pytest.param(1024, marks=pytest.mark.slow),
]


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """Networks and parameters of a size, from a file in rosinality's layout."""

    @functools.lru_cache(maxsize=1)
    def make(size):
        path = tmp_path_factory.mktemp("files") / f"{size}.pt"
        mean = golden(f"stylegan2_g_{size}")["w_mean"][0]
        content = {
            "g_ema": filled.filled_state_dict(f"stylegan2_g_{size}"),
            "d": filled.filled_state_dict(f"stylegan2_d_{size}"),
            "latent_avg": mean,
        }
        pt.write(path, content, legacy=size == 64)
        networks, params, _ = convert.load(path)
        path.unlink()
        return networks, params

    return make


def compare_picture(data, name, image):
    """A picture [1, size, size, 3] with what the golden file holds of it."""
    size = image.shape[1]
    if name in data:
        assert relative_error(image, nhwc(data[name])) < EXACT
        return
    pooled = image.reshape(1, 64, size // 64, 64, size // 64, 3).mean((2, 4))
    assert relative_error(pooled, nhwc(data[f"{name}/area64"])) < EXACT
    middle = slice(size // 2 - 32, size // 2 + 32)
    crop = nhwc(data[f"{name}/crop64"])
    assert relative_error(image[:, middle, middle], crop) < EXACT


@pytest.mark.parametrize("size", SIZES)
def test_generator_equals_the_original(converted, size):
    networks, params = converted(size)
    generator, variables = networks["generator"], {"params": params["generator"]}
    data = golden(f"stylegan2_g_{size}")
    assert generator.size == size and generator.mapping_depth == 8
    # The weights are an argument: closed over, XLA would fold them as constants.
    jitted = jax.jit(generator.apply, static_argnames=("space", "psi", "mix_from"))
    run = functools.partial(jitted, variables)
    z, w_plus = (
        input_array("z", (2, 512)),
        input_array("wplus", (1, generator.num_ws, 512)),
    )

    w = generator.apply(variables, z, method="mapping")
    assert relative_error(w, data["w"]) < EXACT
    mean = generator.apply(
        variables, input_array("z_mean", (256, 512)), method="mapping"
    )
    assert relative_error(mean.mean(0, keepdims=True), data["w_mean"]) < EXACT

    image, out = run(w_plus, space="w_plus")
    compare_picture(data, "img_wplus", image)
    assert (
        len(out["styles"]) == len(data["style_rows"]) == {64: 14, 256: 20}.get(size, 26)
    )
    assert stylegan2.style_rows(size) == tuple(data["style_rows"])
    assert generator.style_dims == tuple(data["style_dims"])
    styles = np.concatenate([s[0] for s in out["styles"]])
    assert relative_error(styles, data["styles"]) < EXACT
    features = [out["features"][name] for name in generator.layer_names]
    for feature, samples, name in zip(
        features, data["act_samples"], data["act_layers"], strict=True
    ):
        flat = np.asarray(feature).transpose(0, 3, 1, 2).ravel()
        picked = flat[np.linspace(0, flat.size - 1, 64).astype(np.int64)]
        scale = np.abs(flat).max()
        assert np.abs(picked - samples).max() < EXACT * scale, name

    again, _ = run(tuple(out["styles"]), space="styles")
    np.testing.assert_allclose(again, image, atol=1e-5)
    by_layer, _ = run(out["w_layers"], space="w_layers")
    np.testing.assert_array_equal(by_layer, image)

    compare_picture(data, "img_trunc", run(z[:1], space="z", psi=0.7)[0])
    mixed, _ = run(z[:1], space="z", mix_codes=z[1:], mix_from=4)
    compare_picture(data, "img_mix", mixed)
    planes = {
        name: input_array(f"noise_{i}", (1, 1, r, r))[0]
        for i, name in enumerate(stylegan2.noise_names(size))
        for r in [stylegan2.layer_resolution(name)]
    }
    given, _ = run(w_plus, space="w_plus", noise=planes)
    compare_picture(data, "img_noise", given)


@pytest.mark.parametrize("size", SIZES)
def test_generator_gradients(converted, size):
    networks, params = converted(size)
    generator = networks["generator"]
    data = golden(f"stylegan2_g_{size}")
    w_plus = input_array("wplus", (1, generator.num_ws, 512))
    mask = nhwc(input_array("gradmask", (1, 3, size, size)))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(p, codes):
        image, _ = generator.apply({"params": p}, codes, space="w_plus")
        return jnp.sum(image * mask) / np.sqrt(mask.size)

    value, (grads, code) = loss(params["generator"], w_plus)
    # The README's bound for gradients: leaky ReLU's kinks move single values.
    bound = 2e-3
    assert abs(value - data["grad_loss"]) < 1e-4
    assert relative_error(code, data["grad_wplus"]) < bound
    norms = {k: np.linalg.norm(v) for k, v in by_original_key(grads, networks).items()}
    ours = np.array([norms[key] for key in data["grad_keys"]])
    assert relative_error(ours, data["grad_norm"]) < bound
    assert not any(np.any(x) for x in jax.tree.leaves(grads["noise_const"]))


def by_original_key(tree, networks):
    """A generator's parameters or gradients under rosinality's keys."""
    return generator_state(networks["generator"], tree)


@pytest.mark.parametrize("size", SIZES)
def test_discriminator_equals_the_original(converted, size):
    networks, params = converted(size)
    discriminator = networks["discriminator"]
    data = golden(f"stylegan2_d_{size}")
    variables = {"params": params["discriminator"]}
    apply = functools.partial(jax.jit(discriminator.apply), variables)
    batches = [
        int(k.removeprefix("logits_b")) for k in data if k.startswith("logits_b")
    ]
    real = picture("real", max(batches), size)
    for batch in batches:
        logits, out = apply(real[:batch])
        assert relative_error(logits, data[f"logits_b{batch}"]) < EXACT
    assert set(out["features"]) == set(discriminator.tap_names)


def test_discriminator_refuses_a_batch_it_cannot_group():
    discriminator = Discriminator(8, channels=(4, 4))
    params = discriminator.init_params(key=jax.random.key(0))
    with pytest.raises(UserError, match="multiples of 4"):
        discriminator.apply({"params": params}, jnp.zeros((6, 8, 8, 3)))


# What holds at every size, on small random networks.


def small(size=16, depth=2, **fields):
    channels = (8,) * len(stylegan2.resolutions(size))
    generator = Generator(
        size, channels=channels, mapping_depth=depth, w_dim=16, **fields
    )
    return generator, generator.init_params(key=jax.random.key(1))


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256, 512, 1024])
def test_counts(size):
    counts = {64: (10, 14), 256: (14, 20), 512: (16, 23), 1024: (18, 26)}
    rows, layers = stylegan2.num_ws(size), len(stylegan2.layer_names(size))
    assert (rows, layers) == counts.get(size, (rows, layers))
    assert stylegan2.style_rows(size)[-1] == rows - 1
    shapes = jax.eval_shape(lambda: Generator(size).init_params(key=jax.random.key(0)))
    parameters = sum(
        int(np.prod(x.shape))
        for part in ("mapping", "synthesis")
        for x in jax.tree.leaves(shapes[part])
    )
    known = {64: 27032600, 256: 30034338, 512: 30276583, 1024: 30370060}
    assert parameters == known.get(size, parameters)
    shapes = jax.eval_shape(
        lambda: Discriminator(size).init_params(key=jax.random.key(0))
    )
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
    known = {64: 26488833, 256: 28864129, 512: 28982849, 1024: 29012513}
    assert parameters == known.get(size, parameters)


@pytest.mark.parametrize("depth", [1, 8])
def test_codes_of_every_space_give_the_same_picture(depth):
    generator, params = small(depth=depth)
    variables = {"params": params}
    z = jax.random.normal(jax.random.key(2), (3, 512))
    image, out = generator.apply(variables, z)
    assert image.shape == (3, 16, 16, 3) and image.dtype == jnp.float32
    for space in ("w", "w_plus", "w_layers", "styles"):
        again, _ = generator.apply(variables, out[space], space=space)
        np.testing.assert_allclose(again, image, atol=2e-5)


def test_truncation_and_its_cutoff():
    generator, params = small()
    params["w_avg"] = jnp.ones(16)
    z = jax.random.normal(jax.random.key(2), (2, 512))
    _, full = generator.apply({"params": params}, z)
    _, out = generator.apply({"params": params}, z, psi=0.5, cutoff=3)
    expected = np.array(full["w_plus"])
    expected[:, :3] = (expected[:, :3] + 1) / 2
    np.testing.assert_allclose(out["w_plus"], expected, atol=1e-6)
    _, out = generator.apply({"params": params}, z, psi=0.0)
    np.testing.assert_allclose(out["w_plus"], 1.0)


def test_each_noise_input_has_its_own_key_and_each_picture_too():
    generator, _ = small()
    planes = stylegan2.noise_planes(16, 2, "random", key=jax.random.key(0))
    flat = [np.asarray(p).ravel()[:16] for p in planes.values()]
    flat += [np.asarray(p)[1].ravel()[:16] for p in planes.values()]
    assert len({f.tobytes() for f in flat}) == 2 * len(stylegan2.noise_names(16))
    keys = jax.random.split(jax.random.key(3), 3)
    three = stylegan2.noise_planes(16, 3, "random", key=keys)
    one = stylegan2.noise_planes(16, 1, "random", key=keys[2:])
    for name in three:
        np.testing.assert_array_equal(three[name][2], one[name][0])


def test_mistakes_are_named():
    generator, params = small()
    apply = functools.partial(generator.apply, {"params": params})
    with pytest.raises(UserError, match="add the batch axis"):
        apply(jnp.zeros((6, 16)), space="w_plus")
    with pytest.raises(UserError, match="must be one of z, w"):
        apply(jnp.zeros((1, 16)), space="wplus")
    with pytest.raises(UserError, match="needs key="):
        apply(jnp.zeros((1, 512)), noise="random")
    with pytest.raises(UserError, match="const, random, none"):
        apply(jnp.zeros((1, 512)), noise="fixed")
    with pytest.raises(UserError, match="power of two from 8 to 1024"):
        Generator(48).init_params(key=jax.random.key(0))
    with pytest.raises(UserError, match="needs 3"):
        Generator(16, channels=(8, 8)).init_params(key=jax.random.key(0))


def test_feature_interpolation_is_lockstep():
    generator, base = small()
    # Random weights with noise and biases at work, and a second generator beside.
    base = jax.tree.map(lambda x: x + 0.1, base)
    tuned = jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), base
    )
    codes = jax.random.normal(jax.random.key(5), (2, generator.num_ws, 16))

    def between(alpha):
        return stylegan2.interpolate_features(generator, base, tuned, codes, alpha)

    def alone(params):
        return generator.apply({"params": params}, codes, space="w_plus")[0]

    scale = float(jnp.abs(alone(base)).max())
    np.testing.assert_allclose(between(0.0), alone(base), atol=1e-6 * scale)
    # B alone uses its own noise planes; both runs here share A's.
    shared = tuned | {"noise_const": base["noise_const"]}
    np.testing.assert_allclose(between(1.0), alone(shared), atol=1e-6 * scale)
    mean = (alone(base) + alone(shared)) / 2
    assert float(jnp.abs(between(0.5) - mean).max()) > 1e-2 * scale

    # The rule written out: the mix is the input of both next layers.
    styles = [
        generator.apply({"params": p}, codes, "w_plus", method="styles")
        for p in (base, tuned)
    ]
    image = x = None
    for i, name in enumerate(generator.layer_names):
        rgb = name.startswith("rgb")
        both = []
        for p, s in zip((base["synthesis"], tuned["synthesis"]), styles, strict=True):
            if i == 0:
                x0 = (
                    0.7 * base["synthesis"]["const"] + 0.3 * tuned["synthesis"]["const"]
                )
                x = jnp.broadcast_to(x0, (2, *x0.shape))
            if rgb:
                both.append(stylegan2.to_rgb(p[name], x, s[i]))
            else:
                plane = base["noise_const"][name][None]
                up = name.startswith("up")
                both.append(stylegan2.styled_conv(p[name], x, s[i], plane, up=up))
        mix = 0.7 * both[0] + 0.3 * both[1]
        if rgb:
            image = mix if image is None else stylegan2.upsample2d(image) + mix
        else:
            x = mix
    np.testing.assert_allclose(between(0.3), image, atol=1e-5 * scale)


def test_bfloat16_stays_close_and_pictures_stay_float32():
    generator, params = small()
    z = jax.random.normal(jax.random.key(2), (2, 512))
    exact, _ = generator.apply({"params": params}, z)
    rough, out = generator.clone(dtype="bfloat16").apply({"params": params}, z)
    assert (
        rough.dtype == jnp.float32 and out["features"]["conv_16"].dtype == jnp.bfloat16
    )
    # Ten layers of 2^-9 relative rounding.
    assert float(jnp.abs(rough - exact).max() / jnp.abs(exact).max()) < 0.05


@pytest.mark.slow
def test_remat():
    """Blocks are recomputed: fewer values are kept, and gradients stay the same."""
    z = jax.random.normal(jax.random.key(2), (2, 512))
    networks = Generator(32, channels=(16,) * 4), Discriminator(32, channels=(16,) * 4)
    params = [n.init_params(key=jax.random.key(i)) for i, n in enumerate(networks)]

    def loss(params, remat):
        generator, discriminator = (n.clone(remat=remat) for n in networks)
        image, _ = generator.apply({"params": params[0]}, z)
        return jnp.sum(discriminator.apply({"params": params[1]}, image)[0])

    def kept(remat):
        """Bytes of activations that wait for the backward pass."""
        pull = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, remat), p)[1], params)
        return sum(x.size for x in jax.tree.leaves(pull) if x.ndim == 4 and len(x) == 2)

    assert 0 < kept(True) < 0.6 * kept(False)
    plain, recomputed = (
        jax.jit(jax.grad(loss), static_argnums=1)(params, remat)
        for remat in (False, True)
    )
    for a, b in zip(*map(jax.tree.leaves, (plain, recomputed)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())
