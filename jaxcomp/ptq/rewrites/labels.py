"""By what each index of an array may be multiplied while the function stays the same: labels, and equations of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Ids = NDArray[np.int64]
"""Names of positive factors: ``k`` is factor k, ``-k`` its inverse, 0 is one."""


@dataclass(frozen=True, eq=False)
class Block:
    """A factor for each index of some dimensions of an array. Each block is equal to itself alone.

    Invariant: ``ids`` has an axis for each scan around, of the scan's length or 1, and then one for each of ``dims``.
    """

    dims: tuple[int, ...]
    ids: Ids

    def on(self, dims: Sequence[int]) -> Ids:
        """The ids over ``dims``, of which the block has some."""
        front = self.ids.shape[: self.ids.ndim - len(self.dims)]
        order = sorted(range(len(self.dims)), key=lambda i: dims.index(self.dims[i]))
        moved = self.ids.transpose(*range(len(front)), *(len(front) + i for i in order))
        sizes = dict(zip(self.dims, self.ids.shape[len(front) :], strict=True))
        return moved.reshape(*front, *(sizes.get(d, 1) for d in dims))


@dataclass(frozen=True)
class Label:
    """What an array may be multiplied by: at each index by the product of its blocks' factors.

    ``null`` says that it is zero everywhere, so that any factor suits it.
    """

    shape: tuple[int, ...]
    blocks: tuple[Block, ...] = ()
    null: bool = False

    def moved(self, shape: Sequence[int], at: dict[int, int]) -> Label:
        """The label where dimension d went to ``at[d]``; a dimension of one index may be gone."""
        return Label(tuple(shape), tuple(_moved(block, at) for block in self.blocks), self.null)


def _moved(block: Block, at: dict[int, int]) -> Block:
    front = block.ids.ndim - len(block.dims)
    gone = tuple(front + i for i, d in enumerate(block.dims) if d not in at)
    return Block(tuple(at[d] for d in block.dims if d in at), block.ids.squeeze(gone))


class Factors:
    """The unknown factors of one walk, and what is known of them: ``a == b`` for pairs of signed names.

    >>> factors = Factors()
    >>> a, b, c = factors.fresh((1,)), factors.fresh((1,)), factors.fresh((1,))
    >>> factors.tie(a, -b); factors.tie(c, -c)
    >>> [x.tolist() for x in factors.solved(np.concatenate([a, b, c]))]
    [[1, -1, 0]]
    """

    def __init__(self) -> None:
        self._size = 1
        self._left: list[Ids] = []
        self._right: list[Ids] = []

    def fresh(self, shape: Sequence[int]) -> Ids:
        """New names, one an index."""
        n = int(np.prod(shape, dtype=np.int64))
        start, self._size = self._size, self._size + n
        return np.arange(start, self._size).reshape(tuple(shape))

    def tie(self, a: Ids, b: Ids) -> None:
        """Makes ``a`` and ``b``, which broadcast, the same factors."""
        a, b = np.broadcast_arrays(a, b)
        differ = a != b
        self._left.append(a[differ])
        self._right.append(b[differ])

    def freeze(self, *blocks: Block) -> None:
        """Makes all factors of the blocks one."""
        for block in blocks:
            self.tie(block.ids, np.zeros_like(block.ids))

    def solved(self, *arrays: Ids) -> list[Ids]:
        """The arrays with equal names for equal factors, and 0 for those that must be one.

        A factor and its inverse are two nodes of a graph, ties are its edges twice over; where both are in one
        component, the factor is its own inverse.
        """
        left, right = (np.concatenate([np.zeros(0, np.int64), *side]) for side in (self._left, self._right))
        n = self._size
        ends = np.concatenate([left, -left]) + n, np.concatenate([right, -right]) + n
        graph = coo_array((np.ones(len(ends[0]), np.int8), ends), shape=(2 * n, 2 * n))
        _, component = connected_components(graph, directed=False)
        # The component in which a smallest name stands unsigned is named by it.
        names = np.arange(-n, n)
        names[0] = 1 - n
        first = np.full(component.max() + 1, n)
        np.minimum.at(first, component, np.abs(names))
        positive = np.zeros(len(first), bool)
        positive[component[n + np.arange(n)][first[component[n:]] == np.arange(n)]] = True
        one = component == component[n - names]
        named = np.where(one, 0, np.where(positive[component], 1, -1) * first[component])
        return [named[ids + n] for ids in arrays]


def common(factors: Factors, labels: Sequence[Label]) -> list[Label]:
    """The same labels over blocks of the same dimensions; all have one shape. What no such blocks can say is frozen."""
    shape = labels[0].shape
    return [
        replace(label, blocks=tuple(_gathered(factors, label, dims) for dims in _joint(labels)), shape=shape)
        for label in labels
    ]


def _joint(labels: Sequence[Label]) -> list[tuple[int, ...]]:
    """The finest sets of dimensions such that every block of every label lies in one."""
    sets: list[set[int]] = []
    for block in (b for label in labels for b in label.blocks):
        own = set(block.dims)
        own = own.union(*(s for s in sets if s & own))
        sets = [s for s in sets if not s & own] + [own]
    return [tuple(sorted(s)) for s in sets]


def _gathered(factors: Factors, label: Label, dims: tuple[int, ...]) -> Block:
    """The label's only block within ``dims``, over all of them; of several, one is kept."""
    own = [block for block in label.blocks if set(block.dims) <= set(dims)]
    kept = max(own, key=lambda block: block.ids.size, default=None)
    factors.freeze(*(block for block in own if block is not kept))
    if kept is None:
        return Block(dims, np.zeros((1,) * len(dims), np.int64))
    full = kept.on(dims)
    front = full.shape[: full.ndim - len(dims)]
    return Block(dims, np.broadcast_to(full, (*front, *(label.shape[d] for d in dims))))


def tied(factors: Factors, labels: Sequence[Label]) -> Label:
    """The label of what is made, index by index, of arrays that must have the same factors: their sum, say."""
    shape = np.broadcast_shapes(*(label.shape for label in labels))
    wanted = [label for label in labels if not label.null]
    if not wanted:
        return Label(shape, (), True)
    alike = common(factors, [replace(label, shape=shape) for label in wanted])
    kept = []
    for first, *others in zip(*(label.blocks for label in alike), strict=True):
        for other in others:
            factors.tie(*fronted(first.ids, other.ids, len(first.dims)))
        if all(block.ids.any() for block in (first, *others)):
            kept.append(first)
    return Label(shape, tuple(kept))


def fronted(a: Ids, b: Ids, rank: int) -> tuple[Ids, Ids]:
    """Two arrays with as many axes in front of their last ``rank``, those that are missing after the others."""
    n = max(a.ndim, b.ndim) - rank

    def widened(x: Ids) -> Ids:
        own = x.ndim - rank
        return x.reshape(*x.shape[:own], *(1,) * (n - own), *x.shape[own:])

    return widened(a), widened(b)
