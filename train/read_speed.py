"""How fast are pictures read, and with how much memory?

    python -m train.read_speed photos/ --size 256 --workers 0 2 4

Takes `--data` as the trainings do and reads batches of it without training: by a plain
loop of PIL (folders only), by grain's threads (0 workers), and by worker processes.
Starting is not counted. Memory is the peak of this process and of its largest worker;
it must not depend on how many pictures there are.
"""

import dataclasses
import itertools
import resource
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import jax
import numpy as np
import tyro
from PIL import Image

from jaxstyle.errors import UserError, cli
from jaxstyle.options import parse
from train import data, sharding

# Batches that may have been read ahead while the workers started: not counted.
AHEAD = 20


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of train.read_speed."""

    data: Annotated[str, tyro.conf.Positional]
    """Pictures: a folder, .npy file, tfds:NAME:SPLIT, what train.prepare wrote."""
    size: int = 256
    """Pixels a side that they are brought to."""
    batch: int = 8
    """Pictures a batch."""
    batches: int = 20
    """Batches to read each way."""
    workers: tuple[int, ...] = (0, 2)
    """Numbers of worker processes to try; 0: threads."""
    seed: int = 0
    """Of the order."""
    tfds_folder: str = ""
    """Where TFDS keeps its data sets; empty: its usual place."""


def plain_loop(source: data.Folder, options: Options) -> Iterator[np.ndarray]:
    """Batches [batch, size, size, 3] as one would write it in five lines of PIL."""
    order = np.random.default_rng(options.seed).permutation(len(source)).tolist()
    files = (source.files[i] for i in itertools.cycle(order))
    side = (options.size, options.size)
    while True:
        pictures = []
        for file in itertools.islice(files, options.batch):
            with Image.open(file) as opened:
                image = opened.convert("RGB").resize(side, Image.Resampling.LANCZOS)
            pictures.append(np.asarray(image, np.float32) / 127.5 - 1)
        yield np.stack(pictures)


def peak(who: int) -> float:
    """Peak memory in MB, of `resource.RUSAGE_SELF` or `RUSAGE_CHILDREN`."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit / 1e6


def measure(batches: Iterator, options: Options) -> tuple[float, float]:
    """Pictures a second, and seconds until the first batch."""
    start = time.perf_counter()
    next(batches)
    wait = time.perf_counter() - start
    for _ in range(AHEAD):
        next(batches)
    first = time.perf_counter()
    for _ in range(options.batches):
        next(batches)
    seconds = time.perf_counter() - first
    return options.batches * options.batch / seconds, wait


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.read_speed`."""
    options = parse(Options, "train.read_speed", __doc__, args)
    for name in ("size", "batch", "batches"):
        if getattr(options, name) < 1:
            value = getattr(options, name)
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if min(options.workers, default=0) < 0:
        raise UserError(f"--workers is {options.workers}; none may be negative")
    source = data.open_source(options.data, options.size, options.tfds_folder)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    print(f"{len(source):,} pictures, to {options.size} px, batches of {options.batch}")
    print(f"memory before: {peak(resource.RUSAGE_SELF):.0f} MB")
    print("                pictures/s   first batch   memory of it / a worker")

    def report(name, batches):
        rate, first = measure(batches, options)
        if isinstance(batches, data.Batches):
            batches.close()
        own, worker = map(peak, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        print(
            f"{name:<16}{rate:10.1f}{first:12.1f} s{own:12.0f} MB /{worker:5.0f} MB",
            flush=True,
        )

    if isinstance(source.source, data.Folder):
        report("plain PIL loop", plain_loop(source.source, options))
    for workers in options.workers:
        reading = data.ReadOptions(workers=workers)
        batches = data.batches(
            source, options.batch, mesh, seed=options.seed, reading=reading
        )
        report(f"{workers} workers" if workers else "threads", batches)


if __name__ == "__main__":
    main()
