"""Single steps of DualStyleGAN's stages against the original's own training code.

64 px, the published channels, the published judges, all by the golden rule: slow.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import convert
from convert import pt
from convert.dualstylegan import dual_state
from convert.stylegan2 import discriminator_state
from jaxstyle import refine
from tests.filled import (
    PREFIX,
    draw,
    filled_state_dict,
    golden,
    input_array,
    nhwc,
)
from train import destylize, dual_finetune, dual_pretrain, dual_steps
from train.cli import RunOptions
from train.dual_steps import AdversarialOptions, Setup

pytestmark = pytest.mark.slow
# The README's bounds for a float32 run: losses, lengths, norms of gradients, maps.
VALUE, PATH, NORM, MAP = 1e-5, 1e-4, 5e-4, 1e-3


@pytest.fixture(autouse=True)
def quick_compile():
    """Compiling is nearly all of the time at these sizes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def rms_error(actual, expected):
    """Relative root mean square of the deviation."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


def picture(name, batch, size):
    """Pictures of the rule for DualStyleGAN, [batch, size, size, 3]."""
    low = draw(PREFIX, f"input:{name}:lo", (batch, 3, 16, 16)) * np.float32(0.5)
    high = draw(PREFIX, f"input:{name}:hi", (batch, 3, size, size)) * np.float32(0.05)
    low = low.repeat(size // 16, 2).repeat(size // 16, 3)
    return nhwc(np.clip(low + high, -1, 1))


def codes(name, *shape, prefix="train:"):
    return jnp.asarray(input_array(prefix + name, shape))


@pytest.fixture(scope="module")
def through_file(tmp_path_factory):
    """A network of a torch file: {name: (module, parameters)}."""
    folder = tmp_path_factory.mktemp("files")

    def read(value, **options):
        pt.write(folder / "file.pth", value)
        networks, params, _ = convert.load(folder / "file.pth", **options)
        return {
            n: (m, jax.tree.map(jnp.asarray, params[n])) for n, m in networks.items()
        }

    return read


@pytest.fixture(scope="module")
def vgg(through_file):
    state = {
        f"features.{key.split('.', 1)[1]}": value
        for key, value in filled_state_dict("vgg19").items()
    }
    return next(iter(through_file(state).values()))


@pytest.fixture(scope="module")
def arcface(through_file):
    state = dict(filled_state_dict("dualstylegan_irse50"))
    return next(iter(through_file(state).values()))


@pytest.fixture(scope="module")
def lpips(through_file, tmp_path_factory):
    trunk, heads = {}, {}
    for key, value in filled_state_dict("dualstylegan_lpips_vgg").items():
        if key.startswith("net."):
            trunk[f"features.{key.split('.', 2)[2]}"] = value
        elif key.startswith("lin"):
            heads[key] = value
    path = tmp_path_factory.mktemp("heads") / "heads.pth"
    pt.write(path, heads)
    return next(iter(through_file(trunk, heads=path).values()))


@pytest.fixture(scope="module")
def networks(through_file):
    """Generator, extrinsic path and discriminator of 64 px."""
    found = through_file({"g_ema": filled_state_dict("dualstylegan_64")})
    other = through_file(
        {
            "g_ema": filled_state_dict("stylegan2_g_64"),
            "d": filled_state_dict("stylegan2_d_64"),
        }
    )
    filled_state_dict.cache_clear()
    return found | {"discriminator": other["discriminator"]}


def doubled(networks):
    """Networks {name: (module, parameters)} in double precision."""
    return {
        name: (
            module.clone(dtype="float64") if hasattr(module, "dtype") else module,
            jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params),
        )
        for name, (module, params) in networks.items()
    }


def setup_of(networks, weight, **options):
    modules = (networks[n][0] for n in ("generator", "dual", "discriminator"))
    return Setup(AdversarialOptions(**options), 2, weight, *modules)


# An optimiser that keeps the gradient and moves nothing.
RECORDER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)
RECORDERS = {"dual_trained": RECORDER, "discriminator": RECORDER}


def state_of(networks, setup, step=0):
    params = {n: p for n, (_, p) in networks.items()}
    params["dual_trained"] = params["dual"]
    state = dual_steps.make_state(setup.options, RunOptions(batch=2), params, RECORDERS)
    return state.replace(step=jnp.asarray(step))


def fixed(rows):
    """A draw that gives these rows, and the batch's pictures."""
    return lambda *arguments: rows | arguments[-1]


