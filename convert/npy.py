"""Pickled dictionaries of `numpy.save`, read without unpickling.

DualStyleGAN keeps the codes of a style as `{file name: float32 [1, 18, 512]}`, which
numpy can only store as a pickle. The machine of `pickles.py` reads it: the globals that
build arrays are the whole of what may occur, and no code from the file runs.
"""

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert import pickles
from convert.pickles import Call, Global, Stated
from jaxstyle.errors import UserError

MAGIC = b"\x93NUMPY"
# numpy 2 moved them, and both names are in use.
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMBERS = {"f2": "<f2", "f4": "<f4", "f8": "<f8"}
MAX_HEADER = 1 << 12
# What numpy writes, padded with spaces.
_HEADER = (
    r"\{'descr': '([^']{1,20})', 'fortran_order': (?:True|False), "
    r"'shape': (\([\d, ]{0,80}\)), \} *\n"
)


def read(data: memoryview) -> dict[str, np.ndarray]:
    """The arrays of a pickled dictionary by name, in the file's order.

    Args:
      data: the file.

    Raises:
      UserError: another kind of .npy file, a damaged one, or one that names anything
        but arrays of floats.
    """
    start = _header(data)
    functions = {f"{m}._reconstruct": _blank for m in _MODULES}
    functions |= {
        # Only ever named: the type that `_reconstruct` is to make.
        "numpy.ndarray": _no_call,
        "numpy.dtype": _number,
    }
    value, end = pickles.load(data, start, functions)
    if end != len(data):
        raise UserError(f"{len(data) - end} bytes follow its pickle")
    shape, dtype, items = _state(value)
    if shape != () or dtype != "O" or type(items) is not list or len(items) != 1:
        raise UserError("its array does not hold one dictionary")
    named = items[0]
    if type(named) is not dict or any(type(k) is not str for k in named):
        raise UserError(f"it holds a {type(named).__name__}, not arrays by name")
    left, arrays = len(data), {}
    for name, item in named.items():
        arrays[name] = _array(name, item)
        left -= arrays[name].nbytes
        if left < 0:
            raise UserError("its arrays take more than the file: one is used again")
    return arrays


def _header(data: memoryview) -> int:
    """Where the data begin; refuses all but one object."""
    version, size = data[6:7], {1: 2, 2: 4}.get(int.from_bytes(data[6:7], "little"), 0)
    start = 8 + size
    end = start + int.from_bytes(data[8:start], "little")
    if not size or end > min(len(data), MAX_HEADER):
        raise UserError(f"its .npy header is damaged: version {bytes(version)!r}")
    found = re.fullmatch(_HEADER, bytes(data[start:end]).decode("latin-1"))
    if not found:
        raise UserError("its .npy header is damaged")
    if found[1] != "|O" or found[2] != "()":
        raise UserError(
            f"it is an array of {found[1]} {found[2]}; codes come as one dictionary"
        )
    return end


def _no_call(*_: Any) -> None:
    raise UserError("a type is called that may only be named")


def _blank(kind: Any, *_: Any) -> Stated:
    if not isinstance(kind, Global) or str(kind) != "numpy.ndarray":
        raise UserError("an array of a type that is not numpy's own")
    return Stated()


def _number(name: Any, *_: Any) -> Stated:
    if type(name) is not str:
        raise UserError("an array of a type without a name")
    made = Stated()
    made.about = name.removesuffix("8") if name.startswith("O") else name
    return made


def _state(value: Any) -> tuple[Any, str, Any]:
    """Shape, name of the type and content of an array's state, checked as to form."""
    state = value[0] if type(value) is Stated and len(value) == 1 else None
    if type(state) is not tuple or len(state) != 5:
        raise UserError("it holds something that is no array")
    _, shape, dtype, by_columns, content = state
    if type(shape) is not tuple or any(type(n) is not int for n in shape):
        raise UserError("an array without a shape")
    if type(dtype) is not Stated or dtype.about is None or len(dtype) != 1:
        raise UserError("an array without a type")
    order = dtype[0][1] if type(dtype[0]) is tuple and len(dtype[0]) > 1 else None
    if by_columns is not False or order not in ("<", "|", "="):
        raise UserError("an array in another order than this machine's")
    return shape, dtype.about, content


def _array(name: str, value: Any) -> np.ndarray:
    shape, dtype, content = _state(value)
    if dtype not in _NUMBERS or not isinstance(content, memoryview):
        raise UserError(f"{name:.80}: an array of type {dtype:.20}, not of floats")
    number = np.dtype(_NUMBERS[dtype])
    size = 1
    for n in shape:
        size *= n
    if min(shape, default=1) < 1 or size * number.itemsize != len(content):
        raise UserError(
            f"{name:.80}: {len(content)} bytes do not make an array {list(shape)!s:.80}"
        )
    return np.frombuffer(content, number).reshape(shape)


def dump(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of `numpy.save` for a dictionary of float32 arrays."""

    make = Global(_MODULES[0], "_reconstruct")
    blank = Global("numpy", "ndarray"), (0,), b"b"

    def array(shape, dtype, order, content):
        state = (3, order, None, None, None, -1, -1, 63 if order == "|" else 0)
        number = Call(Global("numpy", "dtype"), (dtype, False, True), state)
        return Call(make, blank, (1, shape, number, False, content))

    named = {
        name: array(a.shape, "f4", "<", np.ascontiguousarray(a, "<f4").tobytes())
        for name, a in arrays.items()
    }
    file = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": ()}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + pickles.dump(array((), "O", "|", [named]))
