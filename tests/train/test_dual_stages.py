"""DualStyleGAN's stages: what they are made of, and runs of a tiny model."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstyle import images, weights
from jaxstyle.dualstylegan import STRUCTURE_ROWS, style_weights
from jaxstyle.errors import UserError
from tests import dual_models
from tests.train.test_loop import assert_same, lines, mesh_of
from train import (
    augment,
    data,
    destylize,
    dual_finetune,
    dual_pretrain,
    dual_steps,
    refine_exstyle,
    sharding,
)
from train.cli import RunOptions
from train.dual_steps import AdversarialOptions, Setup


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny face model, an encoder, an identity network and portraits."""
    return dual_models.save_all(tmp_path_factory.mktemp("dual"))


# Stages and parts


def test_the_mix_moves_down_in_a_sixth_of_the_run():
    options = dual_pretrain.Options(run=RunOptions(steps=3600))
    rows = [
        int(dual_pretrain.first_row(options, jnp.asarray(i)))
        for i in (0, 299, 300, 599, 600, 3599)
    ]
    assert rows == [7, 7, 6, 6, 5, 5]
    at_once = dataclasses.replace(options, progressive=False)
    assert dual_pretrain.first_row(at_once, jnp.asarray(0)) == 5

    def mean(step):
        state = dual_steps.make_state(
            AdversarialOptions(), options.run, {"dual": {}}, {}
        )
        state = state.replace(step=jnp.asarray(step), extra={"path_mean": 2.0})
        return float(dual_pretrain.path_mean(options, state))

    # The running mean of path lengths begins anew with each row.
    assert [mean(i) for i in (0, 296, 300, 304, 596, 600, 604)] == [2, 2, 0, 2, 2, 0, 2]


