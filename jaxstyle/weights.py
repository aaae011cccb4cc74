"""Networks on disk: a folder with `config.json` and orbax parameters.

```
ffhq/
  config.json    {"format_version": 1, "networks": {name: {"kind": …, fields}}, …}
  params/        one orbax tree, {network: {…}}
```

A training run is a folder of the same kind whose parameters are in its checkpoints.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxstyle.errors import UserError, reason
from jaxstyle.paths import is_remote, place

FORMAT_VERSION = 1
ASSETS = Path(__file__).parent / "assets"
DEFAULT = "heads"

# Modules are imported when a folder asks for them.
KINDS = {
    "stylegan2_generator": "jaxstyle.stylegan2:Generator",
    "stylegan2_discriminator": "jaxstyle.stylegan2:Discriminator",
    "psp_encoder": "jaxstyle.encoders:GradualStyleEncoder",
    "e4e_encoder": "jaxstyle.encoders:Encoder4Editing",
    "backbone_w_encoder": "jaxstyle.encoders:BackboneWEncoder",
    "backbone_w_plus_encoder": "jaxstyle.encoders:BackboneWPlusEncoder",
    "latent_discriminator": "jaxstyle.encoders:LatentDiscriminator",
    "dualstylegan": "jaxstyle.dualstylegan:DualStyleGAN",
    "exemplars": "jaxstyle.exemplars:Exemplars",
    "exemplar_sampler": "jaxstyle.exemplars:Sampler",
    "latent_mapper": "jaxstyle.mapper:Mapper",
    "lpips": "jaxstyle.features.lpips:LPIPS",
    "vgg": "jaxstyle.features.vgg:VGG",
    "arcface": "jaxstyle.features.identity:ArcFace",
    "face_descriptor": "jaxstyle.features.identity:FaceDescriptor",
    "resnet": "jaxstyle.features.resnet:ResNet",
    "tiny_face_detector": "jaxstyle.landmarks:TinyFaceDetector",
    "face_landmarks_68": "jaxstyle.landmarks:FaceLandmarks68",
    "clip": "jaxstyle.features.clip:CLIP",
}


class Networks(Mapping[str, nn.Module]):
    """Modules by name, as keys and as attributes: `model.generator`."""

    def __init__(self, networks: Mapping[str, nn.Module], where: str = "these weights"):
        self._networks = dict(networks)
        self._where = where

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self._networks:
            raise UserError(
                f"{self._where} hold no {name}; they hold {', '.join(self._networks)}"
            )
        return self._networks[name]

    def __getattr__(self, name: str) -> nn.Module:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name in self._networks

    def __iter__(self):
        return iter(self._networks)

    def __len__(self) -> int:
        return len(self._networks)


def module_config(module: nn.Module) -> dict[str, Any]:
    """A module's kind and architecture, as JSON values."""
    path = f"{type(module).__module__}:{type(module).__name__}"
    kind = next(k for k, v in KINDS.items() if v == path)
    fields = {
        f.name: getattr(module, f.name)
        for f in dataclasses.fields(module)
        if f.name not in ("parent", "name", "dtype", "remat")
    }
    return {"kind": kind} | fields


def build_module(config: Mapping[str, Any], where: str) -> nn.Module:
    """The module that `module_config` described.

    Raises:
      UserError: an unknown kind or field.
    """
    config = dict(config)
    kind = config.pop("kind", None)
    if kind not in KINDS:
        raise UserError(
            f"{where} holds a network of kind {kind!r}, which this version does not "
            f"know; it knows {', '.join(KINDS)}"
        )
    module, _, name = KINDS[kind].partition(":")
    cls = getattr(importlib.import_module(module), name)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise UserError(f"{where}: {kind} has no field {', '.join(sorted(unknown))}")
    return cls(**fields)


def resolve(name_or_path: str | os.PathLike) -> Any:
    """The folder a name or path stands for.

    A name that ships with us gives way to a network folder of that name here, but not
    to a folder of anything else: `heads` is also a likely name for pictures.

    Raises:
      UserError: nothing there; the message lists the names that ship with us.
    """
    text = os.fspath(name_or_path)
    path = place(text)
    if (path / "config.json").exists():
        return path
    known = sorted(p.parent.name for p in ASSETS.glob("*/config.json"))
    if text in known:
        return epath.Path(ASSETS / text)
    what = "has no config.json" if path.exists() else "does not exist"
    raise UserError(
        f"weights {text!r}: that folder {what}; give a folder written by "
        f"`python -m convert` or a training run, or one of {', '.join(known)}"
    )


