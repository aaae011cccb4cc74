"""Options of every run, and the start of a command."""

import os
import socket
import subprocess
import sys

import jax
import pytest

from jaxstyle.errors import UserError
from tests.train import toy
from train import cli, processes


def test_flags():
    options = cli.parse(toy.Options, None, "--lr 2 --save-every 7 --out x".split())
    assert options.lr == 2.0
    assert options.run.save_every == 7 and options.run.out == "x"
    assert options.run.batch == 8


def test_help_names_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.parse(toy.Options, "The toy.", ["--help"])
    text = capsys.readouterr().out
    assert "python -m tests.train.toy" in text
    assert "The toy." in text and "--mesh-fsdp" in text and "Global batch" in text


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--steps 0", "--steps is 0; it must be at least 1"),
        ("--log-every 0", "--log-every is 0"),
        ("--save-every -1", "--save-every is -1; it must not be negative"),
        ("--seed -1", "--seed is -1; it must be from 0 to 4294967295"),
        ("--seed 4294967296", "--seed is 4294967296"),
    ],
)
def test_values_that_make_no_sense(flags, message):
    with pytest.raises(UserError, match=message):
        cli.parse(toy.Options, None, flags.split())


def test_out_is_named_after_the_reference():
    named = cli.with_out(toy.Options(), "jojo-my art (2)")
    assert named.run.out == "runs/jojo-my-art-2"
    assert cli.with_out(named, "other") is named


def test_start_prints_devices_mesh_and_cache(capsys):
    mesh = cli.start(cli.RunOptions(mesh_data=2, mesh_space=2))
    assert dict(mesh.shape)["space"] == 2
    text = capsys.readouterr().out
    assert "8 × cpu" in text and "GiB" in text
    assert "mesh: style 1 × data 2 × fsdp 1 × space 2" in text
    assert jax.config.jax_compilation_cache_dir in text
    assert "not through Pallas" in text


@pytest.mark.parametrize("device", ["tpu", "gpu"])
def test_no_silent_fall_back_to_the_cpu(device):
    with pytest.raises(UserError, match=f"--require is {device}, but JAX runs on cpu"):
        cli.start(cli.RunOptions(require=device))
    cli.start(cli.RunOptions(require="cpu"))


def test_signs_of_a_cluster(monkeypatch):
    assert not processes.signs_of_a_cluster()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert not processes.signs_of_a_cluster()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert processes.signs_of_a_cluster()


def test_cluster_that_cannot_be_joined(monkeypatch):
    def fail(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match="could not join.*--distributed off"):
        processes.join_processes("on")
    processes.join_processes("auto")
    processes.join_processes("off")


@pytest.mark.parametrize("index", [0, 1])
def test_one_that_waits_in_vain_says_so(index):
    """Instead of JAX's own end, an abort with a trace of C++."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    env = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    env |= {"JAX_PROCESS_ID": str(index), "JAX_PLATFORMS": "cpu"}
    code = (
        "from train import processes as p; p.JOIN_SECONDS = 1; p.join_processes('on')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: the other processes have not joined within 1 s")
