"""Files of `torch.save`, read and written without torch.

Two containers exist: a zip archive (`data.pkl` and one entry a storage), and the
stream that torch before 1.6 wrote (pickles in a row, then the raw storages). Both are
read by the machine of `pickles.py`, so no code from a file ever runs. Of a TorchScript
archive (`torch.jit.save`) the arrays are read, and its program is not.

Tensors come back as read-only numpy views of the mapped file; `bfloat16` is
`ml_dtypes.bfloat16`.
"""

import mmap
import os
import re
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from convert import npy, pickles, zips
from convert.pickles import Call, Global, Persistent, Record
from jaxstyle.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
# All tensors of an honest file fit into it; views that repeat memory may not unfold
# to much more than that.
VIEW_SLACK = 1 << 26
MAX_AXES = 8
# Of an array of a TorchScript archive: the names of all modules around it.
MAX_NAME = 500
# The magic number as the first pickle, in protocol 2 to 3 or framed in 4 and above.
_LEGACY_START = rb"\x80.(\x95.{8})?\x8a\x0a" + re.escape(MAGIC.to_bytes(10, "little"))

_REBUILD = (
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
)
STORAGES = {
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}


def open_file(path: str | os.PathLike) -> memoryview:
    """The bytes of a file, mapped into memory.

    Raises:
      UserError: a directory, something else that is no file, or an empty file.
    """
    # Before opening: a pipe would wait for its writer for ever.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{path} is a folder or no ordinary file; give a single file")
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if not status.st_size:
            raise UserError(f"{path} is empty: an interrupted download?")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def container(data: memoryview) -> str:
    """What the first bytes say: `zip`, `legacy`, `pickle`, `npy`.

    Raises:
      UserError: none of them.
    """
    head = bytes(data[:64])
    if head.startswith(b"PK"):
        return "zip"
    if head.startswith(npy.MAGIC):
        return "npy"
    if re.match(_LEGACY_START, head, re.DOTALL):
        return "legacy"
    if head[:1] == b"\x80":
        return "pickle"
    for start, what in (
        (b"<", "a web page: the download did not give the file"),
        (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself"),
        (b"\x89HDF", "an HDF5 file"),
        (b"\x1f\x8b", "gzip-compressed: unpack it first"),
    ):
        if head.lstrip().startswith(start):
            raise UserError(f"it is {what}")
    raise UserError(
        f"it is neither a torch file nor a pickle; it begins with {head[:8]!r}"
    )


def read(path: str | os.PathLike) -> Any:
    """The object in a file of `torch.save`: dicts, lists, numbers, numpy arrays.

    Raises:
      UserError: another file, a damaged one, or one that names anything that is not
        a tensor or plain data.
    """
    data = open_file(path)
    try:
        if container(data) in ("pickle", "npy"):
            raise UserError("it is no file of torch.save")
        return parse(data, tensor_functions(len(data)))
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def parse(data: memoryview, functions: dict[str, Callable]) -> Any:
    """The object in the bytes of a torch file."""
    if container(data) == "zip":
        return _parse_zip(data, functions)
    return _parse_legacy(data, functions)


def _parse_zip(data, functions):
    contents = zips.entries(data)
    folders = [n.removesuffix("/data.pkl") for n in contents if n.endswith("/data.pkl")]
    script = any(n.split("/")[-1] == "constants.pkl" for n in contents)
    if len(folders) != 1:
        hint = " (a numpy archive)" if any(n.endswith(".npy") for n in contents) else ""
        raise UserError(f"it is a zip archive{hint} that torch.save has not written")
    folder = folders[0]
    order = bytes(contents.get(f"{folder}/byteorder", b"little")[:16])
    if order != b"little":
        raise UserError(f"its byte order is {order!r}; only little is read")

    def find(key, dtype, count):
        content = contents.get(f"{folder}/data/{key}")
        if content is None:
            raise UserError(f"storage {key} is missing from its zip archive")
        if len(content) != count * dtype.itemsize:
            raise UserError(
                f"storage {key} has {len(content)} bytes; {count} values of "
                f"{dtype.name} were announced"
            )
        return np.frombuffer(content, dtype)

    pickle = contents[f"{folder}/data.pkl"]
    if not script:
        return pickles.load(pickle, 0, functions, _storages(find))[0]
    module, _ = pickles.load(pickle, 0, _ScriptNames(functions), _storages(find))
    return Script(_script_arrays(module))


class Script(dict):
    """The arrays of a TorchScript archive by dotted name, as in a state dict."""


class _ScriptNames(dict):
    """The permitted globals, and classes of TorchScript, which are bags of attributes.

    A class is named by its place in the archive's program, which nobody reads.
    """

    def __contains__(self, name):
        return super().__contains__(name) or name.startswith("__torch__.")

    def __missing__(self, name):
        return lambda: Record()


def _script_arrays(module, prefix=""):
    arrays = {}
    for name, value in module.items() if isinstance(module, dict) else ():
        if len(prefix) + len(str(name)) > MAX_NAME:
            raise UserError(f"a name of more than {MAX_NAME} characters: {prefix:.80}")
        if isinstance(value, Record):
            arrays |= _script_arrays(value, f"{prefix}{name}.")
        elif isinstance(value, np.ndarray):
            arrays[f"{prefix}{name}"] = value
    return arrays


def _parse_legacy(data, functions):
    position, header = 0, []
    for _ in range(3):
        value, position = pickles.load(data, position, {})
        header.append(value)
    magic, protocol, system = header
    if magic != MAGIC or protocol != PROTOCOL or type(system) is not dict:
        raise UserError("its header is not that of a file of torch.save")
    if system.get("little_endian") is not True:
        raise UserError("it was written on a big-endian machine")
    # The object stands before the storages it is made of, and their places follow from
    # the types it names: read it once for those, and again with the storages.
    start = position
    types: dict[str, tuple[np.dtype, int]] = {}

    def note(key, dtype, count):
        types[key] = dtype, count

    blind = functions | dict.fromkeys(_REBUILD, lambda *_: None)
    _, position = pickles.load(data, start, blind, _storages(note))
    keys, position = pickles.load(data, position, {})
    if type(keys) is not list or any(type(k) is not str for k in keys):
        raise UserError("its list of storages is damaged")
    if len(set(keys)) != len(keys) or set(keys) != set(types):
        raise UserError("its list of storages does not fit its tensors")
    storages: dict[str, np.ndarray] = {}
    for key in keys:
        dtype, count = types[key]
        begin, end = position + 8, position + 8 + count * dtype.itemsize
        announced = int.from_bytes(data[position:begin], "little")
        if announced != count or end > len(data):
            raise UserError(
                f"storage {key:.40} has {announced} values instead of {count}, or the "
                "file ends before it does (an interrupted download?)"
            )
        storages[key] = np.frombuffer(data[begin:end], dtype)
        position = end
    find = _storages(lambda key, *_: storages[key])
    return pickles.load(data, start, functions, find)[0]


def _storages(find: Callable[[str, np.dtype, int], np.ndarray]) -> Callable:
    """What a persistent id stands for: a storage as an array [count]."""
    seen: dict[str, tuple[np.dtype, int, np.ndarray]] = {}

    def persistent(identity):
        match identity:
            case ("storage", Global() as kind, str(key), str(), int(count)):
                pass
            case ("storage", Global() as kind, str(key), str(), int(count), None):
                pass
            case ("module", *_):
                raise UserError(
                    "it holds a whole module; save its state_dict() instead"
                )
            case _:
                raise UserError("it holds a storage of a kind that is not read")
        dtype = STORAGES.get(str(kind))
        if dtype is None or not key.isascii() or not key.isdigit() or count < 0:
            raise UserError(f"storage {key!r:.40} has an odd type, name or size")
        if key not in seen:
            seen[key] = dtype, count, find(key, dtype, count)
        if seen[key][:2] != (dtype, count):
            raise UserError(f"storage {key:.40} is used with two types or sizes")
        return seen[key][2]

    return persistent


def tensor_functions(file_size: int) -> dict[str, Callable]:
    """The globals that may occur in a torch file, for `pickles.load`.

    Args:
      file_size: all tensors together may take this many bytes (and some slack for
        small views that repeat memory).
    """
    left, pairs_left = file_size + VIEW_SLACK, pickles.MAX_OPCODES

    def rebuild_tensor(storage, offset, size, stride, *_):
        nonlocal left
        array = _view(storage, offset, size, stride)
        left -= array.nbytes
        if left < 0:
            raise UserError(
                f"its tensors unfold to more than its {file_size} bytes: views that "
                "repeat memory"
            )
        return array

    def rebuild_parameter(data, *_):
        if not isinstance(data, np.ndarray):
            raise UserError("a parameter that is no tensor")
        return data

    def ordered_dict(pairs=()):
        nonlocal pairs_left
        pairs_left -= len(pairs)
        if pairs_left < 0:
            raise UserError("its OrderedDicts are too large")
        if type(pairs) not in (list, tuple) or any(len(p) != 2 for p in pairs):
            raise UserError("an OrderedDict of something else than pairs")
        if any(type(k) not in (str, int) for k, _ in pairs):
            raise UserError("an OrderedDict with keys that are no names")
        if len({k for k, _ in pairs}) != len(pairs):
            raise UserError("an OrderedDict with a key that occurs twice")
        return dict(pairs)

    def no_call(*_):
        raise UserError("a type is called that may only be named")

    return dict.fromkeys(STORAGES, no_call) | {
        _REBUILD[0]: rebuild_tensor,
        _REBUILD[1]: rebuild_tensor,
        _REBUILD[2]: rebuild_parameter,
        "torch.Size": _plain_tuple,
        "torch.device": lambda *parts: ":".join(map(_number_or_text, parts)),
        "collections.OrderedDict": ordered_dict,
        "argparse.Namespace": lambda: Record(),
        "builtins.set": _plain_list,
        "__builtin__.set": _plain_list,
        "_codecs.encode": _latin1,
        "numpy.dtype": _numpy_dtype,
        "numpy.core.multiarray.scalar": _numpy_scalar,
        "numpy._core.multiarray.scalar": _numpy_scalar,
    }


def _view(storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
    """A tensor [*size] over its storage, checked to lie inside of it."""
    if not isinstance(storage, np.ndarray) or storage.ndim != 1:
        raise UserError("a tensor without a storage")
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride):
        raise UserError("a tensor whose sizes and strides do not fit")
    numbers = (offset, *size, *stride)
    if any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers):
        raise UserError(f"a tensor with odd sizes or strides {numbers!r:.120}")
    if len(size) > MAX_AXES:
        raise UserError(f"a tensor of {len(size)} axes; at most {MAX_AXES} are read")
    if 0 in size:
        return np.zeros(size, storage.dtype)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if last >= storage.size:
        raise UserError(
            f"a tensor of size {size!r:.120} reaches value {last} of a storage of "
            f"{storage.size}"
        )
    if np.prod(size, dtype=object) * storage.itemsize >= 1 << 48:
        raise UserError(f"a tensor of odd size {size!r:.120}")
    steps = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(
        storage[offset:], size, steps, writeable=False
    )


