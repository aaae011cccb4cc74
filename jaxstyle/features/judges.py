"""Which networks judge: named by the user, published, or shipped with us.

| role       | published                         | without a file            |
| ---------- | --------------------------------- | ------------------------- |
| perceptual | LPIPS-AlexNet, ships with us      | the same                  |
| identity   | ArcFace, in `weights/arcface`     | `face_descriptor`         |
| similarity | MoCo's ResNet-50, `weights/moco`  | an error that says how    |

A judge's parameters are an argument of whatever function is jitted, never a constant of
it: XLA would fold whole convolutions while it compiles.
"""

import os
from typing import Any, NamedTuple

import flax.linen as nn

from jaxstyle import weights
from jaxstyle.errors import UserError

ARCFACE = "weights/arcface"
MOCO = "weights/moco"
# The network in the folder that plays each role, and the option that names the folder.
_ROLES = {
    "perceptual": ("lpips", "--perceptual-net"),
    "identity": ("identity", "--identity-net"),
    "similarity": ("resnet", "--similarity-net"),
}


class Judge(NamedTuple):
    """A network that compares pictures.

    Attributes:
      name: of the folder it comes from.
      module: with `__call__(a, b)` (perceptual) or `embed(images)` (the others).
      params: its parameters.
    """

    name: str
    module: nn.Module
    params: Any


def choose(role: str, name: str = "", dtype: Any = "float32") -> Judge:
    """The judge of a role, printed with the reason it was chosen.

    Args:
      role: `perceptual`, `identity` or `similarity`.
      name: a folder or a name that ships with us; empty chooses as the table above.
      dtype: of its convolutions.

    Raises:
      UserError: no such folder, or one that holds no network for the role.
    """
    network, flag = _ROLES[role]
    name, why = (name, f"named by {flag}") if name else _default(role)
    model, params = weights.load(name)
    if network not in model:
        raise UserError(
            f"{flag} is {name!r}, which holds {', '.join(model)}; it must hold a "
            f"network named {network!r}, as `python -m convert` writes it"
        )
    module = model[network]
    print(f"{role} judge: {name} ({type(module).__name__}; {why})", flush=True)
    if hasattr(module, "dtype"):
        module = module.clone(dtype=dtype)
    return Judge(name, module, params[network])


def _default(role: str) -> tuple[str, str]:
    if role == "perceptual":
        return "lpips_alexnet", "the published one"
    folder = {"identity": ARCFACE, "similarity": MOCO}[role]
    if os.path.isdir(folder):
        return folder, "the published one"
    if role == "identity":
        return (
            "face_descriptor",
            f"ships with us; the published one is ArcFace: convert model_ir_se50.pth "
            f"to {ARCFACE}",
        )
    raise UserError(
        f"--similarity-net is not given and there is no {MOCO}; convert "
        f"moco_v2_800ep_pretrain.pth.tar to {MOCO}"
    )
