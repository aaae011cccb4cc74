"""StyleGAN-NADA: its steps and choice of layers against the published code."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import stylegan2
from convert.clip import load_clip
from convert.report import Report
from jaxstyle import images, weights
from jaxstyle.errors import UserError
from jaxstyle.features.clip_text import Judge
from jaxstyle.stylegan2 import layer_names, num_ws
from tests.clip_models import SMALL
from tests.filled import GOLDEN, draw, filled_state_dict, golden, nhwc, relative_error
from tests.small_models import save_base
from tests.train.test_nada_losses import judge_and_anchors
from train import nada, nada_layers
from train.cli import RunOptions


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


def about(part):
    return json.loads((GOLDEN / "nada.json").read_text())[part]


@functools.lru_cache(maxsize=1)
def original(size):
    """The frozen generator of the golden runs, and the one they begin with."""
    levels = size.bit_length() - 3
    limits = {"convs": 2 * levels, "to_rgbs": levels, "noises": 2 * levels + 1}

    def kept(key):
        part, _, rest = key.partition(".")
        number = rest.split(".")[0].rpartition("_")[2]
        return part not in limits or int(number) < limits[part]

    def changed(prefix):
        state = filled_state_dict("stylegan2_g_64", prefix)
        return {
            key: np.zeros_like(value) if key.endswith("noise.weight") else value
            for key, value in state.items()
            if kept(key)
        }

    first, second = changed("clip"), changed("clip-b")
    start = {
        key: value
        if key.endswith(".kernel") or key.startswith("noises")
        else np.float32(0.8) * value + np.float32(0.2) * second[key]
        for key, value in first.items()
    }
    return loaded(first), loaded(start)


def loaded(state):
    """A generator from a state dict, with the average at zero."""
    generator, params = stylegan2.generator(state, Report())
    return generator, {**params, "w_avg": np.zeros(512, np.float32)}


def scheme(**values):
    return nada.Options(source="photo", target=("sketch",), clip=("tiny",), **values)


def frozen(base):
    judge, anchors = judge_and_anchors("tiny_hf")
    clip = {"0": {"vision": judge.params["vision"]}}
    return judge.module, {"base": base, "clip": clip, "anchors": {"0": anchors}}


@pytest.mark.parametrize(
    "case",
    [*map(slow, ("sg16_3iter", "sg16_1iter", "sg64_1iter"))],
)
def test_choice_equals_the_published_one(case):
    expected = about("selection")[case]
    generator, base = original(expected["size"])[0]
    module, given = frozen(base)
    z = draw("clip", "z:select:0", (expected["batch"], 512))
    w = generator.apply({"params": base}, z, method="mapping")
    options = scheme(choose_steps=expected["iters"])
    got = jax.jit(
        lambda given, w: nada.choice(
            base["synthesis"],
            given,
            w,
            options=options,
            generator=generator,
            modules=[module],
            noise="none",
        )
    )(given, w)
    np.testing.assert_allclose(got, expected["scores"], rtol=2e-4)
    assert np.argsort(-got).tolist() == expected["order"]
    mask = nada_layers.chosen_mask(generator.size, got, expected["k"], "peer")
    names = {name for name, on in mask.items() if on}
    assert names == {ours(name) for name in expected["chosen_names"]}


def ours(name):
    """A layer of rosinality's under our name."""
    first = {"conv1": "conv_4", "to_rgb1": "rgb_4", "input": "const"}
    if name in first:
        return first[name]
    part, number = name.split(".")
    if part == "to_rgbs":
        return f"rgb_{8 << int(number)}"
    return f"{'conv' if int(number) % 2 else 'up'}_{8 << int(number) // 2}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        "auto3_16_grads_none",
        *map(slow, ("plain_16", "shape_16", "auto3_16_grads_zero")),
    ],
)
def test_three_steps_equal_the_published_ones(run):
    expected, data = about("train")[run], golden("nada_train")
    (generator, base), (_, learning) = original(16)
    module, given = frozen(base)
    options = scheme(
        phase=expected["phase"] or "default",
        choose_steps=expected["auto_layer_iters"],
        choose=expected["k"] or 1,
        idle="keep" if expected["set_to_none"] else "decay",
    )
    tx = nada.optimizer(options)
    synthesis = learning["synthesis"]
    opt_state = tx.init(synthesis)
    shared = {
        "options": options,
        "generator": generator,
        "modules": [module],
        "noise": "none",
    }

    @jax.jit
    def step(given, synthesis, opt_state, z, z_choice):
        def mapped(z):
            return generator.apply({"params": given["base"]}, z, method="mapping")

        active, scores = nada_layers.phase_mask(16, options.phase), jnp.zeros(6)
        if options.choose_steps:
            scores = nada.choice(synthesis, given, mapped(z_choice), **shared)
            active = nada_layers.chosen_mask(16, scores, options.choose, "peer")
        w = mapped(z)
        codes = jnp.broadcast_to(w[:, None], (2, 6, 512))
        source, _ = generator.apply(
            {"params": given["base"]}, codes, space="w_plus", noise="none"
        )
        target, _ = generator.apply(
            {"params": {**given["base"], "synthesis": synthesis}},
            codes,
            space="w_plus",
            noise="none",
        )
        (loss, _), grads = jax.value_and_grad(nada.loss_fn, has_aux=True)(
            synthesis, given, source, codes, **shared
        )
        updates, opt_state = tx.update(grads, opt_state, synthesis, active=active)
        new = jax.tree.map(jnp.add, synthesis, updates)
        return new, opt_state, loss, grads, scores, source, target

    now, norms = synthesis, None
    for i in range(expected["steps"]):
        z = draw("clip", f"z:train:{i}", (2, 512))
        z_choice = draw(
            "clip", f"z:select:{i}", (expected["auto_layer_batch"] or 1, 512)
        )
        now, opt_state, loss, grads, scores, source, target = step(
            given, now, opt_state, z, z_choice
        )
        assert abs(float(loss) - expected["losses"][i]) < 1e-5
        if options.choose_steps:
            np.testing.assert_allclose(scores, expected["scores"][i], rtol=2e-3)
            chosen = np.argsort(-scores)[: options.choose].tolist()
            assert chosen == expected["chosen"][i]
        if i == 0:
            norms = theirs(generator, base, grads)
            for name, image in (("src0", source), ("dst0", target)):
                stored = nhwc(data[f"{run}_{name}"])
                assert relative_error(image[:, ::2, ::2], stored) < 1e-4
    for key, value in expected["first_step_grad_norms"].items():
        got = np.linalg.norm(norms[key])
        assert abs(got - value) <= 1e-3 * value, key
    before, after = theirs(generator, base, synthesis), theirs(generator, base, now)
    moved = {key: np.linalg.norm(after[key] - before[key]) for key in before}
    for key, value in expected["delta_norms"].items():
        assert abs(moved[key] - value) <= 1e-2 * value, key
    still = {k for k, v in moved.items() if not v and not k.startswith("noises")}
    still = {k for k in still if not k.endswith("kernel")}
    assert still == set(expected["unchanged"])


