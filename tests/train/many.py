"""One command on several processes of this machine, as on the hosts of a pod."""

import os
import pathlib
import socket
import subprocess
import sys

import jax


def free_address():
    """Where a coordinator can listen."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


def started(module, commands, *, devices=4, homes=None, **environment):
    """`python -m module`, one process for each list of arguments.

    Args:
      module: such as tests.train.toy.
      commands: the arguments of each process.
      devices: of all processes together.
      homes: a home folder for each.
      environment: further variables.
    """
    count = len(commands)
    each = f"--xla_force_host_platform_device_count={devices // count}"
    env = os.environ | {
        "XLA_FLAGS": each,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "PYTHONUNBUFFERED": "1",
    }
    env |= {name: str(value) for name, value in environment.items()}
    if count > 1:
        env |= {
            "JAX_COORDINATOR_ADDRESS": free_address(),
            "JAX_NUM_PROCESSES": str(count),
        }
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env=env
            | ({"JAX_PROCESS_ID": str(i)} if count > 1 else {})
            | ({"HOME": str(homes[i])} if homes else {}),
            cwd=pathlib.Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i, arguments in enumerate(commands)
    ]


def finished(processes, code=0, timeout=900):
    """What each has printed; all must have ended with `code`."""
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=timeout)[0])
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [code] * len(processes), "\n----\n".join(outputs)
    return outputs