def _plain_tuple(items=()):
    if type(items) not in (tuple, list) or len(items) > MAX_AXES:
        raise UserError("a size that is no short tuple")
    return tuple(items)


def _plain_list(items=()):
    if type(items) is not list:
        raise UserError("a set of something else than a list")
    return items


def _number_or_text(part):
    if type(part) not in (int, str) or len(str(part)) > 20:
        raise UserError("a device that is no short name")
    return str(part)


def _latin1(text, encoding):
    # How protocol 2 spells the bytes of a numpy number.
    if type(text) is not str or encoding != "latin1" or len(text) > 16:
        raise UserError("encoded text that is no short latin1")
    return text.encode("latin-1")


def _numpy_dtype(name, *_):
    name = name.lstrip("<|=") if type(name) is str else None
    if name not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "b1"):
        raise UserError(f"a numpy number of type {name!r:.40}")
    return name


def _numpy_scalar(dtype, raw):
    if type(dtype) is not str or not isinstance(raw, (bytes, memoryview)):
        raise UserError("a numpy number without type or value")
    dtype = np.dtype("<" + _numpy_dtype(dtype))
    if len(raw) != dtype.itemsize:
        raise UserError("a numpy number of odd length")
    return np.frombuffer(raw, dtype)[0].item()


# Writing


