"""Where a value comes from: the parameter leaf behind it, and how the leaf's axes lie in it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

Axes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Origin:
    """The leaf that a value is a view of.

    Invariant: ``len(axes)`` is the rank of the value, and its axis ``i`` runs over the leaf's axes ``axes[i]``,
    the slowest first (more than one after a reshape that merges, none for a broadcast axis). Both halves of a
    leaf axis that a reshape split name that axis.

    Attributes:
      path: the leaf's path.
      shape: the leaf's whole shape.
      dtype: the leaf's type, before casts.
      axes: which leaf axes each axis of the value runs over.
      stacked: leaf axes of which the value is one slice: stepped over by a scan, or indexed.
      whole: the value holds every element of its slice, once and in order along each axis.
      exact: only layout and casts lie in between; False where elementwise arithmetic does too, as for a masked,
        rounded or standardized weight.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: Axes
    stacked: tuple[int, ...] = ()
    whole: bool = True
    exact: bool = True

    def permuted(self, order: tuple[int, ...]) -> Origin:
        """The origin of a transpose."""
        return replace(self, axes=tuple(self.axes[i] for i in order))

    def broadcast(self, rank: int, positions: tuple[int, ...]) -> Origin:
        """The origin after axes were put at ``positions`` of a value of ``rank`` axes."""
        axes: list[tuple[int, ...]] = [()] * rank
        for i, position in enumerate(positions):
            axes[position] = self.axes[i]
        return replace(self, axes=tuple(axes))

    def without(self, dropped: tuple[int, ...]) -> Origin:
        """The origin after axes of one element were dropped; a leaf axis cut down to one becomes stacked."""
        gone = [a for i in dropped for a in self.axes[i] if self.shape[a] != 1]
        kept = tuple(axes for i, axes in enumerate(self.axes) if i not in dropped)
        still = {a for axes in kept for a in axes}
        stacked = (*self.stacked, *(a for a in gone if a not in self.stacked and a not in still))
        return replace(self, axes=kept, stacked=stacked)

    def one_of(self, axis: int) -> Origin:
        """The origin of one index of the value's ``axis``: the leaf axes below it become stacked."""
        kept = (*self.axes[:axis], *self.axes[axis + 1 :])
        return replace(self, axes=kept, stacked=(*self.stacked, *self.axes[axis]))

    def sliced(self) -> Origin:
        """The origin of part of the value."""
        return replace(self, whole=False)

    def reshaped(self, old: tuple[int, ...], new: tuple[int, ...]) -> Origin:
        """The origin of a reshape from ``old`` to ``new``, matched by running products of sizes."""
        axes: list[tuple[int, ...]] = [()] * len(new)
        if 0 in old:
            return replace(self, axes=tuple(axes), whole=False)
        for sources, targets in _blocks(old, new):
            names = tuple(a for i in sources for a in self.axes[i] if old[i] != 1)
            wide = [j for j in targets if new[j] != 1]
            unmerged = tuple(new[j] for j in wide) == tuple(self.shape[a] for a in names)
            for k, j in enumerate(wide):
                axes[j] = (names[k],) if unmerged else names
        return replace(self, axes=tuple(axes))


def _blocks(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The finest groups of consecutive axes of both shapes with equal products."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        sources, targets = [], []
        if i < len(old):
            sources.append(i)
            i += 1
        if j < len(new):
            targets.append(j)
            j += 1
        while (a := math.prod(old[k] for k in sources)) != (b := math.prod(new[k] for k in targets)):
            if (a < b and i < len(old)) or j == len(new):
                sources.append(i)
                i += 1
            else:
                targets.append(j)
                j += 1
        blocks.append((sources, targets))
    return blocks


@dataclass(frozen=True)
class Tag:
    """What a value depends on.

    Attributes:
      args: it depends on an argument (it is an activation), or on what no analysis follows, such as a loop's carry.
      params: paths of the leaves that it depends on; kept only where ``args`` is False.
      origin: the one leaf that it is a view of, if there is one; also where ``args`` is True through an index only.
    """

    args: bool = False
    params: frozenset[str] = frozenset()
    origin: Origin | None = None

    @property
    def is_weight(self) -> bool:
        """Depends on parameters, and on no argument."""
        return not self.args and bool(self.params)


CONSTANT = Tag()
ACTIVATION = Tag(args=True)


def mixed(*tags: Tag, origin: Origin | None = None) -> Tag:
    """The tag of a value computed from values with these tags."""
    if any(t.args for t in tags):
        return ACTIVATION if origin is None else Tag(args=True, origin=origin)
    return Tag(params=frozenset().union(*(t.params for t in tags)), origin=origin)


def joined(a: Tag, b: Tag) -> Tag:
    """The tag of a value that is one or the other."""
    return a if a == b else mixed(a, b, origin=a.origin if a.origin == b.origin else None)
