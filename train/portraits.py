"""Codes of a folder of portraits, found in batches and kept picture by picture.

What `train.destylize` and `train.refine_exstyle` share. The codes of each picture are
written to OUT.parts as soon as they are found, so a run that was stopped goes on with
the others, and new pictures can be added; OUT itself, a network folder, is written at
the end, whole.

A picture's codes depend on it and the options alone, not on its batch or its place.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxstyle import images, weights
from jaxstyle.errors import UserError
from jaxstyle.pipeline import write_codes
from train import fits, folder, processes, sharding
from train.cli import FREE, RunOptions
from train.log import write_json

# Points of a search and the optimiser's moments are split by picture; the rest is not.
RULES = (
    (r"^(point|moments)/.*?(z_plus|structure|color|noise/\w+)$", P(sharding.BATCH)),
    (r"", P()),
)
# (state, frozen, given) -> (state, metrics by picture): state holds `point`, `moments`,
# `step`; given the pictures and what is known of them, arrays [batch, ...].
Step = Callable[[Any, Any, Any], tuple[Any, dict[str, Any]]]


def check_size(judge_size: int, size: int) -> None:
    """Refuse a size of judged pictures that those drawn cannot be brought to.

    Args:
      judge_size: pixels a side.
      size: of the generator.

    Raises:
      UserError: naming the option.
    """
    if judge_size < 32 or max(judge_size, size) % min(judge_size, size):
        raise UserError(
            f"--judge-size is {judge_size}; it must be at least 32, and divide or be a "
            f"multiple of the pictures' {size}"
        )


class Parts:
    """OUT.parts: the codes of each picture in a file of its own.

    Args:
      options: of the scheme.
      metadata, identity: as for `train.loop.fit`.

    Raises:
      UserError: another run's, or OUT is something else already, or on a bucket.
    """

    def __init__(self, options: Any, metadata: Mapping, identity: Mapping[str, str]):
        out = options.run.out
        if "://" in out:
            raise UserError(
                f"--out is {out}; codes are kept picture by picture, on a disk: name a "
                "folder there, for several hosts one that all of them see"
            )
        self.out = Path(out).expanduser().absolute()
        self.folder = self.out.with_name(self.out.name + ".parts")
        self._lock = contextlib.ExitStack()
        new = folder.describe_run(options, metadata, identity)
        processes.check_same({**new["options"], **new["identity"]})
        with processes.together():
            self._open(new, out)

    def _open(self, new: Mapping, out: str) -> None:
        path = self.folder / "options.json"
        if path.exists():
            # Codes do not depend on the batch.
            old = json.loads(path.read_text())
            free = FREE - {"steps"} | {"batch"}
            folder.check_options(old, new, out, free)
        elif self.out.exists():
            raise UserError(
                f"--out {out} exists, but was not written by this command; choose "
                "another"
            )
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(folder.hold(self.folder))
            write_json(path, new)

    def close(self) -> None:
        """Let others write here."""
        self._lock.close()

    def read(self, file: Path) -> dict[str, np.ndarray] | None:
        """The codes of a picture, or None where they are not known."""
        try:
            with np.load(self._path(file)) as arrays:
                found = dict(arrays)
        except (OSError, ValueError):
            return None
        return found if str(found.pop("picture")) == digest(file) else None

    def write(self, file: Path, sheet: Sequence[np.ndarray], **codes: Any) -> None:
        """Keep the codes of a picture, and pictures to look at, side by side."""
        if jax.process_index() == 0:
            path = self.folder / "pictures" / f"{file.name}.jpg"
            images.save_image(path, images.grid(list(sheet), len(sheet)))
            write_codes(self._path(file), picture=digest(file), **codes)

    def left(self, files: Sequence[Path]) -> list[Path]:
        """Those without codes."""
        found = [f for f in files if self.read(f) is None]
        processes.check_same({"pictures to do": [f.name for f in found]})
        if len(found) < len(files):
            print(f"{len(files) - len(found)} of {len(files)} pictures are done")
        return found

    def _path(self, file: Path) -> Path:
        return self.folder / "codes" / f"{file.name}.npz"


def digest(file: Path) -> str:
    """Sixteen hex digits that change with a file's contents."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def chunks(
    files: Sequence[Path], batch: int, size: int
) -> Iterator[tuple[list[Path], np.ndarray]]:
    """Pictures by the batch, float32 [batch, size, size, 3]; the last is filled up.

    One that cannot be read is named and left out.

    Raises:
      UserError: none can be read.
    """
    held: list[tuple[Path, np.ndarray]] = []
    found, error = 0, None
    for i, file in enumerate(files):
        try:
            picture = images.to_array(images.open_image(file), size)
            held.append((file, picture))
            found += 1
        except UserError as problem:
            error = problem
            print(f"left out: {problem}", flush=True)
        if held and (len(held) == batch or i == len(files) - 1):
            filled = [held[min(j, len(held) - 1)][1] for j in range(batch)]
            yield [name for name, _ in held], np.stack(filled)
            held = []
    if files and not found:
        raise error
    if held:
        filled = [held[min(j, len(held) - 1)][1] for j in range(batch)]
        yield [name for name, _ in held], np.stack(filled)


