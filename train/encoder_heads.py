"""Encoders of the small model in the package: trained on drawn heads, and measured.

    python -m train.encoder_heads
    python -m train.encoder_heads --only e4e,z_plus
    python -m train.encoder_heads --only sketch,labels --task-steps 4000

Each is trained by a command that is printed, in a folder of OUT, and goes on where it
stopped; finished ones are not trained again. Of the first two OUT/NAME/model is what
ships: the encoder alone, in half precision. Then all are measured on --n other heads:

- `e4e` and `z_plus`, the two that ship with the model, join the inverters of
  `train.evaluate`: beside searches, and with a search of 50 steps from their codes;
- pSp's six published tasks, on pictures that `train.heads` draws: inversion, pencil
  drawings to heads, label maps to heads, super-resolution by 4 and 8, turned heads to
  frontal ones, and cartoons (the generator then is one finetuned on cel pictures).

LPIPS is of pictures at 256 px to the true one, beside that of the average head, drawn
of the average code: what a network would reach that does not look at its input. Turned
heads and cartoons are also compared with leaving the picture as it is. OUT holds
table.md, table.json and a sheet for each task.
"""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxstyle import images, pipeline, weights
from jaxstyle.align import AlignOptions
from jaxstyle.cache import use_compilation_cache
from jaxstyle.encoding import (
    CROP_SIZE,
    Reading,
    encode_pictures,
    load_encoder,
    read_items,
)
from jaxstyle.errors import UserError, cli
from jaxstyle.options import parse
from train import commands
from train.heads_render import LABELS
from train.measures import all_distances, describe, markdown, own_nearer

# About 2.3 MB each in half precision, most of it in the heads of the rows.
SMALL = (
    *("--encoder-size", "64", "--encoder-units", "1", "1", "1", "1"),
    *("--encoder-channels", "32", "48", "64", "96", "--encoder-head-channels", "40"),
    *("--lr", "0.001"),
)
STYLES = ("photo", "pencil", "cel")  # paint is for the table of train.evaluate
SIZE = 64
YAW = 30
FACTORS = (4, 8)


class Task(NamedTuple):
    """One of pSp's tasks on drawn heads.

    Attributes:
      task: its published name.
      folder: of the inputs that are measured, in OUT.
      flags: of the training, beside those that all have.
      factors: of super-resolution.
      wanted: folder of the pictures wanted.
    """

    task: str
    folder: str = "held/photo"
    flags: tuple[str, ...] = ()
    factors: tuple[int, ...] = ()
    wanted: str = "held/photo"


