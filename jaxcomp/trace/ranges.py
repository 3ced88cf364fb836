"""Ranges from calibration statistics: (low, high) of what an activation's grid should cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.trace.calibrate import EDGES, Stats

_UPPER = np.append(EDGES[1:], 2 * EDGES[-1] - EDGES[-2])
_CENTERS = ((EDGES + _UPPER) / 2).astype(np.float32)
_FINE = 2048


class Range(NamedTuple):
    """The interval that a grid covers; arrays with the statistics' layer axes."""

    low: jax.Array
    high: jax.Array


RangeOf = Callable[[Stats], Range]
"""Derives a range from statistics."""


def min_max(stats: Stats) -> Range:
    """From the smallest to the largest element seen."""
    return Range(stats.low, stats.high)


def absmax(stats: Stats) -> Range:
    """``(-a, a)`` with ``a`` the largest magnitude seen."""
    return _symmetric(jnp.maximum(-stats.low, stats.high))


def averaged(stats: Stats) -> Range:
    """The mean over batches of their smallest and largest elements.

    A moving average without an order: unlike an exponential one it is the same for every order of the batches.
    """
    return Range(stats.low_sum / stats.batches, stats.high_sum / stats.batches)


def percentile(q: float) -> RangeOf:
    """The interval without the ``100 - q`` percent at each end, interpolated in the histogram's bins.

    Raises:
      ValueError: q outside (50, 100].
    """
    if not 50 < q <= 100:
        raise ValueError(f"percentile: q must be in (50, 100], got {q!r}.")
    edges = jnp.asarray(np.concatenate([-_UPPER[::-1], [0.0], _UPPER]), jnp.float32)

    def one(counts: jax.Array, low: jax.Array, high: jax.Array) -> Range:
        total = jnp.cumsum(jnp.concatenate([jnp.zeros(1), counts[0, ::-1], counts[1]]))
        ends = jnp.interp(jnp.asarray([1 - q / 100, q / 100]) * total[-1], total, edges)
        return Range(jnp.clip(ends[0], low, high), jnp.clip(ends[1], low, high))

    return lambda stats: _by_layer(one, stats)


def mse(bits: int) -> RangeOf:
    """The symmetric range with the least expected squared error of a uniform grid of ``bits`` bits.

    ``Σ n(x) e(x)`` with ``e = (|x| - a)²`` beyond the range ``a``, ``x²`` below half a step, ``step²/12`` between; the
    least of 128 candidates ``a = absmax · 2**(-k/16)``.

    Source: Banner et al. 2019, arXiv:1810.05723, with the histogram in place of a fitted density.
    """
    _check_bits("mse", bits)
    centers = jnp.asarray(_CENTERS)

    def one(counts: jax.Array, low: jax.Array, high: jax.Array) -> Range:
        top = jnp.maximum(-low, high)
        ends = top * 2.0 ** (-jnp.arange(128, dtype=jnp.float32) / 16)
        step = ends / (2 ** (bits - 1) - 0.5)

        def error(end: jax.Array, width: jax.Array) -> jax.Array:
            x = jnp.minimum(centers, top)
            inside = jnp.where(x < width / 2, x**2, width**2 / 12)
            return jnp.sum(counts.sum(0) * jnp.where(x > end, (x - end) ** 2, inside))

        return _symmetric(ends[jnp.argmin(jax.vmap(error)(ends, step))])

    return lambda stats: _by_layer(one, stats)


def entropy(bits: int) -> RangeOf:
    """The symmetric range whose quantized distribution of magnitudes has the least divergence from the clipped one.

    ``argmin KL(P || Q)``: ``P`` the histogram with what is clipped put in its last bin, ``Q`` each of the
    ``2**(bits-1)`` levels' mass spread over its occupied bins. The histogram is resampled to 2048 equal bins up to the
    largest magnitude; 121 ends from 128 to 2048 bins are tried.

    Source: Migacz 2017, "8-bit inference with TensorRT", GTC S7310.
    """
    _check_bits("entropy", bits)
    levels = 2 ** (bits - 1)
    bins = jnp.arange(_FINE)

    def divergence(fine: jax.Array, end: jax.Array) -> jax.Array:
        kept = jnp.where(bins < end, fine, 0.0)
        clipped = jnp.where(bins == end - 1, kept + fine.sum() - kept.sum(), kept)
        level = jnp.minimum(bins * levels // end, levels - 1)
        occupied = (kept > 0).astype(jnp.float32)
        mass = jnp.zeros(levels).at[level].add(kept)
        spread = jnp.zeros(levels).at[level].add(occupied)
        q = occupied * (mass / jnp.maximum(spread, 1))[level]
        p, q = clipped / clipped.sum(), q / q.sum()
        return jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.maximum(p, 1e-30)) - jnp.log(jnp.maximum(q, 1e-9))), 0.0))

    def one(counts: jax.Array, low: jax.Array, high: jax.Array) -> Range:
        top = jnp.maximum(-low, high)
        total = jnp.concatenate([jnp.zeros(1), jnp.cumsum(counts.sum(0))])
        at = jnp.concatenate([jnp.zeros(1), jnp.minimum(jnp.asarray(_UPPER, jnp.float32), top)])
        fine = jnp.diff(jnp.interp(jnp.arange(_FINE + 1, dtype=jnp.float32) * top / _FINE, at, total))
        ends = jnp.arange(128, _FINE + 1, 16)
        best = ends[jnp.argmin(jax.vmap(lambda end: divergence(fine, end))(ends))]
        return _symmetric(best.astype(jnp.float32) * top / _FINE)

    return lambda stats: _by_layer(one, stats)


def _check_bits(owner: str, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"{owner}: bits must be in 2..8, got {bits!r}.")


def _symmetric(end: jax.Array) -> Range:
    return Range(-end, end)


def _by_layer(one: Callable[[jax.Array, jax.Array, jax.Array], Range], stats: Stats) -> Range:
    """``one`` for every layer in front of the statistics."""
    for _ in range(jnp.ndim(stats.low)):
        one = jax.vmap(one)
    return one(stats.counts, stats.low, stats.high)
