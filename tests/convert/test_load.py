"""What is recognised, what is said about it, and what is refused by name."""

import json

import numpy as np
import pytest

import convert
from convert import pt
from convert.__main__ import main
from jaxstyle import weights
from jaxstyle.encoders import GradualStyleEncoder
from jaxstyle.errors import UserError
from tests.convert.files import (
    CHANNELS,
    SIZE,
    WIDTH,
    small_encoder_object,
    small_networks,
    small_object,
    write_small,
)
from tests.filled import filled_state_dict, write_rosinality


def load(path, value, **options):
    pt.write(path, value)
    return convert.load(path, **options)


def text(report):
    return "\n".join(report.lines())


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_official_architectures(tmp_path, size):
    path = write_rosinality(
        tmp_path / "a.pt",
        g_ema=filled_state_dict(f"stylegan2_g_{size}"),
        d=filled_state_dict(f"stylegan2_d_{size}"),
        latent_avg=np.zeros(512, np.float32),
    )
    networks, params, _ = convert.load(path)
    for module in networks.values():
        assert (module.size, module.channel_multiplier) == (size, 2)
        assert module.channels is None
    assert networks["generator"].mapping_depth == 8
    count = sum(v.size for v in params["discriminator"]["dense_0"].values())
    assert count == 8192 * 512 + 512


def test_small_architecture(tmp_path):
    networks, _, report = load(tmp_path / "a.pt", small_object())
    assert networks == small_networks()[0]
    assert networks["generator"].channels == CHANNELS
    assert networks["generator"].w_dim == WIDTH
    assert "16 px, channels 8, 6, 4, 2 mapping layers, 6 w+ rows" in text(report)


def test_channel_multiplier_one(tmp_path):
    generator = small_networks()[0]["generator"].clone(
        size=128, channels=(512, 512, 512, 512, 256, 128)
    )
    import jax

    params = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32),
        jax.eval_shape(lambda: generator.init_params(key=jax.random.key(0))),
    )
    value = convert.to_pt({"generator": generator}, {"generator": params})
    networks, _, _ = load(tmp_path / "a.pt", value)
    assert networks["generator"].channel_multiplier == 1
    assert networks["generator"].channels is None


def test_training_checkpoint(tmp_path):
    value = small_object() | {
        "g": small_object()["g_ema"],
        "g_optim": {"state": {0: {"step": 3}}, "param_groups": []},
        "d_optim": {},
        "args": {"iter": 800000},
        "ada_aug_p": 0.2,
        "surprise": 1,
    }
    networks, _, report = load(tmp_path / "a.pt", value)
    assert set(networks) == {"generator", "discriminator"}
    for line in (
        "g: raw training weights; their average g_ema is taken",
        "g_optim: optimiser state",
        "d_optim: optimiser state",
        "args: training options",
        "surprise: not known",
    ):
        assert line in text(report)
    assert not report.missing


def test_jojogan_and_nada(tmp_path):
    g = small_object()["g_ema"]
    for value, kind in (
        ({"g": g}, "JoJoGAN"),
        ({"g_ema": g, "g_optim": {}}, "StyleGAN-NADA"),
    ):
        networks, _, report = load(tmp_path / "a.pt", value)
        assert set(networks) == {"generator"}
        assert kind in report.kind
        assert any("--perceptual lpips" in line for line in report.missing)
        assert any("estimated from 10,000 codes" in line for line in report.missing)


def test_bare_state_dicts(tmp_path):
    value = small_object()
    for part, name in (("g_ema", "generator"), ("d", "discriminator")):
        for prefix in ("", "module."):
            state = {f"{prefix}{k}": v for k, v in value[part].items()}
            networks, params, _ = load(tmp_path / "a.pt", state)
            assert set(networks) == set(params) == {name}
    state = small_encoder_object("psp")["state_dict"]
    bare = {k.removeprefix("encoder."): v for k, v in state.items()}
    for value in (state, bare):
        networks, params, report = load(tmp_path / "a.pt", value)
        assert networks["encoder"].start_from_w_avg is False
        assert not params["encoder"]["w_avg"].any()
        assert "--kind e4e" in text(report)
    networks, _, report = load(tmp_path / "a.pt", bare, kind="e4e")
    assert type(networks["encoder"]).__name__ == "Encoder4Editing"
    assert report.kind == "e4e checkpoint"


def test_data_parallel_keys(tmp_path):
    g = {f"module.{k}": v for k, v in small_object()["g_ema"].items()}
    _, params, _ = load(tmp_path / "a.pt", small_object() | {"g_ema": g})
    expected = small_networks()[1]["generator"]["synthesis"]["const"]
    assert (params["generator"]["synthesis"]["const"] == expected).all()


