"""CLIP's files: every layout gives the same network; hostile ones end in one line."""

import json
import os
import struct
import subprocess
import sys
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

import convert
from convert import clip, pt, zips
from convert.__main__ import main
from convert.clip import load_clip
from convert.pickles import Call, Global
from jaxstyle import weights
from jaxstyle.errors import UserError
from jaxstyle.features import clip_text
from tests.clip_models import (
    SMALL,
    small_config,
    small_params,
    small_state,
    to_openai,
    write_msgpack,
    write_safetensors,
    write_script,
)
from tests.convert.test_hostile import refused

POSITIONS = {"text_model.embeddings.position_ids": np.arange(20)[None]}


def with_config(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(small_config() | changes))
    return folder


def same(params, atol=0.0):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
        params,
        small_params(),
    )


@pytest.mark.parametrize("form", ["safetensors", "msgpack", "bin", "legacy"])
def test_hugging_faces_files(tmp_path, form):
    folder, state = with_config(tmp_path / "model"), small_state()
    if form == "safetensors":
        file = write_safetensors(folder / "model.safetensors", state | POSITIONS)
    elif form == "msgpack":
        file = write_msgpack(folder / "flax_model.msgpack", state)
    else:
        file = folder / "pytorch_model.bin"
        pt.write(file, state | POSITIONS, legacy=form == "legacy")
    for source in (folder, file):
        networks, params, report = convert.load(source)
        assert networks == {"clip": SMALL}
        same(params["clip"])
        assert "Hugging Face" in report.kind
    judge = load_clip(folder, dtype="bfloat16")
    assert judge.module == SMALL.clone(dtype="bfloat16")
    assert judge.vocabulary == clip_text.VOCABULARY


def test_openais_archive(tmp_path):
    """Half precision, counters as arrays, a program that is never looked at."""
    state = to_openai(small_state())
    half = {k: v.astype(np.float16) if v.ndim > 1 else v for k, v in state.items()}
    half |= {"input_resolution": np.array(32), "vocab_size": np.array(600)}
    file = write_script(tmp_path / "ViT-S-16.pt", half)
    heads = {"vision_heads": 1, "text_heads": 1}
    networks, params, report = convert.load(file)
    assert networks == {"clip": SMALL.clone(**heads)}
    same(params["clip"], atol=1e-3)
    assert report.kind == "CLIP in OpenAI's layout"
    # The same as torch.save(model.state_dict()).
    pt.write(tmp_path / "state.pt", half)
    again, _, _ = convert.load(tmp_path / "state.pt")
    assert again == networks
    judge = load_clip(file)
    assert judge.name == str(file) and judge.module == networks["clip"]


def test_open_clips_files(tmp_path):
    state = to_openai(small_state()) | {"attn_mask": np.zeros((20, 20), np.float32)}
    state["visual.conv1.weight"] = state["visual.conv1.weight"].astype(
        ml_dtypes.bfloat16
    )
    config = {
        "model_cfg": {
            "vision_cfg": {"width": 16, "head_width": 8},
            "text_cfg": {"heads": 3},
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.75]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "open_clip_model.safetensors", state)
    networks, params, _ = convert.load(tmp_path)
    assert networks["clip"] == SMALL.clone(
        vision_activation="gelu",
        text_activation="gelu",
        mean=(0.5, 0.5, 0.5),
        deviation=(0.25, 0.5, 0.75),
    )
    same(params["clip"], atol=0.01)


