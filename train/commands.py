"""Other commands of ours, each in a process of its own: run once, timed and weighed."""

import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jaxstyle.errors import UserError
from jaxstyle.images import write_bytes

# A small process between us and the one that is measured, whose peak would otherwise
# begin at what we hold ourselves.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[2:]])
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
with open(sys.argv[1], "w") as file:
    file.write(str(usage.ru_maxrss))
sys.exit(process.returncode != 0)
"""


def run(command: Sequence[str]) -> tuple[float, float]:
    """Run Python with arguments; returns seconds and the peak memory in MB.

    Raises:
      UserError: it failed; it has said why.
    """
    begin = time.monotonic()
    with tempfile.NamedTemporaryFile() as file:
        measured = [sys.executable, "-c", MEASURE, file.name, *command]
        if subprocess.run(measured, check=False).returncode:
            raise UserError(f"`python {' '.join(command)}` failed; see above")
        peak = int(Path(file.name).read_text())
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return time.monotonic() - begin, peak / unit


def once(done: Path, command: Sequence[str]) -> dict[str, float]:
    """Run a command unless it has ended well before.

    Args:
      done: file that says so and holds the command and what it cost; the command may
        make its folder. One that names no command was written by an older version: the
        command is run, and goes on or refuses by itself.
      command: see `run`.

    Returns:
      `seconds` of the run that ended (of one that went on, that part) and `memory`.

    Raises:
      UserError: it failed; another command has ended there.
    """
    found = json.loads(done.read_text()) if done.exists() else {}
    if "command" not in found:
        seconds, memory = run(command)
        # An older version's cost is of the run, this one's of looking at it.
        cost = {"seconds": seconds, "memory": memory} | found
        found = cost | {"command": list(command)}
        write_bytes(done, json.dumps(found).encode())
    before, now = parts(found["command"]), parts(command)
    if set(before) != set(now):
        gone = " ".join(part for part in before if part not in now)
        new = " ".join(part for part in now if part not in before)
        raise UserError(
            f"{done} is of a run that differs: {gone or '(nothing)'} → "
            f"{new or '(nothing)'}. Use the former values, or another --out; or delete "
            "it and the folder of that run, to run it again"
        )
    return {name: found[name] for name in ("seconds", "memory")}


def parts(command: Sequence[str]) -> list[str]:
    """The flags of a command, each with its values."""
    return re.split(" (?=--)", shlex.join(command))
