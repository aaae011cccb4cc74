"""Names of DualStyleGAN's extrinsic path and sampler, and its tables of codes."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.encoder import add_layer, add_norm
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
from jaxstyle.dualstylegan import STRUCTURE_ROWS, DualStyleGAN
from jaxstyle.errors import UserError
from jaxstyle.exemplars import CODES, Exemplars, Sampler
from jaxstyle.stylegan2 import Generator, num_ws

PARTS = ("color", "structure")


def is_dual(state: Any) -> bool:
    """Whether a state dict is that of a DualStyleGAN."""
    key = "res.0.conv.0.weight"
    return isinstance(state, dict) and (key in state or f"module.{key}" in state)


def is_sampler(value: Any) -> bool:
    """Whether an object is that of `sampler.pt`."""
    return isinstance(value, dict) and all(
        isinstance(value.get(part), dict) and "lin_out.weight" in value[part]
        for part in PARTS
    )


def dual_table(size: int, depth: int) -> Table:
    """Names of the extrinsic path: `style.*` (T_s) and `res.*` (ModRes, T_c)."""
    table: Table = {}
    for i in range(depth):
        add_layer(table, f"style.{i + 1}", ("structure", f"dense_{i}"), "dense")
    for i in range(STRUCTURE_ROWS):
        for k, conv in (("1", "conv"), ("2", "conv2")):
            path, norm = (f"modres_{i}",), conv.replace("conv", "norm")
            table[f"res.{i}.{conv}.0.weight"] = (*path, f"conv{k}", "weight"), "conv"
            table[f"res.{i}.{conv}.1.bias"] = (*path, f"conv{k}", "bias"), "vector"
            key = f"res.{i}.{norm}.style"
            add_layer(table, key, (*path, f"norm{k}"), "dense")
    for i in range(STRUCTURE_ROWS, num_ws(size)):
        add_layer(table, f"res.{i}", (f"color_{i}",), "dense")
    return table


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A DualStyleGAN's state dict as those of its generator and of the rest."""
    inner = {
        k.removeprefix("generator."): v
        for k, v in state.items()
        if k.startswith("generator.")
    }
    rest = {k: v for k, v in state.items() if not k.startswith("generator.")}
    return inner, rest


def dual(
    state: Mapping[str, Any], generator: Generator, report: Report, what: str = "dual"
) -> tuple[DualStyleGAN, dict[str, Any]]:
    """Architecture and parameters of the extrinsic path.

    Args:
      state: `style.*` and `res.*`.
      generator: of the same file.
      report: what happened.
      what: the network, for the report and errors.

    Raises:
      UserError: keys or shapes that do not fit, or another number of residual blocks.
    """
    blocks = 1 + max(
        (int(m[1]) for k in state if (m := re.match(r"res\.(\d{1,4})\.conv\.", k))),
        default=-1,
    )
    if blocks != STRUCTURE_ROWS:
        raise UserError(
            f"the {what} has {blocks} residual blocks; {STRUCTURE_ROWS} are known "
            "(res_index 6, from 32 px on)"
        )
    depth = highest(state, r"style\.(\d+)\.", 8)
    if depth < 1:
        raise UserError(f"the {what} has no structure transform (style.1.weight)")
    table = dual_table(generator.size, depth)
    check_keys(state, table, what)
    module = DualStyleGAN(
        size=generator.size,
        channel_multiplier=generator.channel_multiplier,
        channels=generator.channels,
        w_dim=generator.w_dim,
        structure_depth=depth,
    )
    params = to_params(state, table, what)
    report.read.append(
        f"{what}: {STRUCTURE_ROWS} residual blocks, T_s of {depth} layers, "
        f"{module.num_ws - STRUCTURE_ROWS} color transforms"
    )
    return module, params


def note_structure(average: Mapping[str, Any], trained: Any, report: Report) -> None:
    """Say what T_s of published averages is: the random start.

    The published training averages the residual blocks and T_c and forgets T_s.

    Args:
      average: parameters of the extrinsic path of `g_ema`.
      trained: those of `g`, if the file has it.
      report: takes the note.
    """
    layers = average["structure"].values()
    untrained = not any(layer["bias"].any() for layer in layers)
    if untrained:
        report.notes.append(
            "T_s of g_ema is untrained: its biases are exactly 0, as at the random "
            "start, for the published training never averages T_s; taken as it is, "
            "the pictures of the published files are made with it"
        )
    if trained is not None:
        moved = np.sqrt(
            sum(
                np.square(layer["weight"] - other["weight"], dtype=np.float64).sum()
                for layer, other in zip(
                    layers, trained["structure"].values(), strict=True
                )
            )
            / sum(
                np.square(layer["weight"], dtype=np.float64).sum() for layer in layers
            )
        )
        report.notes.append(f"T_s of g lies {moved:.2%} (rms) from that of g_ema")


