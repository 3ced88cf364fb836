"""Masks as bits, and the elements that they keep. Arrays in, arrays out."""

from __future__ import annotations

import numpy as np


def nonzero_bits(x: np.ndarray) -> np.ndarray:
    """Where any bit is set: -0.0 counts as nonzero, so that it survives."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}.get(x.itemsize)
    return np.ones(x.shape, bool) if unsigned is None else x.view(unsigned) != 0


def bitmap(mask: np.ndarray) -> np.ndarray:
    """Booleans as bits, the first one lowest.

    >>> bitmap(np.array([True, False, True])).tolist()
    [5]
    """
    return np.packbits(mask.reshape(-1), bitorder="little")


def unbitmap(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of :func:`bitmap`."""
    count = int(np.prod(shape, dtype=np.int64))
    return np.unpackbits(data, count=count, bitorder="little").astype(bool).reshape(shape)


def scatter(stored: np.ndarray, kept: np.ndarray, rest: int | np.ndarray) -> np.ndarray:
    """Values at the kept places, ``rest`` elsewhere."""
    out = np.zeros(kept.shape, stored.dtype)
    out[...] = np.asarray(rest).astype(stored.dtype)
    out[kept] = stored
    return out
