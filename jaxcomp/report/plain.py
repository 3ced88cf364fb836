"""A report as plain data, for JSON."""

from __future__ import annotations

import math
from dataclasses import asdict

from jaxcomp.report.compare import Change, Side
from jaxcomp.report.contents import Contents, Total

Plain = object
"""Nested dicts and lists of strings, numbers, booleans and None."""


def plain_of(report: Contents) -> dict[str, Plain]:
    """All numbers of a report."""
    best = report.frontier
    return {
        "title": report.title,
        "before": _total(report.before),
        "after": _total(report.after),
        "ratio": report.ratio,
        "layers": [layer_of(layer) for layer in report.layers],
        "score": report.score,
        "points": [
            {"name": p.name, "bytes": p.bytes, "score": finite(p.score), "best": p in best} for p in report.points
        ],
        "coverage": None if report.coverage is None else [asdict(row) for row in report.coverage.rows],
        "histograms": {d.path: asdict(d.histogram) for d in report.drawn if d.histogram is not None},
    }


def layer_of(layer: Change) -> dict[str, Plain]:
    """What became of one leaf."""
    return {
        "path": layer.path,
        "before": _side(layer.before),
        "after": _side(layer.after),
        "same": layer.same,
        "error": finite(layer.error),
        "largest": finite(layer.largest),
        "note": layer.note,
    }


def finite(x: float | None) -> float | None:
    """A number that JSON holds, or None."""
    return x if x is not None and math.isfinite(x) else None


def _side(side: Side | None) -> Plain:
    return None if side is None else {**asdict(side), "bits": side.bits}


def _total(total: Total) -> Plain:
    return {**asdict(total), "bits": total.bits}
