"""NVIDIA's pickles: stylegan2-ada-pytorch, and StyleGAN2 of the StyleGAN3 repository.

A snapshot is a pickled dict of whole modules (`G`, `D`, `G_ema`). Each module carries
its own source code, which the official loader executes; here it is dropped unread.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from convert import pickles, pt
from convert.pickles import Record
from jaxstyle.errors import UserError

TENSORFLOW = (
    "it is a TensorFlow pickle of the original StyleGAN; turn it into a PyTorch one "
    "first: in NVlabs/stylegan2-ada-pytorch, `python legacy.py --source=OLD.pkl "
    "--dest=NEW.pkl`, then convert NEW.pkl"
)


class Module(Record):
    """A pickled module: `class_name` and the attributes in its `state`."""


def read(data: memoryview) -> Any:
    """The object in an NVIDIA pickle, its modules as `Module`.

    Raises:
      UserError: a TensorFlow pickle, a global these files do not use, or damage.
    """
    if b"dnnlib.tflib" in bytes(data[:4096]):
        raise UserError(TENSORFLOW)
    tensors = pt.tensor_functions(len(data))
    left = len(data)

    def storage(raw):
        nonlocal left
        if not isinstance(raw, (bytes, memoryview)):
            raise UserError("a storage that is no bytes")
        # The same bytes may be named any number of times.
        left -= len(raw)
        if left < 0:
            raise UserError(f"its storages unfold to more than its {len(data)} bytes")
        nested = pt.parse(memoryview(raw), pt.tensor_functions(len(raw)))
        if not isinstance(nested, np.ndarray):
            raise UserError("a storage that holds something else")
        return nested

    functions = tensors | {
        "torch_utils.persistence._reconstruct_persistent_obj": _module,
        "torch.storage._load_from_bytes": storage,
        "dnnlib.util.EasyDict": lambda: Record(),
        "numpy.ndarray": _array,
        "numpy.core.multiarray._reconstruct": _array,
        "numpy._core.multiarray._reconstruct": _array,
    }
    value, _ = pickles.load(data, 0, functions)
    return value


def _array(*_) -> str:
    # Filter designs of StyleGAN3 and the like: no weight is ever a numpy array.
    return "numpy array"


def _module(meta: Any) -> Module:
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise UserError("a module without a state")
    if type(meta.get("class_name")) is not str:
        raise UserError("a module without a class name")
    return Module(class_name=meta["class_name"], state=meta["state"])


def modules(module: Module, prefix: str = "") -> Iterator[tuple[str, Module]]:
    """A module and all below it, with the prefix of their keys."""
    yield prefix, module
    children = module["state"].get("_modules", {})
    for name, child in children.items() if isinstance(children, dict) else ():
        if isinstance(child, Module):
            yield from modules(child, f"{prefix}{name}.")
        elif child is not None:
            raise UserError(f"{prefix}{name} is no module")


def state_dict(module: Module) -> dict[str, np.ndarray]:
    """Parameters and buffers by their full names."""
    state = {}
    for prefix, part in modules(module):
        for group in ("_parameters", "_buffers"):
            arrays = part["state"].get(group, {})
            if not isinstance(arrays, dict):
                raise UserError(f"the {group} of {prefix or 'a module'} are no dict")
            for name, array in arrays.items():
                if array is not None:
                    state[f"{prefix}{name}"] = array
    return state


def attribute(module: Module, name: str) -> set:
    """The values that a plain attribute has in a module and all below it."""
    values = (part["state"].get(name) for _, part in modules(module))
    return {v for v in values if type(v) in (int, float, str)}