def mixed_rows(first, second, batch):
    return {
        "z": codes(first, batch, 512),
        "z_mix": codes(second, batch, 512),
        "mix_from": jnp.full(batch, 4),
        "keys": None,
    }


def path_rows():
    image = nhwc(input_array("train:path_image_noise", (1, 3, 64, 64)))
    return mixed_rows("path_z1", "path_z2", 1) | {"path": image / 64}


# The original's names of the steps, and what each updates.
NETWORK = {
    "d0": "discriminator",
    "d1": "discriminator",
    "g0": "dual_trained",
    "g1": "dual_trained",
}


def recorded(step, name, *arguments):
    """What the recorder kept; copies of the networks would fill the memory."""
    state, metrics = step(*arguments)
    return state.opt_state[NETWORK[name]], metrics


class Iteration:
    """The compiled entries of a schedule, and their gradients by the original's names.

    Attributes:
      networks: modules and parameters.
      data, bounds: golden values, and what was seen of them.
    """

    def __init__(self, networks, entries, frozen, batch):
        self.networks, self.frozen, self.batch = networks, frozen, batch
        self.steps = {
            name: jax.jit(functools.partial(recorded, step, name))
            for name, (_, step) in zip(NETWORK, entries, strict=False)
        }
        self.data = golden("dualstylegan_train_64")

    def run(self, name, state):
        """The gradients and metrics of a step."""
        grads, metrics = self.steps[name](state, self.frozen, self.batch)
        return jax.device_get(grads), metrics

    def check_gradients(self, prefix, grads, bound=NORM):
        """Norms of the gradients of `prefix`, such as stage2_i0/g1."""
        if prefix.split("/")[1].startswith("g"):
            module = self.networks["dual"][0]
            found, groups = dual_state(module, grads), ("res", "style")
        else:
            module = self.networks["discriminator"][0]
            found, groups = discriminator_state(module, grads), ("all",)
        # Blur kernels are constants.
        found = {
            k: np.asarray(v, np.float64) for k, v in found.items() if "kernel" not in k
        }
        for group in groups:
            squares = [
                np.sum(v**2)
                for k, v in found.items()
                if group == "all" or k.startswith(f"{group}.")
            ]
            expected = self.data[f"{prefix}/{group}_norm"]
            assert abs(np.sqrt(sum(squares)) / expected - 1) < bound, (prefix, group)
        checked = 0
        for name, expected in self.data.items():
            if not name.startswith(f"{prefix}/") or not name.endswith("/norm"):
                continue
            key = name.split("/")[-2]
            if expected:
                error = abs(np.linalg.norm(found[key]) / expected - 1)
                assert error < bound, (name, error)
            else:
                # The last bias of D has none in R1.
                assert np.abs(found[key]).max() < 1e-7, name
            checked += 1
        assert checked >= 6

    def check_losses(self, prefix, values, bounds):
        """Losses by the original's names."""
        for name, value in values.items():
            expected = float(self.data[f"{prefix}/loss/{name}"])
            error = abs(float(value) - expected)
            bound = bounds.get(name, VALUE) * abs(expected) + 1e-6
            assert error < bound, (prefix, name, float(value), expected)


LENGTHS = {"path": PATH, "path_length": PATH}


# Stage 2


