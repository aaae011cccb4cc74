"""CLIP's files: OpenAI's archives, Hugging Face's folders, OpenCLIP's.

All are brought to the names of Hugging Face's PyTorch files first, so there is one
table of names. Sizes follow from the arrays; what does not (heads, activations,
colours) from the config beside the file, or from who wrote it.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert import pt, states
from convert.encoder import add_layer
from convert.layouts import Table, check_keys, highest, listed, shape, to_params
from convert.report import Report
from convert.stylegan2 import without
from jaxstyle import weights
from jaxstyle.errors import UserError, one_line
from jaxstyle.features.clip import ACTIVATIONS, CLIP
from jaxstyle.features.clip_text import (
    VOCABULARY,
    Judge,
    has_tokenizer,
    load_texts,
    transformers,
)

LICENCE = "OpenAI's: MIT; LAION's: MIT; others as their model card says"
# Names of a Hugging Face folder's weights, the first that is there is taken.
FILES = (
    "model.safetensors",
    "flax_model.msgpack",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
TOKENIZER = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
# OpenAI's names of its models, and where Hugging Face has them.
HUB = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
_EXTRA = ("preprocessor_config.json",)
_SCALARS = ("input_resolution", "context_length", "vocab_size")
_LARGEST_CONFIG = 1 << 22
_TOWERS = {"vision": "vision_model", "text": "text_model"}
# Each layer's parts, under Hugging Face's names and under OpenAI's.
_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OUTER = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}


def is_clip(state: Any) -> bool:
    """Whether named arrays are a CLIP's, in any of its layouts."""
    if not isinstance(state, Mapping) or any(type(k) is not str for k in state):
        return False
    theirs = any("vision_model.embeddings.class_embedding" in k for k in state)
    return theirs or ("visual.conv1.weight" in state and "logit_scale" in state)


def found(value: Any, path: Any, activation: str | None, report: Report):
    """The CLIP of what a file holds; see `networks`.

    Args:
      value: named arrays.
      path: of the file; configs are looked for beside it.
      activation: a key of `ACTIVATIONS`, for files that do not tell.
      report: what happened.

    Raises:
      UserError: it is no CLIP, or keys and shapes that do not fit.
    """
    if not is_clip(value):
        raise UserError(f"its keys are those of no CLIP: {listed(value)}")
    if activation not in (None, *ACTIVATIONS):
        raise UserError(
            f"activation is {activation!r}; known are {', '.join(ACTIVATIONS)}"
        )
    folder = Path(path).absolute().parent
    return networks(value, given_fields(value, folder, activation, report), report)


def is_folder(path: str | os.PathLike) -> bool:
    """Whether a path is a folder of Hugging Face's or OpenCLIP's."""
    return any(os.path.isfile(os.path.join(path, name)) for name in FILES)


def copy_tokenizer(source: str | os.PathLike, out: str | os.PathLike) -> None:
    """Keep the tokenizer files beside a source in the network folder made of it."""
    folder = Path(source) if os.path.isdir(source) else Path(source).absolute().parent
    if not has_tokenizer(folder):
        return
    (Path(out) / "tokenizer").mkdir(exist_ok=True)
    for name in TOKENIZER:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, Path(out) / "tokenizer" / name)


def arrays(data: memoryview) -> dict[str, np.ndarray]:
    """Named arrays of a safetensors or msgpack file, as in PyTorch's."""
    if states.container(data) == "safetensors":
        return states.safetensors(data)
    return from_flax(states.msgpack(data))


def weights_file(folder: str | os.PathLike) -> Path:
    """The file with the weights in a folder of Hugging Face's or OpenCLIP's.

    Raises:
      UserError: there is none of `FILES`.
    """
    folder = Path(folder)
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(
            f"{folder} is a folder without any of {', '.join(FILES)}; give a single "
            "file, or a folder of Hugging Face's"
        )
    return path


