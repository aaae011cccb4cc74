"""Pictures on the way between faces, between strengths of a style, or between styles.

    python -m jaxstyle.interpolate --from 3 --to 8 --out morph.webp --n 48
    python -m jaxstyle.interpolate --from me.jpg --to 5 --weights runs/jojo-art
    python -m jaxstyle.interpolate --from me.jpg --intensity sweep --out fade.gif
    python -m jaxstyle.interpolate --from me.jpg --edit age:+4 --out older.webp
    python -m jaxstyle.interpolate --from 3 --weights heads runs/a runs/b --morph
    python -m jaxstyle.interpolate --from 3 --to 8 --weights a b c d --out video.webp
    python -m jaxstyle.interpolate --from 3 --to 8 --weights cartoon --style-id 5 53
    python -m jaxstyle.interpolate --from 3 --weights cartoon --style-id 5 --table 6

An end is a seed, a code file (its first code) or a photo. The name of --out decides: a
sheet with one row for each of the weights (.png, .jpg), an animation that shows them
side by side (.webp, .gif), or a folder of frames (no suffix).

--morph goes from each of the weights to the next, all their parameters mixed linearly.

Of a DualStyleGAN style the face goes from one end to the other, and the exemplar along
all of --style-id, mixed in w+; --moves chooses between them. --table is a sheet of one
face in one exemplar's style, for weights of its structure (down) and of its color.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from etils import epath

from jaxstyle import dual_style, edits, images, pipeline, weights
from jaxstyle.align import AlignOptions, prepare
from jaxstyle.blend import way_between
from jaxstyle.cache import use_compilation_cache
from jaxstyle.dualstylegan import style_weights
from jaxstyle.errors import UserError, cli
from jaxstyle.invert import DEFAULT as DEFAULT_SEARCH
from jaxstyle.invert import for_photos
from jaxstyle.options import given, parse
from jaxstyle.paths import place
from jaxstyle.stylize import (
    CROP_SIZE,
    Style,
    check_same,
    choose_encoder,
    dual_styles,
    layer_shares,
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
    """Where to end; empty: the face stays, or goes where --edit or --mapper move it."""
    weights: tuple[str, ...] = ()
    """Generators, one row or tile each. None: the model that ships with us, or with
    --intensity sweep the newest finished run under runs/."""
    n: int = 9
    """Number of pictures, both ends included."""
    way: Annotated[Literal["w_plus", "z"], tyro.conf.arg(name="space")] = "w_plus"
    """Where the straight line runs: w_plus; or z, which passes only through faces that
    the generator would draw by itself (seeds and z codes only)."""
    psi: float | None = None
    """Truncation of seeds: 1 leaves them alone, 0 gives the average face. None: 1. Of a
    DualStyleGAN style truncation of all faces towards 0; None: the published 0.75."""
    intensity: Literal["sweep"] | float = 1.0
    """Strength of the style: a number, 0 the base generator and 1 the finetuned one, or
    sweep, from 0 to 1 on the way."""
    layers: str = "all"
    """Layers that take the style: all, structure, color, or numbers of modulated layers
    such as 0-8,12."""
    moves_of_codes: Annotated[edits.MoveOptions, tyro.conf.OmitArgPrefixes] = (
        edits.MoveOptions()
    )
    morph: bool = False
    """Go from each of --weights to the next, in even parts of the way."""
    moves: tuple[Literal["face", "style", "both"], ...] = ()
    """Of a DualStyleGAN style: what changes, one row or tile each. Not given: whatever
    has two ends."""
    table: int = 0
    """Of a DualStyleGAN style: instead of a way a sheet of this many structure weights
    and color weights from 0 to 1; published: 6."""
    dual: Annotated[dual_style.DualOptions, tyro.conf.OmitArgPrefixes] = (
        dual_style.DualOptions()
    )
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
    Empty: the encoder stored with the base, or named by it, else optimize."""
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
    crop, _ = prepare(epath.Path(text), size, options.align)
    search = dataclasses.replace(DEFAULT_SEARCH, steps=options.steps)
    code = photo_code(
        images.to_array(crop),
        style.generator,
        style.base,
        encoder=choose_encoder(
            options.encoder,
            style.base_name,
            style.generator,
            given(options, ("steps",)),
        ),
        search=for_photos(search, style.base_name),
        seed=options.seed,
        cache=epath.Path(options.out).parent / epath.Path(text).stem,
    )
    return code[None], "w_plus"