def compiled(
    step: Step, run: RunOptions, mesh: Mesh, state: Any, frozen: Any, given: Any
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """A search's step, jitted, with donated state and fixed layouts.

    Args:
      step: see `Step`.
      run: with `compile_for` it is only compiled for that topology.
      mesh: of the run.
      state, frozen, given: examples of its arguments.

    Raises:
      SystemExit: after the report of `compile_for`.
    """

    def entry(index, mesh, layout, frozen_layout):
        del index, mesh, frozen_layout
        return jax.jit(step, donate_argnums=0, out_shardings=(layout, None))

    if run.compile_for:
        records = fits.report(run, entry, state, frozen, [1], given, RULES)
        raise fits.Compiled(records)
    return entry(0, mesh, sharding.shardings(state, mesh, RULES), None)


def place(tree: Any, mesh: Mesh) -> Any:
    """A search's state on the mesh."""
    return sharding.place(tree, sharding.shardings(tree, mesh, RULES))


def place_whole(tree: Any, mesh: Mesh) -> Any:
    """Parameters, whole on every device."""
    layout = jax.tree.map(lambda _: sharding.replicated(mesh), tree)
    return sharding.place(tree, layout)


def place_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays [batch, ...], split by picture."""
    layout = jax.tree.map(lambda x: sharding.batch_sharding(mesh, np.ndim(x)), tree)
    return sharding.place(tree, layout)


def tell(
    done: int,
    count: int,
    files: Sequence[Path],
    terms: Mapping[str, np.ndarray],
    began: float,
) -> None:
    """Say that a batch is done, and the mean of its last losses.

    Args:
      done, count: pictures.
      files: of the batch.
      terms: by name, [batch].
      began: the batch, by `time.perf_counter`.
    """
    if jax.process_index() == 0:
        means = (f"{k} {np.mean(v[: len(files)]):.4g}" for k, v in terms.items())
        seconds = (time.perf_counter() - began) / len(files)
        text = f"{done}/{count}  {', '.join(means)}  {seconds:.3g} s a picture"
        print(text, flush=True)


def assemble(
    parts: Parts, files: Sequence[Path]
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Names of the pictures with codes, in order, and the codes, [n, ...] by kind.

    Raises:
      UserError: there are none.
    """
    processes.gather("")  # The first, which writes, has written all.
    found = {f.name: parts.read(f) for f in files}
    found = {name: codes for name, codes in found.items() if codes is not None}
    if not found:
        raise UserError("no picture has codes")
    kinds = next(iter(found.values()))
    tables = {k: np.stack([codes[k] for codes in found.values()]) for k in kinds}
    return tuple(found), tables


def save(parts: Parts, networks: Any, params: Any, metadata: Mapping) -> None:
    """Write OUT, in place of what was there."""
    if jax.process_index() == 0:
        weights.save(parts.out, networks, params, metadata=metadata, overwrite=True)
        print(f"finished: {parts.out}")
