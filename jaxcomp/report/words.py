"""Numbers in words, the same on a page, in Markdown and on a terminal."""

from __future__ import annotations

import math

from jaxcomp.core.types import Shape
from jaxcomp.core.words import shape_words

NOTHING = "–"


def percent(x: float | None) -> str:
    """A fraction.

    >>> percent(0.1234), percent(0.0), percent(1e-6), percent(None)
    ('12.3%', '0%', '<0.1%', '–')
    """
    if x is None or not math.isfinite(x):
        return NOTHING
    if 0 < x < 0.0005:
        return "<0.1%"
    return "0%" if x == 0 else f"{x:.1%}"


def count(x: int | None) -> str:
    """A number of things."""
    return NOTHING if x is None else f"{x:,}"


def short(x: float | None) -> str:
    """A number with three digits that count.

    >>> short(4.5), short(0.012345), short(None), short(1234567.0)
    ('4.5', '0.0123', '–', '1.23e+06')
    """
    return NOTHING if x is None or not math.isfinite(x) else f"{x:.3g}"


def size(shape: Shape | None) -> str:
    """A shape.

    >>> size((256, 64)), size(None)
    ('256x64', '–')
    """
    return NOTHING if shape is None else shape_words(shape)


def score(x: float) -> str:
    """What was measured, with as many digits as tell networks apart.

    >>> score(0.99334), score(12.3456)
    ('0.9933', '12.35')
    """
    return NOTHING if not math.isfinite(x) else f"{x:.4g}"
