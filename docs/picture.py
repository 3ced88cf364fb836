"""Draws docs/size.svg, README's picture, from the main job's table in docs/measured.md: ``python docs/picture.py``."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parent
ROWS = (
    "float32 baseline",
    "l1 pruning 20%",
    "uniform 8-bit",
    "8-bit with activations",
    "half the channels removed",
    "uniform 4-bit",
    "prune 80% + 4-bit, one run",
)
NOTES = {"8-bit with activations": ", on integers", "half the channels removed": ", a quarter of the multiply-adds"}


def rows() -> list[tuple[str, str, int]]:
    """Method, accuracy and bytes of each drawn row, as measured."""
    table = (DOCS / "measured.md").read_text().partition("## The main job")[2].partition("\n## ")[0]
    found = {}
    for name, rest in re.findall(r"^(\S.*?)  +(.*\d)$", table, flags=re.M):
        percents, size = re.findall(r"\d+\.\d+%", rest), re.search(r"\d[\d,]{4,}", rest)
        if size:
            accuracy = percents[0] if name == ROWS[0] else percents[1]  # the baseline has no untuned one before it
            found[name] = (accuracy, int(size[0].replace(",", "")))
    return [(name, *found[name]) for name in ROWS]


def draw(path: Path) -> None:
    """A bar a row: kilobytes of the saved file, with the accuracy of the loaded one beside it."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "jaxcomp", "svg.fonttype": "none", "font.family": "sans-serif"})
    drawn = rows()
    figure, axes = plt.subplots(figsize=(8.4, 3.1), layout="constrained")
    base = drawn[0][2]
    bars = axes.barh([name for name, _, _ in drawn], [size / 1000 for *_, size in drawn], height=0.62)
    for bar, (name, accuracy, size) in zip(bars, drawn, strict=True):
        bar.set_color("#9aa0a6" if size == base else "#3b6ea8")
        ratio = "" if size == base else f", {base / size:.1f}x smaller"
        text = f"{size / 1000:,.0f} kB{ratio}, {accuracy} right{NOTES.get(name, '')}"
        axes.text(size / 1000 + 12, bar.get_y() + bar.get_height() / 2, text, va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * base / 1000)
    axes.set_xticks([])
    axes.tick_params(left=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(
        "One small network on digits: bytes of the saved file, and what it gets right once loaded", fontsize=10
    )
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(DOCS / "size.svg")
