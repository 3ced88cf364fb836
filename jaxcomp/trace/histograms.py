"""What a histogram says of ranges: percentiles, squared errors, divergences. NumPy in 64 bits, on the host."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np

from jaxcomp.trace.calibrate import BINS, EDGES

Ends = tuple[float, float]
_OCTAVES, _BOTH = 20, 12
_BINS = 2048


class Histogram(NamedTuple):
    """Occupied intervals in ascending order, cut at the extremes; zeros apart, for they are on every grid.

    Attributes:
      left, right: their ends, (n,).
      counts: how many elements each holds, (n,), uint64.
      zeros: how many are 0.
      low, high: the extremes.
    """

    left: np.ndarray
    right: np.ndarray
    counts: np.ndarray
    zeros: int
    low: float
    high: float

    @property
    def top(self) -> float:
        """The largest magnitude."""
        return max(-self.low, self.high)


def histogram(counts: np.ndarray, low: float, high: float) -> Histogram:
    """Counts of one layer as intervals.

    Args:
      counts: (2, SIDE), of magnitudes below and from 0 on, as ``Stats`` has them.
      low, high: the finite extremes.
    """
    near, far = EDGES[1:BINS], EDGES[2:]
    left, right = np.concatenate([-far[::-1], near]), np.concatenate([-near[::-1], far])
    every = np.concatenate([counts[0, 1:BINS][::-1], counts[1, 1:BINS]])
    there = every > 0
    left, right = (np.clip(edges[there], low, high) for edges in (left, right))
    return Histogram(left, right, every[there], int(counts[:, 0].sum()), low, high)


def quantiles(h: Histogram, beyond: Fraction) -> Ends:
    """The ends of what is left without the part ``beyond`` of the elements other than 0 at each end.

    The nearest rank, exactly, and inside of its interval by that rank. Zeros, where there are any, are within.
    """
    total = int(h.counts.sum())
    out = total * beyond.numerator // beyond.denominator
    if out == 0:
        return h.low, h.high
    low, high = _of_rank(h, out), _of_rank(h, total - 1 - out)
    return (min(low, 0.0), max(high, 0.0)) if h.zeros else (low, high)


def _of_rank(h: Histogram, rank: int) -> float:
    until = np.cumsum(h.counts)
    i = int(np.searchsorted(until, np.uint64(rank), side="right"))
    inside = (rank - int(until[i] - h.counts[i]) + 0.5) / int(h.counts[i])
    return float(h.left[i] + inside * (h.right[i] - h.left[i]))


def clipped_energy(h: Histogram, ends: Ends) -> float:
    """How much of the sum of squares is the squared error of clipping to a range and 0, between 0 and 1."""
    if not h.counts.size:
        return 0.0
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    middle = (h.left + h.right) / 2
    return float(np.sum(h.counts * (middle - np.clip(middle, low, high)) ** 2) / np.sum(h.counts * middle**2))


class Lattice(NamedTuple):
    """Uniform grids with a level at 0: the step, and how many steps there are below and above 0; one each, (m,)."""

    step: np.ndarray
    below: np.ndarray
    above: np.ndarray


def lattice(low: np.ndarray, high: np.ndarray, bits: int, symmetric: bool) -> Lattice:
    """The grids of ranges that hold 0, as activations are put on them."""
    if symmetric:
        half = 2.0 ** (bits - 1)
        step = np.maximum(-low, high) / (half - 0.5)
        return Lattice(step, np.full_like(step, half), np.full_like(step, half - 1))
    step = (high - low) / (2**bits - 1)
    zero = np.ceil(-low / step - (0.5 + 1e-6))  # a half goes to 0
    return Lattice(step, zero, 2**bits - 1 - zero)


def squared_errors(h: Histogram, grids: Lattice) -> np.ndarray:
    """The summed squared error of rounding to each grid, (m,), where elements lie evenly in their intervals.

    The integral of ``(Q(x) - x)²`` is ``step³ (k / 12 + f³ / 3)`` at ``x = (k + f) step`` with ``k`` the nearest level.
    """
    step, below, above = (v[:, None] for v in grids)

    def at(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        steps = x / step
        k = np.clip(np.rint(steps), -below, above)
        return k, steps - k

    (k0, f0), (k1, f1) = at(h.left), at(h.right)
    width = (h.right - h.left) / step
    wide = width > 0
    mean = np.where(wide, ((k1 - k0) / 12 + (f1**3 - f0**3) / 3) / np.where(wide, width, 1), f0**2)
    return np.sum(h.counts * mean, axis=1) * grids.step**2


def least_squares(h: Histogram, bits: int, symmetric: bool) -> Ends:
    """The range whose grid has the least squared error, among them that of the extremes.

    A symmetric grid, and one of elements of one sign, has one end: first octaves are tried, then sixteenths of them
    around the best. Else both are tried in all pairs of octaves, then in turns.
    """
    low, high = (-h.top, h.top) if symmetric else (min(h.low, 0.0), max(h.high, 0.0))
    if low == high:
        return low, high
    found = (np.inf, 1.0, 1.0)

    def tried(lows: np.ndarray, highs: np.ndarray) -> None:
        nonlocal found
        errors = squared_errors(h, lattice(low * lows, high * highs, bits, symmetric))
        i = int(np.argmin(errors))
        if errors[i] < found[0]:
            found = float(errors[i]), float(lows[i]), float(highs[i])

    octaves, around = 2.0 ** -np.arange(_OCTAVES), 2.0 ** (np.arange(16, -17, -1) / 16)
    tried(octaves, octaves)
    tried(*np.minimum(np.array(found[1:])[:, None] * around, 1))
    if symmetric or low == 0 or high == 0:
        return low * found[1] + 0.0, high * found[2] + 0.0
    few = np.append(octaves[:_BOTH], 0.0)
    tried(np.repeat(few, few.size)[:-1], np.tile(few, few.size)[:-1])
    before = np.inf
    while found[0] < before:
        before, one = found[0], np.ones_like(around)
        tried(np.minimum(found[1] * around, 1), found[2] * one)
        tried(found[1] * one, np.minimum(found[2] * around, 1))
    return low * found[1] + 0.0, high * found[2] + 0.0


def least_divergence(h: Histogram, bits: int, symmetric: bool) -> Ends:
    """The range whose quantized distribution of magnitudes diverges least from the clipped one.

    Equal bins do not resolve what lies far below an outlier: the ends that are tried are smaller by sixteenths until
    half of the elements are above the first 128th, and where the smallest one that was tried is the best.
    """
    top, most = h.top, 2 ** (bits - symmetric)
    if not h.counts.size:
        return 0.0, 0.0
    bins = max(_BINS, 16 * most)
    ends = np.arange(bins // 16, bins + 1, bins // 128)
    smallest = top * 2.0**-_OCTAVES
    while True:
        fine, beyond = _magnitudes(h, top, bins)
        if fine[: bins // 128].sum() > (fine.sum() + beyond) / 2 and top / 16 >= smallest:
            top /= 16
            continue
        found = [_divergence(fine, end, _levels(h, top * end / bins, most, symmetric), beyond) for end in ends]
        last = len(ends) - 1 - int(np.argmin(found[::-1]))  # the widest of equals
        if last > 0 or top / 16 < smallest:
            break
        top /= 16
    end = float(top * ends[last] / bins)
    return (-end, end) if symmetric else (max(-end, h.low), min(end, h.high))


def _levels(h: Histogram, end: float, most: int, symmetric: bool) -> int:
    """How many levels the magnitudes up to an end get: all where one sign has all elements."""
    if symmetric:
        return most
    return round(most * end / (min(end, max(h.high, 0.0)) + min(end, max(-h.low, 0.0))))


def _magnitudes(h: Histogram, top: float, bins: int) -> tuple[np.ndarray, float]:
    """The histogram of the magnitudes in equal bins up to ``top``, and how many are larger."""
    at = np.linspace(0, top, bins + 1)
    total = np.zeros(bins + 1)
    for side in (h.left < 0, h.left >= 0):
        edges = np.sort(np.abs(np.stack([h.left[side], h.right[side]])), axis=0).T
        counts = h.counts[side].astype(np.float64)
        order = np.argsort(edges[:, 0], kind="stable")
        until = np.cumsum(counts[order])
        if until.size:
            total += np.interp(at, edges[order].ravel(), np.stack([until - counts[order], until], 1).ravel())
    fine = np.diff(total)
    return np.where(fine > 1e-4, fine, 0), float(h.counts.sum() - total[-1])


def _divergence(fine: np.ndarray, end: int, levels: int, beyond: float) -> float:
    """``KL(P || Q)`` of the first ``end`` bins with all beyond in the last one, and of their mass spread by levels."""
    kept = fine[:end]
    there = kept > 0
    level = np.arange(end) * levels // end
    mass, among = np.bincount(level, kept, levels), np.bincount(level, there, levels)
    q = np.where(there, (mass / np.maximum(among, 1))[level], 0)
    p = kept.copy()
    p[-1] += fine[end:].sum() + beyond
    counted = p > 0
    if not there.any() or (q[counted] == 0).any():
        return np.inf
    p, q = p[counted] / p.sum(), q[counted] / q.sum()
    return float(np.sum(p * np.log(p / q)))
