"""N:M masks: the n best of every m neighbours, by comparing pairs."""

from __future__ import annotations

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from numpy.lib.array_utils import normalize_axis_index

from jaxcomp.core.barriers import made_once
from jaxcomp.core.bits import order_keys
from jaxcomp.core.leaves import dense
from jaxcomp.core.placement import on_any_mesh
from jaxcomp.core.types import Leaf
from jaxcomp.pruning.specs import NM

_PAIRS = 16  # up to this m, comparing every pair is cheaper than sorting each group; the bits of a group's byte or two


def n_m_mask(
    scores: Float[Array, "*shape"], structure: NM, alive: Bool[Array, "*shape"] | None = None
) -> Bool[Array, "*shape"]:
    """Marks the ``n`` highest scores of each group of ``m`` along the axis.

    Of equal scores the lower index goes first, as everywhere; NaN counts above infinity. What is not alive goes before
    all that is, and is never marked.

    >>> n_m_mask(jnp.array([[1.0, 4.0, 2.0, 3.0, 5.0]]), NM(2, 4, axis=1)).tolist()
    [[False, True, False, True, True]]

    Raises:
      ValueError: the structure names no axis, or one that the array has not.
    """
    axis = _axis(structure, scores.ndim)
    size, (n, m) = scores.shape[axis], (structure.n, structure.m)
    keys = order_keys(scores)
    if alive is not None:
        keys = jnp.where(alive, keys, jnp.uint32(0))
    if size % m:
        keys = jnp.pad(keys, [(0, -size % m if i == axis else 0) for i in range(keys.ndim)])
    shape = keys.shape
    groups = keys.reshape(*shape[:axis], shape[axis] // m, m, *shape[axis + 1 :])
    by = _by_ranks if m > _PAIRS else _by_entries if axis == keys.ndim - 1 else _by_groups
    kept = by(groups, axis + 1, n).reshape(shape)
    if size % m:
        kept = jax.lax.slice_in_dim(kept, 0, size, axis=axis)
    return kept if alive is None else kept & alive


@on_any_mesh
def is_n_m(x: Leaf, structure: NM) -> bool:
    """Whether at most ``n`` of every ``m`` neighbours along the axis are not zero (or, of a mask, are True).

    Args:
      x: an array, a mask, or a compressed leaf.
      structure: n, m and the axis; the last group may be smaller.

    >>> is_n_m(jnp.array([[0.0, 1.0, 2.0, 0.0]]), NM(2, 4, axis=1)), is_n_m(jnp.ones((4, 4)), NM(2, 4, axis=0))
    (True, False)

    Raises:
      ValueError: the structure names no axis, or one that the array has not.
    """
    host = np.asarray(dense(x)) != 0
    axis = _axis(structure, host.ndim)
    along = np.moveaxis(host, axis, -1)
    along = np.pad(along, [(0, 0)] * (host.ndim - 1) + [(0, -along.shape[-1] % structure.m)])
    return bool((along.reshape(-1, structure.m).sum(1) <= structure.n).all())


def _axis(structure: NM, ndim: int) -> int:
    if structure.axis is None:
        raise ValueError(f"{structure} names no axis, and an array has no path that settles it; name one.")
    return normalize_axis_index(structure.axis, ndim)


def _by_groups(groups: Array, axis: int, n: int) -> Bool[Array, "*groups"]:
    """An entry is kept if fewer than n of its group beat it; at equal keys the later one wins.

    On CPU in two passes, a group's verdicts as the bits of one number between them. XLA fuses what is elementwise into
    the loop over the mask, and would compare every pair once for each entry of its group; a reduction ends that fusion.
    """
    m = groups.shape[axis]
    entry = [jax.lax.index_in_dim(groups, i, axis, keepdims=False) for i in range(m)]
    beaten = [jnp.zeros(entry[0].shape, jnp.uint8) for _ in range(m)]
    for i in range(m):
        for j in range(i + 1, m):
            later = (entry[j] >= entry[i]).astype(jnp.uint8)
            beaten[i], beaten[j] = beaten[i] + later, beaten[j] + (1 - later)
    each = [b < n for b in beaten]
    return jax.lax.platform_dependent(each, cpu=partial(_by_bits, axis=axis), default=partial(jnp.stack, axis=axis))


def _by_bits(each: list[Array], axis: int) -> Bool[Array, "*groups"]:
    """The verdicts side by side along the axis, by way of numbers that hold them."""
    verdicts = _bits(each)
    places = _along(len(each), verdicts.ndim + 1, axis).astype(verdicts.dtype)
    return (jnp.expand_dims(verdicts, axis) >> places) & 1 != 0


def _bits(each: list[Array]) -> Array:
    """Arrays of bool as the bits of one number, from the lowest on, which XLA does not compute anew for each reader."""
    dtype = jnp.uint8 if len(each) <= 8 else jnp.uint16
    number = reduce(jnp.bitwise_or, (bit.astype(dtype) << np.asarray(i, dtype) for i, bit in enumerate(each)))
    both = jnp.stack([number, jnp.zeros_like(number)])
    return jax.lax.reduce(both, np.zeros((), dtype), jax.lax.bitwise_or, (0,))


def _by_entries(groups: Array, axis: int, n: int) -> Bool[Array, "*groups"]:
    """The same along the last axis, in one pass, which counts for each entry who beats it.

    The entries of a group lie side by side there, a group to a vector, and comparing every pair twice costs less than
    to gather by strides. A row to a group and the barrier keep XLA from taking the axes' indices apart at each entry:
    half the time on CPU.
    """
    m = groups.shape[axis]
    rows = groups.reshape(groups.size // m, m)
    place = _along(m, 2, 1)
    beaten = jnp.zeros(rows.shape, jnp.int32)
    for j in range(m):
        other = rows[:, j : j + 1]
        beaten = beaten + ((other > rows) | ((other == rows) & (place < j))).astype(jnp.int32)
    return made_once(beaten < n).reshape(groups.shape)


def _along(size: int, ndim: int, axis: int) -> Array:
    """0, 1, 2 ... along one axis of many."""
    return jax.lax.broadcasted_iota(jnp.int32, [size if i == axis else 1 for i in range(ndim)], axis)


def _by_ranks(groups: Array, axis: int, n: int) -> Bool[Array, "*groups"]:
    """The same by two stable sorts of each group."""
    ranks = jnp.argsort(jnp.argsort(groups, axis=axis, stable=True), axis=axis)
    return ranks >= groups.shape[axis] - n
