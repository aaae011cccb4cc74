"""From one reference picture to a stylised photo, with what ships with jaxstyle.

    python -m jaxstyle.demo
    python -m jaxstyle.demo --ref art.png --photo me.jpg

Learns the style of the reference on the small model in the package (`train.jojo`),
then draws the photo in it at three intensities (`jaxstyle.stylize`). A few minutes on
two CPU cores. The last line printed is the path of the sheet: photo, reference, result
at one third, two thirds and the whole intensity.
"""

import dataclasses
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from etils import epath

from jaxstyle import images, weights
from jaxstyle.cache import use_compilation_cache
from jaxstyle.errors import UserError, cli
from jaxstyle.invert import Search, for_photos
from jaxstyle.options import parse
from jaxstyle.stylize import (
    CROP_SIZE,
    choose_encoder,
    load_styles,
    photo_code,
    stylize,
    tuned,
)
from jaxstyle.tune import TuneOptions, resolved, tune

EXAMPLES = weights.ASSETS / "examples"
PHOTO = EXAMPLES / "photo.jpg"
REFERENCE = EXAMPLES / "cel.png"
INTENSITIES = {"1/3": 1 / 3, "2/3": 2 / 3, "1": 1.0}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of jaxstyle.demo."""

    photo: Path | None = None
    """The photo to stylise; none: the one that ships with us."""
    ref: Path | None = None
    """The picture to learn the style from; none: one that ships with us."""
    weights: str = weights.DEFAULT
    """The model to start from."""
    steps: int = 0
    """Training steps; 0: what the model recommends, else the published 300."""
    align: bool = True
    """--no-align takes your --photo and --ref as they are, cropped faces already."""
    seed: int = 0
    """Seed of everything random."""
    out: Path = Path("runs/demo")
    """Folder of the training run and the pictures."""


def say(text: str, began: float) -> None:
    """Print what happens next, with the time spent so far."""
    print(f"[{time.monotonic() - began:4.0f} s] {text}", flush=True)


def call(module: str, *arguments: object) -> int:
    """Run a command of ours in a process of its own; returns its exit code.

    It ends with all its memory, and with the accelerator, which no two can hold.
    """
    command = ["-m", module, *map(str, arguments)]
    print("       python " + shlex.join(command), flush=True)
    return subprocess.run([sys.executable, *command]).returncode


def cut_out(options: Options, photo: Path, began: float) -> Path:
    """Cut the face out of the photo; returns the file.

    Raises:
      UserError: weights without a generator; no face, or no picture.
    """
    networks = weights.read_config(options.weights)["networks"]
    generator = weights.Networks(networks, options.weights)["generator"]
    face = options.out / f"{photo.stem}-face.png"
    arguments = [photo, face, "--size", max(CROP_SIZE, generator["size"])]
    # Ours is a whole photo, whatever yours are.
    if options.photo and not options.align:
        arguments.append("--no-align")
    say(f"cutting the face out of {photo.name}", began)
    if call("jaxstyle.align", *arguments):
        raise UserError(
            f"no face was cut out of {photo}, see above; use another --photo"
        )
    return face


def learn(options: Options, began: float) -> str:
    """Train on the reference; returns the run folder.

    Raises:
      UserError: the training failed; it has said why.
    """
    # A run remembers the path: from here ours stays the same in a checkout that moves.
    reference = options.ref or Path(os.path.relpath(REFERENCE))
    run = options.out / f"jojo-{reference.stem}"
    arguments = ["--ref", reference, "--weights", options.weights]
    arguments += ["--seed", options.seed, "--out", run]
    if options.steps:
        arguments += ["--steps", options.steps]
    # Our own references are cropped faces, some of them drawn: nothing to detect.
    if options.ref is None or not options.align:
        arguments.append("--no-align")
    say(f"learning the style of {reference.name}", began)
    code = call("train.jojo", *arguments)
    if code:
        raise UserError(
            f"the training ended with exit code {code}, see above; if {run} holds a "
            "run that differs, delete that folder"
        )
    return str(run)


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m jaxstyle.demo`."""
    began = time.monotonic()
    options = parse(Options, "jaxstyle.demo", __doc__, args)
    for option, picture in (
        ("--photo", options.photo or PHOTO),
        ("--ref", options.ref or REFERENCE),
    ):
        if not picture.is_file():
            raise UserError(f"{picture}: no such picture; name one with {option}")
    photo = options.photo or PHOTO
    face = images.to_array(images.open_image(cut_out(options, photo, began)))
    run = learn(options, began)
    use_compilation_cache()
    style = load_styles([run])[0]
    say("finding its code on the model", began)
    code = photo_code(
        face,
        style.generator,
        style.base,
        encoder=choose_encoder("", style.base_name, style.generator),
        search=for_photos(Search(), style.base_name),
        seed=options.seed,
        cache=epath.Path(options.out) / photo.stem,
    )
    tuning = resolved(TuneOptions(), style.base_name)
    if tuning.tune:
        say("moving the model towards the face", began)
    (base,) = tune(style.generator, style.base, face[None], code[None], tuning)
    style = tuned(style, base)
    say(f"drawing it at the intensities {', '.join(INTENSITIES)}", began)
    drawn = [stylize(style, code, intensity=i) for i in INTENSITIES.values()]
    sheet = images.grid(
        [face, images.open_image(style.reference), *drawn],
        2 + len(drawn),
        column_labels=["photo", "reference", *INTENSITIES],
    )
    path = images.save_image(options.out / "demo.png", sheet)
    say("another photo, or another strength:", began)
    print(f"       python -m jaxstyle.stylize me.jpg --weights {run} --intensity 0.7")
    print(path, flush=True)


if __name__ == "__main__":
    main()
