"""Files as reports show them: with the bytes that they hold, and as points by their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jaxcomp.artifact.files import stored_bytes
from jaxcomp.artifact.measuring import entropy_of
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.report.frontier import Point
from jaxcomp.report.inputs import Weights
from jaxcomp.report.summary import Row, Summary, summary


def as_stored(held: Weights) -> Summary:
    """The table with the bytes that the file holds, and with what the codes would take at their entropy."""
    found = summary(held.tree)
    leaves = dict(leaves_with_paths(held.tree, is_leaf=is_compressed)[0])

    def row_of(row: Row) -> Row:
        leaf = leaves[row.path]
        size = held.stored.get(row.path, 0) if held.stored else stored_bytes(leaf)
        bits = entropy_of(leaf)
        return replace(row, bytes=size, held=size, entropy=None if bits is None else bits / max(row.size, 1))

    return replace(found, rows=tuple(map(row_of, found.rows)))


def points_of(held: Sequence[tuple[Path, Weights]], score: str, scores: Sequence[float]) -> list[Point]:
    """The files with their scores: as given, or as their metadata have them; those without one are left out.

    Raises:
      ValueError: another number of scores.
    """
    if scores and len(scores) != len(held):
        raise ValueError(f"report: --scores wants a number for each of the {len(held)} files, got {len(scores)}.")
    known: Sequence[object] = scores or [weights.metadata.get(score) for _, weights in held]
    return [
        Point(path.stem, weights.bytes, float(value))
        for (path, weights), value in zip(held, known, strict=True)
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
