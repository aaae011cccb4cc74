"""References of a style: aligned pictures and their codes.

A run folder keeps them under `references/`, so that a run that goes on neither aligns
nor inverts again, and people can see what the crop and the inversion gave.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array
from jax.experimental import multihost_utils

from jaxstyle import invert
from jaxstyle.align import prepare as prepare_picture
from jaxstyle.images import grid, save_image, to_array
from jaxstyle.masks import named_masks, parse_mask
from jaxstyle.pipeline import write_codes
from jaxstyle.stylegan2 import Generator, style_rows
from train import processes, sharding

# A tenth of a photo's: the reference teaches by what its code draws already.
PULL = 0.05
# Pictures that a device inverts at a time.
BATCH = 4
# Options that the pictures and codes depend on.
PREPARED_BY = (
    *("ref", "align", "encoder", "inversion", "inversion_steps", "inversion_space"),
    *("virtual_mask", "perceptual_net"),
)


def digest(paths: Sequence[epath.Path]) -> str:
    """Sixteen hex digits that change when any file does."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()[:16]


def made_from(options: Any, identity: Mapping[str, str]) -> str:
    """Sixteen hex digits that change with what pictures and codes are made from.

    See `prepare`.
    """
    said = [getattr(options, name) for name in PREPARED_BY]
    said += [options.run.seed, options.run.dtype, sorted(identity.items())]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def shapes(options: Any, generator: Generator) -> tuple[Any, Any]:
    """Those of the pictures and codes that `prepare` makes."""
    count, size = len(options.ref), generator.size
    pictures, codes = (size, size, 3), (len(style_rows(size)), generator.w_dim)
    return tuple(
        jax.ShapeDtypeStruct((count, *shape), jnp.float32)
        for shape in (pictures, codes)
    )


def kept(cache: epath.Path, source: str) -> tuple[np.ndarray, np.ndarray] | None:
    """What a run before has prepared, or None: it had none, or made from others."""
    if not cache.exists():
        return None
    with cache.open("rb") as file, np.load(file) as stored:
        if str(stored.get("made_from")) != source:
            return None
        return stored["pictures"], stored["w_layers"]