def test_noise_planes_may_be_missing_or_too_many(tmp_path):
    g = small_object()["g_ema"]
    bare = {k: v for k, v in g.items() if not k.startswith("noises.")}
    _, params, report = load(tmp_path / "a.pt", small_object() | {"g_ema": bare})
    assert "5 of 5 noise planes: drawn anew" in text(report)
    _, again, _ = load(tmp_path / "a.pt", small_object() | {"g_ema": bare})
    planes = [p["generator"]["noise_const"] for p in (params, again)]
    assert all((planes[0][n] == planes[1][n]).all() for n in planes[0])
    more = g | {"noises.noise_5": np.zeros((1, 1, 32, 32), np.float32)}
    _, _, report = load(tmp_path / "a.pt", small_object() | {"g_ema": more})
    assert "1 noise planes that no layer reads" in text(report)


def test_blur_kernels_may_be_missing_but_not_others(tmp_path):
    g = small_object()["g_ema"]
    bare = {k: v for k, v in g.items() if not k.endswith(".kernel")}
    load(tmp_path / "a.pt", small_object() | {"g_ema": bare})
    other = g | {"convs.0.conv.blur.kernel": np.ones((4, 4), np.float32)}
    with pytest.raises(UserError, match="another blur kernel"):
        load(tmp_path / "a.pt", small_object() | {"g_ema": other})


@pytest.mark.parametrize("part", ["g_ema", "d"])
def test_every_missing_key_is_named(tmp_path, part):
    state = small_object()[part]
    for key in state:
        if key.endswith(".kernel") or key.startswith(("noises.", "style.2.")):
            continue
        less = {k: v for k, v in state.items() if k != key}
        with pytest.raises(UserError, match="missing keys") as error:
            load(tmp_path / "a.pt", small_object() | {part: less})
        assert key in str(error.value)


def test_every_missing_key_of_an_encoder_is_named(tmp_path):
    value = small_encoder_object("psp")
    state = value["state_dict"]
    for key in state:
        # Nothing tells that the last head, block or shortcut was there.
        if key.endswith(("num_batches_tracked", "shortcut_layer.0.weight")):
            continue
        less = {k: v for k, v in state.items() if k != key}
        with pytest.raises(UserError) as error:
            load(tmp_path / "a.pt", value | {"state_dict": less})
        assert key.removeprefix("encoder.") in str(error.value)


@pytest.mark.parametrize("part", ["g_ema", "d"])
def test_every_shape_is_checked(tmp_path, part):
    state = small_object()[part]
    for key, array in state.items():
        for wrong in (array[None], np.concatenate([array, array]) if array.ndim else 0):
            with pytest.raises(UserError):
                load(tmp_path / "a.pt", small_object() | {part: state | {key: wrong}})


def test_mapping_is_checked_before_the_average_is_estimated(tmp_path):
    g = small_object()["g_ema"] | {"style.2.weight": np.zeros((8, 9), np.float32)}
    with pytest.raises(UserError, match="dense_1"):
        load(tmp_path / "a.pt", {"g": g})
    wide = {"style.1.weight": np.zeros((8, 5000), np.float32)}
    with pytest.raises(UserError, match="at most 4096"):
        load(tmp_path / "a.pt", {"g": small_object()["g_ema"] | wide})


def test_left_over_keys_are_another_error(tmp_path):
    for part in ("g_ema", "d"):
        state = small_object()[part] | {"extra.weight": np.zeros(3, np.float32)}
        with pytest.raises(UserError, match="left-over keys .*: extra.weight"):
            load(tmp_path / "a.pt", small_object() | {part: state})
    value = small_encoder_object("e4e")
    value["state_dict"]["encoder.extra"] = np.zeros(3, np.float32)
    with pytest.raises(UserError, match="left-over keys .*: extra"):
        load(tmp_path / "a.pt", value)


@pytest.mark.parametrize("rows", [None, 1, 8])
def test_average_latents(tmp_path, rows):
    average = np.linspace(-1, 1, WIDTH, dtype=np.float32)
    shaped = average if rows is None else np.repeat(average[None], rows, 0)
    _, params, report = load(
        tmp_path / "a.pt", small_encoder_object("psp") | {"latent_avg": shaped}
    )
    assert (params["encoder"]["w_avg"] == np.repeat(average[None], 8, 0)).all()
    assert f"average latent: {list(shaped.shape)}" in text(report)
    _, params, _ = load(tmp_path / "a.pt", small_object() | {"latent_avg": shaped})
    assert (params["generator"]["w_avg"] == average).all()


def test_average_latents_of_odd_shape(tmp_path):
    for shape in ((WIDTH + 1,), (3, 4, WIDTH), (2, WIDTH)):
        value = small_encoder_object("psp")
        with pytest.raises(UserError, match="latent_avg"):
            load(tmp_path / "a.pt", value | {"latent_avg": np.zeros(shape)})
    with pytest.raises(UserError, match="latent_avg"):
        load(tmp_path / "a.pt", small_object() | {"latent_avg": [1.0]})


def test_encoder_with_decoder(tmp_path):
    decoder = small_object()["g_ema"]
    value = small_encoder_object("w")
    value["state_dict"] |= {f"decoder.{k}": v for k, v in decoder.items()}
    del value["latent_avg"]
    networks, params, report = load(tmp_path / "a.pt", value)
    assert set(networks) == {"encoder", "generator"}
    assert networks["encoder"].num_styles == networks["generator"].num_ws == 6
    assert any("estimated" in line for line in report.missing)
    rows = params["encoder"]["w_avg"]
    assert (rows == params["generator"]["w_avg"]).all() and rows.any()


