"""DualStyleGAN against the original's outputs, through files and convert."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from convert import pt
from jaxstyle import dualstylegan, weights
from jaxstyle.dualstylegan import STRUCTURE_ROWS, DualStyleGAN, style_weights
from jaxstyle.errors import UserError
from jaxstyle.exemplars import Exemplars, Sampler
from jaxstyle.stylegan2 import Generator
from tests.filled import (
    PREFIX,
    draw,
    filled_state_dict,
    golden,
    input_array,
    nhwc,
)

# The README's bounds for a float32 run: relative rms of pictures, of codes and units.
PICTURE, UNIT = 2e-5, 2e-6
DEFAULT, WHOLE = style_weights(structure=0.75), style_weights()


def rms_error(actual, expected):
    """Relative root mean square of the deviation."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


# Single blocks


def unit_params(prefix, names, width=8):
    """Parameters of a block of 8 channels by the golden rule, in our layout."""
    values = {}
    for ours, theirs in names.items():
        weight = draw(prefix, f"res.0.{theirs}.style.weight", (2 * width, 512))
        bias = draw(prefix, f"res.0.{theirs}.style.bias", (2 * width,)) * 0.1
        bias[:width] += 1
        scale = np.float32(1 / np.sqrt(512))
        values[ours] = {"weight": weight.T * scale, "bias": bias}
    return values


