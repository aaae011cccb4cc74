"""What e4e's training checkpoints keep to go on from: the step and the optimisers.

e4e and ReStyle write them with `--save_training_data`: `global_step`, `optimizer`
(Ranger or Adam) and `discriminator_optimizer_state_dict` (Adam). PyTorch numbers an
optimiser's arrays by the order of the parameters, which is that of the state dict
without its buffers. A parameter that never had a gradient has no entry.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from convert.layouts import FLOATS, LAYOUTS, Table
from convert.report import Report
from jaxstyle.errors import UserError

KEYS = ("global_step", "optimizer", "discriminator_optimizer_state_dict")
SLOTS = {"exp_avg": "mean", "exp_avg_sq": "square", "slow_buffer": "slow"}
BUFFERS = ("mean", "var")


class Network(NamedTuple):
    """A network whose optimiser was kept.

    Attributes:
      name: ours.
      state: its part of the file, in the file's order.
      table: of its names.
    """

    name: str
    state: Mapping[str, Any]
    table: Table

    def parameters(self) -> list[str]:
        """The file's names of what the optimiser moves, in order."""
        paths = ((key, self.table[key][0]) for key in self.state if key in self.table)
        return [
            key for key, p in paths if p[-1] not in BUFFERS and p[0] != "noise_const"
        ]


def training(
    value: Mapping[str, Any],
    networks: Sequence[Network],
    critic: Network | None,
    report: Report,
) -> dict[str, np.ndarray]:
    """The arrays of `training.npz`, empty if the file keeps none.

    Names: `step` [], finished iterations; `NETWORK/count/PATH` [], the updates of a
    parameter, and `NETWORK/mean|square|slow/PATH`, its averages and slow weights.

    Args:
      value: the checkpoint.
      networks: those that the first optimiser may move: the encoder, the decoder.
      critic: the latent discriminator.
      report: what happened.

    Raises:
      UserError: states that do not fit the networks.
    """
    steps, optimizer, other = (value.get(key) for key in KEYS)
    if steps is None or not isinstance(optimizer, dict):
        return {}
    arrays = {"step": np.array(_whole(steps, "global_step") + 1)}
    numbers = _numbers(optimizer, "optimizer")
    if len(numbers) == len(networks[0].parameters()):
        networks = networks[:1]
    _read(arrays, optimizer, numbers, networks, "optimizer")
    if critic and isinstance(other, dict):
        numbers = _numbers(other, KEYS[2])
        _read(arrays, other, numbers, [critic], KEYS[2])
    names = [n.name for n in networks] + [critic.name] * bool(critic and other)
    report.read.append(
        f"training data: step {arrays['step']}, optimisers of {', '.join(names)}"
    )
    return arrays


def _numbers(saved: Mapping[str, Any], what: str) -> list[int]:
    groups = saved.get("param_groups")
    try:
        return [int(number) for group in groups for number in group["params"]]
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{what} holds no numbered parameters") from None


def _read(arrays, saved, numbers, networks, what):
    """Add what an optimiser keeps for its networks."""
    owners = [(n, key) for n in networks for key in n.parameters()]
    if len(numbers) != len(owners):
        raise UserError(
            f"{what} moves {len(numbers)} parameters; the networks have {len(owners)}"
        )
    states = saved.get("state")
    for number, (network, key) in zip(numbers, owners, strict=True):
        state = states.get(number) if isinstance(states, dict) else None
        if not isinstance(state, dict):
            continue
        path, layout = network.table[key]
        place = "/".join(path)
        count = _whole(state.get("step"), f"the step of {key}")
        arrays[f"{network.name}/count/{place}"] = np.array(count, np.int32)
        for theirs, ours in SLOTS.items():
            if theirs not in state:
                continue
            array = state[theirs]
            fits = isinstance(array, np.ndarray) and array.dtype in FLOATS
            if not fits or array.shape != network.state[key].shape:
                raise UserError(f"{theirs} of {key} in {what} does not fit its array")
            if not np.isfinite(array).all():
                raise UserError(f"{theirs} of {key} in {what} is not finite")
            array = LAYOUTS[layout].to_ours(array)
            # Views of the file where they can be: a full one has gigabytes of them.
            arrays[f"{network.name}/{ours}/{place}"] = array.astype(
                np.float32, copy=False
            )


def _whole(value: Any, what: str) -> int:
    """A count: a whole number, or an array of one."""
    try:
        number = float(np.asarray(value).reshape(()))
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < 2**31 or number != int(number):
        raise UserError(f"{what} is no count of iterations")
    return int(number)
