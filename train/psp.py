"""pSp: a network that turns pictures, sketches or label maps into codes of a generator.

Richardson et al., "Encoding in Style: a StyleGAN Encoder for Image-to-Image
Translation", arXiv 2008.00951. An encoder E gives every row of w+ as an offset from
the average code; the generator G stays as it is (equation 1: pSp(x) = G(E(x) + w̄)):

    L = λ₁ ‖y - ŷ‖² + λ₂ LPIPS(y, ŷ) + λ₃ ‖E(x)‖ + λ₄ (1 - ⟨R(y), R(ŷ)⟩)

(equations 2 to 6), R the identity network; for things that are no faces, the similarity
network. Ranger, no schedule, batch 8.

    python -m train.psp --data ffhq --weights weights/ffhq
    python -m train.psp --task celebs_sketch_to_face --data faces --source sketches \
        --weights weights/ffhq --val-data faces-test --val-source sketches-test
    python -m train.psp --data generated --space z_plus --weights weights/other

| --task                  | input                       | weights                 |
| ----------------------- | --------------------------- | ----------------------- |
| ffhq_encode             | the picture                 | id 0.1, l2 1, lpips 0.8 |
| ffhq_frontalize         | it or another, flipped      | id 1, norm 0.005, and   |
|                         | apart                       | l2, lpips 0.001, 0.08;  |
|                         |                             | cropped 0.01, 0.8       |
| celebs_sketch_to_face   | drawing, 1 channel          | id 0, norm 0.005        |
| celebs_seg_to_face      | label map, 19 channels      | id 0, norm 0.005        |
| celebs_super_resolution | it, made smaller by 1 .. 32 | norm 0.005              |
| toonify                 | the picture; G draws toons  | id 1, norm 0.025        |
| things                  | the picture, no faces       | id 0, similarity 0.5    |

(What is not named is as in inversion, the first.)

Published: 300,000 iterations on one P40 for inversion; toonify is best near 6,000. The
first five updates are unscaled momentum, so the losses stand still there. OUT/samples
shows input, picture wanted and picture made.

`--space w` learns one code for all rows; `z_plus` sends each row through the frozen
mapping network: the encoder that DualStyleGAN needs. `--data generated` needs no data
set: the generator draws, and `--code-lambda` adds the squared error of the known code.
`--restyle 5` trains ReStyle's pSp (arXiv 2104.02699), for things that are no faces with
`--task things --encoder-blocks resnet`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax import Array

from jaxstyle import weights
from jaxstyle.encoders import (
    BackboneWEncoder,
    BackboneWPlusEncoder,
    GradualStyleEncoder,
)
from jaxstyle.errors import UserError, cli
from train import encoding, loop, sharding
from train.cli import RunOptions, Shared, parse, start, with_out
from train.encoding import EncodingOptions, Passed, Setup
from train.state import TrainState, create_state

Kind = Literal["same", "apart", "sketch", "labels", "low_resolution"]


class Task(NamedTuple):
    """A published task: how inputs are made, and the weights of the losses."""

    inputs: Kind
    lambdas: dict[str, float]


_INVERSION = {"lpips": 0.8, "l2": 1.0, "id": 0.1}
TASKS = {
    "ffhq_encode": Task("same", _INVERSION),
    "ffhq_frontalize": Task(
        "apart",
        {"lpips": 0.08, "l2": 0.001, "id": 1.0, "w_norm": 0.005}
        | {"lpips_crop": 0.8, "l2_crop": 0.01},
    ),
    "celebs_sketch_to_face": Task("sketch", _INVERSION | {"id": 0, "w_norm": 0.005}),
    "celebs_seg_to_face": Task("labels", _INVERSION | {"id": 0, "w_norm": 0.005}),
    "celebs_super_resolution": Task("low_resolution", _INVERSION | {"w_norm": 0.005}),
    "toonify": Task("same", _INVERSION | {"id": 1.0, "w_norm": 0.025}),
    "things": Task("same", _INVERSION | {"id": 0, "similarity": 0.5}),
}
ENCODERS = {
    "gradual": GradualStyleEncoder,
    "w": BackboneWEncoder,
    "w_plus": BackboneWPlusEncoder,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of train.psp; the defaults are the published ones."""

    common: Annotated[EncodingOptions, tyro.conf.OmitArgPrefixes]
    task: Literal[tuple(TASKS)] = "ffhq_encode"
    """Sets the inputs and the weights below that are not given."""
    inputs: Kind | None = None
    """How inputs are made: the picture itself; pairs flipped apart; drawings; label
    maps; pictures made smaller."""
    encoder: Literal["gradual", "w", "w_plus"] = "gradual"
    """pSp's pyramid, or its baselines: one code, or all rows from one layer."""
    space: Literal["w_plus", "w", "z_plus"] = "w_plus"
    """What the codes are; w needs --encoder w."""
    start_from_w_avg: bool = True
    """Codes are offsets from the average one (never in z_plus)."""
    classes: int = 19
    """Labels of a label map."""
    nearest_labels: bool = False
    """Resize label maps without mixing their numbers (published: mixed)."""
    factors: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Factors of super-resolution, drawn for each picture."""
    lpips_lambda: float | None = None
    """Weight of LPIPS."""
    l2_lambda: float | None = None
    """Weight of the mean squared difference."""
    id_lambda: float | None = None
    """Weight of the identity loss."""
    w_norm_lambda: float | None = None
    """Weight of the distance from the average code."""
    lpips_crop_lambda: float | None = None
    """Weight of LPIPS on the face region, on top."""
    l2_crop_lambda: float | None = None
    """Weight of the squared difference there."""
    similarity_lambda: float | None = None
    """Weight of the similarity loss, for things that are no faces."""
    run: Shared = RunOptions(
        steps=500_000, batch=8, log_every=50, sample_every=1000, save_every=5000
    )


def lambdas_of(options: Options) -> dict[str, float]:
    """Weights of the losses by name: the task's, and those given."""
    values = dict(TASKS[options.task].lambdas)
    for field in dataclasses.fields(options):
        name, given = field.name.removesuffix("_lambda"), getattr(options, field.name)
        if field.name.endswith("_lambda") and given is not None:
            values[name] = given
    return values | {"code": options.common.code_lambda}


