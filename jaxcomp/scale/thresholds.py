"""Exactly the k-th smallest of keys that come a piece at a time, in two passes and half a megabyte."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint32]
_DIGITS = 1 << 16
_CHUNK = 1 << 20


class Threshold(NamedTuple):
    """Where the k smallest of many keys end.

    Fields:
      key: the k-th smallest.
      ties: how many of the keys equal to it are among the k.
    """

    key: int
    ties: int


def threshold(passes: Callable[[], Iterable[Keys]], count: Callable[[int], int]) -> Threshold:
    """The threshold of the ``count(total)`` smallest keys.

    The histogram of the keys' high half-words says in which bucket the k-th is, that of the bucket's low ones which it
    is. Counts are Python's: there is no limit to how many keys there are.

    Args:
      passes: gives the keys, in pieces; called twice.
      count: from how many keys there are to k.

    Raises:
      ValueError: k is above the number of keys.

    >>> threshold(lambda: [np.uint32([5, 1]), np.uint32([5, 70000])], lambda total: total // 2)
    Threshold(key=5, ties=1)
    """
    high = _histogram(passes(), lambda keys: keys >> np.uint32(16))
    total = int(high.sum())
    k = count(total)
    if k > total:
        raise ValueError(f"prune: {total} units, fewer than the {k} to prune; take a smaller count, or a fraction.")
    if k == 0:
        return Threshold(0, 0)
    digit, left = _place(high, k)
    low = _histogram(passes(), lambda keys: keys[keys >> np.uint32(16) == digit] & np.uint32(0xFFFF))
    last, ties = _place(low, left)
    return Threshold(digit << 16 | last, ties)


def _histogram(pieces: Iterable[Keys], digits: Callable[[Keys], Keys]) -> NDArray[np.int64]:
    counts = np.zeros(_DIGITS, np.int64)
    for keys in pieces:
        flat = keys.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            counts += np.bincount(digits(flat[start : start + _CHUNK]).astype(np.intp), minlength=_DIGITS)
    return counts


def _place(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The digit of the rank-th smallest, and its rank among the equal ones."""
    sums = np.cumsum(counts)
    digit = int(np.searchsorted(sums, rank))
    return digit, rank - int(sums[digit] - counts[digit])


def below(keys: Keys, alive: NDArray[np.bool_] | None, at: Threshold) -> tuple[int, int]:
    """How many keys are below a threshold, and how many are equal to it.

    >>> below(np.uint32([1, 5, 5, 9]), None, Threshold(5, 1))
    (1, 2)
    """
    less = ties = 0
    flat = keys.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        if alive is not None:
            part = part[alive.reshape(-1)[start : start + _CHUNK]]
        less += int(np.count_nonzero(part < at.key))
        ties += int(np.count_nonzero(part == at.key))
    return less, ties
