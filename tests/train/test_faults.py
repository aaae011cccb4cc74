"""Runs that are killed, folders that are damaged, disks that are full."""

import contextlib
import gc
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstyle import weights
from jaxstyle.errors import UserError
from tests.train import toy
from tests.train.test_loop import assert_same, command, leaves, mesh_of
from train import folder, sharding
from train.checkpoint import Checkpoints
from train.state import create_state


def two_steps(path):
    """Checkpoints 2 and 4 of a small state, and that state by step."""
    mesh = mesh_of(2)
    states, checkpoints = {}, Checkpoints(path)
    with contextlib.closing(checkpoints):
        for step in (2, 4):
            params = {"generator": {"weight": np.full((4, 4), step, np.float32)}}
            state = create_state(
                params, {}, key=jax.random.key(step), extra={"n": jnp.asarray(step)}
            )
            state = state.replace(step=jnp.asarray(step))
            states[step] = sharding.place(state, sharding.shardings(state, mesh))
            checkpoints.save(step, states[step], {"position": step, "metrics": {}})
        checkpoints.wait()
    return states


def restored(path, like):
    with contextlib.closing(Checkpoints(path)) as checkpoints:
        return checkpoints.restore_newest(like)


def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    path = tmp_path / "checkpoints"
    states = two_steps(path)
    shutil.rmtree(path / "4" / "params" / "d")
    with pytest.raises(UserError, match=r"4/params is damaged or incomplete \("):
        weights._restore(path / "4" / "params")
    state, data = restored(path, states[4])
    assert_same(state, states[2])
    assert data["position"] == 2
    out = capsys.readouterr().out
    assert "checkpoint 4" in out and "4.damaged" in out and "from step 2" in out
    # The step can be reached and saved once more.
    with contextlib.closing(Checkpoints(path)) as checkpoints:
        checkpoints.save(4, states[4], {"position": 4, "metrics": {}})
    assert_same(restored(path, states[4])[0], states[4])
    for step in ("2", "4"):
        (path / step / "data" / "metadata").write_text('{"posi')
    with pytest.raises(UserError, match=r"checkpoint 4 .* is damaged, or .* --out"):
        restored(path, states[4])
    names = sorted(p.name for p in path.iterdir())
    assert names == ["2", "4", "4.damaged"]


@pytest.mark.slow
# Orbax's readers are not all ended when one of them fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_any_damaged_file(tmp_path, damage):
    """What is read is whole, or it is the checkpoint before."""
    good, path = tmp_path / "good", tmp_path / "checkpoints"
    states = two_steps(good)
    files = [p.relative_to(good) for p in (good / "4").rglob("*") if p.is_file()]
    kept = 0
    for file in files:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(good, path)
        if damage == "missing":
            (path / file).unlink()
        else:
            size = (path / file).stat().st_size
            os.truncate(path / file, size // 2 if damage == "truncated" else 0)
        state, data = restored(path, states[4])
        step = data["position"]
        kept += step == 4
        assert_same(state, states[step])
        assert (path / "4.damaged").exists() == (step == 2), file
    assert 0 < kept < len(files)
    # What they left is collected here and not in the next test.
    gc.collect()


def test_folder_is_held_until_its_process_dies(tmp_path):
    holder = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); "
        "fcntl.lockf(f, fcntl.LOCK_EX); f.write('process 7'); f.flush(); "
        "print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path / ".lock"], stdout=subprocess.PIPE
    )
    with other:
        other.stdout.readline()
        with pytest.raises(UserError, match="is in use by process 7; .*another --out"):
            folder.hold(tmp_path)
        other.kill()
    with folder.hold(tmp_path):
        text = (tmp_path / ".lock").read_text()
    assert text.startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("text", [None, '{"scheme": '])
def test_checkpoints_of_nobody_are_refused(tmp_path, text):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    if text:
        (tmp_path / "options.json").write_text(text)
    with pytest.raises(UserError, match="holds checkpoints, but its options.json"):
        folder.check_folder(toy.options(tmp_path))


# With processes of their own

STEPS = 100


def started(out, *, until="compiled in", lines=0, **environment):
    """A training process that has printed a line with `until`, and so many more."""
    flags = ("--out", out, "--save-every", 1, "--keep", 2, "--steps", STEPS)
    process = command(*flags, PYTHONUNBUFFERED=1, **environment)
    for line in process.stdout:
        if until in line:
            break
    for _ in range(lines):
        process.stdout.readline()
    return process


