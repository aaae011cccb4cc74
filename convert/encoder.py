"""Names of pSp's and e4e's encoders and e4e's latent discriminator.

pSp's and e4e's pyramid encoders have the same keys and differ in how they are read;
only the file's options tell them apart.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.layouts import (
    Table,
    check_keys,
    highest,
    listed,
    shape,
    to_params,
    to_state,
)
from convert.report import Report
from convert.stylegan2 import without
from jaxstyle.encoders import (
    BackboneWEncoder,
    BackboneWPlusEncoder,
    Encoder4Editing,
    GradualStyleEncoder,
    LatentDiscriminator,
)
from jaxstyle.errors import UserError

# Rows that e4e's and ReStyle's encoders of cars see in a picture of 256.
CARS = (32, 224)

Encoder = (
    GradualStyleEncoder | Encoder4Editing | BackboneWEncoder | BackboneWPlusEncoder
)


def add_norm(table: Table, key: str, path: tuple[str, ...]) -> None:
    """Names of a batch normalisation."""
    for theirs, ours in (
        ("weight", "scale"),
        ("bias", "bias"),
        ("running_mean", "mean"),
        ("running_var", "var"),
    ):
        table[f"{key}.{theirs}"] = (*path, ours), "vector"


def add_layer(table: Table, key: str, path: tuple[str, ...], layout: str) -> None:
    """Names of a weight and its bias."""
    table[f"{key}.weight"] = (*path, "weight"), layout
    table[f"{key}.bias"] = (*path, "bias"), "vector"


def trunk_table(blocks: int, shortcuts: set[int]) -> Table:
    """Names of an IR-SE trunk.

    Args:
      blocks: residual blocks in all stages.
      shortcuts: blocks whose shortcut is a convolution.
    """
    table: Table = {"input_layer.0.weight": (("input", "conv"), "conv")}
    add_norm(table, "input_layer.1", ("input", "norm"))
    table["input_layer.2.weight"] = ("input", "slope"), "vector"
    for i in range(blocks):
        key, name = f"body.{i}.res_layer", f"body_{i}"
        add_norm(table, f"{key}.0", (name, "norm1"))
        table[f"{key}.1.weight"] = (name, "conv1"), "conv"
        table[f"{key}.2.weight"] = (name, "slope"), "vector"
        table[f"{key}.3.weight"] = (name, "conv2"), "conv"
        add_norm(table, f"{key}.4", (name, "norm2"))
        table[f"{key}.5.fc1.weight"] = (name, "se", "down"), "dense_1x1"
        table[f"{key}.5.fc2.weight"] = (name, "se", "up"), "dense_1x1"
        if i in shortcuts:
            shortcut = f"body.{i}.shortcut_layer"
            table[f"{shortcut}.0.weight"] = (name, "shortcut", "conv"), "conv"
            add_norm(table, f"{shortcut}.1", (name, "shortcut", "norm"))
    return table


def resnet_trunk_table(blocks: int, shortcuts: set[int]) -> Table:
    """Names of ReStyle's trunk of torchvision blocks; see `trunk_table`."""
    table: Table = {"conv1.weight": (("input", "conv"), "conv")}
    add_norm(table, "bn1", ("input", "norm"))
    table["relu.weight"] = ("input", "slope"), "vector"
    for i in range(blocks):
        key, name = f"body.{i}", f"body_{i}"
        for n in (1, 2):
            table[f"{key}.conv{n}.weight"] = (name, f"conv{n}"), "conv"
            add_norm(table, f"{key}.bn{n}", (name, f"norm{n}"))
        if i in shortcuts:
            path = (name, "shortcut")
            table[f"{key}.downsample.0.weight"] = (*path, "conv"), "conv"
            add_norm(table, f"{key}.downsample.1", (*path, "norm"))
    return table


TRUNKS = {"ir_se": trunk_table, "resnet": resnet_trunk_table}


def trunk_fields(state: Mapping[str, Any]) -> tuple[dict[str, Any], int, set[int]]:
    """Fields of a trunk, its number of blocks and of those with a shortcut."""
    blocks = max(highest(state, r"body\.(\d+)\.", 200) + 1, 1)
    if "body.0.conv1.weight" in state:
        return _resnet_fields(state, blocks)
    shortcuts = {
        i for i in range(blocks) if f"body.{i}.shortcut_layer.0.weight" in state
    }
    missing = [k for k in trunk_table(blocks, shortcuts) if k not in state]
    if missing:
        raise UserError(f"missing keys of the trunk: {listed(missing)}")
    starts = sorted({0} | shortcuts)
    squeezed = shape(state, "body.0.res_layer.5.fc1.weight", 4)
    channels = tuple(shape(state, f"body.{i}.res_layer.3.weight", 4)[0] for i in starts)
    ratio = squeezed[1] // squeezed[0]
    if not 1 <= ratio <= min(channels):
        raise UserError(f"body.0.res_layer.5.fc1.weight has shape {list(squeezed)}")
    fields = {
        "in_channels": shape(state, "input_layer.0.weight", 4)[1],
        "units": tuple(np.diff([*starts, blocks]).tolist()),
        "channels": channels,
        "se_ratio": ratio,
    }
    return fields, blocks, shortcuts


