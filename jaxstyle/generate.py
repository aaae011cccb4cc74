"""Pictures from seeds or codes.

    python -m jaxstyle.generate --seeds 0-15 --psi 0.7 --grid
    python -m jaxstyle.generate --weights runs/jojo-art --seeds 0-7 --compare heads
    python -m jaxstyle.generate --mix --rows 0-3 --cols 4-7 --styles 0-6
    python -m jaxstyle.generate --codes me.npz --format npy
    python -m jaxstyle.generate --weights weights/cartoon --fix content --grid
    python -m jaxstyle.generate --weights runs/sketch --mapper runs/mapper-a-cat

Every seed stands for one face of a generator, whatever other seeds are asked for; the
same command writes the same bytes again. Finetuned generators keep the faces of their
base, so the same seeds compare them.

Of a DualStyleGAN style every seed is a face, and an exemplar that the style's sampler
makes up (or, with --style-id, a stored one). --fix content gives the face of the first
seed to all of them, --fix color and structure its exemplar's.
"""

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from etils import epath

from jaxstyle import dual_style, edits, images, pipeline, weights
from jaxstyle.cache import use_compilation_cache
from jaxstyle.errors import UserError, cli
from jaxstyle.options import given, parse
from jaxstyle.stylegan2 import Generator

# Published truncation of the faces of random DualStyleGAN pictures, towards 0.
DUAL_PSI = 0.5


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of jaxstyle.generate."""

    weights: str = weights.DEFAULT
    """A name we ship, a converted folder, or a run."""
    seeds: str = "0-15"
    """Seeds, such as 0-3,7; each makes one picture."""
    psi: float | None = None
    """Truncation: 1 leaves the codes alone, 0 gives the average face; 0.7 is usual.
    None: 1; of a DualStyleGAN style, whose faces are pulled towards 0, the published
    0.5."""
    cutoff: int | None = None
    """Truncate only this many rows of the code, from the coarsest."""
    noise_mode: Literal["const", "random", "none"] = "const"
    """Noise planes: those stored with the weights, drawn from each seed, or none."""
    codes: Path | None = None
    """Codes instead of seeds: an .npz with one of w_plus [n, num_ws, w_dim], w, z, or
    styles [n, all style vectors one after the other]."""
    compare: str = ""
    """Also draw everything with this generator, e.g. the base of a finetuned one."""
    mix: bool = False
    """Style mixing: the face of a row, some of its code replaced by a column's."""
    rows: str = "0-3"
    """--mix: seeds of the rows."""
    cols: str = "4-7"
    """--mix: seeds of the columns."""
    styles: str = "0-6"
    """--mix: rows of the code that come from the column; low ones carry the shape."""
    grid: bool = False
    """Also write all pictures on one sheet, OUT/grid.png."""
    out: str = "generated"
    """Folder of the pictures."""
    format: Literal["png", "npy"] = "png"
    """png; or npy: raw float32 [height, width, 3], nominally in [-1, 1], unclipped."""
    batch: int = 1
    """Pictures at a time. Bits may differ in the last place between batch sizes."""
    step: int | None = None
    """Another checkpoint of a run than its last."""
    style: str | None = None
    """Which style of a run that trained several: its name or number."""
    moves: Annotated[edits.MoveOptions, tyro.conf.OmitArgPrefixes] = edits.MoveOptions()
    fix: str = ""
    """Of a DualStyleGAN style: what all pictures have from the first seed: content,
    color, structure, or several of these with commas."""
    sampler: str = ""
    """Of a DualStyleGAN style: run of train.dual_sampler; empty: the sampler kept with
    the style; random: codes of random faces, as in the network's first training."""
    sampler_statistics: Literal["running", "batch"] = "running"
    """What the sampler normalises by: averages of its training, or as published all
    seeds of the command together."""
    dual: Annotated[dual_style.DualOptions, tyro.conf.OmitArgPrefixes] = (
        dual_style.DualOptions()
    )


