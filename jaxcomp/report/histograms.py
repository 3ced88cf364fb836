"""How weights lie between the lines of their grid: counts that a picture is drawn of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.packed import unpacked
from jaxcomp.core.types import Leaf, Shape
from jaxcomp.core.words import repeated
from jaxcomp.core.wrappers import Masked
from jaxcomp.quantization.leaves import Folded, Quantized

BINS = 96
MOST_LINES = 256
"""More than that many values are no grid."""
SAMPLE = 1 << 20
"""Of more weights than that, evenly many are taken."""
_BEYOND = 5e-4

Units = Callable[[np.ndarray], np.ndarray]
"""Weights, whole and of the dense shape, on the axis of the histogram."""


@dataclass(frozen=True)
class Histogram:
    """How the weights of a leaf lie before, and on which lines after.

    Attributes:
      unit: what the axis measures.
      edges: of the bins; the outermost bins hold what lies beyond, too.
      before: the weights before, as a fraction of all in each bin.
      after: the weights after that are not masked, in the same bins.
      lines: the numbers of the grid, ascending; none where the leaf has no grid, or a different one in each part.
      on_lines: the weights after that are not masked, as a fraction of all on each line.
      counted: how many weights were looked at, of how many.
    """

    unit: str
    edges: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    lines: tuple[float, ...]
    on_lines: tuple[float, ...]
    counted: tuple[int, int]


def histogram(before: np.ndarray, leaf: Leaf) -> Histogram:
    """The histogram of a leaf, on the axis on which its grid is one.

    Where there is one scale the axis is that of the weights; where each channel or group has its own, it is that of the
    weights over their scale, so that all of them meet the same lines.

    Args:
      before: the weights before, of the leaf's shape.
      leaf: what they became.

    >>> import jaxcomp as jc
    >>> w = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    >>> h = histogram(w, jc.quantize(jc.Int(2), per=jc.Tensor()).apply((), {"w": jnp.asarray(w)})["w"])
    >>> h.unit, len(h.lines), round(sum(h.on_lines), 6)
    ('weight', 4, 1.0)
    """
    values, kept = np.asarray(dense(leaf)), kept_of(leaf)
    unit, to_units, lines = _grid_of(leaf)
    step = max(1, -(-values.size // SAMPLE))
    old, new = (_flat(to_units(x), step) for x in (before, values))
    if kept is not None:
        new = new[_flat(kept, step)]
    if lines is None or not np.isfinite(lines).all():
        lines = _values_taken(new) if is_compressed(leaf) else np.empty(0)
    edges = _edges(old, lines)
    total = max(old.size, 1)
    return Histogram(
        unit=unit,
        edges=tuple(edges.tolist()),
        before=_fractions(old, edges, total),
        after=_fractions(new, edges, total),
        lines=tuple(lines.tolist()),
        on_lines=_on_lines(new, lines, total),
        counted=(old.size, values.size),
    )


def _flat(x: np.ndarray, step: int) -> np.ndarray:
    taken = x.reshape(-1)[::step]
    return taken if taken.dtype == bool else taken.astype(np.float64)


def _values_taken(x: np.ndarray) -> np.ndarray:
    """The few values that many weights take, as those of a table; none where nearly each has its own."""
    found = np.unique(x[np.isfinite(x)])
    return found if found.size <= min(MOST_LINES, x.size // 4) else np.empty(0)


def kept_of(leaf: Leaf) -> np.ndarray | None:
    """Where a mask keeps the weights; None where there is no mask."""
    while is_compressed(leaf) and not isinstance(leaf, Masked):
        inner = [getattr(leaf, name) for name in leaf.open[:1] if tuple(getattr(leaf, name).shape) == leaf.shape]
        if not inner:
            return None
        (leaf,) = inner
    return np.broadcast_to(np.asarray(unpacked(leaf.mask)), leaf.shape) if isinstance(leaf, Masked) else None


def _grid_of(leaf: Leaf) -> tuple[str, Units, np.ndarray | None]:
    """The unit of the axis, how weights come onto it, and the grid's lines there; None where they are not known."""
    plain = ("weight", lambda w: w, None)
    inner = leaf.values if isinstance(leaf, Masked) else leaf
    if isinstance(inner, Folded):
        unit, to_units, lines = _grid_of(inner.rows)
        rows = tuple(inner.rows.shape)
        return unit, lambda w: to_units(_rows_of(w, rows)).reshape(-1)[: w.size].reshape(w.shape), lines
    inner = inner.pack() if is_compressed(inner) else inner
    inner = inner.values if isinstance(inner, Masked) else inner
    if not isinstance(inner, Quantized):
        return plain
    grid, scale = inner.grid, np.asarray(dense(inner.scale), np.float64)
    zero = np.zeros(1) if inner.zero_point is None else np.asarray(inner.zero_point, np.float64)
    lines = _numbers(inner)
    if not grid.proportional:
        compander = getattr(grid, "compander", None)
        if compander is None:
            return plain
        compress = lambda w: np.asarray(compander.compress(jnp.asarray(w)), np.float64)  # noqa: E731
        return f"{compander.name}(weight) / scale", lambda w: compress(w) / repeated(scale, w.shape), lines
    if scale.size == 1:
        return "weight", lambda w: w, None if lines is None else (lines - zero.reshape(-1)[0]) * scale.reshape(-1)[0]
    unit = "weight / its scale" + ("" if inner.zero_point is None else " + its zero point")
    shift = lambda w: 0 if inner.zero_point is None else repeated(zero, w.shape)  # noqa: E731
    return unit, lambda w: w / np.where(s := repeated(scale, w.shape), s, 1) + shift(w), lines


def _numbers(leaf: Quantized) -> np.ndarray | None:
    """All numbers of a grid, ascending."""
    elements = getattr(leaf.grid, "elements", leaf.grid)
    if elements.code_range is not None:
        low, high = elements.code_range
        return np.array([low, high] if leaf.grid.bits == 1 else range(low, high + 1), np.float64)
    levels = getattr(elements, "levels", None)
    if levels is not None:
        return np.asarray(levels, np.float64)
    ends = getattr(elements, "ends", None)
    return None if ends is None or leaf.grid.proportional else np.arange(ends[0], ends[1] + 1, dtype=np.float64)


def _rows_of(w: np.ndarray, shape: Shape) -> np.ndarray:
    """A leaf's weights as rows of equal length, the last one filled with zeros."""
    return np.pad(w.reshape(-1), (0, shape[0] * shape[1] - w.size)).reshape(shape)


def _edges(values: np.ndarray, lines: np.ndarray) -> np.ndarray:
    finite = values[np.isfinite(values)]
    ends = [*lines[[0, -1]]] if lines.size else []
    if finite.size:
        ends += [*np.quantile(finite, [_BEYOND, 1 - _BEYOND])]
    low, high = (min(ends), max(ends)) if ends else (-1.0, 1.0)
    room = 0.02 * (high - low) or max(abs(high), 1.0)
    return np.linspace(low - room, high + room, BINS + 1)


def _fractions(values: np.ndarray, edges: np.ndarray, total: int) -> tuple[float, ...]:
    inside = np.clip(values[~np.isnan(values)], edges[0], edges[-1])
    return tuple((np.histogram(inside, edges)[0] / total).tolist())


def _on_lines(values: np.ndarray, lines: np.ndarray, total: int) -> tuple[float, ...]:
    if not lines.size:
        return ()
    middles = (lines[1:] + lines[:-1]) / 2
    counts = np.bincount(np.searchsorted(middles, values[np.isfinite(values)]), minlength=lines.size)
    return tuple((counts / total).tolist())
