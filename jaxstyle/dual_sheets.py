"""The figures of DualStyleGAN's paper, on any style: what its rows and weights do.

    python -m jaxstyle.dual_sheets --weights weights/cartoon
    python -m jaxstyle.dual_sheets --weights runs/style --faces me.jpg 3 --style-id 5 53
    python -m jaxstyle.dual_sheets --weights runs/style --style art.png --refine 100

Yang et al., "Pastiche Master" (arXiv 2203.13248), section 4 and supplement. OUT gets

- layers.jpg: each row of the exemplar's code alone, its weight 1 and the others 0;
- weights.jpg: the whole style; half of the structure; no color; and the fine rows of
  the exemplar's code replaced by the face's;
- moves.jpg: the way from one face to another, from one exemplar to another, and both;
- new.jpg, with --style PICTURE: an exemplar that the style was not trained with, before
  and after its code is refined.

Faces are seeds, photos or an .npz of codes; exemplars are numbers or names.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from etils import epath

from jaxstyle import dual_style, images, pipeline, weights
from jaxstyle.align import AlignOptions
from jaxstyle.cache import use_compilation_cache
from jaxstyle.dual_style import Exemplar
from jaxstyle.dualstylegan import NUM_WEIGHTS, style_weights
from jaxstyle.errors import UserError, cli
from jaxstyle.interpolate import Options as WayOptions
from jaxstyle.interpolate import end_code, line
from jaxstyle.options import parse
from jaxstyle.stylegan2 import Generator, Params
from jaxstyle.stylize import Style

WEIGHTS = {
    "structure 1, color 1": style_weights(1.0, 1.0),
    "structure 0.5": style_weights(0.5, 1.0),
    "color 0": style_weights(1.0, 0.0),
}

NOTHING = style_weights(0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of jaxstyle.dual_sheets."""

    weights: str
    """Folder of a DualStyleGAN style."""
    faces: tuple[str, str] = ("3", "8")
    """Two faces: seeds, .npz of codes, or photos."""
    style_id: tuple[str, str] = ("0", "1")
    """Two of the style's exemplars, by number or name."""
    style: Path | None = None
    """A picture to take as a new exemplar."""
    n: int = 7
    """Pictures on a way, both ends included."""
    psi: float = dual_style.PSI
    """Truncation of the faces' codes, towards 0."""
    out: Path = Path("sheets")
    """Folder of the sheets."""
    encoder: str = ""
    """Finds photos' codes: an encoder's folder, or `optimize`. Empty: the style's."""
    seed: int = 0
    """Seed of searches."""
    new: Annotated[dual_style.NewOptions, tyro.conf.OmitArgPrefixes] = (
        dual_style.NewOptions(refine=100)
    )
    align: Annotated[AlignOptions, tyro.conf.OmitArgPrefixes] = AlignOptions()


def single_row(row: int) -> np.ndarray:
    """Weights [18] of one row alone."""
    return np.float32(np.arange(NUM_WEIGHTS) == row)


def read_face(options: Options, text: str, generator: Generator, base: Params) -> Any:
    """The code of a face, w+ [num_ws, w_dim]; see `interpolate.end_code`."""
    style = Style("", generator, base, base, options.weights)
    how = WayOptions(
        start=text,
        encoder=options.encoder,
        seed=options.seed,
        align=options.align,
        out=str(options.out / "face.png"),
    )
    code, space = end_code(text, how, style)
    return pipeline.to_w_plus(generator, base, code, space)[0]


def draw(exemplar: Exemplar, generator: Generator, base: Params, face: Any) -> Any:
    """A face [num_ws, w_dim] in an exemplar's style, [size, size, 3]."""
    return dual_style.picture(exemplar, generator, base, face)


def layers_sheet(
    generator: Generator, base: Params, faces: Sequence[Any], exemplars: Sequence
) -> Any:
    """Each row of an exemplar alone: a line for each pair of a face and an exemplar."""
    labels = ["face", "exemplar", *map(str, range(generator.num_ws)), "all"]
    tables = [single_row(row) for row in range(generator.num_ws)] + [style_weights()]
    cells = []
    for face, exemplar in zip(faces, exemplars, strict=True):
        cells += [
            draw(exemplar._replace(weights=NOTHING), generator, base, face),
            dual_style.portrait(exemplar, generator, base),
        ]
        cells += [
            draw(exemplar._replace(weights=w), generator, base, face) for w in tables
        ]
    return images.grid(cells, len(labels), column_labels=labels)


