"""What a page shows drawn: PNG images, without a screen. Wants the extra ``report``."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxcomp.report.frontier import Point, frontier
from jaxcomp.report.histograms import Histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, BEFORE, AFTER = "#1f2933", "#b8c4ce", "#0b6e99"
MOST_PIXELS = 320
"""Of a picture of a mask, along its longer side."""
MOST_STEMS = 48
"""Of so many lines each is drawn; more of them would be a carpet."""


def histogram_png(h: Histogram) -> bytes:
    """A histogram: the weights before as an area, the grid's lines, and what lies on them after."""
    figure, axes = _axes((4.6, 2.1))
    edges = np.array(h.edges)
    width = edges[1] - edges[0]
    axes.stairs(np.array(h.before) / width, edges, fill=True, color=BEFORE, label="before")
    if 0 < len(h.lines) <= MOST_STEMS:
        lines, density = np.array(h.lines), np.array(h.on_lines) / _cells(h)
        axes.vlines(lines, 0, 1, transform=axes.get_xaxis_transform(), color=INK, lw=0.5, alpha=0.25)
        axes.vlines(lines, 0, density, color=AFTER, lw=1.6, label="after, on its lines")
        axes.plot(lines, density, "o", color=AFTER, ms=3)
    else:
        label = f"after, on {len(h.lines)} lines" if h.lines else "after"
        axes.stairs(np.array(h.after) / width, edges, color=AFTER, lw=1.2, label=label)
    tallest = max(h.before) / width
    axes.set(xlabel=h.unit, xlim=(edges[0], edges[-1]), ylim=(0, 1.25 * tallest if tallest else 1), yticks=[])
    axes.legend(loc="upper right", frameon=False, fontsize=7, handlelength=1.2, borderaxespad=0.1)
    return _png(figure)


def _cells(h: Histogram) -> np.ndarray:
    """How wide the part of the axis is that goes to each line; the outermost are as wide as inside they are."""
    lines = np.array(h.lines)
    if len(lines) == 1:
        return np.array([h.edges[-1] - h.edges[0]])
    gaps = np.diff(lines)
    return (np.append(gaps[0], gaps) + np.append(gaps, gaps[-1])) / 2


def mask_pixels(kept: np.ndarray) -> tuple[np.ndarray, bool]:
    """What is kept of a leaf, as a picture: the fraction of each pixel, and whether it lies on its side.

    The last axis is one side, all others together are the other one; the longer side runs across.

    >>> mask_pixels(np.eye(3, dtype=bool)[:, :2])[0].tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    flat = kept.reshape(-1, kept.shape[-1]) if kept.ndim else kept.reshape(1, 1)
    turned = flat.shape[0] > flat.shape[1]
    flat = flat.T if turned else flat
    return _shrunk(_shrunk(flat.astype(np.float32), 0), 1), turned


def _shrunk(x: np.ndarray, axis: int) -> np.ndarray:
    """Means of neighbours, so that no more are left than a picture has pixels."""
    n = x.shape[axis]
    if n <= MOST_PIXELS:
        return x
    block = math.ceil(n / MOST_PIXELS)
    starts = np.arange(0, n, block)
    sums = np.add.reduceat(x, starts, axis)
    sizes = np.diff(np.append(starts, n)).astype(np.float32)
    return sums / np.expand_dims(sizes, tuple(i for i in range(x.ndim) if i != axis))


def mask_png(pixels: np.ndarray) -> bytes:
    """A picture of a mask: dark where weights are kept, light where they are 0; a pixel an entry, in 16 shades."""
    from PIL import Image

    image = Image.fromarray(np.rint(pixels * 15).astype(np.uint8), mode="P")
    light, dark = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in ("#eef2f5", AFTER))
    image.putpalette(np.rint(np.linspace(light, dark, 16)).astype(np.uint8).tobytes())
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True, bits=4)
    return out.getvalue()


def frontier_png(points: Sequence[Point], *, score: str, higher: bool) -> bytes:
    """The points of bytes and score, with the line through those that none beats; each has its number."""
    figure, axes = _axes((7.6, 3.4))
    best = frontier(points, higher=higher)
    axes.plot([p.bytes for p in best], [p.score for p in best], color=AFTER, lw=1.2, zorder=1)
    for number, p in enumerate(points, 1):
        if p in best:
            axes.plot(p.bytes, p.score, "o", ms=13, color=AFTER, zorder=3)
            offset, ink, va = (0, 0), "white", "center_baseline"
        else:  # beside its point, for it may lie on another one
            axes.plot(p.bytes, p.score, "o", ms=6, color=BEFORE, zorder=2)
            offset, ink, va = (0, 8), INK, "bottom"
        axes.annotate(
            str(number), (p.bytes, p.score), offset, textcoords="offset points", ha="center", va=va, fontsize=8,
            color=ink, zorder=4,
        )  # fmt: skip
    axes.set(xscale="log", xlabel="bytes of the file", ylabel=score)
    axes.margins(0.08, 0.12)
    axes.grid(visible=True, which="major", color="0.92", zorder=0)
    _readable(axes, [p.bytes for p in points])
    return _png(figure)


def _readable(axes: Axes, values: Sequence[int]) -> None:
    """Ticks of a logarithmic axis as numbers with a prefix; also between powers of ten where there are few."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    narrow = max(values) < 30 * max(min(values), 1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, color=INK)
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)
    return figure, axes


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
