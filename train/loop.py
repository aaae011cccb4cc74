"""The training loop: resume, step, check, log, sample, save. It knows no loss."""

import contextlib
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxstyle import weights
from jaxstyle.cache import release_memory
from jaxstyle.errors import UserError
from train import fits, processes, sharding
from train.checkpoint import Checkpoints
from train.folder import check_folder, open_folder
from train.log import Log, write_json
from train.optim import path_name
from train.state import TrainState

__all__ = ["check_folder", "fit", "keep"]

Step = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Array]]]
Validate = Callable[[TrainState, Any], dict[str, float]]


def fit(
    options: Any,
    state: TrainState,
    frozen: Mapping[str, Any],
    schedule: Sequence[tuple[int, Step]],
    batches: Any,
    *,
    networks: Mapping[str, nn.Module],
    mesh: Mesh,
    metadata: Mapping[str, Any] | None = None,
    sample: Callable[[TrainState, Any], Array] | None = None,
    identity: Mapping[str, str] | None = None,
    rules: Sequence[tuple[str, P]] = sharding.RULES,
    validate: tuple[int, Validate] | None = None,
) -> TrainState:
    """Train, from the last checkpoint of the run folder if there is one.

    Args:
      options: the scheme's options; `options.run` is a RunOptions with `out` set.
      state: a fresh state, which shares no array with anything; its values are
        replaced when the run resumes.
      frozen: parameters that only judge or anchor, by name; an argument of every
        step, laid out like parameters, never saved.
      schedule: entries (every, step), run in order in the iterations that `every`
        divides, the first included; `every` 0 switches an entry off. A step is a
        pure function (state, frozen, batch) -> (state, metrics); `state.key` is its
        own key, `state.step` the number of finished iterations.
      batches: iterator over dicts of this process's rows [local_batch, ...] with
        `get_state`, `set_state` and `close`; None gives the steps an empty dict.
      networks: modules by name, those of `state.params`, for `config.json`.
      mesh: of the run; see train.sharding.
      metadata: kept in `config.json`; "scheme" names the scheme, "styles" those that
        are trained side by side: metrics may then be arrays [styles], and where one
        named `learns` is 0 for all, the run ends.
      sample: pure function (state, frozen) -> pictures [n, h, w, 3] or
        [rows, columns, h, w, 3] in [-1, 1], drawn with keys of its own that do not
        change from step to step.
      identity: digests of what the run was given (a reference picture, weights). A
        folder with others is refused.
      rules: layouts by path; they must cover everything.
      validate: (every, function): a function (state, frozen) -> {name: float} with
        `val_loss` among the names. The state with the lowest is kept in OUT/best, a
        folder that loads like the run; every 0 validates at the end alone. A
        `finished` among the names that is true makes that iteration the run's last. A
        run that has ended so, or by `learns`, trains no more, whatever its --steps.

    Returns:
      The last state, on the mesh.

    Raises:
      UserError: the folder belongs to another run or is in use; no checkpoint of it
        can be read, or none written; a metric or the state is not finite. The last
        good checkpoint stays.
      SystemExit: SIGTERM (with code 0: a machine that is taken away is no failure) or
        SIGINT came, and the state was saved first; or `run.compile_for` only asked what
        the steps need.
    """
    run = options.run
    if run.compile_for:
        batch = {}
        if batches is not None:
            with contextlib.closing(batches):
                batch = next(batches)

        def entry(index, mesh, layout, frozen_layout):
            return _jit(schedule[index][1], index, layout, frozen_layout, mesh)

        every = [interval for interval, _ in schedule]
        raise fits.Compiled(fits.report(run, entry, state, frozen, every, batch, rules))
    with open_folder(options, networks, metadata, identity) as folder:
        frozen = dict(frozen)
        layout, frozen_layout = sharding.layouts(state, frozen, mesh, rules)
        state = sharding.place(state, layout, take=True)
        frozen = sharding.place(frozen, frozen_layout, take=True)
        checkpoints = Checkpoints(folder / "checkpoints", run.keep)
        latest: dict[str, float] = {}
        resumed = checkpoints.restore_newest(state)
        ended = False  # by its own rule, not by --steps
        if resumed:
            state, data = resumed
            latest = data["metrics"]
            ended = data.get("ended", False)
            if batches is not None:
                batches.set_state(data["position"])
        else:
            with processes.together():
                # A run that ended before its first checkpoint may have left one.
                if jax.process_index() == 0 and (folder / "best").exists():
                    (folder / "best").rmtree()
        begin = int(state.step)
        end = begin if ended else run.steps
        steps = [
            (every, _jit(step, i, layout, frozen_layout, mesh))
            for i, (every, step) in enumerate(schedule)
            if every
        ]
        everywhere = sharding.replicated(mesh)
        advance = jax.jit(lambda s: s + 1, donate_argnums=0, out_shardings=everywhere)
        finite = jax.jit(_finite, out_shardings=everywhere)
        draw = sample and jax.jit(sample, out_shardings=everywhere)
        styles = (metadata or {}).get("styles", ())
        check = partial(_checked, checkpoints=checkpoints, folder=folder, styles=styles)
        log = Log(folder, begin, end, run.tensorboard)
        with (
            jax.set_mesh(mesh),
            contextlib.closing(checkpoints),
            contextlib.closing(log),
            contextlib.closing(batches) if batches else contextlib.nullcontext(),
            _signals() as caught,
            contextlib.ExitStack() as trace,
        ):
            if ended:
                log.say(f"{folder} was ended by its own rule and trains no more")
            elif resumed and begin >= end:
                log.say(f"{folder} is at step {begin} already; --steps is {run.steps}")
            elif resumed:
                log.say(f"continuing {folder} at step {begin} of {run.steps}")
            elif draw:
                log.samples(begin, np.asarray(draw(state, frozen)))
            if begin < end and jax.process_index() == 0:
                # A run that goes on is not finished.
                (folder / "summary.json").unlink(missing_ok=True)
            pending: tuple[int, dict[str, Array]] | None = None
            for i in range(begin, end):
                last = i + 1 == end
                if run.debug_profile:
                    _trace(folder, i - begin, trace)
                batch = {}
                if batches is not None:
                    batch = sharding.global_batch(next(batches), mesh)
                if i == begin:
                    steps = _compile(steps, state, frozen, batch, log)
                metrics: dict[str, Array] = {}
                for every, step in steps:
                    if i % every == 0:
                        state, values = step(state, frozen, batch)
                        metrics |= values
                state = state.replace(step=advance(state.step))
                log.advance()
                # The metrics of the iteration before have arrived; asking for those of
                # this one would leave the device idle.
                if pending:
                    latest |= check(*pending)
                pending, done = (i + 1, metrics), i + 1
                logs = last or done % run.log_every == 0
                saves = last or (run.save_every and done % run.save_every == 0)
                stop = _asked_to_stop(caught, done)
                if logs or saves or stop:
                    latest |= check(*pending)
                    pending = None
                if latest.get("learns") == 0:
                    ended = last = logs = saves = True
                if validate and (last or (validate[0] and done % validate[0] == 0)):
                    # Virtual devices of a CPU can lock up in two programs at a time.
                    values = validate[1](jax.block_until_ready(state), frozen)
                    if values["val_loss"] < latest.get("best_val_loss", math.inf):
                        values |= {
                            "best_val_loss": values["val_loss"],
                            "best_step": done,
                        }
                        keep(folder / "best", state, values, networks, metadata)
                    if values.pop("finished", False):
                        ended = last = logs = saves = True
                        latest |= check(*pending) if pending else {}
                    latest |= values
                    log.say(f"step {done}: validation loss {values['val_loss']:.4f}")
                if logs:
                    log.metrics(done, latest)
                if saves or stop:
                    _check_state(done, state, finite(state), checkpoints, folder)
                    position = None if batches is None else batches.get_state()
                    data = {"position": position, "metrics": latest, "ended": ended}
                    checkpoints.save(done, state, data)
                    # Its threads would keep what they free, some hundred megabytes in
                    # half an hour.
                    release_memory()
                if draw and (
                    last or (run.sample_every and done % run.sample_every == 0)
                ):
                    log.samples(done, np.asarray(draw(state, frozen)))
                if stop and not last:
                    checkpoints.wait()
                    _leave(stop, done, folder, log)
                if last:
                    break
            checkpoints.wait()
            step = int(state.step)
            if jax.process_index() == 0 and not (folder / "summary.json").exists():
                summary = {
                    "scheme": (metadata or {}).get("scheme", "train"),
                    "step": step,
                    "seconds": round(log.seconds, 1),
                    "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                    "metrics": latest,
                }
                write_json(folder / "summary.json", summary)
            log.say(f"finished step {step}: {folder}")
        return state


