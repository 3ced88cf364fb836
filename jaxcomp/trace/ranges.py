"""Ranges from calibration statistics: (low, high) of what an activation's grid should cover."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.trace.calibrate import Stats
from jaxcomp.trace.exact import joined
from jaxcomp.trace.histograms import (
    Ends,
    Histogram,
    clipped_energy,
    histogram,
    least_divergence,
    least_squares,
    quantiles,
)


class Range(NamedTuple):
    """The interval that a grid covers; arrays with the statistics' layer axes."""

    low: jax.Array
    high: jax.Array


RangeOf = Callable[[Stats], Range]
"""Derives a range from statistics; it is not finite where they hold no element, an infinity or a NaN."""


def min_max(stats: Stats) -> Range:
    """From the smallest to the largest element seen.

    Args:
      stats: what :func:`~jaxcomp.trace.calibrate` saw of one activation.

    >>> from jaxcomp.trace import calibrate
    >>> x = np.float32([[-1, 0.5], [2, 0]])
    >>> stats = calibrate(lambda p, x: x @ p["w"])({"w": np.ones((2, 2), np.float32)}, x)["w"]
    >>> r = min_max(stats)
    >>> round(float(r.low), 3), round(float(r.high), 3)
    (-1.0, 2.0)
    """
    return Range(stats.low, stats.high)


def absmax(stats: Stats) -> Range:
    """``(-a, a)`` with ``a`` the largest magnitude seen.

    Args:
      stats: what :func:`~jaxcomp.trace.calibrate` saw of one activation.

    >>> from jaxcomp.trace import calibrate
    >>> x = np.float32([[-1, 0.5], [2, 0]])
    >>> stats = calibrate(lambda p, x: x @ p["w"])({"w": np.ones((2, 2), np.float32)}, x)["w"]
    >>> r = absmax(stats)
    >>> round(float(r.low), 3), round(float(r.high), 3)
    (-2.0, 2.0)
    """
    end = jnp.maximum(-stats.low, stats.high)
    return Range(-end, end)


def averaged(stats: Stats) -> Range:
    """The mean over batches of their smallest and largest elements.

    A moving average without an order: unlike an exponential one it is the same for every order of the batches.

    Args:
      stats: what :func:`~jaxcomp.trace.calibrate` saw of one activation.

    >>> from jaxcomp.trace import calibrate
    >>> x = np.float32([[-1, 0.5], [2, 0]])
    >>> stats = calibrate(lambda p, x: x @ p["w"])({"w": np.ones((2, 2), np.float32)}, x)["w"]
    >>> r = averaged(stats)
    >>> round(float(r.low), 3), round(float(r.high), 3)
    (-1.0, 2.0)
    """
    batches = stats.batches.rounded()
    return Range(stats.low_sum.rounded() / batches, stats.high_sum.rounded() / batches)


def percentile(q: float) -> RangeOf:
    """The interval without the ``100 - q`` percent at each end of the elements that are not 0, by the nearest rank.

    Zeros do not count: they are on the grid whatever its range, and where most elements are zeros, as after a relu or
    in padding, the range would be that of zeros. It is exact to the histogram's bins, a sixteenth of an octave.

    Raises:
      ValueError: q outside (50, 100].

    >>> from jaxcomp.trace import calibrate
    >>> x = np.float32([[-1, 0.5], [2, 0]])
    >>> stats = calibrate(lambda p, x: x @ p["w"])({"w": np.ones((2, 2), np.float32)}, x)["w"]
    >>> r = percentile(60.0)(stats)
    >>> round(float(r.low), 3), round(float(r.high), 3)
    (0.0, 0.516)
    """
    if not isinstance(q, numbers.Real) or not 50 < q <= 100:
        raise ValueError(f"percentile: q must be in (50, 100], got {q!r}.")
    return partial(_found, lambda h: quantiles(h, 1 - Fraction(str(q)) / 100))


