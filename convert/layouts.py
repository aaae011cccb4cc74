"""How arrays lie in PyTorch files and in our parameter trees, and tables of names.

A table is a dict `{key in the file: (path in our tree, layout)}`; one function reads
it in each direction, so names are written down once.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxstyle.errors import UserError

Table = dict[str, tuple[tuple[str, ...], str]]
FLOATS = tuple(np.dtype(t) for t in ("<f4", "<f2", ml_dtypes.bfloat16, "<f8"))


class Layout(NamedTuple):
    """Axes of the file's array, and the ways between it and ours."""

    axes: int
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _flat(side: int) -> Layout:
    """A dense layer on a flattened map: [out, (C, H, W)] and [(H, W, C), out]."""

    def ours(a):
        out = a.shape[0]
        return a.reshape(out, -1, side, side).transpose(2, 3, 1, 0).reshape(-1, out)

    def theirs(a):
        out = a.shape[1]
        return a.reshape(side, side, -1, out).transpose(3, 2, 0, 1).reshape(out, -1)

    return Layout(2, ours, theirs)


def _conv(a):
    return a.transpose(2, 3, 1, 0)


def _torch_conv(a):
    return a.transpose(3, 2, 0, 1)


LAYOUTS = {
    "scalar": Layout(0, lambda a: a, lambda a: a),
    "vector": Layout(1, lambda a: a, lambda a: a),
    "plane": Layout(2, lambda a: a, lambda a: a),
    "dense": Layout(2, lambda a: a.T, lambda a: a.T),
    # OIHW and HWIO.
    "conv": Layout(4, _conv, _torch_conv),
    "dense_1x1": Layout(4, lambda a: a[:, :, 0, 0].T, lambda a: a.T[..., None, None]),
    "const": Layout(3, lambda a: a.transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1)),
    # rosinality keeps leading axes of one.
    "conv_of_5": Layout(5, lambda a: _conv(a[0]), lambda a: _torch_conv(a)[None]),
    "const_of_4": Layout(
        4,
        lambda a: a[0].transpose(1, 2, 0),
        lambda a: a.transpose(2, 0, 1)[None],
    ),
    "plane_of_4": Layout(4, lambda a: a[0, 0], lambda a: a[None, None]),
    "vector_of_4": Layout(4, lambda a: a.ravel(), lambda a: a.reshape(1, -1, 1, 1)),
    "scalar_of_1": Layout(1, lambda a: a.reshape(()), lambda a: a.reshape(1)),
    "flat_4": _flat(4),
    "flat_7": _flat(7),
}


def listed(names: Any, limit: int = 8) -> str:
    """Names in one line, the first few of many."""
    names = list(names)
    text = ", ".join(f"{n}"[:80] for n in names[:limit])
    return text + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check_keys(state: Mapping[str, Any], table: Table, what: str) -> None:
    """Compare the keys of a state dict with those of a table.

    Raises:
      UserError: keys that are missing, or else keys that are left over.
    """
    missing = [key for key in table if key not in state]
    if missing:
        raise UserError(f"missing keys of the {what}: {listed(missing)}")
    extra = [key for key in state if key not in table]
    if extra:
        raise UserError(f"left-over keys that the {what} does not use: {listed(extra)}")


def shape(state: Mapping[str, Any], key: str, axes: int) -> tuple[int, ...]:
    """Shape of one array of a state dict.

    Raises:
      UserError: it has another number of axes, or is empty.
    """
    got = np.shape(state[key])
    if len(got) != axes or 0 in got:
        raise UserError(f"{key} has shape {list(got)}; it must have {axes} axes")
    return got


def highest(state: Mapping[str, Any], pattern: str, limit: int = 2000) -> int:
    """The highest number that `pattern` captures at the start of a key, -1 if none.

    Raises:
      UserError: it is above `limit`.
    """
    found = (re.match(pattern, key) for key in state)
    number = max((int(m[1][:9]) for m in found if m), default=-1)
    if number > limit:
        raise UserError(f"the number {number} in its keys is above {limit}")
    return number


def to_params(state: Mapping[str, Any], table: Table, what: str) -> dict[str, Any]:
    """Our parameters from a state dict, float32.

    Args:
      state: arrays by key, as `check_keys` wants them.
      table: names and layouts.
      what: the network, for errors.

    Raises:
      UserError: an array of another kind or number of axes, or that is not finite.
    """
    params: dict[str, Any] = {}
    for key, (path, layout) in table.items():
        array = state[key]
        if not isinstance(array, np.ndarray) or array.dtype not in FLOATS:
            kind = getattr(array, "dtype", type(array).__name__)
            raise UserError(f"{key} of the {what} is of type {kind}, not a float array")
        if array.ndim != LAYOUTS[layout].axes or 0 in array.shape:
            raise UserError(
                f"{key} of the {what} has shape {list(array.shape)}; it must have "
                f"{LAYOUTS[layout].axes} axes"
            )
        try:
            ours = LAYOUTS[layout].to_ours(array)
        except ValueError:
            ours = np.zeros(0)
        if ours.size != array.size:
            raise UserError(f"{key} of the {what} has odd shape {list(array.shape)}")
        if not np.isfinite(array).all():
            raise UserError(
                f"{key} of the {what} holds values that are not finite: the training "
                "that wrote it had failed; take an earlier checkpoint"
            )
        # A copy: the array may be a view into the file.
        put(params, path, np.array(ours, np.float32, order="C"))
    return params


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set one leaf of a nested dict."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def to_state(params: Mapping[str, Any], table: Table) -> dict[str, np.ndarray]:
    """The state dict of our parameters: the way back of `to_params`."""
    state = {}
    for key, (path, layout) in table.items():
        leaf = params
        for name in path:
            leaf = leaf[name]
        array = LAYOUTS[layout].to_theirs(np.asarray(leaf))
        state[key] = np.asarray(array, order="C")
    return state