def _jit(
    step: Step, index: int, layout: Any, frozen_layout: Any, mesh: Mesh
) -> jax.stages.Wrapped:
    """One entry of the schedule, jitted, with its own key and fixed layouts."""

    def entry(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Any]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), index)
        inner = state.replace(key=key)
        if mesh.shape["fsdp"] > 1:
            # A convolution must see its weight whole, else XLA moves activations.
            inner = inner.replace(
                params=sharding.gathered(state.params, layout.params),
                ema=sharding.gathered(state.ema, layout.ema),
            )
            frozen = sharding.gathered(frozen, frozen_layout)
        new, metrics = step(inner, frozen, batch)
        # A style's metrics stay where it is: no collective is needed for them.
        metrics = {
            name: jax.lax.with_sharding_constraint(
                x, NamedSharding(mesh, P("style") if x.ndim else P())
            )
            for name, x in metrics.items()
        }
        return new.replace(key=state.key, step=state.step), metrics

    return jax.jit(entry, donate_argnums=0, out_shardings=(layout, None))


def _compile(steps, state, frozen, batch, log):
    """The whole schedule compiled before the first iteration, which says how long.

    A step that runs once in many iterations would else stop the run in the middle, and
    the compiler's memory would add to that of the first step, as what is left of making
    the state would add to the compiler's.
    """
    start = time.perf_counter()
    release_memory()
    compiled = [(every, f.lower(state, frozen, batch).compile()) for every, f in steps]
    release_memory()
    log.say(f"compiled in {time.perf_counter() - start:.1f} s")
    return compiled


