"""How far a long piece of work is: a bar on a terminal or in a notebook from the third second on, else nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from threading import Lock, Timer
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

import jax

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")
R = TypeVar("R")

DELAY = 2.0
"""Seconds that work takes before it is shown: a flash of a bar says nothing."""


@contextmanager
def progress(name: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
    """Shows work on the standard error output while the block runs, and removes it at the end.

    Quiet where nobody looks: into a pipe or a file, on a terminal that cannot move its cursor, in a notebook without
    ``ipywidgets``. Nothing process-wide is changed, and no thread outlives the block.

    Args:
      name: what is done: "save".
      total: how much there is to do, in any unit; None shows that work goes on, and for how long.

    Yields:
      What to call with how much was done since the last call.

    >>> with progress("sum", total=3) as advance:
    ...     for _ in range(3):
    ...         advance(1)
    """
    if not watched():
        yield _nothing
        return
    bar = _Bar(name, total)
    try:
        yield bar.advance
    finally:
        bar.end()


def each(fn: Callable[[str, T], R], items: Mapping[str, T], name: str) -> dict[str, R]:
    """``{path: fn(path, item)}``, shown as it is done; each result is waited for where that is seen.

    >>> each(lambda path, x: x + len(path), {"ab": 1}, "add")
    {'ab': 3}
    """
    if not watched():
        return {path: fn(path, item) for path, item in items.items()}
    # JAX gives a result back before it is computed: without waiting, the bar would be full at once.
    done = {}
    with progress(name, len(items)) as advance:
        for path, item in items.items():
            done[path] = jax.block_until_ready(fn(path, item))
            advance(1)
    return done


def watched() -> bool:
    """Whether somebody would see a bar."""
    if not sys.stderr or not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        return False  # before rich is imported, which takes a tenth of a second
    console = _console()
    if console.is_jupyter:
        return find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal


def _nothing(amount: float) -> None:
    """Nobody looks."""


@cache
def _console() -> Console:
    """One for all bars, so that one within another stands below it."""
    from rich.console import Console

    return Console(stderr=True)


class _Bar:
    """A bar that shows itself when its time has come, from a thread of its own: the work may be one long call."""

    def __init__(self, name: str, total: float | None) -> None:
        self._name, self._total, self._done = name, total, 0.0
        self._began = monotonic()  # rich's own clock
        self._lock, self._ended = Lock(), False
        self._rich: Progress | None = None
        self._timer = Timer(DELAY, self._show)
        self._timer.daemon = True
        self._timer.start()

    def advance(self, amount: float) -> None:
        with self._lock:
            self._done += amount
            if self._rich is not None:
                self._rich.update(self._rich.task_ids[0], completed=self._done)

    def end(self) -> None:
        self._timer.cancel()
        with self._lock:
            self._ended = True
            if self._rich is not None:
                self._rich.stop()

    def _show(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = [TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()]
        if self._total is not None:
            columns += [TimeRemainingColumn(), TextColumn("left")]
        with self._lock:
            if self._ended:
                return
            # Not redirecting: sys.stdout is the user's.
            self._rich = Progress(
                *columns, console=_console(), transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._rich.add_task(self._name, total=self._total, completed=int(self._done))
            self._rich.tasks[0].start_time = self._began
            self._rich.start()
