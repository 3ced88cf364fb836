"""What is worth having: the points that no other one beats in bytes and in score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One network: how large its file is, and how good it is.

    Args:
      name: for labels.
      bytes: of its file.
      score: what was measured of it, accuracy or perplexity say.
    """

    name: str
    bytes: int
    score: float


def frontier(points: Iterable[Point], *, higher: bool = True) -> tuple[Point, ...]:
    """The points that none beats: no other one is as small and as good, and better in one of the two; by bytes.

    Args:
      points: of networks that one may choose from.
      higher: whether a higher score is better.

    >>> tried = [Point("float", 400, 0.99), Point("int8", 100, 0.99), Point("int4", 50, 0.9), Point("bad", 60, 0.5)]
    >>> [p.name for p in frontier(tried)]
    ['int4', 'int8']
    """
    sign = 1 if higher else -1
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, -sign * p.score)):
        alike = bool(best) and (point.bytes, point.score) == (best[-1].bytes, best[-1].score)
        if not best or alike or sign * point.score > sign * best[-1].score:
            best.append(point)
    return tuple(best)
