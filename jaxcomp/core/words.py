"""Leaves in words: what a repr says of an array's shape, its blocks and its bytes. Never slow, never an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import jax
import numpy as np

from jaxcomp.core.types import PyTree, Shape

LOOKED_AT = 1 << 18
"""Elements up to which a repr looks at values: a copy of so many takes no time that a reader would see."""


def shape_words(shape: Sequence[int]) -> str:
    """A shape.

    >>> shape_words((3, 3, 64)), shape_words(())
    ('3x3x64', 'scalar')
    """
    return "x".join(map(str, shape)) or "scalar"


def block_words(shape: Shape, scales: Shape) -> str:
    """Which elements of an array share a scale, by the shapes of both.

    >>> [block_words((256, 64), s) for s in ((1, 1), (1, 64), (2, 64), (16, 4))]
    ['one scale', '64 scales', 'groups of 128', 'tiles of 16x16']
    """
    if len(shape) != len(scales) or not all(scales):
        return f"scales {shape_words(scales)}"
    lengths = [n // s for n, s in zip(shape, scales, strict=True)]
    cut = [i for i, (n, length) in enumerate(zip(shape, lengths, strict=True)) if 1 < length < n]
    count = int(np.prod(scales, dtype=np.int64))
    if not cut:
        return "one scale" if count == 1 else f"{count} scales"
    if len(cut) == 1 and all(length == 1 for i, length in enumerate(lengths) if i != cut[0]):
        return f"groups of {lengths[cut[0]]}"
    return f"tiles of {shape_words(lengths)}"


def percent_words(fraction: float) -> str:
    """A fraction of what is counted: only none is 0%, only all of it 100%.

    >>> percent_words(0.314), percent_words(0.0001), percent_words(0.9999), percent_words(0.0)
    ('31%', '<1%', '>99%', '0%')
    """
    if 0 < fraction < 0.01:
        return "<1%"
    return ">99%" if 0.99 < fraction < 1 else f"{fraction:.0%}"


def bytes_of(tree: PyTree) -> int:
    """What the arrays of a tree take, or those would that tracers and shapes stand for.

    >>> bytes_of({"w": jax.ShapeDtypeStruct((3, 4), "float32"), "lr": 0.1})
    48
    """
    arrays = [x for x in jax.tree.leaves(tree) if hasattr(x, "shape") and hasattr(x, "dtype")]
    return sum(int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize for x in arrays)


def known_here(x: object) -> TypeGuard[np.ndarray | jax.Array]:
    """Whether ``x`` is an array whose values this process has.

    >>> known_here(np.zeros(2)), known_here(jax.ShapeDtypeStruct((2,), "float32"))
    (True, False)
    """
    if not isinstance(x, jax.Array):
        return isinstance(x, np.ndarray)
    return not isinstance(x, jax.core.Tracer) and x.is_fully_addressable and not x.is_deleted()


def on_hand(x: object) -> np.ndarray | None:
    """The values of a small array whose values are known here, or None: of tracers, shapes, and what lies elsewhere."""
    if not known_here(x) or x.size > LOOKED_AT or jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
        return None
    return np.asarray(x)


def repeated(x: np.ndarray, shape: Shape) -> np.ndarray:
    """One entry a block, for each element of an array of ``shape``.

    >>> repeated(np.array([[1, 2]]), (2, 4)).tolist()
    [[1, 1, 2, 2], [1, 1, 2, 2]]
    """
    for axis, n in enumerate(shape):
        x = np.repeat(x, n // x.shape[axis], axis) if x.shape[axis] != n else x
    return x