def way(options: Options, style: Style) -> np.ndarray:
    """The codes on the way: w_plus [n, num_ws, w_dim].

    Raises:
      UserError: ends that have no z when the way runs in it.
    """
    ends = [end_code(t, options, style) for t in (options.start, options.end) if t]
    moves = edits.read_moves(options.moves_of_codes, style.generator)
    spaces = {space for _, space in ends}

    def to_w_plus(codes, space):
        # Of an exemplar's style the network truncates.
        own = space == "z" and style.exemplar is None and options.psi is not None
        psi = options.psi if own else 1.0
        return pipeline.to_w_plus(style.generator, style.base, codes, space, psi=psi)

    if options.way == "z":
        if spaces != {"z"}:
            raise UserError(
                "--space is z, but photos and w codes have none; leave it at w_plus"
            )
        # The mapping network normalises z: a straight line is an arc on its sphere.
        codes = line(ends[0][0][0], ends[-1][0][0], options.n)
        return moves.apply(to_w_plus(codes, "z"))
    codes = [to_w_plus(*end)[0] for end in ends]
    last = moves.apply(codes[-1][None])[0]
    first = moves.apply(codes[0][None])[0] if options.end else codes[0]
    return line(first, last, options.n)


def dual_rows(
    options: Options, styles: Sequence[Style]
) -> tuple[list[str], list[list[np.ndarray]]]:
    """The ways through exemplars of a DualStyleGAN style: labels, and rows of pictures.

    Raises:
      UserError: moves without two ends, or nothing that changes.
    """
    style, exemplars = styles[0], [s.exemplar for s in styles]
    moved = options.moves_of_codes != edits.MoveOptions()
    ends = {"face": bool(options.end) or moved, "style": len(exemplars) > 1}
    two = [name for name, there in ends.items() if there]
    sweep = options.intensity == "sweep"
    moves = options.moves or (["both"] if len(two) == 2 else two) or ["both"][:sweep]
    for move in moves:
        lacking = [n for n in ends if move in (n, "both") and not ends[n]]
        if lacking and not sweep:
            flag = {"face": "--to", "style": "a second --style-id"}[lacking[0]]
            raise UserError(
                f"--moves is {move}, but there is no second end: add {flag}"
            )
    if not moves:
        raise UserError(
            "nothing changes on the way: add --to, a second --style-id, --intensity "
            "sweep or --table 6"
        )
    faces = way(options, style)
    t = np.linspace(0, 1, options.n)
    codes = [e.code for e in exemplars]
    others = [way_between(codes, x) if len(codes) > 1 else codes[0] for x in t]
    rows = []
    for move in moves:
        row = []
        for i, share in enumerate(t if sweep else [options.intensity] * options.n):
            other = others[i if move != "face" else 0]
            row.append(
                stylize(
                    dataclasses.replace(
                        style, exemplar=exemplars[0]._replace(code=other)
                    ),
                    faces[i if move != "style" else 0],
                    intensity=float(share),
                    noise=options.noise_mode,
                    seed=options.seed,
                )
            )
        rows.append(row)
    return list(moves), rows


def dual_table(options: Options, style: Style) -> Any:
    """The sheet of structure weights (down) and color weights (across)."""
    face = way(dataclasses.replace(options, end="", n=2), style)[0]
    steps = np.linspace(0, 1, options.table)
    pictures = [
        stylize(
            dataclasses.replace(
                style,
                exemplar=style.exemplar._replace(
                    weights=style_weights(structure, color)
                ),
            ),
            face,
            noise=options.noise_mode,
            seed=options.seed,
        )
        for structure in steps
        for color in steps
    ]
    return images.grid(
        pictures,
        options.table,
        column_labels=[f"color {x:.2g}" for x in steps],
        row_labels=[f"structure {x:.2g}" for x in steps],
    )


def morph_row(options: Options, styles: Sequence[Style]) -> list[np.ndarray]:
    """The way from the weights of each style to those of the next.

    Noise planes, and the mapping network of seeds, are the first's.
    """
    first = styles[0]
    for style in styles[1:]:
        check_same(style.name, style.generator, first.name, first.generator)
    start = dataclasses.replace(first, base=first.params, base_name=first.name)
    codes = way(options, start)
    keys = pipeline.seed_keys([options.seed], 1)
    row = []
    for code, t in zip(codes, np.linspace(0, 1, options.n), strict=True):
        params = way_between([s.params for s in styles], float(t))
        params["noise_const"] = first.params["noise_const"]
        row += list(
            pipeline.pictures(
                first.generator, params, code[None], noise=options.noise_mode, keys=keys
            )
        )
    return row