def read_config(name_or_path: str | os.PathLike) -> dict[str, Any]:
    """The `config.json` of a network folder or run.

    Raises:
      UserError: no such folder, not JSON, or a newer format.
    """
    path = resolve(name_or_path) / "config.json"
    try:
        config = json.loads(path.read_text())
        version = config["format_version"]
        dict(config["networks"])
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is not a jaxstyle config: {e!r}") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version}; this version reads "
            f"{FORMAT_VERSION}: update jaxstyle"
        )
    return config


def config_dict(
    networks: Mapping[str, nn.Module], metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What goes into `config.json`."""
    return {
        "format_version": FORMAT_VERSION,
        "networks": {name: module_config(m) for name, m in networks.items()},
        "metadata": dict(metadata or {}),
    }


def _tree_paths(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves}


def check_params(networks: Mapping[str, nn.Module], params: Any, where: str) -> None:
    """Compare names and shapes with the architecture.

    Raises:
      UserError: a missing parameter, a left-over one, or another shape; each names
        the parameters.
    """
    for name, module in networks.items():
        wanted = _tree_paths(
            jax.eval_shape(lambda m=module: m.init_params(key=jax.random.key(0)))
        )
        got = _tree_paths(params[name])
        for kind, keys in (
            ("are missing from", wanted.keys() - got.keys()),
            ("are left over in", got.keys() - wanted.keys()),
        ):
            if keys:
                listed = ", ".join(sorted(keys)[:6]) + (" …" if len(keys) > 6 else "")
                raise UserError(
                    f"{len(keys)} parameters {kind} the {name} of {where}: {listed}"
                )
        for key, leaf in got.items():
            if tuple(leaf.shape) != tuple(wanted[key].shape):
                raise UserError(
                    f"{key} in the {name} of {where} has shape {list(leaf.shape)}; its "
                    f"config asks for {list(wanted[key].shape)}"
                )


def digest(params: Any) -> str:
    """Sixteen hex digits that change when any parameter does."""
    sha = hashlib.sha256()
    for name, leaf in sorted(_tree_paths(params).items()):
        sha.update(name.encode())
        sha.update(np.ascontiguousarray(leaf))
    return sha.hexdigest()[:16]


def save(
    path: str | os.PathLike,
    networks: Mapping[str, nn.Module],
    params: Mapping[str, Any],
    *,
    metadata: Mapping[str, Any] | None = None,
    dtype: Any = None,
    overwrite: bool = False,
) -> None:
    """Write a network folder, whole or not at all; of several processes one calls it.

    A bucket has no renaming: there `config.json`, without which nothing is a network,
    is written last.

    Args:
      path: the folder; its parent is made.
      networks: modules by name.
      params: their parameters under the same names.
      metadata: anything worth keeping beside the architecture, as JSON.
      dtype: store float parameters in this type, e.g. "float16".
      overwrite: replace an existing folder.

    Raises:
      UserError: the folder exists or cannot be written, or the parameters do not fit
        the networks.
    """
    path = place(path)
    path = path if is_remote(path) else path.resolve()
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; choose another folder or delete it")
    params = {name: params[name] for name in networks}
    check_params(networks, params, "the networks to save")

    def stored(x):
        x = np.asarray(x)
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if dtype and floating else x

    params = jax.tree.map(stored, params)
    text = json.dumps(config_dict(networks, metadata), indent=2)

    def write(folder):
        try:
            with _checkpointer() as checkpointer:
                checkpointer.save(folder / "params", params)
            (folder / "config.json").write_text(text + "\n")
        # Orbax and its threads pass on whatever the file system raised.
        except Exception as error:
            raise UserError(
                f"{path} could not be written ({reason(error)}). Make room, then give "
                "the same command"
            ) from error

    if is_remote(path):
        if path.exists():
            path.rmtree()
        write(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        write(temporary)
        # Orbax looks for this mark on object stores; it names the temporary folder.
        mark = temporary / "params" / "commit_success.txt"
        if mark.exists():
            mark.write_text("committed\n")
        os.chmod(temporary, 0o755)
        if path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checkpointer() -> ocp.Checkpointer:
    """Orbax's, for this process alone: it waits for no other, and none for it."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"save-{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def checkpoint_steps(path: Any) -> list[int]:
    """Steps of the finished checkpoints of a run folder, ascending."""
    folder = epath.Path(path) / "checkpoints"
    if not folder.exists():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def _restore(folder: Any) -> Any:
    # Restored as numpy on the host: the saving run's devices need not exist here.
    # Orbax finds nothing under a relative path.
    folder = folder if "://" in os.fspath(folder) else folder.absolute()
    # The handler itself: a checkpointer looks for metadata that a run keeps elsewhere,
    # and warns.
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        try:
            structure = handler.metadata(folder).tree
            args = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure
            )
            args = ocp.args.PyTreeRestore(restore_args=args)
            return handler.restore(folder, args=args)
        # Orbax raises many kinds, a bare Exception among them.
        except Exception as error:
            raise UserError(
                f"{folder} is damaged or incomplete ({reason(error)})"
            ) from error


