"""Networks and inputs of the golden data, rebuilt from their rule in numpy.

The golden files hold outputs of the original PyTorch code on weights that nobody
ships: every array of a state dict is drawn from a seed made of a prefix and its key.
`golden/manifests/*.json` list for each network one row per key:
`[key, shape, dtype, fill, crc32]`, shapes and orders as in PyTorch, `fill` being
`["normal", scale, offset]`, `["uniform", low, high]` or `["const", text]`; besides
`["plus", scale, offset]` (an offset of 0 is added too: it makes 0.0 of -0.0), `["abs",
scale, offset]` (of the absolute draw), `["eye", scale, value]` (that much of
the identity added) and `["half", scale, offset]` (the offset in the first half only).
"""

import functools
import json
import pathlib
import re
import zlib

import numpy as np

from convert import pickles, pt
from convert.pickles import Call, Global

PREFIX = "golden-v1"
GOLDEN = pathlib.Path(__file__).parent / "golden"


def generator_for(prefix, key):
    """The numpy generator of one key."""
    seed = zlib.crc32(f"{prefix}:{key}".encode())
    return np.random.Generator(np.random.PCG64(seed))


def draw(prefix, key, shape):
    """Standard normals [*shape] of one key, float32, C order."""
    return generator_for(prefix, key).standard_normal(size=shape, dtype=np.float32)


