import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from PIL import Image

import jaxstyle
from jaxstyle.errors import UserError
from tests.train import toy
from train import loop
from train.sharding import make_mesh


def mesh_of(count, **axes):
    return make_mesh(**axes, devices=jax.devices()[:count])


def lines(folder, *, seconds=False):
    entries = [
        json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return [{k: v for k, v in e.items() if seconds or k != "seconds"} for e in entries]


def leaves(state):
    found, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(p): np.asarray(
            jax.random.key_data(x)
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        )
        for p, x in found
    }


def assert_same(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_run_folder(tmp_path):
    out = tmp_path / "run"
    state = toy.run(toy.options(out, sample_every=4), mesh_of(8))
    assert int(state.step) == 6 and int(state.extra["count"]) == 2
    entries = lines(out, seconds=True)
    assert [e["step"] for e in entries] == [1, 2, 3, 4, 5, 6]
    assert entries[-1]["loss"] < entries[0]["loss"]
    assert [e["count"] for e in entries] == [1, 1, 1, 2, 2, 2]
    names = sorted(p.name for p in (out / "samples").iterdir())
    assert names == ["000000.png", "000004.png", "000006.png"]
    with Image.open(out / "samples" / "000000.png") as sheet:
        assert sheet.size == (18, 18)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["scheme"] == "toy" and summary["step"] == 6
    assert summary["metrics"]["loss"] == entries[-1]["loss"]
    model, params = jaxstyle.load(out)
    assert model.generator == toy.NETWORK
    # The average is what a user of the run gets.
    for loaded, kept in zip(
        jax.tree.leaves(params["generator"]),
        jax.tree.leaves(state.ema["generator"]),
        strict=True,
    ):
        np.testing.assert_array_equal(loaded, kept)


def test_data_travel_while_the_device_works(tmp_path, monkeypatch):
    """Each batch is sent off before the step that came before it is done."""
    compiled, given, losses, waits = loop._compile, loop.sharding.global_batch, [], []

    def watched(*args):
        def call(step):
            def watch(*operands):
                state, metrics = step(*operands)
                losses.append(metrics["loss"])
                return state, metrics

            return watch

        return [(every, call(step)) for every, step in compiled(*args)]

    def send(batch, mesh):
        waits.extend(not loss.is_ready() for loss in losses[-1:])
        return given(batch, mesh)

    def slow(state, frozen, batch):
        x = jax.lax.fori_loop(
            0, 60, lambda _, x: jax.numpy.tanh(x @ x), jax.numpy.eye(512)
        )
        bias = state.params["generator"]["mapping"]["dense_0"]["bias"]
        return state, {"loss": x.sum() + batch["image"].mean() + bias.mean()}

    monkeypatch.setattr(loop, "_compile", watched)
    monkeypatch.setattr(loop.sharding, "global_batch", send)
    monkeypatch.setattr(toy, "schedule", lambda *_: [(1, slow)])
    toy.run(toy.options(tmp_path / "run", steps=8, log_every=100), mesh_of(1))
    assert len(waits) == 7 and sum(waits) >= 6


def test_every_entry_and_step_has_its_own_key(tmp_path):
    keys = []

    def spy(state, frozen, batch):
        jax.debug.callback(
            lambda k: keys.append(tuple(k)), jax.random.key_data(state.key)
        )
        return state, {}

    options = toy.options(tmp_path / "run", steps=3)
    params = {"generator": {"weight": np.zeros(3, np.float32)}}
    state = toy.create_state(params, {}, key=jax.random.key(0))
    schedule = [(1, spy), (1, spy)]
    state = loop.fit(options, state, {}, schedule, None, networks={}, mesh=mesh_of(1))
    jax.effects_barrier()
    assert len(keys) == len(set(map(str, keys))) == 6
    assert jax.random.key_data(state.key).tolist() == [0, 0]


@pytest.mark.parametrize("stop", [1, 4])
def test_resumed_run_is_bit_identical(tmp_path, stop):
    whole = toy.run(toy.options(tmp_path / "whole"), mesh_of(8))
    out = tmp_path / "parts"
    toy.run(toy.options(out, steps=stop), mesh_of(8))
    # A run that was killed later leaves lines that its checkpoint does not cover.
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "seconds": 9, "loss": 1}\n{"step": 6, "sec')
    parts = toy.run(toy.options(out), mesh_of(8))
    assert_same(whole, parts)
    assert lines(tmp_path / "whole") == lines(out)


def test_resume_on_another_mesh(tmp_path):
    whole = toy.run(toy.options(tmp_path / "whole"), mesh_of(8))
    out = tmp_path / "parts"
    toy.run(toy.options(out, steps=3), mesh_of(8, fsdp=4))
    parts = leaves(toy.run(toy.options(out), mesh_of(2)))
    for name, value in leaves(whole).items():
        np.testing.assert_allclose(parts[name], value, 1e-5, 1e-6, err_msg=name)


def test_finished_run_is_left_alone(tmp_path):
    out = tmp_path / "run"
    first = toy.run(toy.options(out), mesh_of(2))
    before = (out / "summary.json").read_text()
    assert_same(first, toy.run(toy.options(out), mesh_of(2)))
    assert (out / "summary.json").read_text() == before


def loss_is(value, *, finished=False):
    """Validation in the second iteration and at the end."""
    return 2, lambda state, frozen: {"val_loss": value, "finished": finished}


def learns(state, frozen, batch):
    """Two styles, of which none learns from the third iteration on."""
    return state, {"learns": jnp.full(2, state.step < 2, jnp.float32)}


@pytest.mark.parametrize("rule", ["finished", "learns", "finished at the end"])
def test_a_run_that_its_own_rule_has_ended_trains_no_more(
    tmp_path, monkeypatch, capsys, rule
):
    given = {"metadata": {"scheme": "toy", "styles": ["a", "b"]}}
    if rule == "learns":
        schedule = toy.schedule
        monkeypatch.setattr(toy, "schedule", lambda *a: [*schedule(*a), (1, learns)])
    else:
        given["validate"] = loss_is(1.0, finished=True)
    steps = 2 if rule.endswith("end") else 6
    first = toy.run(toy.options(tmp_path, steps=steps), mesh_of(2), **given)
    assert int(first.step) == (3 if rule == "learns" else 2)
    before = (tmp_path / "summary.json").read_text()
    again = toy.run(toy.options(tmp_path, steps=9), mesh_of(2), **given)
    assert_same(first, again)
    assert (tmp_path / "summary.json").read_text() == before
    assert "was ended by its own rule" in capsys.readouterr().out


def test_the_best_of_a_run_that_left_no_checkpoint_is_not_kept(tmp_path):
    options = toy.options(tmp_path, nan_metric_at=2)
    with pytest.raises(UserError, match="no checkpoint was written"):
        toy.run(options, mesh_of(2), validate=loss_is(1.0))
    assert (tmp_path / "best" / "checkpoints" / "2").exists()
    other = toy.options(tmp_path, steps=2, lr=0.2)
    state = toy.run(other, mesh_of(2), validate=loss_is(3.0))
    _, params = jaxstyle.load(tmp_path / "best")
    jax.tree.map(
        np.testing.assert_array_equal, params["generator"], state.ema["generator"]
    )
    # That of a run that goes on stays, when nothing better comes.
    toy.run(toy.options(tmp_path, lr=0.2), mesh_of(2), validate=loss_is(4.0))
    assert [p.name for p in (tmp_path / "best" / "checkpoints").iterdir()] == ["2"]


def test_checkpoint_is_not_touched_by_later_steps(tmp_path):
    # Saving goes on in the background while the next step reuses the state's memory.
    out = tmp_path / "run"
    large = {"padding": 3_000_000}
    toy.run(toy.options(out, steps=8, save_every=1, keep=0, **large), mesh_of(1))
    other = tmp_path / "other"
    state = toy.run(toy.options(other, steps=3, **large), mesh_of(1))
    _, params = jaxstyle.load(out, step=3)
    np.testing.assert_array_equal(
        params["generator"]["mapping"]["dense_0"]["weight"],
        state.ema["generator"]["mapping"]["dense_0"]["weight"],
    )


def test_keeps_the_newest_checkpoints(tmp_path):
    toy.run(toy.options(tmp_path, save_every=1, keep=2), mesh_of(1))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["5", "6"]


def test_many_arrays_leave_nothing_in_memory(tmp_path):
    place = ts.KvStore.Spec({"driver": "file", "path": f"{tmp_path}/"})
    asked = place.to_json()
    assert asked == {"driver": "file", "path": f"{tmp_path}/"}
    asked["path"] = "elsewhere"
    assert place.to_json()["path"] == f"{tmp_path}/"
    assert "driver" in (place / "x").to_json(include_defaults=True)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(2000):
        place.to_json()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 20_000, "half a megabyte if it is converted every time"


def test_folder_of_another_run_is_refused(tmp_path):
    given = {"identity": {"reference": "aa"}}
    toy.run(toy.options(tmp_path, steps=2), mesh_of(1), **given)
    free = toy.options(tmp_path, steps=3, log_every=2, save_every=1, keep=1)
    toy.run(free, mesh_of(1), **given)
    with pytest.raises(UserError, match=r"--lr 0\.1 → 0\.2; --seed 0 → 1") as error:
        toy.run(toy.options(tmp_path, lr=0.2, seed=1), mesh_of(1), **given)
    assert "another --out" in str(error.value)
    with pytest.raises(UserError, match="another reference"):
        toy.run(toy.options(tmp_path), mesh_of(1), identity={"reference": "bb"})
    with pytest.raises(UserError, match="scheme toy → other"):
        toy.run(
            toy.options(tmp_path), mesh_of(1), metadata={"scheme": "other"}, **given
        )


def test_tensorboard_and_buckets_name_their_extras(tmp_path):
    for options, extra in (
        (toy.options(tmp_path / "a", tensorboard=True), "tensorboard"),
        (toy.options("gs://bucket/run"), "gcs"),
    ):
        module = {"tensorboard": "tensorboardX", "gcs": "gcsfs"}[extra]
        if importlib.util.find_spec(module):
            pytest.skip(f"{module} is installed")
        with pytest.raises(UserError, match=rf"pip install 'jaxstyle\[{extra}\]'"):
            toy.run(options, mesh_of(1))


@pytest.mark.parametrize("steps", [11, 13, 22])
def test_profile(tmp_path, steps):
    toy.run(toy.options(tmp_path, steps=steps, debug_profile=True), mesh_of(1))
    assert any((tmp_path / "profile").rglob("*.pb"))


def test_profile_of_a_run_that_fails(tmp_path):
    options = toy.options(tmp_path, steps=22, debug_profile=True, nan_metric_at=14)
    with pytest.raises(UserError, match="loss is nan at step 15"):
        toy.run(options, mesh_of(1))
    assert any((tmp_path / "profile").rglob("*.pb"))


@pytest.mark.parametrize("save_every", [1, 4])
def test_metric_that_is_not_finite_stops_the_run(tmp_path, save_every):
    options = toy.options(tmp_path, nan_metric_at=2, save_every=save_every, log_every=9)
    with pytest.raises(UserError, match="loss is nan at step 3") as error:
        toy.run(options, mesh_of(2))
    saved = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert saved == (["1", "2"] if save_every == 1 else [])
    kept = "checkpoint 2 stays" if saved else "no checkpoint"
    assert kept in str(error.value)
    assert not (tmp_path / "summary.json").exists()
    again = toy.options(tmp_path, steps=3)
    if saved:
        with pytest.raises(UserError, match="nan-metric-at 2 → -1"):
            toy.run(again, mesh_of(2))
    else:
        # Nothing was saved: the folder may be used anew with other options.
        assert int(toy.run(again, mesh_of(2)).step) == 3


def test_state_that_is_not_finite_is_never_saved(tmp_path):
    options = toy.options(tmp_path, nan_state_at=3, save_every=2)
    with pytest.raises(
        UserError, match=r"params/generator/w_avg is not finite at step 4"
    ):
        toy.run(options, mesh_of(2))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_signal_saves_and_the_next_run_continues(tmp_path, capsys):
    whole = toy.run(toy.options(tmp_path / "whole"), mesh_of(2))

    def interrupt(state, frozen, batch):
        def send(step):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        jax.debug.callback(send, state.step)
        return state, {"one": state.step * 0 + 1}

    options = toy.options(tmp_path / "run")
    original = toy.schedule

    def schedule(options, tx):
        return [*original(options, tx), (1, interrupt)]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(toy, "schedule", schedule)
        toy.run(options, mesh_of(2))
    assert stopped.value.code == 0
    assert "stopped by SIGTERM at step" in capsys.readouterr().out
    assert not (tmp_path / "run" / "summary.json").exists()
    assert_same(whole, toy.run(options, mesh_of(2)))


def command(*arguments, devices=2, **environment):
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.train.toy", *map(str, arguments)],
        env=env | {k: str(v) for k, v in environment.items()},
        cwd=pathlib.Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_kill_while_saving_leaves_the_last_checkpoint(tmp_path):
    out = tmp_path / "run"
    flags = ["--out", out, "--save-every", 1, "--padding", 4_000_000, "--steps", 500]
    process = command(*flags)
    deadline = time.monotonic() + 120
    saved = []
    # The second save is in progress: its folder has a temporary name.
    while time.monotonic() < deadline and process.poll() is None:
        names = [p.name for p in (out / "checkpoints").glob("*")]
        saved = [int(n) for n in names if n.isdigit()]
        if saved and any("tmp" in n for n in names):
            break
    process.kill()
    output, _ = process.communicate()
    assert saved, output
    _, params = jaxstyle.load(out)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    steps = max(
        int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit()
    )
    flags[-1] = steps + 2
    again = command(*flags)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert f"at step {steps} of" in output


def test_two_processes_do_what_one_does(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
    processes = [
        command(
            *("--out", tmp_path / "two", "--batch", 8, "--steps", 4),
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=2,
            JAX_PROCESS_ID=i,
        )
        for i in range(2)
    ]
    one = toy.run(toy.options(tmp_path / "one"), mesh_of(4))
    first, second = (p.communicate(timeout=120)[0] for p in processes)
    assert [p.returncode for p in processes] == [0, 0], first + second
    assert "4 × cpu (cpu), 2 processes" in first
    assert "step 4/4" in first and "step" not in second
    # One process goes on from what two have saved.
    two = leaves(toy.run(toy.options(tmp_path / "two"), mesh_of(4)))
    assert [e["step"] for e in lines(tmp_path / "two")] == [1, 2, 3, 4, 5, 6]
    for name, value in leaves(one).items():
        np.testing.assert_allclose(two[name], value, 1e-5, 1e-6, err_msg=name)