def mse(bits: int, *, symmetric: bool = False) -> RangeOf:
    """The range with the least squared error of the values on its grid of ``bits`` bits, clipped and rounded.

    Never worse than ``min_max``, but for what the histogram does not resolve. Both ends are searched, or for a
    symmetric grid the one that there is; an end at 0 stays there.

    Args:
      bits: of the codes.
      symmetric: whether the grid is, as of ``Act``.

    >>> from jaxcomp.trace import calibrate
    >>> x = np.float32([[-1, 0.5], [2, 0]])
    >>> stats = calibrate(lambda p, x: x @ p["w"])({"w": np.ones((2, 2), np.float32)}, x)["w"]
    >>> r = mse(2)(stats)
    >>> round(float(r.low), 3), round(float(r.high), 3)
    (-0.917, 1.834)

    Source: Banner et al. 2019, arXiv:1810.05723, with the histogram in place of a fitted density, and the error of each
    level in place of the step's twelfth.
    """
    _check_bits("mse", bits)
    return partial(_found, lambda h: least_squares(h, bits, symmetric))


def entropy(bits: int, *, symmetric: bool = False) -> RangeOf:
    """The range whose quantized distribution of magnitudes has the least divergence from the clipped one.

    ``argmin KL(P || Q)``: ``P`` the histogram with what is clipped put in its last bin, ``Q`` the mass of each level
    spread over its occupied bins. The histogram is resampled to 2048 equal bins or more up to the largest magnitude;
    121 ends from a sixteenth of it on are tried, and smaller ones where that sixteenth is the best; of equals the
    widest. Of a grid that is not symmetric the range ends where the elements do, and a sign that they all have gets all
    levels.

    Args:
      bits: of the codes.
      symmetric: whether the grid is, as of ``Act``.

    >>> from jaxcomp.trace import calibrate
    >>> x = np.float32([[-1, 0.5], [2, 0]])
    >>> stats = calibrate(lambda p, x: x @ p["w"])({"w": np.ones((2, 2), np.float32)}, x)["w"]
    >>> r = entropy(2)(stats)
    >>> round(float(r.low), 3), round(float(r.high), 3)
    (-1.0, 2.0)

    Source: Migacz 2017, "8-bit inference with TensorRT", GTC S7310. Deviation: zeros do not count, for they are on
    every grid.
    """
    _check_bits("entropy", bits)
    return partial(_found, lambda h: least_divergence(h, bits, symmetric))


def lost_energy(stats: Stats, found: Range) -> float:
    """The part of the sum of squares that clipping to a range takes away, of the layer that loses most; on the host."""
    layers = zip(
        _layers(stats.counts.total(), np.asarray(stats.low), np.asarray(stats.high)), *map(np.ravel, found), strict=True
    )
    return max((clipped_energy(h, (low, high)) for h, low, high in layers if h is not None), default=0.0)


def _check_bits(owner: str, bits: int) -> None:
    if not isinstance(bits, numbers.Integral) or not 2 <= bits <= 8:
        raise ValueError(f"{owner}: bits must be in 2..8, got {bits!r}.")


def _found(method: Callable[[Histogram], Ends], stats: Stats) -> Range:
    """``method`` for every layer in front of the statistics; where there is no histogram, NaN."""

    def on_host(low_words: np.ndarray, high_words: np.ndarray, *seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        words = np.asarray(low_words), np.asarray(high_words)
        layers = _layers(joined(*words), *map(np.asarray, seen))
        ends = [(np.nan, np.nan) if h is None else method(h) for h in layers]
        lows, highs = np.asarray(ends, np.float64).astype(np.float32).reshape(-1, 2).T
        return lows.reshape(np.shape(seen[0])), highs.reshape(np.shape(seen[0]))

    given = stats.counts.low, stats.counts.high, stats.low, stats.high
    if not any(isinstance(x, jax.core.Tracer) for x in given):
        return Range(*map(jnp.asarray, on_host(*map(np.asarray, given))))
    like = jax.ShapeDtypeStruct(stats.low.shape, jnp.float32)
    return Range(*jax.pure_callback(on_host, (like, like), *given, vmap_method="expand_dims"))


def _layers(counts: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[Histogram | None]:
    """The histogram of each layer; None where nothing was seen, or something that is not finite."""
    counts = np.asarray(counts).reshape(-1, *counts.shape[-2:])
    ends = zip(np.ravel(low).astype(np.float64), np.ravel(high).astype(np.float64), strict=True)
    return [
        histogram(c, float(lo), float(hi)) if np.isfinite(lo) and np.isfinite(hi) else None
        for c, (lo, hi) in zip(counts, ends, strict=True)
    ]
