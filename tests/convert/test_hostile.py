"""Files made to harm: one line of error, exit code 1, nothing run, nothing written."""

import os
import pickle
import struct
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

import convert
from convert import pickles, pt
from convert.__main__ import main
from convert.pickles import Call, Global, Persistent
from jaxstyle.errors import UserError
from tests.convert.files import small_encoder_object, small_object, write_small
from tests.filled import write_nvidia

ORDERED = Global("collections", "OrderedDict")
FLOAT = Global("torch", "FloatStorage")


def refused(path, capsys, *flags):
    """Convert a file that must be refused; gives the error's line."""
    folder = path.parent
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit) as stop:
        main([str(path), str(folder / "out"), *flags])
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert not printed.out
    assert len(printed.err) < 700
    assert sorted(folder.iterdir()) == before, "something was written"
    return printed.err


def write_zip(path, pickle_bytes, storages=(), compression=zipfile.ZIP_STORED):
    """A torch archive around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle_bytes)
        for key, content in enumerate(storages):
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", b"3\n")
    return path


def tensor(offset=0, size=(2, 3), stride=(3, 1), numel=6, key="0", kind=FLOAT):
    """The calls that rebuild a tensor, with whatever numbers."""
    storage = Persistent(("storage", kind, key, "cpu", numel))
    arguments = (storage, offset, size, stride, False, Call(ORDERED, ()))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)


class Canary:
    """An object whose unpickling touches a file."""

    def __init__(self, path, function=os.system):
        self.path, self.function = path, function

    def __reduce__(self):
        argument = {
            os.system: f"touch {self.path}",
            eval: f"open({str(self.path)!r}, 'w')",
            exec: f"open({str(self.path)!r}, 'w')",
            getattr: ("text", "upper"),
            __import__: "antigravity",
        }[self.function]
        return self.function, argument if isinstance(argument, tuple) else (argument,)


@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, __import__])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "storage"])
def test_globals_are_refused(tmp_path, capsys, function, form):
    canary, path = tmp_path / "canary", tmp_path / "evil.pt"
    payload = {"g": Canary(canary, function)}
    if form == "zip":
        write_zip(path, pickle.dumps(payload, 2))
    elif form == "legacy":
        parts = [pickle.dumps(x, 2) for x in (pt.MAGIC, pt.PROTOCOL)]
        parts += [pickle.dumps({"little_endian": True}, 2), pickle.dumps(payload, 2)]
        path.write_bytes(b"".join([*parts, pickle.dumps([], 2)]))
    elif form == "pickle":
        path.write_bytes(pickle.dumps(payload, 4))
    else:
        inner = [pickle.dumps(x, 2) for x in (pt.MAGIC, pt.PROTOCOL)]
        inner += [pickle.dumps({"little_endian": True}, 2), pickle.dumps(payload, 2)]
        load = Global("torch.storage", "_load_from_bytes")
        path.write_bytes(pickles.dump({"G": Call(load, (b"".join(inner),))}))
    assert "refused global" in refused(path, capsys)
    assert not canary.exists()


def test_a_chain_of_attributes_is_no_global(tmp_path, capsys):
    name = b"\x8c\x0ctorch._utils\x8c\x09os.system\x93."
    path = write_zip(tmp_path / "evil.pt", b"\x80\x04" + name)
    assert "refused global 'torch._utils.os.system'" in refused(path, capsys)


def test_module_source_is_never_run(tmp_path, capsys):
    canary, path = tmp_path / "canary", tmp_path / "evil.pkl"
    source = f"open({str(canary)!r}, 'w').close()"
    write_nvidia(path, source, G_ema={"mapping.w_avg": np.zeros(8, np.float32)})
    refused(path, capsys)
    assert not canary.exists()


HOSTILE_TENSORS = {
    "stride outside": {"stride": (4, 1)},
    "offset outside": {"offset": 1},
    "offset far outside": {"offset": 1 << 60},
    "negative offset": {"offset": -1},
    "negative size": {"size": (-2, 3)},
    "negative stride": {"stride": (-3, 1)},
    "sizes and strides differ": {"stride": (1,)},
    "size no tuple": {"size": [2, 3]},
    "size of text": {"size": ("2", 3)},
    "true as size": {"size": (True, 3)},
    "fraction as size": {"size": (2.0, 3)},
    "huge size": {"size": (1 << 62, 3)},
    "huge broadcast": {"size": (1 << 40,), "stride": (0,)},
    "broadcast of 100 GB": {"size": (25, 10**9), "stride": (0, 0)},
    "broadcast over many axes": {"size": (1 << 12,) * 4, "stride": (0,) * 4},
    "too many axes": {"size": (1,) * 40, "stride": (0,) * 40},
    "storage larger than its bytes": {"numel": 7},
    "storage smaller than its bytes": {"numel": 5},
    "negative storage": {"numel": -1},
    "huge storage": {"numel": 1 << 62},
    "storage that is not there": {"key": "1"},
    "storage of a path": {"key": "../../../etc/passwd"},
    "storage of odd digits": {"key": "²"},
    "unknown storage type": {"kind": Global("torch", "Size")},
    "storage type as text": {"kind": "FloatStorage"},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", HOSTILE_TENSORS)
def test_tensors(tmp_path, capsys, case, legacy):
    path = tmp_path / "evil.pt"
    content = np.arange(6, dtype=np.float32).tobytes()
    value = {"g_ema": {"input.input": tensor(**HOSTILE_TENSORS[case])}}
    if legacy:
        parts = (pt.MAGIC, pt.PROTOCOL, {"little_endian": True}, value, ["0"])
        data = b"".join(map(pickles.dump, parts)) + struct.pack("<q", 6) + content
        path.write_bytes(data)
    else:
        write_zip(path, pickles.dump(value), [content])
    refused(path, capsys)


def test_many_views_of_one_storage(tmp_path, capsys):
    content = bytes(4 << 20)
    whole = tensor(size=(1 << 20,), stride=(1,), numel=1 << 20)
    value = {"g_ema": {f"style.{i}.weight": whole for i in range(100)}}
    path = write_zip(tmp_path / "evil.pt", pickles.dump(value), [content])
    assert "unfold" in refused(path, capsys)


def test_one_storage_with_two_types(tmp_path, capsys):
    other = tensor(kind=Global("torch", "IntStorage"))
    value = {"g_ema": {"input.input": tensor(), "conv1": other}}
    path = write_zip(tmp_path / "evil.pt", pickles.dump(value), [bytes(24)])
    assert "two types" in refused(path, capsys)


def zip_with(path, change):
    """A good file whose bytes `change` alters."""
    write_small(path)
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def test_compressed_entries(tmp_path, capsys):
    bomb = np.zeros(1 << 24, np.uint8).tobytes()
    value = pickles.dump({"g": tensor(size=(1 << 22,), stride=(1,), numel=1 << 22)})
    path = write_zip(tmp_path / "bomb.pt", value, [bomb], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 16
    assert "compressed" in refused(path, capsys)


def test_encrypted_entries(tmp_path, capsys):
    def encrypt(data):
        at = data.index(b"PK\1\2")
        data[at + 8] |= 1

    assert "encrypted" in refused(zip_with(tmp_path / "evil.pt", encrypt), capsys)


def test_overlapping_entries(tmp_path, capsys):
    def overlap(data):
        # The second entry of the directory points at the bytes of the first.
        first = data.index(b"PK\1\2")
        second = data.index(b"PK\1\2", first + 1)
        data[second + 42 : second + 46] = data[first + 42 : first + 46]
        for field in (slice(16, 28),):
            data[second + field.start : second + field.stop] = data[
                first + field.start : first + field.stop
            ]

    assert "overlap" in refused(zip_with(tmp_path / "evil.pt", overlap), capsys)


def test_too_many_entries(tmp_path, capsys):
    def more(data):
        at = data.rindex(b"PK\5\6")
        data[at + 8 : at + 12] = b"\xff\xfe\xff\xfe"

    assert "zip archive" in refused(zip_with(tmp_path / "evil.pt", more), capsys)


def test_an_entry_that_says_it_is_larger(tmp_path, capsys):
    def enlarge(data):
        at = data.index(b"PK\1\2")
        data[at + 20 : at + 28] = struct.pack("<II", 1 << 31, 1 << 31)

    assert "outside the file" in refused(zip_with(tmp_path / "a.pt", enlarge), capsys)


def test_a_directory_outside_the_file(tmp_path, capsys):
    def move(data):
        at = data.rindex(b"PK\5\6")
        data[at + 16 : at + 20] = struct.pack("<I", 0xFFFFFFF0)

    assert "outside the file" in refused(zip_with(tmp_path / "a.pt", move), capsys)


def test_a_changed_byte_fails_the_checksum(tmp_path, capsys):
    def flip(data):
        data[data.index(b"archive/data/0") + 40] ^= 1

    assert "checksum" in refused(zip_with(tmp_path / "evil.pt", flip), capsys)


def test_an_entry_that_occurs_twice(tmp_path, capsys):
    path = write_small(tmp_path / "evil.pt")
    with pytest.warns(UserWarning, match="Duplicate"):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("archive/data/0", b"1234")
    assert "occurs twice" in refused(path, capsys)


def test_a_big_endian_file(tmp_path, capsys):
    path = write_zip(tmp_path / "a.pt", pickles.dump({}))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", b"big")
    assert "byte order" in refused(path, capsys)


def deep(levels):
    """A list in a list in a list."""
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


def laughs(levels):
    """Each list holds the one before it twice: 2^levels leaves in a few bytes."""
    step = b"".join(
        b"0](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1])
        for i in range(levels)
    )
    return b"\x80\x02]q\x00" + step + b"."


NO_TEXT = b"\x80\x02X\xff\xff\xff\xff."
HOSTILE_PICKLES = {
    "deep nesting": deep(200_000),
    "deep tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "deep dicts": b"\x80\x02" + b"}K\x00" * 100_000 + b"}" + b"s" * 100_000 + b".",
    "memo bomb": laughs(60),
    "contains itself": b"\x80\x02]q\x00h\x00a.",
    "contains itself deeper": b"\x80\x02}q\x00X\x01\x00\x00\x00a](h\x00es.",
    "opcode bomb of dicts": b"\x80\x02(" + b"}" * 1_500_000 + b"l.",
    "opcode bomb of marks": b"\x80\x02" + b"(" * 1_500_000 + b".",
    "long text": b"\x80\x02X" + struct.pack("<I", 1 << 25) + b"a" * (1 << 25) + b".",
    "text in many pieces": b"\x80\x02("
    + (b"X" + struct.pack("<I", 1 << 20) + b"\xf0\x9f\x98\x80" * (1 << 18)) * 30
    + b"l.",
    "text longer than the file": NO_TEXT,
    "bytes longer than the file": b"\x80\x03\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "negative length": b"\x80\x02T" + struct.pack("<i", -5) + b"abc.",
    "long integer": b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".",
    "very long integer": b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + bytes(1 << 20),
    "integer in words": b"\x80\x02L" + b"9" * 4000 + b"L\n.",
    "tuple as key": b"\x80\x02})K\x01s.",
    "list as key": b"\x80\x02}]K\x01s.",
    "key twice": b"\x80\x02}(X\x01\x00\x00\x00gK\x01X\x01\x00\x00\x00gK\x02u.",
    "key without value": b"\x80\x02}(K\x01u.",
    "empty stack": b"\x80\x020.",
    "two values": b"\x80\x02NN.",
    "no value": b"\x80\x02.",
    "open mark": b"\x80\x02(N.",
    "missing mark": b"\x80\x02t.",
    "memo that is not there": b"\x80\x02h\x07.",
    "memo far away": b"\x80\x02Nr\xff\xff\xff\xffj\xfe\xff\xff\xff.",
    "items on a number": b"\x80\x02K\x01(K\x01e.",
    "call of a number": b"\x80\x02K\x01)R.",
    "state for a number": b"\x80\x02K\x01}b.",
    "state that is no dict": b"\x80\x02ccollections\nOrderedDict\n)RK\x01b.",
    "state for a type": b"\x80\x02ctorch\nFloatStorage\n}b.",
    "call of a type": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "odd arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02tR.",
    "parameter of text": b"\x80\x02ctorch._utils\n_rebuild_parameter\n(NNNtR.",
    "dict of nothing": b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
    "extension": b"\x80\x02\x82\x01.",
    "old instance": b"\x80\x02(ios\nsystem\n.",
    "keyword call": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "out of band": b"\x80\x05\x97.",
    "text id": b"\x80\x02P0\n.",
    "protocol 9": b"\x80\x09N.",
    "persistent id of text": b"\x80\x02X\x01\x00\x00\x000Q.",
    "size of nested tuples": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("
    + b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    + b"X\x03\x00\x00\x00cpuK\x00tQ"
    + b"K\x00)"
    + b"\x85" * 100_000
    + b"K\x01\x85\x89NtR.",
    "whole module": pickles.dump(Persistent(("module", "a", "b", "c"))),
    "half a line": b"\x80\x02cos",
    "line without end": b"\x80\x02c" + b"a" * 100_000,
    "bad text": b"\x80\x02X\x02\x00\x00\x00\xff\xff.",
}


# The rule that must catch it, for those that could fail for another reason.
REASONS = {
    "deep nesting": "nested deeper than",
    "deep tuples": "nested deeper than",
    "deep dicts": "nested deeper than",
    "memo bomb": "unfolds to more than",
    "contains itself": "contains itself",
    "contains itself deeper": "contains itself",
    "opcode bomb of dicts": "opcodes",
    "opcode bomb of marks": "opcodes",
    "long text": "bytes of text",
    "text in many pieces": "bytes of text",
    "bytes longer than the file": "are announced",
    "tuple as key": "key of type tuple",
    "key twice": "occurs twice",
    "size of nested tuples": "nested too deeply",
    "state for a type": "takes none",
    "whole module": "whole module",
}


@pytest.mark.parametrize("form", ["zip", "pickle"])
@pytest.mark.parametrize("case", HOSTILE_PICKLES)
def test_pickles(tmp_path, capsys, case, form):
    path, data = tmp_path / "evil.pt", HOSTILE_PICKLES[case]
    if form == "zip":
        write_zip(path, data, [b""])
    else:
        path.write_bytes(data)
    error = refused(path, capsys)
    if form == "zip" or case in ("deep nesting", "memo bomb"):
        assert REASONS.get(case, "") in error


def test_a_hidden_bomb_beside_good_weights(tmp_path, capsys):
    for data in (deep(1000), laughs(40), b"\x80\x02]q\x00h\x00a."):
        good, _ = pt.with_tensors(small_object())
        whole = pickles.dump(good)
        evil = whole[:-2] + b"X\x01\x00\x00\x00x" + data[2:-1] + b"u."
        path = tmp_path / "evil.pt"
        path.unlink(missing_ok=True)
        arrays = [a.tobytes() for a in pt.with_tensors(small_object())[1]]
        write_zip(path, evil, arrays)
        refused(path, capsys)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
def test_truncation(tmp_path, capsys, form, quarter):
    path = tmp_path / "short.pt"
    if form == "pickle":
        write_nvidia(path, G_ema={"mapping.w_avg": np.zeros(512, np.float32)})
    else:
        write_small(path, legacy=form == "legacy")
    data = path.read_bytes()
    for end in (len(data) * quarter // 4, len(data) * (quarter + 1) // 4 - 1):
        path.write_bytes(data[:end])
        refused(path, capsys)


WRONG_STARTS = {
    "noise": bytes(range(256)),
    "zeros": bytes(1000),
    "a page": b"<!DOCTYPE html><html>Quota exceeded</html>",
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "wrong magic": b"PK\x03\x05" + bytes(100),
    "zip end only": b"PK\5\6" + bytes(18),
    "text": b"hello",
    "one byte": b"\x80",
    "another number": pickles.dump(pt.MAGIC + 1) + pickles.dump(pt.PROTOCOL),
    "another version": pickles.dump(pt.MAGIC) + pickles.dump(1002) + pickles.dump({}),
    "no version": pickles.dump(pt.MAGIC),
}


@pytest.mark.parametrize("case", WRONG_STARTS)
def test_wrong_starts(tmp_path, capsys, case):
    path = tmp_path / "a.pt"
    path.write_bytes(WRONG_STARTS[case])
    refused(path, capsys)


def test_things_that_are_no_file(tmp_path, capsys):
    folder, pipe = tmp_path / "folder", tmp_path / "pipe"
    folder.mkdir()
    os.mkfifo(pipe)
    (tmp_path / "empty.pt").touch()
    for name in ("folder", "pipe", "empty.pt", "absent.pt"):
        assert name in refused(tmp_path / name, capsys)


def test_a_numpy_archive(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    assert "numpy archive" in refused(tmp_path / "a.npz", capsys)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8), np.int64),
        np.zeros((8, 8), bool),
        np.zeros((8, 8, 1), np.float32),
        np.zeros((0, 8), np.float32),
        np.full((8, 8), np.nan, np.float32),
        np.full((8, 8), np.inf, ml_dtypes.bfloat16),
        "text",
        None,
        [1, 2],
        {"a": 1},
    ],
    ids=lambda a: f"{getattr(a, 'dtype', type(a).__name__)}{np.shape(a)}",
)
def test_wrong_arrays(tmp_path, capsys, array):
    state = small_object()["g_ema"] | {"style.1.weight": array}
    path = write_small(tmp_path / "a.pt", g_ema=state)
    assert "style.1.weight" in refused(path, capsys)


def test_shapes_that_do_not_fit(tmp_path, capsys):
    state = small_object()["g_ema"]
    state["conv1.activate.bias"] = np.zeros(9, np.float32)
    path = write_small(tmp_path / "a.pt", g_ema=state)
    assert "conv_4" in refused(path, capsys)


def test_legacy_storages(tmp_path, capsys):
    value, _ = pt.with_tensors({"g": np.zeros(3, np.float32)}, (None,))
    header = (pt.MAGIC, pt.PROTOCOL, {"little_endian": True}, value)
    parts = b"".join(map(pickles.dump, header))
    content = struct.pack("<q", 3) + bytes(12)
    for keys, data in (
        (["0", "0"], content * 2),
        ([], b""),
        (["0", "1"], content * 2),
        ("0", content),
        ([0], content),
        (["0"], struct.pack("<q", -3) + bytes(12)),
        (["0"], struct.pack("<q", 4) + bytes(16)),
        (["0"], struct.pack("<q", 3) + bytes(11)),
    ):
        path = tmp_path / "a.pt"
        path.write_bytes(parts + pickles.dump(keys) + data)
        assert "storage" in refused(path, capsys)


def test_big_endian_stream(tmp_path, capsys):
    header = (pt.MAGIC, pt.PROTOCOL, {"little_endian": False}, {}, [])
    path = tmp_path / "a.pt"
    path.write_bytes(b"".join(map(pickles.dump, header)))
    assert "big-endian" in refused(path, capsys)


def test_tensorflow_pickle_names_the_route(tmp_path, capsys):
    path = tmp_path / "ffhq.pkl"
    path.write_bytes(b"\x80\x03cdnnlib.tflib.network\nNetwork\nq\x00)\x81q\x01.")
    assert "legacy.py" in refused(path, capsys)


NVIDIA = {
    "conditional": (
        {"G_ema": {"mapping.embed.weight": np.zeros((3, 3), np.float32)}},
        "class-conditional",
    ),
    "stylegan3": (
        {"G_ema": {"synthesis.L0_36_512.weight": np.zeros((3, 3), np.float32)}},
        "StyleGAN3",
    ),
    "size": ({"G_ema": {"synthesis.b96.const": np.zeros(3, np.float32)}}, "size 96"),
    "nothing": ({"training_state": {"a": np.zeros(3, np.float32)}}, "no known kind"),
}


@pytest.mark.parametrize("case", NVIDIA)
def test_nvidia_networks_we_do_not_have(tmp_path, capsys, case):
    networks, message = NVIDIA[case]
    write_nvidia(tmp_path / "a.pkl", **networks)
    assert message in refused(tmp_path / "a.pkl", capsys)


def test_nvidia_modules_of_odd_shape(tmp_path, capsys):
    rebuild = Global("torch_utils.persistence", "_reconstruct_persistent_obj")
    for meta in (
        1,
        {},
        {"state": 1, "class_name": "G"},
        {"state": {}, "class_name": 3},
        {"state": {"_modules": {"a": 1}}, "class_name": "G"},
        {"state": {"_modules": []}, "class_name": "G"},
        {"state": {"_parameters": 3}, "class_name": "G"},
        {"state": {"_parameters": {"a": "b"}}, "class_name": "G"},
    ):
        path = tmp_path / "a.pkl"
        path.write_bytes(pickles.dump({"G_ema": Call(rebuild, (meta,))}))
        refused(path, capsys)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_random_damage_never_escapes(tmp_path, form):
    path = tmp_path / "a.pt"
    if form == "pickle":
        state = {"synthesis.b4.const": np.zeros((2, 4, 4), np.float32)}
        write_nvidia(path, G_ema=state)
    else:
        state = {"style.1.weight": np.zeros((2, 2), np.float32)}
        pt.write(path, {"g": state, "args": [1, 2.5, "x"]}, legacy=form == "legacy")
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(500):
        evil = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            evil[rng.integers(len(evil))] = rng.integers(256)
        path.write_bytes(evil)
        with pytest.raises(UserError):
            convert.load(path)


def test_random_states_never_escape(tmp_path):
    """Entries that are missing, renamed, exchanged or of another kind."""
    rng = np.random.default_rng(0)
    files = [small_object(), small_encoder_object("e4e"), small_encoder_object("w")]
    odd = [None, 3, "x", [], {}, np.zeros(0), np.ones((8, 8), np.float32)]
    odd += [np.array(1, np.float32), np.zeros((1,) * 6, np.float32), np.zeros(3, int)]
    for i in range(300):
        value = {
            k: dict(v) if isinstance(v, dict) else v for k, v in files[i % 3].items()
        }
        parts = [value, *(v for v in value.values() if isinstance(v, dict) and v)]
        for part in (parts[k] for k in rng.integers(len(parts), size=3)):
            key, other = (list(part)[k] for k in rng.integers(len(part), size=2))
            match rng.integers(4):
                case 0:
                    part[key] = odd[rng.integers(len(odd))]
                case 1:
                    part[key] = part[other]
                case 2:
                    part[key.replace("1", "7")] = part[key]
                case 3 if len(part) > 1:
                    del part[key]
        pt.write(tmp_path / "a.pt", value)
        try:
            convert.load(tmp_path / "a.pt")
        except UserError as error:
            assert str(error)


MEASURE = """
import sys
from convert.__main__ import main
for path in sys.argv[2:]:
    try:
        main([path, sys.argv[1]])
    except SystemExit as stop:
        assert stop.code == 1
    else:
        raise AssertionError(path)
