"""One mesh, shardings from rules on parameter paths, and random draws that ignore both.

The mesh has four axes, each of size 1 unless asked for:

| axis    | what is split over it                                                   |
| ------- | ----------------------------------------------------------------------- |
| `style` | styles trained at the same time, one set of parameters each             |
| `data`  | the batch                                                               |
| `fsdp`  | the batch, and the output channels of weights and their Adam moments    |
| `space` | rows of the pictures, for one that does not fit on one device           |
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxstyle.errors import UserError
from train.optim import path_name

AXES = ("style", "data", "fsdp", "space")
BATCH = ("data", "fsdp")

# The first rule whose pattern is found in the path gives the layout of an array. The
# paths are those of TrainState (`params/generator/synthesis/conv_4/weight`,
# `opt_state/generator/0/mu/…`) and of the frozen networks (`frozen/discriminator/…`).
RULES: tuple[tuple[str, P], ...] = (
    (r"^opt_state/.*/count(/|$)", P()),
    (r"(affine|dense\w*|hidden)/weight$", P(None, "fsdp")),
    (
        r"(\w*conv\w*|up_\d+|rgb_\d+|from_rgb|skip|lateral_\d+)/weight$|/conv\d?$",
        P(None, None, None, "fsdp"),
    ),
    (r"", P()),
)


def make_mesh(
    style: int = 1,
    data: int = 0,
    fsdp: int = 1,
    space: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh of a run.

    Args:
      style, data, fsdp, space: sizes of the axes; `data` 0 takes all that is left.
      devices: all of every process when None.

    Raises:
      UserError: sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"style": style, "data": data, "fsdp": fsdp, "space": space}
    for name, size in sizes.items():
        if size < 1 and not (name == "data" and size == 0):
            raise UserError(f"--mesh-{name} is {size}; it must be at least 1")
    fixed = style * fsdp * space
    if data == 0:
        if len(devices) % fixed:
            raise UserError(
                f"--mesh-style {style} × --mesh-fsdp {fsdp} × --mesh-space {space} = "
                f"{fixed} does not divide the {len(devices)} devices"
            )
        sizes["data"] = len(devices) // fixed
    count = int(np.prod(list(sizes.values())))
    # One process may leave devices unused; of many, each must own a part of the mesh.
    if count > len(devices) or (jax.process_count() > 1 and count != len(devices)):
        raise UserError(
            f"the mesh {describe(sizes)} has {count} places for {len(devices)} devices"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        AXES,
        (AxisType.Auto,) * len(AXES),
        devices=devices[:count],
    )


def describe(sizes: Mapping[str, int]) -> str:
    """`style 1 × data 8 × fsdp 1 × space 1`."""
    return " × ".join(f"{name} {size}" for name, size in sizes.items())


def check_batch(batch: int, mesh: Mesh) -> None:
    """Refuse a global batch that the mesh cannot split evenly.

    Raises:
      UserError: naming both numbers.
    """
    places = batch_places(mesh)
    if batch < 1 or batch % places:
        raise UserError(
            f"--batch is {batch} over {places} devices of the mesh's data and fsdp "
            f"axes; the global batch must be a multiple of {places} "
            f"(use --batch {max(1, round(batch / places)) * places}, or fewer devices "
            "with --mesh-data)"
        )


def batch_places(mesh: Mesh) -> int:
    """Number of parts the batch is split into."""
    return int(np.prod([mesh.shape[a] for a in BATCH]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def shardings(tree: Any, mesh: Mesh, rules: Sequence[tuple[str, P]] = RULES) -> Any:
    """A sharding for every leaf of a tree, from the first rule its path matches.

    An axis that does not divide the dimension is left out, so small layers stay whole.

    Raises:
      UserError: a path that no rule covers, or a rule longer than the array's shape.
    """
    compiled = [(re.compile(pattern), spec) for pattern, spec in rules]

    def assign(path: Sequence[Any], leaf: Any) -> NamedSharding:
        name = path_name(path)
        found = next(((p, s) for p, s in compiled if p.search(name)), None)
        if found is None:
            raise UserError(f"no sharding rule covers {name}")
        pattern, spec = found
        shape = np.shape(leaf)
        if len(spec) > len(shape):
            raise UserError(
                f"the rule {pattern.pattern!r} gives {name} the layout {spec}, but its "
                f"shape is {list(shape)}"
            )
        fitting = [
            axis if axis and size % _places(mesh, axis) == 0 else None
            for size, axis in zip(shape, spec, strict=False)
        ]
        return NamedSharding(mesh, P(*fitting))

    return jax.tree_util.tree_map_with_path(assign, tree)


def _places(mesh: Mesh, axis: str | tuple[str, ...]) -> int:
    names = (axis,) if isinstance(axis, str) else axis
    return int(np.prod([mesh.shape[name] for name in names]))


def layouts(
    state: Any, frozen: Any, mesh: Mesh, rules: Sequence[tuple[str, P]] = RULES
) -> tuple[Any, Any]:
    """Shardings of a run's state and of its frozen networks and data."""
    found = shardings({"frozen": frozen}, mesh, rules)["frozen"]
    return shardings(state, mesh, rules), found


