"""Checkpoints of a run: `checkpoints/<step>/{params, ema, state, data}`.

Orbax writes each under a temporary name and renames it when complete, so a run that
is killed while saving keeps its last good checkpoint.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxstyle.errors import UserError
from train.state import TrainState


def _items(state: TrainState) -> dict[str, Any]:
    rest = {
        "step": state.step,
        "key": state.key,
        "opt_state": state.opt_state,
        "extra": state.extra,
    }
    # Orbax refuses an empty tree.
    ema = {"ema": state.ema} if state.ema else {}
    return {"params": state.params, "state": rest} | ema


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
      folder: `OUT/checkpoints`; local or `gs://`.
      keep: how many of the newest to keep; 0 keeps all.
    """

    def __init__(self, folder: Any, keep: int = 0):
        self._manager = ocp.CheckpointManager(
            epath.Path(folder),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep or None),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Start writing a checkpoint; call it on every process.

        Args:
          step: its name; an existing one is left alone.
          state: saved whole. Its arrays are copied first and may be donated at once.
          data: JSON values, the position in the data among them.
        """
        if step in self._manager.all_steps():
            return
        items = {k: ocp.args.StandardSave(v) for k, v in _items(state).items()}
        self._manager.save(
            step, args=ocp.args.Composite(**items, data=ocp.args.JsonSave(data))
        )

    def restore(
        self, step: int, state: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        """A checkpoint laid out as `state` is, on any mesh.

        Args:
          step: which.
          state: arrays of the wanted shapes, types and shardings.

        Raises:
          UserError: the checkpoint holds other arrays than `state`.
        """
        targets = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            _items(state),
        )
        args = {k: ocp.args.StandardRestore(v) for k, v in targets.items()}
        try:
            found = self._manager.restore(
                step, args=ocp.args.Composite(**args, data=ocp.args.JsonRestore())
            )
        except ValueError as error:
            raise UserError(
                f"checkpoint {step} does not fit this run's networks or optimisers "
                f"({error}); use another --out"
            ) from error
        rest = found["state"]
        restored = TrainState(
            step=rest["step"],
            key=rest["key"],
            params=found["params"],
            opt_state=rest["opt_state"],
            ema=found["ema"] if state.ema else {},
            extra=rest["extra"],
        )
        return restored, found["data"]

    def wait(self) -> None:
        """Block until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and release the threads."""
        self._manager.close()
