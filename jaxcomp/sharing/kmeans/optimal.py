"""Optimal one-dimensional k-means by dynamic programming, on the host."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def optimal_table(
    values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], clusters: int
) -> Float[np.ndarray, " clusters"]:
    """The ascending table of least ``Σ weight (value - nearest entry)**2``; of fewer values the last one repeats.

    Clusters are runs of the sorted values, so with ``cost(i, j)`` that of one run,
    ``D_k(j) = min over i of D_(k-1)(i) + cost(i, j)``. The best i grows with j: so the middle j's choice bounds those
    on both of its sides, and all j of one depth are found in one vectorized pass: O(K N log N).

    Args:
      values: ascending.
      weights: positive.
      clusters: entries.

    >>> optimal_table(np.array([0.0, 1.0, 5.0, 7.0]), np.ones(4), 2)
    array([0.5, 6. ])

    Source: Grønlund et al. 2017, arXiv:1701.07204, section 2.2 (the divide-and-conquer algorithm).
    """
    number = min(clusters, values.size)
    sums = _Sums(values, weights)
    best = sums.cost(np.zeros(values.size + 1, np.int64), np.arange(values.size + 1))
    choices = []
    for _ in range(number - 1):
        best, choice = _one_more(best, sums)
        choices.append(choice)
    ends = [values.size]
    for choice in reversed(choices):
        ends.append(int(choice[ends[-1]]))
    edges = np.array([0, *reversed(ends)])
    means = sums.mean(edges[:-1][np.diff(edges) > 0], edges[1:][np.diff(edges) > 0])
    return np.concatenate([means, np.full(clusters - means.size, means[-1])])


class _Sums:
    """Prefix sums of the weights and moments, about the mean so that little cancels."""

    def __init__(self, values: np.ndarray, weights: np.ndarray) -> None:
        self.center = float(np.average(values, weights=weights))
        x = values - self.center
        self.mass, self.first, self.second = (
            np.concatenate([[0.0], np.cumsum(m)]) for m in (weights, weights * x, weights * x * x)
        )

    def cost(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        mass = self.mass[stop] - self.mass[start]
        first = self.first[stop] - self.first[start]
        spread = self.second[stop] - self.second[start] - first * first / np.where(mass > 0, mass, 1)
        return np.maximum(spread, 0)

    def mean(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        return (self.first[stop] - self.first[start]) / (self.mass[stop] - self.mass[start]) + self.center


def _one_more(best: np.ndarray, sums: _Sums) -> tuple[np.ndarray, np.ndarray]:
    """The costs with one cluster more, and where the last cluster starts."""
    size = best.size
    out, choice = np.empty(size), np.zeros(size, np.int64)
    step = 1 << (size - 1).bit_length()
    while step:
        j = np.arange(step - 1, size, 2 * step)
        left, right = j - step, j + step
        low = np.where(left >= 0, choice[np.maximum(left, 0)], 0)
        high = np.where(right < size, np.minimum(choice[np.minimum(right, size - 1)], j), j)
        if j.size:
            out[j], choice[j] = _least(best, sums, j, low, high)
        step //= 2
    return out, choice


def _least(
    best: np.ndarray, sums: _Sums, j: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each j the least of ``best(i) + cost(i, j)`` over i in low to high, and the first i that has it."""
    length = high - low + 1
    start = np.cumsum(length) - length
    i = np.arange(int(length.sum())) - np.repeat(start - low, length)
    total = best[i] + sums.cost(i, np.repeat(j, length))
    least = np.minimum.reduceat(total, start)
    first = np.minimum.reduceat(np.where(total == np.repeat(least, length), i, best.size), start)
    return least, first