def final_state(out):
    """The state of a run that is finished."""
    return toy.run(toy.options(out, steps=STEPS, save_every=1, keep=2), mesh_of(2))


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    undisturbed = started(tmp_path / "whole")
    undisturbed.communicate(timeout=900)
    whole, out = final_state(tmp_path / "whole"), tmp_path / "run"
    draw = random.Random(0)
    # At start-up; around the rename that makes a checkpoint one; anywhere.
    moments = ["starting"] * 2 + [1, 2, 3, -1, -2, -3] + ["training"] * 12
    draw.shuffle(moments)
    for moment in moments:
        if moment == "starting":
            process = started(out, until="mesh:")
            time.sleep(draw.uniform(0, 3))
        elif moment == "training":
            process = started(out, lines=draw.randrange(4))
            time.sleep(draw.uniform(0, 0.2))
        else:
            process = started(out, DIE_AT_RENAME=moment)
            process.wait(timeout=400)
        assert process.poll() in (None, -signal.SIGKILL), process.stdout.read()
        process.kill()
        process.communicate()
        assert not (out / "summary.json").exists()
    process = started(out)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert_same(whole, final_state(out))
    names = sorted((p.name for p in (out / "checkpoints").iterdir()), key=int)
    assert names == [str(STEPS - 1), str(STEPS)]
    steps = [line for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == STEPS


@pytest.mark.slow
def test_preempted(tmp_path):
    out = tmp_path / "run"
    process = started(out, lines=3)
    process.terminate()
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "stopped by SIGTERM at step" in output
    assert "the same command continues: python -m tests.train.toy --out" in output
    for name in ("run", "whole"):
        again = started(tmp_path / name)
        again.communicate(timeout=900)
    assert_same(final_state(tmp_path / "whole"), final_state(out))


@pytest.mark.slow
def test_second_run_on_a_folder_refuses(tmp_path):
    out = tmp_path / "run"
    first = started(out, until="step 2/")
    second = command("--out", out, "--save-every", 1, "--keep", 2, "--steps", STEPS)
    output, _ = second.communicate(timeout=400)
    first.kill()
    first.communicate()
    assert second.returncode == 1
    assert f"in use by process {first.pid} on" in output and "Traceback" not in output
    # Nothing of a killed run is in the way of the next.
    third = started(out, until="continuing")
    third.kill()
    third.communicate()


@contextlib.contextmanager
def mounted(path, megabytes):
    path.mkdir()
    size = f"size={megabytes}m"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", path], capture_output=True
    )
    if done.returncode:
        pytest.skip("only root may mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.slow
def test_full_disk(tmp_path):
    flags = ("--save-every", 1, "--padding", 2_000_000)
    with mounted(tmp_path / "small", 14) as out:
        process = command("--out", out, *flags)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 1
        assert "No space left on device" in output and "Traceback" not in output
        assert "checkpoint 1 stays" in output and "Make room" in output
        subprocess.run(["mount", "-o", "remount,size=200m", out], check=True)
        again = command("--out", out, *flags)
        output, _ = again.communicate(timeout=400)
        assert again.returncode == 0 and "at step 1 of 6" in output
        state = leaves(toy.run(toy.options(out, padding=2_000_000), mesh_of(2)))
    whole = toy.run(toy.options(tmp_path / "whole", padding=2_000_000), mesh_of(2))
    for name, value in leaves(whole).items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)


@pytest.mark.slow
def test_full_disk_under_a_network_folder(tmp_path):
    with mounted(tmp_path / "small", 1) as out:
        blend = [sys.executable, "-m", "jaxstyle.blend", "heads", "heads"]
        blend += ["--share", "0.5", "--out", out / "mix"]
        done = subprocess.run(blend, capture_output=True, text=True)
        assert done.returncode == 1
        (error,) = done.stderr.splitlines()
        assert error.startswith("error: ") and "No space left on device" in error
        assert not list(out.iterdir())


@pytest.mark.slow
def test_files_that_may_not_grow(tmp_path):
    out, limit = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limit[1]))
    try:
        process = command("--out", out, "--save-every", 1, "--padding", 2_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "could not be written" in output and "none was written yet" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_read_only_folder(tmp_path):
    with mounted(tmp_path / "fixed", 4) as out:
        subprocess.run(["mount", "-o", "remount,ro", out], check=True)
        for path in (out, out / "run"):
            process = command("--out", path)
            output, _ = process.communicate(timeout=400)
            assert process.returncode == 1
            assert "Read-only file system" in output and "Traceback" not in output
            assert str(path) in output