TASKS = {
    "inversion": Task("ffhq_encode"),
    "sketch": Task("celebs_sketch_to_face", "held/pencil"),
    "labels": Task(
        "celebs_seg_to_face",
        "held/labels",
        ("--classes", str(len(LABELS)), "--nearest-labels"),
    ),
    "super_resolution": Task(
        "celebs_super_resolution",
        flags=("--factors", *map(str, (1, 2, *FACTORS))),
        factors=FACTORS,
    ),
    "frontal": Task("ffhq_frontalize", "turned/photo", wanted="ahead/photo"),
    "toonify": Task("toonify", wanted="held/cel"),
}
# Each with the iterations of the one that ships.
INVERTERS = {"e4e": 8000, "z_plus": 12_000}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of train.encoder_heads."""

    weights: str = weights.DEFAULT
    """The generator."""
    only: str = ",".join((*INVERTERS, *TASKS))
    """What to train, with commas."""
    heads: int = 6000
    """Heads to draw and train on."""
    n: int = 50
    """Other heads, to measure on."""
    steps: int = 0
    """Iterations of e4e and z_plus; 0: as those that ship, 8,000 and 12,000."""
    task_steps: int = 2000
    """Iterations of each task."""
    toon_steps: int = 300
    """Iterations of the generator of cartoons."""
    search_steps: int = 300
    """Steps of the longest searches."""
    batch: int = 8
    """Pictures an iteration."""
    seed: int = 0
    """Seed of the trainings."""
    workers: int = 2
    """Processes that draw heads."""
    out: Path = Path("runs/encoder_heads")
    """Folder of everything."""


# Data and trainings


def draw_heads(options: Options) -> None:
    """The heads in OUT/data, and others, held out.

    Of these OUT/large is for the inverters, the others for the tasks, in their own
    pose, turned and looking ahead: small as those of the training, as the lines of a
    drawing are some pixels wide at any size.
    """
    workers = ("--workers", str(options.workers))
    styles, small = ("--styles", ",".join(STYLES)), ("--size", str(SIZE))
    held = ("--n", str(options.n), "--seed", "1")
    large = ("--size", str(CROP_SIZE), "--styles", ",".join((*STYLES, "paint")))
    for name, flags in (
        ("data", ("--n", str(options.heads), "--seed", "5", *small, *styles)),
        ("held", (*held, *small, *styles)),
        ("turned", (*held, *small, "--yaw", str(YAW))),
        ("ahead", (*held, *small, "--frontal")),
        ("large", (*held, *large)),
    ):
        if not (folder := options.out / name).exists():
            commands.run(["-m", "train.heads", str(folder), *flags, *workers])


def run_of(options: Options, name: str) -> str:
    """Folder of a training."""
    return str(options.out / name)


def command_of(options: Options, name: str) -> list[str]:
    """The training of an encoder, or of the generator `toons`."""
    data = options.out / "data"
    steps = options.task_steps
    if name in INVERTERS:
        steps = options.steps or INVERTERS[name]
    common = ["--batch", str(options.batch), "--seed", str(options.seed)]
    common += ["--out", run_of(options, name), "--save-every", "500"]
    if name == "toons":
        command = ["-m", "train.stylegan2", "--data", str(data / "cel")]
        command += ["--r1", "1", "--path-regularize", "0", "--g-reg-every", "0"]
        command += ["--steps", str(options.toon_steps), "--weights", options.weights]
        return [*command, *common]
    common += ["--steps", str(steps), *SMALL]
    if name in TASKS:
        task = TASKS[name]
        toons = task.wanted == "held/cel"
        source = run_of(options, "toons") if toons else options.weights
        command = ["-m", "train.psp", "--task", task.task, "--weights", source]
        command += ["--data", str(data / "photo")]
        if (kind := Path(task.folder).name) != "photo":
            command += ["--source", str(data / kind)]
        return [*command, *task.flags, *common]
    common += ["--weights", options.weights, "--data", str(data / "photo")]
    if name == "z_plus":
        return ["-m", "train.psp", "--space", "z_plus", *common]
    # Rows join after a tenth of the steps, and over the next two tenths.
    rows = weights.load(options.weights)[0].generator.num_ws
    stages = ["--progressive-start", str(steps // 10)]
    stages += ["--progressive-every", str(max(1, steps // (5 * rows)))]
    return ["-m", "train.e4e", *stages, *common]


def train(options: Options, name: str) -> None:
    """Train an encoder, unless that is done."""
    if name in TASKS and TASKS[name].wanted == "held/cel":
        train(options, "toons")
    command = command_of(options, name)
    print(f"{name}: python {shlex.join(command)}", flush=True)
    commands.once(options.out / name / "cost.json", command)
    if name in INVERTERS:
        run = run_of(options, name)
        model, params = weights.load(run)
        weights.save(
            options.out / name / "model",
            {"encoder": model["encoder"]},
            {"encoder": params["encoder"]},
            metadata=weights.read_config(run)["metadata"],
            dtype="float16",
            overwrite=True,
        )


# Measures


def pictures_of(folder: Path, n: int, size: int) -> np.ndarray:
    """The first `n` pictures of a folder, [n, size, size, 3]."""
    files = [folder / f"{i:05d}.png" for i in range(n)]
    return np.stack([images.to_array(images.open_image(f), size) for f in files])


def read_inputs(options: Options, task: Task, encoder: Any) -> list[Any]:
    """The held-out heads as the encoder of a task takes them, head by head."""
    folder = epath.Path(options.out / task.folder)
    paths = [folder / f"{i:05d}.png" for i in range(options.n)]
    reading = Reading(
        encoder.inputs,
        encoder.module.size,
        classes=encoder.module.in_channels,
        nearest="--nearest-labels" in task.flags,
        factors=task.factors,
        align=AlignOptions(align=False),
    )
    return list(read_items(paths, reading))


def distances(judge: Any, made: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """LPIPS [n, n] of each picture made to each one wanted, at 256 px."""
    return np.asarray(
        all_distances(judge, describe(judge, made), describe(judge, wanted))
    )


def measure(options: Options, name: str, judge: Any) -> list[dict]:
    """Records of a task, one for each factor, and its sheet OUT/NAME.jpg."""
    task, run = TASKS[name], run_of(options, name)
    generator, params = pipeline.load_generator(run)
    encoder = load_encoder(run, generator)
    items = read_inputs(options, task, encoder)
    size = generator.size
    wanted = pictures_of(options.out / task.wanted, options.n, size)
    average = np.broadcast_to(params["w_avg"], (1, generator.num_ws, generator.w_dim))
    average = np.clip(pipeline.pictures(generator, params, average), -1, 1)
    average = np.repeat(average, options.n, 0)
    plain = float(np.diagonal(distances(judge, average, wanted)).mean())
    records, columns = [], {}
    each = max(1, len(task.factors))
    for i, factor in enumerate(task.factors or (0,)):
        mine = items[i::each]
        x = np.stack([item.x for item in mine])
        codes = encode_pictures(encoder, generator, params, x, batch=10)
        made = np.clip(pipeline.pictures(generator, params, codes), -1, 1)
        table = distances(judge, made, wanted)
        found = float(np.diagonal(table).mean())
        record = {
            "task": f"{name}, {factor} times" if factor else name,
            "lpips": found,
            "average": plain,
            "ratio": found / plain,
            "identity": own_nearer(table),
        }
        if encoder.inputs == "photo":
            left = np.asarray(pipeline.resize(x, size))
            record["input"] = float(np.diagonal(distances(judge, left, wanted)).mean())
        records.append(record)
        shown = [next(reversed(item.shown.values())) for item in mine]
        columns |= {f"input {factor or ''}".strip(): shown}
        columns |= {f"made {factor or ''}".strip(): made}
    columns["wanted"] = wanted
    cells = [
        np.asarray(pipeline.resize(np.asarray(column[i])[None], size))[0]
        for i in range(min(6, options.n))
        for column in columns.values()
    ]
    sheet = images.grid(cells, len(columns), column_labels=list(columns))
    images.save_image(options.out / f"{name}.jpg", sheet)
    return records


def table(records: Sequence[dict]) -> str:
    """Markdown of the tasks."""
    rows = [["task", "LPIPS", "average head", "ratio", "own nearer", "input as it is"]]
    for r in records:
        cells = [f"{r['lpips']:.3f}", f"{r['average']:.3f}", f"{r['ratio']:.2f}"]
        left = f"{r['input']:.3f}" if "input" in r else ""
        rows.append([r["task"], *cells, f"{r['identity']:.0%}", left])
    return markdown(rows)


def compare_inverters(options: Options, names: Sequence[str]) -> str:
    """The table of `train.evaluate --inverters`, which also stylises their codes."""
    long, out = options.search_steps, options.out / "evaluate"
    ways = [f"w_plus-{long}", f"w-{long}", "w_plus-50", "mean"]
    for name in names:
        ways += [run_of(options, name), f"{run_of(options, name)}+50"]
    command = ["-m", "train.evaluate", "--weights", options.weights]
    command += ["--heads", str(options.out / "large")]
    command += ["--n", str(options.n), "--steps", str(long), "--methods"]
    command += ["default-untuned", "--styles", "cel,pencil,paint"]
    command += ["--inverters", ",".join(ways)]
    commands.run([*command, "--seed", str(options.seed), "--out", str(out)])
    return (out / "table.md").read_text()


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.encoder_heads`."""
    options = parse(Options, "train.encoder_heads", __doc__, args)
    use_compilation_cache()
    known = (*INVERTERS, *TASKS)
    names = [n for n in options.only.split(",") if n]
    if not names or set(names) - set(known):
        raise UserError(
            f"--only is {options.only!r}; it must be of {', '.join(known)}, with commas"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    draw_heads(options)
    for name in names:
        train(options, name)
    judge = weights.load("lpips_alexnet")[1]["lpips"]
    text = ""
    records = [r for n in names if n in TASKS for r in measure(options, n, judge)]
    if records:
        text += table(records)
        file = options.out / "table.json"
        images.write_bytes(file, json.dumps(records, indent=1).encode())
    if inverters := [n for n in names if n in INVERTERS]:
        text += "\n" + compare_inverters(options, inverters)
    images.write_bytes(options.out / "table.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
