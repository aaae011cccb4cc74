"""Optimisers as the published schemes use them."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax


def adam(
    learning_rate: float,
    betas: tuple[float, float] = (0.0, 0.99),
    *,
    eps: float = 1e-8,
    lazy_every: int = 0,
) -> optax.GradientTransformation:
    """Adam; with lazy regularisation as in StyleGAN2 (arXiv 1912.04958, appendix B).

    A regulariser that runs every k iterations adds a second update to those, so the
    rate and the logarithms of both betas are scaled by c = k / (k + 1).

    Args:
      learning_rate: before the scaling.
      betas: before the scaling.
      eps: added to the root of the second moment.
      lazy_every: k; 0 leaves everything as given.
    """
    c = lazy_every / (lazy_every + 1) if lazy_every else 1.0
    return optax.adam(learning_rate * c, b1=betas[0] ** c, b2=betas[1] ** c, eps=eps)


def path_name(path: Sequence[Any]) -> str:
    """A pytree path as text: `synthesis/conv_4/weight`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def frozen(
    tx: optax.GradientTransformation, patterns: Sequence[str]
) -> optax.GradientTransformation:
    """`tx` for all parameters but those whose path matches one of the patterns.

    Args:
      tx: optimiser of the rest; it keeps no moments for the frozen ones.
      patterns: regular expressions, matched from the start of `a/b/weight`.
    """

    def labels(params: Any) -> Any:
        def label(path: Sequence[Any], _: Any) -> str:
            name = path_name(path)
            return "frozen" if any(re.match(p, name) for p in patterns) else "trained"

        return jax.tree_util.tree_map_with_path(label, params)

    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def apply(
    tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    """One update: (params, opt_state)."""
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state