def built(
    make: Callable[..., tuple[Any, Any]],
    mesh: Mesh,
    rules: Sequence[tuple[str, P]],
    *args: Any,
    specs: Sequence[P] = (),
) -> tuple[Any, Any]:
    """A run's state and frozen data, each device making only what it will hold.

    Many styles, each with parameters of its own, do not fit on a single device first.

    Args:
      make: a pure function of `args`, giving both.
      mesh, rules: of the run.
      args: trees of arrays, equal on all processes.
      specs: how the arrays of each are split; empty: not at all.
    """
    wheres = [NamedSharding(mesh, spec) for spec in specs or [P()] * len(args)]
    args = [
        place(arg, jax.tree.map(lambda _, where=where: where, arg))
        for arg, where in zip(args, wheres, strict=True)
    ]

    def fresh(*args):
        state, frozen = make(*args)
        # The state is donated to the first step; the arguments must outlive it.
        return jax.tree.map(jnp.copy, state), frozen

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(fresh, *args)
        where = layouts(*shapes, mesh, rules)
        return jax.jit(fresh, out_shardings=where)(*args)


def place(tree: Any, targets: Any, *, take: bool = False) -> Any:
    """Copies of a tree's arrays, laid out as `targets` says, on every process.

    The values must be equal on all processes; each makes only its own parts. Nothing
    is shared with the argument, so the result may be donated; but with `take` what lies
    so already is taken as it is.
    """

    def put(leaf: Any, target: NamedSharding) -> Array:
        if take and isinstance(leaf, jax.Array) and leaf.sharding == target:
            return leaf
        if isinstance(leaf, jax.Array) and jnp.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            data = put(jax.random.key_data(leaf), replicated(target.mesh))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, target, may_alias=False)
        host = np.array(leaf)
        return jax.make_array_from_callback(
            host.shape, target, lambda i: host[i].copy()
        )

    return jax.tree.map(put, tree, targets)


def fetch(tree: Any) -> Any:
    """The arrays of a tree on the mesh, whole, on every host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: multihost_utils.process_allgather(x, tiled=True), tree
    )


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Samples over data and fsdp; of pictures also the rows over space."""
    return NamedSharding(mesh, P(BATCH, "space") if ndim == 4 else P(BATCH))


@functools.cache
def process_rows(mesh: Mesh, batch: int) -> np.ndarray:
    """The rows of a global batch that this process has to supply, ascending.

    A mesh follows the wiring of the chips, so these need not be neighbours.

    Raises:
      UserError: a batch that the mesh cannot split.
    """
    check_batch(batch, mesh)
    parts = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((batch,))
    found = [np.arange(*part[0].indices(batch)) for part in parts.values()]
    return np.unique(np.concatenate(found))


def global_batch(local: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Global arrays from the rows of this process, [local_batch, ...] each."""
    places = batch_places(mesh)
    mine = len(process_rows(mesh, places))

    def made(x: np.ndarray) -> Array:
        batch = len(x) // mine * places
        rows = process_rows(mesh, batch)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, end, _ = index[0].indices(batch)
            begin = np.searchsorted(rows, first)
            return x[begin : begin + end - first][:, *index[1:]]

        where = batch_sharding(mesh, x.ndim)
        return jax.make_array_from_callback((batch, *x.shape[1:]), where, part)

    return {name: made(np.asarray(rows)) for name, rows in local.items()}


# Inside a step


def gathered(tree: Any, layout: Any) -> Any:
    """Arrays of a layout put together along fsdp; other axes stay as they are."""

    def gather(x: Array, sharding: NamedSharding) -> Array:
        spec = P(*(None if axis == "fsdp" else axis for axis in sharding.spec))
        return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, spec))

    return jax.tree.map(gather, tree, layout)


def constrain(x: Array, *spec: Any) -> Array:
    """Split an array over the mesh in use: its samples, or as `spec` says.

    Without a mesh, or where the sizes do not divide, `x` comes back as it is. Drawn
    samples need this: nothing else tells the compiler to split them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if not spec:
        spec = (BATCH, "space") if x.ndim == 4 else (BATCH,)
    for size, axes in zip(x.shape, spec, strict=False):
        names = (axes,) if isinstance(axes, str) else axes or ()
        if size % int(np.prod([mesh.shape.get(a, 1) for a in names])):
            return x
    return jax.lax.with_sharding_constraint(x, P(*spec))


def filled(count: int) -> int:
    """A number of samples, rounded up to what the mesh in use splits evenly.

    Fewer than that are computed by every device, all of them. Whoever draws more takes
    the results of the first `count`, which do not depend on the others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    places = (
        int(np.prod([mesh.shape.get(a, 1) for a in BATCH])) if not mesh.empty else 1
    )
    return -(-count // places) * places


def sample_keys(key: Array, batch: int) -> Array:
    """One key a sample [batch], folded from the sample's global index.

    What is drawn from them depends on `key` and the index alone, never on the batch,
    the device or the process.
    """
    indices = constrain(jnp.arange(batch))
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def sample_normal(key: Array, batch: int, *shape: int) -> Array:
    """Standard normals [batch, *shape], one key a sample."""
    keys = sample_keys(key, batch)
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
