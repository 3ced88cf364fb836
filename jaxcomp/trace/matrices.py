"""A leaf as the matrices that meet rows: the axes that rows run over in front of all that are its results'."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from jaxcomp.core.types import Shape
from jaxcomp.trace.rows import Moments

Array = TypeVar("Array", jax.Array, np.ndarray)


class Matrices(NamedTuple):
    """Which axes of a leaf its matrices are apart in, which their rows and which their columns run over."""

    apart: tuple[int, ...]
    summed: tuple[int, ...]
    kept: tuple[int, ...]

    def of(self, x: Array) -> Array:
        """An array of the leaf's rank as ``(matrices, rows, columns)``."""
        sizes = [math.prod(x.shape[i] for i in axes) for axes in self]
        return x.transpose(self._order).reshape(sizes)

    def back(self, x: Array, shape: Shape) -> Array:
        """The inverse, to this shape."""
        order = self._order
        moved = x.reshape([shape[i] for i in order])
        return moved.transpose(sorted(range(len(order)), key=order.__getitem__))

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.apart, *self.summed, *self.kept)


def matrices_of(moments: Moments, rank: int) -> Matrices:
    """The axes of a leaf of ``rank`` whose rows have these moments.

    >>> moments = Moments(np.eye(6), np.ones(6), np.ones(()), (), (2, 0))
    >>> axes = matrices_of(moments, 3)
    >>> leaf = np.arange(24.0).reshape(2, 4, 3)
    >>> axes.of(leaf).shape, bool((axes.back(axes.of(leaf), leaf.shape) == leaf).all())
    ((1, 6, 4), True)
    """
    taken = (*moments.apart, *moments.summed)
    return Matrices(moments.apart, moments.summed, tuple(i for i in range(rank) if i not in taken))
