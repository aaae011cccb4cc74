"""How good are a generator's own pictures? Faces, variety, and no copies.

    python -m train.samples --weights heads --data heads/photo.npy

At each psi, beside the same for the pictures it was trained on:

- face rate: the share in which the package's detector finds a face;
- variety: mean LPIPS between pairs of pictures;
- copies: twelve samples, each above the training picture that is nearest by LPIPS.

Pictures are brought to 256 px bilinearly for the detector and to 128 px for LPIPS. OUT
holds samples-PSI.png, nearest.png and samples.json.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxstyle import images, pipeline, weights
from jaxstyle.cache import use_compilation_cache
from jaxstyle.errors import UserError, cli
from jaxstyle.features import lpips
from jaxstyle.invert import for_lpips, resize
from jaxstyle.landmarks import find_faces
from jaxstyle.options import parse
from train import data

DETECTOR_SIZE = 256
SHIFTS = 10
NEAREST = 12
BATCH = 50
COLUMNS = 10


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of train.samples."""

    data: str
    """The pictures that the generator was trained on, as for the training."""
    weights: str = weights.DEFAULT
    """The model: a name we ship, a converted folder, or a run."""
    n: int = 200
    """Samples at each psi, and training pictures for the comparison."""
    psi: tuple[float, ...] = (0.7, 1.0)
    """Truncations."""
    limit: int = 0
    """Search the nearest among this many training pictures; 0: all."""
    seed: int = 0
    """Seed of the first sample."""
    out: Path = Path("runs/samples")
    """Folder of the results."""


@jax.jit
def describe(params: lpips.Params, pictures: Array) -> tuple[Array, ...]:
    """LPIPS features of pictures [n, h, h, 3] in [-1, 1]."""
    return lpips.features(params, for_lpips(pictures))


_distance = jax.jit(lpips.feature_distance)


def face_rate(pictures: np.ndarray) -> float:
    """Share of pictures [n, h, h, 3] in which a face is found."""
    large = resize(jnp.asarray(pictures), DETECTOR_SIZE)
    return float(
        np.mean([bool(find_faces(images.to_pil(np.asarray(x)))) for x in large])
    )


def variety(judge: lpips.Params, pictures: np.ndarray) -> float:
    """Mean LPIPS between pairs of pictures [n, h, h, 3]."""
    parts = [
        describe(judge, pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH)
    ]
    features = [jnp.concatenate(x) for x in zip(*parts, strict=True)]
    shifts = range(1, min(SHIFTS, len(pictures) - 1) + 1)
    pairs = [
        _distance(judge, features, [jnp.roll(f, s, 0) for f in features]).mean()
        for s in shifts
    ]
    return float(np.mean(pairs))


def nearest(
    judge: lpips.Params, pictures: np.ndarray, source: Sequence, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest picture of a source to each picture, by LPIPS.

    Args:
      judge: LPIPS parameters.
      pictures: [n, h, h, 3].
      source: of pictures [h, h, 3].
      limit: look at the first so many.

    Returns:
      Indices and distances, both [n].
    """
    own = describe(judge, pictures)
    rows = []
    for start in range(0, limit, BATCH):
        # The last batch repeats its last picture: one compilation.
        chosen = [min(start + i, limit - 1) for i in range(BATCH)]
        other = describe(judge, np.stack([source[i] for i in chosen]))
        rows.append(
            np.stack(
                [
                    _distance(judge, other, [f[i : i + 1] for f in own])
                    for i in range(len(pictures))
                ],
                1,
            )
        )
    distances = np.concatenate(rows)[:limit]
    return distances.argmin(0), distances.min(0)


def inspect(options: Options) -> dict:
    """Measure everything; returns what samples.json holds."""
    generator, params = pipeline.load_generator(options.weights)
    _, judge = weights.load("lpips_alexnet")
    judge = judge["lpips"]
    source = data.open_source(options.data, generator.size)
    if len(source) < options.n:
        raise UserError(f"--n is {options.n}, but --data has {len(source)} pictures")
    limit = min(options.limit or len(source), len(source))
    real = np.stack([source[i] for i in range(options.n)])
    rows = {"data": {"faces": face_rate(real), "variety": variety(judge, real)}}
    seeds = range(options.seed, options.seed + options.n)
    z = pipeline.seed_codes(seeds, generator.z_dim)
    for psi in options.psi:
        codes = pipeline.to_w_plus(generator, params, z, "z", psi=psi, batch=BATCH)
        drawn = pipeline.pictures(generator, params, codes, batch=BATCH)
        sheet = images.grid(list(drawn[: COLUMNS**2]), COLUMNS)
        images.save_image(options.out / f"samples-{psi:g}.png", sheet)
        rows[f"psi {psi:g}"] = {
            "faces": face_rate(drawn),
            "variety": variety(judge, drawn),
        }
    shown = drawn[:NEAREST]
    index, distance = nearest(judge, shown, source, limit)
    pairs = [*shown, *(source[i] for i in index)]
    images.save_image(options.out / "nearest.png", images.grid(pairs, NEAREST))
    rows["nearest"] = {"lpips": [round(float(d), 4) for d in distance]}
    return rows


def compared(value: float, real: float, form: str) -> str:
    """A measure, and its ratio to the data's: not all data have faces."""
    ratio = f" ({value / real:.2f} of the data's)" if real else ""
    return f"{value:{form}}{ratio}"


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.samples`."""
    options = parse(Options, "train.samples", __doc__, args)
    use_compilation_cache()
    if options.n < NEAREST:
        raise UserError(f"--n is {options.n}; it must be at least {NEAREST}")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = inspect(options)
    images.write_bytes(
        options.out / "samples.json", json.dumps(rows, indent=1).encode()
    )
    real = rows["data"]
    for name, row in rows.items():
        if "faces" in row:
            faces = compared(row["faces"], real["faces"], ".1%")
            variety = compared(row["variety"], real["variety"], ".3f")
            print(f"{name}: faces {faces}, variety {variety}")
    low = min(rows["nearest"]["lpips"])
    print(
        f"nearest training picture: LPIPS {low:.3f} or more; {options.out}/nearest.png"
    )


if __name__ == "__main__":
    main()
