"""Lloyd's iterations over sorted points, and a respacing that takes a table out of their local minima."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.sharing.kmeans.points import Points, run_sums

_RESPACED = 6  # rounds


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


def respaced(points: Points, table: Float[Array, " k"]) -> Float[Array, " k"]:
    """Spaces the entries by the density that their own runs show, several times.

    More than once, because an entry that serves no weight, as beside an outlier, says nothing of where it should be.
    """
    return jax.lax.fori_loop(0, _RESPACED, lambda i, table: _respaced_once(points, table), table)


def _respaced_once(points: Points, table: Float[Array, " k"]) -> Float[Array, " k"]:
    """Spaces the entries evenly in the integral of the cube root of the density, as the runs show it.

    A run of n weights over a width d has ``(n d**2)**(1/3)`` of that integral. A run of one value keeps its entry.
    Where Lloyd's iterations would need some K**2 rounds to carry entries from one end of the table to the other, this
    takes one.
    """
    runs = runs_of(points, table)
    width = runs.high - runs.low
    single = (runs.number > 0) & (width <= 0)
    mass = jnp.cbrt(runs.number.astype(width.dtype) * width * width)
    rest = jnp.maximum(table.size - jnp.sum(single), 0).astype(mass.dtype)
    mass = jnp.where(single, 1.0, mass * (rest / jnp.maximum(jnp.sum(mass), jnp.finfo(mass.dtype).tiny)))
    ends = jnp.cumsum(mass)
    wanted = (jnp.arange(table.size).astype(mass.dtype) + 0.5) * (ends[-1] / table.size)
    run = jnp.minimum(jnp.searchsorted(ends, wanted, side="right"), table.size - 1)
    part = jnp.clip((wanted - (ends[run] - mass[run])) / jnp.maximum(mass[run], jnp.finfo(mass.dtype).tiny), 0.0, 1.0)
    return jnp.minimum(runs.low[run] + part * width[run], runs.high[run])  # ascending, as the runs are
