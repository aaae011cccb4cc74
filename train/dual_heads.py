"""DualStyleGAN on drawn heads: from a folder of portraits to a measured style.

    python -m train.dual_heads
    python -m train.dual_heads --scale 0.02 --n 4 --out runs/quick

All stages of the published pipeline, each a command that is printed, in a folder of
OUT; a stage that was stopped goes on, a finished one is not repeated:

| folder     | stage                                                              |
| ---------- | ------------------------------------------------------------------ |
| portraits/ | the portrait set, heads drawn in cel style (train.heads)           |
| photos/    | faces, for the discriminator of stage 2                            |
| tuned/     | generator of the portraits (train.stylegan2 --augment)             |
| codes/     | facial destylisation (train.destylize)                             |
| pretrain/  | stage 2 (train.dual_pretrain)                                      |
| finetune/  | stage 3 (train.dual_finetune)                                      |
| style/     | refined codes; the finished style (train.refine_exstyle)           |
| sampler/   | sampler of new exemplars (train.dual_sampler)                      |
| evaluate/  | LPIPS to the true cel picture of held-out heads (train.evaluate),  |
|            | whose reference is an exemplar that the style has never seen       |
| sheets/    | the paper's figures (jaxstyle.dual_sheets)                         |

At the end it measures what the rows do, on random faces and stored exemplars: how far
the pictures of one face lie apart under different exemplars, and how much structure
weights and color weights change of shape (LPIPS of grey pictures of equal mean and
spread) and of color (mean difference of the coarse chroma). OUT holds weights.md.

The batch is not the published 32: these heads are 64 px, and the set is simple. Stage 3
has half the published rate, ADA at hand, and smaller λ_ID and λ_reg: else D wins early.
`--scale` multiplies the steps of all trainings.
"""

import dataclasses
import shlex
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxstyle import dual_style, images, pipeline, weights
from jaxstyle.cache import use_compilation_cache
from jaxstyle.dual_style import PreserveColor
from jaxstyle.dualstylegan import style_weights
from jaxstyle.encoding import CROP_SIZE
from jaxstyle.errors import UserError, cli
from jaxstyle.options import parse
from train import commands
from train.measures import all_distances, describe, markdown, spread

STYLE = "cel"
# Held-out heads have seed 1, as in train.evaluate.
SEEDS = {"portraits": 6, "photos": 7}
STAGES = ("tuned", "codes", "pretrain", "finetune", "style", "sampler")
WEIGHTS = {
    "none": (0.0, 0.0),
    "structure": (1.0, 0.0),
    "color": (0.0, 1.0),
    "both": (1.0, 1.0),
}
FACES, EXEMPLARS = 6, 6


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of train.dual_heads."""

    weights: str = weights.DEFAULT
    """Generator of faces."""
    encoder: str = ""
    """Folder of an encoder to z+; empty: that beside the generator, or named by it."""
    portraits: int = 100
    """Portraits."""
    photos: int = 3000
    """Faces."""
    n: int = 20
    """Held-out heads of the table."""
    id_lambda: float = 0.1
    """λ_ID of stage 3."""
    reg_lambda: float = 0.003
    """λ_reg of stage 3."""
    judge_size: int = 128
    """Pixels a side at which pictures are judged; published 256."""
    scale: float = 1.0
    """Times the steps of every training."""
    batch: int = 8
    """Pictures an iteration."""
    seed: int = 0
    """Seed of the trainings."""
    workers: int = 2
    """Processes that draw heads."""
    dual_weights: str = "0,0,0,0.5,0.5" + 13 * ",1"
    """Weights of the rows in the table, chosen on other heads than its own."""
    dual_preserve_color: PreserveColor = "code"
    """Whose colors the table has; the true pictures have the heads' own."""
    methods: str = "default,dual,dual-untuned,dual-refined,dual-stored"
    """Methods of the table, see train.evaluate."""
    heads: str = ""
    """Held-out heads, see train.evaluate; empty: drawn."""
    out: Path = Path("runs/dual_heads")
    """Folder of everything."""


# Stages


def steps(options: Options, count: int) -> list[str]:
    """The flag of a training's steps."""
    return ["--steps", str(max(1, round(count * options.scale)))]


