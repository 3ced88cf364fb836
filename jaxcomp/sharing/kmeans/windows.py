"""Near-optimal tables: a dynamic program that moves all borders at once, each within a window."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomp.sharing.kmeans.lloyd import means, runs_of
from jaxcomp.sharing.kmeans.points import Points, place_of_rank

_ROUNDS = 6
_SMALL = 1 << 12  # up to so many points, which may be those of many tables at once, less will do


class _Effort(NamedTuple):
    """How many pieces a run is cut into, and the part of the inertia that a round must gain to be followed by one."""

    pieces: int
    pays: float


_MUCH, _LITTLE = _Effort(16, 1e-4), _Effort(8, 5e-2)


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
    effort = _LITTLE if points.values.size <= _SMALL else _MUCH

    def goes_on(carry: _Round) -> jax.Array:
        return carry.paid & (carry.number < _ROUNDS)

    def one(last: _Round) -> _Round:
        table, paid = _moved(points, last.table, effort)
        return _Round(table, paid, last.number + 1)

    return jax.lax.while_loop(goes_on, one, _Round(table, jnp.bool_(True), jnp.int32(0))).table


def _cuts(points: Points, table: jax.Array, pieces: int) -> Int[Array, " ends"]:
    """Where pieces start, as indices of points, and where the last ends; the run of entry k starts at ``pieces k``.

    Half of the cuts are evenly spaced between a run's extremes: they part the outliers, and equal values. Half are by
    count, from a weight beside the run's ends up to a half: borders that are nearly right are set to the weight.
    """
    runs, quarter = runs_of(points, table), pieces // 4
    first, stop = points.before[runs.start][:, None], points.before[runs.stop][:, None]
    count = stop - first
    share = np.concatenate([[0], 2.0 ** np.arange(-4, 0, 4 // quarter)])
    by = (count.astype(table.dtype) * jnp.asarray(share, table.dtype)[None]).astype(count.dtype)
    by = jnp.maximum(by, jnp.arange(quarter + 1, dtype=count.dtype)[None])
    at_ranks = place_of_rank(points, jnp.concatenate([first + by, stop - jnp.minimum(by[:, 1:-1], stop)], axis=1))
    low, high = runs.low[:, None], runs.high[:, None]
    part = np.arange(1, 2 * quarter + 1) / (2 * quarter + 1)
    evenly = low + (high - low) * jnp.asarray(part, low.dtype)[None]
    at_values = jnp.searchsorted(points.values, evenly, side="left").astype(jnp.int32)
    cuts = jnp.clip(jnp.concatenate([at_ranks, at_values], axis=1), runs.start[:, None], runs.stop[:, None])
    cuts = jnp.sort(cuts, axis=1).at[:, 0].set(runs.start)
    return jnp.concatenate([cuts.reshape(-1), jnp.full((1,), points.values.size, jnp.int32)])


def _moved(points: Points, table: jax.Array, effort: _Effort) -> tuple[jax.Array, jax.Array]:
    """The entries between the best borders, and whether that pays; the old ones where it is no gain."""
    cuts = _cuts(points, table, effort.pieces)
    count, mean = means(points, cuts[:-1], cuts[1:])
    sums = _sums_about(count.astype(mean.dtype), mean, table)
    new, before, after = _best(sums, table)
    return jnp.where(after < before, jnp.sort(new), table), after < before * (1 - effort.pays)


def _sums_about(mass: jax.Array, mean: jax.Array, table: jax.Array) -> Float[Array, "k 3 ends"]:
    """For each entry, sums of mass, distance and its square over the pieces of its run and of both its neighbours.

    Distances are from the entry, and each end of a piece has the sum from the window's middle to there, negative to
    its left: a difference of two loses nothing to what lies farther out.
    """
    entries, pieces = table.size, mean.size // table.size

    def windows(v: jax.Array) -> jax.Array:
        rows = jnp.pad(v.reshape(entries, pieces), ((1, 1), (0, 0)))
        return jnp.concatenate([rows[:-2], rows[1:-1], rows[2:]], axis=1)

    weight, middle = windows(mass), 3 * pieces // 2
    away = jnp.where(weight > 0, windows(mean) - table[:, None], jnp.zeros((), mean.dtype))
    powers = jnp.stack([weight, weight * away, weight * away * away], axis=1)
    right = jnp.cumsum(powers[..., middle:], axis=-1)
    left = jax.lax.cumsum(powers[..., :middle], axis=2, reverse=True)
    return jnp.concatenate([-left, jnp.zeros((entries, 3, 1), mean.dtype), right], axis=-1)


def _best(sums: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The means between the best borders, and the inertia (but for what lies within a piece) before and after.

    ``best(k, c) = min over c' of best(k - 1, c') + cost(c', c)``: c' and c are the ends of pieces up to one run away
    from the run's old borders. An entry without a weight stays.
    """
    pieces = sums.shape[-1] // 3
    choice = np.arange(2 * pieces + 1, dtype=np.int32)

    def cost(left: jax.Array, right: jax.Array) -> jax.Array:
        number, first, second = right - left
        return jnp.maximum(second - first * first / jnp.maximum(number, 1), 0)

    def stage(best: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        left, right = own[:, : choice.size], own[:, pieces:]
        least = jnp.full(choice.size, jnp.inf, best.dtype)
        for i in choice:  # three times as fast on CPU as a reduction, whose inner loop is not vectorized
            over = best[i] + cost(left[:, i : i + 1], right)
            least = jnp.minimum(least, jnp.where(jnp.asarray(i <= pieces + choice), over, jnp.inf))
        return least, best

    def back(chosen: jax.Array, stage: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        own, best = stage
        right = jax.lax.dynamic_index_in_dim(own, pieces + chosen, 1)
        over = best + cost(own[:, : choice.size], right)
        came = jnp.argmin(jnp.where(jnp.asarray(choice) <= pieces + chosen, over, jnp.inf)).astype(jnp.int32)
        return came, (right - jax.lax.dynamic_index_in_dim(own, came, 1))[:2, 0]

    start = jnp.where(jnp.asarray(choice == pieces), 0.0, jnp.inf).astype(table.dtype)
    after, bests = jax.lax.scan(stage, start, sums)
    _, moments = jax.lax.scan(back, jnp.int32(pieces), (sums, bests), reverse=True)
    number, first = moments[:, 0], moments[:, 1]
    new = table + first / jnp.maximum(number, 1)
    before = jnp.sum(cost(sums[:, :, pieces].T, sums[:, :, 2 * pieces].T))
    return new, before, after[pieces]
