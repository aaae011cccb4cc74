"""A photo in a learned style.

    python -m jaxstyle.stylize me.jpg
    python -m jaxstyle.stylize me.jpg --weights runs/jojo-art --intensity 0.7 --grid
    python -m jaxstyle.stylize holiday/ --weights runs/jojo-art runs/jojo-oil
    python -m jaxstyle.stylize me.jpg --paste-back --out me_art.png
    python -m jaxstyle.stylize me.jpg --weights weights/cartoon --style-id 53
    python -m jaxstyle.stylize me.jpg --weights weights/cartoon --style art.png
    python -m jaxstyle.stylize --overview --weights weights/cartoon
    python -m jaxstyle.stylize me.jpg --weights runs/nada-photo-sketch --edit age:+3
    python -m jaxstyle.stylize me.jpg --tune 350

The face is cut out and turned upright, its code is found on the generator that the
style was finetuned from, and the finetuned generator draws the code again. The code is
kept beside the result, so that another style or intensity of the same photo is quick.
With `--tune` the generators are first moved until the code draws this very face (see
`jaxstyle.tune`): slower, and more alike.

Intensities between 0 and 1 mix the features of both generators layer by layer, the mix
being the input of both next layers (JoJoGAN, arXiv 2112.11641): not a cross-fade.

Of a DualStyleGAN style one of its exemplars is chosen, or a picture becomes a new one,
and how much of its structure and of its color; the intensity is a factor of both.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from etils import epath
from jax import Array

from jaxstyle import dual_style, edits, images, pipeline, weights
from jaxstyle.align import AlignOptions, paste_back, prepare
from jaxstyle.cache import use_compilation_cache
from jaxstyle.encoding import Encoder, load_encoder
from jaxstyle.errors import UserError, cli
from jaxstyle.invert import DEFAULT as DEFAULT_SEARCH
from jaxstyle.invert import Search, for_photos, invert
from jaxstyle.masks import parse_mask
from jaxstyle.options import given, parse
from jaxstyle.paths import place
from jaxstyle.stylegan2 import Generator, Params, interpolate_features
from jaxstyle.tune import TuneOptions, moved, resolved, tune

CROP_SIZE = 256
"""Faces are cut out at least this large: encoders read 256 px."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of jaxstyle.stylize."""

    photo: Annotated[
        epath.Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="PHOTO")
    ] = None
    """A photo, or a folder of photos; --overview needs none."""
    weights: tuple[str, ...] = ()
    """Runs or folders of finetuned generators; several give a sheet of styles. None:
    the newest finished run under runs/."""
    out: str = "stylized"
    """A folder; or a file (.png, .jpg, .webp, …) for one photo: the result, or the
    sheet when --grid or several styles ask for one."""
    intensity: float = 1.0
    """Strength of the style: 0 is the base generator, 1 the finetuned one."""
    layers: str = "all"
    """Layers that take the style: all, structure, color, or numbers of modulated layers
    such as 0-8,12; the others stay the base's."""
    step: int | None = None
    """Another checkpoint of a run than its last."""
    style: str | None = None
    """One style of a run that learned several: its name or number. None: all. Of a
    DualStyleGAN style a picture, or a folder of such: a new exemplar."""
    base: str = ""
    """The generator the style was finetuned from; empty: the one the run names."""
    paste_back: bool = False
    """Put the face back into the whole photo, its border feathered."""
    grid: bool = False
    """Also write a sheet: photo, inversion, reference, result."""
    noise_mode: Literal["const", "random", "none"] = "const"
    """Noise planes: those stored with the base, drawn from --seed, or none."""
    seed: int = 0
    """Seed of random noise and of the inversion."""
    encoder: str = ""
    """Finds the photo's code: an encoder's folder, or `optimize`, which needs none, or
    `w_plus`, the second encoder of a converted DualStyleGAN style (published: --wplus).
    Empty: the encoder stored with the base, or named by it, else optimize."""
    psi: float = dual_style.PSI
    """Of a DualStyleGAN style: truncation of the photo's code, towards 0 as published;
    1: none."""
    overview: bool = False
    """Of a DualStyleGAN style: write OUT/overview.png, its exemplars by number; with a
    photo, the photo in the style of each."""
    dual: Annotated[dual_style.DualOptions, tyro.conf.OmitArgPrefixes] = (
        dual_style.DualOptions()
    )
    new: Annotated[dual_style.NewOptions, tyro.conf.OmitArgPrefixes] = (
        dual_style.NewOptions()
    )
    moves: Annotated[edits.MoveOptions, tyro.conf.OmitArgPrefixes] = edits.MoveOptions()
    search: Annotated[Search, tyro.conf.OmitArgPrefixes] = DEFAULT_SEARCH
    tuning: Annotated[TuneOptions, tyro.conf.OmitArgPrefixes] = TuneOptions()
    align: Annotated[AlignOptions, tyro.conf.OmitArgPrefixes] = AlignOptions()