def weights_sheet(
    generator: Generator, base: Params, faces: Sequence[Any], exemplars: Sequence
) -> Any:
    """Whole, half structure, no color, fine rows replaced: a line for each pair."""
    labels = ["face", "exemplar", *WEIGHTS, "fine rows replaced"]
    cells = []
    for face in faces:
        for exemplar in exemplars:
            cells += [
                draw(exemplar._replace(weights=NOTHING), generator, base, face),
                dual_style.portrait(exemplar, generator, base),
            ]
            cells += [
                draw(exemplar._replace(weights=w), generator, base, face)
                for w in WEIGHTS.values()
            ]
            kept = exemplar._replace(keep_color=True)
            cells.append(draw(kept, generator, base, face))
    return images.grid(cells, len(labels), column_labels=labels)


def moves_sheet(
    generator: Generator,
    base: Params,
    faces: Sequence[Any],
    exemplars: Sequence,
    n: int,
) -> Any:
    """From one face to the other, from one exemplar to the other, and both."""
    way = line(faces[0], faces[1], n)
    others = line(exemplars[0].code, exemplars[1].code, n)
    cells = [
        draw(exemplars[0]._replace(code=other), generator, base, face)
        for pairs in (
            [(face, others[0]) for face in way],
            [(way[0], other) for other in others],
            list(zip(way, others, strict=True)),
        )
        for face, other in pairs
    ]
    return images.grid(cells, n, row_labels=["face", "style", "both"])


def new_sheet(
    options: Options, generator: Generator, base: Params, faces: Sequence[Any]
) -> Any:
    """A new exemplar: the picture, its own face in its style, and faces in it.

    A line before and one after the refinement of its code.
    """
    cells, rows = [], []
    for steps in dict.fromkeys((0, options.new.refine)):
        _, _, found = dual_style.load(
            options.weights,
            dual_style.DualOptions(style_weights="1,1"),
            psi=options.psi,
            pictures=[epath.Path(options.style)],
            new=dataclasses.replace(options.new, refine=steps),
            cache=epath.Path(options.out),
        )
        exemplar = next(iter(found.values()))
        cells += [exemplar.shown, dual_style.portrait(exemplar, generator, base)]
        cells += [draw(exemplar, generator, base, face) for face in faces]
        rows.append(f"refined {steps}" if steps else "as found")
    labels = ["exemplar", "drawn"] + ["face"] * len(faces)
    size = generator.size
    cells = [np.asarray(pipeline.resize(np.asarray(c)[None], size))[0] for c in cells]
    return images.grid(cells, len(labels), column_labels=labels, row_labels=rows)


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m jaxstyle.dual_sheets`."""
    options = parse(Options, "jaxstyle.dual_sheets", __doc__, args)
    use_compilation_cache()
    if options.n < 2:
        raise UserError(f"--n is {options.n}; a way needs at least 2 pictures")
    if not dual_style.is_dual(options.weights):
        raise UserError(f"weights {options.weights!r} hold no DualStyleGAN style")
    wanted = dual_style.DualOptions(style_id=options.style_id, style_weights="1,1")
    generator, base, found = dual_style.load(options.weights, wanted, psi=options.psi)
    model = weights.load(options.weights)[0]
    exemplars = [found[str(model.exemplars.index(i))] for i in options.style_id]
    faces = [read_face(options, text, generator, base) for text in options.faces]
    drawn = (generator, base, faces, exemplars)
    sheets = {
        "layers": lambda: layers_sheet(*drawn),
        "weights": lambda: weights_sheet(*drawn),
        "moves": lambda: moves_sheet(*drawn, options.n),
    }
    if options.style is not None:
        sheets["new"] = lambda: new_sheet(options, generator, base, faces)
    for name, sheet in sheets.items():
        print(images.save_image(options.out / f"{name}.jpg", sheet()), flush=True)


if __name__ == "__main__":
    main()