def draw_heads(options: Options) -> None:
    """The portraits, large as the drawings they are measured against, and the faces.

    Lines are some pixels wide at any size: drawings of 64 px have other ones.
    """
    for name, count, size, style in (
        ("portraits", options.portraits, CROP_SIZE, STYLE),
        ("photos", options.photos, 64, "photo"),
    ):
        if not (folder := options.out / name).exists():
            command = ["-m", "train.heads", str(folder), "--n", str(count)]
            command += ["--size", str(size), "--styles", style]
            command += ["--seed", str(SEEDS[name]), "--workers", str(options.workers)]
            commands.run(command)


def command_of(options: Options, stage: str) -> list[str]:
    """The command of a stage."""
    out = {name: str(options.out / name) for name in (*STAGES, "portraits", "photos")}
    portraits, batch = f"{out['portraits']}/{STYLE}", ["--batch", str(options.batch)]
    encoder = ["--encoder", options.encoder] if options.encoder else []
    size = ["--judge-size", str(options.judge_size)]
    adversarial = ["--r1", "1", "--g-reg-every", "0", *size]
    command = {
        "tuned": [
            *("-m", "train.stylegan2", "--augment", "--data", portraits),
            *("--weights", options.weights, "--r1", "1", "--g-reg-every", "0"),
            *(*steps(options, 400), *batch),
        ],
        "codes": [
            *("-m", "train.destylize", "--data", portraits),
            *("--weights", options.weights, "--portrait-weights", out["tuned"]),
            *(*encoder, *size, *steps(options, 200), *batch),
        ],
        "pretrain": [
            *("-m", "train.dual_pretrain", "--weights", options.weights, *encoder),
            *("--data", f"{out['photos']}/photo", *adversarial),
            *(*steps(options, 1200), "--batch", "4"),
        ],
        "finetune": [
            *("-m", "train.dual_finetune", "--weights", out["pretrain"]),
            *("--exemplars", out["codes"], "--data", portraits, *adversarial),
            *("--id-lambda", str(options.id_lambda)),
            *("--reg-lambda", str(options.reg_lambda), "--lr", "0.001"),
            *("--augment", "--ada-length", "20000", *steps(options, 1500), *batch),
        ],
        "style": [
            *("-m", "train.refine_exstyle", "--weights", out["finetune"]),
            *("--data", portraits, "--encoder", encoder_of(options)),
            *("--lr-color", "0.1", *size, *steps(options, 100), *batch),
        ],
        "sampler": [
            *("-m", "train.dual_sampler", "--weights", out["style"]),
            *steps(options, 300),
        ],
    }[stage]
    return [*command, "--seed", str(options.seed), "--out", out[stage]]


def encoder_of(options: Options) -> str:
    """The encoder to z+ that goes with the style.

    Raises:
      UserError: none is given, and the generator names none.
    """
    named = weights.read_config(options.weights)["metadata"].get("z_plus_encoder")
    if not (options.encoder or named):
        raise UserError(
            f"--encoder is not given, and {options.weights} names none; train one with "
            "python -m train.encoder_heads --only z_plus"
        )
    return options.encoder or named


def measure_command(options: Options) -> list[str]:
    """The table: train.evaluate on the finished style."""
    out = options.out
    command = ["-m", "train.evaluate", "--weights", options.weights]
    command += ["--dual", str(out / "style"), "--dual-style", STYLE]
    command += ["--dual-weights", options.dual_weights]
    command += ["--dual-preserve-color", options.dual_preserve_color]
    command += ["--styles", STYLE, "--methods", options.methods, "--n", str(options.n)]
    command += ["--heads", options.heads] if options.heads else []
    return [*command, "--seed", str(options.seed), "--out", str(out / "evaluate")]


def sheets_command(options: Options) -> list[str]:
    """The paper's figures; the reference is the exemplar never seen before."""
    reference = weights.ASSETS / "examples" / f"{STYLE}.png"
    command = ["-m", "jaxstyle.dual_sheets", "--weights", str(options.out / "style")]
    command += ["--style", str(reference), "--no-align-style", "--psi", "1"]
    command += ["--refine", steps(options, 100)[1]]
    return [*command, "--out", str(options.out / "sheets")]


# Measures


def grey(pictures: np.ndarray) -> np.ndarray:
    """Pictures [n, h, w, 3] without color, of equal mean and spread."""
    x = np.mean(pictures, -1, keepdims=True)
    x = x - x.mean((1, 2), keepdims=True)
    x = 0.5 * x / np.maximum(x.std((1, 2), keepdims=True), 1e-6)
    return np.repeat(np.clip(x, -1, 1), 3, -1).astype(np.float32)


