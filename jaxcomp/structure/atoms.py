"""Atoms: what must be removed together, as sets of integers; and labels, the atoms of an array's dimensions."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


class Fixed(enum.Enum):
    """A dimension of which the analysis removes nothing by itself."""

    FROZEN = "every index stays"
    FREE = "full size, made without parameters: sliced where it meets one"
    UNIFORM = "as FREE, and the same value at every index"


FROZEN, FREE, UNIFORM = Fixed.FROZEN, Fixed.FREE, Fixed.UNIFORM
Dim = NDArray[np.int64] | Fixed
"""A dimension: an atom for each index, or none at all."""
Known = NDArray[np.generic]
"""The value of a small constant."""


_MOVES = np.iinfo(np.int64).max  # the reason of what may go


class Atoms:
    """Disjoint sets of integers, with whole arrays united at once; 0 is the set of what stays.

    The walk asks which atoms are already one while it unites others (a reshape needs it), so the components
    are kept up to date rather than computed once at the end. Each set that stays knows the first reason why, by
    number.

    >>> atoms = Atoms()
    >>> a, b = atoms.fresh(3), atoms.fresh(3)
    >>> atoms.union(a, b); atoms.freeze(b[:1], 7)
    >>> atoms.find(a).tolist() == atoms.find(b).tolist(), atoms.find(a)[0], atoms.reason(a[:1])
    (True, np.int64(0), array([7]))
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1024, np.int64)
        self._reason = np.full(1024, _MOVES)
        self._reason[0] = 0
        self._size = 1

    def __len__(self) -> int:
        return self._size

    def fresh(self, n: int) -> NDArray[np.int64]:
        """``n`` new atoms, each a set of its own."""
        start, self._size = self._size, self._size + n
        if self._size > len(self._parent):
            more = 2 * self._size - start
            self._parent = np.concatenate([self._parent[:start], np.zeros(more, np.int64)])
            self._reason = np.concatenate([self._reason[:start], np.full(more, _MOVES)])
        new = np.arange(start, self._size)
        self._parent[start : self._size] = new
        return new

    def _root(self, atoms: NDArray[np.int64]) -> NDArray[np.int64]:
        """The smallest-numbered member of each atom's set."""
        root = self._parent[atoms]
        while True:
            above = self._parent[root]
            if np.array_equal(above, root):
                break
            root = above
        self._parent[atoms] = root
        return root

    def find(self, atoms: NDArray[np.int64]) -> NDArray[np.int64]:
        """The smallest-numbered member of each atom's set; 0 where it stays."""
        root = self._root(atoms)
        return np.where(self._reason[root] == _MOVES, root, 0)

    def reason(self, atoms: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the first reason why each atom stays; a very large one where it may go."""
        return self._reason[self._root(atoms)]

    def union(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
        """Makes ``a[i]`` and ``b[i]`` one set, for every i."""
        if a is b:
            return
        a, b = np.broadcast_arrays(a, b)
        low, high = self._root(a), self._root(b)
        first, reason = low, np.minimum(self._reason[low], self._reason[high])
        while True:
            apart = low != high
            if not apart.any():
                break
            low, high = low[apart], high[apart]
            self._parent[np.maximum(low, high)] = np.minimum(low, high)
            low, high = self._root(low), self._root(high)
        if (reason != _MOVES).any():
            np.minimum.at(self._reason, self._root(first), reason)

    def freeze(self, a: NDArray[np.int64], reason: int) -> None:
        """Makes every ``a[i]`` stay, by the reason of this number."""
        root = self._root(a)
        self._reason[root] = np.minimum(self._reason[root], reason)


@dataclass(frozen=True)
class Label:
    """What the analysis knows of one array.

    Invariants: ``len(dims) == len(zero) == len(shape)``; where ``zero[d]``, the array is zero at each index of
    dimension d whose parameters are masked; ``null`` says that it is zero everywhere; ``value`` is its value
    if that is a known small constant; ``sums`` says it is a sum over the indices ``sums[1]``, ``sums[0]`` in number.
    """

    shape: tuple[int, ...]
    dims: tuple[Dim, ...]
    zero: tuple[bool, ...]
    null: bool = False
    value: Known | None = None
    sums: tuple[int, tuple[NDArray[np.int64], ...]] | None = None

    def zero_at(self, d: int) -> bool:
        """Whether the array is zero wherever index i of dimension ``d`` is removed."""
        return self.null or (isinstance(self.dims[d], np.ndarray) and self.zero[d]) or self.dims[d] is FROZEN

    def select(self, order: Sequence[int]) -> Label:
        """The dimensions ``order`` of the array, in that order; the others are gone."""
        shape, dims = tuple(self.shape[d] for d in order), tuple(self.dims[d] for d in order)
        return Label(shape, dims, tuple(self.zero[d] for d in order), self.null, None, self.sums)

    def with_dims(self, dims: Sequence[Dim]) -> Label:
        """The same label with other dimensions."""
        return replace(self, dims=tuple(dims))


def fixed(shape: Sequence[int], kind: Fixed, value: Known | None = None) -> Label:
    """The label of an array that no parameter's removal shrinks."""
    null = value is not None and not np.any(value)
    return Label(tuple(shape), (kind,) * len(shape), (False,) * len(shape), null, value)


def arrays(dims: Sequence[Dim]) -> list[NDArray[np.int64]]:
    """The dimensions that have atoms."""
    return [d for d in dims if isinstance(d, np.ndarray)]


def weakest(dims: Sequence[Dim]) -> Fixed:
    """What dimensions without removable atoms are together."""
    if any(d is FROZEN or isinstance(d, np.ndarray) for d in dims):
        return FROZEN
    return FREE if any(d is FREE for d in dims) else UNIFORM
