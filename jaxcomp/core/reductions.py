"""Largest and smallest values that keep NaN."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Reduce = Callable[[jax.Array], jax.Array]


def nan_in(x: jax.Array, total: Reduce = jnp.sum) -> jax.Array:
    """NaN where a sum runs over one, else 0; infinities are none.

    A sum, for XLA on CPU loses NaN in the maximum and the minimum of float32 arrays of 4,096 numbers and more (jax
    0.10.2 and 0.12.0.1), and sums are what it reduces fast.

    >>> nan_in(jnp.array([jnp.inf, 1.0])), nan_in(jnp.array([jnp.nan, 1.0]))
    (Array(0., dtype=float32), Array(nan, dtype=float32))
    """
    return total(jnp.where(x == x, jnp.zeros_like(x), x))


def max_or_nan(x: jax.Array, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False) -> jax.Array:
    """``jnp.max`` of floats, NaN where there is one.

    >>> bool(jnp.isnan(max_or_nan(jnp.zeros(5000).at[7].set(jnp.nan))))
    True
    """
    return jnp.max(x, axis=axis, keepdims=keepdims) + nan_in(x, lambda v: jnp.sum(v, axis=axis, keepdims=keepdims))