def from_flax(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a Flax file under the names and layouts of PyTorch's."""
    state = {}
    for key, array in arrays.items():
        key = key.removeprefix("params.")
        if key.endswith(".kernel"):
            array = array.T if array.ndim == 2 else np.moveaxis(array, (-1, -2), (0, 1))
        state[re.sub(r"\.(kernel|scale|embedding)$", ".weight", key)] = array
    return state


def from_openai(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with OpenAI's names under Hugging Face's."""
    state = {key.removeprefix("text."): value for key, value in state.items()}
    out = {}
    names = {theirs: ours for ours, theirs in _PARTS.items()}
    for key, value in state.items():
        layer = re.match(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(\w+)$", key)
        projection = re.match(r"(.+\.attn)\.in_proj_(weight|bias)$", key)
        if projection:
            tower, number = re.match(
                r"(visual\.)?transformer\.resblocks\.(\d+)\.", key
            ).groups()
            if np.ndim(value) < 1 or np.shape(value)[0] % 3:
                raise UserError(f"{key} has shape {list(np.shape(value))}")
            for name, part in zip("qkv", np.split(value, 3), strict=True):
                new = f"self_attn.{name}_proj.{projection[2]}"
                out[_layer_key(tower, number, new)] = part
        elif layer:
            tower, number, part, leaf = layer.groups()
            new = f"{names.get(part, part)}.{leaf}"
            out[_layer_key(tower, number, new)] = value
        elif key in _TRANSPOSED:
            out[_TRANSPOSED[key]] = np.transpose(value)
        else:
            out[_OUTER.get(key, key)] = value
    return out


def _layer_key(visual: str | None, number: str, rest: str) -> str:
    model = "vision_model" if visual else "text_model"
    return f"{model}.encoder.layers.{number}.{rest}"


def table(vision_layers: int, text_layers: int) -> Table:
    """Hugging Face's names, without the layers."""
    names: Table = {"logit_scale": (("logit_scale",), "scalar")}
    vision, text = ("vision",), ("text",)
    base = "vision_model.embeddings."
    names[base + "class_embedding"] = (*vision, "class_embedding"), "vector"
    names[base + "patch_embedding.weight"] = (*vision, "patch", "weight"), "conv"
    names[base + "position_embedding.weight"] = (
        (*vision, "position_embedding"),
        "plane",
    )
    base = "text_model.embeddings."
    names[base + "token_embedding.weight"] = (*text, "token_embedding"), "plane"
    names[base + "position_embedding.weight"] = (*text, "position_embedding"), "plane"
    _add_norm(names, "vision_model.pre_layrnorm", (*vision, "norm_in"))
    _add_norm(names, "vision_model.post_layernorm", (*vision, "norm_out"))
    _add_norm(names, "text_model.final_layer_norm", (*text, "norm_out"))
    for tower, layers in (("vision", vision_layers), ("text", text_layers)):
        key = "visual_projection" if tower == "vision" else "text_projection"
        names[f"{key}.weight"] = (tower, "projection", "weight"), "dense"
        for i in range(layers):
            key = f"{_TOWERS[tower]}.encoder.layers.{i}"
            path = (tower, "layers", str(i))
            _add_norm(names, f"{key}.layer_norm1", (*path, "norm_1"))
            _add_norm(names, f"{key}.layer_norm2", (*path, "norm_2"))
            for theirs, ours in (
                ("self_attn.q_proj", "query"),
                ("self_attn.k_proj", "key"),
                ("self_attn.v_proj", "value"),
                ("self_attn.out_proj", "out"),
                ("mlp.fc1", "mlp_in"),
                ("mlp.fc2", "mlp_out"),
            ):
                add_layer(names, f"{key}.{theirs}", (*path, ours), "dense")
    return names


def _add_norm(names: Table, key: str, path: tuple[str, ...]) -> None:
    names[f"{key}.weight"] = (*path, "scale"), "vector"
    names[f"{key}.bias"] = (*path, "bias"), "vector"


def networks(state: Mapping[str, Any], given: Mapping[str, Any], report: Report):
    """A CLIP of named arrays.

    Args:
      state: arrays under Hugging Face's or OpenAI's names.
      given: fields of `CLIP` that do not follow from them.
      report: what happened.

    Returns:
      Modules and parameters by name, `clip`.

    Raises:
      UserError: keys or shapes that do not fit; one of OpenAI's residual networks.
    """
    if any(key.startswith("visual.layer1.") for key in state):
        raise UserError(
            "it is a CLIP whose vision tower is a residual network (RN50 ...); only "
            "transformers are read (ViT-B/32, ViT-B/16, ViT-L/14)"
        )
    report.kind, report.licence = "CLIP in Hugging Face's layout", LICENCE
    if "visual.conv1.weight" in state:
        report.kind = "CLIP in OpenAI's layout"
        drop = rf"^({'|'.join(_SCALARS)})$|(^|\.)attn_mask$"
        state = without(state, drop, "they follow from the other arrays", report)
        state = from_openai(state)
    state = without(state, r"\.position_ids$", "counters", report)
    layers = {
        tower: highest(state, rf"{model}\.encoder\.layers\.(\d+)\.", 200) + 1
        for tower, model in _TOWERS.items()
    }
    names = table(layers["vision"], layers["text"])
    check_keys(state, names, "CLIP, in Hugging Face's names")
    fields = _fields(state, layers) | dict(given)
    params = to_params(state, names, "CLIP")
    for tower in _TOWERS:
        stack = params[tower]["layers"].values()
        try:
            params[tower]["layers"] = jax.tree.map(lambda *x: np.stack(x), *stack)
        except ValueError:
            raise UserError(f"layers of the {tower} tower differ in shape") from None
    module = CLIP(**fields)
    report.read.append(
        f"CLIP: ViT of {module.vision_layers} layers, {module.vision_width} wide, "
        f"patches of {module.patch_size} in {module.image_size} px; text of "
        f"{module.text_layers} layers, {module.text_width} wide; {module.embed_dim} "
        f"numbers a picture or sentence; {module.vision_activation}"
    )
    return {"clip": module}, {"clip": params}


def _fields(state: Mapping[str, Any], layers: Mapping[str, int]) -> dict[str, Any]:
    """Fields of `CLIP` that follow from the shapes of its arrays."""
    if not min(layers.values()):
        raise UserError("a tower of it has no layers")
    width, channels, patch, patch_width = shape(
        state, "vision_model.embeddings.patch_embedding.weight", 4
    )
    if channels != 3 or patch != patch_width:
        raise UserError(
            f"its patches have {channels} channels and {patch} x {patch_width} pixels; "
            "only square ones of 3 channels are read"
        )
    key = "vision_model.embeddings.position_embedding.weight"
    places = shape(state, key, 2)[0] - 1
    side = round(places**0.5)
    if side * side != places or not side:
        raise UserError(f"{key} has {places} places for patches, which is no square")
    key = "text_model.embeddings.token_embedding.weight"
    vocab_size, text_width = shape(state, key, 2)
    key = "text_model.embeddings.position_embedding.weight"
    fields = {
        "image_size": side * patch,
        "patch_size": patch,
        "vision_width": width,
        "text_width": text_width,
        "vocab_size": vocab_size,
        "context_length": shape(state, key, 2)[0],
        "embed_dim": shape(state, "text_projection.weight", 2)[0],
        # OpenAI's rule, where no config says otherwise.
        "vision_heads": max(width // 64, 1),
        "text_heads": max(text_width // 64, 1),
    }
    for tower, model in _TOWERS.items():
        key = f"{model}.encoder.layers.0.mlp.fc1.weight"
        fields[f"{tower}_mlp"] = shape(state, key, 2)[0]
        fields[f"{tower}_layers"] = layers[tower]
    return fields


def given_fields(
    value: Mapping[str, Any], folder: Path, activation: str | None, report: Report
) -> dict[str, Any]:
    """Fields of `CLIP` that its arrays do not tell.

    Args:
      value: the arrays.
      folder: where the file lies: configs are looked for beside it.
      activation: what the user says.
      report: what happened.

    Raises:
      UserError: nothing tells the activation; a damaged config.
    """
    fields: dict[str, Any] = {}
    openai = "visual.conv1.weight" in value
    if isinstance(value, pt.Script) or openai and set(_SCALARS) & set(value):
        source = "OpenAI's own file"
        fields = dict.fromkeys(("vision_activation", "text_activation"), "quick_gelu")
    elif openai and (config := _config(folder / "open_clip_config.json")):
        source, fields = "open_clip_config.json", _open_clip(config)
    elif (config := _config(folder / "config.json")) and "vision_config" in config:
        source, fields = "config.json", _hugging_face(config)
    elif activation is None:
        wanted = "open_clip_config.json" if openai else "config.json"
        raise UserError(
            "its arrays do not tell the activation of a CLIP, and there is no "
            f"{wanted} beside it; put it there, or pass --activation quick_gelu "
            "(OpenAI's) or gelu (LAION's)"
        )
    if activation:
        source = "--activation"
        fields["vision_activation"] = fields["text_activation"] = activation
    for tower in _TOWERS:
        name = fields[f"{tower}_activation"]
        if name not in ACTIVATIONS:
            raise UserError(
                f"its {tower} activation is {name!r:.40}; known are "
                f"{', '.join(ACTIVATIONS)}"
            )
    config = _config(folder / "preprocessor_config.json")
    if not openai and config:
        colours = ("image_mean", "mean"), ("image_std", "deviation")
        fields |= _triples(config, colours, "preprocessor_config.json")
    report.notes.append(f"activation {fields['vision_activation']}: {source}")
    return fields


def _config(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} if there is none."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _LARGEST_CONFIG:
        raise UserError(f"{path.name} beside it has more than {_LARGEST_CONFIG} bytes")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path.name} beside it is not JSON: {e}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path.name} beside it is no JSON object")
    return config


def _hugging_face(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields from a config.json, its defaults those of `transformers`."""
    try:
        clip = transformers().CLIPConfig(**config)
        fields = {
            f"{tower}_{ours}": getattr(getattr(clip, f"{tower}_config"), theirs)
            for tower in _TOWERS
            for ours, theirs in (
                ("heads", "num_attention_heads"),
                ("activation", "hidden_act"),
                ("eps", "layer_norm_eps"),
            )
        }
        end, size = clip.text_config.eos_token_id, clip.text_config.vocab_size
    except Exception as e:  # Its validation raises whatever it meets.
        raise UserError(
            f"config.json beside it is no CLIP's: {one_line(e, 200)}"
        ) from None
    for name, value in fields.items():
        kind = str if "activation" in name else int if "heads" in name else float
        if type(value) is not kind or (kind is not str and not 0 < value < 1 << 16):
            raise UserError(f"config.json beside it: {name} is {value!r:.40}")
    # The hub's configs of OpenAI's models say 2, which is wrong: their end token is the
    # largest. What is beyond the vocabulary is a default that nobody set.
    if type(end) is int and 2 < end < size and end != size - 1:
        fields["end_token"] = end
    return fields


def _open_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields from an open_clip_config.json."""
    model = config.get("model_cfg", config)
    try:
        name = "quick_gelu" if model.get("quick_gelu") else "gelu"
        fields = dict.fromkeys(("vision_activation", "text_activation"), name)
        vision, text = model["vision_cfg"], model["text_cfg"]
        if "head_width" in vision:
            fields["vision_heads"] = vision["width"] // vision["head_width"]
        if "heads" in text:
            fields["text_heads"] = int(text["heads"])
        colours = config.get("preprocess_cfg", {})
        pairs = ("mean", "mean"), ("std", "deviation")
        return fields | _triples(colours, pairs, "open_clip_config.json")
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise UserError(
            f"open_clip_config.json beside it is damaged: {one_line(repr(e), 120)}"
        ) from None


def _triples(config: Mapping[str, Any], pairs: Any, file: str) -> dict[str, Any]:
    fields = {}
    for theirs, ours in pairs:
        value = config.get(theirs)
        if value is None:
            continue
        try:
            triple = tuple(float(x) for x in value)
        except (TypeError, ValueError):
            triple = ()
        low = 0 if ours == "deviation" else -10
        if len(triple) != 3 or not all(low < x < 10 for x in triple):
            raise UserError(f"{file} beside it: {theirs} is {value!r:.60}")
        fields[ours] = triple
    return fields


def load_clip(
    source: str | os.PathLike,
    *,
    vocabulary: str | os.PathLike | None = None,
    texts: str | os.PathLike | None = None,
    activation: str | None = None,
    download: bool = False,
    dtype: Any = "float32",
) -> Judge:
    """A CLIP model from wherever it is.

    Args:
      source: a folder or file of Hugging Face's (safetensors, msgpack, bin), OpenAI's
        .pt, a folder of ours, a name such as `ViT-B/32`, or a hub id such as
        `openai/clip-vit-base-patch32`, which is looked for in the local cache.
      vocabulary: tokenizer files, see `load_tokenizer`; else those beside the weights,
        else the vocabulary that ships with us.
      texts: a file of text embeddings; with one, the text tower is left out.
      activation: for a file that does not tell it.
      download: fetch a hub id that is not in the cache.
      dtype: of the matrix products.

    Raises:
      UserError: nothing there, a damaged or hostile file, another network.
    """
    name = os.fspath(source)
    path = name
    if not _is_ours(name) and not os.path.exists(name):
        path = _named(name, download)
    templates: tuple[str, ...] = ()
    if _is_ours(path):
        model, params = weights.load(path)
        beside = weights.resolve(path) / "tokenizer"
        templates = tuple(weights.read_config(path)["metadata"].get("templates", ()))
    else:
        # Not at the top: that package imports this module.
        from convert import load

        model, params, _ = load(path, activation=activation)
        beside = Path(path) if os.path.isdir(path) else Path(path).absolute().parent
    if "clip" not in model:
        raise UserError(f"CLIP {name!r}: it holds {listed(model) or 'codes'}, no CLIP")
    module, params = model["clip"].clone(dtype=dtype), params["clip"]
    if texts is not None:
        params = {k: v for k, v in params.items() if k != "text"}
    vocabulary = vocabulary or vocabulary_beside(beside)
    judge = Judge(name, module, params, vocabulary, templates=templates)
    if texts is None:
        return judge
    return dataclasses.replace(judge, texts=load_texts(texts, judge))


def _is_ours(path: str | os.PathLike) -> bool:
    """Whether it is a network folder or run of ours, or a name that ships with us."""
    try:
        weights.read_config(path)
    except UserError:
        return False
    return True


def vocabulary_beside(folder: Any) -> str | os.PathLike:
    """Tokenizer files in a folder, else what ships with us."""
    if folder.is_dir() and has_tokenizer(folder):
        return folder
    pairs = folder / "bpe_simple_vocab_16e6.txt.gz"
    return pairs if pairs.is_file() else VOCABULARY


def _named(name: str, download: bool) -> str | os.PathLike:
    """Where a name or hub id is on this machine.

    Raises:
      UserError: it is neither, or not in the cache.
    """
    repository = HUB.get(name, name)
    if name in HUB:
        stem = name.replace("/", "-")
        own = Path.home() / ".cache" / "clip" / f"{stem}.pt"
        for path in (Path("weights", stem), own):
            if path.exists():
                return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(
            f"CLIP {name!r}: no such file or folder; give one, a name ("
            f"{', '.join(HUB)}), or a hub id such as {HUB['ViT-B/32']}"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def get(file):
        try:
            return hf_hub_download(repository, file, local_files_only=not download)
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as e:
            if download and isinstance(e, LocalEntryNotFoundError | OSError):
                failures.append(e)
            return None

    failures: list[Exception] = []
    found = next(filter(None, map(get, FILES)), None)
    if found is None:
        why = f": {one_line(failures[0], 200)}" if failures else ""
        raise UserError(
            f"CLIP {name!r}: {repository} is not in the local cache of Hugging Face; "
            "--download fetches it where there is a network, or give a file: OpenAI's "
            f"ViT-B-32.pt, or a model.safetensors with its config.json{why}"
        )
    for file in ("config.json", "open_clip_config.json", *TOKENIZER, *_EXTRA):
        get(file)
    return Path(found).parent
