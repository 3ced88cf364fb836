"""Pictures of accuracy against bytes, drawn without a screen."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def accuracy_axes(title: str, bytes_label: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure, and its axes of test accuracy in percent over bytes on a logarithmic scale.

    Args:
      title, bytes_label: texts.
      size: of the figure, in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(title=title, xscale="log", xlabel=bytes_label, ylabel="test accuracy, %")
    axes.grid(visible=True, which="both", color="0.92", zorder=0)
    return figure, axes


def png_of(figure: Figure, axes: Axes) -> bytes:
    """The figure with its legend beside the axes."""
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
