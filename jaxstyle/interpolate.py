"""Pictures on the way between two codes, or between two strengths of a style.

    python -m jaxstyle.interpolate --from 3 --to 8 --out morph.webp --n 48
    python -m jaxstyle.interpolate --from me.jpg --to 5 --weights runs/jojo-art
    python -m jaxstyle.interpolate --from me.jpg --intensity sweep --out fade.gif

An end is a seed, a code file (its first code) or a photo. The name of --out decides: a
sheet with one row for each of the weights (.png, .jpg), an animation that shows them
side by side (.webp, .gif), or a folder of frames (no suffix).
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from etils import epath

from jaxstyle import images, pipeline, weights
from jaxstyle.align import AlignOptions, prepare
from jaxstyle.cache import use_compilation_cache
from jaxstyle.errors import UserError, cli
from jaxstyle.invert import DEFAULT as DEFAULT_SEARCH
from jaxstyle.options import parse
from jaxstyle.stylize import (
    CROP_SIZE,
    Style,
    choose_encoder,
    load_styles,
    photo_code,
    stylize,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of jaxstyle.interpolate."""

    start: Annotated[str, tyro.conf.arg(name="from")]
    """Where to begin: a seed, an .npz of codes, or a photo."""
    end: Annotated[str, tyro.conf.arg(name="to")] = ""
    """Where to end; empty with --intensity sweep: the face stays."""
    weights: tuple[str, ...] = ()
    """Generators, one row or tile each. None: the model that ships with us, or with
    --intensity sweep the newest finished run under runs/."""
    n: int = 9
    """Number of pictures, both ends included."""
    way: Annotated[Literal["w_plus", "z"], tyro.conf.arg(name="space")] = "w_plus"
    """Where the straight line runs: w_plus; or z, which passes only through faces that
    the generator would draw by itself (seeds and z codes only)."""
    psi: float = 1.0
    """Truncation of seeds: 1 leaves them alone, 0 gives the average face."""
    intensity: Literal["sweep"] | float = 1.0
    """Strength of the style: a number, 0 the base generator and 1 the finetuned one, or
    sweep, from 0 to 1 on the way."""
    layers: str = "all"
    """Layers that take the style: all, structure, color, or numbers of modulated layers
    such as 0-8,12."""
    base: str = ""
    """The generator the weights were finetuned from; empty: the one they name."""
    out: str = "interpolation.png"
    """A sheet (.png, .jpg), an animation (.webp, .gif) or a folder of frames."""
    fps: int = 12
    """Pictures a second of an animation."""
    noise_mode: Literal["const", "random", "none"] = "const"
    """Noise planes: those stored with the base, drawn once from --seed, or none."""
    seed: int = 0
    """Seed of random noise and of the inversion of photos."""
    encoder: str = ""
    """Finds a photo's code: an encoder's folder, or `optimize`, which needs none.
    Empty: the encoder stored with the base if there is one, else optimize."""
    steps: int = DEFAULT_SEARCH.steps
    """Steps of that optimisation."""
    align: Annotated[AlignOptions, tyro.conf.OmitArgPrefixes] = AlignOptions()


def line(start: Any, end: Any, n: int) -> np.ndarray:
    """`n` codes from `start` [...] to `end` [...], ends included: [n, ...]."""
    t = np.linspace(0, 1, n, dtype=np.float32).reshape(-1, *[1] * np.ndim(start))
    return (1 - t) * np.asarray(start) + t * np.asarray(end)


def end_code(text: str, options: Options, style: Style) -> tuple[np.ndarray, str]:
    """The code [1, ...] of one end and its space.

    Raises:
      UserError: neither seed nor code file nor a photo with a face.
    """
    if text.isdigit():
        return np.asarray(pipeline.seed_codes([int(text)], style.generator.z_dim)), "z"
    if text.endswith(".npz"):
        codes, space = pipeline.read_codes(text, style.generator)
        if space == "styles":
            raise UserError(
                f"{text} holds style vectors; the way runs between w_plus, w or z"
            )
        if len(codes) > 1:
            print(f"{text} holds {len(codes)} codes; taking the first")
        return codes[:1], space
    size = max(CROP_SIZE, style.generator.size)
    crop, _ = prepare(Path(text), size, options.align)
    code = photo_code(
        images.to_array(crop),
        style.generator,
        style.base,
        encoder=choose_encoder(options.encoder, style.base_name),
        search=dataclasses.replace(DEFAULT_SEARCH, steps=options.steps),
        seed=options.seed,
        cache=epath.Path(options.out).parent / Path(text).stem,
    )
    return code[None], "w_plus"


def way(options: Options, style: Style) -> np.ndarray:
    """The codes on the way: w_plus [n, num_ws, w_dim].

    Raises:
      UserError: ends that have no z when the way runs in it.
    """
    ends = [end_code(t, options, style) for t in (options.start, options.end) if t]
    spaces = {space for _, space in ends}

    def to_w_plus(codes, space):
        psi = options.psi if space == "z" else 1.0
        return pipeline.to_w_plus(style.generator, style.base, codes, space, psi=psi)

    if options.way == "z":
        if spaces != {"z"}:
            raise UserError(
                "--space is z, but photos and w codes have none; leave it at w_plus"
            )
        # The mapping network normalises z: a straight line is an arc on its sphere.
        codes = line(ends[0][0][0], ends[-1][0][0], options.n)
        return to_w_plus(codes, "z")
    codes = [to_w_plus(*end)[0] for end in ends]
    return line(codes[0], codes[-1], options.n)


def check(options: Options) -> None:
    """Refuse options that cannot be.

    Raises:
      UserError: naming the option.
    """
    if options.n < 2:
        raise UserError(f"--n is {options.n}; a way needs at least 2 pictures")
    if not options.end and options.intensity != "sweep":
        raise UserError(
            "--to is not given; name an end, or let the style change with "
            "--intensity sweep"
        )


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m jaxstyle.interpolate`."""
    options = parse(Options, "jaxstyle.interpolate", __doc__, args)
    use_compilation_cache()
    check(options)
    sweep = options.intensity == "sweep"
    names = options.weights or ((pipeline.newest_run() if sweep else weights.DEFAULT),)
    styles = load_styles(names, base=options.base, own_base=not sweep)
    print(f"weights: {', '.join(names)}", flush=True)
    codes = way(options, styles[0])
    shares = np.linspace(0, 1, options.n) if sweep else [options.intensity] * options.n
    rows = [
        [
            stylize(
                style,
                code,
                intensity=float(share),
                layers=options.layers,
                noise=options.noise_mode,
                seed=options.seed,
            )
            for code, share in zip(codes, shares, strict=True)
        ]
        for style in styles
    ]
    out = epath.Path(options.out)
    if out.suffix.lower() in ("", ".webp", ".gif"):
        frames = [
            images.grid(list(tiles)) if len(tiles) > 1 else tiles[0]
            for tiles in zip(*rows, strict=True)
        ]
        print(images.save_animation(out, frames, options.fps))
        return
    sheet = images.grid(
        [picture for row in rows for picture in row],
        options.n,
        row_labels=[s.name for s in styles] if len(styles) > 1 else None,
        column_labels=[f"{share:.2g}" for share in shares] if sweep else None,
    )
    print(images.save_image(out, sheet))


if __name__ == "__main__":
    main()
