"""Arrays as planes of bytes: the first byte of every element, then the second, and so on.

The bytes of an element are unlike each other: a float's exponent is much the same everywhere and its last bits are
noise. So that the exponent is one byte, and none of its bits lie in the next, the sign goes to the other end first.
"""

from __future__ import annotations

import numpy as np


def planes_of(x: np.ndarray) -> list[np.ndarray]:
    """The planes of a flat array, lowest byte first; of bytes there is one."""
    if x.itemsize == 1:
        return [x.view(np.uint8)]
    words = _turned(x.view(f"<u{x.itemsize}"), 1) if _is_float(x.dtype) else x
    return [*np.ascontiguousarray(words).view(np.uint8).reshape(-1, x.itemsize).T]


def put_planes(out: np.ndarray, planes: list[np.ndarray]) -> None:
    """The inverse of :func:`planes_of`: sets a flat array."""
    rows = out.view(np.uint8).reshape(-1, out.itemsize)
    for i, plane in enumerate(planes):
        rows[:, i] = plane
    if out.itemsize > 1 and _is_float(out.dtype):
        words = out.view(f"<u{out.itemsize}")
        words[:] = _turned(words, 8 * out.itemsize - 1)


def _turned(words: np.ndarray, left: int) -> np.ndarray:
    """Each word turned by so many bits."""
    whole, dtype = 8 * words.itemsize, words.dtype.type
    return (words << dtype(left)) | (words >> dtype(whole - left))


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"