def generate(
    generator: Generator,
    params: Any,
    seeds: list[int],
    *,
    psi: float = 1.0,
    cutoff: int | None = None,
    noise: str = "const",
    batch: int = 1,
) -> np.ndarray:
    """Pictures of seeds.

    Args:
      generator: the architecture.
      params: its parameters.
      seeds: one a picture.
      psi: truncation towards the average code.
      cutoff: truncate only this many rows, from the coarsest.
      noise: const, random (drawn from the seed) or none.
      batch: pictures at a time.

    Returns:
      [n, size, size, 3] float32, nominally in [-1, 1].
    """
    z = pipeline.seed_codes(seeds, generator.z_dim)
    w_plus = pipeline.to_w_plus(
        generator, params, z, "z", psi=psi, cutoff=cutoff, batch=batch
    )
    keys = pipeline.seed_keys(seeds, 1)
    return pipeline.pictures(
        generator, params, w_plus, noise=noise, keys=keys, batch=batch
    )


def mix_codes(rows: np.ndarray, columns: np.ndarray, styles: list[int]) -> np.ndarray:
    """Every row code with some rows of every column code.

    Args:
      rows: w_plus [n, num_ws, w_dim].
      columns: w_plus [m, num_ws, w_dim].
      styles: code rows that come from the column.

    Returns:
      [n * m, num_ws, w_dim], the columns varying fastest.
    """
    chosen = np.isin(np.arange(rows.shape[1]), styles)[:, None]
    mixed = np.where(chosen, columns[None], rows[:, None])
    return mixed.reshape(-1, *rows.shape[1:])


def write(path: Any, picture: np.ndarray, form: str) -> Any:
    """Write one picture [height, width, 3] as `path` plus `.png` or `.npy`."""
    path = path.with_name(f"{path.name}.{form}")
    if form == "png":
        return images.save_image(path, picture)
    buffer = io.BytesIO()
    np.save(buffer, picture)
    images.write_bytes(path, buffer.getvalue())
    return path


def truncation(options: Options) -> dict[str, Any]:
    """The arguments of `pipeline.to_w_plus`."""
    psi = 1.0 if options.psi is None else options.psi
    return {"psi": psi, "cutoff": options.cutoff, "batch": options.batch}


def check(options: Options, generator: Generator) -> None:
    """Refuse values that cannot be.

    Raises:
      UserError: naming the option.
    """
    if options.batch < 1:
        raise UserError(f"--batch is {options.batch}; it must be at least 1")
    if options.cutoff is not None and not 0 <= options.cutoff <= generator.num_ws:
        raise UserError(
            f"--cutoff is {options.cutoff}; {options.weights} has {generator.num_ws} "
            "rows to truncate"
        )
    if options.psi is not None and not np.isfinite(options.psi):
        raise UserError(f"--psi is {options.psi}; it must be a number such as 0.7")
    out = epath.Path(options.out)
    if out.suffix.lower() in images.SUFFIXES and not out.is_dir():
        raise UserError(
            f"--out is {options.out}; it must be a folder, where each picture gets a "
            "name of its own"
        )
    without = ("seeds", "codes", "compare", "moves")
    if options.mix and (flags := given(options, without)):
        raise UserError(
            "--mix draws the seeds of --rows and --cols as they are; leave out "
            f"{', '.join(flags)}"
        )
    if not options.mix and (flags := given(options, ("rows", "cols", "styles"))):
        raise UserError(f"{', '.join(flags)} is of style mixing; add --mix")


def draw_mix(options: Options, generator: Generator, params: Any) -> None:
    """The sheet of style mixing: sources above and to the left, mixes inside."""
    rows = pipeline.parse_numbers(options.rows, "--rows")
    columns = pipeline.parse_numbers(options.cols, "--cols")
    styles = pipeline.parse_numbers(options.styles, "--styles")
    if max(styles) >= generator.num_ws:
        raise UserError(
            f"--styles is {options.styles!r}; the codes of {options.weights} have rows "
            f"0 to {generator.num_ws - 1}"
        )
    z = pipeline.seed_codes(rows + columns, generator.z_dim)
    sources = pipeline.to_w_plus(generator, params, z, "z", **truncation(options))
    first, second = sources[: len(rows)], sources[len(rows) :]
    codes = np.concatenate([sources, mix_codes(first, second, styles)])
    # A mix takes the noise of its row, so that a row differs in its codes alone.
    seeds = rows + columns + [r for r in rows for _ in columns]
    drawn = pipeline.pictures(
        generator,
        params,
        codes,
        noise=options.noise_mode,
        keys=pipeline.seed_keys(seeds, 1),
        batch=options.batch,
    )
    of_rows, of_columns, mixes = np.split(drawn, [len(rows), len(rows) + len(columns)])
    pairs = [(r, c) for r in rows for c in columns]
    for (row, column), picture in zip(pairs, mixes, strict=True):
        write(
            epath.Path(options.out) / f"mix-{row:04d}-{column:04d}",
            picture,
            options.format,
        )
    sheet = [np.ones_like(of_rows[0]), *of_columns]
    for i, picture in enumerate(of_rows):
        sheet += [picture, *mixes[i * len(columns) : (i + 1) * len(columns)]]
    path = images.save_image(
        epath.Path(options.out) / "grid.png",
        images.grid(
            sheet,
            len(columns) + 1,
            column_labels=["", *columns],
            row_labels=["", *rows],
        ),
    )
    print(f"{len(mixes)} mixes in {options.out}\n{path}")