def test_units_equal_the_original():
    data, x = golden("dualstylegan_units"), nhwc(input_array("unit:x", (2, 8, 8, 8)))
    style = input_array("unit:s", (2, 512))
    norm = unit_params(f"{PREFIX}:unit_adain", {"norm": "norm"})["norm"]
    got = dualstylegan.adaptive_norm(norm, x, style)
    assert rms_error(got, nhwc(data["adain"])) < UNIT
    prefix = f"{PREFIX}:unit_modres"
    block = unit_params(prefix, {"norm1": "norm", "norm2": "norm2"})
    for ours, theirs in (("conv1", "conv"), ("conv2", "conv2")):
        weight = draw(prefix, f"res.0.{theirs}.0.weight", (8, 8, 3, 3)) * 0.5
        bias = draw(prefix, f"res.0.{theirs}.1.bias", (8,)) * np.float32(0.1)
        block[ours] = {"weight": weight.transpose(2, 3, 1, 0), "bias": bias}
    for name, weight in (("w1", 1.0), ("w075", 0.75), ("w0", 0.0)):
        got = dualstylegan.mod_res(block, x, style, weight)
        assert rms_error(got, nhwc(data[f"modres_{name}"])) < UNIT, name
    np.testing.assert_array_equal(got, x)
    each = dualstylegan.mod_res(block, x, style, jnp.array([1.0, 0.0]))
    assert rms_error(each[:1], nhwc(data["modres_w1"])[:1]) < UNIT
    np.testing.assert_array_equal(each[1:], x[1:])
    # A dilation of 1 written out is the same operation.
    conv = block["conv1"]
    wide = np.zeros((5, 5, 8, 8), np.float32)
    wide[::2, ::2] = conv["weight"]
    by_hand = jax.lax.conv_general_dilated(
        x, wide, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    by_hand = jax.nn.leaky_relu(by_hand / np.sqrt(72) + conv["bias"], 0.2) * 2**0.5
    np.testing.assert_allclose(
        dualstylegan._convolve(conv, x, 2), by_hand, rtol=1e-4, atol=1e-5
    )


# The whole network


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """Networks and parameters of a size, through a file, convert and a folder."""

    @functools.lru_cache(maxsize=1)
    def make(size):
        folder = tmp_path_factory.mktemp("dual")
        path = folder / "generator.pt"
        pt.write(path, {"g_ema": filled_state_dict(f"dualstylegan_{size}")})
        networks, params, report = convert.load(path)
        path.unlink()
        assert any("no average latent" in line for line in report.missing)
        weights.save(folder / "style", networks, params, metadata=report.metadata())
        model, params = weights.load(folder / "style")
        assert dict(model) == networks
        return model, params

    return make


def runner(model, params):
    """Pictures of w+ codes: one compilation, the parameters as arguments."""

    @jax.jit
    def run(params, intrinsic, extrinsic, weights, psi):
        return model.dual.apply(
            {"params": params["dual"]},
            model.generator,
            params["generator"],
            intrinsic,
            extrinsic,
            space="w_plus",
            extrinsic_space="w_plus",
            weights=weights,
            psi=psi,
        )

    def pictures(intrinsic, extrinsic, weights=WHOLE, psi=1.0):
        return run(params, intrinsic, extrinsic, weights, psi)

    return pictures


def mapped(model, params, codes, space="z_plus"):
    """Codes as w+."""
    return dualstylegan.to_w_plus(model.generator, params["generator"], codes, space)


def inputs(size, rows, batch):
    tag = f"dualstylegan_{size}"
    return (
        input_array(f"{tag}:instyle", (batch, rows, 512)),
        input_array(f"{tag}:exstyle", (batch, rows, 512)),
    )


def test_equals_the_original_at_64(converted):
    model, params = converted(64)
    data, rows = golden("dualstylegan_64"), 10
    run = runner(model, params)
    z_plus, style_z = inputs(64, rows, 2)
    face, style = (mapped(model, params, codes) for codes in (z_plus, style_z))
    z = input_array("dualstylegan_64:instyle_z", (2, 512))
    w = input_array("dualstylegan_64:exstyle_w", (2, 512)) * np.float32(0.7)
    ramp = np.round(np.arange(18) / 17, 4).astype(np.float32)

    def check(name, image):
        assert rms_error(image, nhwc(data[name])) < PICTURE, name

    image, out = run(face, style)
    check("w1", image)
    stats = out["w_plus"].mean((0, 2)), out["w_plus"].std((0, 2))
    assert rms_error(np.stack(stats), data["latent_mean_std_per_layer"]) < PICTURE
    plain, _ = run(face, style, style_weights(0, 0))
    check("w0", plain)
    check("nores", plain)
    check("wramp", run(face, style, ramp)[0])
    check("wdefault_tr075", run(face, style, DEFAULT, 0.75)[0])
    kept = style_z.copy()
    kept[:, STRUCTURE_ROWS:] = z_plus[:, STRUCTURE_ROWS:]
    kept = mapped(model, params, kept)
    check("keepcolor_tr075", run(face, kept, DEFAULT, 0.75)[0])
    larger = np.float32(1.1) * face
    check("wplus_tr075", run(larger, style, DEFAULT, 0.75)[0])
    kept = style.at[:, STRUCTURE_ROWS:].set(larger[:, STRUCTURE_ROWS:])
    check("wplus_keepcolor_tr075", run(larger, kept, DEFAULT, 0.75)[0])
    color_off, _ = run(face, style, style_weights(1, 0))
    check("color_off", color_off)
    fused = dualstylegan.used_weights(style_weights(), rows, 6)
    check("fuse6", run(face, style, np.pad(fused[0], (0, 8)))[0])
    code = mapped(model, params, z, "z")
    check("z2d", run(code, mapped(model, params, w, "w"))[0])

    dual = functools.partial(model.dual.apply, {"params": params["dual"]})
    color = dual(np.repeat(w[:1, None], rows, 1), method="color")
    for name, value in (
        ("mapping_z", code[:1, 0]),
        ("Ts_out", dual(w[:1], method="structure")),
        ("Tc7_out", color[:, STRUCTURE_ROWS]),
        ("Tclast_out", color[:, -1]),
    ):
        assert rms_error(value, data[name]) < UNIT, name


def test_rows_that_are_used():
    for index in (18, 9, 6, 1, 0, -1):
        used = dualstylegan.used_weights(style_weights(1, 0.5), 10, index)
        rows = np.arange(10)
        # The first block needs an index above 0.
        expected = np.where(rows <= index, np.where(rows < 7, 1, 0.5), 0)
        expected[0] = index > 0
        np.testing.assert_array_equal(used[0], expected)
    assert (dualstylegan.used_weights(0.25, 8) == 0.25).all()


def test_features_equal_the_original(converted):
    model, params = converted(64)
    data = golden("dualstylegan_64")
    codes = inputs(64, 10, 2)

    @jax.jit
    def run(params, intrinsic, extrinsic):
        return model.dual.apply(
            {"params": params["dual"]},
            model.generator,
            params["generator"],
            intrinsic,
            extrinsic,
            return_feat=True,
        )

    features, out = run(params, *codes)
    cells = np.asarray(features).reshape(2, 8, 4, 8, 4, 512).mean((2, 4))
    expected = nhwc(data["feat32_first8ch_area8"])
    assert rms_error(cells[..., :8], expected) < PICTURE
    stats = [features.mean(), features.std()]
    assert rms_error(stats, data["feat32_mean_std"]) < PICTURE
    assert rms_error(out["rgb"], nhwc(data["skip32"])) < PICTURE


@pytest.mark.slow
def test_equals_the_original_at_1024(converted):
    model, params = converted(1024)
    data = golden("dualstylegan_1024")
    z_plus, style_z = inputs(1024, 18, 1)
    run = runner(model, params)
    kept = style_z.copy()
    kept[:, STRUCTURE_ROWS:] = z_plus[:, STRUCTURE_ROWS:]
    face, style, kept = (mapped(model, params, c) for c in (z_plus, style_z, kept))
    for name, code, table, psi in (
        ("wdefault_tr075", style, DEFAULT, 0.75),
        ("w1", style, style_weights(), 1.0),
        ("w0", style, style_weights(0, 0), 1.0),
        ("keepcolor_tr075", kept, DEFAULT, 0.75),
    ):
        image, out = run(face, code, table, psi)
        # Means over a million values lose digits in float32.
        image = np.asarray(image[0], np.float64)
        area = image.reshape(64, 16, 64, 16, 3).mean((1, 3)).transpose(2, 0, 1)
        assert rms_error(area, data[f"{name}_area64"]) < PICTURE, name
        crop = image[472:536, 480:544].transpose(2, 0, 1)
        assert rms_error(crop, data[f"{name}_crop64"]) < PICTURE, name
        stats = np.stack([image.mean((0, 1)), image.std((0, 1))])
        assert rms_error(stats, data[f"{name}_meanstd"]) < PICTURE, name
        if name == "w1":
            stats = out["w_plus"].mean((0, 2)), out["w_plus"].std((0, 2))
            expected = data["latent_mean_std_per_layer"]
            assert rms_error(np.stack(stats), expected) < PICTURE


# A fresh path


@pytest.mark.slow
def test_starts_as_style_mixing(tmp_path):
    """Untouched, the network is the generator with the exemplar's rows from 7 on."""
    state = filled_state_dict("stylegan2_g_64", f"{PREFIX}:stylegan2_64")
    pt.write(tmp_path / "a.pt", {"g_ema": state})
    networks, params, _ = convert.load(tmp_path / "a.pt")
    generator, base = networks["generator"], params["generator"]
    data = golden("dualstylegan_init_64")
    z1, z2 = (input_array(f"dualstylegan_init_64:z{i}", (2, 512)) for i in (1, 2))
    dual = DualStyleGAN(64)
    exact = jax.jit(functools.partial(dual.init_params, init_noise=0.0))(
        key=jax.random.key(0)
    )

    @jax.jit
    def both(base, path):
        variables = {"params": base}
        mixed, _ = generator.apply(variables, z1, mix_codes=z2, mix_from=STRUCTURE_ROWS)
        made, _ = dual.apply(
            {"params": path}, generator, base, z1, z2, space="z", extrinsic_space="z"
        )
        return mixed, made

    mixed, made = both(base, exact)
    assert rms_error(mixed, nhwc(data["stylegan2_mix7"])) < PICTURE
    assert rms_error(made, nhwc(data["dual_exact_identity"])) < PICTURE
    assert rms_error(made, mixed) < 1e-6

    prefix, small = f"{PREFIX}:init", dict(exact)

    def drawn(key, shape, scale):
        return draw(prefix, key, shape) * np.float32(scale)

    for i in range(7):
        block = dict(small[f"modres_{i}"])
        for k, conv in ((1, "conv"), (2, "conv2")):
            weight = drawn(f"res.{i}.{conv}.0.weight", (512, 512, 3, 3), 0.01)
            block[f"conv{k}"] = block[f"conv{k}"] | {
                "weight": weight.transpose(2, 3, 1, 0)
            }
            norm = conv.replace("conv", "norm")
            key = f"res.{i}.{norm}.style.weight"
            block[f"norm{k}"] = block[f"norm{k}"] | {
                "weight": drawn(key, (1024, 512), 1 / np.sqrt(1536)).T
            }
        small[f"modres_{i}"] = block
    for i in range(7, 10):
        weight = drawn(f"res.{i}.weight", (512, 512), 0.01)
        weight += np.sqrt(np.float32(512)) * np.eye(512, dtype=np.float32)
        small[f"color_{i}"] = small[f"color_{i}"] | {"weight": weight.T}
    small["structure"] = {
        f"dense_{i}": exact["structure"][f"dense_{i}"]
        | {"weight": drawn(f"style.{i + 1}.weight", (512, 512), 100).T}
        for i in range(2)
    }
    _, made = both(base, small)
    assert rms_error(made, nhwc(data["dual_filled_scale001"])) < PICTURE
    # Our own random start is as far from style mixing as the published one.
    _, made = both(base, dual.init_params(key=jax.random.key(1)))
    assert 0.02 < rms_error(made, mixed) < 0.08


SMALL = {"size": 32, "channels": (6, 6, 4, 4), "w_dim": 8}


@pytest.fixture(scope="module")
def small():
    """The smallest network there is: 32 px, a single color row."""
    generator = Generator(mapping_depth=2, z_dim=8, **SMALL)
    dual = DualStyleGAN(**SMALL)
    key = jax.random.key(0)
    base = generator.init_params(key=key)
    params = {"generator": base, "dual": dual.init_params(key=key, init_noise=1.0)}
    return {"generator": generator, "dual": dual}, params


def apply_small(small, *codes, **options):
    """The whole answer of the small network; jitted by its callers."""
    networks, params = small
    return networks["dual"].apply(
        {"params": params["dual"]},
        networks["generator"],
        params["generator"],
        *codes,
        **options,
    )


@pytest.mark.slow
def test_smallest_size_and_both_paths(small):
    faces, styles = jax.random.normal(jax.random.key(1), (2, 3, 8, 8))

    @jax.jit
    def run(faces, styles, table):
        image, out = apply_small(small, faces, styles, weights=table)
        return image, out["features"]["conv_32"]

    def row(*values):
        return np.tile(style_weights(*values), (3, 1))

    image, features = run(faces, styles, row())
    assert image.shape == (3, 32, 32, 3) and features.shape == (3, 32, 32, 4)
    plain, _ = run(faces, styles, row(0, 0))
    structure, told = run(faces, styles, row(1, 0))
    color, _ = run(faces, styles, row(0, 1))
    pictures = [image, plain, structure, color]
    distances = [rms_error(a, b) for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(distances) > 1e-3
    # The one color row of this size reaches the colors alone.
    np.testing.assert_array_equal(features, told)
    # A weight of its own for every picture.
    table = np.stack([style_weights(), style_weights(0, 0), style_weights(1, 0)])
    each, _ = run(faces, styles, table)
    for i, expected in enumerate((image, plain, structure)):
        np.testing.assert_array_equal(each[i], expected[i])
    # One exemplar for many faces, many exemplars for one face; without an exemplar.
    for a, b in ((faces, styles[:1]), (faces[:1], styles)):
        many, _ = run(a, b, row())
        whole = (np.repeat(x, 4 - len(x), 0)[:3] for x in (a, b))
        np.testing.assert_allclose(many, run(*whole, row())[0], atol=1e-4)
    without, _ = jax.jit(lambda f: apply_small(small, f, None))(faces)
    assert rms_error(plain, without) < 1e-6


def test_truncation_and_mixing(small):
    generator, base = small[0]["generator"], small[1]["generator"]
    z, other, style = jax.random.normal(jax.random.key(1), (3, 2, 8))
    w, second = (
        generator.apply({"params": base}, x, method="mapping") for x in (z, other)
    )

    def rows(**options):
        def run(z, style):
            options_z = {"space": "z", "extrinsic_space": "z"}
            return apply_small(small, z, style, **options_z, **options)[1]["w_plus"]

        return jax.jit(run)(z, style)

    np.testing.assert_allclose(rows(psi=0.5)[:, 3], 0.5 * w, rtol=1e-5)
    centred = rows(psi=0.0, center=jnp.ones(8))
    np.testing.assert_array_equal(centred, jnp.ones((2, 8, 8)))
    mixed = rows(mix_codes=other, mix_from=2)
    np.testing.assert_allclose(mixed[:, 1], w, rtol=1e-5)
    np.testing.assert_allclose(mixed[:, 2], second, rtol=1e-5)


@pytest.mark.slow
def test_dilation_and_gradients(small):
    networks, params = small
    z, style = jax.random.normal(jax.random.key(2), (2, 1, 8))

    def picture(path, shares, remat=False, **options):
        return networks["dual"].apply(
            {"params": path},
            networks["generator"].clone(remat=remat),
            params["generator"],
            z,
            style,
            space="z",
            extrinsic_space="z",
            weights=shares,
            **options,
        )[0]

    @functools.partial(jax.jit, static_argnames="remat")
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(path, shares, remat=False):
        image = picture(path, shares, remat)
        return jnp.sum(jnp.square(image)), image

    for share, reached in ((1.0, True), (0.0, False)):
        (_, image), grads = loss(params["dual"], share)
        moved = {
            name: any(map(np.any, jax.tree.leaves(g))) for name, g in grads.items()
        }
        assert set(moved) == set(params["dual"])
        assert set(moved.values()) == {reached}
        if reached:
            _, again = loss(params["dual"], share, remat=True)
            errors = jax.tree.map(rms_error, again, grads)
            assert max(jax.tree.leaves(errors)) < 1e-4
            run = jax.jit(functools.partial(picture, dilation=(1, 4, 4, 2, 2, 1, 1)))
            assert 1e-3 < rms_error(run(params["dual"], share), image) < 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"space": "w_layers"}, "must be one of z, z_plus"),
        ({"space": "w_plus", "extrinsic_space": "z"}, "takes"),
        ({"weights": np.ones(5)}, "style weights have shape"),
        ({"dilation": (1,)}, "dilation has 1 entries"),
        ({"noise": "random"}, "needs key="),
    ],
)
def test_mistakes_are_named(small, change, message):
    codes = jnp.zeros((1, 8, 8))
    with pytest.raises(UserError, match=message):
        apply_small(small, codes, codes, **change)