def test_parts_of_a_batch_give_the_mean():
    rows = {
        "x": jnp.arange(12.0).reshape(6, 2),
        "keys": jax.random.split(jax.random.key(0), 6),
        "none": None,
    }

    def function(rows):
        drawn = jax.vmap(jax.random.uniform)(rows["keys"])
        return jnp.mean(rows["x"], 0), {"first": rows["x"][0, 0], "drawn": drawn}

    whole, _ = dual_steps.in_parts(function, rows, 1)
    for parts in (2, 3, 6):
        run = jax.jit(dual_steps.in_parts, static_argnums=(0, 2))
        mean, out = run(function, rows, parts)
        np.testing.assert_allclose(mean, whole)
        # Every n-th row belongs to a part.
        np.testing.assert_array_equal(out["first"], 2 * jnp.arange(parts))
        assert out["drawn"].shape == (parts, 6 // parts)
    assert [dual_steps.parts_of(n, 4) for n in (1, 2, 4, 6, 7)] == [1, 2, 4, 3, 1]


def test_kinds_of_iterations():
    options = dual_finetune.Options(data="", weights="")
    paired = [bool(dual_finetune.is_paired(options, jnp.asarray(i))) for i in range(4)]
    assert paired == [False, True, False, True]
    options = dataclasses.replace(options, unpaired_every=3)
    paired = [bool(dual_finetune.is_paired(options, jnp.asarray(i))) for i in range(4)]
    assert paired == [False, True, True, False]
    options = dataclasses.replace(options, paired=False)
    assert not dual_finetune.is_paired(options, jnp.asarray(1))


def test_norms_take_what_the_option_says():
    params = {
        "modres_0": {"weight": jnp.array([3.0, 4.0])},
        "color_7": {"weight": jnp.array([2.0])},
        "structure": {"weight": jnp.array([100.0])},
    }
    for reg_on, expected in (("path", 7), ("modres", 5)):
        options = dual_finetune.Options(data="", weights="", reg_on=reg_on)
        assert dual_finetune.norms(options, params) == expected


def test_portraits_are_read_by_the_exemplars_names(folder):
    names = ("2.png", "10.png")
    portraits = dual_finetune.open_portraits(str(folder / "pictures"), names, 32, 8)
    # Fewer portraits than a batch has are repeated.
    assert len(portraits) == 8 and portraits[3] == 1
    transform = functools.partial(
        dual_finetune.with_other, portraits=portraits, mirror=False
    )
    drawn = [transform(portraits[i], np.random.default_rng(i)) for i in range(8)]
    for i, item in enumerate(drawn):
        assert item["index"] == i % 2
        np.testing.assert_array_equal(item["image"], portraits.picture(i % 2))
    others = {float(item["real"].mean()) for item in drawn}
    assert others == {float(portraits.picture(i).mean()) for i in range(2)}
    assert data.fingerprint(portraits)
    with pytest.raises(UserError, match="no picture for 1 of the 1 exemplars"):
        dual_finetune.open_portraits(str(folder / "pictures"), ("x.png",), 32)


# Stage 1


def test_stage_1_is_a_style_that_mixes(folder, capsys):
    """--steps 0 writes it; without noise it is style mixing exactly."""
    out = folder / "stage1"
    flags = ["--weights", str(folder / "base"), "--out", str(out), "--steps", "0"]
    dual_pretrain.main([*flags, "--init-noise", "0"])
    assert "stage 1" in capsys.readouterr().out
    model, params = weights.load(out)
    assert set(model) == {"generator", "discriminator", "dual"}
    z1, z2 = jax.random.normal(jax.random.key(0), (2, 2, 8))

    @jax.jit
    def both(params):
        mixed, _ = model.generator.apply(
            {"params": params["generator"]}, z1, mix_codes=z2, mix_from=STRUCTURE_ROWS
        )
        spaces = {"space": "z", "extrinsic_space": "z"}
        base = model.generator, params["generator"]
        made, _ = model.dual.apply({"params": params["dual"]}, *base, z1, z2, **spaces)
        return mixed, made

    mixed, made = both(params)
    np.testing.assert_allclose(made, mixed, rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit):
        dual_pretrain.main(flags)
    assert "exists already" in capsys.readouterr().err
    flags[-1] = "1"
    with pytest.raises(SystemExit):
        dual_pretrain.main([*flags, "--data", "x"])
    assert "holds networks that no run wrote" in capsys.readouterr().err


# Runs

RUN = ["--log-every", "1", "--judge-size", "64", "--mesh-data", "1"]


def pretrain(folder, out, *flags):
    dual_pretrain.main(
        ["--weights", str(folder / "base"), "--data", str(folder / "pictures")]
        + ["--out", str(out), "--batch", "2", *RUN, *map(str, flags)]
    )
    return lines(out)


def finetune(folder, out, start, exemplars, *flags):
    dual_finetune.main(
        ["--weights", str(start), "--exemplars", str(exemplars)]
        + ["--data", str(folder / "pictures"), "--out", str(out)]
        + ["--identity-net", str(folder / "identity"), *RUN, *map(str, flags)]
    )
    return lines(out)


@pytest.mark.slow
def test_the_pipeline_from_portraits_to_a_style(folder, tmp_path, quick_compile):
    encoder = ["--encoder", str(folder / "encoder")]
    # Stage 2, stopped and continued, as in one go.
    whole = pretrain(folder, tmp_path / "whole", "--steps", 3, *encoder)
    pretrain(folder, tmp_path / "stage2", "--steps", 3, "--save-every", 1, *encoder)
    shutil.rmtree(tmp_path / "stage2" / "checkpoints" / "3")
    shutil.rmtree(tmp_path / "stage2" / "checkpoints" / "2")
    assert pretrain(folder, tmp_path / "stage2", "--steps", 3, *encoder) == whole
    (_, a), (_, b) = (weights.load(tmp_path / n) for n in ("whole", "stage2"))
    assert_same(a, b)
    _, base = weights.load(folder / "base")
    assert_same(a["generator"], base["generator"])
    moved = jax.tree.map(
        lambda p, q: bool(jnp.any(p != q)), a["dual"], a["dual_trained"]
    )
    assert all(jax.tree.leaves(moved))

    # Destylisation, three portraits by two, then a new one.
    codes = tmp_path / "codes"
    flags = ["--weights", str(folder / "base"), "--out", str(codes), "--steps", "3"]
    flags += ["--portrait-weights", str(folder / "portrait"), *encoder]
    flags += ["--identity-net", str(folder / "identity"), "--mesh-data", "1"]
    flags += ["--data", str(tmp_path / "pictures"), "--judge-size", "64"]
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    destylize.main([*flags, "--batch", "2"])
    model, first = weights.load(codes)
    assert model.exemplars.names == ("1.png", "2.png", "10.png")
    shutil.copy(folder / "pictures" / "1.png", tmp_path / "pictures" / "3.png")
    destylize.main([*flags, "--batch", "4"])
    model, second = weights.load(codes)
    assert model.exemplars.names == ("1.png", "2.png", "3.png", "10.png")
    for kind, table in first["exemplars"].items():
        kept = second["exemplars"][kind][np.array([0, 1, 3])]
        np.testing.assert_array_equal(kept, table)
    extrinsic, intrinsic = (second["exemplars"][k] for k in ("extrinsic", "intrinsic"))
    assert bool(jnp.any(extrinsic != intrinsic))
    # Alone, a picture gets the codes it got beside others.
    alone = tmp_path / "alone"
    flags[3] = str(alone)
    (tmp_path / "pictures" / "3.png").unlink()
    destylize.main([*flags, "--batch", "1"])
    _, third = weights.load(alone)
    np.testing.assert_allclose(
        third["exemplars"]["intrinsic"], first["exemplars"]["intrinsic"], atol=2e-3
    )

    # Stage 3, more pictures in a batch than portraits, in parts.
    flags = ["--steps", 2, "--batch", 4, "--accumulate", 2]
    out = tmp_path / "stage3"
    entries = finetune(folder, out, tmp_path / "stage2", alone, *flags)
    names = {"d_loss", "r1", "g_loss", "perceptual", "cx", "fm", "identity", "norms"}
    assert names | {"path", "path_length"} <= set(entries[0])
    assert entries[0]["perceptual"] == 0 < entries[1]["perceptual"]
    model, params = weights.load(out)
    assert {"dual", "dual_trained", "generator", "exemplars"} <= set(model)
    assert_same(params["generator"], base["generator"])

    # Refinement gives a style that stylize reads.
    style = tmp_path / "style"
    flags = ["--weights", str(out), "--data", str(folder / "pictures"), *encoder]
    refine_exstyle.main(
        [
            *flags,
            "--out",
            str(style),
            *"--steps 2 --batch 2 --judge-size 64 --mesh-data 1".split(),
        ]
    )
    shown = next((tmp_path / "style.parts" / "pictures").iterdir())
    assert images.open_image(shown).height == 64
    model, params = weights.load(style)
    assert set(model) == {"generator", "dual", "exemplars", "encoder"}
    assert model.exemplars.codes == ("extrinsic", "refined", "intrinsic")
    assert weights.read_config(style)["metadata"]["space"] == "z_plus"
    tables = params["exemplars"]
    np.testing.assert_array_equal(tables["extrinsic"], third["exemplars"]["extrinsic"])
    assert bool(jnp.all(jnp.any(tables["refined"] != tables["extrinsic"], (1, 2))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, absent",
    [
        (["--no-paired", "--id-lambda", 0, "--reg-lambda", 0], "identity"),
        (["--crossover", "separate", "--reg-on", "modres", "--cx-lambda", 0], "cx"),
        (["--ema", "published", "--augment", "--ada-every", 1, "--fm-lambda", 0], "fm"),
    ],
)
def test_options_of_stage_3(folder, tmp_path, quick_compile, flags, absent):
    start, codes = tmp_path / "start", dual_models.save_exemplars(tmp_path / "codes")
    dual_pretrain.main(
        ["--weights", str(folder / "base"), "--out", str(start), "--steps", "0"]
    )
    flags = ["--steps", 2, "--batch", 2, "--g-reg-every", 0, "--d-reg-every", 0, *flags]
    entries = finetune(folder, tmp_path / "run", start, codes, *flags)
    assert absent not in entries[1] and ("ada_p" in entries[1]) == (absent == "fm")
    _, before = weights.load(start)
    _, after = weights.load(tmp_path / "run")
    same = [
        np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(before["dual"]["structure"]),
            jax.tree.leaves(after["dual"]["structure"]),
            strict=True,
        )
    ]
    # The published average forgets T_s.
    assert all(same) if absent == "fm" else not any(same)


@pytest.mark.slow
def test_steps_agree_on_one_and_eight_devices(folder, quick_compile):
    """The steps of stage 3, from one state: values, and no activation that travels."""
    import re

    from jaxstyle.features import judges

    run = RunOptions(batch=16)
    networks, params = dual_steps.load_networks(str(folder / "base"), run, 0.01)
    shared = AdversarialOptions(accumulate=2, judge_size=32)
    options = dual_finetune.Options(data="", weights="", run=run, adversarial=shared)
    modules = (networks[n] for n in ("generator", "dual", "discriminator"))
    setup = Setup(shared, run.batch, 1.0, *modules)
    trunk = judges.choose_features("alexnet")
    identity, found = weights.load(folder / "identity")
    optimizers = dual_steps.make_optimizers(shared)
    state = dual_steps.make_state(shared, run, params, optimizers)
    entries = dual_finetune.schedule(
        setup, options, trunk.module, identity.identity, optimizers
    )
    table = jax.random.normal(jax.random.key(1), (2, 3, 8, 8))
    frozen = {
        "features": trunk.params,
        "identity": found["identity"],
        "codes": {"extrinsic": table[0], "intrinsic": table[1]},
    }
    rng = np.random.default_rng(0)
    rows = {
        "index": np.arange(16, dtype=np.int32)[:, None] % 3,
        "image": rng.uniform(-1, 1, (16, 32, 32, 3)).astype("f4"),
        "real": rng.uniform(-1, 1, (16, 32, 32, 3)).astype("f4"),
    }
    values = []
    for count in (1, 8):
        mesh = mesh_of(count)
        placed = sharding.place(state, sharding.shardings(state, mesh))
        judge = sharding.place(frozen, sharding.shardings(frozen, mesh))
        batch = sharding.global_batch(rows, mesh)
        metrics = {}
        for _, step in entries[:4]:
            with jax.set_mesh(mesh):
                compiled = jax.jit(step).lower(placed, judge, batch).compile()
            used = re.findall(
                r" (all-\w+|collective-\w+|reduce-s\w+)\(", compiled.as_text()
            )
            assert set(used) <= {"all-reduce"}, (count, set(used))
            metrics |= compiled(placed, judge, batch)[1]
        values.append(jax.device_get(metrics))
    for name, value in values[0].items():
        bound = 1e-3 if name.startswith("path") else 1e-4
        np.testing.assert_allclose(values[1][name], value, rtol=bound, err_msg=name)


# Mistakes


@pytest.mark.parametrize(
    "scheme, flags, message",
    [
        (dual_pretrain, "--steps 1", "--data is not given"),
        (dual_pretrain, "--steps -1", "--steps is -1; it must be at least 0"),
        (dual_pretrain, "--steps 1 --data D", "holds no encoder; name one"),
        (dual_pretrain, "--data D --encoder E --encoder-every 0", "never asks it"),
        (dual_pretrain, "--data D --accumulate 3", "multiple of 3"),
        (dual_pretrain, "--data D --encoder-every -1", "must be >= 0"),
        (destylize, "--data D", "--portrait-weights is not given"),
        (destylize, "--data D --portrait-weights P", "holds no encoder"),
        (dual_finetune, "--data D", "holds no extrinsic path"),
        (refine_exstyle, "--data D", "must be a DualStyleGAN with exemplars"),
    ],
)
def test_mistakes_end_in_one_line(folder, tmp_path, capsys, scheme, flags, message):
    names = {"D": "pictures", "E": "encoder", "P": "portrait"}
    flags = [str(folder / names[f]) if f in names else f for f in flags.split()]
    flags += ["--weights", str(folder / "base"), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        scheme.main([*flags, "--mesh-data", "1"])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_exemplars_must_fit(folder, tmp_path, capsys):
    start, codes = tmp_path / "start", dual_models.save_exemplars(tmp_path / "codes")
    dual_pretrain.main(
        ["--weights", str(folder / "base"), "--out", str(start), "--steps", "0"]
    )
    assert style_weights().shape == (18,)
    pictures = str(folder / "pictures")
    flags = ["--weights", str(start), "--data", pictures, "--batch", "2"]
    flags += ["--mesh-data", "1", "--out", str(tmp_path / "run")]
    for more, message in (
        ([], "holds no exemplars"),
        (["--exemplars", codes, "--unpaired-every", "0"], "--unpaired-every is 0"),
        (["--exemplars", codes, "--color-from", "9"], "--color-from is 9"),
        (["--exemplars", codes, "--reg-lambda", "-1"], "--reg-lambda is -1"),
    ):
        with pytest.raises(SystemExit):
            dual_finetune.main([*flags, *more])
        assert message in capsys.readouterr().err
    config = json.loads((tmp_path / "codes" / "config.json").read_text())
    assert config["networks"]["exemplars"]["num_ws"] == 8
    assert augment.AugmentOptions() == AdversarialOptions().augmenting
