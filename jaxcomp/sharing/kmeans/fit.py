"""One-dimensional k-means: tables for vectors, and codes. Arrays in, arrays out."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from jaxcomp.core.types import Key
from jaxcomp.sharing.kmeans.inits import Init, near_optimal, spaced
from jaxcomp.sharing.kmeans.lloyd import borders, lloyd
from jaxcomp.sharing.kmeans.points import Points, distinct, points_of

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
    unit, inverse = _unit(x, counted)
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
    unit, inverse = _unit(x, counted)
    points = points_of(x * inverse, counted)
    start = jnp.where(jnp.any(table[1:] == table[:-1]), spaced(points, table.size), table * inverse)
    return _settled(points, start, iterations) * unit


def _settled(points: Points, start: jax.Array, iterations: int) -> jax.Array:
    few, number = distinct(points, start.size)
    table = lloyd(points, start, iterations)
    return jnp.where(points.exact & (number <= start.size), few, table)


def _unit(x: jax.Array, counted: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """A power of two near the largest magnitude, and its inverse: sums of huge values must stay finite."""
    size = jnp.abs(x) if counted is None else jnp.where(counted, jnp.abs(x), jnp.zeros((), x.dtype))
    exponent = jnp.clip(jnp.frexp(jnp.max(size))[1] - 1, -126, 126)
    one = jnp.ones((), x.dtype)
    return jnp.ldexp(one, exponent), jnp.ldexp(one, -exponent)


def nearest(x: Float[Array, " n"], table: Float[Array, " k"]) -> Integer[Array, " n"]:
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
    bits = min(31 - x.size.bit_length(), 11)
    index = codes.astype(jnp.int32)
    ones = jnp.ones(x.shape, jnp.int32) if counted is None else counted.astype(jnp.int32)
    away = jnp.where(ones > 0, x - table[index], jnp.zeros((), x.dtype))
    unit, inverse = _unit(away, None)
    whole = jnp.round(away * inverse * 2.0 ** (2 * bits - 1)).astype(jnp.int32)

    def summed(part: jax.Array) -> jax.Array:
        return jnp.zeros(table.size, jnp.int32).at[index].add(part * ones)

    high, low = summed(whole >> bits), summed(whole & (2**bits - 1))
    number = summed(ones)
    total = high.astype(x.dtype) * 2.0**bits + low.astype(x.dtype)
    step = total / jnp.maximum(number, 1).astype(x.dtype) * 2.0 ** (1 - 2 * bits)
    return jnp.where(number > 0, table + jnp.clip(step, -2.0, 2.0) * unit, table)
