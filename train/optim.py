"""Optimisers as the published schemes use them."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Rectified Adam uses the second average once its effective length exceeds this.
THRESHOLD = 5


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


class RangerState(NamedTuple):
    """State of `ranger`, all trees like the parameters.

    Attributes:
      count: updates each parameter has had, int32 [].
      mean, square: moving averages of the gradient and its square.
      slow: the slow weights of the lookahead.
    """

    count: Any
    mean: Any
    square: Any
    slow: Any


def ranger(
    learning_rate: float,
    betas: tuple[float, float] = (0.95, 0.999),
    *,
    eps: float = 1e-5,
    period: int = 6,
    whole: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Ranger as pSp, e4e and ReStyle use it; every parameter counts its own updates.

    Rectified Adam (arXiv 1908.03265), lookahead (arXiv 1907.08610) by a half every
    `period` updates, and centred gradients (arXiv 2004.01461): of arrays with more than
    one axis the mean over all axes but the last, the outputs, is taken off.

    `update(grads, state, params, active=...)` takes flags by the first part of a
    parameter's path (`{"style_3": False}`, traced or not). A parameter that is not
    active keeps its value, its averages and its count, as one without a gradient does
    in PyTorch.

    Args:
      learning_rate: lr.
      betas: of the averages of the gradient and of its square.
      eps: added to the root of the uncorrected second average.
      period: updates between those of the slow weights.
      whole: patterns of paths whose gradient is centred over all axes: parameters that
        PyTorch keeps with a leading axis of one.
    """
    beta1, beta2 = betas
    longest = 2 / (1 - beta2) - 1

    def init(params):
        return RangerState(
            count=jax.tree.map(lambda _: jnp.zeros((), jnp.int32), params),
            mean=jax.tree.map(jnp.zeros_like, params),
            square=jax.tree.map(jnp.zeros_like, params),
            slow=jax.tree.map(jnp.array, params),
        )

    def step(name, g, count, mean, square, slow, p):
        """What one parameter's update, count, averages and slow weights become."""
        if any(re.match(pattern, name) for pattern in whole):
            g = g - jnp.mean(g)
        elif g.ndim > 1:
            g = g - jnp.mean(g, tuple(range(g.ndim - 1)), keepdims=True)
        slow = jnp.where(count == 0, p, slow)
        count = count + 1
        t = count.astype(jnp.float32)
        mean = beta1 * mean + (1 - beta1) * g
        square = beta2 * square + (1 - beta2) * jnp.square(g)
        # 1 - beta^t without cancellation.
        rest1, rest2 = (-jnp.expm1(t * math.log(beta)) for beta in betas)
        length = longest - 2 * t * (1 - rest2) / rest2
        rectified = length > THRESHOLD
        safe = jnp.where(rectified, length, THRESHOLD)
        ratio = (safe - 4) / (longest - 4) * (safe - 2) / safe * longest / (longest - 2)
        scaled = jnp.sqrt(rest2 * ratio) * mean / (jnp.sqrt(square) + eps)
        new = p - learning_rate / rest1 * jnp.where(rectified, scaled, mean)
        sync = count % period == 0
        slow = jnp.where(sync, slow + 0.5 * (new - slow), slow)
        return jnp.where(sync, slow, new) - p, count, mean, square, slow

    def update(grads, state, params, *, active=None, **_):
        paths, treedef = jax.tree_util.tree_flatten_with_path(grads)
        columns = [treedef.flatten_up_to(tree) for tree in (*state, params)]
        results = []
        for (path, g), *old, p in zip(paths, *columns, strict=True):
            name = path_name(path)
            new = step(name, g, *old, p)
            use = (active or {}).get(name.split("/")[0], True)
            kept = (jnp.zeros_like(p), *old)
            results.append(
                [jnp.where(use, a, b) for a, b in zip(new, kept, strict=True)]
            )
        updates, *new_state = (
            treedef.unflatten(column) for column in zip(*results, strict=True)
        )
        return updates, RangerState(*new_state)

    return optax.GradientTransformationExtraArgs(init, update)


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
    tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any, **more
) -> tuple[Any, Any]:
    """One update: (params, opt_state); `more` are further arguments of `tx.update`."""
    updates, opt_state = tx.update(grads, opt_state, params, **more)
    return optax.apply_updates(params, updates), opt_state