@dataclasses.dataclass(frozen=True)
class Style:
    """A finetuned generator and the one it started from.

    Attributes:
      name: for file names and sheets.
      generator: the architecture of both.
      params: of the finetuned generator.
      base: of the generator it started from.
      base_name: name or path of that one.
      reference: the aligned picture the style was learned from, if the run kept it.
      exemplar: of a DualStyleGAN, whose generator stays as it is.
    """

    name: str
    generator: Generator
    params: Params
    base: Params
    base_name: str
    reference: Any = None
    exemplar: dual_style.Exemplar | None = None


def load_styles(
    names: Sequence[str],
    *,
    step: int | None = None,
    style: str | None = None,
    base: str = "",
    own_base: bool = False,
    dual: Callable[[str], list[Style]] | None = None,
) -> list[Style]:
    """Finetuned generators, each with its base.

    Args:
      names: runs or network folders; one with several styles gives all of them.
      step: another checkpoint than the last.
      style: one style of a run that learned several.
      base: instead of the base that the folders name.
      own_base: a folder that names none is its own base, instead of an error.
      dual: gives the styles of a DualStyleGAN's folder; None takes such a folder for
        its generator.

    Raises:
      UserError: a folder that names no base, or one of another architecture.
    """
    bases: dict[str, tuple[Generator, Params]] = {}
    styles = []
    for name in names:
        if dual is not None and dual_style.is_dual(name):
            styles += dual(name)
            continue
        metadata = weights.read_config(name)["metadata"]
        base_name = base or metadata.get("base") or (name if own_base else "")
        if not base_name:
            raise UserError(
                f"weights {name!r} do not say which generator they were finetuned "
                "from, on which the photo is inverted; name it with --base"
            )
        if base_name not in bases:
            try:
                bases[base_name] = pipeline.load_generator(base_name)
            except UserError as error:
                raise UserError(f"base of {name}: {error}; or pass --base") from None
        known = metadata.get("styles") or []
        for chosen in [style] if style is not None else known or [None]:
            generator, params = pipeline.load_generator(name, step=step, style=chosen)
            check_same(name, generator, base_name, bases[base_name][0])
            index = known.index(chosen) if chosen in known else int(chosen or 0)
            styles.append(
                Style(
                    name=known[index] if known else epath.Path(name).name,
                    generator=generator,
                    params=params,
                    base=bases[base_name][1],
                    base_name=base_name,
                    reference=reference_picture(
                        name, metadata.get("references", ()), index
                    ),
                )
            )
    labels = [s.name for s in styles]
    return [
        s if labels.count(s.name) == 1 else dataclasses.replace(s, name=f"{s.name}-{i}")
        for i, s in enumerate(styles)
    ]


def dual_styles(
    name: str, options: dual_style.DualOptions, **arguments: Any
) -> list[Style]:
    """The chosen exemplars of a DualStyleGAN's folder, which is its own base.

    Args:
      name: of the folder.
      options, arguments: of `dual_style.load`.
    """
    generator, params, exemplars = dual_style.load(name, options, **arguments)
    if options.style_id:
        table = weights.read_config(name)["networks"]["exemplars"]["codes"]
        kind = "refined" if "refined" in table else "extrinsic"
        print(f"exemplars of {name}: {kind} codes", flush=True)
    return [
        Style(
            name=f"{epath.Path(name).name}-{label}",
            generator=generator,
            params=params,
            base=params,
            base_name=name,
            exemplar=exemplar,
        )
        for label, exemplar in exemplars.items()
    ]


def reference_picture(name: str, references: Sequence[str], index: int) -> Any:
    """The aligned reference that a run keeps, or None."""
    if index >= len(references):
        return None
    stem = epath.Path(references[index]).stem
    path = weights.resolve(name) / "references" / f"{stem}.png"
    return path if path.exists() else None


