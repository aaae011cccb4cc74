"""Other commands of ours, each in a process of its own: run once, timed and weighed."""

import json
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
      done: file that says so and holds what it cost; the command may make its folder.
      command: see `run`.

    Returns:
      `seconds` of the run that ended (of one that went on, that part) and `memory`.

    Raises:
      UserError: it failed.
    """
    if not done.exists():
        seconds, memory = run(command)
        text = json.dumps({"seconds": seconds, "memory": memory})
        write_bytes(done, text.encode())
    return json.loads(done.read_text())
