"""Original → ours → original is bit-equal, in both containers."""

import zipfile

import ml_dtypes
import numpy as np
import pytest

import convert
from convert import pt
from convert.__main__ import main
from jaxstyle import weights
from tests.convert.files import (
    small_encoder_object,
    small_networks,
    small_object,
    write_small,
)
from tests.filled import (
    PREFIX,
    draw,
    filled_state_dict,
    write_nvidia,
    write_psp,
    write_rosinality,
)


def flat(value, path=""):
    """Arrays and numbers of a nested object by path."""
    if isinstance(value, dict):
        parts = [flat(v, f"{path}/{k}") for k, v in value.items()]
        return {k: v for part in parts for k, v in part.items()}
    return {path: value}


def assert_same(actual, expected):
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, np.ndarray):
            assert actual[key].dtype == value.dtype, key
            assert actual[key].shape == value.shape, key
            assert actual[key].tobytes() == value.tobytes(), key
        else:
            assert actual[key] == value


@pytest.mark.parametrize("legacy", [False, True])
def test_reader_gives_what_the_writer_took(tmp_path, legacy):
    value = {
        "arrays": {
            "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
            "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
            "scalar": np.array(-0.0, np.float32),
            "empty": np.zeros((0, 5), np.float32),
            "half": np.ones(3, np.float16),
            "brain": np.arange(3).astype(ml_dtypes.bfloat16),
            "count": np.array(7),
            "bytes": np.arange(4, dtype=np.uint8),
            "flags": np.array([True, False]),
        },
        "numbers": [1, -(2**40), 2.5, True, None, (1, "ä")],
    }
    pt.write(tmp_path / "a.pt", value, legacy=legacy)
    assert_same(pt.read(tmp_path / "a.pt"), value)


def test_zip64(tmp_path, monkeypatch):
    # Files above 4 GB, or of very many entries, spell their sizes differently.
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    path = write_small(tmp_path / "a.pt")
    assert b"PK\6\6" in path.read_bytes()
    assert_same(pt.read(path), small_object())


def test_writing_is_deterministic_and_whole(tmp_path):
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    write_small(a)
    write_small(b)
    assert a.read_bytes() == b.read_bytes()
    with pytest.raises(TypeError, match="cannot"):
        pt.write(a, {"x": object()})
    with pytest.raises(TypeError, match="cannot write an array"):
        pt.write(a, {"x": np.array(["text"])})
    assert a.read_bytes() == b.read_bytes()
    assert sorted(tmp_path.iterdir()) == [a, b]


@pytest.mark.parametrize("legacy", [False, True])
def test_our_folder_and_back(tmp_path, legacy):
    networks, params = small_networks()
    weights.save(tmp_path / "ours", networks, params)
    flags = ["--to", "pt"] + ["--legacy"] * legacy
    main([str(tmp_path / "ours"), str(tmp_path / "back.pt"), *flags])
    assert_same(pt.read(tmp_path / "back.pt"), small_object())
    main([str(tmp_path / "back.pt"), str(tmp_path / "again")])
    model, again = weights.load(tmp_path / "again")
    assert {k: model[k] for k in model} == networks
    assert_same(again, params)


@pytest.mark.parametrize("kind", ["psp", "e4e", "w", "w_plus"])
def test_small_encoders(tmp_path, kind):
    value = small_encoder_object(kind)
    pt.write(tmp_path / "a.pt", value)
    networks, params, _ = convert.load(tmp_path / "a.pt")
    assert_same(convert.to_pt(networks, params), value)


@pytest.mark.parametrize("legacy", [False, True])
def test_official_stylegan2(tmp_path, legacy):
    value = {
        "g_ema": filled_state_dict("stylegan2_g_64"),
        "d": filled_state_dict("stylegan2_d_64"),
        "latent_avg": draw(PREFIX, "latent_avg", (512,)),
    }
    path = write_rosinality(tmp_path / "a.pt", legacy=legacy, **value)
    networks, params, _ = convert.load(path)
    assert_same(convert.to_pt(networks, params), value)


def test_nvidia_equals_rosinality_up_to_names(tmp_path):
    # The same arrays, drawn under NVIDIA's names, go the way of both tables.
    g, d = (filled_state_dict(f"nvidia_ada_{n}_64") for n in "gd")
    path = write_nvidia(tmp_path / "a.pkl", G_ema=g, D=d)
    networks, params, _ = convert.load(path)
    pt.write(tmp_path / "a.pt", convert.to_pt(networks, params))
    assert_same(convert.load(tmp_path / "a.pt")[1], params)
    state = convert.to_pt(networks, params)["g_ema"]
    up = g["synthesis.b16.conv0.weight"]
    assert (state["convs.2.conv.weight"][0] == up).all()
    assert (state["style.3.bias"] == g["mapping.fc2.bias"]).all()


@pytest.mark.parametrize("name", ["psp_backbone_w", "psp_backbone_wplus"])
def test_official_backbones(tmp_path, name):
    state = filled_state_dict(name)
    average = draw(PREFIX, "latent_avg", (18, 512))
    path = write_psp(tmp_path / "a.pt", state, latent_avg=average)
    networks, params, _ = convert.load(path)
    back = convert.to_pt(networks, params)
    assert_same(back["state_dict"], {f"encoder.{k}": v for k, v in state.items()})
    assert_same({"a": back["latent_avg"]}, {"a": average})


@pytest.mark.parametrize("name", ["psp_encoder", "e4e_encoder"])
def test_official_pyramids(tmp_path, name):
    state = filled_state_dict(name, styles=4)
    kind = {"psp": "GradualStyleEncoder", "e4e": "Encoder4Editing"}[name[:3]]
    critic = filled_state_dict("e4e_latent_discriminator")
    path = write_psp(
        tmp_path / "a.pt",
        state,
        latent_avg=draw(PREFIX, "latent_avg", (512,)),
        opts={"encoder_type": kind, "start_from_latent_avg": True, "input_nc": 3},
        **({"discriminator_state_dict": critic} if name[:3] == "e4e" else {}),
    )
    networks, params, report = convert.load(path)
    assert type(networks["encoder"]).__name__ == kind
    back = convert.to_pt(networks, params)
    assert_same(back["state_dict"], {f"encoder.{k}": v for k, v in state.items()})
    assert_same(back["opts"], pt.read(path)["opts"])
    if name[:3] == "e4e":
        assert_same(back["discriminator_state_dict"], critic)


@pytest.mark.parametrize("size", [256, 1024])
def test_official_large(tmp_path, size):
    value = {
        "g_ema": filled_state_dict(f"stylegan2_g_{size}"),
        "d": filled_state_dict(f"stylegan2_d_{size}"),
        "latent_avg": draw(PREFIX, "latent_avg", (512,)),
    }
    networks, params, _ = convert.load(write_rosinality(tmp_path / "a.pt", **value))
    assert_same(convert.to_pt(networks, params), value)


@pytest.mark.slow
def test_official_encoder_with_decoder(tmp_path):
    encoder = filled_state_dict("e4e_encoder")
    decoder = filled_state_dict("stylegan2_g_1024")
    average = np.repeat(draw(PREFIX, "latent_avg", (1, 512)), 18, 0)
    opts = {"encoder_type": "Encoder4Editing", "stylegan_size": 1024}
    path = tmp_path / "a.pt"
    write_psp(path, encoder, decoder=decoder, latent_avg=average, opts=opts)
    networks, params, _ = convert.load(path)
    back = convert.to_pt(networks, params)
    assert_same(back["state_dict"], pt.read(path)["state_dict"])
    assert_same({"a": back["latent_avg"]}, {"a": average})
