"""Timing on a shared machine: interleaved rounds, paired ratios, rounds with foreign load left out."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.markup import escape
from rich.table import Table
from rich.text import Text

FOREIGN_LIMIT = 0.10  # of the machine's cores, over a round
MIN_QUIET = 5


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Fields:
      name: of the case.
      ratio, low, high: median, p10 and p90 of the paired ratios; equal where the figure does not vary.
      detail: what else was measured, in words.
      target: what the ratio is wanted to be ("<= 1.08", ">= 0.9"), or nothing.
      error: why there is no figure; the ratio is NaN then.
    """

    name: str
    ratio: float
    low: float
    high: float
    detail: str = ""
    target: str = ""
    error: str = ""

    @classmethod
    def failed(cls, name: str, error: str, target: str = "") -> Row:
        """A row in the place of a figure that was not to be had."""
        return cls(name, math.nan, math.nan, math.nan, target=target, error=error)

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None where there is none."""
        if not self.target:
            return None
        relation, value = self.target.split()
        return bool(self.ratio <= float(value) if relation == "<=" else self.ratio >= float(value))

    def json(self) -> dict[str, Any]:
        """For a file, which has no NaN."""
        figures = {"ratio": None, "low": None, "high": None} if self.error else {}
        return {**asdict(self), **figures, "met": self.met}


@dataclass(frozen=True)
class Report:
    """The rows of one benchmark, and how they were measured."""

    title: str
    baseline: str
    rows: list[Row]
    notes: list[str]

    def table(self) -> Table:
        """For the terminal."""
        notes = Text("\n".join(self.notes))
        table = Table(title=self.title, caption=notes, caption_justify="left", title_justify="left")
        table.add_column("case")
        table.add_column(f"ratio to {self.baseline}", justify="right")
        table.add_column("p10-p90", justify="right")
        table.add_column("target", justify="right")
        table.add_column("measured")
        for row in self.rows:
            verdict = {None: "", True: " [green]met[/]", False: " [red]missed[/]"}[row.met]
            spread = "" if row.low == row.high or row.error else f"{row.low:.3f}-{row.high:.3f}"
            figure = "[red]none[/]" if row.error else f"{row.ratio:.3f}"
            table.add_row(row.name, figure, spread, row.target + verdict, escape(row.error or row.detail))
        return table

    def json(self) -> dict[str, Any]:
        """For a file."""
        return {**asdict(self), "rows": [row.json() for row in self.rows]}


@dataclass(frozen=True)
class Timings:
    """Seconds of each case by round; the columns of one round belong together.

    Fields:
      seconds: case -> seconds of the rounds that count.
      rounds, quiet: how many were run, and how many had no foreign load; None where that cannot be seen.
    """

    seconds: dict[str, np.ndarray]
    rounds: int
    quiet: int | None

    def median(self, case: str) -> float:
        """Seconds of one call."""
        return float(np.median(self.seconds[case]))

    def row(self, case: str, baseline: str, *, factor: float = 1.0, detail: str = "", target: str = "") -> Row:
        """The paired ratio ``factor * case / baseline``."""
        return self._row(case, factor * self.seconds[case] / self.seconds[baseline], detail, target)

    def speed_row(self, case: str, baseline: str, *, factor: float, detail: str = "", target: str = "") -> Row:
        """The paired ratio of speeds, ``factor * baseline / case``."""
        return self._row(case, factor * self.seconds[baseline] / self.seconds[case], detail, target)

    def _row(self, case: str, ratios: np.ndarray, detail: str, target: str) -> Row:
        low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
        return Row(case, float(middle), float(low), float(high), detail or f"{self.median(case) * 1e3:.1f} ms", target)

    def notes(self) -> list[str]:
        """What was run, where, and how much foreign load there was."""
        device = jax.devices()[0]
        cores = os.cpu_count()
        where = f"{device.device_kind} ({cores} cores), jax {jax.__version__}, Python {platform.python_version()}"
        if self.quiet is None:
            load = "foreign load is not visible here: all rounds count"
        elif self.quiet < MIN_QUIET:
            load = f"only {self.quiet} without foreign load: ALL count, repeat on a quiet machine"
        else:
            load = f"{self.quiet} without foreign load count"
        return [where, f"{self.rounds} interleaved rounds, {load}; ratios are medians of paired rounds"]


def measure(
    cases: dict[str, Callable[[], Any]], *, rounds: int, inner: int = 1, warm: bool = False, queued: bool = False
) -> Timings:
    """Runs all cases once a round, A B C A B C, and times each.

    Args:
      cases: name -> a call whose result can be waited for.
      rounds: after one that is not counted.
      inner: calls a timing; the seconds are of one.
      warm: one more call before each timing, so that caches and the allocator's pages are as the case itself left them.
      queued: the calls of a timing are waited for together, so that a device never waits for the host.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    quiet: list[bool | None] = []
    for i in range(rounds + 1):
        before = _foreign_seconds()
        started = time.perf_counter()
        for name, call in cases.items():
            if warm:
                jax.block_until_ready(call())
            start = time.perf_counter()
            for _ in range(inner):
                result = call() if queued else jax.block_until_ready(call())
            jax.block_until_ready(result)
            if i:
                seconds[name].append((time.perf_counter() - start) / inner)
        if i:
            quiet.append(_was_quiet(before, _foreign_seconds(), time.perf_counter() - started))
    known = [q for q in quiet if q is not None]
    counted = sum(known) if len(known) == rounds else None
    use_all = counted is None or counted < MIN_QUIET
    keep = np.array([use_all or bool(q) for q in quiet])
    return Timings({name: np.array(s)[keep] for name, s in seconds.items()}, rounds, counted)


def _foreign_seconds() -> float | None:
    """Processor seconds that others have used since the machine started (Linux; stolen time counts)."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.read_text().split("\n")[0].split()[1:9])
    own = sum(os.times()[:4])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own


def _was_quiet(before: float | None, after: float | None, wall: float) -> bool | None:
    if before is None or after is None:
        return None
    return after - before < FOREIGN_LIMIT * wall * (os.cpu_count() or 1)