def theirs(generator, base, synthesis):
    """Our parameters under rosinality's names."""
    params = jax.tree.map(np.asarray, {**base, "synthesis": synthesis})
    return stylegan2.generator_state(generator, params)


# What the options mean


def test_rows_and_phases():
    assert len(nada_layers.row_layers(1024, "peer")) == num_ws(1024) == 18
    peer, fixed = (nada_layers.row_layers(64, m) for m in ("peer", "fixed"))
    assert peer[:4] == (("conv_4",), ("rgb_4",), ("up_8",), ("conv_8",))
    assert peer[-1] == ("conv_64",)
    assert fixed[:3] == (("conv_4",), ("rgb_4", "up_8"), ("conv_8",))
    assert fixed[-2:] == (("conv_64",), ("rgb_64",))
    for name, convs in (("shape", 2), ("shape_expanded", 3), ("no_fine", 10)):
        layers = nada_layers.phase_layers(256, name)
        assert layers[:2] == ("const", "conv_4") and len(layers) == 2 + convs
    assert nada_layers.phase_layers(1024, "texture")[2:4] == ("up_16", "conv_16")
    assert set(nada_layers.phase_layers(16, "all")) == {"const", *layer_names(16)}
    rgb = [n for n in nada_layers.phase_layers(64, "default") if n.startswith("rgb")]
    assert not rgb
    scores = jnp.array([1.0, 5, 2, 4, 0, 3])
    mask = nada_layers.chosen_mask(16, scores, 2, "fixed")
    names = [name for name, on in mask.items() if on]
    assert names == ["rgb_4", "up_8", "up_16"]


