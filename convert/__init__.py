"""Weights of the original projects as network folders of ours, and back.

`convert.load(path)` reads a file of PyTorch or of NVIDIA without either, recognises
it by its keys, and gives modules and parameters as `jaxstyle.load` does.
"""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from convert import (
    clip,
    dualstylegan,
    encoder,
    features,
    npy,
    nvidia,
    pt,
    states,
    stylegan2,
    training,
)
from convert.layouts import FLOATS, listed
from convert.nvidia import Module
from convert.report import Report
from convert.stylegan2 import NO_DISCRIMINATOR
from jaxstyle import weights
from jaxstyle.errors import UserError

FFHQ_TERMS = (
    "if they stem from NVIDIA's FFHQ weights: Nvidia Source Code License-NC, research "
    "and evaluation only; the FFHQ pictures are CC BY-NC-SA 4.0"
)
LICENCES = {
    "rosinality": f"weights you trained are yours; {FFHQ_TERMS}",
    "encoder": f"MIT (pSp, e4e) for the code; its weights and decoder, {FFHQ_TERMS}",
    "nvidia": f"weights you trained are yours; {FFHQ_TERMS}",
    "pixels": "trunk: BSD-3 (torchvision, trained on ImageNet); heads: BSD-2 (lpips)",
    "arcface": "MIT (TreB1eN) for the code; the faces it learned from have their terms",
    "resnet": "torchvision's: BSD-3; MoCo's: CC BY-NC 4.0 (Meta), non-commercial",
    "codes": "that of the picture and of the generator it belongs to",
    "dual": f"S-Lab License 1.0, non-commercial (DualStyleGAN); the base, {FFHQ_TERMS}",
}
# Entries of training checkpoints that no network here is made of.
IGNORED = {
    "g": "raw training weights; their average g_ema is taken",
    "G": "raw training weights; their average G_ema is taken",
    "g_optim": "optimiser state; training starts with a fresh one",
    "d_optim": "optimiser state; training starts with a fresh one",
    "optimizer": "optimiser state; training starts with a fresh one",
    "discriminator_optimizer_state_dict": "optimiser state",
    "args": "training options",
    "ada_aug_p": "state of the augmentation",
    "augment_pipe": "state of the augmentation",
    "training_set_kwargs": "training options",
    "global_step": "training progress",
    "best_val_loss": "training progress",
}

Loaded = tuple[dict[str, Any], dict[str, Any], Report]