def test_configs_are_obeyed(tmp_path):
    config = small_config()
    config["text_config"] |= {
        "eos_token_id": 300,
        "layer_norm_eps": 1e-3,
        "hidden_act": "gelu",
    }
    folder = with_config(tmp_path, **config)
    write_safetensors(folder / "model.safetensors", small_state())
    colours = {"image_mean": [0, 0.5, 1], "image_std": [1, 1, 2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(colours))
    networks, _, _ = convert.load(folder)
    assert networks["clip"] == SMALL.clone(
        end_token=300,
        text_eps=1e-3,
        text_activation="gelu",
        mean=(0.0, 0.5, 1.0),
        deviation=(1.0, 1.0, 2.0),
    )


def test_convert_and_load_again(tmp_path, capsys):
    folder = with_config(tmp_path / "model")
    write_safetensors(folder / "model.safetensors", small_state())
    (folder / "tokenizer.json").write_text("{}")
    out = tmp_path / "weights" / "small"
    main([str(folder), str(out)])
    assert "CLIP in Hugging Face's layout" in capsys.readouterr().out
    model, params = weights.load(out)
    assert model.clip == SMALL
    same(params["clip"])
    judge = load_clip(out)
    assert judge.module == SMALL
    assert str(judge.vocabulary) == str(out / "tokenizer")
    main([str(folder), "--check"])


def test_no_torch_and_no_network(tmp_path):
    """A folder is read, and words too, with torch and all sockets out of reach."""
    folder = with_config(tmp_path / "model")
    write_safetensors(folder / "model.safetensors", small_state())
    program = f"""
import socket, sys
sys.modules["torch"] = None
socket.socket.connect = None
from convert.clip import load_clip
from jaxstyle.features.clip import CLIP
from jaxstyle.features.clip_text import load_tokenizer, tokenize
judge = load_clip({str(folder)!r})
print(tokenize(load_tokenizer(judge.vocabulary), ["a photo"], CLIP()).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert (done.stdout, done.stderr) == ("[[49406, 320, 1125, 49407]]\n", "")


def test_real_weights_know_colours():
    """A picture of one colour is nearest to its name."""
    source = os.environ.get("JAXSTYLE_TEST_CLIP")
    if not source:
        pytest.skip("JAXSTYLE_TEST_CLIP names no CLIP weights (a file, folder or name)")
    judge = load_clip(source)
    colours = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1)}
    pictures = np.stack([np.full((64, 64, 3), c, np.float32) for c in colours.values()])
    texts = judge.encode_texts([f"a plain {name} picture" for name in colours])
    seen = judge.module.apply({"params": judge.params}, pictures, method="embed")
    assert np.argmax(seen @ texts.T, 1).tolist() == [0, 1, 2]
    assert np.argmax(texts @ seen.T, 1).tolist() == [0, 1, 2]


def test_hub_ids_through_the_cache(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    original = huggingface_hub.hf_hub_download

    def download(repository, file, local_files_only):
        asked.append((file, local_files_only))
        return original(repository, file, local_files_only=True)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(clip.Path, "home", lambda: tmp_path / "home")
    with pytest.raises(UserError, match="not in the local cache .* --download"):
        load_clip("openai/clip-vit-base-patch32")
    assert {local for _, local in asked} == {True}
    asked.clear()
    with pytest.raises(UserError, match="not in the local cache"):
        load_clip("ViT-B/32", download=True)
    assert {local for _, local in asked} == {False}
    repository = tmp_path / "models--openai--clip-vit-base-patch32"
    commit = "0" * 40
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    write_msgpack(with_config(folder) / "flax_model.msgpack", small_state())
    for name in ("openai/clip-vit-base-patch32", "ViT-B/32"):
        judge = load_clip(name)
        assert (judge.name, judge.module) == (name, SMALL)
    own = tmp_path / "home" / ".cache" / "clip"
    own.mkdir(parents=True)
    write_script(own / "ViT-B-32.pt", to_openai(small_state()))
    assert load_clip("ViT-B/32").module.vision_heads == 1
    with pytest.raises(UserError, match="no such file or folder"):
        load_clip("clip")
    with pytest.raises(UserError, match="no CLIP"):
        load_clip("lpips_alexnet")


def test_a_file_of_text_embeddings_replaces_the_tower(tmp_path):
    module = SMALL.clone(vocab_size=49408)
    params = {"clip": module.init_params(key=jax.random.key(0))}
    weights.save(tmp_path / "clip", {"clip": module}, params)
    judge = load_clip(tmp_path / "clip")
    clip_text.save_texts(tmp_path / "texts.npz", judge, ["a photo"])
    blind = load_clip(tmp_path / "clip", texts=tmp_path / "texts.npz")
    assert "text" not in blind.params
    expected = judge.encode_texts(["a photo"])
    np.testing.assert_array_equal(blind.encode_texts(["a photo"]), expected)


def header(**changes):
    """A change of one array's entry."""
    return lambda entries: entries["logit_scale"].update(changes)


HOSTILE_HEADERS = {
    "unknown type": header(dtype="F8_E4M3"),
    "negative size": header(shape=[-1]),
    "fraction": header(shape=[1.0]),
    "huge size": header(shape=[1 << 60]),
    "many axes": header(shape=[1] * 40),
    "beyond the end": header(data_offsets=[1 << 40, (1 << 40) + 4]),
    "negative place": header(data_offsets=[-4, 0]),
    "wrong length": header(data_offsets=[0, 8]),
    "three places": header(data_offsets=[0, 4, 8]),
    "no place": lambda entries: entries["logit_scale"].pop("data_offsets"),
    "a list as entry": lambda entries: entries.update(logit_scale=[]),
    "type of a dict": header(dtype={}),
    "overlapping": lambda entries: entries.update(
        more=entries["text_model.embeddings.token_embedding.weight"]
    ),
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_hostile_safetensors(tmp_path, capsys, case):
    folder = with_config(tmp_path / "model")
    file = folder / "model.safetensors"
    write_safetensors(file, small_state(), HOSTILE_HEADERS[case])
    refused(file, capsys)


def damaged_files(folder):
    """Whole files, cut and changed."""
    state = small_state()
    safe = write_safetensors(folder / "whole", state).read_bytes()
    pack = write_msgpack(folder / "whole", state).read_bytes()
    script = write_script(folder / "whole", to_openai(state)).read_bytes()
    (folder / "whole").unlink()
    deep = b'{"a":' * 5000
    yield "cut.safetensors", safe[:-5]
    yield "header.safetensors", safe[:50]
    yield "json.safetensors", struct.pack("<Q", 9) + b"{nonsense"
    yield "deep.safetensors", struct.pack("<Q", len(deep)) + deep
    yield "list.safetensors", struct.pack("<Q", 2) + b"{}"
    yield "cut.msgpack", pack[: len(pack) // 2]
    yield "more.msgpack", pack + b"\x00"
    yield "nonsense.msgpack", b"\x85\xa1a" + bytes(range(256))
    yield "deep.msgpack", b"\x81\xa1a" * 5000
    yield "numbers.msgpack", b"\x81\xa1a\x01"
    yield "objects.msgpack", b"\x81\xa1a\xc7\x05\x01\x93\x90\xa1O\xc4\x00"
    yield "byte.msgpack", b"\x85"
    yield "cut.pt", script[: len(script) // 2]


def test_damaged_files(tmp_path, capsys):
    with_config(tmp_path)
    for name, data in damaged_files(tmp_path):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, capsys)


def test_a_scripts_names_and_nothing_else(tmp_path, capsys):
    file, canary = tmp_path / "model.pt", tmp_path / "canary"
    state = to_openai(small_state())
    touch = Call(Global("os", "system"), (f"touch {canary}",))
    write_script(file, state, touch)
    assert "refused global 'os.system'" in refused(file, capsys)
    write_script(file, state, Call(Global("__torch__x", "system"), ()))
    assert "refused global" in refused(file, capsys)
    # A class of the archive takes no arguments: nothing could use them.
    write_script(file, state, Call(Global("__torch__.os", "system"), ("touch",)))
    assert "damaged" in refused(file, capsys)
    assert not canary.exists()
    write_script(file, {f"{'a' * 300}.{'b' * 300}": np.zeros(2, np.float32)})
    assert "a name of more than 500" in refused(file, capsys)
    write_script(file, state, compression=zipfile.ZIP_DEFLATED)
    assert "is compressed" in refused(file, capsys)


def test_the_program_is_not_even_unpacked(tmp_path):
    file = write_script(tmp_path / "model.pt", to_openai(small_state()))
    found = zips.entries(pt.open_file(file))
    assert not [name for name in found if "/code/" in name]


def changed(**changes):
    return lambda state: state.update(changes)


LAYER = "vision_model.encoder.layers.0"
ODD_STATES = {
    "a key too few": lambda s: s.pop(f"{LAYER}.mlp.fc1.bias"),
    "a key too many": changed(extra=np.zeros(2, np.float32)),
    "not finite": changed(logit_scale=np.float32(np.nan)),
    "no layers": lambda s: [s.pop(k) for k in list(s) if "text_model.encoder" in k],
    "layers differ": changed(**{f"{LAYER}.mlp.fc1.bias": np.zeros(7, np.float32)}),
    "a layer of number 10^9": changed(
        **{"vision_model.encoder.layers.1000000000.x": np.zeros(2, np.float32)}
    ),
    "places no square": changed(
        **{
            "vision_model.embeddings.position_embedding.weight": np.zeros(
                (7, 16), np.float32
            )
        }
    ),
    "oblong patches": changed(
        **{
            "vision_model.embeddings.patch_embedding.weight": np.zeros(
                (16, 3, 16, 8), np.float32
            )
        }
    ),
    "projection without axes": changed(
        **{"visual_projection.weight": np.zeros((), np.float32)}
    ),
    "integers": changed(logit_scale=np.array(4)),
}


@pytest.mark.parametrize("case", ODD_STATES)
def test_arrays_that_do_not_fit(tmp_path, capsys, case):
    folder, state = with_config(tmp_path / "model"), dict(small_state())
    ODD_STATES[case](state)
    state = {k: np.asarray(v) for k, v in state.items()}
    refused(write_safetensors(folder / "model.safetensors", state), capsys)


def test_openais_arrays_that_do_not_fit(tmp_path, capsys):
    state = to_openai(small_state())
    key = "visual.transformer.resblocks.0.attn.in_proj_weight"
    file = write_script(tmp_path / "model.pt", state | {key: state[key][:-1]})
    assert "in_proj_weight has shape [47, 16]" in refused(file, capsys)
    file = write_script(tmp_path / "model.pt", state | {"visual.proj": np.zeros(())})
    refused(file, capsys)
    more = {"visual.layer1.0.conv1.weight": np.zeros((1, 1, 1, 1), np.float32)}
    file = write_script(tmp_path / "model.pt", state | more)
    assert "RN50" in refused(file, capsys)


ODD_CONFIGS = {
    "no JSON": "{",
    "a list": "[]",
    "another model's": '{"model_type": "bert"}',
    "text for a number": {"vision_config": {"num_attention_heads": "many"}},
    "negative": {"vision_config": {"num_attention_heads": -2}},
    "heads that do not divide": {"vision_config": {"num_attention_heads": 5}},
    "a huge number of heads": {"vision_config": {"num_attention_heads": 1 << 40}},
    "unknown activation": {"vision_config": {"hidden_act": "__import__"}},
    "a list as part": {"vision_config": []},
    "deep": "[" * 100_000,
    "too large": '{"a": "' + "b" * (5 << 20) + '"}',
}


@pytest.mark.parametrize("case", ODD_CONFIGS)
def test_odd_configs(tmp_path, capsys, case):
    folder, config = tmp_path / "model", ODD_CONFIGS[case]
    with_config(folder)
    if isinstance(config, dict):
        whole = small_config()
        if isinstance(config["vision_config"], dict):
            config = {"vision_config": whole["vision_config"] | config["vision_config"]}
        config = json.dumps(whole | config)
    (folder / "config.json").write_text(config)
    refused(write_safetensors(folder / "model.safetensors", small_state()), capsys)


def test_odd_colours_and_open_clip_configs(tmp_path, capsys):
    folder = with_config(tmp_path / "model")
    file = write_safetensors(folder / "model.safetensors", small_state())
    for colours in ([1, 2], "abc", [0, 0, 0], [1, 1, None], 3, [1e400, 1, 1]):
        text = json.dumps({"image_std": colours})
        (folder / "preprocessor_config.json").write_text(text)
        assert "image_std" in refused(file, capsys)
    (folder / "preprocessor_config.json").unlink()
    write_safetensors(file, to_openai(small_state()))
    for config in (
        "[1]",
        "{}",
        '{"model_cfg": 3}',
        '{"model_cfg": {"vision_cfg": {}}}',
    ):
        (folder / "open_clip_config.json").write_text(config)
        if config != "{}":
            assert "open_clip_config.json" in refused(file, capsys)
    widths = {"width": 16, "head_width": 0}
    config = {"model_cfg": {"vision_cfg": widths, "text_cfg": {}}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert "open_clip_config.json" in refused(file, capsys)


def test_what_the_arrays_do_not_tell(tmp_path, capsys):
    file = write_safetensors(tmp_path / "model.safetensors", small_state())
    message = refused(file, capsys)
    assert "config.json" in message and "--activation" in message
    networks, _, report = convert.load(file, activation="gelu")
    assert networks["clip"].text_activation == "gelu"
    assert any("--activation" in note for note in report.notes)
    with pytest.raises(UserError, match="activation is 'relu'"):
        convert.load(file, activation="relu")
    other = write_safetensors(
        tmp_path / "other.safetensors", {"weight": np.zeros(3, np.float32)}
    )
    assert "its keys are those of no CLIP: weight" in refused(other, capsys)
