"""What a run leaves for people to read: metrics, progress bar, sample grids.

Only process 0 writes; the others may call everything here.
"""

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from jaxstyle.errors import UserError
from jaxstyle.images import grid, save_image, write_bytes

# Between two times that a bucket gets the metrics.
FLUSH_SECONDS = 60


def write_json(path: Any, value: Any) -> None:
    """Write JSON under a temporary name and rename it."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


class Log:
    """Metrics and pictures of one run.

    Args:
      folder: the run folder.
      start: iterations done before; later lines of an interrupted run are dropped.
      steps: iterations in all.
      tensorboard: write the same to `tensorboard/` too.

    Raises:
      UserError: TensorBoard is asked for and its extra is not installed.
    """

    def __init__(self, folder: Any, start: int, steps: int, tensorboard: bool = False):
        self._folder = epath.Path(folder)
        self._path = self._folder / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        self._local = "://" not in str(folder)
        self._steps = steps
        self._began = time.monotonic()
        self._shown = self._began, start
        self._before = 0.0
        self._flushed = self._began
        self._lines: list[str] = []
        if self._writes and self._path.exists():
            for line in self._path.read_text().splitlines():
                # A killed run may have left half a line.
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if entry["step"] <= start:
                    self._lines.append(line)
                    self._before = entry["seconds"]
            self.flush()
        self._board = _tensorboard(folder) if tensorboard and self._writes else None
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not (self._writes and sys.stderr.isatty()),
        )

    @property
    def seconds(self) -> float:
        """Time spent on this run, interruptions left out."""
        return self._before + time.monotonic() - self._began

    def advance(self) -> None:
        """One more iteration was started."""
        self._bar.update(1)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to `metrics.jsonl` and show the first metric."""
        if not self._writes:
            return
        seconds = self.seconds
        entry = {"step": step, "seconds": round(seconds, 3)} | dict(metrics)
        self._lines.append(json.dumps(entry))
        if self._local:
            with open(self._path, "a") as file:
                file.write(self._lines[-1] + "\n")
        elif time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()
        for key, value in metrics.items() if self._board else ():
            self._board.add_scalar(key, value, step)
        name = "loss" if "loss" in metrics else next(iter(metrics), None)
        shown = {} if name is None else {name: f"{metrics[name]:.4g}"}
        if not self._bar.disable:
            self._bar.set_postfix(shown)
            return
        (before, previous), now = self._shown, time.monotonic()
        self._shown = now, step
        each = (now - before) / max(1, step - previous)
        text = "".join(f"  {k} {v}" for k, v in shown.items())
        left = tqdm.format_interval((self._steps - step) * each)
        self.say(f"step {step}/{self._steps}{text}  {each:.3g} s/step  {left} left")

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._writes:
            tqdm.write(text)
            sys.stdout.flush()

    def samples(self, step: int, images: np.ndarray) -> None:
        """Write `samples/<step>.png`.

        Args:
          step: names the file.
          images: [n, height, width, 3] or [rows, columns, height, width, 3].
        """
        if self._writes:
            columns = images.shape[1] if images.ndim == 5 else None
            flat = images.reshape(-1, *images.shape[-3:])
            path = self._folder / "samples" / f"{step:06d}.png"
            sheet = grid(list(flat), columns)
            save_image(path, sheet)
            if self._board:
                self._board.add_image("samples", np.asarray(sheet), step, None, "HWC")

    def flush(self) -> None:
        """Rewrite `metrics.jsonl` whole: object stores cannot append."""
        self._flushed = time.monotonic()
        if self._writes:
            write_bytes(self._path, "".join(f"{x}\n" for x in self._lines).encode())

    def close(self) -> None:
        """End the bar and write what is left."""
        self._bar.close()
        if self._board:
            self._board.close()
        if not self._local:
            self.flush()


def _tensorboard(folder: Any) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs an extra: pip install 'jaxstyle[tensorboard]'"
        ) from None
    return SummaryWriter(f"{folder}/tensorboard")