def write(path: str | os.PathLike, value: Any, *, legacy: bool = False) -> None:
    """Write what `torch.load` reads, `weights_only=True` included.

    Args:
      path: the file; replaced whole or not at all.
      value: dicts, lists, tuples, numbers, text and numpy arrays, which become tensors.
      legacy: the stream of torch before 1.6 instead of the zip archive.

    Raises:
      TypeError: anything else in `value`.
    """
    path = os.fspath(path)
    folder, name = os.path.split(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(prefix=f".{name}-", dir=folder)
    os.close(handle)
    try:
        if legacy:
            with open(temporary, "wb") as file:
                file.writelines(legacy_parts(value))
        else:
            zips.write(temporary, _zip_parts(value))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _zip_parts(value: Any) -> Iterator[tuple[str, Any]]:
    described, arrays = with_tensors(value)
    yield "archive/data.pkl", pickles.dump(described)
    yield "archive/byteorder", b"little"
    for key, array in enumerate(arrays):
        yield f"archive/data/{key}", array.tobytes()
    yield "archive/version", b"3\n"


def legacy_parts(value: Any, *, storage_only: bool = False) -> Iterator[bytes]:
    """The pieces of a file in the stream format.

    Args:
      value: as for `write`.
      storage_only: of a single array, its storage as the object, as in NVIDIA's files.
    """
    described, arrays = with_tensors(value, (None,))
    if storage_only:
        described = described.arguments[0]
    system = {
        "protocol_version": PROTOCOL,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    keys = [str(i) for i in range(len(arrays))]
    for part in (MAGIC, PROTOCOL, system, described, keys):
        yield pickles.dump(part)
    for array in arrays:
        yield struct.pack("<q", array.size)
        yield array.tobytes()


def with_tensors(value: Any, view: tuple = ()) -> tuple[Any, list[np.ndarray]]:
    """`value` with each array replaced by the calls that rebuild it, and the arrays.

    Args:
      value: as for `write`.
      view: what follows in a storage's persistent id: nothing, or None in a stream.
    """
    arrays: list[np.ndarray] = []
    names = {dtype: name for name, dtype in STORAGES.items()}

    def describe(value):
        if isinstance(value, dict):
            return {k: describe(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(describe, value))
        if not isinstance(value, np.ndarray):
            return value
        array = np.asarray(value, order="C")
        if array.dtype not in names:
            raise TypeError(f"cannot write an array of {array.dtype} as a tensor")
        module, _, name = names[array.dtype].rpartition(".")
        key = str(len(arrays))
        arrays.append(array)
        kind = Global(module, name)
        storage = Persistent(("storage", kind, key, "cpu", array.size, *view))
        stride = tuple(s // array.itemsize for s in array.strides)
        hooks = Call(Global("collections", "OrderedDict"), ())
        arguments = (storage, 0, array.shape, stride, False, hooks)
        return Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)

    return describe(value), arrays