def test_other_generators_are_refused(small):
    networks, params = small
    other = networks["generator"].clone(channels=(8, 6, 4, 4))
    with pytest.raises(UserError, match="was made for 32 px"):
        networks["dual"].apply(
            {"params": params["dual"]}, other, params["generator"], None, None
        )
    with pytest.raises(UserError, match="starts at 32"):
        DualStyleGAN(size=16).init_params(key=jax.random.key(0))


# Exemplars and their sampler


def test_exemplars(tmp_path):
    module = Exemplars(names=("b.jpg", "a.jpg"), num_ws=2, z_dim=3)
    assert module.init_params(key=jax.random.key(0))["extrinsic"].shape == (2, 2, 3)
    params = {"extrinsic": jnp.arange(12.0).reshape(2, 2, 3)}
    weights.save(tmp_path / "a", {"exemplars": module}, {"exemplars": params})
    model, loaded = weights.load(tmp_path / "a")
    assert model.exemplars == module
    variables = {"params": loaded["exemplars"]}
    for style_id, expected in (("1", 1), (0, 0), ("a.jpg", 1)):
        code = model.exemplars.apply(variables, style_id)
        np.testing.assert_array_equal(code, params["extrinsic"][expected][None])
    both = module.clone(codes=("extrinsic", "refined"))
    held = params | {"refined": -params["extrinsic"]}
    assert (both.apply({"params": held}, 1) <= 0).all()
    assert (both.apply({"params": held}, 1, "extrinsic") >= 0).all()
    for style_id in ("2", -1, "c.jpg", "٣"):
        with pytest.raises(UserError, match="must be 0 to 1 or one of b.jpg, a.jpg"):
            module.apply(variables, style_id)
    with pytest.raises(UserError, match="this style holds extrinsic"):
        module.apply(variables, 0, "intrinsic")