def check_same(
    name: str, generator: Generator, base_name: str, base: Generator
) -> None:
    """Refuse a base of another architecture.

    Raises:
      UserError: naming both.
    """

    def layout(g):
        return g.size, g.w_dim, g.style_dims

    if layout(generator) != layout(base):
        raise UserError(
            f"base {base_name!r} is a {base.size} px generator with style vectors of "
            f"{sum(base.style_dims)} numbers, but {name!r} was finetuned from one of "
            f"{generator.size} px and {sum(generator.style_dims)}; give --base"
        )


def layer_shares(style: Style, intensity: float, layers: str) -> np.ndarray:
    """Share of the finetuned generator in each modulated layer: [num_layers].

    Raises:
      UserError: an intensity outside 0 to 1, unknown layers, or some of an exemplar's.
    """
    if not 0 <= intensity <= 1:
        raise UserError(f"--intensity is {intensity}; it must be from 0 to 1")
    if style.exemplar:
        refuse_layers(layers)
    return np.float32(intensity) * parse_mask(layers, style.generator.size, "--layers")


def refuse_layers(layers: str) -> None:
    """Refuse layers of a DualStyleGAN style.

    Raises:
      UserError: others than all.
    """
    if layers != "all":
        raise UserError(
            f"--layers is {layers!r}; the rows of an exemplar are chosen with "
            "--style-weights"
        )


@partial(jax.jit, static_argnames=("generator", "noise"))
def _blend(generator, base, tuned, code, share, keys, noise):
    return interpolate_features(
        generator, base, tuned, code, share, noise=noise, key=keys
    )


def stylize(
    style: Style,
    code: Array,
    *,
    intensity: float = 1.0,
    layers: str = "all",
    noise: str = "const",
    seed: int = 0,
) -> np.ndarray:
    """The picture of a code in a style.

    Args:
      style: see `load_styles`.
      code: w_plus [num_ws, w_dim] on the base generator.
      intensity: 0 draws with the base generator, 1 with the finetuned one.
      layers: which layers take the style; see `masks.parse_mask`.
      noise: const, random or none.
      seed: of random noise.

    Returns:
      [size, size, 3], nominally in [-1, 1].

    Raises:
      UserError: see `layer_shares`; another code shape.
    """
    share = layer_shares(style, intensity, layers)
    keys = pipeline.seed_keys([seed], 1)
    if style.exemplar and intensity:
        return dual_style.picture(
            style.exemplar,
            style.generator,
            style.base,
            code,
            intensity=intensity,
            noise=noise,
            keys=keys,
        )
    if np.all(share == 1) or not np.any(share):
        # One generator is half the work of two.
        params = style.params if np.any(share) else style.base
        return pipeline.pictures(
            style.generator, params, code[None], noise=noise, keys=keys
        )[0]
    return np.asarray(
        _blend(
            style.generator, style.base, style.params, code[None], share, keys, noise
        )[0]
    )


def tuned(style: Style, base: Params) -> Style:
    """A style on a base that was tuned to a photo: the same change of weights there."""
    if base is style.base:
        return style
    params = moved(style.params, style.base, base)
    return dataclasses.replace(style, params=params, base=base)


@lru_cache(maxsize=4)
def _loaded(where: str, written: float, generator: Generator, network: str) -> Encoder:
    """An encoder, read once for all photos; `written` is its folder's time."""
    del written
    return load_encoder(where, generator, network)


def choose_encoder(
    encoder: str, base_name: str, generator: Generator, flags: Sequence[str] = ()
) -> Literal["optimize"] | Encoder:
    """The encoder to use: as given, or what the base holds or names in its metadata.

    Args:
      encoder: `optimize`, a folder, `w_plus` for the base's second one, or empty.
      base_name: the base's folder.
      generator: the base.
      flags: options of a search that were given.

    Raises:
      UserError: `w_plus`, and the base has none; a folder without an encoder, or with
        one for another generator; an encoder, and options of a search.
    """
    network = "encoder"
    if encoder == "w_plus":
        encoder, network = base_name, "encoder_w_plus"
    elif not encoder:
        config = weights.read_config(base_name)
        own = base_name if network in config["networks"] else "optimize"
        encoder = config["metadata"].get("encoder", own)
    if encoder == "optimize":
        return encoder
    if flags:
        raise UserError(
            f"{', '.join(flags)}: of a search, but the encoder {encoder} needs one "
            "pass; leave them out, or search with --encoder optimize"
        )
    written = (weights.resolve(encoder) / "config.json").stat().mtime
    return _loaded(str(encoder), written, generator, network)