def write_all(
    options: Options,
    names: Sequence[str],
    draws: Mapping[str, Callable[[slice], np.ndarray]],
) -> list[Any]:
    """Draw and write pictures; returns those for the sheet.

    Args:
      options: of the command.
      names: of the files, without suffix.
      draws: by suffix, what draws the pictures of a part of the names.

    Returns:
      With --grid all pictures, one suffix after the other; else none.
    """
    kept: dict[str, list] = {suffix: [] for suffix in draws}
    # A batch at a time: thousands of large pictures would not fit into memory.
    for start in range(0, len(names), options.batch):
        part = slice(start, start + options.batch)
        for suffix, draw in draws.items():
            for name, picture in zip(names[part], draw(part), strict=True):
                path = epath.Path(options.out) / (name + suffix)
                write(path, picture, options.format)
                if options.grid:
                    kept[suffix].append(images.to_pil(picture))
    print(f"{len(names) * len(draws)} pictures in {options.out}")
    return [picture for pictures in kept.values() for picture in pictures]


def draw(options: Options, generator: Generator, params: Any) -> None:
    """Pictures of seeds or codes, and those of `--compare` beside them."""
    networks = {"": (generator, params)}
    if options.compare:
        # Above the others on the sheet.
        networks = {"-base": pipeline.load_generator(options.compare), **networks}
    if options.codes:
        codes, space = pipeline.read_codes(options.codes, generator)
        seeds = list(range(len(jax.tree.leaves(codes)[0])))
        labels = [f"{options.codes.stem}-{i:04d}" for i in seeds]
    else:
        seeds, space = pipeline.parse_numbers(options.seeds, "--seeds"), "z"
        codes = pipeline.seed_codes(seeds, generator.z_dim)
        labels = [f"seed{s:04d}" for s in seeds]
    moves = edits.read_moves(options.moves, generator)
    if space == "styles" and moves.label:
        raise UserError(
            f"{options.codes} holds style vectors; --edit and --mapper move codes"
        )
    end = f"-{moves.label}" if moves.label else ""
    if space == "styles" and options.psi not in (None, 1):
        raise UserError(
            f"--psi is {options.psi}, but style vectors cannot be truncated; give "
            "w_plus codes or leave --psi at 1"
        )

    def drawn(module, values, part):
        chosen = jax.tree.map(lambda x: x[part], codes)
        if space != "styles":
            chosen = moves.apply(
                pipeline.to_w_plus(module, values, chosen, space, **truncation(options))
            )
        return pipeline.pictures(
            module,
            values,
            chosen,
            space="styles" if space == "styles" else "w_plus",
            noise=options.noise_mode,
            keys=pipeline.seed_keys(seeds[part], 1),
            batch=options.batch,
        )

    draws = {suffix: partial(drawn, *network) for suffix, network in networks.items()}
    kept = write_all(options, [label + end for label in labels], draws)
    if options.grid:
        if options.compare:
            sheet = images.grid(
                kept,
                len(labels),
                column_labels=labels,
                row_labels=[Path(options.compare).name, Path(options.weights).name],
            )
        else:
            sheet = images.grid(kept, captions=labels)
        print(images.save_image(epath.Path(options.out) / "grid.png", sheet))