@pytest.mark.parametrize("idle", ["keep", "decay"])
def test_idle_layers(idle):
    """A layer first chosen in the third step: as PyTorch 2, and as PyTorch 1.7."""
    tx = nada_layers.masked_adam(0.1, 0.99, idle=idle)
    params = {"a": {"weight": jnp.ones(3)}, "b": {"weight": jnp.ones(3)}}
    grads = jax.tree.map(lambda x: 2 * x, params)
    state = tx.init(params)
    for b in (0.0, 0.0, 1.0):
        updates, state = tx.update(grads, state, active={"a": 1.0, "b": jnp.array(b)})
        moved = float(updates["b"]["weight"][0])
        assert b or moved == 0
    np.testing.assert_allclose(updates["a"]["weight"], -0.1, rtol=1e-5)
    wanted = {"keep": 0.1, "decay": 0.1 * ((1 - 0.99**3) / 0.01) ** 0.5}[idle]
    np.testing.assert_allclose(moved, -wanted, rtol=1e-5)
    assert int(state.count["b"]["weight"]) == {"keep": 1, "decay": 3}[idle]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small generator and a small CLIP that knows the whole vocabulary."""
    folder = tmp_path_factory.mktemp("nada")
    module = SMALL.clone(vocab_size=49408)
    params = {"clip": module.init_params(key=jax.random.key(3))}
    weights.save(folder / "clip", {"clip": module}, params)
    photo = np.random.default_rng(0).uniform(-1, 1, (40, 50, 3)).astype(np.float32)
    images.save_image(folder / "photo.png", photo)
    return folder, save_base(folder / "base")


def command(base, out, *flags):
    folder, generator = base
    main = ["--weights", generator, "--clip", str(folder / "clip"), "--out", str(out)]
    few = ["--steps", "3", "--log-every", "1", "--batch", "8", "--seed", "1"]
    nada.main([*main, *few, *flags])
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_a_run_from_the_command_line(base, tmp_path, capsys):
    texts = ["--source", "photo", "--target", "sketch"]
    out = tmp_path / "run"
    metrics = command(base, out, *texts, "--choose-steps", "1", "--mixing", "0.5")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    # 4 of 6 rows.
    assert all(sum(v for k, v in m.items() if "trains/" in k) == 4 for m in metrics)
    assert 0 < metrics[-1]["val_diversity"] < 3
    assert "val_loss" in metrics[-1] and (out / "best").exists()
    capsys.readouterr()
    _, before = weights.load(base[1])
    _, after = weights.load(out)
    for name in ("mapping", "noise_const", "w_avg"):
        jax.tree.map(
            np.testing.assert_array_equal,
            before["generator"][name],
            after["generator"][name],
        )
    old, new = (p["generator"]["synthesis"] for p in (before, after))
    for name in layer_names(16):
        moved = np.abs(old[name]["weight"] - new[name]["weight"]).max() > 0
        assert moved == any(m[f"trains/{name}"] for m in metrics)
    metadata = weights.read_config(out)["metadata"]
    assert metadata["target"] == "sketch" and metadata["scheme"] == "nada"


@pytest.mark.slow
def test_pictures_as_target(base, tmp_path):
    metrics = command(
        base,
        tmp_path / "run",
        *("--ref", str(base[0] / "photo.png"), "--noise", "shared"),
        *("--lambda-global", "2"),
    )
    for m in metrics:
        assert abs(m["loss"] - m["direction"] - 2 * m["global"]) < 1e-5


def test_where_pictures_lead(base, tmp_path):
    """Without a text the global loss goes to the mean of the pictures."""
    model, params = weights.load(base[1])
    judge = load_clip(str(base[0] / "clip"))
    photos = np.random.default_rng(1).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for file, photo in zip(files, photos, strict=True):
        images.save_image(file, photo)
    found, with_text = (
        nada.anchors_of(
            nada.Options(ref=tuple(files), ref_batch=4, **texts),
            model["generator"],
            params["generator"],
            judge,
        )
        for texts in ({}, {"source": "photo", "target": ("sketch",)})
    )
    seen = [
        judge.module.apply(
            {"params": judge.params},
            judge.module.prepare_photo(images.open_image(file))[None],
            method="encode_image",
        )[0]
        for file in files
    ]
    mean = np.mean([x / np.linalg.norm(x) for x in seen], 0)
    np.testing.assert_allclose(
        found["target"][0], mean / np.linalg.norm(mean), atol=1e-5
    )
    assert set(found) == {"direction", "target"}
    assert np.abs(with_text["target"] - found["target"]).max() > 0.01
    np.testing.assert_allclose(with_text["direction"], found["direction"], atol=1e-6)


@pytest.mark.slow
def test_two_models_by_files_of_embeddings(base, tmp_path):
    from train import nada_text

    clip = str(base[0] / "clip")
    texts = ["--source", "photo", "--target", "a dog"]
    nada_text.main(["--clip", clip, *texts, "--", str(tmp_path / "texts.npz")])
    file = str(tmp_path / "texts.npz")
    metrics = command(
        base,
        tmp_path / "run",
        *texts,
        *("--clip", clip, clip, "--text-embeddings", file, file),
        *("--clip-weights", "1", "0.5", "--lambda-global", "0.3"),
    )
    last = metrics[-1]
    wanted = sum(
        w * (last[f"direction/{i}"] + 0.3 * last[f"global/{i}"])
        for i, w in enumerate((1, 0.5))
    )
    assert abs(last["loss"] - wanted) < 1e-5


@pytest.mark.slow
def test_it_stops_by_itself(base, tmp_path):
    flags = ["--source", "photo", "--target", "sketch", "--validate-every", "2"]
    flags += ["--steps", "9", "--log-every", "4"]
    metrics = command(base, tmp_path / "score", *flags, "--stop-score", "-2")
    assert [m["step"] for m in metrics] == [2]
    assert metrics[0]["val_score"] >= -1 and np.isfinite(metrics[0]["loss"])
    assert (tmp_path / "score" / "checkpoints" / "2").exists()
    assert (tmp_path / "score" / "summary.json").exists()
    again = command(base, tmp_path / "score", *flags, "--stop-score", "-2")
    assert again == metrics


@pytest.mark.slow
def test_one_device_and_eight_agree(base, tmp_path):
    flags = ["--source", "photo", "--target", "sketch", "--choose-steps", "1"]
    flags += ["--mixing", "0.5", "--lambda-global", "0.2", "--lambda-manifold", "0.1"]
    runs = [
        command(base, tmp_path / count, *flags, "--mesh-data", count)
        for count in ("1", "8")
    ]
    for one, eight in zip(*runs, strict=True):
        for name in ("loss", "direction", "global", "manifold"):
            np.testing.assert_allclose(one[name], eight[name], rtol=1e-4)
        assert all(one[k] == eight[k] for k in one if k.startswith("trains/"))


MISTAKES = {
    "--validate-every 10": ["--preset", "sketch", "--stop-score", "0.3"],
    "nothing says where to go": [],
    "go together": ["--source", "photo"],
    "--lambda-texture is refused": ["--preset", "sketch", "--lambda-texture", "1"],
    "--choose is 7; it": "--preset sketch --choose-steps 1 --choose 7".split(),
    "--choose is 3, but --choose-steps is 0": "--preset sketch --choose 3".split(),
    "--choose-batch is 4, but": ["--preset", "sketch", "--choose-batch", "4"],
    "--layer-map is fixed, but": ["--preset", "sketch", "--layer-map", "fixed"],
    "but --choose-steps chooses": "--preset dog-to-cat --phase texture".split(),
    "but --improve-shape chooses": "--preset zombie --phase shape".split(),
    "--mixing is 2": ["--preset", "sketch", "--mixing", "2"],
    "--lambda-crop is 1.0, and on crops": [
        *("--preset", "sketch", "--lambda-direction", "0", "--lambda-manifold", "1"),
        *("--lambda-crop", "1"),
    ],
    "patches have 510 px": ["--preset", "sketch", "--lambda-patch", "1"],
    "all --lambda": ["--preset", "sketch", "--lambda-direction", "0"],
    "needed beside --ref": ["--ref", "x.png", "--lambda-manifold", "1"],
    "2 entries for 1": ["--preset", "sketch", "--clip-weights", "1", "2"],
    "is not a file": ["--ref", "absent.png"],
    "where one style goes": ["--source", "a", "--target", "b", "c", "--ref", "x.png"],
    "--patience is for several": ["--preset", "sketch", "--patience", "9"],
    "do not divide over": "--source a --target b c d --mesh-style 2".split(),
    "several for one folder ['b']": ["--source", "a", "--target", "b", "b "],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(base, tmp_path, capsys, message):
    with pytest.raises(SystemExit) as stop:
        command(base, tmp_path / "run", *MISTAKES[message])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_presets_and_shape(base):
    own = ["--weights", base[1]]
    for name, preset in nada.PRESETS.items():
        options = nada.resolve(nada.read([*own, "--preset", name]), 1024)
        assert options.target == preset["target"]
        assert options.run.steps == preset.get("steps", 300)
    options = nada.read([*own, "--preset", "sketch", "--target", "pencil drawing"])
    assert options.target == ("pencil drawing",)
    options = nada.resolve(nada.read([*own, "--preset", "werewolf"]), 1024)
    assert (options.choose_steps, options.choose, options.mixing) == (1, 12, 0.9)
    assert options.clip == ("ViT-B/32", "ViT-B/16")
    assert options.run.out == "runs/nada-human-werewolf"


def test_the_clip_that_is_not_named(tmp_path, base):
    """What the model in the package recommends, else those of the paper."""
    image = tmp_path / "a.png"
    image.touch()
    both = ("ViT-B/32", "ViT-B/16")
    own = ["--weights", base[1]]
    metadata = weights.read_config("heads")["metadata"]
    recommended = metadata["nada_pictures"]
    cartoon = metadata["nada_targets"]["cartoon"]
    for args, clip, steps in (
        (["--no-profile"], (nada.SMALL_CLIP,), 300),
        (own, both[:1], 300),
        ([*own, "--ref", str(image)], both, 500),
        (["--clip", "ViT-L/14", "--ref", str(image)], ("ViT-L/14",), 500),
        (["--ref", str(image), "--steps", "40"], recommended["clip"], 40),
        (["--target", "a cartoon"], cartoon["clip"], cartoon["steps"]),
    ):
        texts = ["--source", "photo", "--target", "sketch"]
        options = nada.resolve(nada.read([*texts, *args]), 1024)
        assert (options.clip, options.run.steps) == (tuple(clip), steps)


def test_what_the_weights_recommend(tmp_path, base, capsys):
    def saved(name, **nada):
        model, params = weights.load(base[1])
        metadata = {"nada": nada, "nada_pictures": {"steps": 9}} if nada else {}
        metadata |= {"nada_targets": {"zebra": {"steps": 7}}} if nada else {}
        weights.save(tmp_path / name, model, params, metadata=metadata)
        texts = ["--source", "photo", "--target", "sketch"]
        return ["--weights", str(tmp_path / name), *texts]

    args = saved("own", clip=["a", "b"], lambda_crop=2.5, batch=6, phase="all")
    options = nada.read(args)
    assert options.clip == ("a", "b") and options.terms.lambda_crop == 2.5
    assert (options.run.batch, options.phase) == (6, "all")
    assert (options.run.steps, options.terms.lambda_direction) == (300, 1)
    assert f"defaults of {args[1]}: --clip a b --lambda-crop 2.5" in (
        capsys.readouterr().out
    )
    assert nada.read([*args, "--lambda-crop", "0"]).terms.lambda_crop == 0
    assert nada.read([*args, "--preset", "mona-lisa"]).run.steps == 200
    for chooses in (["--choose-steps", "1"], ["--preset", "zombie"]):
        options = nada.read([*args, *chooses])
        assert (options.phase, options.run.batch) == ("default", 6)
    options = nada.read([*args[:2], "--ref", "x.png"])
    assert options.run.steps == 9 and options.terms.lambda_crop == 2.5
    for targets, steps in (
        (["a zebra"], 7),
        (["zebra"], 7),
        (["zebra", "sketch"], 300),
    ):
        options = nada.read([*args[:2], "--source", "photo", "--target", *targets])
        assert options.run.steps == steps and options.terms.lambda_crop == 2.5
    plain = nada.Options()
    for published in (["--no-profile"], ["--clip", "c"]):
        options = nada.read([*args, *published])
        assert options.terms == plain.terms and options.run.batch == 2
        assert options.phase == plain.phase
    assert nada.read(saved("silent")).clip == ()
    with pytest.raises(UserError, match="recommend lambda_corp"):
        nada.read(saved("wrong", lambda_corp=1))


def test_crossovers(base):
    model, params = weights.load(base[1])
    run = RunOptions(batch=4)
    for crossover in ("shared", "separate"):
        options = scheme(mixing=1.0, crossover=crossover, run=run)
        equal = []
        for seed in range(6):
            before, after = nada.mixed_codes(
                options, model.generator, params["generator"], jax.random.key(seed)
            )
            changes = np.abs(np.diff(before, axis=1)).sum((0, 2)) > 0
            assert changes.sum() == 1
            equal.append(bool(jnp.all(before == after)))
        assert all(equal) == (crossover == "shared")
    plain = dataclasses.replace(options, mixing=0.0)
    before, after = nada.mixed_codes(
        plain, model.generator, params["generator"], jax.random.key(0)
    )
    assert before is after and np.ptp(before, axis=1).max() == 0


@pytest.mark.slow
def test_shared_noise_makes_equal_pictures_but_in_the_first_step(base):
    """A step with equal noise and equal generators would have no direction."""
    model, params = weights.load(base[1])
    params = params["generator"]
    params["synthesis"]["conv_16"]["noise_strength"] = jnp.array(1.0)
    options = scheme(noise="shared", run=RunOptions(batch=2))
    judge = Judge("small", SMALL, SMALL.init_params(key=jax.random.key(0)))
    tx = nada.optimizer(options)
    given = {
        "base": params,
        "clip": {"0": {"vision": judge.params["vision"]}},
        "anchors": {"0": {"direction": jnp.eye(8)[:1]}},
    }
    step = jax.jit(nada.make_step(options, model.generator, [SMALL], tx))
    state = nada.start_state(options, params, tx)
    _, first = step(state, given, {})
    _, later = step(state.replace(step=jnp.array(1)), given, {})
    # Rounding is all that is left of the difference.
    assert abs(float(later["loss"]) - 1) < 1e-3 < abs(float(first["loss"]) - 1)


@pytest.mark.slow
def test_texts_side_by_side_learn_what_each_would_alone(base, tmp_path, quick_compile):
    targets = ["sketch", "a dog"]
    flags = ["--source", "photo", "--choose-steps", "1", "--batch", "2"]
    spread = ["--mesh-style", "2", "--mesh-data", "1", "--target", *targets]
    together = command(base, tmp_path / "both", *flags, *spread)
    for target, name in zip(targets, ("sketch", "a-dog"), strict=True):
        out = tmp_path / name
        alone = command(base, out, *flags, "--mesh-data", "1", "--target", target)
        for both, one in zip(together, alone, strict=True):
            np.testing.assert_allclose(both[f"loss/{name}"], one["loss"], rtol=1e-4)
        value = together[-1][f"val_score/{name}"]
        np.testing.assert_allclose(value, alone[-1]["val_score"], rtol=1e-4)
        style = tmp_path / "both" / "styles" / name
        assert weights.read_config(style)["metadata"]["target"] == target
        for found in (style, tmp_path / "both"):
            which = {} if found == style else {"style": name}
            (_, a), (_, b) = weights.load(found, **which), weights.load(out)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4),
                a["generator"],
                b["generator"],
            )