def fill_array(prefix, key, shape, dtype, fill):
    """One array [*shape] filled as its manifest row says."""
    kind, *values = fill
    if kind == "normal":
        scale, offset = np.float32(values)
        array = scale * draw(prefix, key, shape)
        # Adding 0 would turn a drawn -0.0 into 0.0 and change the checksum.
        return array + offset if offset else array
    if kind in ("plus", "abs", "eye", "half"):
        scale, value = np.float32(values)
        array = draw(prefix, key, shape)
        array = (np.abs(array) if kind == "abs" else array) * scale
        if kind == "eye":
            return array + value * np.eye(shape[0], dtype=np.float32)
        rows = slice(shape[0] // 2 if kind == "half" else None)
        array[rows] += value
        return array
    if kind == "uniform":
        low, high = values
        uniform = generator_for(prefix, key).random(size=shape, dtype=np.float32)
        return np.float32(low) + np.float32(high - low) * uniform
    taps = re.fullmatch(r"outer\(\[1,3,3,1\]\)/64\*([14])", values[0])
    if taps:
        row = np.array([1, 3, 3, 1], np.float32)
        return np.outer(row, row) / np.float32(64) * np.float32(taps[1])
    if values[0].startswith("["):
        return np.array(json.loads(values[0]), dtype).reshape(shape)
    return np.full(shape, int(values[0]), dtype)


@functools.lru_cache(maxsize=8)
def filled_state_dict(manifest_name, prefix=PREFIX, styles=None):
    """The state dict {key: array} of one network, shared and read-only.

    Args:
        manifest_name: a file of `golden/manifests` without its ending.
        prefix: base of every seed; another one gives another, held-out network.
        styles: keep only the first heads `styles.0` .. of an encoder (a full one is
            1 GB; its rows are independent of each other).

    Arrays under the default prefix are checked against the manifest's crc32.
    """
    manifest = json.loads((GOLDEN / "manifests" / f"{manifest_name}.json").read_text())
    seed_prefix = prefix + manifest["seed_prefix"].removeprefix(PREFIX)
    state = {}
    for key, shape, dtype, fill, checksum in manifest["entries"]:
        head = re.match(r"styles\.(\d+)\.", key)
        if styles is not None and head and int(head[1]) >= styles:
            continue
        array = np.asarray(fill_array(seed_prefix, key, tuple(shape), dtype, fill))
        if prefix == PREFIX and checksum is not None:
            assert zlib.crc32(array.tobytes()) == checksum, (manifest_name, key)
        array.flags.writeable = False
        state[key] = array
    return state


def input_array(name, shape, prefix=PREFIX):
    """A random input [*shape] by the name the golden README gives it."""
    return draw(prefix, f"input:{name}", shape)


def picture(name, batch, size, prefix=PREFIX):
    """A picture [batch, size, size, 3] in [-1, 1] with low and high frequencies."""
    coarse = draw(prefix, f"input:{name}:coarse", (batch, 3, 8, 8))
    fine = draw(prefix, f"input:{name}:fine", (batch, 3, size, size))
    coarse = coarse.repeat(size // 8, axis=2).repeat(size // 8, axis=3)
    mixed = np.float32(0.6) * coarse + np.float32(0.2) * fine
    return nhwc(np.clip(mixed, -1, 1))


def nhwc(array):
    """[batch, channels, height, width] as [batch, height, width, channels]."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


def golden(name):
    """The arrays of one golden file of this folder as a dict."""
    with np.load(GOLDEN / f"{name}.npz") as data:
        return dict(data)


def relative_error(actual, expected):
    """Largest difference over the largest value of the expected array."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return np.abs(actual - expected).max() / np.abs(expected).max()


# Files as the original projects write them, and what our converter makes of them


def write_rosinality(path, *, legacy=False, **entries):
    """A rosinality, JoJoGAN or StyleGAN-NADA file: `g_ema=`, `g=`, `d=` .. ."""
    pt.write(path, entries, legacy=legacy)
    return path


def write_psp(path, encoder, *, decoder=None, latent_avg=None, legacy=False, **more):
    """A pSp or e4e file; `more` are further entries such as `opts=`."""
    state = {f"encoder.{k}": v for k, v in encoder.items()}
    state |= {f"decoder.{k}": v for k, v in (decoder or {}).items()}
    more = {"opts": {}} | more
    if latent_avg is not None:
        more["latent_avg"] = latent_avg
    pt.write(path, {"state_dict": state} | more, legacy=legacy)
    return path


def write_nvidia(path, source="raise SystemExit", attributes=(), **networks):
    """An NVIDIA snapshot: `G_ema=`, `D=` .. , each a state dict with NVIDIA's names.

    Args:
      path: the file.
      source: the Python source every module carries; a reader must not run it.
      attributes: plain attributes of every module, e.g. {"conv_clamp": 256}.
      networks: state dicts by name.
    """
    names = {"D": "Discriminator"}
    snapshot = {
        key: _nvidia_module(names.get(key, "Generator"), state, source, attributes)
        for key, state in networks.items()
    }
    snapshot |= {"training_set_kwargs": {"path": "ffhq.zip"}, "augment_pipe": None}
    pathlib.Path(path).write_bytes(pickles.dump(snapshot))
    return path


def _nvidia_module(name, state, source, attributes):
    ordered = Global("collections", "OrderedDict")
    parts, arrays = {}, {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if rest:
            parts.setdefault(head, {})[rest] = value
        else:
            arrays[head] = _nvidia_tensor(value)
    scalar = Call(
        Global("numpy.core.multiarray", "scalar"),
        (Call(Global("numpy", "dtype"), ("f8", False, True)), bytes(8)),
    )
    meta = {
        "type": "class",
        "version": 6,
        "module_src": source,
        "class_name": name,
        "state": {
            "training": False,
            "_parameters": {k: v for k, v in arrays.items() if "_" not in k},
            "_buffers": {k: v for k, v in arrays.items() if "_" in k},
            "_backward_hooks": Call(ordered, ()),
            "_modules": {
                k: _nvidia_module("Layer", v, source, {}) for k, v in parts.items()
            },
            "_init_kwargs": Call(Global("dnnlib.util", "EasyDict"), ()),
            "weight_gain": scalar,
            **dict(attributes),
        },
    }
    rebuild = Global("torch_utils.persistence", "_reconstruct_persistent_obj")
    return Call(rebuild, (meta,))


def _nvidia_tensor(array):
    """A tensor whose storage is a torch file of its own, as bytes."""
    described, _ = pt.with_tensors(np.asarray(array))
    storage, *arguments = described.arguments
    parts = pt.legacy_parts(np.asarray(array), storage_only=True)
    load = Global("torch.storage", "_load_from_bytes")
    arguments = (Call(load, (b"".join(parts),)), *arguments)
    hooks = Call(Global("collections", "OrderedDict"), ())
    tensor = Call(described.function, arguments)
    parameter = Global("torch._utils", "_rebuild_parameter")
    return Call(parameter, (tensor, True, hooks))
