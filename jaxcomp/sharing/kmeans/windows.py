"""Near-optimal tables: a dynamic program that moves all borders at once, each within a window."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomp.sharing.kmeans.lloyd import lloyd, means, runs_of
from jaxcomp.sharing.kmeans.points import Points

_FINE, _FEW = 32, 32  # pieces a run, up to so many entries; half of that where there are more
_ROUNDS = 6
_PAYS = 1e-4  # a round that gains less, of the inertia, is the last


class _Round(NamedTuple):
    """A table, whether the round that made it paid, and how many rounds there were."""

    table: jax.Array
    paid: jax.Array
    number: jax.Array


def windowed(points: Points, table: Float[Array, " k"]) -> Float[Array, " k"]:
    """A table of lower inertia: rounds of a dynamic program over pieces of the runs, each followed by Lloyd's.

    A round cuts each entry's run of points into pieces and finds the best borders among the ends of pieces up to one
    run away from the old ones. All borders may move together, so entries wander from where there are too many to where
    there are too few, which Lloyd's iterations do not do. A round costs O(K) of a fixed number of pieces, squared.
    """
    pieces = _FINE if table.size <= _FEW else _FINE // 2

    def goes_on(carry: _Round) -> jax.Array:
        return carry.paid & (carry.number < _ROUNDS)

    def one(last: _Round) -> _Round:
        table, paid = _moved(points, last.table, pieces)
        return _Round(lloyd(points, table, 8), paid, last.number + 1)

    return jax.lax.while_loop(goes_on, one, _Round(table, jnp.bool_(True), jnp.int32(0))).table


def _cuts(points: Points, table: jax.Array, pieces: int) -> Int[Array, " ends"]:
    """Where pieces start, as indices of points, and where the last ends; the run of entry k starts at ``k * pieces``.

    Half of the cuts are evenly spaced in the count of a run's weights, half between its extremes: some serve the bulk
    of the weights, some the outliers.
    """
    runs, half = runs_of(points, table), pieces // 2
    part = jnp.arange(half, dtype=jnp.int32)
    first = points.before[runs.start][:, None]
    count = points.before[runs.stop][:, None] - first
    by = part.astype(count.dtype)[None]
    rank = first + count // half * by + count % half * by // half
    at_ranks = jnp.searchsorted(points.before, rank, side="right").astype(jnp.int32) - 1
    low, high = runs.low[:, None], runs.high[:, None]
    evenly = low + (high - low) * (part.astype(low.dtype) * (1.0 / half))[None]
    at_values = jnp.searchsorted(points.values, evenly, side="left").astype(jnp.int32)
    cuts = jnp.concatenate([at_ranks, at_values], axis=1)
    cuts = jnp.sort(jnp.clip(cuts, runs.start[:, None], runs.stop[:, None]), axis=1).at[:, 0].set(runs.start)
    return jnp.concatenate([cuts.reshape(-1), jnp.full((1,), points.values.size, jnp.int32)])


def _moved(points: Points, table: jax.Array, pieces: int) -> tuple[jax.Array, jax.Array]:
    """The entries between the best borders, and whether that pays; the old ones where it is no gain."""
    cuts = _cuts(points, table, pieces)
    count, mean = means(points, cuts[:-1], cuts[1:])
    mean = jnp.where(count > 0, mean, points.values[jnp.minimum(cuts[:-1], points.values.size - 1)])
    mass = count.astype(mean.dtype)
    first = _borders(mass, mean, table.size, pieces)
    number, new = means(points, cuts[first], jnp.concatenate([cuts[first[1:]], cuts[-1:]]))
    new = jnp.where(number > 0, new, table)
    run = jnp.searchsorted(first, jnp.arange(mass.size, dtype=first.dtype), side="right") - 1
    before = jnp.sum(mass * (mean - jnp.repeat(table, pieces)) ** 2)  # but for what lies within a piece
    after = jnp.sum(mass * (mean - new[run]) ** 2)
    return jnp.where(after < before, jnp.sort(new), table), after < before * (1 - _PAYS)


def _borders(mass: jax.Array, mean: jax.Array, entries: int, pieces: int) -> Int[Array, " entries"]:
    """The piece that each run of the best cut starts with: no more than ``pieces`` from where it started before.

    ``best(k, c) = min over c' of best(k - 1, c') + cost(c', c)``, with the cost of a run from sums of powers of the
    distance from its first piece, so that what lies elsewhere takes no digits away.
    """
    choices, length = 2 * pieces + 1, 3 * pieces  # of a border; pieces from its first one to the last of the next
    mass, mean = jnp.pad(mass, (pieces, pieces)), jnp.pad(mean, (pieces, pieces))
    piece, choice = np.arange(length), np.arange(choices)
    inside = jnp.asarray(piece[:, None] < pieces + choice, mean.dtype)
    after = jnp.asarray(piece >= choice[:, None], mean.dtype)
    forward = jnp.asarray(pieces + choice >= choice[:, None])

    def stage(best: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        here, x = (jax.lax.dynamic_slice_in_dim(v, k * pieces, length) for v in (mass, mean))
        weight, away = here[None] * after, x[None] - x[:choices, None]
        powers = jnp.concatenate([weight, weight * away, weight * away * away])
        total, first, second = jnp.split(jnp.dot(powers, inside, precision=jax.lax.Precision.HIGHEST), 3)
        cost = jnp.maximum(second - first * first / jnp.maximum(total, 1), 0)
        over = jnp.where(forward, best[:, None] + cost, jnp.inf)
        return jnp.min(over, axis=0), jnp.argmin(over, axis=0).astype(jnp.int32)

    def back(chosen: jax.Array, came_from: jax.Array) -> tuple[jax.Array, jax.Array]:
        return came_from[chosen], came_from[chosen]

    start = jnp.where(jnp.asarray(choice == pieces), 0.0, jnp.inf).astype(mean.dtype)
    _, came_from = jax.lax.scan(stage, start, jnp.arange(entries, dtype=jnp.int32))
    _, chosen = jax.lax.scan(back, jnp.int32(pieces), came_from, reverse=True)
    return (jnp.arange(entries, dtype=jnp.int32) - 1) * pieces + chosen
