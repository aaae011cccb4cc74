"""The generator itself moved until it draws one photo: pivotal tuning.

Roich, Mokady, Bermano and Cohen-Or, "Pivotal Tuning for Latent-based Editing of Real
Images", arXiv 2106.05744: the photo's code w_p is the pivot and stays, the weights of
the synthesis network move, theta* = argmin LPIPS(x, G(w_p; theta)) + L2 (equation 2,
both of weight 1, without the locality regularisation, as published). Codes near w_p
then draw the same person in other poses and ages, and a style that was learned on the
untuned generator theta is the same change of weights on theta*.

A face that no code of the generator draws exactly, least of all a small one's, is so
much more alike; it costs a short training for every photo.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from tqdm import tqdm

from jaxstyle import weights
from jaxstyle.errors import UserError
from jaxstyle.invert import for_lpips, photo_distance
from jaxstyle.pipeline import as_read
from jaxstyle.stylegan2 import Generator, Params


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """Options of pivotal tuning."""

    tune: int | None = None
    """Steps in which the generator is moved towards the photo, so that the result looks
    more like the person (pivotal tuning; published: 350). 0: the generator stays. None:
    what the model recommends, else 0."""
    tune_lr: float | None = None
    """Adam's learning rate of these steps. None: what the model recommends, else the
    published 3e-4."""


PUBLISHED_LR = 3e-4


def resolved(options: TuneOptions, name: str) -> TuneOptions:
    """Options without None: as given, else as a model recommends (`metadata.invert`).

    Args:
      options: what was asked for.
      name: of the model's folder.

    Raises:
      UserError: negative steps, a rate that is not positive, or one without steps.
    """
    advice = weights.read_config(name)["metadata"].get("invert", {})
    steps = advice.get("tune", 0) if options.tune is None else options.tune
    rate = options.tune_lr
    if rate is None:
        rate = advice.get("tune_lr", PUBLISHED_LR)
    if steps < 0:
        raise UserError(f"--tune is {steps}; it must be at least 0")
    if not rate > 0:
        raise UserError(f"--tune-lr is {rate}; it must be above 0")
    if not steps and options.tune_lr is not None:
        raise UserError(
            f"--tune-lr is {rate}, but nothing is tuned; add --tune 350 or leave it out"
        )
    return TuneOptions(steps, rate)


@partial(jax.jit, static_argnames="judge")
def _features(params: Params, pictures: Array, *, judge: nn.Module) -> Any:
    return judge.apply({"params": params}, for_lpips(pictures), method="features")


@partial(
    jax.jit,
    static_argnames=("generator", "judge"),
    donate_argnames=("synthesis", "moments"),
)
def _step(synthesis, moments, frozen, *, generator, judge):
    """One step of Adam on the weights of the synthesis network."""

    def loss(synthesis):
        params = frozen["rest"] | {"synthesis": synthesis}
        image, _ = generator.apply({"params": params}, frozen["code"], space="w_plus")
        return jnp.sum(photo_distance(frozen, image, judge))

    value, gradient = jax.value_and_grad(loss)(synthesis)
    moves, moments = optax.scale_by_adam().update(gradient, moments)
    moves = jax.tree.map(lambda m: -frozen["rate"] * m, moves)
    return optax.apply_updates(synthesis, moves), moments, value


def tune(
    generator: Generator,
    params: Params,
    photos: Array,
    codes: Array,
    options: TuneOptions,
    *,
    lpips: str = "lpips_alexnet",
    progress: bool = True,
) -> list[Params]:
    """The generator's parameters for each photo, moved until its code draws it.

    Args:
      generator: the architecture.
      params: its parameters; they stay as they are.
      photos: aligned, [n, h, h, 3] in [-1, 1]; resized to the generator's size.
      codes: the pivots, w_plus [n, num_ws, w_dim].
      options: steps and rate, `resolved`.
      lpips: LPIPS weights; see `for_lpips`.
      progress: show a bar with the loss.

    Returns:
      n parameters with another `synthesis` each; mapping and noise planes are shared.
      Without steps `params` themselves.
    """
    if not options.tune:
        return [params] * len(codes)
    judge, judge_params = weights.load(lpips)
    rest = {name: x for name, x in params.items() if name != "synthesis"}
    found = []
    bar = tqdm(total=len(codes) * options.tune, desc="tune", disable=not progress)
    with bar:
        for photo, code in zip(photos, codes, strict=True):
            target = as_read(photo[None], generator.size)
            frozen = {
                "rest": rest,
                "code": jnp.asarray(code, jnp.float32)[None],
                "targets": target,
                "search": {"mse": 1.0},
                "features": _features(judge_params["lpips"], target, judge=judge.lpips),
                "lpips": judge_params["lpips"],
                "rate": jnp.float32(options.tune_lr),
            }
            # A copy: the steps give away what they are given.
            synthesis = jax.tree.map(jnp.copy, params["synthesis"])
            moments = optax.scale_by_adam().init(synthesis)
            for step in range(options.tune):
                synthesis, moments, loss = _step(
                    synthesis, moments, frozen, generator=generator, judge=judge.lpips
                )
                if step % 10 == 9 or step + 1 == options.tune:
                    # Reading the loss waits for the device: not at every step.
                    bar.set_postfix(loss=f"{float(loss):.4f}")
                bar.update()
            found.append(rest | {"synthesis": synthesis})
    return found


@jax.jit
def moved(params: Params, base: Params, tuned: Params) -> Params:
    """Parameters of a finetuned generator, moved as its base was.

    Args:
      params: finetuned from `base`.
      base: before any tuning.
      tuned: `base` tuned to a photo.

    Returns:
      `params` with the synthesis network theta + theta* - theta_0.
    """
    synthesis = jax.tree.map(
        lambda x, b, t: x + t - b,
        *(p["synthesis"] for p in (params, base, tuned)),
    )
    return params | {"synthesis": synthesis}
