"""Masks of a fixed number of active weights, and how they move: some are dropped, as many are grown."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PRNGKeyArray, UInt32

from jaxcomp.pruning.masks.thresholds import smallest


def first_mask(order: UInt32[Array, "*shape"], active: int) -> Bool[Array, "*shape"]:
    """Exactly ``active`` True entries: those of the smallest ``order``; of equals, those of lower C-order index.

    >>> first_mask(jnp.array([[7, 1], [3, 9]], jnp.uint32), 2).tolist()
    [[False, True], [True, False]]
    """
    (mask,) = smallest([order], [None], jnp.uint32(active))
    return mask


def drop_and_grow(
    mask: Bool[Array, "*shape"],
    drop_order: UInt32[Array, "*shape"],
    grow_order: UInt32[Array, "*shape"],
    count: UInt32[Array, ""],
) -> Bool[Array, "*shape"]:
    """The mask after ``count`` active entries are dropped and as many grown; the number of True ones stays.

    Dropped are the active entries of the smallest ``drop_order``. Grown are those of the smallest ``grow_order`` among
    all that are inactive *after* the drop, so an entry that was dropped just now may come back at once.

    Args:
      mask: what is active now.
      drop_order, grow_order: unsigned integers, the lowest first; of equal ones those of lower C-order index.
      count: how many, at most the number of active entries.

    >>> order = jnp.array([3, 1, 0, 5], jnp.uint32)
    >>> drop_and_grow(jnp.array([True, True, False, False]), order, order, jnp.uint32(1)).tolist()
    [True, False, True, False]

    Source: Evci et al. 2019, arXiv:1911.11134, algorithm 1.
    """
    (dropped,) = smallest([drop_order], [mask], count)
    kept = mask & ~dropped
    (grown,) = smallest([grow_order], [~kept], count)
    return kept | grown


def random_order(key: PRNGKeyArray, shape: tuple[int, ...]) -> UInt32[Array, ...]:
    """Uniform random unsigned integers: the order of a draw without replacement."""
    return jax.random.bits(key, shape, jnp.uint32)