# ru_maxrss would count the process that started this one.
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]))
"""


def bombs(folder):
    """Files whose contents would take far more memory than they do."""
    storage = np.zeros(1 << 22, np.float32).tobytes()
    for name, data in (
        ("dicts", HOSTILE_PICKLES["opcode bomb of dicts"]),
        ("text", HOSTILE_PICKLES["text in many pieces"]),
        ("memo", laughs(60)),
        ("globals", b"\x80\x02(" + b"ctorch\nSize\n" * 900_000 + b"l."),
        ("sets", b"\x80\x04(" + b"\x8f\x94" * 450_000 + b"l."),
    ):
        (folder / name).write_bytes(data)
    # Something large, then the same call on it again and again.
    text = b"X" + struct.pack("<I", 1 << 23) + b"a" * (1 << 23)
    raw = b"".join(pt.legacy_parts(np.zeros(1 << 20, np.float32), storage_only=True))
    raw = b"B" + struct.pack("<I", len(raw)) + raw
    pairs = (b"](J" + struct.pack("<i", i) + b"Ne" for i in range(50_000))
    pairs = b"](" + b"".join(pairs) + b"e"
    keys = b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(50_000))
    for name, large, call in (
        ("encode", text, b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"),
        ("device", text, b"ctorch\ndevice\nh\x00\x85R"),
        ("nested", raw, b"ctorch.storage\n_load_from_bytes\nh\x00\x85R"),
        ("pairs", pairs, b"ccollections\nOrderedDict\nh\x00\x85R"),
        ("size", b"](" + b"K\x01" * 100_000 + b"e", b"ctorch\nSize\nh\x00\x85R"),
        ("states", b"}(" + keys + b"u", b"cargparse\nNamespace\n)\x81h\x00b"),
    ):
        data = b"\x80\x03](" + large + b"q\x00" + call * 1000 + b"e."
        (folder / name).write_bytes(data)
    value = {f"x{i}": tensor(size=(1 << 20,), stride=(0,)) for i in range(1000)}
    write_zip(folder / "views", pickles.dump({"g": value}), [bytes(24)])
    one = tensor(size=(1 << 22,), stride=(1,), numel=1 << 22)
    write_zip(folder / "deflated", pickles.dump({"g": one}), [storage], 8)
    with zipfile.ZipFile(folder / "entries", "w") as archive:
        for i in range(120_000):
            archive.writestr(f"{i}", b"")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_stays_bounded(tmp_path):
    bombs(tmp_path)
    paths = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "out", *paths],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(paths)
    # Below twice the smallest file and 500 MB, the interpreter and jax included.
    smallest = min(path.stat().st_size for path in paths)
    assert int(done.stdout) * 1024 < 2 * smallest + 500e6