def _resnet_fields(state, blocks):
    shortcuts = {i for i in range(blocks) if f"body.{i}.downsample.0.weight" in state}
    missing = [k for k in resnet_trunk_table(blocks, shortcuts) if k not in state]
    if missing:
        raise UserError(f"missing keys of the trunk: {listed(missing)}")
    starts = sorted({0} | shortcuts)
    channels = tuple(shape(state, f"body.{i}.conv2.weight", 4)[0] for i in starts)
    fields = {
        "in_channels": shape(state, "conv1.weight", 4)[1],
        "units": tuple(np.diff([*starts, blocks]).tolist()),
        "channels": channels,
        "blocks": "resnet",
    }
    return fields, blocks, shortcuts


def encoder_table(
    kind: str, blocks: int, shortcuts: set[int], head_convs: list[int], laterals: int
) -> Table:
    """Names of an encoder.

    Args:
      kind: of the blocks, see `TRUNKS`.
      blocks, shortcuts: see `trunk_table`.
      head_convs: convolutions of each row's head; empty for the W baselines.
      laterals: maps that join the pyramid from below.
    """
    table = TRUNKS[kind](blocks, shortcuts)
    for k in range(1, laterals + 1):
        add_layer(table, f"latlayer{k}", (f"lateral_{k}",), "conv")
    for row, convs in enumerate(head_convs):
        for i in range(convs):
            key = f"styles.{row}.convs.{2 * i}"
            add_layer(table, key, (f"style_{row}", f"conv_{i}"), "conv")
        add_layer(table, f"styles.{row}.linear", (f"style_{row}", "dense"), "dense")
    return table


def is_encoder(state: Mapping[str, Any]) -> bool:
    """Whether a bare state dict is that of an encoder."""
    trunk = "input_layer.0.weight" in state or "body.0.conv1.weight" in state
    return trunk and ("styles.0.linear.weight" in state or "linear.weight" in state)


def encoder(
    state: Mapping[str, Any],
    kind: str,
    num_styles: int,
    start_from_w_avg: bool,
    report: Report,
    *,
    cars: bool = False,
) -> tuple[Encoder, dict[str, Any]]:
    """Architecture and parameters of an encoder, without its `w_avg`.

    Args:
      state: the part of the file that begins with `encoder.`, without that word.
      kind: `psp` or `e4e`, for the pyramid encoders.
      num_styles: rows for the W baseline, whose shapes do not tell.
      start_from_w_avg: whether its codes are offsets from the average.
      report: what happened.
      cars: it was trained on the middle rows of a square, see `CARS`.
    """
    state = without(state, r"num_batches_tracked$", "counters of batches", report)
    fields, blocks, shortcuts = trunk_fields(state)
    rows = highest(state, r"styles\.(\d+)\.", 40) + 1
    convs = [
        highest(state, rf"styles\.{row}\.convs\.(\d+)\.", 40) // 2 + 1
        for row in range(rows)
    ]
    laterals = max(highest(state, r"latlayer(\d+)\.", 8), 0)
    kind_of_trunk = fields.get("blocks", "ir_se")
    table = encoder_table(kind_of_trunk, blocks, shortcuts, convs, laterals)
    if not rows:
        add_layer(table, "linear", ("dense",), "dense")
    naive = any(k.startswith("output_layer_2.") for k in state)
    if naive:
        add_norm(table, "output_layer_2.0", ("norm",))
        add_layer(table, "output_layer_2.3", ("hidden",), "flat_7")
    check_keys(state, table, "encoder")

    fields["start_from_w_avg"] = start_from_w_avg
    if rows:
        fields |= _pyramid(state, convs, laterals, len(fields["units"]))
        if cars:
            fields["rows"] = tuple(round(n * fields["size"] / 256) for n in CARS)
            report.notes.append("it sees the middle 192 of 256 rows, as cars are wide")
        module = (Encoder4Editing if kind == "e4e" else GradualStyleEncoder)(**fields)
        name = "e4e" if kind == "e4e" else "pSp"
        name = name if laterals > 0 else f"ReStyle's {name}"
    elif naive:
        width = shape(state, "linear.weight", 2)
        module = BackboneWPlusEncoder(
            num_styles=width[0] // width[1], w_dim=width[1], **fields
        )
        name = "W+ baseline"
    else:
        width = shape(state, "linear.weight", 2)[0]
        module = BackboneWEncoder(num_styles=num_styles, w_dim=width, **fields)
        name = "W baseline"
    params = to_params(state, table, "encoder")
    report.read.append(
        f"encoder: {name}, {module.num_styles} styles, {module.in_channels} input "
        f"channels, {blocks} {'ResNet' if module.blocks == 'resnet' else 'residual'} "
        "blocks"
    )
    return module, params


