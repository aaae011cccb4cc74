"""Gradients by hand for linear operations, closed under differentiation.

XLA's derived gradient of a strided or dilated convolution can cost a hundred times
its forward on a CPU. Here every operation comes with its adjoints, each of them
differentiable through the others, so that gradients of any order (R1 and path
length need the second) use only forms that were chosen by hand.
"""

from collections.abc import Callable

import jax
from jax import Array

Linear = Callable[[Array], Array]
Bilinear = Callable[[Array, Array], Array]


def linear_pair(forward: Linear, transpose: Linear) -> tuple[Linear, Linear]:
    """Make two mutually transposed linear maps each other's gradient."""

    @jax.custom_vjp
    def f(x):
        return forward(x)

    @jax.custom_vjp
    def t(y):
        return transpose(y)

    f.defvjp(lambda x: (f(x), None), lambda _, g: (t(g),))
    t.defvjp(lambda y: (t(y), None), lambda _, g: (f(g),))
    return f, t


def bilinear_trio(
    forward: Bilinear, input_gradient: Bilinear, weight_gradient: Bilinear
) -> tuple[Bilinear, Bilinear, Bilinear]:
    """The three gradients of one trilinear form T(x, weight, g), made differentiable.

    Args:
      forward: (x, weight) -> dT/dg, the convolution itself.
      input_gradient: (g, weight) -> dT/dx.
      weight_gradient: (x, g) -> dT/dweight.
    """

    @jax.custom_vjp
    def f(x, weight):
        return forward(x, weight)

    @jax.custom_vjp
    def dx(g, weight):
        return input_gradient(g, weight)

    @jax.custom_vjp
    def dw(x, g):
        return weight_gradient(x, g)

    f.defvjp(
        lambda x, w: (f(x, w), (x, w)),
        lambda xw, g: (dx(g, xw[1]), dw(xw[0], g)),
    )
    dx.defvjp(
        lambda g, w: (dx(g, w), (g, w)),
        lambda gw, x: (f(x, gw[1]), dw(x, gw[0])),
    )
    dw.defvjp(
        lambda x, g: (dw(x, g), (x, g)),
        lambda xg, w: (dx(xg[1], w), f(xg[0], w)),
    )
    return f, dx, dw
