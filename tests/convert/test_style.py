"""DualStyleGAN's files: one by one, and a style's files as one folder."""

import functools
import io
import json
import os
import pickle

import jax
import numpy as np
import pytest

import convert
from convert import npy, pickles, pt
from convert.__main__ import main
from convert.pickles import Call, Global
from jaxstyle import weights
from jaxstyle.dualstylegan import DualStyleGAN
from jaxstyle.encoders import GradualStyleEncoder
from jaxstyle.errors import UserError
from jaxstyle.exemplars import Sampler
from jaxstyle.stylegan2 import Discriminator, Generator

SHAPE = {"size": 32, "channels": (6, 6, 4, 4)}
ROWS, WIDTH = 8, 512


@functools.cache
def small_style():
    """Networks of a style at 32 px, every parameter random."""
    encoder = GradualStyleEncoder(
        num_styles=ROWS, size=32, units=(1, 1, 1, 1), channels=(4, 6, 8, 10), se_ratio=2
    )
    networks = {
        "generator": Generator(mapping_depth=1, **SHAPE),
        "dual": DualStyleGAN(**SHAPE),
        "dual_trained": DualStyleGAN(**SHAPE),
        "discriminator": Discriminator(**SHAPE),
        "sampler_color": Sampler(rows=1, z_dim=6, width=5),
        "sampler_structure": Sampler(rows=7, z_dim=6, width=5),
        "encoder": encoder.clone(start_from_w_avg=False),
        "encoder_w_plus": encoder,
    }
    rng = np.random.default_rng(0)
    params = {
        name: jax.tree.map(
            lambda x: rng.standard_normal(x.shape, np.float32),
            jax.eval_shape(lambda m=module: m.init_params(key=jax.random.key(0))),
        )
        for name, module in networks.items()
    }
    params["encoder"]["w_avg"] = np.zeros((ROWS, WIDTH), np.float32)
    # As in published averages: T_s never moved, and its biases are 0.
    for layer in params["dual"]["structure"].values():
        layer["bias"] = np.zeros(WIDTH, np.float32)
    return networks, params


def original(*names):
    """Some networks of the small style as the object of an original file."""
    networks, params = small_style()
    return convert.to_pt({n: networks[n] for n in names}, {n: params[n] for n in names})


def encoder_file(name):
    networks, params = small_style()
    value = convert.to_pt({"encoder": networks[name]}, {"encoder": params[name]})
    decoder = original("generator")["g_ema"]
    value["state_dict"] |= {f"decoder.{k}": v for k, v in decoder.items()}
    if name == "encoder":
        del value["latent_avg"]
    return value


def codes(names, seed=0):
    """What `np.save` is given for codes: a dictionary of float32 [1, rows, width]."""
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal((1, ROWS, WIDTH), np.float32) for n in names}


def text(report):
    return "\n".join(report.lines())


def same(a, b):
    """Whether two trees are equal bit for bit."""
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


