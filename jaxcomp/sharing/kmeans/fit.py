"""One-dimensional k-means: tables for vectors, and codes. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from jaxcomp.core.types import Key
from jaxcomp.sharing.kmeans.inits import Init, near_optimal, spaced
from jaxcomp.sharing.kmeans.lloyd import borders, lloyd
from jaxcomp.sharing.kmeans.points import Points, counted_points, distinct, points_of

_FEW = 32  # up to here comparing with every border is faster than a binary search


@partial(jax.jit, static_argnames=("clusters", "init", "iterations"))
def fit(
    x: Float[Array, " n"],
    counted: Bool[Array, " n"] | None,
    *,
    clusters: int,
    init: Init = near_optimal,
    key: Key | None = None,
    iterations: int = 300,
) -> Float[Array, " clusters"]:
    """An ascending table for the values of a vector; those not ``counted`` are left out.

    Where there are no more distinct values than clusters the table is those values, and the last again for the rest.
    Below 2**-126 of the largest magnitude a value counts as zero.

    >>> fit(jnp.array([0.0, 1.0, 5.0, 7.0]), None, clusters=2)
    Array([0.5, 6. ], dtype=float32)
    """
    unit, inverse = _unit([x], [counted])
    points = points_of(x * inverse, counted)
    return _settled(points, init.fn(points, clusters, key), iterations) * unit


@partial(jax.jit, static_argnames=("iterations",))
def refit(
    x: Float[Array, " n"],
    counted: Bool[Array, " n"] | None,
    table: Float[Array, " k"],
    iterations: int = 300,
) -> Float[Array, " k"]:
    """The table that Lloyd's iterations reach from an earlier one.

    One with equal entries was made of too few distinct values: it starts anew.
    """
    unit, inverse = _unit([x], [counted])
    return _refitted(points_of(x * inverse, counted), table, unit, inverse, iterations)


class Parts(NamedTuple):
    """The values of one table where they lie: in arrays of any shapes, which many devices may hold.

    Fields:
      values: of one type, together more than ``SORTED``; no float64.
      counted: which values count; None for all.
    """

    values: tuple[Float[Array, ...], ...]
    counted: tuple[Bool[Array, ...] | None, ...]

    @property
    def size(self) -> int:
        """How many values there are."""
        return sum(x.size for x in self.values)


@partial(jax.jit, static_argnames=("clusters", "init", "iterations"))
def fit_parts(
    parts: Parts, *, clusters: int, init: Init = near_optimal, key: Key | None = None, iterations: int = 300
) -> Float[Array, " clusters"]:
    """What :func:`fit` gives of all values in a row, padded to a power of two, bit for bit where that counts them.

    No array is gathered: devices send each other counts and extremes of 2**18 cells.

    >>> x = jax.random.normal(jax.random.key(0), (512, 256))
    >>> bool((fit_parts(Parts((x,), (None,)), clusters=4) == fit(x.reshape(-1), None, clusters=4)).all())
    True
    """
    unit, inverse = _unit(*parts)
    points = counted_points([x * inverse for x in parts.values], parts.counted, 1 << (parts.size - 1).bit_length())
    return _settled(points, init.fn(points, clusters, key), iterations) * unit


@partial(jax.jit, static_argnames=("iterations",))
def refit_parts(parts: Parts, table: Float[Array, " k"], iterations: int = 300) -> Float[Array, " k"]:
    """What :func:`refit` gives of all values in a row; see :func:`fit_parts`."""
    unit, inverse = _unit(*parts)
    points = counted_points([x * inverse for x in parts.values], parts.counted, parts.size)
    return _refitted(points, table, unit, inverse, iterations)


def _refitted(points: Points, table: jax.Array, unit: jax.Array, inverse: jax.Array, iterations: int) -> jax.Array:
    start = jnp.where(jnp.any(table[1:] == table[:-1]), spaced(points, table.size), table * inverse)
    return _settled(points, start, iterations) * unit


def _settled(points: Points, start: jax.Array, iterations: int) -> jax.Array:
    few, number = distinct(points, start.size)
    table = lloyd(points, start, iterations)
    return jnp.where(points.exact & (number <= start.size), few, table)


def _unit(parts: Sequence[jax.Array], counted: Sequence[jax.Array | None]) -> tuple[jax.Array, jax.Array]:
    """A power of two near the largest magnitude, and its inverse: sums of huge values must stay finite."""

    def size(x: jax.Array, c: jax.Array | None) -> jax.Array:
        return jnp.max(jnp.abs(x) if c is None else jnp.where(c, jnp.abs(x), jnp.zeros((), x.dtype)))

    largest = reduce(jnp.maximum, map(size, parts, counted))
    exponent = jnp.clip(jnp.frexp(largest)[1] - 1, -126, 126)
    one = jnp.ones((), largest.dtype)
    return jnp.ldexp(one, exponent), jnp.ldexp(one, -exponent)


def nearest(x: Float[Array, "*shape"], table: Float[Array, " k"]) -> Integer[Array, "*shape"]:
    """The index of the entry of an ascending table that is nearest to each value, in the smallest unsigned type.

    >>> nearest(jnp.array([0.1, 0.5, 0.6]), jnp.array([0.0, 1.0]))
    Array([0, 0, 1], dtype=uint8)
    """
    middles = borders(table)
    dtype = code_dtype(table.size)
    if table.size <= _FEW:
        codes = jnp.zeros(x.shape, dtype)
        for i in range(middles.size):
            codes = codes + (x > middles[i]).astype(dtype)
        return codes
    return jnp.searchsorted(middles, x, side="left", method="scan_unrolled").astype(dtype)


def code_dtype(entries: int) -> jnp.dtype:
    """The smallest unsigned type that holds the codes of so many entries."""
    return jnp.dtype(jnp.uint8 if entries <= 256 else jnp.uint16)


def member_means(
    x: Float[Array, " n"], counted: Bool[Array, " n"] | None, codes: Integer[Array, " n"], table: Float[Array, " k"]
) -> Float[Array, " k"]:
    """The mean of the weights of each code; the old entry where there are none.

    Distances from the old entry are summed as integers, in two parts of as many bits as cannot overflow: sums in any
    order, and so on any number of devices, are the same bits.

    >>> member_means(jnp.array([0.0, 1.0, 5.0]), None, jnp.array([0, 0, 1], jnp.uint8), jnp.array([0.0, 4.0]))
    Array([0.5, 5. ], dtype=float32)
    """
    return member_means_of_parts(Parts((x,), (counted,)), (codes,), table)


def member_means_of_parts(
    parts: Parts, codes: Sequence[Integer[Array, ...]], table: Float[Array, " k"]
) -> Float[Array, " k"]:
    """The same of values where they lie, however many."""
    bits = min(31 - parts.size.bit_length(), 11)
    index = [c.astype(jnp.int32) for c in codes]
    ones = [
        jnp.ones(x.shape, jnp.int32) if c is None else c.astype(jnp.int32)
        for x, c in zip(parts.values, parts.counted, strict=True)
    ]
    dtype = table.dtype
    away = [
        jnp.where(one > 0, x - table[i], jnp.zeros((), dtype))
        for x, one, i in zip(parts.values, ones, index, strict=True)
    ]
    unit, inverse = _unit(away, [None] * len(away))
    whole = [jnp.round(a * inverse * 2.0 ** (2 * bits - 1)).astype(jnp.int32) for a in away]

    def summed(of: Sequence[jax.Array]) -> jax.Array:
        sums = jnp.zeros(table.size, jnp.int32)
        for i, x, one in zip(index, of, ones, strict=True):
            sums = sums.at[i].add(x * one)
        return sums

    high, low = summed([w >> bits for w in whole]), summed([w & (2**bits - 1) for w in whole])
    number = summed(ones)
    total = high.astype(dtype) * 2.0**bits + low.astype(dtype)
    step = total / jnp.maximum(number, 1).astype(dtype) * 2.0 ** (1 - 2 * bits)
    return jnp.where(number > 0, table + jnp.clip(step, -2.0, 2.0) * unit, table)
