"""Sorted weighted points: what one-dimensional k-means needs to know of an array, whatever its size.

An array is sorted, or, where it is large, counted in an adaptive histogram of its bit patterns. Sums over a run of
points come from a tree of pairwise sums: unlike a difference of prefix sums, they lose nothing where an outlier or a
million others come first, and they are the same bits in jit and out of it, on one device and on eight.

Counts and extremes are the same in whatever order they are taken: of arrays that lie on many devices each device counts
what it has, and what they send each other is the cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, UInt32

from jaxcomp.core.bits import order_keys

SORTED = 1 << 16  # up to here sorting costs no more than the histogram's fixed part
_CELLS = 1 << 18
_TOP = 1 << 16
_LAST = 0xFFFFFFFF


class Points(NamedTuple):
    """Ascending points, how many weights lie at each, and their sums.

    Fields:
      values: ascending, of a power-of-two length M; those without weights repeat a neighbour.
      before: of length M + 1: how many weights lie at the points before this one.
      sums: of length 2 M: node i is the sum of nodes 2 i and 2 i + 1; the sum at point j is node M + j.
      exact: whether no point stands for two different values.
    """

    values: Float[Array, " points"]
    before: Integer[Array, " ends"]
    sums: Float[Array, " nodes"]
    exact: Bool[Array, ""]

    @property
    def total(self) -> Integer[Array, ""]:
        """How many weights there are."""
        return self.before[-1]

    @property
    def counts(self) -> Integer[Array, " points"]:
        """How many weights lie at each point."""
        return self.before[1:] - self.before[:-1]


def points_of(x: Float[Array, " n"], counted: Bool[Array, " n"] | None = None) -> Points:
    """The points of a vector of finite values, of which those not ``counted`` are left out.

    Exact up to 65,536 values. Above, values are counted in 2**18 cells: 2**16 of equal high half-words of the bit
    pattern, each cut into more the more of the values it holds; a point is then the middle of the extremes of a cell.
    On CPU, where a sort is slow, by a scatter, else from the sorted values: the same bits.

    >>> p = points_of(jnp.array([3.0, 1.0, 3.0]))
    >>> p.values, p.before
    (Array([1., 3., 3., 3.], dtype=float32), Array([0, 1, 2, 3, 3], dtype=uint32))
    """
    if x.size <= SORTED or x.dtype == jnp.float64:
        return _sorted(x, counted)
    by_count = lambda x, c: counted_points([x], [c], x.size)  # noqa: E731
    return jax.lax.platform_dependent(x, counted, cpu=by_count, default=_by_sort)


def run_sums(points: Points, start: Int[Array, " runs"], stop: Int[Array, " runs"]) -> Float[Array, " runs"]:
    """The sum over points ``start`` to ``stop - 1`` of each run: at most two nodes a level of the tree.

    >>> p = points_of(jnp.array([3.0, 1.0, 5.0]))
    >>> run_sums(p, jnp.array([0, 1]), jnp.array([1, 3]))
    Array([1., 8.], dtype=float32)
    """
    size = points.values.size
    level = jnp.arange(size.bit_length(), dtype=jnp.int32)[:, None]
    left = (start[None] + (jnp.int32(size) + (1 << level) - 1)) >> level
    right = (stop[None] + jnp.int32(size)) >> level
    zero = jnp.zeros((), points.sums.dtype)
    from_left = jnp.where((left < right) & (left & 1 == 1), points.sums[left], zero)
    from_right = jnp.where((left < right) & (right & 1 == 1), points.sums[right - 1], zero)
    parts = jnp.concatenate([from_left, from_right])
    while parts.shape[0] > 1:  # in a fixed order
        half = -(-parts.shape[0] // 2)
        parts = parts[:half] + jnp.pad(parts[half:], ((0, 2 * half - parts.shape[0]), (0, 0)))
    return parts[0]


def at_rank(points: Points, rank: Integer[Array, "*ranks"]) -> Float[Array, "*ranks"]:
    """The value of the weight of this rank, from 0.

    >>> at_rank(points_of(jnp.array([3.0, 1.0, 5.0])), jnp.array([0, 2]))
    Array([1., 5.], dtype=float32)
    """
    return points.values[jnp.clip(place_of_rank(points, rank), 0, points.values.size - 1)]


def place_of_rank(points: Points, rank: Integer[Array, "*ranks"]) -> Int[Array, "*ranks"]:
    """The index of the point that holds the weight of this rank, from 0; of a rank past the last, the last index.

    >>> place_of_rank(points_of(jnp.array([3.0, 1.0, 5.0])), jnp.array([0, 2])).tolist()
    [0, 2]
    """
    if points.values.size <= SORTED:  # sorted, a weight a point
        past = rank.astype(points.before.dtype) >= points.total
        return jnp.where(past, points.values.size, rank.astype(jnp.int32))
    return jnp.searchsorted(points.before, rank.astype(points.before.dtype), side="right").astype(jnp.int32) - 1


def distinct(points: Points, most: int) -> tuple[Float[Array, " most"], Integer[Array, ""]]:
    """The lowest ``most`` distinct values, padded with the last of them, and how many there are in all."""
    there = points.counts > 0
    grows = jnp.concatenate([jnp.ones(1, bool), points.values[1:] > points.values[:-1]])
    new = there & (grows | (points.before[:-1] == 0))
    number = jnp.cumsum(new, dtype=jnp.int32)
    place = jnp.searchsorted(number, jnp.arange(1, most + 1, dtype=jnp.int32), side="left")
    return points.values[jnp.minimum(place, points.values.size - 1)], number[-1]


def _sorted(x: jax.Array, counted: jax.Array | None) -> Points:
    size = 1 << max(x.size - 1, 0).bit_length()
    alive = jnp.uint32(x.size) if counted is None else jnp.sum(counted, dtype=jnp.uint32)
    if x.dtype == jnp.float64:
        values = jnp.sort(x if counted is None else jnp.where(counted, x, jnp.inf))
    else:  # integers sort four times as fast as floats
        keys = order_keys(x)
        keys = keys if counted is None else jnp.where(counted, keys, jnp.uint32(_LAST))
        values = _value_of(jax.lax.sort(keys, is_stable=False))
    index = jnp.arange(size, dtype=jnp.uint32)
    top = values[jnp.maximum(alive, 1) - 1]
    values = jnp.where(index < alive, jnp.pad(values, (0, size - x.size)), jnp.where(alive > 0, top, 0))
    there = index < alive
    before = jnp.minimum(jnp.arange(size + 1, dtype=jnp.uint32), alive)
    return Points(values, before, _tree(jnp.where(there, values, jnp.zeros((), values.dtype))), jnp.bool_(True))


def _by_sort(x: jax.Array, counted: jax.Array | None) -> Points:
    """What :func:`counted_points` gives, bit for bit, from sorted keys: where scatters are slow and sorts are not."""
    keys = order_keys(x)
    alive = jnp.uint32(x.size) if counted is None else jnp.sum(counted, dtype=jnp.uint32)
    keys = jax.lax.sort(keys if counted is None else jnp.where(counted, keys, jnp.uint32(_LAST)), is_stable=False)

    def starts(bounds: jax.Array) -> jax.Array:
        return jnp.append(jnp.minimum(jnp.searchsorted(keys, bounds).astype(jnp.uint32), alive), alive)

    cuts, first = _cuts(jnp.diff(starts(jnp.arange(_TOP, dtype=jnp.uint32) << 16)), x.size)
    cell = jnp.arange(_CELLS, dtype=jnp.uint32)
    top = jnp.searchsorted(first, cell, side="right").astype(jnp.uint32) - 1
    part = cell - first[top]
    least = ((part << 16) + (cuts[top] - 1)) // cuts[top]  # of the low half-words in this part
    start = starts((top << 16) | least)
    start = jnp.where(jnp.append(part < cuts[top], False), start, alive)  # cells behind the last one hold nothing
    counts = jnp.diff(start)
    low, high = keys[jnp.minimum(start[:-1], x.size - 1)], keys[jnp.maximum(start[1:], 1) - 1]
    there = counts > 0
    return _of_cells(counts, jnp.where(there, low, jnp.uint32(_LAST)), jnp.where(there, high, jnp.uint32(0)))


def _cuts(coarse: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Into how many cells each high half-word is cut, by how many keys have it; and the first of them."""
    share = coarse.astype(jnp.float32) * ((_CELLS - _TOP - 64) / size)
    cuts = 1 + jnp.minimum(share.astype(jnp.uint32), jnp.uint32(_TOP - 1))
    return cuts, jnp.cumsum(cuts, dtype=jnp.uint32) - cuts


