"""How near a generator's pictures come to those wanted: LPIPS, MSE, identity.

As published for pSp: pictures in [-1, 1], brought to 256 px. Identity is the cosine of
two embeddings (pSp's came from CurricularFace; ours is the judge that is named).
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxstyle.features import judges

SIZE = 256
NAMES = ("lpips", "mse", "identity")


def load_judges(perceptual: str = "", identity: str = "") -> dict[str, judges.Judge]:
    """The judges by role, each printed; see `judges.choose`."""
    return {
        "perceptual": judges.choose("perceptual", perceptual),
        "identity": judges.choose("identity", identity),
    }


@functools.partial(jax.jit, static_argnames=("perceptual", "identity"))
def _compare(
    params: Any, made: Array, wanted: Array, perceptual: nn.Module, identity: nn.Module
) -> dict[str, Array]:
    n, _, _, channels = made.shape
    made = jax.image.resize(made, (n, SIZE, SIZE, channels), "linear")
    a, b = (
        identity.apply({"params": params["identity"]}, x, method="embed")
        for x in (made, wanted)
    )
    return {
        "lpips": perceptual.apply({"params": params["perceptual"]}, made, wanted),
        "mse": jnp.mean(jnp.square(made - wanted), (1, 2, 3)),
        "identity": jnp.sum(a * b, -1),
    }


def compare(
    chosen: Mapping[str, judges.Judge], made: Array, wanted: Array
) -> dict[str, np.ndarray]:
    """Metrics [n] by name.

    Args:
      chosen: of `load_judges`.
      made: [n, h, h, 3] of any size; clipped to what a file can hold.
      wanted: [n, SIZE, SIZE, 3].
    """
    values = _compare(
        {role: judge.params for role, judge in chosen.items()},
        jnp.clip(made, -1, 1),
        jnp.asarray(wanted),
        perceptual=chosen["perceptual"].module,
        identity=chosen["identity"].module,
    )
    return jax.device_get(values)


def summary(values: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each metric over pictures."""
    columns = {name: np.array([v[name] for v in values]) for name in NAMES}
    return {
        name: {"mean": float(v.mean()), "std": float(v.std())}
        for name, v in columns.items()
    }


def table(means: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Lines of text: one set of pictures a line, mean ± deviation of each metric."""
    width = max(len(label) for label in means)
    lines = [" ".join([" " * width, *(f"{name:>17}" for name in NAMES)])]
    for label, of in means.items():
        cells = (f"{of[k]['mean']:8.4f} ± {of[k]['std']:6.4f}" for k in NAMES)
        lines.append(" ".join([f"{label:<{width}}", *cells]))
    return "\n".join(lines)


def as_json(means: Mapping[str, Any], pictures: Mapping[str, Any]) -> bytes:
    """What is written beside the pictures."""
    text = json.dumps({"summary": means, "pictures": pictures}, indent=1)
    return text.encode() + b"\n"