def encoder_of(
    options: Options, base_name: str, generator: Generator
) -> Literal["optimize"] | Encoder:
    """What finds the codes of the photos of a command; see `choose_encoder`."""
    # LPIPS judges the tuning too, and --style PICTURE may be searched for.
    flags = [flag for flag in given(options, ("search",)) if flag != "--lpips"]
    searched = () if options.style else flags
    return choose_encoder(options.encoder, base_name, generator, searched)


def photo_code(
    crop: np.ndarray,
    generator: Generator,
    params: Params,
    *,
    encoder: Literal["optimize"] | Encoder = "optimize",
    search: Search = DEFAULT_SEARCH,
    seed: int = 0,
    cache: Any = None,
) -> np.ndarray:
    """The code of an aligned face, from `cache` if it was found before.

    Args:
      crop: [height, width, 3] in [-1, 1].
      generator: the architecture.
      params: of the base generator.
      encoder: `optimize`, or an encoder; see `choose_encoder`.
      search: options of the optimisation.
      seed: of the optimisation.
      cache: start of the path of the code files, without `-<digest>.npz`; None keeps
        nothing.

    Returns:
      w_plus [num_ws, w_dim].
    """
    sha = hashlib.sha256(crop.tobytes())
    how: Any = (dataclasses.asdict(search), seed)
    if encoder != "optimize":
        how = (str(encoder.where), weights.digest(encoder.params), encoder.space)
    sha.update(repr((weights.digest(params), how)).encode())
    path = None
    if cache is not None:
        path = cache.parent / f"{cache.name}-{sha.hexdigest()[:8]}.npz"
        if path.exists():
            codes, _ = pipeline.read_codes(path, generator)
            print(f"code of an earlier run: {path}")
            return codes[0]
    found = invert(
        generator,
        params,
        crop[None],
        encoder=encoder,
        search=search,
        key=jax.random.key(seed),
    )
    if path is not None:
        pipeline.write_codes(path, w_plus=found["w_plus"])
    return np.asarray(found["w_plus"][0])


def is_file(out: str) -> bool:
    """Whether `--out` names a picture, not a folder.

    Raises:
      UserError: a suffix that is no picture's.
    """
    path = epath.Path(out)
    if path.is_dir() or not path.suffix:
        return False
    images.image_format_of(path)
    return True


def chosen_styles(options: Options, names: Sequence[str]) -> list[Style]:
    """The styles that the options ask for.

    Raises:
      UserError: see `load_styles`; options of exemplars for other weights, or of
        layers for exemplars.
    """
    dual = [name for name in names if dual_style.is_dual(name)]
    if not dual and (flags := given(options, ("psi", "dual", "new"))):
        raise UserError(
            f"{', '.join(names)} is no DualStyleGAN style; leave out {', '.join(flags)}"
        )
    if dual:
        # Before a search for the code of a new exemplar.
        refuse_layers(options.layers)
    pictures = images.image_files(options.style) if dual and options.style else []
    out = epath.Path(options.out)
    load = partial(
        dual_styles,
        options=options.dual,
        step=options.step,
        psi=options.psi,
        pictures=pictures,
        new=options.new,
        search=options.search,
        key=jax.random.key(options.seed),
        cache=out.parent if is_file(options.out) else out,
    )
    return load_styles(
        names, step=options.step, style=options.style, base=options.base, dual=load
    )


