"""Changed codes: rows mixed with those of other codes, and moves along directions.

A direction file is an `.npz` with `direction` [1 or num_ws, w_dim], as `python -m
convert age.pt directions/age.npz` writes it of a published one.
"""

import io
import math
import re
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from jaxstyle.errors import UserError


def mix_rows(
    codes: np.ndarray, other: np.ndarray, rows: Sequence[int], alpha: float = 1.0
) -> np.ndarray:
    """Codes with some rows moved to those of another code.

    Args:
      codes: w_plus [n, num_ws, w_dim].
      other: w_plus [num_ws, w_dim].
      rows: that are mixed.
      alpha: share of the other code in them.

    Returns:
      [n, num_ws, w_dim].
    """
    share = alpha * np.isin(np.arange(codes.shape[1]), rows)[:, None]
    return (codes + share * (other - codes)).astype(np.float32)


class Edit(NamedTuple):
    """A move along a direction.

    Attributes:
      label: for file names, `age+3`.
      direction: [1 or num_ws, w_dim].
      strength: how often it is added.
    """

    label: str
    direction: np.ndarray
    strength: float


def parse_edit(text: str, folder: str, num_ws: int, w_dim: int) -> Edit:
    """An edit from what a user typed: `age:+3`, or `some/where/age.npz:-1.5`.

    Args:
      text: name or path of a direction file, a colon, and the strength.
      folder: where names are looked up.
      num_ws, w_dim: of the generator's codes.

    Raises:
      UserError: another form, no such file, or one that does not fit the generator.
    """
    name, _, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not name or not math.isfinite(strength):
        raise UserError(
            f"--edit is {text!r}; it must be a direction and a strength, age:+3"
        )
    direction = read_direction(_find(name, text, folder))
    if direction.shape[1] != w_dim or direction.shape[0] not in (1, num_ws):
        raise UserError(
            f"--edit {text}: the direction has shape {list(direction.shape)}; codes of "
            f"this generator take [1, {w_dim}] or [{num_ws}, {w_dim}], one made for it"
        )
    stem = re.sub(r"[^\w.-]+", "-", epath.Path(name).stem)
    return Edit(f"{stem}{strength:+g}", direction, strength)


def _find(name: str, text: str, folder: str):
    """The file of a direction's name or path."""
    for path in (epath.Path(name), epath.Path(folder) / f"{name}.npz"):
        if path.exists() and not path.is_dir():
            break
    else:
        known = sorted(p.stem for p in epath.Path(folder).glob("*.npz"))
        there = f"it holds {', '.join(known)}" if known else "it holds none"
        stem = epath.Path(name).stem
        raise UserError(
            f"--edit {text}: no file {name}, and no {name}.npz in --directions "
            f"{folder} ({there}); of a published one `python -m convert {stem}.pt "
            f"{folder}/{stem}.npz` writes it"
        )
    if path.suffix in (".pt", ".pth"):
        raise UserError(
            f"--edit {text}: {path} is a file of PyTorch; convert it first: python -m "
            f"convert {path} {folder}/{path.stem}.npz"
        )
    return path


def read_direction(path) -> np.ndarray:
    """The direction [1 or num_ws, w_dim] of an `.npz` file, float32.

    Raises:
      UserError: another kind of file, another shape, or values that are not finite.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            array = np.asarray(file["direction"], np.float32)
    except (ValueError, OSError, EOFError, KeyError, TypeError) as error:
        problem = error
    except (zipfile.BadZipFile, AttributeError, IndexError) as error:
        problem = error
    else:
        if array.ndim == 2 and array.size and np.isfinite(array).all():
            return array
        problem = f"shape {list(array.shape)}, or values that are not finite"
    raise UserError(
        f"{path} holds no direction ({problem}); it must be an .npz file with "
        "`direction` [1 or num_ws, w_dim]"
    )


def apply_edits(codes: np.ndarray, edits: Sequence[Edit]) -> np.ndarray:
    """Codes w_plus [n, num_ws, w_dim] moved along all directions."""
    moved = codes + sum(edit.strength * edit.direction for edit in edits)
    return np.asarray(moved, np.float32)


class Changes(NamedTuple):
    """What is done to codes after the inversion.

    Attributes:
      mixes: codes [num_ws, w_dim] to mix with, by label.
      rows: to mix.
      alpha: share of the mixes in them.
      edits: moves along directions.
    """

    mixes: dict[str, np.ndarray]
    rows: list[int]
    alpha: float
    edits: list[Edit]


def changed_codes(codes: np.ndarray, changes: Changes) -> dict[str, np.ndarray]:
    """The outputs beside the inversion: w_plus [n, num_ws, w_dim] by label."""
    outputs = {
        label: mix_rows(codes, other, changes.rows, changes.alpha)
        for label, other in changes.mixes.items()
    }
    if changes.edits:
        move = "_".join(edit.label for edit in changes.edits)
        outputs = {
            "-".join(filter(None, [label, move])): apply_edits(c, changes.edits)
            for label, c in (outputs or {"": codes}).items()
        }
    return outputs
