"""The kernels through the real compiler for TPU, which needs libtpu but no TPU."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxstyle.stylegan2 import channel_table, noise_names
from pallas_ops import activated_conv2d, modulated_conv2d, output_packing
from pallas_ops.cells import packing_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu: pip install 'jaxstyle[tpu]'",
    ),
]
TABLE = channel_table(1024)
# Above the size from which the kernels are the default.
LAYERS = [n for n in noise_names(1024) if int(n.split("_")[1]) >= 32]


@pytest.fixture(scope="module", autouse=True)
def no_metadata_server():
    """There is no machine to ask for the topology, nor one to load cached programs."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def mesh_of(topology, **axes):
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
    ).devices
    count = int(np.prod(list(axes.values())))
    return Mesh(
        np.array(devices[:count]).reshape(*axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
    )


def layer_of(name, batch, dtype=jnp.bfloat16):
    """A layer between packed activations, and its arguments' shapes."""
    kind, size = name.split("_")
    up, size = kind == "up", int(size)
    inside = size // 2 if up else size
    channels, outputs = TABLE[inside], TABLE[size]
    packing = packing_of(channels)
    shape = batch, inside, inside // packing, packing * channels
    weight = 3, 3, channels, outputs

    def layer(x, weight, style, noise, bias):
        options = {"up": up, "implementation": "pallas"}
        after = output_packing(x.shape, weight.shape, packing=packing, **options)
        return modulated_conv2d(
            x,
            weight,
            style,
            noise=noise,
            bias=bias,
            packing=(packing, after),
            **options,
        )

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    return layer, [
        array(*shape, dtype=dtype),
        array(*weight),
        array(batch, channels),
        array(1, size, size),
        array(outputs),
    ]


def gradients(layer):
    """Value and all gradients of a scalar."""

    def scalar(*args):
        return jnp.sum(jnp.square(layer(*args).astype(jnp.float32)))

    return jax.value_and_grad(scalar, range(5))


def compiled(function, args, mesh, specs=None):
    specs = specs or [P()] * len(args)
    args = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for a, spec in zip(args, specs, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*args).compile()


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, topology):
    """Forward and backward of every layer of the 1024 px generator fit the chip."""
    layer, args = layer_of(name, 2)
    program = compiled(gradients(layer), args, mesh_of(topology, data=1)).as_text()
    kind, size = name.split("_")
    # The convolution, its gradient and the weight's; the 36 taps of an up-convolution,
    # where there are many channels, by one kernel more for each.
    sums_taps = kind == "up" and TABLE[int(size)] >= 128
    assert program.count("tpu_custom_call") == (6 if sums_taps else 3)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("k", [1, 3], ids=["skip", "down"])
@pytest.mark.parametrize("size", [1024, 512, 256, 128, 64])
def test_discriminator_layers(size, k, topology):
    """Forward and backward of its blur and strided convolutions."""
    channels, outputs = TABLE[size], TABLE[size // 2]
    packing = packing_of(channels)
    shape = 2, size, size // packing, packing * channels
    weight = k, k, channels, outputs
    options = {"down": True, "implementation": "pallas"}

    def scalar(x, weight, bias):
        after = output_packing(x.shape, weight.shape, packing=packing, **options)
        y = activated_conv2d(x, weight, bias, packing=(packing, after), **options)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    args = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        jax.ShapeDtypeStruct(weight, jnp.float32),
        jax.ShapeDtypeStruct((outputs,), jnp.float32),
    ]
    both = jax.value_and_grad(scalar, range(3))
    program = compiled(both, args, mesh_of(topology, data=1)).as_text()
    assert program.count("tpu_custom_call") >= 3


@pytest.mark.parametrize("name", ["conv_1024", "up_64"])
def test_float32(name):
    layer, args = layer_of(name, 1, jnp.float32)
    assert compiled(layer, args, mesh_of("v5e:2x2", data=1))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_split_over_a_pod(order):
    """Styles and pictures over 4 × 4 chips: nobody gathers an activation."""
    layer, args = layer_of("conv_64", 8)

    def norm(*args):
        _, first = gradients(layer)(*args)
        return sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in first)

    function = [layer, gradients(layer), jax.grad(norm, range(5))][order]
    args = [jax.ShapeDtypeStruct((4, *a.shape), a.dtype) for a in args]
    specs = [P("style", "data"), P("style"), P("style", "data"), P("style"), P("style")]
    program = compiled(
        jax.vmap(function, spmd_axis_name="style"),
        args,
        mesh_of("v5e:4x4", style=4, data=4),
        specs,
    ).as_text()
    assert program.count("tpu_custom_call") >= 1 + 2 * order
    gathered = re.findall(r"= (\w+\[[\d,]*\])[^=]* all-gather", program)
    picture = 64 * 64 * 512
    sizes = [
        np.prod([int(n) for n in re.findall(r"\d+", g.split("[")[1])]) for g in gathered
    ]
    assert not [g for g, s in zip(gathered, sizes, strict=True) if s >= picture]