@pytest.fixture
def checkpoint(tmp_path):
    """A folder laid out as the published one, with a single style."""
    folder = tmp_path / "checkpoint" / "cartoon"
    folder.mkdir(parents=True)
    pt.write(folder / "generator.pt", original("generator", "dual"))
    pt.write(folder / "generator-001400.pt", {"g_ema": {}})
    pt.write(folder / "finetune-000600.pt", original("generator"))
    pt.write(folder / "sampler.pt", original("sampler_color", "sampler_structure"))
    for name in ("encoder", "encoder_w_plus"):
        file = name.replace("w_plus", "wplus")
        pt.write(folder.parent / f"{file}.pt", encoder_file(name))
    names = ("z.jpg", "a.jpg", "m.jpg")
    np.save(folder / "exstyle_code.npy", codes(names, 1))
    np.save(folder / "refined_exstyle_code.npy", codes(names[::-1], 2))
    np.save(folder / "instyle_code.npy", codes(names, 3))
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_style_becomes_one_folder(checkpoint, tmp_path, capsys):
    networks, params = small_style()
    out = tmp_path / "weights" / "cartoon"
    main([str(checkpoint), str(out)])
    printed = capsys.readouterr().out
    model, loaded = weights.load(out)
    expected = {k for k in networks if k not in ("dual_trained", "discriminator")}
    assert set(model) == expected | {"portrait_generator", "exemplars"}
    for name in expected:
        assert model[name] == networks[name]
        wanted, got = dict(params[name]), dict(loaded[name])
        if name in ("generator", "encoder"):
            # Their files have none: it is estimated, and no use is made of it.
            del wanted["w_avg"], got["w_avg"]
        assert same(wanted, got), name
    # The order is that of the refined codes, which the published command reads.
    assert model.exemplars.names == ("m.jpg", "a.jpg", "z.jpg")
    tables = {
        "extrinsic": codes(("z.jpg", "a.jpg", "m.jpg"), 1),
        "refined": codes(("m.jpg", "a.jpg", "z.jpg"), 2),
        "intrinsic": codes(("z.jpg", "a.jpg", "m.jpg"), 3),
    }
    for kind, table in tables.items():
        for style_id in (0, "a.jpg", "2"):
            code = model.exemplars.apply(
                {"params": loaded["exemplars"]}, style_id, kind
            )
            name = model.exemplars.names[model.exemplars.index(style_id)]
            np.testing.assert_array_equal(code, table[name])
    config = json.loads((out / "config.json").read_text())
    assert config["metadata"]["space"] == "z_plus"
    assert len(config["metadata"]["files"]) == 8
    assert "S-Lab" in config["metadata"]["source"]["licence"]
    for line in (
        "generator.pt: dual: 7 residual blocks, T_s of 2 layers, 1 color transforms",
        "T_s of g_ema is untrained",
        "generator.pt: no average latent: estimated",
        "encoder.pt: generator: the style has its own",
        "notes.txt: not of the files of a style",
        "generator-001400.pt: not of the files of a style",
        "refined codes: 3, 8 rows of 512",
    ):
        assert line in printed, line


def test_files_named_one_by_one(checkpoint, tmp_path):
    out = tmp_path / "out"
    files = [checkpoint / "sampler.pt", checkpoint / "exstyle_code.npy"]
    main([str(checkpoint / "generator.pt"), str(out), "--with", *map(str, files)])
    model, _ = weights.load(out)
    assert set(model) == {
        "generator",
        "dual",
        "sampler_color",
        "sampler_structure",
        "exemplars",
    }
    assert model.exemplars.names == ("z.jpg", "a.jpg", "m.jpg")


def test_codes_alone(checkpoint):
    networks, params, report = convert.load(checkpoint / "instyle_code.npy")
    assert networks["exemplars"].codes == ("intrinsic",)
    assert params["exemplars"]["intrinsic"].shape == (3, ROWS, WIDTH)
    assert report.kind == "DualStyleGAN codes"


def test_which_generator_of_a_folder(checkpoint, tmp_path):
    _, params = small_style()

    def read():
        networks, found, _ = convert.style.load([checkpoint])
        assert same(found["dual"], params["dual"])
        return networks

    (checkpoint / "generator.pt").rename(checkpoint / "generator-001500.pt")
    assert "dual_trained" not in read()
    (checkpoint / "generator-001400.pt").unlink()
    whole = original("generator", "dual", "dual_trained", "discriminator")
    pt.write(checkpoint / "generator-pretrain.pt", whole)
    assert "dual_trained" not in read()
    (checkpoint / "generator-001500.pt").unlink()
    assert {"dual_trained", "discriminator"} <= set(read())


def namespace(**values):
    """How a pickled `argparse.Namespace` looks in a file."""
    return Call(Global("argparse", "Namespace"), (), values)


def test_training_checkpoint(tmp_path):
    networks, params = small_style()
    names = ("generator", "dual", "dual_trained", "discriminator")
    value = original(*names) | {
        "g_optim": {"state": {0: {"step": 3}}, "param_groups": []},
        "d_optim": {},
        "args": namespace(iter=3000, style="cartoon"),
        "ada_aug_p": 0.0,
    }
    pt.write(tmp_path / "generator-pretrain.pt", value)
    found, got, report = convert.load(tmp_path / "generator-pretrain.pt")
    assert found == {n: networks[n] for n in names}
    for name in names[1:]:
        assert same(got[name], params[name]), name
    assert report.kind == "DualStyleGAN checkpoint"
    for line in (
        "args: training options",
        "g_optim: optimiser state",
        "T_s of g_ema is untrained: its biases are exactly 0",
        "T_s of g lies 14",
    ):
        assert line in text(report), line
    assert "g: raw" not in text(report) and "differ" not in text(report)
    # And back again.
    again = convert.to_pt(found, got)
    for part in ("g_ema", "g", "d"):
        assert again[part].keys() == value[part].keys()
        assert same(again[part], value[part])
    value["g"] = value["g"] | {
        "generator.input.input": 0 * value["g"]["generator.input.input"]
    }
    pt.write(tmp_path / "generator-pretrain.pt", value)
    _, _, report = convert.load(tmp_path / "generator-pretrain.pt")
    assert "base generators of g_ema and g differ" in text(report)


