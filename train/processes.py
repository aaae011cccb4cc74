"""Several processes as one: joining them, and failing together instead of hanging.

A collective waits for every process, so one that stops alone leaves the others waiting.
Whatever only one of them may notice goes through `together`.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import jaxstyle
from jaxstyle.errors import UserError, one_line

# How long to wait for the others; JAX's own limit is the same.
JOIN_SECONDS = 300


def signs_of_a_cluster() -> bool:
    """Whether the environment looks like one of several processes, or a TPU host."""
    env = os.environ
    if any(n in env for n in ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES")):
        return True
    # Counts of the launched processes; SLURM_NTASKS is also set without a launcher.
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if env.get(name, "1") not in ("", "1"):
            return True
    chips = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def at_most(seconds: float, text: str) -> Iterator[None]:
    """End the process with an error if what is inside takes longer.

    JAX would abort it, with a trace of C++ that says nothing about why.
    """

    def give_up():
        print(f"error: {text}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def join_processes(distributed: str) -> None:
    """`jax.distributed.initialize` where it is called for.

    On a Cloud TPU and under SLURM or Open MPI JAX finds the others by itself; elsewhere
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` name them.

    Raises:
      UserError: `on`, or signs of several processes, but no way to join them.
    """
    if jax.distributed.is_initialized() or distributed == "off":
        return
    if distributed == "auto" and not signs_of_a_cluster():
        return
    env = os.environ
    count, index = env.get("JAX_NUM_PROCESSES"), env.get("JAX_PROCESS_ID")
    waited = (
        f"the other processes have not joined within {JOIN_SECONDS} s; start the same "
        "command on every host, and look there for one that stopped with an error, or "
        "pass --distributed off to run this one alone"
    )
    try:
        with at_most(JOIN_SECONDS, waited):
            jax.distributed.initialize(
                env.get("JAX_COORDINATOR_ADDRESS"),
                num_processes=int(count) if count else None,
                process_id=int(index) if index else None,
                initialization_timeout=JOIN_SECONDS + 60,
                # One that ends with an error must not keep the others waiting.
                shutdown_timeout_seconds=120,
            )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"could not join the other processes ({error}); set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or pass "
            "--distributed off to run this one alone"
        ) from error


def gather(text: str) -> list[str]:
    """The text of every process, in their order; each has to call it."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(len(data))).max())
    padded = np.zeros(max(1, longest), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row).rstrip(b"\0").decode() for row in rows]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What fails inside on one process fails on all.

    Raises:
      UserError, OSError: of this process, or as a UserError that of another.
    """
    problem = None
    try:
        yield
    except (UserError, OSError) as error:
        problem = error
    texts = gather(one_line(problem) if problem else "")
    if problem:
        raise problem
    for index, text in enumerate(texts):
        if text:
            raise UserError(f"process {index}: {text}")


def check_same(values: Mapping[str, Any]) -> None:
    """Refuse to go on where a process was started with other values.

    Args:
      values: by name; what JSON can hold, or what `str` makes of it.

    Raises:
      UserError: naming the process, what differs, and both values.
    """
    if jax.process_count() == 1:
        return
    host = socket.gethostname()
    texts = gather(json.dumps([host, dict(values)], default=str))
    (_, first), *others = [json.loads(text) for text in texts]
    for index, (host, found) in enumerate(others, 1):
        differ = [
            f"{name} {found.get(name)!r}, there {first.get(name)!r}"
            for name in sorted(first.keys() | found.keys())
            if first.get(name) != found.get(name)
        ]
        if differ:
            raise UserError(
                f"process {index} on {host} differs from process 0: "
                f"{'; '.join(differ)}. Give every host the same command and version"
            )


def versions() -> dict[str, str]:
    """What has to be the same everywhere besides the options."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in names} | {
        "jaxstyle": jaxstyle.__version__,
        "arguments": " ".join(sys.argv[1:]),
    }