def keep(
    folder: Any,
    state: TrainState,
    metrics: Mapping[str, float],
    networks: Mapping[str, nn.Module],
    metadata: Mapping[str, Any] | None,
) -> None:
    """Make or replace a folder that loads like the run, with this state alone.

    Optimisers are left out. Every process has to call it.
    """
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", weights.config_dict(networks, metadata))
    with contextlib.closing(Checkpoints(folder / "checkpoints", 1)) as checkpoints:
        data = {"position": None, "metrics": dict(metrics)}
        bare = state.replace(opt_state={}, extra={})
        checkpoints.save(int(state.step), bare, data)
        checkpoints.wait()


def _finite(state: TrainState) -> Array:
    """Whether each float leaf is finite, [leaves]."""
    return jnp.stack([jnp.all(jnp.isfinite(x)) for _, x in _float_leaves(state)])


def _float_leaves(state: TrainState) -> list[tuple[str, Array]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return [
        (path_name(p), x) for p, x in leaves if jnp.issubdtype(x.dtype, jnp.floating)
    ]


def _ways_out(checkpoints: Checkpoints, folder: Any) -> str:
    checkpoints.wait()
    step = checkpoints.latest()
    kept = (
        "no checkpoint was written yet" if step is None else f"checkpoint {step} stays"
    )
    return (
        f"{kept} in {folder}; use a lower learning rate or a larger batch, and "
        "--debug-nans to find the operation"
    )


def _checked(
    step: int,
    metrics: Mapping[str, Array],
    checkpoints: Checkpoints,
    folder: Any,
    styles: Sequence[str],
) -> dict[str, float]:
    """The metrics as floats; a value that is not finite ends the run.

    A metric of every style gives its mean, and the style's own as `name/style`.
    """
    values = {}
    for name, value in metrics.items():
        if value.ndim:
            if not value.is_fully_addressable:
                value = multihost_utils.process_allgather(value, tiled=True)
            value = np.asarray(value)
            of_styles = {
                f"{name}/{s}": float(v) for s, v in zip(styles, value, strict=True)
            }
            values |= {name: float(np.mean(value))} | of_styles
        else:
            values[name] = float(value)
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} is {value} at step {step}: " + _ways_out(checkpoints, folder)
            )
    return values


def _check_state(
    step: int, state: TrainState, flags: Array, checkpoints: Checkpoints, folder: Any
) -> None:
    """Refuse to save a state that is not finite."""
    for (name, _), good in zip(_float_leaves(state), np.asarray(flags), strict=True):
        if not good:
            raise UserError(
                f"{name} is not finite at step {step}: "
                + _ways_out(checkpoints, folder)
            )


@contextlib.contextmanager
def _signals():
    """Collect SIGTERM and SIGINT in a list; the second SIGINT interrupts at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(number, _):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    # Of several processes, SIGTERM is JAX's: it tells the others.
    many = jax.process_count() > 1
    wanted = (signal.SIGINT,) if many else (signal.SIGTERM, signal.SIGINT)
    before = {s: signal.signal(s, catch) for s in wanted}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _asked_to_stop(caught: list[int], step: int) -> int:
    """The signal that ends the run after this step, or 0; the same on all processes."""
    if jax.process_count() == 1:
        return caught[0] if caught else 0
    return signal.SIGTERM * multihost_utils.reached_preemption_sync_point(step)


def _leave(number: int, step: int, folder: Any, log: Log) -> None:
    """End the process after a signal, saying how to go on."""
    # `python -m train.jojo` has become a path in sys.argv.
    spec = sys.modules["__main__"].__spec__
    program = ["python", "-m", spec.name] if spec else sys.argv[:1]
    log.say(
        f"stopped by {signal.Signals(number).name} at step {step}, saved in {folder}; "
        f"the same command continues: {shlex.join([*program, *sys.argv[1:]])}"
    )
    # Who takes a machine away has not seen a failure.
    raise SystemExit(0 if number == signal.SIGTERM else 128 + number)


def _trace(folder: Any, iteration: int, trace: contextlib.ExitStack) -> None:
    """Trace iterations 10 to 19 of this part of the run, or what there is of them."""
    if iteration == 10:
        trace.enter_context(jax.profiler.trace(os.fspath(folder / "profile")))
    elif iteration == 20:
        trace.close()