def test_trained_structure_transform_is_not_called_untrained(tmp_path):
    value = original("generator", "dual")
    value["g_ema"]["style.2.bias"] = np.ones(WIDTH, np.float32)
    pt.write(tmp_path / "a.pt", value)
    assert not convert.load(tmp_path / "a.pt")[2].notes


def test_bare_and_data_parallel(tmp_path):
    _, params = small_style()
    state = original("generator", "dual")["g_ema"]
    for value in (
        state,
        {f"module.{k}": v for k, v in state.items()},
        {"g_ema": {f"module.{k}": v for k, v in state.items()}},
    ):
        pt.write(tmp_path / "a.pt", value)
        _, found, _ = convert.load(tmp_path / "a.pt")
        assert same(found["dual"], params["dual"])


def test_sampler_goes_both_ways(tmp_path):
    networks, params = small_style()
    value = original("sampler_color", "sampler_structure")
    pt.write(tmp_path / "a.pt", value, legacy=True)
    found, got, _ = convert.load(tmp_path / "a.pt")
    assert found == {n: networks[n] for n in value and found}
    assert all(same(got[n], params[n]) for n in found)
    again = convert.to_pt(found, got)
    assert same(again, value)
    value["color"]["lin_out.weight"] = np.zeros((7, 5), np.float32)
    pt.write(tmp_path / "a.pt", value)
    with pytest.raises(UserError, match="gives 7 numbers"):
        convert.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"res.3.conv2.1.bias": None}, "missing keys of the dual: res.3.conv2.1.bias"),
        ({"res.7.bias": None}, "missing keys of the dual: res.7.bias"),
        ({"style.2.bias": None}, "missing keys of the dual: style.2.bias"),
        ({"res.8.bias": np.zeros(3, np.float32)}, "left-over keys .*: res.8.bias"),
        ({"extra": np.zeros(3, np.float32)}, "left-over keys .*: extra"),
        ({"res.7.conv.0.weight": np.zeros(1, np.float32)}, "has 8 residual blocks"),
        ({"res.7.weight": np.zeros((512, 9), np.float32)}, "color_7"),
        ({"res.2.norm.style.weight": np.zeros(9, np.float32)}, "2 axes"),
        ({"generator.conv1.activate.bias": None}, "missing keys of the generator"),
        ({"style.1.weight": None, "style.2.weight": None}, "missing keys"),
    ],
)
def test_keys_and_shapes(tmp_path, change, message):
    state = original("generator", "dual")["g_ema"] | change
    state = {k: v for k, v in state.items() if v is not None}
    pt.write(tmp_path / "a.pt", {"g_ema": state})
    with pytest.raises(UserError, match=message):
        convert.load(tmp_path / "a.pt")


def test_folders_that_are_no_style(checkpoint, tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit):
            main([*map(str, arguments), "--check"])
        return capsys.readouterr().err

    assert "holds no generator.pt" in refused(tmp_path)
    assert "none of the files is a DualStyleGAN" in refused(
        checkpoint / "sampler.pt", "--with", checkpoint / "exstyle_code.npy"
    )
    assert "in another file already" in refused(
        checkpoint, "--with", checkpoint / "sampler.pt"
    )
    assert "second file of extrinsic codes" in refused(
        checkpoint, "--with", checkpoint / "exstyle_code.npy"
    )
    pt.write(tmp_path / "latent.pt", {"latent": np.zeros((8, 512), np.float32)})
    assert "no part of a style" in refused(checkpoint, "--with", tmp_path / "latent.pt")
    assert "for a single file" in refused(checkpoint, "--kind", "psp")
    longer = {"a": np.zeros((1, 18, WIDTH), np.float32)}
    for kind in ("exstyle", "refined_exstyle", "instyle"):
        np.save(checkpoint / f"{kind}_code.npy", longer)
    assert "exemplars has codes of 18 rows, the generator takes 8" in refused(
        checkpoint
    )


