"""Names of the frozen judges in PyTorch files: AlexNet, VGG, LPIPS, ArcFace, ResNet."""

import re
from collections.abc import Mapping
from typing import Any

from convert.encoder import add_layer, add_norm, trunk_fields, trunk_table
from convert.layouts import Table, check_keys, highest, shape, to_params
from convert.report import Report
from convert.stylegan2 import without
from jaxstyle import weights
from jaxstyle.errors import UserError
from jaxstyle.features.identity import ArcFace
from jaxstyle.features.lpips import LPIPS
from jaxstyle.features.resnet import ResNet
from jaxstyle.features.vgg import TRUNKS, VGG

Loaded = tuple[dict[str, Any], dict[str, Any]]
_LAST = {"features.10.weight": "alex", "features.28.weight": "vgg16"}
_LAST |= {"features.34.weight": "vgg19"}
_FIELDS = {"alex": "alex", "vgg16": "vgg"}


def trunk_of(state: Mapping[str, Any]) -> str | None:
    """`alex`, `vgg16` or `vgg19` if the keys are torchvision's, else None."""
    net = next((n for key, n in reversed(_LAST.items()) if key in state), None)
    return net if "features.0.weight" in state else None


def is_arcface(state: Mapping[str, Any]) -> bool:
    """Whether a bare state dict is that of `model_ir_se50.pth`."""
    return "input_layer.0.weight" in state and "output_layer.3.weight" in state


def is_resnet(state: Mapping[str, Any]) -> bool:
    """Whether a bare state dict is that of a torchvision ResNet."""
    return "conv1.weight" in state and "layer4.0.conv1.weight" in state


def features_table(net: str) -> Table:
    """torchvision's `features.N`: convolutions among ReLUs and pools."""
    table, place = {}, 0
    for i, layer in enumerate(TRUNKS[net]):
        place += layer.pool
        add_layer(table, f"features.{place}", (f"conv_{i}",), "conv")
        place += 2
    return table


def heads_table() -> Table:
    """The lpips package's heads."""
    keys = [f"lin{i}.model.1.weight" for i in range(5)]
    return {key: ((f"head_{i}",), "vector_of_4") for i, key in enumerate(keys)}


def is_heads(state: Mapping[str, Any]) -> bool:
    """Whether a state dict holds LPIPS heads alone."""
    return bool(state) and state.keys() <= heads_table().keys()


def pixels(state: Mapping[str, Any], net: str, heads: Any, report: Report) -> Loaded:
    """A trunk of torchvision: LPIPS if there are heads for it, else VGG's features.

    Args:
      state: of the file; its classifier is left out.
      net: see `trunk_of`.
      heads: state dict of the lpips package's heads, or None: AlexNet's ship with us.
      report: what happened.

    Raises:
      UserError: heads of another net, keys or shapes that do not fit.
    """
    state = without(state, r"^classifier\.", "the classifier", report)
    table = features_table(net)
    check_keys(state, table, net)
    for i, layer in enumerate(TRUNKS[net]):
        key = next(k for k, (path, _) in table.items() if path == (f"conv_{i}", "bias"))
        if shape(state, key, 1) != (layer.channels,):
            raise UserError(f"{key} has {shape(state, key, 1)[0]} values in a {net}")
    params = to_params(state, table, net)
    if heads is None and net == "alex":
        _, shipped = weights.load("lpips_alexnet")
        head_params = {k: v for k, v in shipped["lpips"].items() if "head" in k}
        report.notes.append("heads: those of the LPIPS that ships with us")
    elif heads is None:
        report.read.append(f"{net}: {len(TRUNKS[net])} convolutions")
        if net == "vgg16":
            report.missing.append("no LPIPS heads: --heads FILE makes it LPIPS")
        return {"vgg": VGG(net=net)}, {"vgg": params}
    else:
        check_keys(heads, heads_table(), "LPIPS heads")
        head_params = to_params(heads, heads_table(), "LPIPS heads")
    if net not in _FIELDS:
        raise UserError(f"--heads is given, but LPIPS has no {net}")
    report.read.append(f"LPIPS: {net} and its five heads")
    return {"lpips": LPIPS(net=_FIELDS[net])}, {"lpips": params | head_params}


def arcface(state: Mapping[str, Any], report: Report) -> Loaded:
    """`model_ir_se50.pth`."""
    state = without(state, r"num_batches_tracked$", "counters of batches", report)
    fields, blocks, shortcuts = trunk_fields(state)
    table = trunk_table(blocks, shortcuts)
    add_norm(table, "output_layer.0", ("norm",))
    add_layer(table, "output_layer.3", ("dense",), "flat_7")
    add_norm(table, "output_layer.4", ("norm_out",))
    check_keys(state, table, "ArcFace network")
    if fields.pop("in_channels") != 3:
        raise UserError("an ArcFace network takes 3 channels")
    width = shape(state, "output_layer.3.weight", 2)[0]
    module = ArcFace(size=7 << len(fields["units"]), width=width, **fields)
    report.read.append(f"ArcFace: {blocks} residual blocks, {width} numbers a face")
    return {"identity": module}, {"identity": to_params(state, table, "ArcFace")}


def resnet(state: Mapping[str, Any], report: Report) -> Loaded:
    """torchvision's ResNets and MoCo's, without their last layer."""
    state = without(state, r"^fc\.", "the classifier", report)
    state = without(state, r"num_batches_tracked$", "counters of batches", report)
    units = tuple(
        max(highest(state, rf"layer{stage}\.(\d+)\.", 100) + 1, 1)
        for stage in range(1, 5)
    )
    bottleneck = "layer1.0.conv3.weight" in state
    table = resnet_table(units, bottleneck)
    check_keys(state, table, "ResNet")
    params = to_params(state, table, "ResNet")
    module = ResNet(units=units, bottleneck=bottleneck)
    layers = sum(units) * (3 if bottleneck else 2) + 2
    report.read.append(f"ResNet-{layers} without its last layer")
    return {"resnet": module}, {"resnet": params}


def resnet_table(units: tuple[int, ...], bottleneck: bool) -> Table:
    """Names of torchvision's ResNets."""
    table: Table = {"conv1.weight": (("input", "conv"), "conv")}
    add_norm(table, "bn1", ("input", "norm"))
    block = 0
    for stage, count in enumerate(units):
        for i in range(count):
            key, name = f"layer{stage + 1}.{i}", f"block_{block}"
            for j in range(3 if bottleneck else 2):
                path = (name, f"layer_{j}")
                table[f"{key}.conv{j + 1}.weight"] = (*path, "conv"), "conv"
                add_norm(table, f"{key}.bn{j + 1}", (*path, "norm"))
            if i == 0 and (bottleneck or stage):
                path = (name, "shortcut")
                table[f"{key}.downsample.0.weight"] = (*path, "conv"), "conv"
                add_norm(table, f"{key}.downsample.1", (*path, "norm"))
            block += 1
    return table


def query_encoder(state: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """The trunk of a MoCo checkpoint: its query encoder."""
    start = r"(module\.)?encoder_q\."
    rest = sorted({k.split(".")[0] for k in state if not re.match(start, k)})
    if rest:
        report.ignored.append(f"{', '.join(rest)}: MoCo's training, not the encoder")
    return {re.sub(start, "", k): v for k, v in state.items() if re.match(start, k)}
