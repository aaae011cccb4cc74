"""Ways to find a photo's code, side by side: searches and encoders."""

import dataclasses
import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxstyle import pipeline, weights
from jaxstyle.encoding import Encoder, load_encoder
from jaxstyle.errors import UserError
from jaxstyle.features import judges, lpips
from jaxstyle.invert import Search, invert
from jaxstyle.stylegan2 import Generator, Params
from train.measures import (
    all_distances,
    describe,
    faces,
    markdown,
    mean_cosine,
    own_nearer,
)


class Inverter(NamedTuple):
    """A way to find a photo's code.

    Attributes:
      search: by optimisation.
      encoder: that finds it, or that the search begins with; None: the search alone.
      refine: steps of the search that begins with the encoder's code.
    """

    search: Search = Search()
    encoder: Encoder | None = None
    refine: int = 0


def parse(text: str, generator) -> Inverter | None:
    """An inverter by its name on the command line; None: the average code.

    Raises:
      UserError: a search without steps, or not an encoder's folder.
    """
    if text == "mean":
        return None
    if found := re.fullmatch(r"(w|w_plus|z|z_plus)-([1-9]\d*)", text):
        return Inverter(Search(space=found[1], steps=int(found[2])))
    folder, _, steps = text.partition("+")
    if steps and not steps.isdecimal():
        raise UserError(
            f"--inverters holds {text!r}; write an encoder's folder and steps as "
            "runs/e4e+50"
        )
    return Inverter(Search(), load_encoder(folder, generator), int(steps or 0))


class Heads(NamedTuple):
    """The photos to invert, on a model.

    Attributes:
      generator, base: the model.
      photos: [n, size, size, 3].
      large: the same as encoders read them, [n, 256, 256, 3].
    """

    generator: Generator
    base: Params
    photos: np.ndarray
    large: np.ndarray


def invert_photos(folder: Path, seed: int, heads: Heads, how: Inverter) -> dict:
    """Codes of the photos, kept in a folder, and the seconds that they took."""
    generator, params = heads.generator, heads.base
    photos = heads.photos if how.encoder is None else heads.large
    encoder = how.encoder and weights.digest(how.encoder.params)
    said = (weights.digest(params), how.search, encoder, how.refine, seed)
    name = hashlib.sha256(repr((said, photos.tobytes())).encode()).hexdigest()[:16]
    path = folder / f"codes-{name}.npz"
    if not path.exists():
        find = partial(
            invert,
            generator,
            params,
            encoder=how.encoder or "optimize",
            key=jax.random.key(seed),
            batch=10,
        )
        # Once before, for the compiler: the number of steps is not compiled in.
        brief = dataclasses.replace(how.search, steps=1)
        find(photos, refine=min(how.refine, 1), search=brief, progress=False)
        begin = time.monotonic()
        found = find(photos, refine=how.refine, search=how.search)
        seconds = time.monotonic() - begin
        pipeline.write_codes(path, w_plus=found["w_plus"], seconds=seconds)
    with np.load(path) as file:
        return {"w_plus": file["w_plus"], "seconds": float(file["seconds"])}


def compare(
    names: Sequence[str],
    heads: Heads,
    judge: lpips.Params,
    identity: judges.Judge,
    folder: Path,
    *,
    seed: int,
    truth: Callable[[np.ndarray], float | None],
) -> tuple[list[dict], list[np.ndarray]]:
    """Records of inverters, and the pictures [n, size, size, 3] of each one's codes.

    Each has the LPIPS of the inversion to the photo, own nearer and same face, and the
    seconds a photo.

    Args:
      names: of the inverters, see `parse`.
      heads: what is inverted.
      judge: LPIPS parameters.
      identity: the identity network.
      folder: keeps the codes.
      seed: of the searches.
      truth: LPIPS of the stylised codes [n, num_ws, w_dim] to the truth, if known.
    """
    generator, base, photos, _ = heads
    target, own = describe(judge, photos), faces(identity, photos)
    records, drawn = [], []
    for name in names:
        how = parse(name, generator)
        if how is None:
            shape = len(photos), generator.num_ws, generator.w_dim
            codes = {"w_plus": np.broadcast_to(base["w_avg"], shape), "seconds": 0.0}
        else:
            codes = invert_photos(folder, seed, heads, how)
        plain = pipeline.pictures(generator, base, codes["w_plus"])
        distances = np.asarray(all_distances(judge, describe(judge, plain), target))
        record = {
            "inverter": name,
            "lpips": float(np.diagonal(distances).mean()),
            "identity": own_nearer(distances),
            "cosine": mean_cosine(own, faces(identity, plain)),
            "seconds": codes["seconds"] / len(photos),
            "truth": truth(codes["w_plus"]),
        }
        records.append(record)
        drawn.append(plain)
        print(f"{name}: LPIPS to the photos {record['lpips']:.3f}", flush=True)
    return records, drawn


def table(records: Sequence[Mapping]) -> str:
    """Markdown of the records; ratios are to the first."""
    titles = ["inverter", "LPIPS to the photo", "of the first", "own nearer"]
    lines = [[*titles, "same face", "s a photo", "LPIPS to the truth"]]
    for record in records:
        truth = record["truth"]
        lines.append(
            [
                record["inverter"],
                f"{record['lpips']:.3f}",
                f"{record['lpips'] / records[0]['lpips']:.2f}",
                f"{record['identity']:.0%}",
                f"{record['cosine']:.2f}",
                f"{record['seconds']:.3f}",
                "" if truth is None else f"{truth:.3f}",
            ]
        )
    return markdown(lines)
