"""Structures: what is pruned as one unit. Scores and masks of units keep the array's rank, 1 where axes are pooled."""

from __future__ import annotations

import math
from functools import singledispatch

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from numpy.lib.array_utils import normalize_axis_tuple

from jaxcomp.core.reductions import max_or_nan
from jaxcomp.core.types import Shape
from jaxcomp.pruning.specs import Block, Element, Filters, Order, Structure, Units


@singledispatch
def unit_scores(structure: Units, scores: Float[Array, "*shape"]) -> Float[Array, "*units"]:
    """One score a unit: the element's own, the sum or ℓp norm of a slice's scores, or the mean or maximum of a block's.

    Args:
      structure: what a unit is; a new structure registers its own rule. Order 1 is the sum, so scores below zero count
        as worse than zero; every other order is the norm of magnitudes.
      scores: elementwise.

    >>> unit_scores(Filters(axis=-1), jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[4.0, 6.0]]
    >>> unit_scores(Block((2, 2)), jnp.array([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]])).tolist()
    [[2.5, 7.0]]

    Raises:
      ValueError: an axis that the array does not have, or a nuclear norm of slices that are not matrices.
      TypeError: a structure that has registered no rule.
    """
    raise TypeError(f"unit_scores: {type(structure).__name__} has no rule; register one with unit_scores.register.")


@unit_scores.register
def _(structure: Element, scores: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return scores


@unit_scores.register
def _(structure: Block, scores: Float[Array, "*shape"]) -> Float[Array, "*units"]:
    return _pooled_blocks(scores.astype(jnp.float32), structure)


@unit_scores.register
def _(structure: Filters, scores: Float[Array, "*shape"]) -> Float[Array, "*units"]:
    pooled, x = pooled_axes(scores.ndim, structure), scores.astype(jnp.float32)
    return jnp.sum(x, axis=pooled, keepdims=True) if structure.order == 1 else norms(x, pooled, structure.order)


@singledispatch
def alive_units(structure: Units, mask: Bool[Array, "*shape"], shape: Shape) -> Bool[Array, "*units"]:
    """Which units have anything left under an earlier mask, which broadcasts to ``shape``.

    Without a rule of its own, a structure's units are alive where the score of a mask's ones is above zero.
    """
    return unit_scores(structure, jnp.broadcast_to(mask, shape).astype(jnp.float32)) > 0


@alive_units.register
def _(structure: Element, mask: Bool[Array, "*shape"], shape: Shape) -> Bool[Array, "*units"]:
    return jnp.broadcast_to(mask, shape)


@alive_units.register
def _(structure: Block, mask: Bool[Array, "*shape"], shape: Shape) -> Bool[Array, "*units"]:
    return _pooled_blocks(jnp.broadcast_to(mask, shape), structure)


@alive_units.register
def _(structure: Filters, mask: Bool[Array, "*shape"], shape: Shape) -> Bool[Array, "*units"]:
    return jnp.any(jnp.broadcast_to(mask, shape), axis=pooled_axes(len(shape), structure), keepdims=True)


@singledispatch
def over_units(structure: Structure, mask: Bool[Array, "*units"], shape: Shape) -> Bool[Array, "*broadcast"]:
    """A mask of units as one that broadcasts against the array of ``shape``; units that pool whole axes do as they are.

    >>> over_units(Block((2, 2)), jnp.array([[True, False]]), (2, 3)).tolist()
    [[True, True, False], [True, True, False]]

    Raises:
      ValueError: a mask of blocks of another shape.
    """
    return mask


@over_units.register
def _(structure: Block, mask: Bool[Array, "*units"], shape: Shape) -> Bool[Array, "*broadcast"]:
    for axis, (size, extent) in enumerate(zip(shape, block_extents(structure, shape), strict=True)):
        if mask.shape[axis] != -(-size // extent):
            raise ValueError(f"has {mask.shape[axis]} units along axis {axis}, where {shape} has {-(-size // extent)}")
        if extent > 1:
            mask = jax.lax.slice_in_dim(jnp.repeat(mask, extent, axis=axis), 0, size, axis=axis)
    return mask


def norms(x: Float[Array, "*shape"], axes: tuple[int, ...], order: Order) -> Float[Array, "*units"]:
    """The ℓp norms over ``axes``, which stay with size 1; see :class:`~jaxcomp.pruning.specs.Filters` for the orders.

    >>> [round(float(norms(jnp.array([[3.0, 4.0]]), (0, 1), p)[0, 0]), 3) for p in (1, 2, jnp.inf, -jnp.inf, 0, "nuc")]
    [7.0, 5.0, 4.0, 3.0, 2.0, 5.0]
    """
    if order == "nuc":
        return _nuclear(x, axes)
    p, x = 2.0 if order == "fro" else float(order), jnp.abs(x)
    if p == math.inf:
        return max_or_nan(x, axes, keepdims=True)
    if p == -math.inf:
        return -max_or_nan(-x, axes, keepdims=True)
    if p == 0:
        return jnp.sum(x != 0, axis=axes, keepdims=True, dtype=jnp.float32)
    if p == 1:
        return jnp.sum(x, axis=axes, keepdims=True)
    if p == 2:
        return jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True))
    return jnp.sum(x**p, axis=axes, keepdims=True) ** (1 / p)