def _value_of(keys: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The inverse of ``order_keys``."""
    positive = (keys >> 31) == 1
    bits = jnp.where(positive, keys & jnp.uint32(0x7FFFFFFF), ~keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def counted_points(parts: Sequence[Float[Array, ...]], counted: Sequence[Bool[Array, ...] | None], size: int) -> Points:
    """The points of arrays of any shapes together, by counting; no array is laid in a row, nor gathered.

    Args:
      parts: float32 arrays.
      counted: which of their values count; None for all.
      size: of the vector whose points these are to be: of values as many as the arrays have, or more that do not count.
    """
    keys = [order_keys(x) for x in parts]
    ones = [
        jnp.ones(k.shape, jnp.uint32) if c is None else c.astype(jnp.uint32) for k, c in zip(keys, counted, strict=True)
    ]
    tops = [(k >> 16).astype(jnp.int32) for k in keys]
    coarse = jnp.zeros(_TOP, jnp.uint32)
    for top, one in zip(tops, ones, strict=True):
        coarse = coarse.at[top].add(one, mode="promise_in_bounds")
    cuts, first = _cuts(coarse, size)
    counts = jnp.zeros(_CELLS, jnp.uint32)
    low, high = jnp.full(_CELLS, _LAST, jnp.uint32), jnp.zeros(_CELLS, jnp.uint32)
    for k, top, one, c in zip(keys, tops, ones, counted, strict=True):
        cell = (first[top] + (((k & 0xFFFF) * cuts[top]) >> 16)).astype(jnp.int32)
        counts = counts.at[cell].add(one, mode="promise_in_bounds")
        low = low.at[cell].min(k if c is None else jnp.where(c, k, jnp.uint32(_LAST)), mode="promise_in_bounds")
        high = high.at[cell].max(k if c is None else jnp.where(c, k, jnp.uint32(0)), mode="promise_in_bounds")
    return _of_cells(counts, low, high)


def _of_cells(counts: jax.Array, low: jax.Array, high: jax.Array) -> Points:
    """The points of cells, by how many weights each holds and its least and greatest key."""
    there = counts > 0
    middle = _value_of(low) * 0.5 + _value_of(high) * 0.5
    held = jnp.where(there, middle, -jnp.inf)
    floor = jnp.min(jnp.where(there, middle, jnp.inf))
    values = jnp.maximum(jax.lax.cummax(held), floor)
    values = jnp.where(jnp.any(there), values, jnp.zeros((), values.dtype))
    # The barrier keeps the product and the tree's first sum two roundings.
    weight = jax.lax.optimization_barrier(jnp.where(there, middle * counts.astype(jnp.float32), 0.0))
    before = jnp.concatenate([jnp.zeros(1, jnp.uint32), jnp.cumsum(counts, dtype=jnp.uint32)])
    return Points(values, before, _tree(weight), jnp.all(~there | (low == high)))


def _tree(sums: Float[Array, " points"]) -> Float[Array, " nodes"]:
    levels = [sums]
    while levels[-1].size > 1:
        levels.append(levels[-1][0::2] + levels[-1][1::2])
    return jnp.concatenate([jnp.zeros(1, sums.dtype), *reversed(levels)])
