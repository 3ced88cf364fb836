"""Equal tensors are held once; the others' names refer to the one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np


def held_once(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors without those of the type, the shape and the bits of an earlier one; and the earlier one's name.

    >>> held, same = held_once({"a": np.ones(2), "b": np.ones(2), "c": np.zeros(2)})
    >>> list(held), same
    (['a', 'c'], {'b': 'a'})
    """
    first: dict[tuple[np.dtype, tuple[int, ...], bytes], str] = {}
    held: dict[str, np.ndarray] = {}
    same: dict[str, str] = {}
    for name, x in tensors.items():
        key = (x.dtype, x.shape, hashlib.sha256(x.tobytes()).digest())
        if key in first:
            same[name] = first[key]
        else:
            first[key], held[name] = name, x
    return held, same


def all_named(held: Mapping[str, np.ndarray], same: object) -> dict[str, np.ndarray]:
    """The inverse of :func:`held_once`.

    Raises:
      ValueError: a name that refers to nothing, or stands for two tensors.
    """
    if not isinstance(same, Mapping):
        raise ValueError("the list of equal tensors is damaged")
    for name, first in same.items():
        if name in held:
            raise ValueError(f"{name!r} is held by the file and refers to {first!r}, too")
        if not isinstance(first, str) or first not in held:
            raise ValueError(f"{name!r} refers to {first!r}, which the file does not hold")
    return {**held, **{name: held[first] for name, first in same.items()}}