def prepare(
    options: Any, generator: Generator, base: Any, identity: Mapping[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """Aligned pictures and codes of a run's references.

    Args:
      options: of `train.jojo`.
      generator: the architecture.
      base: its parameters before training.
      identity: digests of the run, those of references and weights among them; with
        others, or other options, all is made anew.

    Returns:
      Pictures [refs, size, size, 3] in [-1, 1], codes [refs, num_layers, w_dim], both
      on the host: 256 pictures of 1024 px are 3 GB.

    Raises:
      UserError: a picture cannot be aligned; a process was given others.
    """
    folder = epath.Path(options.run.out) / "references"
    cache, source = folder / "codes.npz", made_from(options, identity)
    processes.check_same(identity)
    known = kept(cache, source)
    # Where one process does not see it, all have to make it.
    if all(processes.gather("known" if known else "")):
        return known
    # Each process aligns and inverts its share.
    own = dataclasses.replace(options, ref=share(options.ref))
    with processes.together():
        pictures = load(own, generator.size)
    codes = np.asarray(layer_codes(own, generator, base, pictures))
    if jax.process_count() > 1:
        both = multihost_utils.process_allgather((pictures, codes), tiled=True)
        pictures, codes = (x[: len(options.ref)] for x in both)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for path, picture in zip(options.ref, pictures, strict=True):
            save_image(folder / f"{path.stem}.png", picture)
        write_codes(cache, pictures=pictures, w_layers=codes, made_from=source)
    return np.asarray(pictures), codes


def share(items: Sequence[Any]) -> tuple[Any, ...]:
    """This process's part of a sequence; as long on all, the last item filling up."""
    each = -(-len(items) // jax.process_count())
    begin, last = jax.process_index() * each, len(items) - 1
    return tuple(items[min(i, last)] for i in range(begin, begin + each))


def load(options: Any, size: int) -> np.ndarray:
    """The aligned references [refs, size, size, 3] in [-1, 1]."""
    crops = [prepare_picture(path, size, options.align)[0] for path in options.ref]
    return np.stack([to_array(crop, size) for crop in crops])


def inverted(
    options: Any, generator: Generator, base: Any, pictures: np.ndarray
) -> Array:
    """Codes of the references as w_plus [refs, num_ws, w_dim].

    Optimisation runs in w unless told otherwise, with a pull to the average: a code
    that looks like a real face teaches a stronger style than one that reproduces the
    drawing.
    """
    invert_these = functools.partial(
        invert.invert,
        generator,
        base,
        encoder=options.encoder,
        search=invert.Search(
            space=options.inversion_space,
            steps=options.inversion_steps,
            pull=PULL,
            lpips=options.perceptual_net or invert.Search.lpips,
        ),
        key=jax.random.fold_in(jax.random.key(options.run.seed), 3),
        progress=jax.process_index() == 0,
    )
    devices = jax.local_devices()
    if not options.separate or len(devices) == 1:
        return jnp.asarray(invert_these(pictures)["w_plus"])
    # The devices of this process take a part each.
    mesh = sharding.make_mesh(devices=devices)
    codes, last = [], len(pictures) - 1
    each = len(devices) * min(BATCH, -(-len(pictures) // len(devices)))
    # The kernels split over the mesh in use.
    with jax.set_mesh(mesh):
        for start in range(0, len(pictures), each):
            rows = np.minimum(np.arange(start, start + each), last)
            where = sharding.batch_sharding(mesh, 1)
            spread = jax.device_put(pictures[rows], where)
            codes.append(invert_these(spread, batch=each)["w_plus"])
    return jnp.concatenate(codes)[: len(pictures)]


def by_layer(generator: Generator, w_plus: Array) -> Array:
    """w_plus [n, num_ws, w_dim] as [n, num_layers, w_dim]."""
    return jnp.asarray(w_plus)[:, np.array(style_rows(generator.size))]


def virtual(codes: Array, w_avg: Array, mask: np.ndarray) -> Array:
    """The virtual inverter (arXiv 2112.11641, section 3): codes mixed with the mean.

    Args:
      codes: [refs, num_layers, w_dim].
      w_avg: [w_dim]; the affine maps being linear, its style vectors are the mean
        style code.
      mask: [num_layers]; 1 keeps the inverted code.
    """
    return mask[:, None] * codes + (1 - mask[:, None]) * w_avg


def layer_codes(
    options: Any, generator: Generator, base: Any, pictures: np.ndarray
) -> Array:
    """Codes [refs, num_layers, w_dim], by `--inversion`."""
    if options.inversion == "mean":
        shape = (len(pictures), generator.num_ws, generator.w_dim)
        return by_layer(generator, jnp.broadcast_to(base["w_avg"], shape))
    codes = by_layer(generator, inverted(options, generator, base, pictures))
    if options.inversion == "virtual":
        mask = parse_mask(options.virtual_mask, generator.size, "--virtual-mask")
        codes = virtual(codes, base["w_avg"], mask)
    return codes


def preview(options: Any, generator: Generator, base: Any) -> None:
    """Write the base's picture of each reference's code under each named mask."""
    pictures = load(options, generator.size)
    codes = by_layer(generator, inverted(options, generator, base, pictures))
    masks = named_masks(generator.size)
    if options.virtual_mask not in masks:
        masks[options.virtual_mask] = parse_mask(
            options.virtual_mask, generator.size, "--virtual-mask"
        )
    draw = jax.jit(lambda p, c: generator.apply({"params": p}, c, space="w_layers")[0])
    columns = [pictures] + [
        np.asarray(draw(base, virtual(codes, base["w_avg"], m))) for m in masks.values()
    ]
    rows = np.stack(columns, 1)
    folder = epath.Path(options.run.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "inversion.png"
    save_image(path, grid(list(rows.reshape(-1, *rows.shape[2:])), rows.shape[1]))
    listed = ", ".join(f"virtual {name}" for name in masks)
    print(f"reference, {listed}: {path}")
    print(
        "virtual all is the inversion, virtual none the mean code; choose with "
        "--inversion virtual --virtual-mask MASK"
    )
