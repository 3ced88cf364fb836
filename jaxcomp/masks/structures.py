"""Structures: what is pruned as one unit. Scores and masks of units keep the array's rank, 1 where axes are pooled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxcomp.specs import Element, Filters, Structure


def unit_scores(scores: Float[Array, "*shape"], structure: Structure) -> Float[Array, "*units"]:
    """One score a unit: the element's own, or the ℓp norm of the slice's scores.

    >>> unit_scores(jnp.array([[1.0, 2.0], [3.0, 4.0]]), Filters(axis=-1)).tolist()
    [[4.0, 6.0]]

    Raises:
      ValueError: an axis that the array does not have.
    """
    if isinstance(structure, Element):
        return scores
    pooled = pooled_axes(scores.ndim, structure)
    x = jnp.abs(scores).astype(jnp.float32)
    if structure.order == 1:
        return jnp.sum(x, axis=pooled, keepdims=True)
    if structure.order == jnp.inf:
        return jnp.max(x, axis=pooled, keepdims=True)
    return jnp.sum(x**structure.order, axis=pooled, keepdims=True) ** (1 / structure.order)


def alive_units(mask: Bool[Array, "*shape"] | None, structure: Structure, ndim: int) -> Bool[Array, "*units"] | None:
    """Which units have anything left under an earlier mask."""
    if mask is None or isinstance(structure, Element):
        return mask
    return jnp.any(mask, axis=pooled_axes(ndim, structure), keepdims=True)


def pooled_axes(ndim: int, structure: Filters) -> tuple[int, ...]:
    """The axes that go together in a unit."""
    bad = [a for a in structure.axes if not -ndim <= a < ndim]
    if bad:
        raise ValueError(f"has {ndim} dimensions and no axis {bad[0]}; name axes in {-ndim}..{ndim - 1}")
    own = {a % ndim for a in structure.axes}
    return tuple(i for i in range(ndim) if i not in own)


def full_mask(mask: Bool[Array, "*units"], shape: tuple[int, ...]) -> Bool[Array, "*shape"]:
    """A unit mask at the array's own shape."""
    return jax.lax.broadcast_in_dim(mask, shape, tuple(range(len(shape))))