def test_tables_that_do_not_agree(checkpoint):
    np.save(checkpoint / "refined_exstyle_code.npy", codes(("a.jpg", "new.jpg"), 2))
    networks, params, report = convert.style.load([checkpoint])
    assert networks["exemplars"].names == ("a.jpg", "new.jpg", "z.jpg", "m.jpg")
    assert "2 of 4 refined codes are missing" in text(report)
    table = codes(("z.jpg", "a.jpg", "m.jpg"), 1)
    np.testing.assert_array_equal(params["exemplars"]["refined"][3], table["m.jpg"][0])


# Pickled dictionaries of codes


def saved(value):
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


@pytest.mark.parametrize("protocol", [3, 4])
def test_codes_are_read_in_order(protocol):
    value = codes(("b", "a", "c"))
    file = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": ()}
    np.lib.format.write_array_header_1_0(file, header)
    pickle.dump(np.array(value, dtype=object), file, protocol=protocol)
    for data in (file.getvalue(), npy.dump(value), saved(value)):
        found = npy.read(memoryview(data))
        assert list(found) == list(value)
        assert same(found, value)
    read = np.load(io.BytesIO(npy.dump(value)), allow_pickle=True).item()
    assert list(read) == list(value) and same(read, value)


class Canary:
    """An object whose unpickling touches a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def again_and_again():
    """One array of a megabyte under ten thousand names."""
    array = np.zeros((1, 512, 512), np.float32)
    return {f"{i}": array for i in range(10_000)}


def with_order(order):
    """Codes that claim another byte order."""
    state = (3, order, None, None, None, -1, -1, 0)
    return npy.dump(codes("a")).replace(
        pickles.dump(list(state))[4:-2], pickles.dump([3, ">", *state[2:]])[4:-2]
    )


HOSTILE = {
    "canary": (lambda path: saved({"a": Canary(path)}), "refused global"),
    "canary beside": (
        lambda path: saved({**codes("a"), "b": Canary(path)}),
        "refused global",
    ),
    "integers": (
        lambda _: saved({"a": np.zeros((1, 8, 4), np.int64)}),
        "not of floats",
    ),
    "text": (lambda _: saved({"a": "b"}), "no array"),
    "objects": (lambda _: saved({"a": np.array(None)}), "not of floats"),
    "columns": (
        lambda _: saved({"a": np.zeros((8, 4), np.float32, "F")}),
        "another order",
    ),
    "big-endian": (
        lambda _: saved({"a": np.zeros((1, 8, 4), ">f4")}),
        "another order|not of floats",
    ),
    "plain array": (lambda _: saved(np.zeros(3, np.float32)), "array of <f4"),
    "list": (
        lambda _: saved(np.array([None, 1], dtype=object)),
        r"array of \|O \(2,\)",
    ),
    "names": (lambda _: saved({1: np.zeros((1, 8, 4), np.float32)}), "by name"),
    "nothing": (lambda _: saved({}), "shapes"),
    "repeated": (lambda _: saved(again_and_again()), "used again"),
    "two widths": (
        lambda _: saved(
            {"a": np.zeros((1, 8, 4), "f4"), "b": np.zeros((1, 8, 5), "f4")}
        ),
        "shapes",
    ),
    "a batch": (lambda _: saved({"a": np.zeros((2, 8, 4), "f4")}), "numbers a code"),
    "not finite": (lambda _: saved({"a": np.full((1, 8, 4), np.nan, "f4")}), "finite"),
    "rest": (lambda _: saved(codes("a")) + b"x", "follow its pickle"),
    "header": (lambda _: b"\x93NUMPY\x01\x00\xff\xff" + b"{" * 70_000, "header"),
    "version": (lambda _: b"\x93NUMPY\x09\x00" + bytes(90), "header"),
    "half": (lambda _: saved(codes("ab"))[:20_000], "damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_codes(tmp_path, capsys, case):
    make, message = HOSTILE[case]
    path, canary = tmp_path / "exstyle_code.npy", tmp_path / "canary"
    path.write_bytes(make(canary))
    with pytest.raises(UserError, match=message):
        convert.load(path)
    with pytest.raises(SystemExit) as stop:
        main([str(path), str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [path]


def test_random_damage_never_escapes(tmp_path):
    path = tmp_path / "exstyle_code.npy"
    whole = saved({n: np.ones((1, 2, 3), np.float32) for n in "abc"})
    rng = np.random.default_rng(0)
    for _ in range(600):
        evil = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            evil[rng.integers(len(evil))] = rng.integers(256)
        path.write_bytes(evil)
        try:
            convert.load(path)
        except UserError as error:
            assert str(error)