def _pyramid(state, convs, laterals, stages):
    """Fields that the heads tell: rows, picture size, where the levels begin."""
    width = shape(state, "styles.0.linear.weight", 2)[0]
    begin = [
        next((i for i, n in enumerate(convs) if n == convs[0] + k), None)
        for k in range(1, laterals + 1)
    ]
    # A pyramid with few rows does not reach its finer maps.
    unread = [b for b in begin if b is None]
    default = GradualStyleEncoder.level_rows
    if unread and len(default) != laterals:
        raise UserError(f"the encoder's {len(convs)} heads do not fit its laterals")
    rows = tuple(d if b is None else b for b, d in zip(begin, default, strict=False))
    return {
        "num_styles": len(convs),
        "w_dim": width,
        "size": (1 << convs[0]) << stages,
        "level_rows": rows,
    }


def latent_discriminator(
    state: Mapping[str, Any], report: Report
) -> tuple[LatentDiscriminator, dict[str, Any]]:
    """e4e's latent discriminator."""
    depth = max(highest(state, r"mlp\.(\d+)\.", 40) // 2 + 1, 1)
    table = latent_discriminator_table(depth)
    check_keys(state, table, "latent discriminator")
    width = shape(state, "mlp.0.weight", 2)[1]
    params = to_params(state, table, "latent discriminator")
    report.read.append(f"latent discriminator: {depth} layers")
    return LatentDiscriminator(w_dim=width, depth=depth), params


def latent_discriminator_table(depth: int) -> Table:
    """Names of e4e's latent discriminator."""
    table: Table = {}
    for i in range(depth):
        add_layer(table, f"mlp.{2 * i}", (f"dense_{i}",), "dense")
    return table


def module_table(module: Encoder, params: Mapping[str, Any]) -> Table:
    """Names of an encoder of ours."""
    blocks = [n for n in params if n.startswith("body_")]
    shortcuts = {int(n[5:]) for n in blocks if "shortcut" in params[n]}
    heads = [
        sum(n.startswith("conv_") for n in params[f"style_{row}"])
        for row in range(module.num_styles if "style_0" in params else 0)
    ]
    laterals = sum(n.startswith("lateral_") for n in params)
    count = sum(module.units)
    table = encoder_table(module.blocks, count, shortcuts, heads, laterals)
    if "dense" in params:
        add_layer(table, "linear", ("dense",), "dense")
    if "norm" in params:
        add_norm(table, "output_layer_2.0", ("norm",))
        add_layer(table, "output_layer_2.3", ("hidden",), "flat_7")
    return table


def encoder_state(module: Encoder, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The official state dict of our encoder, counters of batches included."""
    if getattr(module, "pool", 7) != 7:
        raise UserError(f"the encoder pools to {module.pool} pixels, PyTorch's to 7")
    table = module_table(module, params)
    state = to_state(params, table)
    for key in [k for k in state if k.endswith(".running_mean")]:
        counter = key.replace("running_mean", "num_batches_tracked")
        state[counter] = np.array(0, np.int64)
    return state


def latent_discriminator_state(
    module: LatentDiscriminator, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The official state dict of our latent discriminator."""
    return to_state(params, latent_discriminator_table(module.depth))


def official_type(module: Encoder) -> str:
    """The option `encoder_type` that pSp, e4e and ReStyle give such an encoder."""
    name = type(module).__name__
    if getattr(module, "level_rows", None) == ():
        name += " without pyramid"
    official = {
        "GradualStyleEncoder": "GradualStyleEncoder",
        "GradualStyleEncoder without pyramid": "BackboneEncoder",
        "Encoder4Editing": "Encoder4Editing",
        "Encoder4Editing without pyramid": "ProgressiveBackboneEncoder",
        "BackboneWEncoder": "BackboneEncoderUsingLastLayerIntoW",
        "BackboneWPlusEncoder": "BackboneEncoderUsingLastLayerIntoWPlus",
    }[name]
    return f"ResNet{official}" if module.blocks == "resnet" else official
