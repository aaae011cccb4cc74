"""The folder of a run: whose it is, that nobody else writes into it, what it says."""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from etils import epath

from jaxstyle import weights
from jaxstyle.errors import UserError
from jaxstyle.paths import place
from train import processes
from train.cli import FREE
from train.log import write_json


def describe_run(
    options: Any, metadata: Mapping[str, Any] | None, identity: Mapping[str, str] | None
) -> dict[str, Any]:
    """What `options.json` holds: scheme, options, digests."""
    # Options may be paths.
    values = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    return {
        "scheme": (metadata or {}).get("scheme", "train"),
        "options": values.pop("run") | values,
        "identity": dict(identity or {}),
    }


def check_folder(
    options: Any,
    metadata: Mapping[str, Any] | None = None,
    identity: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:
    """The `options.json` of the run folder, or None when there is nothing to continue.

    `fit` calls this; a scheme whose preparation is long may do so before it.

    Raises:
      UserError: the folder belongs to a run of other options, naming them; it holds
        checkpoints, but nothing says whose they are.
    """
    path = place(options.run.out) / "options.json"
    # A run that ended before its first checkpoint leaves nothing to protect.
    if not weights.checkpoint_steps(path.parent):
        return None
    try:
        old = json.loads(path.read_text())
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"--out {options.run.out} holds checkpoints, but its options.json cannot "
            f"be read ({error}): put it back, or use another --out"
        ) from None
    new = describe_run(options, metadata, identity)
    check_options(old, new, options.run.out)
    return old


def check_options(
    old: Mapping[str, Any], new: Mapping[str, Any], out: str, free: Any = FREE
) -> None:
    """Refuse to continue a run with other options than it began with.

    Args:
      old, new: of `describe_run`.
      out: its folder, for the message.
      free: options that may differ.

    Raises:
      UserError: naming each difference.
    """
    differences = []
    if old["scheme"] != new["scheme"]:
        differences.append(f"scheme {old['scheme']} → {new['scheme']}")
    for kind in ("options", "identity"):
        for name in sorted(old[kind].keys() | new[kind].keys()):
            was, now = old[kind].get(name), new[kind].get(name)
            if was == now or (kind == "options" and name in free):
                continue
            if kind == "options":
                differences.append(f"--{name.replace('_', '-')} {was!r} → {now!r}")
            else:
                differences.append(f"another {name} ({was} → {now})")
    if differences:
        raise UserError(
            f"--out {out} holds a run that differs: "
            + "; ".join(differences)
            + ". Use the former values to continue it, or another --out"
        )


@contextlib.contextmanager
def open_folder(
    options: Any,
    networks: Mapping[str, nn.Module],
    metadata: Mapping[str, Any] | None,
    identity: Mapping[str, str] | None,
) -> Iterator[Any]:
    """Make or check the run folder, and keep others out of it while inside.

    Process 0 writes `options.json` and `config.json`.

    Yields:
      The folder, as a path that stays right when the current folder changes.

    Raises:
      UserError: the folder belongs to another run, or another process trains in it; a
        process was given other options, or does not see what process 0 writes.
    """
    if not options.run.out:
        raise UserError("--out is empty; name a run folder")
    folder = epath.Path(options.run.out)
    if "://" not in options.run.out:
        folder = folder.expanduser().absolute()
    run = describe_run(options, metadata, identity)
    processes.check_same({**run.pop("options"), **run})
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        with processes.together():
            check_folder(options, metadata, identity)
            if first:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(hold(folder))
                described = describe_run(options, metadata, identity)
                config = weights.config_dict(networks, metadata)
                write_json(folder / "config.json", config)
                write_json(folder / "options.json", described)
        with processes.together():
            if not first and not (folder / "options.json").exists():
                raise UserError(
                    f"--out {folder} is not the folder that process 0 writes to; use "
                    "one that all hosts share, such as gs://…"
                )
        yield folder


def hold(folder: Any) -> Any:
    """Take the lock of a run folder; a context manager that releases it.

    The system releases it when the process dies, however it does. Buckets know no such
    locks: there two runs on one folder are not noticed.

    Raises:
      UserError: another process has it.
    """
    if "://" in os.fspath(folder):
        return contextlib.nullcontext()
    file = open(folder / ".lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"--out {folder} is in use by {owner}; wait for it or stop it, or use "
            "another --out"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
