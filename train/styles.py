"""Many styles at a time, each on its own: the axis `style`."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from train import sharding
from train.loop import keep
from train.state import TrainState


def side_by_side(one: Any, *, own_draws: bool = True) -> Any:
    """The update of one style for many, each device doing its own styles alone.

    Left to itself the compiler merges styles and channels of a convolution, and gathers
    what it cannot split then.

    Args:
      one: a function (parameters, optimiser, what the style is taught by, key, step,
        frozen networks), the first three of one style.
      own_draws: a key for each style; otherwise all draw the same.

    Returns:
      That function of the first three, and of keys, with a leading axis of styles.
    """
    return each_alone(one, (0, 0, 0, 0 if own_draws else None, None, None))


def each_alone(function: Any, in_axes: Sequence[int | None]) -> Any:
    """A function of one style for many; see `side_by_side`.

    Args:
      function: of one style.
      in_axes: of each argument 0, where the styles have their own, or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["style"] == 1:
        return jax.vmap(function, in_axes, axis_name="style")
    return jax.shard_map(
        jax.vmap(function, in_axes),
        in_specs=tuple(P() if axis is None else P("style") for axis in in_axes),
        out_specs=P("style"),
        axis_names={"style"},
        check_vma=False,
    )


def a_few_at_a_time(function: Any, params: Any, pictures: Array, count: int) -> Any:
    """A function (parameters, pictures) of many pictures, each device on its styles'.

    Args:
      function: its results have the pictures as their first axis.
      params: of it.
      pictures: [styles, ...].
      count: pictures that a device takes at a time.
    """

    def own(params, pictures):
        total = len(pictures)
        size = min(count, total)
        turns = -(-total // size)
        rows = np.minimum(np.arange(turns * size), total - 1)
        parts = pictures[rows].reshape(turns, size, *pictures.shape[1:])
        found = jax.lax.map(lambda part: function(params, part), parts)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:total], found)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["style"] == 1:
        return own(params, pictures)
    return jax.shard_map(
        own,
        in_specs=(P(), P("style")),
        out_specs=P("style"),
        axis_names={"style"},
        check_vma=False,
    )(params, pictures)


def on_each(flags: Array, leaf: Array) -> Array:
    """Flags [styles] in the shape of a leaf [styles, ...], for a choice between two."""
    return flags.reshape(flags.shape + (1,) * (leaf.ndim - 1))


def copies(tree: Any, count: int) -> Any:
    """`count` copies of each array, along a new first axis."""
    return jax.tree.map(lambda x: jnp.repeat(x[None], count, 0), tree)


def start_progress(count: int) -> dict[str, Array]:
    """What `progress` begins with, for `TrainState.extra`."""
    return {
        "mean": jnp.zeros(count),
        "lowest": jnp.full(count, jnp.inf),
        "idle": jnp.zeros(count, jnp.int32),
    }


def held(state: TrainState, patience: int, new: Any, old: Any) -> tuple[Any, Array]:
    """`new`, but `old` of styles whose loss has not fallen for `patience` steps.

    Returns:
      That, and which styles learn [styles].
    """
    learns = state.extra["idle"] < patience
    chosen = jax.tree.map(lambda n, o: jnp.where(on_each(learns, n), n, o), new, old)
    return chosen, learns


def progress(state: TrainState, loss: Array, learns: Array) -> dict[str, Array]:
    """Averages of the losses [styles], the lowest, and steps since, for --patience."""
    extra = state.extra
    mean = jnp.where(state.step == 0, loss, 0.9 * extra["mean"] + 0.1 * loss)
    falls = mean < extra["lowest"]
    idle = jnp.where(falls, 0, extra["idle"] + 1)
    return {
        "mean": mean,
        "lowest": jnp.minimum(mean, extra["lowest"]),
        "idle": jnp.where(learns, idle, extra["idle"]),
    }


def write(
    folder: Any,
    state: TrainState,
    first: int,
    styles: Mapping[str, Mapping[str, Any]],
    networks: Mapping[str, nn.Module],
) -> None:
    """A folder for each style, `folder/NAME`, which loads like a run of its own.

    Args:
      folder: for all of them.
      state: parameters with a leading style axis.
      first: where on that axis to begin.
      styles: metadata by name, in the order of that axis.
      networks: modules by name.
    """
    params = state.params["generator"]
    where = sharding.replicated(jax.tree.leaves(params)[0].sharding.mesh)
    pick = jax.jit(lambda p, i: jax.tree.map(lambda x: x[i], p), out_shardings=where)
    for i, (name, metadata) in enumerate(styles.items()):
        one = state.replace(params={"generator": pick(params, first + i)})
        keep(folder / name, one, {}, networks, metadata)
