"""Rounding to a range of integers, nearest or stochastic, with a straight-through gradient."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.core.gradients import straight_through
from jaxcomp.core.types import DType

# The cells at both ends are half a step wider than their codes; the rest absorbs the division's rounding error.
HALF_CELL = 0.5 + 2.0**-10
WHOLE = 1.5 * 2.0**23
"""Added to a small number in float32 it leaves the nearest integer in the last bits."""


def hair(dtype: DType) -> float:
    """What a quotient is shortened by before it is rounded: twice what the scale, its reciprocal and the product err.

    A half is then never met: where it would be (a block's extreme, weights of few bits) it is a hair nearer to zero,
    whatever the last bit of the weight or the scale says.
    """
    return 1 - 8 * float(jnp.finfo(dtype).eps)


def nearest(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The nearest integer. A half goes towards zero, and so does what is a half but for rounding errors.

    >>> nearest(jnp.array([0.5, 1.5, -1.5, 1.5000005, 1.6]))
    Array([ 0.,  1., -1.,  1.,  2.], dtype=float32)
    """
    return jnp.round(x * hair(x.dtype))


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def round_ste(x: Float[Array, "*shape"], low: int, high: int) -> Float[Array, "*shape"]:
    """``clip(nearest(x), low, high)``, whose gradient is that of a clip: 1 inside the range and 0 outside.

    The range is that of the codes' cells, ``[low - 1/2, high + 1/2]``, so that a value that rounds to an end code
    without being clipped still learns.

    >>> round_ste(jnp.array([0.4, 2.5, 9.0]), -8, 7)
    Array([0., 2., 7.], dtype=float32)
    >>> jax.grad(lambda x: round_ste(x, -8, 7).sum())(jnp.array([0.4, 7.5, 9.0]))
    Array([1., 1., 0.], dtype=float32)

    Source: Bengio et al. 2013, arXiv:1308.3432; clipped as in Hubara et al. 2016, arXiv:1602.02830.
    """
    codes = nearest(jnp.clip(x, low, high))  # the clip keeps two products apart, in jit as in eager
    return jnp.where(codes == 0, jnp.zeros_like(codes), codes)  # -0 has no integer code


@round_ste.defjvp
def _round_ste_jvp(
    low: int, high: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (t,) = primals, tangents
    inside = (x >= low - HALF_CELL) & (x <= high + HALF_CELL)
    return round_ste(x, low, high), jnp.where(inside, t, jnp.zeros_like(t))


@jax.custom_jvp
def round_between(
    x: Float[Array, "*shape"], low: Float[Array, "*#shape"], high: Float[Array, "*#shape"]
) -> Float[Array, "*shape"]:
    """:func:`round_ste` between ends that are arrays of integers: what is clipped gives its gradient to its end.

    A result may be -0.

    >>> ends = jnp.array([-1.0]), jnp.array([2.0])
    >>> jax.grad(lambda x, low, high: round_between(x, low, high).sum(), (0, 2))(jnp.array([0.4, 9.0, 7.0]), *ends)
    (Array([1., 0., 0.], dtype=float32), Array([2.], dtype=float32))
    """
    return nearest(jnp.clip(x, low, high))


@round_between.defjvp
def _round_between_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, low, high), (t, of_low, of_high) = primals, tangents
    ends = jnp.where(x < low - HALF_CELL, of_low, jnp.where(x > high + HALF_CELL, of_high, jnp.zeros_like(t)))
    inside = (x >= low - HALF_CELL) & (x <= high + HALF_CELL)
    return round_between(x, low, high), jnp.where(inside, t, ends)


def round_with(
    x: Float[Array, "*shape"],
    low: int | Float[Array, "*#shape"],
    high: int | Float[Array, "*#shape"],
    *,
    noise: Float[Array, "*shape"] | None = None,
    clipped: bool = True,
    to_even: bool = False,
) -> Float[Array, "*shape"]:
    """:func:`round_ste` with its choices: stochastic rounding, halves to even, and a gradient that is cut nowhere.

    With noise uniform in [0, 1) the result is the next higher code where ``noise < clip(x) - floor(clip(x))``, so its
    expectation is ``clip(x)``; integers stay as they are.

    Args:
      x: values, in steps.
      low, high: the lowest and the highest code, one of all or integers that broadcast.
      noise: None rounds to nearest.
      clipped: whether the gradient is cut outside the range.
      to_even: whether exact halves go to the even code; for quotients without rounding errors.
    """
    if noise is None and clipped and not to_even:
        return round_ste(x, low, high) if isinstance(low, int) else round_between(x, low, high)
    within = jnp.clip(x, low, high)  # keeps what follows apart from the product that made x, in jit as in eager
    if noise is None:
        codes = jnp.round(within) if to_even else nearest(within)
    else:
        codes = jnp.floor(within)
        codes = codes + (noise < within - codes).astype(x.dtype)
    codes = jnp.where(codes == 0, jnp.zeros_like(codes), codes)
    inside = (x >= low - HALF_CELL) & (x <= high + HALF_CELL) if clipped else None
    return straight_through(x, jax.lax.stop_gradient(codes), inside)