def inputs_of(options: Options) -> Kind:
    """How inputs are made."""
    return options.inputs or TASKS[options.task].inputs


def w_norm(codes: Array, average: Array | float = 0.0) -> Array:
    """Distance [batch] of codes [batch, num_ws, w_dim] from the average (eq. 4)."""
    return encoding.length(codes - average, (1, 2))


def losses(
    setup: Setup, params: Any, frozen: Any, batch: Mapping[str, Array], passed: Passed
) -> dict[str, Array]:
    """All losses with a weight, one value a sample."""
    terms = encoding.picture_losses(
        setup, frozen, passed.image, batch["image"], batch.get("input")
    )
    if setup.lambdas.get("w_norm"):
        average = 0.0
        if setup.encoder.start_from_w_avg:
            average = params["encoder"]["w_avg"]
        terms["w_norm"] = w_norm(passed.codes, average)
    return terms | encoding.code_loss(setup, passed.codes, batch)


def loss_fn(
    trained: Any, params: Any, frozen: Any, batch: Any, before: Any, setup: Setup, noise
):
    """The loss [] of one pass, its terms and what it passed.

    Args:
      trained: parameters that learn, by network.
      params: all of them.
      frozen: the judges'.
      batch: `image`, and `input`, `codes` where there are.
      before: the pass before, in ReStyle.
      setup: modules and weights.
      noise: arguments of the generator.
    """
    params = params | trained
    x = encoding.inputs(batch)
    passed = encoding.run(setup, params, x, before=before, train=True, **noise)
    terms = losses(setup, params, frozen, batch, passed)
    means = {name: jnp.mean(value) for name, value in terms.items()}
    return encoding.total(setup.lambdas, means), (means, passed)


def mixing_of(options: Options) -> float:
    """Share of generated codes that mix two; an encoder of one code cannot tell."""
    return 0.0 if options.encoder == "w" else encoding.MIXING


def make_step(options: Options, setup: Setup, optimizers: Mapping[str, Any]):
    """The step of the scheme."""

    def loss(trained, params, frozen, batch, before, noise):
        return loss_fn(trained, params, frozen, batch, before, setup, noise)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict]:
        params = state.params
        if options.common.data == encoding.GENERATED:
            key = jax.random.fold_in(state.key, 1)
            batch = encoding.generate(
                setup, params["generator"], key, options.run.batch, mixing_of(options)
            )
        arguments = (setup, options.common, params, list(optimizers))
        grads, terms, stats = encoding.gradients(
            loss, *arguments, frozen, batch, state.key
        )
        state = encoding.update(state, optimizers, grads, stats)
        return state, {"loss": encoding.total(setup.lambdas, terms)} | terms

    return step