def load(
    path: str | os.PathLike,
    *,
    kind: str | None = None,
    heads: str | os.PathLike | None = None,
    activation: str | None = None,
) -> Loaded:
    """Networks and parameters of an original file.

    Args:
      path: a file of torch.save (both formats), an NVIDIA pickle, or a dictionary of
        codes (.npy).
      kind: `psp` or `e4e` for an encoder whose file does not tell.
      heads: for a trunk of torchvision, the lpips package's file of LPIPS heads.
      activation: `quick_gelu` or `gelu` for a CLIP whose file does not tell.

    Returns:
      Modules by name, their parameters (nested dicts of float32 numpy arrays), and a
      `Report`. For a file of codes or of a direction there are no modules, and the
      parameters are its arrays: `w_plus` [n, num_ws, w_dim] or `direction`
      [1 or num_ws, w_dim].

    Raises:
      UserError: no such file, a damaged or hostile one, one of an unknown kind, or
        keys and shapes that do not fit.
    """
    if os.path.isdir(path):
        path = clip.weights_file(path)
    data = pt.open_file(path)
    report = Report()
    try:
        match states.container(data) or pt.container(data):
            case "safetensors" | "msgpack":
                state = clip.arrays(data)
                networks, params = clip.found(state, path, activation, report)
            case "npy":
                name = os.path.basename(os.fspath(path))
                networks, params = dualstylegan.exemplars(
                    {dualstylegan.codes_of(name): npy.read(data)}, report
                )
                report.kind, report.licence = "DualStyleGAN codes", LICENCES["codes"]
            case "pickle":
                networks, params = _recognise(nvidia.read(data), kind, heads, report)
            case _:
                value = pt.parse(data, pt.tensor_functions(len(data)))
                if clip.is_clip(value):
                    networks, params = clip.found(value, path, activation, report)
                else:
                    networks, params = _recognise(value, kind, heads, report)
        weights.check_params(networks, params, "the file")
    except UserError as e:
        raise UserError(f"{os.fspath(path)}: {e}") from None
    report.source = {
        "file": os.path.basename(os.fspath(path)),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return networks, params, report


def _recognise(value: Any, kind: str | None, heads: Any, report: Report):
    """Networks and parameters of an object, by its keys."""
    if isinstance(value, np.ndarray):
        return _direction(value, report)
    if isinstance(value, Module):
        value = {value["class_name"]: value}
    if not isinstance(value, dict) or any(type(k) is not str for k in value):
        raise UserError(f"it holds a {type(value).__name__}, not named weights")
    if any(isinstance(v, Module) for v in value.values()):
        return _snapshot(value, report)
    if judge := _judge(value, heads, report):
        return judge
    if heads is not None:
        raise UserError("--heads is given, but it holds no AlexNet or VGG-16")
    value = _bare(value)
    if dualstylegan.is_sampler(value):
        return _sampler(value, report)
    if any(dualstylegan.is_dual(value.get(k)) for k in ("g_ema", "g")):
        return _dual(value, report)
    if isinstance(value.get("latent"), np.ndarray):
        return _codes(value, report)
    if isinstance(value.get("state_dict"), dict):
        return _encoder(value, kind, report)
    if any(isinstance(value.get(k), dict) for k in ("g_ema", "g", "d")):
        return _rosinality(value, report)
    raise UserError(
        f"its keys are those of no known file: {listed(value) or 'there are none'}"
    )


def _judge(value: Mapping[str, Any], heads: Any, report: Report):
    """A network that training compares pictures by, or None."""
    inner = value.get("state_dict")
    state = _stripped(inner if isinstance(inner, dict) else value)
    if any(key.startswith("encoder_q.") for key in state):
        report.kind, report.licence = "MoCo checkpoint", LICENCES["resnet"]
        return features.resnet(features.query_encoder(state, report), report)
    if net := features.trunk_of(state):
        report.kind, report.licence = f"torchvision {net}", LICENCES["pixels"]
        heads = None if heads is None else _stripped(pt.read(heads))
        return features.pixels(state, net, heads, report)
    if features.is_arcface(state):
        report.kind, report.licence = "ArcFace network", LICENCES["arcface"]
        return features.arcface(state, report)
    if features.is_resnet(state):
        report.kind, report.licence = "torchvision ResNet", LICENCES["resnet"]
        return features.resnet(state, report)
    if features.is_heads(state):
        raise UserError(
            "it holds LPIPS heads alone; give the file of the trunk (torchvision's "
            "alexnet or vgg16), and this one as --heads"
        )
    return None


def _bare(value: Mapping[str, Any]) -> dict[str, Any]:
    """A bare state dict wrapped as the file it would have been part of."""
    state = _stripped(value)
    if any(k.startswith(("encoder.", "decoder.")) for k in state):
        return {"state_dict": state}
    if "input.input" in state:
        return {"g": state}
    if dualstylegan.is_dual(state):
        return {"g_ema": state}
    if "final_linear.0.weight" in state:
        return {"d": state}
    if encoder.is_encoder(state):
        return {"state_dict": {f"encoder.{k}": v for k, v in state.items()}}
    return dict(value)


def _stripped(state: Any) -> dict[str, Any]:
    """A state dict with string keys, without data parallel's `module.` before them."""
    if not isinstance(state, dict) or any(type(k) is not str for k in state):
        raise UserError("a state dict without names")
    if state and all(k.startswith("module.") for k in state):
        return {k.removeprefix("module."): v for k, v in state.items()}
    return dict(state)


def _ignore(value: Mapping[str, Any], used: set[str], report: Report) -> None:
    rest = [key for key in value if key not in used]
    report.ignored += [f"{key}: {IGNORED[key]}" for key in rest if key in IGNORED]
    if unknown := [key for key in rest if key not in IGNORED]:
        report.ignored.append(f"{listed(unknown)}: not known")


def _rosinality(value, report):
    """rosinality's files and those of JoJoGAN and StyleGAN-NADA."""
    names = set(value)
    report.kind = "stylegan2-pytorch (rosinality) weights"
    if names == {"g"}:
        report.kind = "JoJoGAN style, or generator"
    elif names == {"g_ema", "g_optim"}:
        report.kind = "StyleGAN-NADA generator"
    report.licence = LICENCES["rosinality"]
    networks, params = {}, {}
    name = next((k for k in ("g_ema", "g") if isinstance(value.get(k), dict)), None)
    _ignore(value, {name, "d", "latent_avg"}, report)
    if name:
        module, p = stylegan2.generator(_stripped(value[name]), report)
        p["w_avg"] = stylegan2.average_latent(
            value.get("latent_avg"), module, p, report
        )
        networks["generator"], params["generator"] = module, p
    else:
        report.missing.append("no generator: nothing can be drawn with this file")
    if isinstance(value.get("d"), dict):
        networks["discriminator"], params["discriminator"] = stylegan2.discriminator(
            _stripped(value["d"]), report
        )
    else:
        report.missing.append(NO_DISCRIMINATOR)
    return networks, params


def _dual(value, report):
    """DualStyleGAN's `generator.pt` and its training checkpoints."""
    names = [k for k in ("g_ema", "g") if isinstance(value.get(k), dict)]
    report.kind = "DualStyleGAN checkpoint" if "g" in names else "DualStyleGAN style"
    report.licence = LICENCES["dual"]
    states = [dualstylegan.split(_stripped(value[k])) for k in names]
    inner, rest = states[0]
    generator, base = stylegan2.generator(inner, report)
    base["w_avg"] = stylegan2.average_latent(None, generator, base, report)
    module, params = dualstylegan.dual(rest, generator, report)
    networks = {"generator": generator, "dual": module}
    found = {"generator": base, "dual": params}
    if len(states) > 1:
        # Stage 3 goes on from the raw weights, not from their average.
        networks["dual_trained"], found["dual_trained"] = dualstylegan.dual(
            states[1][1], generator, report, "dual_trained"
        )
        other = states[1][0]
        if any(not np.array_equal(v, other.get(k)) for k, v in inner.items()):
            report.notes.append(
                "the base generators of g_ema and g differ; that of g_ema is taken"
            )
    dualstylegan.note_structure(params, found.get("dual_trained"), report)
    if isinstance(value.get("d"), dict):
        networks["discriminator"], found["discriminator"] = stylegan2.discriminator(
            _stripped(value["d"]), report
        )
    else:
        report.missing.append(
            "no discriminator: to train on, take generator-pretrain.pt"
        )
    _ignore(value, {*names, "d"}, report)
    return networks, found


def _sampler(value, report):
    """DualStyleGAN's `sampler.pt`."""
    report.kind, report.licence = "DualStyleGAN sampler", LICENCES["dual"]
    networks, params = {}, {}
    for part in dualstylegan.PARTS:
        name = f"sampler_{part}"
        networks[name], params[name] = dualstylegan.sampler(
            _stripped(value[part]), part, report
        )
    _ignore(value, set(dualstylegan.PARTS), report)
    return networks, params


def _snapshot(value, report):
    """NVIDIA's snapshots and single pickled networks."""
    report.kind = "NVIDIA stylegan2-ada-pytorch snapshot"
    report.licence = LICENCES["nvidia"]
    modules = {k: v for k, v in value.items() if isinstance(v, Module)}
    generator = next((k for k in ("G_ema", "G", "Generator") if k in modules), None)
    critic = next((k for k in ("D", "Discriminator") if k in modules), None)
    if generator is critic is None:
        raise UserError(f"its modules are of no known kind: {listed(modules)}")
    _ignore(value, {generator, critic}, report)
    networks, params = {}, {}
    if generator:
        state = nvidia.state_dict(modules[generator])
        networks["generator"], params["generator"] = stylegan2.nvidia_generator(
            state, report
        )
    else:
        report.missing.append("no generator: nothing can be drawn with this file")
    if critic:
        state = nvidia.state_dict(modules[critic])
        networks["discriminator"], params["discriminator"] = (
            stylegan2.nvidia_discriminator(state, report)
        )
    else:
        report.missing.append(NO_DISCRIMINATOR)
    for name in filter(None, (generator, critic)):
        for clamp in nvidia.attribute(modules[name], "conv_clamp"):
            report.notes.append(
                f"{name} clamps its layers at {clamp}; ours do not: results differ "
                "where a value is larger"
            )
        for group in nvidia.attribute(modules[name], "group_size") - {4}:
            report.notes.append(
                f"{name} takes standard deviations over {group} pictures, ours over 4"
            )
    return networks, params


def _encoder(value, kind, report):
    """Files of pSp, e4e, ReStyle: encoder, decoder, average latent, options."""
    state = _stripped(value["state_dict"])
    parts = {"encoder": {}, "decoder": {}}
    for key, array in state.items():
        part, _, rest = key.partition(".")
        if part not in parts:
            raise UserError(f"left-over keys beside encoder and decoder: {key:.80}")
        parts[part][rest] = array
    opts = value.get("opts")
    opts = opts if isinstance(opts, dict) else {}
    critic = value.get("discriminator_state_dict")
    kind = kind or _encoder_kind(parts["encoder"], opts, critic, report)
    report.kind = "e4e checkpoint" if kind == "e4e" else "pSp checkpoint"
    report.licence = LICENCES["encoder"]
    used = {"state_dict", "opts", "latent_avg", "discriminator_state_dict"}
    if parts["encoder"] and "optimizer" in value and "global_step" in value:
        used |= set(training.KEYS)
    _ignore(value, used, report)
    if opts:
        report.ignored.append("opts: training options, read only to tell the kind")

    networks, params = {}, {}
    latent_avg = value.get("latent_avg")
    if parts["decoder"]:
        module, p = stylegan2.generator(parts["decoder"], report, "decoder")
        p["w_avg"] = stylegan2.average_latent(latent_avg, module, p, report)
        networks["generator"], params["generator"] = module, p
        if latent_avg is None:
            latent_avg = p["w_avg"]
        rows = module.num_ws
    else:
        report.missing.append("no decoder: pictures need another file's generator")
        if latent_avg is not None:
            report.read.append(f"average latent: {list(np.shape(latent_avg))}")
        rows = len(np.atleast_2d(latent_avg)) if latent_avg is not None else 18
        rows = rows if rows > 1 else 18
    start = _truth(opts.get("start_from_latent_avg"), latent_avg is not None)
    if parts["encoder"]:
        cars = str(opts.get("dataset_type", "")).startswith("cars")
        module, p = encoder.encoder(
            parts["encoder"], kind, rows, start, report, cars=cars
        )
        p["w_avg"] = _rows(latent_avg, module, start, report)
        networks["encoder"], params["encoder"] = module, p
    else:
        report.missing.append("no encoder: jaxstyle.invert needs --encoder optimize")
    if isinstance(critic, dict):
        networks["latent_discriminator"], params["latent_discriminator"] = (
            encoder.latent_discriminator(_stripped(critic), report)
        )
    report.missing.append(NO_DISCRIMINATOR)
    if "encoder" in networks:
        report.training = _training(value, parts, networks, params, report)
    return networks, params


def _training(value, parts, networks, params, report):
    """Step and optimisers of a checkpoint of e4e's training."""
    module = networks["encoder"]
    table = encoder.module_table(module, params["encoder"])
    moved, critic = [training.Network("encoder", parts["encoder"], table)], None
    if g := networks.get("generator"):
        table = stylegan2.generator_table(g.size, g.mapping_depth)
        moved.append(training.Network("generator", parts["decoder"], table))
    if d := networks.get("latent_discriminator"):
        table = encoder.latent_discriminator_table(d.depth)
        state = _stripped(value["discriminator_state_dict"])
        critic = training.Network("latent_discriminator", state, table)
    return training.training(value, moved, critic, report)


def _encoder_kind(state, opts, critic, report: Report) -> str:
    """`psp` or `e4e`: their networks have the same keys."""
    name = str(opts.get("encoder_type", ""))
    editing = (
        "Encoder4Editing",
        "SingleStyleCodeEncoder",
        "ProgressiveBackboneEncoder",
        "ResNetProgressiveBackboneEncoder",
    )
    if name in editing or critic is not None:
        return "e4e"
    if name:
        return "psp"
    if "stylegan_size" in opts:
        return "e4e"
    if "styles.0.linear.weight" in state:
        report.notes.append(
            "the file does not say whether it is of pSp or of e4e; taken for pSp, "
            "--kind e4e reads it as e4e's"
        )
    return "psp"


def _truth(value: Any, default: bool) -> bool:
    """A flag of an options dict, which may hold it as text."""
    if isinstance(value, str):
        return value.strip().lower() in ("true", "1", "yes")
    return value != 0 if type(value) in (bool, int, float) else default


def _rows(latent_avg: Any, module: Any, start: bool, report: Report) -> np.ndarray:
    """The average an encoder starts from, one row a style: [num_styles, w_dim]."""
    wanted = module.num_styles
    if latent_avg is None:
        if start:
            raise UserError(
                "its codes start from an average latent, but it has neither latent_avg "
                "nor a decoder to estimate it from"
            )
        return np.zeros((wanted, module.w_dim), np.float32)
    rows = stylegan2.latent_rows(latent_avg, module.w_dim)
    if len(rows) == 1:
        return np.repeat(rows, wanted, 0)
    if len(rows) < wanted:
        raise UserError(
            f"latent_avg has {len(rows)} rows; the encoder has {wanted} styles"
        )
    return rows[:wanted]


def _direction(value, report):
    """A bare tensor: an editing direction such as e4e's age.pt."""
    if value.dtype not in FLOATS or not 1 <= value.ndim <= 3 or not value.size:
        raise UserError(
            f"it holds one array of {value.dtype} {list(value.shape)}; a direction is "
            "[w_dim] or [num_ws, w_dim]"
        )
    array = np.array(value, np.float32)
    if array.ndim == 3 and array.shape[0] != 1:
        raise UserError(f"a direction of shape {list(array.shape)} has a batch axis")
    array = array.reshape(-1, array.shape[-1])
    report.kind, report.licence = "direction in latent space", LICENCES["codes"]
    report.read.append(f"direction: {list(array.shape)}")
    return {}, {"direction": array}


def _codes(value, report):
    """An inverted picture, such as JoJoGAN's inversion_codes/*.pt."""
    latent = value["latent"]
    if latent.dtype not in FLOATS or latent.ndim not in (2, 3) or not latent.size:
        raise UserError(
            f"latent is {latent.dtype} {list(latent.shape)}; it must be "
            "[num_ws, w_dim] or [n, num_ws, w_dim]"
        )
    array = np.array(latent, np.float32)
    array = array[None] if array.ndim == 2 else array
    report.kind, report.licence = "inverted codes", LICENCES["codes"]
    report.read.append(f"w_plus: {list(array.shape)}")
    _ignore(value, {"latent"}, report)
    return {}, {"w_plus": array}


def to_pt(networks: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Our networks as the object of an original file.

    Of a DualStyleGAN style its `generator.pt` (`g_ema`, `g`, `d`) alone, of a sampler
    `sampler.pt`; with an encoder the layout of pSp and e4e (`state_dict`, `latent_avg`,
    `opts`), else rosinality's (`g_ema`, `d`, `latent_avg`).

    Raises:
      UserError: none of the networks has an original layout.
    """
    networks, params = dict(networks), jax.tree.map(np.asarray, dict(params))
    if "dual" in networks:
        return _dual_pt(networks, params)
    if "sampler_color" in networks:
        return {
            part: dualstylegan.sampler_state(params[f"sampler_{part}"])
            for part in dualstylegan.PARTS
        }
    g, d, e = (networks.get(n) for n in ("generator", "discriminator", "encoder"))
    if g is d is e is None:
        raise UserError(f"{listed(networks)}: none of these has a PyTorch layout")
    if e and len(set(e.channels)) < len(e.channels):
        raise UserError(
            f"the encoder's stages have {', '.join(map(str, e.channels))} channels; "
            "in PyTorch's layout stages of one width cannot be told apart"
        )
    generator = stylegan2.generator_state(g, params["generator"]) if g else {}
    if e is None:
        value = {"g_ema": generator} if g else {}
        if d:
            value["d"] = stylegan2.discriminator_state(d, params["discriminator"])
        if g:
            value["latent_avg"] = params["generator"]["w_avg"]
        return value
    state = {
        f"encoder.{k}": v
        for k, v in encoder.encoder_state(e, params["encoder"]).items()
    }
    state |= {f"decoder.{k}": v for k, v in generator.items()}
    value = {
        "state_dict": state,
        "latent_avg": params["encoder"]["w_avg"],
        "opts": {
            "encoder_type": encoder.official_type(e),
            "start_from_latent_avg": e.start_from_w_avg,
            "input_nc": e.in_channels,
        },
    }
    if e.rows:
        value["opts"]["dataset_type"] = "cars_encode"
    if critic := networks.get("latent_discriminator"):
        value["discriminator_state_dict"] = encoder.latent_discriminator_state(
            critic, params["latent_discriminator"]
        )
    return value


def _dual_pt(networks, params):
    """A DualStyleGAN's checkpoint."""
    base = stylegan2.generator_state(networks["generator"], params["generator"])
    base = {f"generator.{k}": v for k, v in base.items()}
    value = {
        key: base | dualstylegan.dual_state(networks[name], params[name])
        for key, name in (("g_ema", "dual"), ("g", "dual_trained"))
        if name in networks
    }
    if d := networks.get("discriminator"):
        value["d"] = stylegan2.discriminator_state(d, params["discriminator"])
    return value
