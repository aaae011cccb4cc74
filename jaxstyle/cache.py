"""Compiled programs kept between runs: compiling is part of what a user waits for."""

import contextlib
import ctypes
import os
from pathlib import Path

import jax


def use_compilation_cache() -> str:
    """Turn on JAX's persistent compilation cache; returns its folder.

    `JAX_COMPILATION_CACHE_DIR` or `JAXSTYLE_CACHE` say where; else
    `~/.cache/jaxstyle/xla`.
    """
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        default = Path.home() / ".cache" / "jaxstyle" / "xla"
        folder = os.environ.get("JAXSTYLE_CACHE") or str(default)
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


def release_memory() -> None:
    """Give memory that was freed back to the system.

    glibc keeps it for later, some hundred megabytes after a large program was compiled;
    elsewhere this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
