"""The table of a run: on the terminal, as report.json, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jaxcomp.artifact.files import write_atomically
from train.configs import Config, identity_of
from train.experiments.records import Row
from train.reports.figures import accuracy_axes, png_of
from train.reports.terminal import devices_line, print_table


def make_table(rows: list[Row], title: str) -> Table:
    """Method, test accuracy before and after fine-tuning and its change in percentage points, and what it costs.

    MACs and the file's bytes are also given relative to the baseline's.
    """
    notes = "\n".join(f"{row.method}: {row.note}." for row in rows if row.note)
    table = Table(
        title=title,
        caption=notes or None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("method", no_wrap=True)
    for name in ("untuned", "accuracy", "change", "zeros", "bits", "MACs", "file bytes", "ratio", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    base = rows[0]
    for row in rows:
        table.add_row(
            row.method,
            "" if row.untuned_accuracy is None else f"{row.untuned_accuracy:.2%}",
            f"{row.test_accuracy:.2%}",
            "" if row is base else f"{100 * (row.test_accuracy - base.test_accuracy):+.2f} pp",
            f"{row.zeros:.1%}",
            str(row.bits),
            f"{row.macs / base.macs:.2f}x",
            f"{row.file_bytes:,}",
            f"{base.file_bytes / row.file_bytes:.1f}x",
            f"{row.seconds:.1f}",
        )
    return table


def write_report(rows: list[Row], config: Config, console: Console) -> Path:
    """Prints the table; writes report.json and accuracy_against_bytes.png into the run's folder, which it returns."""
    folder = config.folder
    report = {"settings": identity_of(config), "device": devices_line(), "rows": [asdict(r) for r in rows]}
    write_atomically(folder / "report.json", json.dumps(report, indent=1, default=str).encode())
    write_atomically(folder / "accuracy_against_bytes.png", picture(rows, f"{config.dataset}, {config.model.name}"))
    print_table(console, make_table(rows, f"{config.dataset}: accuracy on the test split after the last epoch"))
    console.print(f"Files, report.json and accuracy_against_bytes.png are in {folder}.", markup=False, soft_wrap=True)
    return folder


def picture(rows: list[Row], title: str) -> bytes:
    """A PNG of test accuracy against bytes of the file, bytes on a logarithmic axis."""
    figure, axes = accuracy_axes(title, "bytes of the saved file", (8, 5))
    places = [(row.file_bytes, 100 * row.test_accuracy) for row in rows]
    for i, (row, place, around) in enumerate(zip(rows, places, rings(places), strict=True)):
        marker = "os^"[i // 10 % 3]  # colours repeat after ten
        (line,) = axes.plot(*place, marker, color=f"C{i % 10}", markersize=7 + 6 * around, zorder=3 + 1 / (1 + around))
        if around:  # beside the row that lies there already, not over it
            line.set(markerfacecolor="none", markeredgewidth=2)
        axes.plot([], [], marker, color=f"C{i % 10}", markersize=7, label=row.method)
    axes.axhline(100 * rows[0].test_accuracy, color="0.7", linewidth=1, zorder=1)
    axes.margins(0.1)
    return png_of(figure, axes)


def rings(places: Sequence[tuple[float, float]]) -> list[int]:
    """For each point of bytes and percent, how many earlier ones lie where its marker would: it is drawn around them.

    Two lie in one place where, of the spans that all points cover (bytes by ratio), they are less than 4% apart.

    >>> rings([(1000, 99.0), (4000, 97.0), (1001, 99.01), (1000, 99.0)])
    [0, 0, 1, 2]
    """
    x, y = np.log([p[0] for p in places]), np.asarray([p[1] for p in places])
    spans = [max(float(np.ptp(v)), 1e-9) for v in (x, y)]
    apart = [np.maximum(abs(x[:i] - x[i]) / spans[0], abs(y[:i] - y[i]) / spans[1]) for i in range(len(places))]
    out: list[int] = []
    for near in apart:
        out.append(max((out[j] + 1 for j in np.flatnonzero(near < 0.04)), default=0))
    return out
