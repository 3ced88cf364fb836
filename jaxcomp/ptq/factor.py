"""The triangular factor of second moments, in the order in which a solver settles the rows."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_MORE = 10.0
_TRIES = 12


class Factor(NamedTuple):
    """What a solver knows of the inputs.

    Fields:
      root: lower, ``(n, n)``: ``root rootᵀ`` are the damped moments, from the last input to be settled to the first.
      order: in which the inputs are settled, or None for their own.
      damping: that was taken, as a fraction of the mean diagonal.
    """

    root: jax.Array
    order: jax.Array | None
    damping: jax.Array


_State = tuple[jax.Array, jax.Array, jax.Array]


def factor(h: Float[Array, "n n"], order: Int[Array, " n"] | None, *, damping: float) -> Factor:
    """The factor of ``h + damping mean(diag h)``, whose inputs are taken in this order.

    Where rounding errors leave no factor, the damping is ten times as large, and so on. An input that was always zero
    is taken as one of mean size that goes with no other.

    >>> root = factor(jnp.array([[2.0, 1.0], [1.0, 1.0]]), None, damping=0.0).root
    >>> (root @ root.T)[::-1, ::-1]
    Array([[2., 1.],
           [1., 1.]], dtype=float32)
    """
    # Both axes in one gather: one axis after the other reads the second one in strides.
    turned = h[::-1, ::-1] if order is None else h[order[::-1, None], order[None, ::-1]]
    diagonal = jnp.diagonal(turned)
    active = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(active), 1).astype(h.dtype)
    mean = jnp.where(mean > 0, mean, jnp.ones_like(mean))

    def failed(state: _State) -> jax.Array:
        return (state[2] == 0) | (~jnp.isfinite(state[1][0, 0]) & (state[2] < _TRIES))

    def attempt(state: _State) -> _State:
        share, _, tries = state
        more = jnp.maximum(share * _MORE, jnp.full_like(share, float(jnp.finfo(h.dtype).eps)))
        share = jnp.where(tries == 0, share, more)
        added = share * mean + jnp.where(active, jnp.zeros_like(mean), mean)
        # LAPACK wants whole columns. The transpose of a symmetric matrix has them; without it XLA copies in strides.
        damped = (turned + jnp.diag(added)).T
        return share, jnp.linalg.cholesky(damped, symmetrize_input=False), tries + 1

    start = (jnp.asarray(damping, h.dtype), jnp.zeros_like(h), jnp.int32(0))
    share, root, _ = lax.while_loop(failed, attempt, start)
    return Factor(root, order, share)
