"""What the inference commands share: number lists, codes, runs, pictures in batches."""

import io
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array

from jaxstyle import weights
from jaxstyle.errors import UserError
from jaxstyle.images import write_bytes
from jaxstyle.stylegan2 import Generator, Params, truncate

CODE_SPACES = ("w_plus", "w", "z", "styles")
"""Arrays a code file may hold, the first found is used."""


def parse_numbers(text: str, option: str) -> list[int]:
    """`"0-3,7"` as [0, 1, 2, 3, 7].

    Args:
      text: numbers and ranges, both ends included, separated by commas.
      option: its name, for the error.

    Raises:
      UserError: anything else, a range that runs backwards, or more than 10,000.
    """
    numbers: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= 2**32:
            raise UserError(
                f"{option} is {text!r}; it must be numbers and ranges such as 0-3,7"
            )
        if len(numbers) + last - first >= 10_000:
            raise UserError(f"{option} is {text!r}: more than 10,000 numbers")
        numbers += range(first, last + 1)
    return numbers


# Codes


def seed_keys(seeds: Sequence[int], purpose: int = 0) -> Array:
    """One random key a seed, [n]; another `purpose` gives independent ones."""
    return jnp.stack([jax.random.fold_in(jax.random.key(s), purpose) for s in seeds])


def seed_codes(seeds: Sequence[int], z_dim: int) -> Array:
    """z [n, z_dim]; each depends on its own seed alone, not on its neighbours."""
    return jax.vmap(lambda k: jax.random.normal(k, (z_dim,)))(seed_keys(seeds))


def read_codes(path: str | os.PathLike, generator: Generator) -> tuple[Any, str]:
    """Codes of an `.npz` file, checked against a generator.

    The file holds one of the arrays `w_plus` [n, num_ws, w_dim], `w` [n, w_dim],
    `z` [n, z_dim] or `styles` [n, sum of the style lengths], the style vectors one
    after the other in execution order.

    Returns:
      The codes as float32, `styles` split into one [n, in] a modulated layer, and
      the name of their space.

    Raises:
      UserError: no such file or array, not finite, or another shape.
    """
    path = epath.Path(path)
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            space = next((s for s in CODE_SPACES if s in file), None)
            if space is None:
                raise UserError(
                    f"{path} holds {', '.join(file.files) or 'nothing'}; a code file "
                    f"holds one of {', '.join(CODE_SPACES)}"
                )
            codes = file[space].astype(np.float32)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such code file") from None
    # A TypeError: a .npy file, which holds one array without a name.
    except (
        ValueError,
        TypeError,
        OSError,
        EOFError,
        zipfile.BadZipFile,
        AttributeError,
    ) as e:
        raise UserError(
            f"{path} is not an .npz file of codes ({e}); `python -m jaxstyle.invert` "
            "writes one"
        ) from None
    if not np.isfinite(codes).all():
        raise UserError(f"{space} in {path} holds values that are not finite")
    if space == "styles":
        dims = generator.style_dims
        if codes.ndim != 2 or codes.shape[1] != sum(dims):
            raise UserError(
                f"styles in {path} have shape {list(codes.shape)}; a {generator.size} "
                f"px generator takes [n, {sum(dims)}], the vectors of its {len(dims)} "
                "modulated layers one after the other"
            )
        return tuple(np.split(codes, np.cumsum(dims)[:-1], axis=1)), space
    try:
        generator.check_codes(codes, space)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not len(codes):
        raise UserError(f"{path} holds no codes: {space} has shape {list(codes.shape)}")
    return codes, space


