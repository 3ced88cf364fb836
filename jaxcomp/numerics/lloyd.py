"""Lloyd's iterations over sorted points, and two moves that take a table out of their local minima."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.numerics.points import Points, run_sums


class Runs(NamedTuple):
    """The points nearest to each entry: how many weights, mean, extremes, the first point and the one after."""

    number: jax.Array
    mean: jax.Array
    low: jax.Array
    high: jax.Array
    start: jax.Array
    stop: jax.Array


def lloyd(points: Points, table: Float[Array, " k"], iterations: int) -> Float[Array, " k"]:
    """Moves each entry of an ascending table to the mean of the weights nearest to it, up to ``iterations`` times.

    It stops where nothing moves. An entry that no weight is nearest to stays. One iteration is a binary search for each
    border and a walk up the tree of sums: O(K log N).

    >>> from jaxcomp.numerics.points import points_of
    >>> lloyd(points_of(jnp.array([0.0, 1.0, 5.0, 7.0])), jnp.array([0.0, 1.0]), 9)
    Array([0.5, 6. ], dtype=float32)

    Source: Lloyd 1982, "Least squares quantization in PCM".
    """

    def moves(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, moved, i = carry
        return moved & (i < iterations)

    def step(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        old, _, i = carry
        new = runs_of(points, old).mean
        return new, jnp.any(new != old), i + 1

    return jax.lax.while_loop(moves, step, (table, jnp.bool_(True), jnp.int32(0)))[0]


def borders(table: Float[Array, " k"]) -> Float[Array, " k_minus_1"]:
    """The middles between neighbours; the value on a border belongs to the lower entry."""
    return table[:-1] * 0.5 + table[1:] * 0.5


def refined(points: Points, table: Float[Array, " k"]) -> Float[Array, " k"]:
    """A table near a good one, but for some of Lloyd's iterations: respaced where that helps, then swapped."""

    def inertia(table: jax.Array) -> jax.Array:  # but for a factor
        return jnp.sum(_gains(points, runs_of(points, table))[0])

    both = jnp.stack([table, lloyd(points, _respaced(points, table), 16)])
    return _swapped(points, both[jnp.argmin(jax.vmap(inertia)(both))])


def runs_of(points: Points, table: Float[Array, " k"]) -> Runs:
    """The runs of an ascending table."""
    cuts = jnp.searchsorted(points.values, borders(table), side="right").astype(jnp.int32)
    ends = jnp.full((1,), points.values.size, jnp.int32)
    start, stop = jnp.concatenate([ends * 0, cuts]), jnp.concatenate([cuts, ends])
    low, high = points.values[jnp.minimum(start, points.values.size - 1)], points.values[jnp.maximum(stop - 1, 0)]
    count, mean = means(points, start, stop)
    # Rounding may not carry a mean past the run's own ends: a cluster of equal values is that value.
    mean = jnp.where(count > 0, jnp.clip(mean, low, high), table)
    return Runs(count, mean, low, high, start, stop)


def means(points: Points, start: jax.Array, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many weights lie at the points ``start`` to ``stop - 1`` of each run, and their mean."""
    count = points.before[stop] - points.before[start]
    return count, run_sums(points, start, stop) / jnp.maximum(count, 1).astype(points.values.dtype)


def _gains(points: Points, runs: Runs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """By how much the inertia falls where each run is cut at its mean, and the means of both parts."""
    cut = jnp.searchsorted(points.values, runs.mean, side="right").astype(jnp.int32)
    cut = jnp.clip(cut, runs.start, runs.stop)
    count, mean = means(points, jnp.concatenate([runs.start, cut]), jnp.concatenate([cut, runs.stop]))
    (left, right), (left_mean, right_mean) = jnp.split(count, 2), jnp.split(mean, 2)
    return _joining(left, left_mean, right, right_mean), left_mean, right_mean


def _joining(n: jax.Array, a: jax.Array, m: jax.Array, b: jax.Array) -> jax.Array:
    """By how much the inertia grows where n weights of mean a and m of mean b become one cluster."""
    x, y = n.astype(a.dtype), m.astype(a.dtype)
    return x * (y / jnp.maximum(x + y, 1)) * (b - a) ** 2


def _swapped(points: Points, table: jax.Array) -> jax.Array:
    """Joins two neighbours and splits another run as long as that pays: entries go where they serve more.

    Source: Patanè and Russo 2001, "The enhanced LBG algorithm", whose shift of codewords this is in one dimension,
    where neighbours are known and a run is cut at its mean.
    """
    index = jnp.arange(table.size, dtype=jnp.int32)

    def pays(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, paid, i = carry
        return paid & (i < 2 * table.size)

    def swap(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        table, _, i = carry
        runs = runs_of(points, table)
        gain, left, right = _gains(points, runs)
        split = jnp.argmax(gain).astype(jnp.int32)
        cost = _joining(runs.number[:-1], runs.mean[:-1], runs.number[1:], runs.mean[1:])
        apart = (index[:-1] != split) & (index[1:] != split)
        cost = jnp.where(apart, cost, jnp.inf)
        join = jnp.argmin(cost).astype(jnp.int32)
        x, y = runs.number[join].astype(table.dtype), runs.number[join + 1].astype(table.dtype)
        share = y / jnp.maximum(x + y, 1)
        joined = runs.mean[join] + (runs.mean[join + 1] - runs.mean[join]) * share
        paid = gain[split] > cost[join] * 1.01
        new = jnp.where(index == join, joined, jnp.where(index == join + 1, right[split], runs.mean))
        new = lloyd(points, jnp.sort(jnp.where(index == split, left[split], new)), 2)
        return jnp.where(paid, new, table), paid, i + 1

    return jax.lax.while_loop(pays, swap, (table, jnp.bool_(True), jnp.int32(0)))[0]


def _respaced(points: Points, table: jax.Array) -> jax.Array:
    """Spaces the entries evenly in the integral of the cube root of the density, as the runs show it.

    A run of width d and density f has inertia ``f d**3 / 12`` and ``f**(1/3) d`` of that integral: the cube root of its
    inertia, but for a factor. A run of one value keeps its entry. Where Lloyd's iterations would need some K**2 rounds
    to carry entries from one end of the table to the other, this takes one.
    """
    runs = runs_of(points, table)
    gain = _gains(points, runs)[0]
    single = (runs.number > 0) & (gain <= 0)
    mass = jnp.cbrt(gain)
    rest = jnp.maximum(table.size - jnp.sum(single), 0).astype(mass.dtype)
    mass = jnp.where(single, 1.0, mass * (rest / jnp.maximum(jnp.sum(mass), jnp.finfo(mass.dtype).tiny)))
    ends = jnp.cumsum(mass)
    wanted = (jnp.arange(table.size).astype(mass.dtype) + 0.5) * (ends[-1] / table.size)
    run = jnp.minimum(jnp.searchsorted(ends, wanted, side="right"), table.size - 1)
    part = jnp.clip((wanted - (ends[run] - mass[run])) / jnp.maximum(mass[run], jnp.finfo(mass.dtype).tiny), 0.0, 1.0)
    return jnp.sort(runs.low[run] + part * (runs.high[run] - runs.low[run]))
