"""Which networks judge: named by the user, published, or shipped with us.

| role       | published                         | without a file            |
| ---------- | --------------------------------- | ------------------------- |
| perceptual | LPIPS-AlexNet, ships with us      | the same                  |
| identity   | ArcFace, in `weights/arcface`     | `face_descriptor`         |
| similarity | MoCo's ResNet-50, `weights/moco`  | an error that says how    |
| features   | VGG-19, in `weights/vgg19`        | LPIPS-AlexNet's trunk     |

A judge's parameters are an argument of whatever function is jitted, never a constant of
it: XLA would fold whole convolutions while it compiles.
"""

import os
from typing import Any, NamedTuple

import flax.linen as nn

from jaxstyle import weights
from jaxstyle.errors import UserError
from jaxstyle.features.lpips import TAPS
from jaxstyle.features.vgg import VGG

ARCFACE = "weights/arcface"
MOCO = "weights/moco"
VGG19 = "weights/vgg19"
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


def choose_features(net: str = "", dtype: Any = "float32") -> Judge:
    """A trunk whose activations losses compare, printed with the reason.

    Its module gives activations by name (see `VGG`); all have relu1_1, relu2_1 and
    relu3_1.

    Args:
      net: `vgg19`, `vgg16` or `alexnet`; a folder with one of them or with LPIPS; empty
        takes VGG-19, or AlexNet, which ships with us, where there is none.
      dtype: of its convolutions.

    Raises:
      UserError: no such folder, or one that holds no trunk.
    """
    name, why = net, "named by --perceptual-net"
    if net in ("vgg16", "vgg19"):
        name = f"weights/{net}"
        if not os.path.isdir(name):
            raise UserError(
                f"--perceptual-net is {net}, but there is no {name}; convert "
                f"torchvision's {net} file to {name}, or take alexnet, which ships"
            )
    elif not net and os.path.isdir(VGG19):
        name, why = VGG19, "the published one"
    elif not net or net == "alexnet":
        name, why = "lpips_alexnet", why if net else f"ships with us; no {VGG19}"
    model, params = weights.load(name)
    if "vgg" in model:
        module, found = model["vgg"], params["vgg"]
    elif "lpips" in model:
        module = VGG(net=TAPS[model["lpips"].net][0])
        found = {k: v for k, v in params["lpips"].items() if k.startswith("conv_")}
    else:
        raise UserError(
            f"--perceptual-net is {net!r}, which holds {', '.join(model)}; it must be "
            "vgg19, vgg16, alexnet or a folder with one of them"
        )
    print(f"features: {name} ({module.net}; {why})", flush=True)
    return Judge(name, module.clone(dtype=dtype), found)