def pooled_axes(ndim: int, structure: Filters) -> tuple[int, ...]:
    """The axes that go together in a unit."""
    own = normalize_axis_tuple(structure.axes, ndim, allow_duplicate=True)
    return tuple(i for i in range(ndim) if i not in own)


def block_extents(structure: Block, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The block's extent along every axis of an array."""
    extents = [1] * len(shape)
    axes = normalize_axis_tuple(structure.axes, len(shape), argname="Block.axes")
    for axis, extent in zip(axes, structure.shape, strict=True):
        extents[axis] = min(extent, shape[axis])
    return tuple(extents)


def _nuclear(x: Float[Array, "*shape"], axes: tuple[int, ...]) -> Float[Array, "*units"]:
    if len(axes) != 2:
        raise ValueError(
            f"has slices with {len(axes)} dimensions, and a nuclear norm is of matrices; take another order"
        )
    return jnp.linalg.norm(x, ord="nuc", axis=axes, keepdims=True)


def _pooled_blocks(x: Array, structure: Block) -> Array:
    """Means, maxima, or for booleans "any", of blocks; the last of an axis over what there is of it."""
    extents = block_extents(structure, x.shape)
    boolean = x.dtype == jnp.bool_
    fill = False if boolean else (0.0 if structure.pool == "mean" else -jnp.inf)
    counts = [-(-size // extent) for size, extent in zip(x.shape, extents, strict=True)]
    ends = [c * e - size for c, e, size in zip(counts, extents, x.shape, strict=True)]
    if any(ends):
        x = jnp.pad(x, [(0, e) for e in ends], constant_values=fill)
    split = x.reshape([d for c, e in zip(counts, extents, strict=True) for d in (c, e)])
    inner = tuple(range(1, split.ndim, 2))
    if boolean:
        return jnp.any(split, axis=inner)
    if structure.pool == "max":
        return max_or_nan(split, inner)
    return jnp.sum(split, axis=inner) / jnp.asarray(_block_sizes(counts, extents, ends))


def _block_sizes(counts: list[int], extents: tuple[int, ...], ends: list[int]) -> np.ndarray:
    """How many elements each block has, of the units' rank; 1 along axes that divide."""
    sizes = np.ones([1] * len(counts), np.float32)
    for axis, (count, extent, end) in enumerate(zip(counts, extents, ends, strict=True)):
        along = np.full(count if end else 1, extent, np.float32)
        along[-1] -= end
        sizes = sizes * along.reshape([-1 if i == axis else 1 for i in range(len(counts))])
    return sizes
