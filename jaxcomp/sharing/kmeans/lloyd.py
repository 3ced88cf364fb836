"""Lloyd's iterations over sorted points, and a respacing that takes a table out of their local minima."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.sharing.kmeans.points import Points, run_sums


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

    >>> from jaxcomp.sharing.kmeans.points import points_of
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


def _gain(points: Points, runs: Runs) -> jax.Array:
    """By how much the inertia falls where each run is cut at its mean: its inertia, but for a factor."""
    cut = jnp.searchsorted(points.values, runs.mean, side="right").astype(jnp.int32)
    cut = jnp.clip(cut, runs.start, runs.stop)
    count, mean = means(points, jnp.concatenate([runs.start, cut]), jnp.concatenate([cut, runs.stop]))
    (n, m), (a, b) = jnp.split(count.astype(mean.dtype), 2), jnp.split(mean, 2)
    return n * (m / jnp.maximum(n + m, 1)) * (b - a) ** 2


def respaced(points: Points, table: Float[Array, " k"]) -> Float[Array, " k"]:
    """Spaces the entries by the density that their own runs show, three times, each followed by Lloyd's iterations.

    More than once, because an entry that serves no weight, as beside an outlier, says nothing of where it should be.
    """

    def once(i: jax.Array, table: jax.Array) -> jax.Array:
        return lloyd(points, _respaced_once(points, table), 4)

    return jax.lax.fori_loop(0, 3, once, table)


def _respaced_once(points: Points, table: Float[Array, " k"]) -> Float[Array, " k"]:
    """Spaces the entries evenly in the integral of the cube root of the density, as the runs show it.

    A run of width d and density f has inertia ``f d**3 / 12`` and ``f**(1/3) d`` of that integral: the cube root of its
    inertia, but for a factor. A run of one value keeps its entry. Where Lloyd's iterations would need some K**2 rounds
    to carry entries from one end of the table to the other, this takes one.
    """
    runs = runs_of(points, table)
    gain = _gain(points, runs)
    single = (runs.number > 0) & (gain <= 0)
    mass = jnp.cbrt(gain)
    rest = jnp.maximum(table.size - jnp.sum(single), 0).astype(mass.dtype)
    mass = jnp.where(single, 1.0, mass * (rest / jnp.maximum(jnp.sum(mass), jnp.finfo(mass.dtype).tiny)))
    ends = jnp.cumsum(mass)
    wanted = (jnp.arange(table.size).astype(mass.dtype) + 0.5) * (ends[-1] / table.size)
    run = jnp.minimum(jnp.searchsorted(ends, wanted, side="right"), table.size - 1)
    part = jnp.clip((wanted - (ends[run] - mass[run])) / jnp.maximum(mass[run], jnp.finfo(mass.dtype).tiny), 0.0, 1.0)
    return jnp.sort(runs.low[run] + part * (runs.high[run] - runs.low[run]))
