"""Rounding to a range of integers, nearest or stochastic, with a straight-through gradient."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.core.gradients import straight_through

# The cells at both ends are half a step wider than their codes; the rest absorbs the division's rounding error.
HALF_CELL = 0.5 + 2.0**-10


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def round_ste(x: Float[Array, "*shape"], low: int, high: int) -> Float[Array, "*shape"]:
    """``clip(round(x), low, high)``, half to even, whose gradient is that of a clip: 1 inside the range and 0 outside.

    The range is that of the codes' cells, ``[low - 1/2, high + 1/2]``, so that a value that rounds to an end code
    without being clipped still learns.

    >>> round_ste(jnp.array([0.4, 2.5, 9.0]), -8, 7)
    Array([0., 2., 7.], dtype=float32)
    >>> jax.grad(lambda x: round_ste(x, -8, 7).sum())(jnp.array([0.4, 7.5, 9.0]))
    Array([1., 1., 0.], dtype=float32)

    Source: Bengio et al. 2013, arXiv:1308.3432; clipped as in Hubara et al. 2016, arXiv:1602.02830.
    """
    codes = jnp.clip(jnp.round(x), low, high)
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
    return jnp.clip(jnp.round(x), low, high)


@round_between.defjvp
def _round_between_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, low, high), (t, of_low, of_high) = primals, tangents
    ends = jnp.where(x < low - HALF_CELL, of_low, jnp.where(x > high + HALF_CELL, of_high, jnp.zeros_like(t)))
    inside = (x >= low - HALF_CELL) & (x <= high + HALF_CELL)
    return round_between(x, low, high), jnp.where(inside, t, ends)


def round_with(
    x: Float[Array, "*shape"],
    low: int,
    high: int,
    *,
    noise: Float[Array, "*shape"] | None = None,
    clipped: bool = True,
) -> Float[Array, "*shape"]:
    """:func:`round_ste` with its choices: stochastic rounding, and a gradient that is cut nowhere.

    With noise uniform in [0, 1) the result is the next higher code where ``noise < clip(x) - floor(clip(x))``, so its
    expectation is ``clip(x)``; integers stay as they are.

    Args:
      x: values, in steps.
      low: the lowest code.
      high: the highest code.
      noise: None rounds to nearest.
      clipped: whether the gradient is cut outside the range.
    """
    if noise is None and clipped:
        return round_ste(x, low, high)
    if noise is None:
        codes = jnp.round(x)
    else:  # the clip keeps the difference apart from the product that made x: two roundings, in jit as in eager
        within = jnp.clip(x, low, high)
        codes = jnp.floor(within)
        codes = codes + (noise < within - codes).astype(x.dtype)
    codes = jnp.clip(codes, low, high)
    codes = jnp.where(codes == 0, jnp.zeros_like(codes), codes)
    inside = (x >= low - HALF_CELL) & (x <= high + HALF_CELL) if clipped else None
    return straight_through(x, jax.lax.stop_gradient(codes), inside)