def draw(
    options: Options, styles: Sequence[Style], photo: epath.Path, name: str, face: Any
) -> Any:
    """Stylise one photo and write all its files; returns the path of the main one.

    `--out` a folder: NAME-STYLE.png (NAME-STYLE-MOVES.png), with a sheet NAME-grid.png.
    A file: the sheet if there is one, else the result, NAME-STYLE beside it.
    NAME-face.png and the code NAME-DIGEST.npz belong to the photo, whatever the results
    are called.

    Args:
      options: of the command.
      styles: at least one.
      photo: path of the photo.
      name: its name in file names.
      face: what `prepare` gave: the face, and where it lies in the photo.
    """
    out, sheet = epath.Path(options.out), options.grid or len(styles) > 1
    given = is_file(options.out)
    stem, suffix = (
        (out.parent / out.stem, out.suffix) if given else (out / name, ".png")
    )

    moved = edits.read_moves(options.moves, styles[0].generator).label

    def beside(what):
        name = "-".join(filter(None, [stem.name, what, moved]))
        return stem.parent / f"{name}{suffix}"

    main_path = out if given else beside("grid" if sheet else styles[0].name)
    crop, alignment = face
    images.save_image(stem.parent / f"{name}-face.png", crop)
    crop = images.to_array(crop)
    noise = {"noise": options.noise_mode, "seed": options.seed}
    codes: dict[str, np.ndarray] = {}
    bases: dict[str, Params] = {}
    results = []
    for style in styles:
        if style.base_name not in codes:
            codes[style.base_name] = photo_code(
                crop,
                style.generator,
                style.base,
                encoder=encoder_of(options, style.base_name, style.generator),
                search=for_photos(options.search, style.base_name),
                seed=options.seed,
                cache=stem.parent / name,
            )
            (bases[style.base_name],) = tune(
                style.generator,
                style.base,
                crop[None],
                codes[style.base_name][None],
                resolved(options.tuning, style.base_name),
                lpips=options.search.lpips,
            )
        style = tuned(style, bases[style.base_name])
        moves = edits.read_moves(options.moves, style.generator)
        result = stylize(
            style,
            moves.apply(codes[style.base_name][None])[0],
            intensity=options.intensity,
            layers=options.layers,
            **noise,
        )
        results.append(result)
        if options.paste_back:
            whole = images.open_image(photo)
            result = paste_back(whole, images.to_pil(result), alignment)
        images.save_image(beside(style.name) if sheet else main_path, result)
    if sheet:
        code = codes[styles[0].base_name]
        shown = tuned(styles[0], bases[styles[0].base_name])
        inversion = stylize(shown, code, intensity=0, **noise)
        images.save_image(main_path, compose(crop, inversion, styles, results))
    return main_path


def compose(
    crop: np.ndarray, inversion: np.ndarray, styles: Sequence[Style], results: Any
) -> Any:
    """The sheet of one photo: photo, inversion, references and results."""
    labels = ["photo", "inversion", *(s.name for s in styles)]
    pictures = [crop, inversion, *results]
    kept = [reference_of(style) for style in styles]
    if len(styles) == 1 and kept[0] is not None:
        labels.insert(2, "exemplar" if styles[0].exemplar else "reference")
        pictures.insert(2, kept[0])
    elif any(k is not None for k in kept):
        blank = np.ones_like(crop)
        pictures += [blank, blank, *(blank if k is None else k for k in kept)]
    return images.grid(pictures, len(labels), column_labels=labels)


def reference_of(style: Style) -> Any:
    """What the style was learned from, as a picture, or None.

    Of an exemplar the picture that was given, else what the style draws of its codes.
    """
    if style.exemplar is None:
        return images.open_image(style.reference) if style.reference else None
    if style.exemplar.shown is not None:
        return style.exemplar.shown
    return dual_style.portrait(style.exemplar, style.generator, style.base)


def draw_overview(options: Options, names: Sequence[str]) -> None:
    """OUT/overview.png: the exemplars, or the photo in the style of each.

    Raises:
      UserError: other weights than one DualStyleGAN style.
    """
    if len(names) != 1 or not dual_style.is_dual(names[0]):
        raise UserError(
            f"--overview shows the exemplars of one DualStyleGAN style, not of "
            f"{', '.join(names)}"
        )
    (name,), code = names, None
    generator, params = pipeline.load_generator(name, step=options.step)
    out = epath.Path(options.out)
    path = out if is_file(options.out) else out / "overview.png"
    if options.photo is not None:
        crop, _ = prepare(options.photo, max(CROP_SIZE, generator.size), options.align)
        code = photo_code(
            images.to_array(crop),
            generator,
            params,
            encoder=encoder_of(options, name, generator),
            search=for_photos(options.search, name),
            seed=options.seed,
            cache=path.parent / options.photo.stem,
        )
    sheet, exemplars = dual_style.overview(
        name, options.dual, step=options.step, psi=options.psi, code=code
    )
    for i, exemplar in enumerate(exemplars):
        print(f"{i:4d}  {exemplar}")
    print(images.save_image(path, sheet))