def write_codes(path: str | os.PathLike, **arrays: Any) -> None:
    """Write an `.npz` file of arrays, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **{k: np.asarray(v) for k, v in arrays.items()})
    write_bytes(path, buffer.getvalue())


def in_batches(function: Callable[[Any], Array], rows: Any, batch: int) -> np.ndarray:
    """Apply a jitted function to the rows of a tree, `batch` at a time.

    The last batch is filled up: one compilation, and the bits of a row depend on
    `batch` but not on how many others there are.

    Args:
      function: of a tree of [batch, ...] to [batch, ...].
      rows: tree of [n, ...].
      batch: rows at a time.

    Returns:
      [n, ...].
    """
    n = len(jax.tree.leaves(rows)[0])
    done = []
    for start in range(0, n, batch):
        chosen = np.minimum(np.arange(start, start + batch), n - 1)
        part = jax.tree.map(lambda x, c=chosen: x[c], rows)
        done.append(np.asarray(function(part))[: n - start])
    return np.concatenate(done)


@partial(jax.jit, static_argnames=("generator", "space", "psi", "cutoff"))
def _to_w_plus(generator, params, codes, space, psi, cutoff):
    if space == "z":
        codes = generator.apply({"params": params}, codes, method="mapping")
    if codes.ndim == 2:
        shape = (codes.shape[0], generator.num_ws, generator.w_dim)
        codes = jnp.broadcast_to(codes[:, None], shape)
    return codes if psi == 1 else truncate(codes, params["w_avg"], psi, cutoff)


def to_w_plus(
    generator: Generator,
    params: Params,
    codes: Any,
    space: str,
    *,
    psi: float = 1.0,
    cutoff: int | None = None,
    batch: int = 1,
) -> np.ndarray:
    """Codes of z, w or w_plus as w_plus [n, num_ws, w_dim], truncated.

    Args:
      generator: the architecture.
      params: its parameters.
      codes: [n, ...] in `space`.
      space: z, w or w_plus.
      psi: truncation towards the average code; 1 leaves the codes alone.
      cutoff: truncate only this many rows, from the coarsest.
      batch: codes at a time; see `in_batches`.
    """
    return in_batches(
        lambda c: _to_w_plus(generator, params, c, space, psi, cutoff),
        generator.check_codes(codes, space),
        batch,
    )


# Networks and runs


def load_generator(
    name_or_path: str, *, step: int | None = None, style: str | None = None
) -> tuple[Generator, Params]:
    """The generator of a network folder or run, and its parameters."""
    model, params = weights.load(name_or_path, step=step, style=style)
    return model.generator, params["generator"]


def newest_run(runs: str | os.PathLike = "runs") -> str:
    """The newest finished run of a style: it has a summary, a generator and a base.

    Raises:
      UserError: there is none.
    """
    found = []
    # The demo keeps its run one folder deeper.
    root = Path(runs)
    for summary in [*root.glob("*/summary.json"), *root.glob("*/*/summary.json")]:
        try:
            config = weights.read_config(summary.parent)
            finished = summary.stat().st_mtime
        except (UserError, OSError):
            continue
        if "generator" in config["networks"] and config["metadata"].get("base"):
            found.append((finished, str(summary.parent)))
    if not found:
        raise UserError(
            f"no --weights given and no finished run of a style under {runs}/; train "
            "one with `python -m train.jojo --ref PICTURE`, or name a folder with "
            "--weights"
        )
    return max(found)[1]


# Pictures


def resize(pictures: Array, size: int) -> Array:
    """Pictures [n, h, h, 3] at `size`, filtered when they shrink."""
    n, height, width, channels = pictures.shape
    if (height, width) == (size, size):
        return pictures
    return jax.image.resize(pictures, (n, size, size, channels), "linear")


def as_read(pictures: Array, size: int) -> Array:
    """Pictures [n, h, h, 3] at `size` as `images.to_array` would read them: Lanczos."""
    pictures = jnp.asarray(pictures, jnp.float32)
    n, height, width, channels = pictures.shape
    if (height, width) == (size, size):
        return pictures
    shape = (n, size, size, channels)
    return jnp.clip(jax.image.resize(pictures, shape, "lanczos3"), -1, 1)


@partial(jax.jit, static_argnames=("generator", "space", "noise"))
def _forward(generator, params, codes, keys, space, noise):
    return generator.apply(
        {"params": params}, codes, space=space, noise=noise, key=keys
    )[0]


def pictures(
    generator: Generator,
    params: Params,
    codes: Any,
    *,
    space: str = "w_plus",
    noise: str = "const",
    keys: Array | None = None,
    batch: int = 1,
) -> np.ndarray:
    """Codes to pictures.

    Args:
      generator: the architecture.
      params: its parameters.
      codes: [n, ...] in `space`; a tuple of [n, in] for styles.
      space: of the codes.
      noise: const, random or none.
      keys: [n], for random noise.
      batch: pictures at a time; see `in_batches`.

    Returns:
      [n, size, size, 3] float32, nominally in [-1, 1].
    """
    return in_batches(
        lambda rows: _forward(generator, params, *rows, space, noise),
        (generator.check_codes(codes, space), keys),
        batch,
    )