def check(options: Options) -> None:
    """Refuse options that cannot be.

    Raises:
      UserError: naming the option.
    """
    if options.n < 2:
        raise UserError(f"--n is {options.n}; a way needs at least 2 pictures")
    if options.table and not 2 <= options.table <= 20:
        raise UserError(f"--table is {options.table}; it must be from 2 to 20")
    without = ("n", "intensity", "layers", "moves_of_codes", "moves", "style_weights")
    flags = (["--to"] if options.end else []) + given(options, without)
    if options.table and flags:
        raise UserError(
            f"--table is {options.table}: one face, whose structure and color weights "
            f"change; leave out {', '.join(flags)}"
        )
    if options.morph and len(options.weights) < 2:
        raise UserError("--morph goes between weights; give two or more --weights")
    if options.morph and (options.intensity != 1 or options.layers != "all"):
        raise UserError("--morph mixes whole generators: no --intensity, no --layers")
    suffix = place(options.out).suffix.lower()
    if options.table and suffix == ".gif":
        raise UserError(f"--out is {options.out}, but --table is a sheet; name a .png")
    if suffix not in ("", ".gif", *images.SUFFIXES):
        raise UserError(
            f"--out is {options.out}; it must be a sheet (.png, .jpg), an animation "
            "(.webp, .gif) or a folder of frames (no suffix)"
        )
    if not 1 <= options.fps <= images.MAX_FPS:
        raise UserError(
            f"--fps is {options.fps}; it must be from 1 to {images.MAX_FPS}"
        )
    moves = options.moves_of_codes != edits.MoveOptions()
    changes = options.morph or options.table or len(options.dual.style_id) > 1 or moves
    if not options.end and options.intensity != "sweep" and not changes:
        raise UserError(
            "--to is not given; name an end, move the face with --edit, or let the "
            "style change with --intensity sweep or --morph"
        )


def load(options: Options, names: Sequence[str], sweep: bool) -> list[Style]:
    """The styles of the command.

    Raises:
      UserError: options of exemplars for other weights; a table of several exemplars.
    """
    dual = [name for name in names if dual_style.is_dual(name)]
    given = options.dual != dual_style.DualOptions() or options.moves or options.table
    if given and not dual:
        raise UserError(
            "--style-id, --moves, --table or another option of exemplars is given, "
            f"but {', '.join(names)} is no DualStyleGAN style"
        )
    if dual and options.morph:
        raise UserError(
            f"--morph goes between plain generators; {dual[0]} is no such one: "
            "python -m jaxstyle.blend --share mixes two of these"
        )
    psi = dual_style.PSI if options.psi is None else options.psi
    chosen = partial(dual_styles, options=options.dual, psi=psi) if dual else None
    own_base = not sweep or bool(dual)
    return load_styles(names, base=options.base, own_base=own_base, dual=chosen)


def rows_of(
    options: Options, styles: Sequence[Style], sweep: bool
) -> tuple[list[str], list[list[np.ndarray]]]:
    """Rows of pictures, one for each of the styles, and their labels."""
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
    return [s.name for s in styles], rows


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m jaxstyle.interpolate`."""
    options = parse(Options, "jaxstyle.interpolate", __doc__, args)
    use_compilation_cache()
    check(options)
    sweep = options.intensity == "sweep"
    names = options.weights or ((pipeline.newest_run() if sweep else weights.DEFAULT),)
    styles = load(options, names, sweep)
    for style in styles:
        layer_shares(style, 1.0 if sweep else options.intensity, options.layers)
    print(f"weights: {', '.join(names)}", flush=True)
    out = epath.Path(options.out)
    if options.table:
        if len(names) > 1 or len(styles) > 1:
            raise UserError("--table is of one face and one exemplar of one style")
        print(images.save_image(out, dual_table(options, styles[0])))
        return
    if options.morph:
        labels, rows = [""], [morph_row(options, styles)]
    elif len(names) == 1 and styles[0].exemplar is not None:
        labels, rows = dual_rows(options, styles)
    else:
        labels, rows = rows_of(options, styles, sweep)
    if out.suffix.lower() in ("", ".webp", ".gif"):
        frames = [
            images.grid(list(tiles)) if len(tiles) > 1 else tiles[0]
            for tiles in zip(*rows, strict=True)
        ]
        print(images.save_animation(out, frames, options.fps))
        return
    shares = np.linspace(0, 1, options.n)
    sheet = images.grid(
        [picture for row in rows for picture in row],
        options.n,
        row_labels=labels if len(rows) > 1 else None,
        column_labels=[f"{share:.2g}" for share in shares] if sweep else None,
    )
    print(images.save_image(out, sheet))


if __name__ == "__main__":
    main()