def test_sampler_equals_the_original(tmp_path):
    data, value = golden("dualstylegan_sampler"), {}
    for part in ("color", "structure"):
        value[part] = filled_state_dict(f"dualstylegan_sampler_{part}")
    pt.write(tmp_path / "sampler.pt", value)
    networks, params, report = convert.load(tmp_path / "sampler.pt")
    assert report.kind == "DualStyleGAN sampler"
    assert networks == {
        "sampler_color": Sampler(rows=11),
        "sampler_structure": Sampler(rows=7),
    }
    weights.save(tmp_path / "a", networks, params)
    model, params = weights.load(tmp_path / "a")
    for part in ("color", "structure"):
        z = input_array(f"sampler_z_{part}", (8, 128))
        name = f"sampler_{part}"
        variables = {"params": params[name]}
        codes, _ = model[name].apply(variables, z)
        flat = np.asarray(codes).reshape(8, -1)[:2]
        assert rms_error(flat, data[f"{part}_eval"]) < UNIT
        codes, out = model[name].apply(variables, z, train=True)
        flat = np.asarray(codes).reshape(8, -1)[:2]
        assert rms_error(flat, data[f"{part}_train"]) < UNIT
        for ours, theirs in (("mean", "mean"), ("var", "var")):
            new = out["batch_stats"]["norm_0"][ours]
            expected = data[f"{part}_bn1_running_{theirs}_after"]
            assert rms_error(new, expected) < UNIT