def stage_2(networks, vgg):
    setup = setup_of(networks, 0.1)
    options = dual_pretrain.Options(
        run=RunOptions(batch=2), adversarial=setup.options, progressive=False
    )
    rows = {
        "z1": codes("main_z1", 2, 512),
        "z2": codes("main_z2", 2, 512),
        "encoded": codes("encoder_wplus", 2, 10, 512) * np.float32(0.7),
        "keys": None,
        "target_keys": None,
    }

    def to_codes(setup, options, encoder, rows, state, frozen):
        found = dual_pretrain.to_codes(setup, options, None, rows, state, frozen)
        encodes = state.step % options.encoder_every == 0
        extrinsic = jnp.where(encodes, rows["encoded"], found.extrinsic)
        return found._replace(extrinsic=extrinsic)

    def draw_rows(setup, state, frozen, batch):
        return rows | {"real": batch["image"]}

    entries = dual_pretrain.schedule(
        setup,
        options,
        vgg[0],
        None,
        RECORDERS,
        draw=draw_rows,
        draw_path=lambda *_: path_rows() | {"ext": codes("path_ext_z", 1, 512)},
        to_codes=to_codes,
    )
    frozen, batch = {"features": vgg[1]}, {"image": picture("train_real", 2, 64)}
    return setup, Iteration(networks, entries, frozen, batch)


@pytest.fixture(scope="module")
def stage2(networks, vgg):
    return stage_2(networks, vgg)


@pytest.mark.parametrize("i", [0, 1])
def test_stage_2_equals_the_original(networks, stage2, i):
    setup, iteration = stage2
    state, found = state_of(networks, setup, i), {}
    for name in ("d0", "d1", "g0", "g1") if i == 0 else ("d0", "g0"):
        grads, metrics = iteration.run(name, state)
        iteration.check_gradients(f"stage2_i{i}/{name}", grads)
        found |= metrics
    values = {
        "d": found["d_loss"],
        "real_score": found["real_score"],
        "fake_score": found["fake_score"],
        # The original adds in place what it then logs.
        "g": found["g_loss"] + found["perceptual"],
        "gr": found["perceptual"],
    }
    if i == 0:
        values |= {n: found[n] for n in ("r1", "path", "path_length")}
    iteration.check_losses(f"stage2_i{i}", values, LENGTHS)
    assert found["mix_from"] == 5


def test_stage_2_moves_as_the_original(networks, vgg, double_precision):
    """Four updates of Adam's: how far parameters move, and what the average follows.

    In double precision but for the judge: ten minutes, XLA's convolutions of doubles
    are slow. Adam's first update is the gradient's sign, and after it one of the
    discriminator's activations is zero but for rounding: R1 is 0.15 % more or less, and
    the smallest gradients of the later updates have one sign or the other. The
    original's own double precision is up to 0.95 % from its float32, the golden one.
    """
    networks = doubled(networks)
    setup, iteration = stage_2(networks, vgg)
    state, data = state_of(networks, setup), iteration.data
    adam = dual_steps.make_optimizers(setup.options)
    moments = {n: tx.init(state.params[n]) for n, tx in adam.items()}
    for name, network in NETWORK.items():
        grads, _ = iteration.run(name, state)
        params = state.params[network]
        moves, moments[network] = adam[network].update(grads, moments[network], params)
        params = optax.apply_updates(params, moves)
        state = state.replace(params=state.params | {network: params})
    module, start = networks["dual"]
    before = dual_state(module, jax.device_get(start))

    def moved(params):
        after = dual_state(module, jax.device_get(params))
        return {
            k: np.sqrt(np.mean(np.square(v - before[k], dtype=np.float64)))
            for k, v in after.items()
        }

    found = moved(state.params["dual_trained"])
    prefix, checked = "stage2_i0_adam/delta/", 0
    for name, expected in data.items():
        if name.startswith(prefix) and name.endswith("/rms"):
            assert abs(found[name.split("/")[2]] / expected - 1) < 0.01, name
            checked += 1
    assert checked == 11
    for ema in ("published", "whole"):
        ours = setup._replace(options=AdversarialOptions(ema=ema))
        after, _ = dual_steps.ema_step(ours)(state, {}, {})
        found = moved(after.ema["dual"])
        expected = data["stage2_i0_adam/ema/res.0.conv.0.weight/delta_rms"]
        # The steps are a hundred thousandth of the weights: the average rounds.
        assert abs(found["res.0.conv.0.weight"] / expected - 1) < 0.02
        assert (found["style.1.weight"] == 0) == (ema == "published")