def test_options_of_an_encoder_are_read_leniently(tmp_path):
    for flag, expected in (("False", False), ("true", True), (0, False), (True, True)):
        value = small_encoder_object("psp")
        opts = {"start_from_latent_avg": flag, "max_steps": "10000", "device": "cuda:0"}
        networks, _, _ = load(tmp_path / "a.pt", value | {"opts": opts})
        assert networks["encoder"].start_from_w_avg is expected


def test_missing_keys_of_a_resnet_encoder_are_named(tmp_path):
    state = {"encoder.conv1.weight": 0, "encoder.body.0.conv1.weight": 0}
    state = {k: np.zeros((1, 1, 1, 1), np.float32) for k in state}
    with pytest.raises(UserError, match="missing keys of the trunk: bn1.weight"):
        load(tmp_path / "a.pt", {"state_dict": state})


def test_half_precision_is_read_as_float32(tmp_path):
    g = {k: v.astype(np.float16) for k, v in small_object()["g_ema"].items()}
    _, params, _ = load(tmp_path / "a.pt", small_object() | {"g_ema": g})
    const = params["generator"]["synthesis"]["const"]
    assert const.dtype == np.float32
    expected = small_networks()[1]["generator"]["synthesis"]["const"]
    assert (const == expected.astype(np.float16)).all()


def test_command_line(tmp_path, capsys):
    path, out = write_small(tmp_path / "a.pt"), tmp_path / "weights" / "ours"
    main([str(path), "--check"])
    assert "generator: 16 px" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [path]
    main([str(path), str(out)])
    assert f"wrote {out}" in capsys.readouterr().out
    assert sorted(p.name for p in out.parent.iterdir()) == ["ours"]
    model, _ = weights.load(out)
    assert model.generator.size == SIZE
    source = json.loads((out / "config.json").read_text())["metadata"]["source"]
    assert source["file"] == "a.pt" and len(source["sha256"]) == 64
    assert "rosinality" in source["kind"] and "License-NC" in source["licence"]


def test_an_existing_folder_needs_force(tmp_path, capsys):
    path, out = write_small(tmp_path / "a.pt"), tmp_path / "ours"
    main([str(path), str(out)])
    before = (out / "config.json").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([str(path), str(out)])
    assert "--force" in capsys.readouterr().err
    write_small(path, d=None)
    main([str(path), str(out), "--force"])
    assert (out / "config.json").read_text() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "ours"]


def test_force_spares_what_is_no_network_folder(tmp_path, capsys):
    path, home = write_small(tmp_path / "a.pt"), tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").touch()
    for out in (home, home / "thesis.txt"):
        with pytest.raises(SystemExit):
            main([str(path), str(out), "--force"])
        assert "no network folder" in capsys.readouterr().err
    assert (home / "thesis.txt").exists()


def test_out_is_needed_to_write(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(write_small(tmp_path / "a.pt"))])
    assert "OUT is missing" in capsys.readouterr().err


def test_codes_and_directions(tmp_path, capsys):
    rng = np.random.default_rng(0)
    code = rng.standard_normal((18, 512), np.float32)
    for value, name, expected in (
        ({"latent": code}, "w_plus", code[None]),
        ({"latent": code[None]}, "w_plus", code[None]),
        (code[0], "direction", code[:1]),
        (code, "direction", code),
        (code[None], "direction", code),
    ):
        pt.write(tmp_path / "a.pt", value)
        main([str(tmp_path / "a.pt"), str(tmp_path / "code"), "--force"])
        assert f"wrote {tmp_path / 'code.npz'}" in capsys.readouterr().out
        with np.load(tmp_path / "code.npz") as data:
            assert data.files == [name]
            assert (data[name] == expected).all()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "a.pt"), str(tmp_path / "code")])
    assert "exists already" in capsys.readouterr().err


def test_unknown_files_are_said_to_be(tmp_path):
    for value, message in (
        ({"weights": np.zeros(3, np.float32)}, "no known file: weights"),
        ({}, "there are none"),
        ([1, 2], "holds a list"),
        ({1: 2}, "not named weights"),
        (np.zeros(3, np.int64), "one array of int64"),
        ({"latent": np.zeros(3, np.float32)}, "num_ws, w_dim"),
    ):
        with pytest.raises(UserError, match=message):
            load(tmp_path / "a.pt", value)


def test_networks_without_an_original_layout_are_named(tmp_path):
    with pytest.raises(UserError, match="lpips: none of these"):
        convert.to_pt({"lpips": None}, {"lpips": {}})
    narrow = GradualStyleEncoder(units=(1, 1), channels=(16, 16))
    with pytest.raises(UserError, match="16, 16 channels.*cannot be told apart"):
        convert.to_pt({"encoder": narrow}, {"encoder": {}})