def is_photo(value: str) -> bool:
    """Whether a value is a picture or a folder of pictures, and no network."""
    try:
        weights.resolve(value)
    except UserError:
        return images.holds_pictures(value)
    return False


def check_swallowed(options: Options) -> None:
    """Refuse a photo after an option of many values, which took it for one of them.

    Raises:
      UserError: naming the photo and the option.
    """
    for flag, values in (
        ("--weights", options.weights),
        ("--style-id", options.dual.style_id),
        ("--edit", options.moves.edit),
    ):
        if values and is_photo(values[-1]):
            raise UserError(
                f"no photo is given: {flag} took {values[-1]} for a value of its own; "
                f"name the photo first: python -m jaxstyle.stylize {values[-1]} {flag} "
                "..."
            )


def check_used(options: Options) -> None:
    """Refuse options that have no effect beside others.

    Raises:
      UserError: naming them.
    """
    if not options.overview:
        return
    without = (
        *("style", "style_id", "blend", "new", "base", "intensity", "layers"),
        *("moves", "tuning", "noise_mode", "paste_back", "grid"),
    )
    if flags := given(options, without):
        raise UserError(
            f"--overview shows all exemplars as they are; leave out {', '.join(flags)}"
        )
    of_photos = ("style_weights", "preserve_color", "psi", "encoder")
    if options.photo is None and (flags := given(options, of_photos)):
        raise UserError(
            f"{', '.join(flags)} would change a photo, and --overview has none; name "
            "one, or leave it out"
        )


def check(options: Options) -> None:
    """Refuse options that cannot be.

    Raises:
      UserError: no photo, one file for a folder of photos, the photo itself as `--out`,
        one face's points for a folder, or options without effect.
    """
    if options.photo is None:
        check_swallowed(options)
        if not options.overview:
            raise UserError("no photo is given; name a picture or a folder of pictures")
    check_used(options)
    if options.photo is None:
        return
    if options.photo.is_dir() and options.overview:
        raise UserError(
            f"--overview takes one photo or none, but {options.photo} is a folder"
        )
    if options.photo.is_dir() and (options.align.eyes or options.align.mouth):
        raise UserError(
            f"--eyes and --mouth are for one photo, but {options.photo} is a folder; "
            "use --landmarks FOLDER"
        )
    if not is_file(options.out):
        return
    if place(options.photo).is_dir():
        raise UserError(
            f"--out is {options.out}, one file, but {options.photo} is a folder of "
            "photos; give --out a folder"
        )
    if epath.Path(options.out).resolve() == options.photo.resolve():
        raise UserError(f"--out is {options.out}, the photo itself; name another file")


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m jaxstyle.stylize`."""
    options = parse(Options, "jaxstyle.stylize", __doc__, args)
    use_compilation_cache()
    check(options)
    names = options.weights or (pipeline.newest_run(),)
    if options.overview:
        return draw_overview(options, names)
    photos = images.image_files(options.photo)
    styles = chosen_styles(options, names)
    finders = set()
    for style in styles:
        layer_shares(style, options.intensity, options.layers)
        resolved(options.tuning, style.base_name)
        encoder = encoder_of(options, style.base_name, style.generator)
        finders.add("optimize" if encoder == "optimize" else str(encoder.where))
    newest = "" if options.weights else " (the newest finished run)"
    bases = ", ".join(sorted({s.base_name for s in styles if s.exemplar is None}))
    origin = f", finetuned from {bases}" if bases else ""
    found = ", ".join(sorted(finders))
    print(f"weights: {', '.join(names)}{newest}{origin}; encoder: {found}", flush=True)
    size = max(CROP_SIZE, *(s.generator.size for s in styles))
    done = 0
    for path, name in zip(photos, images.file_names(photos), strict=True):
        try:
            face = prepare(path, size, options.align)
        except UserError as error:
            if not options.photo.is_dir():
                raise
            print(f"skipped {path.name}: {error}", flush=True)
            continue
        print(draw(options, styles, path, name, face), flush=True)
        done += 1
    if not done:
        raise UserError(f"none of the {len(photos)} photos could be stylised")


if __name__ == "__main__":
    main()
