"""Changed codes: rows of other codes, moves along directions or by a latent mapper.

A direction file is an `.npz` with `direction` [1 or num_ws, w_dim], as `python -m
convert age.pt directions/age.npz` writes it of a published one.
"""

import dataclasses
import io
import math
import re
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from jaxstyle.errors import UserError
from jaxstyle.mapper import Mapper, load, move
from jaxstyle.stylegan2 import Generator, Params


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


@dataclasses.dataclass(frozen=True)
class MoveOptions:
    """How faces are moved before they are drawn."""

    edit: tuple[str, ...] = ()
    """Move the codes along directions, all of them added: age:+3 smile:-1.5."""
    directions: str = "directions"
    """Folder of direction files NAME.npz, as `python -m convert` writes them."""
    mapper: str = ""
    """Move the codes by a latent mapper: a run of train.mapper."""
    mapper_strength: float = 1.0
    """Share of the mapper's move; above 1 goes on in its direction."""


class Moves(NamedTuple):
    """What `MoveOptions` do to the codes of a generator.

    Attributes:
      label: for file names, `age+3`; empty: nothing.
      edits: moves along directions.
      mapper: module and parameters, or None.
      strength: of the mapper.
    """

    label: str
    edits: list[Edit]
    mapper: tuple[Mapper, Params] | None
    strength: float

    def apply(self, codes: np.ndarray) -> np.ndarray:
        """Codes w_plus [n, num_ws, w_dim] moved, by the mapper first."""
        codes = np.asarray(codes, np.float32)
        if self.mapper is not None:
            codes = move(self.mapper, codes, self.strength)
        return apply_edits(codes, self.edits)


def read_moves(options: MoveOptions, generator: Generator) -> Moves:
    """The moves that options ask for.

    Raises:
      UserError: see `parse_edit` and `mapper.load`; a strength that is not finite.
    """
    found = [
        parse_edit(text, options.directions, generator.num_ws, generator.w_dim)
        for text in options.edit
    ]
    labels, mapper = [edit.label for edit in found], None
    if not math.isfinite(options.mapper_strength):
        raise UserError(
            f"--mapper-strength is {options.mapper_strength}; it must be a number"
        )
    if options.mapper:
        mapper = load(options.mapper, generator)
        strength = options.mapper_strength
        labels.insert(0, epath.Path(options.mapper).name)
        labels[0] += "" if strength == 1 else f"{strength:+g}"
    elif options.mapper_strength != 1:
        raise UserError("--mapper-strength is given, but no --mapper")
    return Moves("_".join(labels), found, mapper, options.mapper_strength)


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