def dual_state(module: DualStyleGAN, params: Mapping[str, Any]) -> dict[str, Any]:
    """The official state dict of our extrinsic path."""
    return to_state(params, dual_table(module.size, module.structure_depth))


def sampler_table() -> Table:
    """Names of one of the sampler's networks."""
    table: Table = {}
    for i in range(2):
        table[f"lin{i + 1}.weight"] = (f"dense_{i}", "weight"), "dense"
        add_norm(table, f"bn{i + 1}", (f"norm_{i}",))
    table["lin_out.weight"] = ("dense_2", "weight"), "dense"
    return table


def sampler(
    state: Mapping[str, Any], part: str, report: Report, w_dim: int = 512
) -> tuple[Sampler, dict[str, Any]]:
    """One network of `sampler.pt`.

    Args:
      state: its state dict.
      part: `color` or `structure`.
      report: what happened.
      w_dim: width of a code; the rows follow from it.
    """
    state = without(state, r"num_batches_tracked$", "counters of batches", report)
    what = f"sampler_{part}"
    check_keys(state, sampler_table(), what)
    width, z_dim = shape(state, "lin1.weight", 2)
    total = shape(state, "lin_out.weight", 2)[0]
    if total % w_dim:
        raise UserError(f"the {what} gives {total} numbers, not rows of {w_dim}")
    module = Sampler(rows=total // w_dim, w_dim=w_dim, z_dim=z_dim, width=width)
    report.read.append(f"{what}: {module.rows} rows from {z_dim} numbers")
    return module, to_params(state, sampler_table(), what)


def codes_of(file_name: str) -> str:
    """Which codes a `*_code.npy` holds, by its name."""
    if "refined" in file_name:
        return "refined"
    return "intrinsic" if "instyle" in file_name else "extrinsic"


def exemplars(
    tables: Mapping[str, Mapping[str, np.ndarray]], report: Report
) -> tuple[dict[str, Exemplars], dict[str, Any]]:
    """Codes by name as a table, in the order that `--style_id` counts.

    Args:
      tables: of each kind of codes (see `jaxstyle.exemplars.CODES`), [1, rows, width]
        or [rows, width] by name. The first of refined, extrinsic, intrinsic gives the
        order, names that only others have come last.
      report: what happened.

    Raises:
      UserError: no codes, codes of several shapes, or values that are not finite.
    """
    kinds = [k for k in ("refined", "extrinsic", "intrinsic") if k in tables]
    names = tuple(dict.fromkeys(name for k in kinds for name in tables[k]))
    shapes = {a.shape[-2:] for t in tables.values() for a in t.values()}
    sizes = {a.size for t in tables.values() for a in t.values()}
    if len(shapes) != 1 or len(sizes) != 1 or [2] != [len(s) for s in shapes]:
        found = sorted({a.shape for t in tables.values() for a in t.values()})
        raise UserError(f"codes of shapes {found!s:.200}; all must be [1, rows, width]")
    (rows, width) = shapes.pop()
    if sizes != {rows * width}:
        raise UserError(f"{sizes.pop()} numbers a code; they must be [1, rows, width]")
    params = {}
    for kind in (k for k in CODES if k in tables):
        lacking = [n for n in names if n not in tables[kind]]
        if lacking:
            report.notes.append(
                f"{len(lacking)} of {len(names)} {kind} codes are missing and those of "
                f"{' or '.join(k for k in kinds if k != kind)} taken: {listed(lacking)}"
            )
        found = [
            next(tables[k][n] for k in (kind, *kinds) if n in tables[k]) for n in names
        ]
        array = np.stack(found).reshape(len(names), rows, width).astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"the {kind} codes hold values that are not finite")
        params[kind] = array
        report.read.append(f"{kind} codes: {len(tables[kind])}, {rows} rows of {width}")
    module = Exemplars(names=names, num_ws=rows, z_dim=width, codes=tuple(params))
    return {"exemplars": module}, {"exemplars": params}


def sampler_state(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The official state dict of one of the sampler's networks."""
    state = to_state(params, sampler_table())
    for i in (1, 2):
        state[f"bn{i}.num_batches_tracked"] = np.array(0, np.int64)
    return state
