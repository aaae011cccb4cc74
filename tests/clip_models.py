"""CLIP models for tests: those of the golden data, a small one, and files of them."""

import functools
import io
import json
import math
import struct
import zipfile
import zlib

import flax.serialization
import jax
import numpy as np

from convert import clip, pickles, pt
from convert.layouts import put, to_state
from convert.pickles import Call, Global, Persistent
from jaxstyle.features.clip import CLIP
from tests.filled import GOLDEN, draw, nhwc

SMALL = CLIP(
    image_size=32,
    patch_size=16,
    vision_width=16,
    vision_layers=2,
    vision_heads=2,
    vision_mlp=24,
    text_width=12,
    text_layers=3,
    text_heads=3,
    text_mlp=20,
    vocab_size=600,
    context_length=20,
    embed_dim=8,
)


@functools.lru_cache(maxsize=2)
def golden_clip(name):
    """State dict and config of a manifest, filled by the rule of the golden data."""
    path = GOLDEN / "manifests" / f"{name}.json"
    manifest = json.loads(path.read_text())
    state = {}
    for key, entry in manifest["keys"].items():
        fill, shape = entry["fill"], tuple(entry["shape"])
        if "const" in fill:
            array = np.full(shape, fill["const"], np.float32)
        else:
            scale, offset = (np.float32(fill["normal"][k]) for k in ("scale", "offset"))
            array = scale * draw("clip", key, shape)
            array = array + offset if offset else array
        assert zlib.crc32(np.ascontiguousarray(array)) == entry["crc32"], key
        state[key] = array
    return state, manifest["config"]


def test_image(key, batch, height, width=None):
    """A picture [batch, height, width, 3] of the golden data; it leaves [-1, 1]."""
    width = width or height
    coarse = draw("clip", f"{key}:coarse", (batch, 3, 16, 16))
    fine = draw("clip", f"{key}:fine", (batch, 3, height, width))
    rows, columns = math.ceil(height / 16), math.ceil(width / 16)
    coarse = coarse.repeat(rows, 2).repeat(columns, 3)[:, :, :height, :width]
    mixed = np.float32(0.6) * coarse + np.float32(0.15) * fine
    return nhwc(np.clip(mixed, -1.25, 1.25))


test_image.__test__ = False


@functools.cache
def small_params():
    """Random parameters of `SMALL`."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: SMALL.init_params(key=jax.random.key(0)))
    return jax.tree.map(
        lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes
    )


def small_state():
    """`small_params` under Hugging Face's names."""
    params = {
        tower: dict(p) if isinstance(p, dict) else p
        for tower, p in small_params().items()
    }
    for tower, count in (("vision", 2), ("text", 3)):
        layers = params[tower]["layers"]
        params[tower]["layers"] = {
            str(i): jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)
        }
    return to_state(params, clip.table(2, 3))


def small_config():
    """The config.json of `SMALL`."""
    towers = {
        f"{name}_config": {
            "hidden_size": getattr(SMALL, f"{name}_width"),
            "num_attention_heads": getattr(SMALL, f"{name}_heads"),
            "num_hidden_layers": getattr(SMALL, f"{name}_layers"),
        }
        for name in ("vision", "text")
    }
    # As in the hub's configs of OpenAI's models, where it is wrong.
    towers["text_config"] |= {"eos_token_id": 2, "vocab_size": 600}
    return {"model_type": "clip", "projection_dim": 8} | towers


def to_openai(state):
    """A state dict with Hugging Face's names under OpenAI's."""
    outer = {v: k for k, v in clip._OUTER.items()}
    transposed = {v: k for k, v in clip._TRANSPOSED.items()}
    out = {}
    for key, value in state.items():
        if key in transposed:
            out[transposed[key]] = np.ascontiguousarray(value.T)
            continue
        if key in outer:
            out[outer[key]] = value
            continue
        tower, _, _, number, *part, leaf = key.split(".")
        start = "visual." if tower == "vision_model" else ""
        start = f"{start}transformer.resblocks.{number}"
        part = ".".join(part)
        if part in clip._PARTS:
            out[f"{start}.{clip._PARTS[part]}.{leaf}"] = value
        elif part.endswith("q_proj"):
            parts = [state[key.replace("q_proj", f"{n}_proj")] for n in "qkv"]
            out[f"{start}.attn.in_proj_{leaf}"] = np.concatenate(parts)
    return out


def write_safetensors(path, state, header=None):
    """A safetensors file; `header` changes the header's dict before it is written."""
    entries, contents, place = {"__metadata__": {"format": "pt"}}, [], 0
    names = {"float32": "F32", "float16": "F16", "int64": "I64", "bfloat16": "BF16"}
    for key, array in state.items():
        data = np.ascontiguousarray(array).tobytes()
        entries[key] = {
            "dtype": names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [place, place + len(data)],
        }
        contents.append(data)
        place += len(data)
    if header:
        header(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(contents))
    return path


def write_msgpack(path, state):
    """A Flax file as FlaxCLIPModel wrote it."""
    tree = {}
    for key, array in state.items():
        name = "bias" if key.endswith("bias") else key.rpartition(".")[2]
        if array.ndim == 4:
            array, name = array.transpose(2, 3, 1, 0), "kernel"
        elif "norm" in key or "layrnorm" in key:
            name = "bias" if name == "bias" else "scale"
        elif key.endswith("embedding.weight"):
            name = "embedding"
        elif array.ndim == 2:
            array, name = array.T, "kernel"
        array = np.ascontiguousarray(array) if array.ndim else array
        put(tree, (*key.split(".")[:-1], name), array)
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    return path


def write_script(path, state, extra=None, compression=zipfile.ZIP_STORED):
    """A TorchScript archive with the arrays, its program compressed as torch does."""
    arrays = []
    module = _module(state, arrays, "CLIP")
    if extra is not None:
        module.state["extra"] = extra
    with zipfile.ZipFile(path, "w", compression) as archive:

        def add(name, data, method=None):
            archive.writestr(f"model/{name}", data, method)

        add("data.pkl", pickles.dump(module))
        program = "class CLIP(Module):\n  raise SystemExit\n" * 20
        add("code/__torch__/clip/model.py", program, zipfile.ZIP_DEFLATED)
        add("code/__torch__/clip/model.py.debug_pkl", b"\x80\x02)." * 99, 8)
        for i, array in enumerate(arrays):
            add(f"data/{i}", array.tobytes())
        add("constants.pkl", pickles.dump(()))
        add("version", b"5\n")
    return path


def _module(state, arrays, name):
    """The calls that build a scripted module: a class, no arguments, and a state."""
    parts, attributes = {}, {"training": True, "_is_full_backward_hook": None}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if rest:
            parts.setdefault(head, {})[rest] = value
        else:
            attributes[head] = _tensor(value, arrays)
    attributes |= {k: _module(v, arrays, "Module") for k, v in parts.items()}
    return Call(Global(f"__torch__.clip.model.{name}", name), (), attributes)


def _tensor(value, arrays):
    if not isinstance(value, np.ndarray):
        return value
    described, _ = pt.with_tensors(np.asarray(value, order="C"))
    storage, *rest = described.arguments
    kind, dtype, _, _, count = storage.identity
    arrays.append(value)
    storage = Persistent((kind, dtype, str(len(arrays) - 1), "cuda:0", count))
    return Call(described.function, (storage, *rest))


def npz_bytes(**arrays):
    """The bytes of an .npz file."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()