def dual_exemplars(
    options: Options, model: Any, params: Any, seeds: list[int], fixed: list[str]
) -> dict[str, dual_style.Exemplar]:
    """Stored exemplars by label, or those that the sampler makes up, without one.

    Raises:
      UserError: no such exemplar, or no sampler.
    """
    psi = DUAL_PSI if options.psi is None else options.psi
    if options.dual.style_id:
        stored = dual_style.load(
            options.weights, options.dual, step=options.step, psi=psi
        )[2]
        return {f"-{label}": exemplar for label, exemplar in stored.items()}
    samplers, values = model, params
    if options.sampler == "random":
        samplers = None
    elif options.sampler:
        samplers, values = weights.load(options.sampler)
    codes = dual_style.sample_codes(
        model.generator,
        params["generator"],
        samplers,
        values,
        seeds,
        fix=fixed,
        train=options.sampler_statistics == "batch",
    )
    return {
        "": dual_style.make_exemplar(
            model.dual, params["dual"], options.dual, psi, codes
        )
    }


def draw_dual(options: Options) -> None:
    """Faces of seeds or codes in the style of exemplars.

    Raises:
      UserError: options that go with plain generators.
    """
    if options.compare or options.cutoff is not None:
        raise UserError(
            f"{options.weights} is a DualStyleGAN style: leave out --compare and "
            "--cutoff; --style-weights 0,0 draws its plain faces"
        )
    model, params = weights.load(options.weights, step=options.step)
    generator, base = model.generator, params["generator"]
    check(options, generator)
    fixed = dual_style.parse_fix(options.fix)
    if options.codes:
        codes, space = pipeline.read_codes(options.codes, generator)
        seeds = list(range(len(codes)))
        labels = [f"{options.codes.stem}-{i:04d}" for i in seeds]
    else:
        seeds, space = pipeline.parse_numbers(options.seeds, "--seeds"), "z"
        codes = pipeline.seed_codes(seeds, generator.z_dim)
        labels = [f"seed{s:04d}" for s in seeds]
    if space == "styles":
        raise UserError(f"{options.codes} holds style vectors; give w_plus, w or z")
    faces = pipeline.to_w_plus(generator, base, codes, space, batch=options.batch)
    moves = edits.read_moves(options.moves, generator)
    faces = moves.apply(faces)
    end = f"-{moves.label}" if moves.label else ""
    if "content" in fixed:
        faces = np.broadcast_to(faces[:1], faces.shape)

    def drawn(exemplar, part):
        others = np.broadcast_to(exemplar.code, faces.shape)
        return dual_style.pictures(
            exemplar._replace(code=others[part]),
            generator,
            base,
            faces[part],
            noise=options.noise_mode,
            keys=pipeline.seed_keys(seeds[part], 1),
            batch=options.batch,
        )

    exemplars = dual_exemplars(options, model, params, seeds, fixed)
    draws = {suffix: partial(drawn, found) for suffix, found in exemplars.items()}
    kept = write_all(options, [label + end for label in labels], draws)
    if options.grid:
        columns = len(labels) if len(exemplars) > 1 else None
        captions = [label + suffix for suffix in exemplars for label in labels]
        sheet = images.grid(kept, columns, captions=captions)
        print(images.save_image(epath.Path(options.out) / "grid.png", sheet))


def refuse_dual(options: Options) -> None:
    """Refuse options of DualStyleGAN styles for other weights.

    Raises:
      UserError: naming them.
    """
    ours = options.dual, options.fix, options.sampler, options.sampler_statistics
    if ours != (dual_style.DualOptions(), "", "", "running"):
        raise UserError(
            "--fix, --sampler, --style-id and the other options of exemplars are "
            f"given, but {options.weights} is no DualStyleGAN style"
        )


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m jaxstyle.generate`."""
    options = parse(Options, "jaxstyle.generate", __doc__, args)
    use_compilation_cache()
    if dual_style.is_dual(options.weights) and not options.mix:
        return draw_dual(options)
    refuse_dual(options)
    generator, params = pipeline.load_generator(
        options.weights, step=options.step, style=options.style
    )
    check(options, generator)
    if options.mix:
        draw_mix(options, generator, params)
    else:
        draw(options, generator, params)


if __name__ == "__main__":
    main()