def resolve(options: Options) -> Options:
    """Defaults that depend on other options.

    Raises:
      UserError: values that cannot be.
    """
    common = options.common
    if options.space == "w" and options.encoder != "w":
        raise UserError("--space is w; that needs --encoder w, which gives one code")
    if options.space == "z_plus" and options.encoder == "w":
        raise UserError("--space is z_plus; that needs --encoder gradual or w_plus")
    if common.restyle and options.encoder != "gradual":
        raise UserError("--restyle refines rows; it needs --encoder gradual")
    if common.restyle and channels_of(options) != 3:
        raise UserError(
            f"--restyle compares its inputs with pictures; {inputs_of(options)} have "
            f"{channels_of(options)} channels: leave it out"
        )
    if common.encoder_head_channels and options.encoder != "gradual":
        raise UserError(
            f"--encoder-head-channels is {common.encoder_head_channels}, but --encoder "
            f"{options.encoder} has no head for each row: leave it out"
        )
    encoding.check(common)
    faces = {"id", "lpips_crop", "l2_crop"} & {
        k for k, v in lambdas_of(options).items() if v
    }
    if common.encoder_rows and (inputs_of(options) != "same" or faces):
        raise UserError(
            "--encoder-rows is for pictures that are their own inputs and show no "
            "faces: use --task things"
        )
    if common.data == encoding.GENERATED and inputs_of(options) != "same":
        raise UserError(
            f"--data is {encoding.GENERATED}, but the inputs are {inputs_of(options)}; "
            "such pictures are their own inputs: use --inputs same"
        )
    if common.restyle and not options.start_from_w_avg:
        raise UserError(
            "--restyle begins at the average code; leave --no-start-from-w-avg out"
        )
    if not any(lambdas_of(options).values()):
        raise UserError("all weights of the losses are 0: nothing to learn from")
    name = f"psp-{options.task}-{PurePath(common.data).stem}"
    return with_out(options, name)


def channels_of(options: Options) -> int:
    """Channels of the encoder's inputs."""
    return {"sketch": 1, "labels": options.classes}.get(inputs_of(options), 3)


def make_setup(options: Options) -> tuple[Setup, dict[str, Any], dict[str, Any]]:
    """Modules, first parameters, and the frozen judges'."""
    lambdas, common = lambdas_of(options), options.common
    start_from = options.start_from_w_avg and options.space != "z_plus"
    make = functools.partial(ENCODERS[options.encoder], start_from_w_avg=start_from)
    networks, params = encoding.make_networks(
        common, make, channels_of(options), options.run
    )
    judges = encoding.load_judges(common, lambdas, options.run.dtype)
    setup = Setup(
        networks["encoder"],
        networks["generator"],
        {role: judge.module for role, judge in judges.items()},
        lambdas,
        "z_plus" if options.space == "z_plus" else "w_plus",
    )
    return setup, params, {role: judge.params for role, judge in judges.items()}


def train(options: Options, mesh: Any) -> TrainState:
    """The whole run; what `main` calls after reading the command line."""
    run, common, kind = options.run, options.common, inputs_of(options)
    sharding.check_batch(run.batch, mesh)
    metadata = {"scheme": "psp", "task": options.task, "space": options.space}
    metadata["inputs"] = kind
    setup, params, frozen = make_setup(options)
    optimizers = encoding.make_optimizers(common)
    make = functools.partial(
        encoding.make_transform,
        kind,
        size=setup.encoder.size,
        rows=setup.encoder.rows,
        classes=options.classes,
        nearest=options.nearest_labels,
        factors=options.factors,
    )
    identity = {
        "weights": weights.digest(params),
        "judges": weights.digest(frozen) if frozen else "",
    }
    batches, frozen["preview"], digest = encoding.training_data(
        common, kind, make, run, mesh, setup, params["generator"], mixing_of(options)
    )
    identity |= {"data": digest} if digest else {}

    def validation_losses(params, frozen, batch, _):
        x = encoding.inputs(batch)
        passed = encoding.evaluate(setup, params, x, common.restyle)
        return losses(setup, params, frozen, batch, passed)

    state = create_state(params, optimizers, key=jax.random.key(run.seed))
    return loop.fit(
        options,
        encoding.begin(common, state, run.steps),
        frozen,
        [(1, make_step(options, setup, optimizers))],
        batches,
        networks={"encoder": setup.encoder, "generator": setup.generator},
        mesh=mesh,
        metadata=metadata,
        identity=identity,
        sample=encoding.make_sample(setup, common.restyle),
        validate=encoding.validation(
            common, kind, make, run, mesh, setup, validation_losses
        ),
    )


@cli
def main(args: list[str] | None = None) -> None:
    """`python -m train.psp`."""
    options = resolve(parse(Options, __doc__, args))
    train(options, start(options.run))


if __name__ == "__main__":
    main()
