"""Options that every scheme shares, and the start of a command."""

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import tyro
from jax.sharding import Mesh

from jaxstyle.cache import use_compilation_cache
from jaxstyle.errors import UserError
from jaxstyle.options import parse as parse_options
from train import processes, sharding


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The run: where, how long, on what."""

    out: str = ""
    """Run folder, local or gs://; empty: runs/<scheme>-<reference name>. A folder that
    holds a checkpoint of the same options is continued."""
    steps: int = 300
    """Iterations in all, those of an earlier part of the run included."""
    batch: int = 1
    """Global batch, over all devices of all processes."""
    seed: int = 0
    """Seed of everything random."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the convolutions; parameters, norms and losses stay float32."""
    remat: bool = False
    """Keep only each resolution's output for the backward pass and compute the rest
    once more: less memory, about a third more time."""
    log_every: int = 10
    """Iterations between lines of metrics.jsonl."""
    sample_every: int = 100
    """Iterations between sample grids; 0: only the first and the last."""
    save_every: int = 500
    """Iterations between checkpoints; 0: only the last."""
    keep: int = 3
    """Newest checkpoints to keep; 0 keeps all."""
    tensorboard: bool = False
    """Write metrics and grids for TensorBoard too (extra: tensorboard)."""
    require: Literal["any", "cpu", "gpu", "tpu"] = "any"
    """Stop unless JAX runs on this kind of device."""
    distributed: Literal["auto", "on", "off"] = "auto"
    """Join the other processes of a pod or cluster; auto: if there are signs of one."""
    mesh_style: int = 1
    """Devices along the style axis (styles trained at the same time)."""
    mesh_data: int = 0
    """Devices along the data axis (parts of the batch); 0: all that are left."""
    mesh_fsdp: int = 1
    """Devices along the fsdp axis (batch and weights)."""
    mesh_space: int = 1
    """Devices along the space axis (rows of the pictures)."""
    compile_for: str = ""
    """Do not train: compile the steps for this TPU topology (such as v5e:4x4), say what
    they need, and exit. No TPU is needed; see train.fits."""
    debug_nans: bool = False
    """Stop at the operation that makes the first NaN (slow)."""
    debug_profile: bool = False
    """Trace iterations 10 to 20 into OUT/profile, for TensorBoard or xprof."""


Shared = Annotated[RunOptions, tyro.conf.OmitArgPrefixes]

# A run may be continued with other values of these.
FREE = frozenset(
    "out steps remat log_every sample_every save_every keep tensorboard require "
    "distributed compile_for mesh_style mesh_data mesh_fsdp mesh_space debug_nans "
    "debug_profile reading".split()
)


def parse(
    options_class: type,
    description: str | None,
    args: Sequence[str] | None = None,
    default: Any = None,
    *,
    least_steps: int = 1,
):
    """Command line to the options dataclass of a scheme.

    Args:
      options_class: frozen dataclass with a field `run` of type `Shared`.
      description: shown by --help, usually the module's docstring.
      args: instead of the command line.
      default: an instance to start from, instead of the class's own defaults.
      least_steps: that `--steps` may be.
    """
    module = options_class.__module__
    if module == "__main__" and sys.modules[module].__spec__:
        module = sys.modules[module].__spec__.name
    options = parse_options(options_class, module, description, args, default)
    run = options.run
    for name, least in (("steps", least_steps), ("batch", 1), ("log_every", 1)):
        if getattr(run, name) < least:
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} is {getattr(run, name)}; it must be at least {least}"
            )
    for name in ("sample_every", "save_every", "keep"):
        if getattr(run, name) < 0:
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} is {getattr(run, name)}; it must not be negative"
            )
    # What shuffles the data takes no other.
    if not 0 <= run.seed < 1 << 32:
        raise UserError(f"--seed is {run.seed}; it must be from 0 to {2**32 - 1}")
    return options


def with_profile(options: Any, profile: Mapping[str, Any], scheme: str) -> Any:
    """Options with the values that weights recommend, of their parts (`run`) too.

    Args:
      options: a dataclass; a field that is one itself is a part.
      profile: values by name, as in the weights' config.json.
      scheme: whose options they are.

    Raises:
      UserError: a name that no option has.
    """
    left = {n: tuple(x) if isinstance(x, list) else x for n, x in profile.items()}

    def given(part):
        names = {f.name for f in dataclasses.fields(part)} & left.keys()
        return dataclasses.replace(part, **{name: left.pop(name) for name in names})

    parts = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    parts = {
        n: given(part) for n, part in parts.items() if dataclasses.is_dataclass(part)
    }
    options = dataclasses.replace(given(options), **parts)
    if left:
        raise UserError(
            f"--weights {options.weights} recommend {', '.join(sorted(left))}, no "
            f"option of train.{scheme}; pass --no-profile"
        )
    return options


def as_flags(values: Mapping[str, Any]) -> str:
    """Options as somebody would type them: `--clip a b --batch 8 --improve-shape`."""
    words = []
    for name, value in values.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            several = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name}", *map(str, several)]
    return shlex.join(words)


def working(module: Any, run: RunOptions) -> Any:
    """A network that takes part in a step: computing as the run says."""
    return module.clone(dtype=run.dtype, remat=run.remat)


def with_out(options, name: str):
    """The options with `--out` filled in: `runs/<name>` when it was not given.

    Args:
      options: of a scheme, with a field `run`.
      name: `<scheme>-<reference name>`; odd characters become dashes.
    """
    if options.run.out:
        return options
    folder = "runs/" + re.sub(r"[^\w.+-]+", "-", name).strip("-.")
    return dataclasses.replace(
        options, run=dataclasses.replace(options.run, out=folder)
    )


def start(run: RunOptions) -> Mesh:
    """Join the other processes, check and print devices, and make the mesh.

    Call it before anything else that touches JAX.

    Raises:
      UserError: another kind of device than required, an impossible mesh, or a process
        of another version or with other options.
    """
    processes.join_processes(run.distributed)
    cache = use_compilation_cache()
    devices = jax.devices()
    platform = devices[0].platform
    if run.require not in ("any", platform):
        extra = {"gpu": "cuda"}.get(run.require, run.require)
        raise UserError(
            f"--require is {run.require}, but JAX runs on {platform} "
            f"({len(devices)} devices); install jaxstyle[{extra}], check the driver, "
            "or leave --require out"
        )
    processes.check_same(processes.versions() | dataclasses.asdict(run))
    # The mesh to compile for is not of these devices.
    axes = (run.mesh_style, run.mesh_data, run.mesh_fsdp, run.mesh_space)
    mesh = sharding.make_mesh(*((1, 1, 1, 1) if run.compile_for else axes))
    if run.debug_nans:
        jax.config.update("jax_debug_nans", True)
    if jax.process_index() == 0:
        count = jax.process_count()
        many = f", {count} processes" if count > 1 else ""
        print(
            f"devices: {len(devices)} × {devices[0].device_kind} ({platform}){many}, "
            f"memory {memory(devices[0])}"
        )
        print(f"mesh: {sharding.describe(mesh.shape)}")
        if run.mesh_space > 1:
            print("space > 1: convolutions run through XLA, not through Pallas kernels")
        print(f"compilation cache: {cache}", flush=True)
    return mesh


def memory(device: jax.Device) -> str:
    """Memory of one device, or of the host for a CPU."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return f"{stats['bytes_limit'] / 2**30:.1f} GiB each"
    if device.platform == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return f"{total / 2**30:.1f} GiB of the host"
    return "unknown"
