"""Where a product's axes lie in what layout operations made of its result: each axis of a value as pieces of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jax.extend import core

from jaxcomp.core.types import Shape


class Piece(NamedTuple):
    """``size`` indices of one axis of the product's result, ``stride`` apart."""

    axis: int
    size: int
    stride: int


Places = tuple[tuple[Piece, ...], ...]
"""For each axis of a value, the pieces that it runs over, the slowest first; an axis of one element has none."""


def whole(shape: Shape) -> Places:
    """The places of the product's own result.

    >>> whole((2, 1))
    ((Piece(axis=0, size=2, stride=1),), ())
    """
    return tuple((Piece(i, n, 1),) if n != 1 else () for i, n in enumerate(shape))


def relaid(eqn: core.JaxprEqn, places: Places) -> Places | None:
    """The places after an equation of ``RELAID`` that keeps the number of elements; None where no pieces say it."""
    p = eqn.params
    match eqn.primitive.name:
        case "transpose":
            return tuple(places[i] for i in p["permutation"])
        case "squeeze":
            return tuple(pieces for i, pieces in enumerate(places) if i not in p["dimensions"])
        case "broadcast_in_dim":
            at = dict(zip(p["broadcast_dimensions"], places, strict=True))
            return tuple(at.get(i, ()) for i in range(len(p["shape"])))
        case "reshape":
            return _regrouped(places, p["new_sizes"])
    return None


def _regrouped(places: Places, sizes: Sequence[int]) -> Places | None:
    """Pieces dealt out anew to axes of ``sizes``, cut where an axis ends inside of one.

    >>> _regrouped(whole((12,)), (3, 4))
    ((Piece(axis=0, size=3, stride=4),), (Piece(axis=0, size=4, stride=1),))
    """
    left = [piece for pieces in places for piece in pieces][::-1]
    found = []
    for size in sizes:
        own = []
        while size > 1:
            piece = left.pop()
            if piece.size > size and piece.size % size == 0:
                within = piece.size // size
                left.append(piece._replace(size=within))
                piece = Piece(piece.axis, size, piece.stride * within)
            if size % piece.size:
                return None
            own.append(piece)
            size //= piece.size
        found.append(tuple(own))
    return tuple(found)
