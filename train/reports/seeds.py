"""Several runs that differ in their seed as one table."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

from rich.box import SIMPLE_HEAD
from rich.table import Table

from train.configs import difference
from train.errors import RunError
from train.experiments.records import Row

Runs = dict[int, tuple[Row, ...]]
"""The rows of finished runs of one job by seed, ascending; the same methods in each."""


def read(folders: tuple[Path, ...]) -> Runs:
    """The runs of some folders.

    Raises:
      RunError: no folder, one without a report, runs of different settings or methods, or a seed that is there twice.
    """
    if not folders:
        raise RunError("name the folders of finished runs, such as runs/digits.")
    found: dict[int, tuple[Path, dict[str, object], tuple[Row, ...]]] = {}
    for folder in folders:
        try:
            report = json.loads((folder / "report.json").read_text())
            settings, rows = dict(report["settings"]), tuple(Row(**row) for row in report["rows"])
            seed = settings.pop("seed")
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise RunError(f"{str(folder)!r} holds no finished run ({e}); run `python -m train` to its end.") from e
        if seed in found:
            raise RunError(f"{str(folder)!r} and {str(found[seed][0])!r} both have seed {seed}; name one of them.")
        found[seed] = folder, settings, rows
    first, settings, rows = next(iter(found.values()))
    for folder, others, own in found.values():
        k = difference(settings, others)
        if k is not None:
            raise RunError(f"{str(folder)!r} has {k} = {others.get(k)}, {str(first)!r} has {settings.get(k)}.")
        if [r.name for r in own] != [r.name for r in rows]:
            names = ", ".join(r.name for r in rows)
            raise RunError(f"{str(folder)!r} has other rows than {str(first)!r}, which has {names}.")
    return {seed: found[seed][2] for seed in sorted(found)}


def make_table(runs: Runs, against: str) -> Table:
    """Accuracy of each seed on the test split, the mean, and the change against another row of the same seed.

    Raises:
      RunError: no row has that name.
    """
    first = next(iter(runs.values()))
    names = [row.name for row in first]
    if against not in names:
        raise RunError(f"no row is called {against!r}; there are {', '.join(names)}.")
    base = [rows[names.index(against)].test_accuracy for rows in runs.values()]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    seeds = [f"seed {seed}" for seed in runs]
    for name in (*seeds, "mean", f"against {against}, pp", "file bytes", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    float_bytes = first[0].file_bytes
    for i, name in enumerate(names):
        reached = [rows[i].test_accuracy for rows in runs.values()]
        change = [100 * (x - y) for x, y in zip(reached, base, strict=True)]
        size = mean(rows[i].file_bytes for rows in runs.values())
        table.add_row(
            first[i].method,
            *(f"{x:.2%}" for x in reached),
            f"{mean(reached):.2%}",
            "" if name == against else f"{mean(change):+.2f} [{min(change):+.2f}, {max(change):+.2f}]",
            f"{size:,.0f}",
            f"{float_bytes / size:.1f}x",
        )
    return table
