"""Going on from a training checkpoint of e4e or ReStyle: its step and optimisers.

`python -m convert` keeps them beside the networks in `training.npz`, if the file was
saved with its training data (e4e's `--save_training_data`). pSp's files have none.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstyle import weights
from jaxstyle.errors import UserError
from train.optim import path_name
from train.state import TrainState

# Names of optax's Adam.
ADAM = {"mu": "mean", "nu": "square"}


def resume(state: TrainState, folder: str, optimizer: str, steps: int) -> TrainState:
    """A fresh state with the step and the optimiser states of a folder.

    Args:
      state: with optimisers made by `optim.ranger` or `optim.adam`, `optim.frozen`
        around them or not.
      folder: that `python -m convert` wrote.
      optimizer: of the encoder: `ranger` or `adam`.
      steps: iterations in all.

    Raises:
      UserError: no training data in the folder, or of another optimiser, or of another
        set of networks, or none of the iterations are left.
    """
    path = weights.resolve(folder) / "training.npz"
    if not path.exists():
        raise UserError(
            f"--resume is given, but {folder} holds no training data; only e4e's and "
            "ReStyle's checkpoints of --save_training_data do: give --first-step "
            "instead, with new optimisers"
        )
    with path.open("rb") as file, np.load(file) as arrays:
        names = arrays.files
        kind = "ranger" if any("/slow/" in name for name in names) else "adam"
        if kind != optimizer:
            raise UserError(
                f"--optimizer is {optimizer}; {folder} was trained by {kind}"
            )
        found = {name.split("/")[0] for name in names} - {"step"}
        if found - set(state.opt_state):
            raise UserError(
                f"{folder} has optimisers of {', '.join(sorted(found))}; this training "
                f"is of {', '.join(state.opt_state)}: see --train-decoder and "
                "--w-discriminator-lambda"
            )
        step = int(arrays["step"])
        if step >= steps:
            raise UserError(
                f"--steps is {steps}; {folder} has had {step}: --steps counts them all"
            )
        opt_state = dict(state.opt_state)
        for name in sorted(found):
            opt_state[name] = _filled(opt_state[name], arrays, name)
    print(f"going on at step {step}, with the optimisers of {', '.join(sorted(found))}")
    return state.replace(step=jnp.asarray(step, jnp.int32), opt_state=opt_state)


def _filled(opt_state: Any, arrays: Mapping[str, np.ndarray], network: str) -> Any:
    """An optimiser's state, what the arrays have of it in its place."""
    start = f"{network}/count/"
    counts = [arrays[name] for name in arrays if name.startswith(start)]
    most = max((int(count) for count in counts), default=0)

    def leaf(path, old):
        # Around the trees of parameters are those of `optim.frozen` and of optax.
        parts = path_name(path).split("/")
        parts = (
            parts[parts.index("inner_state") + 1 :] if "inner_state" in parts else parts
        )
        parts = parts[1:] if parts[0] == "0" else parts
        slot = ADAM.get(parts[0], parts[0])
        if parts == ["count"]:
            return jnp.asarray(most, old.dtype)
        name = "/".join([network, slot, *parts[1:]])
        if name not in arrays:
            return old
        array = arrays[name]
        if array.shape != old.shape:
            raise UserError(
                f"{name} of the training data has shape {list(array.shape)}; the "
                f"parameter has {list(old.shape)}"
            )
        return jnp.asarray(array, old.dtype)

    return jax.tree_util.tree_map_with_path(leaf, opt_state)
