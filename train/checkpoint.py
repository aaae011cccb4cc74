"""Checkpoints of a run: `checkpoints/<step>/{params, ema, state, data}`.

Orbax writes each under a temporary name and renames it when complete, so a run that
is killed while saving keeps its last good checkpoint. One that cannot be read is put
aside as `<step>.damaged`, and the run goes on from the one before.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from jaxstyle.errors import UserError, reason
from train import processes
from train.state import TrainState

_json: dict[str, Any] = {}


def _to_json(
    self: ts.KvStore.Spec,
    include_defaults: bool = False,
    convert: Any = ts.KvStore.Spec.to_json,
) -> Any:
    # Orbax asks where a checkpoint lies for each array anew, and TensorStore (up to
    # 0.1.86 at least) never frees an answer: a long run would grow with every save.
    place = f"{self!r} {include_defaults}"
    known = _json.get(place)
    if known is None:
        if len(_json) >= 16:
            _json.clear()
        known = _json[place] = convert(self, include_defaults)
    return copy.deepcopy(known)


ts.KvStore.Spec.to_json = _to_json


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
        self._folder = epath.Path(folder)
        self._manager = ocp.CheckpointManager(
            self._folder,
            # What a killed run had begun to write is no use to anybody.
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep or None, cleanup_tmp_directories=True
            ),
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

        Raises:
          UserError: this one, or the one before, cannot be written.
        """
        if step in self._manager.all_steps():
            return
        items = {k: ocp.args.StandardSave(v) for k, v in _items(state).items()}
        args = ocp.args.Composite(**items, data=ocp.args.JsonSave(data))
        with self._writing():
            self._manager.save(step, args=args)

    def restore_newest(
        self, state: TrainState
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, or None where there are none.

        Newer ones that cannot be are renamed to `<step>.damaged`.

        Raises:
          UserError: there are checkpoints, and none can be read.
        """
        problems: dict[int, UserError] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                with processes.together():
                    found = self.restore(step, state)
            except UserError as error:
                problems[step] = error
                continue
            self._put_aside(problems, step)
            return found
        if problems:
            raise problems[max(problems)]
        return None

    def _put_aside(self, problems: dict[int, UserError], instead: int) -> None:
        """Rename checkpoints that cannot be read, and say so."""
        first = jax.process_index() == 0
        with processes.together():
            for step, problem in problems.items() if first else ():
                place = self._folder / f"{step}.damaged"
                if place.exists():
                    place.rmtree()
                (self._folder / str(step)).rename(place)
                print(
                    f"checkpoint {step} cannot be read ({reason(problem)}): it is "
                    f"{place} now; going on from step {instead}"
                )
        if problems:
            self._manager.reload()

    def restore(
        self, step: int, state: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        """A checkpoint laid out as `state` is, on any mesh.

        Args:
          step: which.
          state: arrays of the wanted shapes, types and shardings.

        Raises:
          UserError: the checkpoint is damaged, or holds other arrays than `state`.
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
        # Orbax raises many kinds, a bare Exception among them.
        except Exception as error:
            raise UserError(
                f"checkpoint {step} in {self._folder} is damaged, or does not fit this "
                f"run's networks or optimisers ({reason(error)}); put its files back, "
                "or use another --out"
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
        """Block until everything is written.

        Raises:
          UserError: something cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and release the threads."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        # Orbax and its threads pass on whatever the file system raised.
        try:
            yield
        except Exception as error:
            step = self.latest()
            kept = (
                "none was written yet" if step is None else f"checkpoint {step} stays"
            )
            raise UserError(
                f"a checkpoint could not be written to {self._folder} "
                f"({reason(error)}); {kept}. Make room, then give the same command"
            ) from error