def load(
    name_or_path: str | os.PathLike,
    *,
    step: int | None = None,
    style: str | int | None = None,
) -> tuple[Networks, dict[str, Any]]:
    """Networks and parameters of a network folder, a run, or a name we ship.

    Args:
      name_or_path: `heads`, `weights/ffhq`, `runs/jojo-art`.
      step: another checkpoint of a run than its last.
      style: which style of a run that trained several (`train.jojo --separate`), by
        name or number.

    Returns:
      `model`, with the modules as attributes (`model.generator`), and `params`, a
      plain nested dict by network name, float parameters in float32.

    Raises:
      UserError: nothing there, another format, or parameters that do not fit.
    """
    path = resolve(name_or_path)
    config = read_config(name_or_path)
    networks = {
        name: build_module(c, f"{path}/config.json")
        for name, c in config["networks"].items()
    }
    if (path / "params").exists():
        if step is not None:
            raise UserError(f"step is {step}, but {path} is no run: it has one version")
        params = _restore(path / "params")
    else:
        steps = checkpoint_steps(path)
        if not steps:
            raise UserError(f"{path} holds no finished checkpoint yet")
        if step is not None and step not in steps:
            raise UserError(f"step is {step}; {path} has checkpoints at {steps}")
        folder = path / "checkpoints" / str(steps[-1] if step is None else step)
        params = _restore(folder / "params")
        if (folder / "ema").exists():
            params |= _restore(folder / "ema")
        params = {name: p for name, p in params.items() if name in networks}
    params = _pick_style(params, config, style, str(path))

    params = jax.tree.map(_values, params, is_leaf=_is_packed)
    check_params(networks, params, str(path))
    return Networks(networks, str(name_or_path)), params


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, Mapping) and leaf.keys() == {"bytes", "range"}


def _values(leaf: Any) -> jax.Array:
    """A stored array, floats as float32.

    Networks of face-api.js ship as its bytes: byte * scale + offset, the two numbers
    of `range`.
    """
    if _is_packed(leaf):
        scale, offset = np.asarray(leaf["range"], np.float64)
        return jnp.asarray(leaf["bytes"] * scale + offset, jnp.float32)
    return jnp.asarray(leaf, jnp.float32 if leaf.dtype.kind in "fV" else leaf.dtype)


def _pick_style(params: Any, config: dict, style: str | int | None, where: str) -> Any:
    """One style of a run whose parameters have a leading style axis."""
    styles = config["metadata"].get("styles")
    if not styles:
        if style is not None:
            raise UserError(f"style is {style!r}, but {where} holds a single style")
        return params
    if style is None and len(styles) == 1:
        style = 0
    index = styles.index(style) if style in styles else style
    if str(index).isdigit() and int(index) < len(styles):
        return jax.tree.map(lambda x: x[int(index)], params)
    given = "not given" if style is None else repr(style)
    raise UserError(f"style is {given}; {where} holds {', '.join(styles)}")