# Stage 3


@pytest.fixture(scope="module")
def stage3(networks, vgg, arcface):
    setup = setup_of(networks, 1.0)
    options = dual_finetune.Options(
        data="",
        weights="",
        run=RunOptions(batch=2),
        adversarial=setup.options,
        reg_lambda=0.015,
        # No row is drawn anew.
        color_from=10,
    )
    style = picture("train_style", 2, 64)

    def rows(kind, batch):
        return mixed_rows(f"{kind}_z1", f"{kind}_z2", 2) | {
            "colors": jnp.zeros((2, 0, 512)),
            "jitter": jnp.zeros((2, 10, 512)),
            "index": jnp.arange(2),
            "plain_keys": None,
            "image": batch["image"],
        }

    def draw_rows(setup, options, state, frozen, batch):
        real = dual_finetune.real_of(options, state, batch)
        return rows("d", batch) | {"real": real}

    def draw_path(*_):
        path = {"index": jnp.zeros(1, int), "jitter": jnp.zeros((1, 10, 512))}
        return path_rows() | path

    make = functools.partial(
        dual_finetune.schedule,
        setup,
        options,
        vgg[0],
        arcface[0],
        RECORDERS,
        draw_path=draw_path,
    )
    entries = make(draw=draw_rows)
    entries[2] = make(draw=lambda *arguments: rows("g", arguments[-1]))[2]
    frozen = {
        "features": vgg[1],
        "identity": arcface[1],
        "codes": {
            "extrinsic": codes("ext_wplus", 2, 10, 512) * np.float32(0.7),
            "intrinsic": codes("int_zplus", 2, 10, 512),
        },
    }
    batch = {"real": picture("train_real", 2, 64), "image": style}
    return setup, Iteration(networks, entries, frozen, batch)


@pytest.mark.parametrize("i", [0, 1])
def test_stage_3_equals_the_original(networks, stage3, i):
    setup, iteration = stage3
    state, found = state_of(networks, setup, i), {}
    for name in ("d0", "d1", "g0", "g1") if i == 0 else ("d0", "g0"):
        grads, metrics = iteration.run(name, state)
        iteration.check_gradients(f"stage3_i{i}/{name}", grads)
        found |= metrics
    values = {
        "d": found["d_loss"],
        "real_score": found["real_score"],
        "fake_score": found["fake_score"],
        "g": found["g_loss"],
        "gr": found["perceptual"],
        "id": found["identity"],
        "sty": found["cx"] + found["fm"],
    }
    if i == 0:
        values |= {n: found[n] for n in ("r1", "path", "path_length")}
    iteration.check_losses(f"stage3_i{i}", values, LENGTHS)
    # The original adds millions of squares in float32 and ends 3.5e-5 beside their sum.
    arrays = jax.tree.leaves(
        {n: p for n, p in networks["dual"][1].items() if n != "structure"}
    )
    exact = sum(np.linalg.norm(np.asarray(a, np.float64).ravel()) for a in arrays)
    assert abs(found["norms"] / (0.015 * exact) - 1) < VALUE
    assert abs(iteration.data[f"stage3_i{i}/loss/l2"] / (0.015 * exact) - 1) < 5e-5


# Searches of codes


def planes_of(prefix, size=64):
    """Noise planes by layer, [1, r, r]."""
    names = refine.noise_names(size)
    sides = [refine.layer_resolution(n) for n in names]
    return {
        name: jnp.asarray(input_array(f"{prefix}{i}", (1, 1, r, r))[:, 0])
        for i, (name, r) in enumerate(zip(names, sides, strict=True))
    }


