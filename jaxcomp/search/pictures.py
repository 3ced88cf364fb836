"""What was measured of units, as a picture. Wants the extra ``report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def lines(
    values: Mapping[tuple[str, str], float], units: Sequence[str], *, labels: Sequence[str], measure: str
) -> Figure:
    """A line a label, a place a unit; logarithmic where all values that are known are above 0."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.0, 1.5 + 0.3 * len(units)), 3.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label in labels:
        at = [i for i, unit in enumerate(units) if (unit, label) in values]
        axes.plot(at, [values[units[i], label] for i in at], "o-", ms=3, lw=1, label=label)
    if all(x > 0 for x in values.values()):
        axes.set_yscale("log")
    axes.set_xticks(range(len(units)), units, rotation=90, fontsize=7)
    axes.set_ylabel(measure)
    axes.grid(visible=True, axis="y", color="0.92")
    axes.legend(frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
