"""Files of named arrays that are no pickles: safetensors and Flax's msgpack."""

import json
import re
import struct
from collections.abc import Mapping
from typing import Any

import flax.serialization
import ml_dtypes
import numpy as np

from convert import pickles
from jaxstyle.errors import UserError, one_line

_TYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_LARGEST_HEADER = 1 << 24


def container(data: memoryview) -> str | None:
    """What the first bytes say: `safetensors`, `msgpack`, None for something else."""
    head = bytes(data[:9])
    if head[8:] == b"{" and struct.unpack_from("<Q", data)[0] <= _LARGEST_HEADER:
        return "safetensors"
    # A dict that is not empty, its first key a text.
    if re.match(rb"[\x81-\x8f][\xa1-\xbf\xd9]", head):
        return "msgpack"
    return None


def safetensors(data: memoryview) -> dict[str, np.ndarray]:
    """Arrays by name, as read-only views of the file.

    Raises:
      UserError: a damaged file; arrays that overlap.
    """
    (length,) = struct.unpack_from("<Q", data)
    contents = data[8 + length :]
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        entries = {k: v for k, v in header.items() if k != "__metadata__"}
        arrays = {k: _array(k, entry, contents) for k, entry in entries.items()}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(
            f"its safetensors header is damaged: {one_line(e, 120)} (an interrupted "
            "download?)"
        ) from None
    if sum(array.nbytes for array in arrays.values()) > len(contents):
        raise UserError("arrays overlap in it")
    return arrays


def _array(name: str, entry: Mapping[str, Any], contents: memoryview) -> np.ndarray:
    dtype, shape = _TYPES.get(entry["dtype"]), entry["shape"]
    begin, end = entry["data_offsets"]
    if dtype is None:
        raise UserError(
            f"{name:.80} is of type {entry['dtype']!r:.20}, which is not read"
        )
    if any(type(n) is not int or not 0 <= n < 1 << 48 for n in (begin, end, *shape)):
        raise UserError(f"{name:.80} has odd sizes or offsets")
    count = int(np.prod(shape, dtype=object))
    if len(shape) > 8 or end - begin != count * dtype.itemsize or end > len(contents):
        raise UserError(
            f"{name:.80} of shape {shape!r:.80} does not fit its place, or the file "
            "ends before it does (an interrupted download?)"
        )
    return np.frombuffer(contents[begin:end], dtype).reshape(shape)


def msgpack(data: memoryview) -> dict[str, np.ndarray]:
    """Arrays of Flax parameters by dotted name: `vision_model.embeddings.…`.

    Raises:
      UserError: a damaged file, or one of something else.
    """
    try:
        tree = flax.serialization.msgpack_restore(bytes(data))
    except Exception as e:  # msgpack and numpy raise whatever they meet.
        raise UserError(
            f"its msgpack is damaged: {type(e).__name__}, {one_line(e, 120)} (an "
            "interrupted download?)"
        ) from None
    return _flat(tree, "", pickles.MAX_DEPTH)


def _flat(tree: Any, prefix: str, depth: int) -> dict[str, np.ndarray]:
    if depth == 0:
        raise UserError(f"its dicts are nested deeper than {pickles.MAX_DEPTH} levels")
    arrays = {}
    for name, value in tree.items():
        if type(name) is not str:
            raise UserError(f"its msgpack has a key of type {type(name).__name__}")
        if isinstance(value, dict):
            arrays |= _flat(value, f"{prefix}{name}.", depth - 1)
        elif isinstance(value, np.ndarray):
            arrays[f"{prefix}{name}"] = value
        else:
            raise UserError(
                f"{prefix}{name:.80} of its msgpack is a {type(value).__name__}, not "
                "an array"
            )
    return arrays
