"""Eight CPU devices, exact matmuls and one compilation cache for the whole suite."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402

from jaxstyle.cache import release_memory  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get(
        "JAXSTYLE_TEST_CACHE", os.path.join(tempfile.gettempdir(), "jaxstyle-test-xla")
    ),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Programs of one file are no use to the next, and add up to gigabytes."""
    yield
    jax.clear_caches()
    release_memory()


@pytest.fixture
def key():
    """A fixed random key."""
    return jax.random.key(0)


@pytest.fixture
def quick_compile():
    """Compiling is nearly all of the time at small sizes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def double_precision(monkeypatch):
    """What networks, losses and optimisers call float32 is float64."""
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    with jax.enable_x64(True):
        yield