def chroma(pictures: np.ndarray, cells: int = 8) -> np.ndarray:
    """Color without brightness, averaged over a cells × cells grid: [n, c, c, 3]."""
    n, size = pictures.shape[:2]
    shape = (n, cells, size // cells, cells, size // cells, 3)
    coarse = np.reshape(pictures, shape).mean((2, 4))
    return coarse - coarse.mean(-1, keepdims=True)


def effects(drawn: dict[str, np.ndarray], judge) -> dict[str, dict[str, float]]:
    """How much weights change, by their name: shape and color.

    Args:
      drawn: pictures [n, h, w, 3] by name of `WEIGHTS`; `none` are the faces.
      judge: LPIPS parameters.
    """
    found = {}
    for name, pictures in drawn.items():
        a, b = (describe(judge, grey(x)) for x in (pictures, drawn["none"]))
        color = np.abs(chroma(pictures) - chroma(drawn["none"])).mean()
        shape = np.diagonal(np.asarray(all_distances(judge, a, b))).mean()
        found[name] = {"shape": float(shape), "color": float(color)}
    return found


def apart(pictures: np.ndarray, judge) -> float:
    """Mean LPIPS between two of some pictures [n, h, w, 3]."""
    own = describe(judge, pictures)
    return spread(np.asarray(all_distances(judge, own, own)))


def measure_weights(options: Options) -> str:
    """What exemplars and weights do, as Markdown."""
    folder = str(options.out / "style")
    model, params = weights.load(folder)
    generator, base = model.generator, params["generator"]
    judge = weights.load("lpips_alexnet")[1]["lpips"]
    count = len(model.exemplars.names)
    ids = np.linspace(0, count - 1, min(EXEMPLARS, count)).astype(int)
    wanted = dual_style.DualOptions(style_id=tuple(map(str, ids)))
    _, _, found = dual_style.load(folder, wanted, psi=1.0)
    z = pipeline.seed_codes(range(100, 100 + FACES), generator.z_dim)
    faces = pipeline.to_w_plus(generator, base, z, "z", psi=0.7)
    pairs = [(e, face) for e in found.values() for face in faces]
    first = next(iter(found.values()))
    drawn = {}
    for name, table in WEIGHTS.items():
        exemplar = first._replace(
            weights=style_weights(*table),
            code=jnp.concatenate([e.code for e, _ in pairs]),
        )
        codes = np.stack([face for _, face in pairs])
        drawn[name] = dual_style.pictures(exemplar, generator, base, codes, batch=6)
    rows = [["weights", "shape", "color"]]
    for name, values in effects(drawn, judge).items():
        rows.append([name, f"{values['shape']:.3f}", f"{values['color']:.3f}"])
    lines = markdown(rows)
    by_pair = drawn["both"].reshape(len(ids), FACES, *drawn["both"].shape[1:])
    exemplars = np.mean([apart(by_pair[:, i], judge) for i in range(FACES)])
    people = np.mean([apart(by_pair[i], judge) for i in range(len(ids))])
    plain = apart(drawn["none"][:FACES], judge)
    lines += (
        f"\nLPIPS between two pictures: one face under two exemplars {exemplars:.3f}, "
        f"two faces under one exemplar {people:.3f}, two faces {plain:.3f}.\n"
    )
    return lines


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.dual_heads`."""
    options = parse(Options, "train.dual_heads", __doc__, args)
    use_compilation_cache()
    if not options.scale > 0:
        raise UserError(f"--scale is {options.scale}; it must be above 0")
    encoder_of(options)
    options.out.mkdir(parents=True, exist_ok=True)
    draw_heads(options)
    for stage in STAGES:
        run(options, stage, command_of(options, stage))
    run(options, "evaluate", measure_command(options))
    run(options, "sheets", sheets_command(options))
    text = measure_weights(options)
    images.write_bytes(options.out / "weights.md", text.encode())
    print((options.out / "evaluate" / "table.md").read_text())
    print(text)


def run(options: Options, name: str, command: list[str]) -> None:
    """A stage, unless it is done."""
    print(f"{name}: python {shlex.join(command)}", flush=True)
    commands.once(options.out / f"{name}.json", command)


if __name__ == "__main__":
    main()