def check_terms(data, prefix, values):
    for name, value in values.items():
        expected = float(data[f"{prefix}_{name}"])
        error = abs(float(value) - expected)
        assert error < VALUE * abs(expected) + 1e-6, (name, float(value), expected)


def test_destylisation_equals_the_original(through_file, arcface, lpips):
    state = filled_state_dict("stylegan2_g_64", f"{PREFIX}:stylegan2_64")
    generator, params = through_file({"g_ema": state})["generator"]
    networks = destylize.Networks(generator, None, lpips[0], arcface[0])
    frozen = {"portrait": params, "perceptual": lpips[1], "identity": arcface[1]}
    point = {
        "z_plus": codes("destyle_z", 1, 10, 512, prefix=""),
        "noise": planes_of("destyle_noise"),
    }
    image = picture("style_256", 1, 256)

    @jax.jit
    def run(point, frozen):
        given = {
            "lpips": lpips[0].apply(
                {"params": frozen["perceptual"]}, image, method="features"
            ),
            "identity": arcface[0].apply(
                {"params": frozen["identity"]}, image, method="embed"
            ),
        }
        function = functools.partial(
            destylize.loss, networks=networks, options=destylize.Options(data="")
        )
        return jax.value_and_grad(function, has_aux=True)(point, frozen, given)

    (total, terms), grads = run(point, frozen)
    data = golden("dualstylegan_steps_64")
    names = {
        "lpips": "lperc",
        "identity": "lid",
        "deviation": "lreg",
        "noise": "lnoise",
    }
    values = {theirs: terms[ours][0] for ours, theirs in names.items()}
    check_terms(data, "destyle", values | {"loss": total})
    norm = np.linalg.norm(grads["z_plus"])
    assert abs(norm / data["destyle_grad_z_norm"] - 1) < NORM
    assert rms_error(grads["z_plus"], data["destyle_grad_z"]) < MAP
    layers = refine.noise_names(generator.size)
    for i in (0, 4, 8):
        expected = data[f"destyle_grad_noise{i}"][:, 0]
        assert rms_error(grads["noise"][layers[i]], expected) < MAP, i


def test_refinement_equals_the_original(networks, vgg, lpips):
    modules = refine.Networks(
        networks["generator"][0], networks["dual"][0], lpips[0], vgg[0]
    )
    frozen = {
        "generator": networks["generator"][1],
        "dual": networks["dual"][1],
        "perceptual": lpips[1],
        "features": vgg[1],
        "intrinsic": codes("refine_instyle_z", 1, 10, 512, prefix=""),
        "targets": picture("style_256", 1, 256),
    }
    point = {
        "structure": codes("refine_structure_z", 1, 7, 512, prefix=""),
        "color": codes("refine_color_z", 1, 3, 512, prefix=""),
        "noise": planes_of("refine_noise"),
    }

    @jax.jit
    def run(point, frozen):
        given = refine.anchors(modules, frozen)
        function = functools.partial(refine.loss, networks=modules)
        return jax.value_and_grad(function, has_aux=True)(point, frozen, given=given)

    (total, terms), grads = run(point, frozen)
    data = golden("dualstylegan_steps_64")
    names = {"lpips": "lperc", "cx": "lcx", "noise": "lnoise"}
    values = {theirs: terms[ours][0] for ours, theirs in names.items()}
    check_terms(data, "refine", values | {"loss": total})
    for part in ("structure", "color"):
        assert rms_error(grads[part], data[f"refine_grad_{part}"]) < MAP, part
    norms = [np.linalg.norm(grads[part]) for part in ("structure", "color")]
    assert rms_error(norms, data["refine_grad_norms"]) < NORM


def test_rate_of_destylisation():
    data = golden("dualstylegan_losses")["lr_schedule_300"]
    found = 0.1 * jax.vmap(destylize.rate)(jnp.arange(300) / 300)
    np.testing.assert_allclose(found, data, atol=1e-7)
