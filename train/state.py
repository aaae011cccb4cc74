"""What a training run carries from step to step."""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array


@flax.struct.dataclass
class TrainState:
    """State of one run; plain data, saved whole.

    Attributes:
      step: finished iterations, int32 []; `fit` owns it.
      key: random key. A step sees a key of its own, folded by `fit` from the run's
        key, the iteration and the step's place in the schedule.
      params: parameters by network; those without an optimiser are carried along.
      opt_state: optimiser state by network.
      ema: averaged parameters by network.
      extra: whatever else a scheme carries (the path-length mean, a latent pool).
    """

    step: Array
    key: Array
    params: dict[str, Any]
    opt_state: dict[str, Any]
    ema: dict[str, Any]
    extra: dict[str, Any]


def create_state(
    params: Mapping[str, Any],
    optimizers: Mapping[str, optax.GradientTransformation],
    *,
    key: Array,
    ema: Iterable[str] | Mapping[str, Any] = (),
    extra: Mapping[str, Any] | None = None,
) -> TrainState:
    """A fresh state.

    Args:
      params: parameters by network.
      optimizers: one for each network that trains.
      key: the run's random key.
      ema: names of networks to average, starting at their parameters; or the averages
        themselves by name.
      extra: further arrays.
    """
    averages = dict(ema) if isinstance(ema, Mapping) else {n: params[n] for n in ema}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=dict(params),
        opt_state={n: tx.init(params[n]) for n, tx in optimizers.items()},
        ema=averages,
        extra=dict(extra or {}),
    )


def update_ema(average: Any, params: Any, decay: float | Array) -> Any:
    """`decay * average + (1 - decay) * params`, exact where both are equal."""
    return jax.tree.map(lambda e, p: e + (p - e) * (1 - decay), average, params)
