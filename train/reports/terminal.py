"""What the command lines print on, and how they print a table, an error or what they computed on."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text


def make_console(width: int = 120) -> Console:
    """The terminal; where there is none, wide enough for a table of ``width`` characters."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def print_table(console: Console, table: Table) -> None:
    """A table, whole at any width: columns that do not fit beside the first go into further tables below it."""
    parts = _parts(console, table)
    for part in parts:
        part.title = table.title if part is parts[0] else None
        part.caption = table.caption if part is parts[-1] else None
        console.print(part)


def _parts(console: Console, table: Table) -> list[Table]:
    """Tables of the first column and as many others as fit, in order."""
    name, *others = table.columns
    parts: list[Table] = []
    for column in others:
        wider = _of_columns(table, [*parts[-1].columns, column]) if parts else None
        if wider is not None and _width(console, wider) <= console.width:
            parts[-1] = wider
        else:
            parts.append(_of_columns(table, [name, column]))
    for part in parts:
        if _width(console, part) > console.width:
            for i, column in enumerate(part.columns):  # a name and a figure are wider than the terminal
                part.columns[i] = copy.copy(column)
                part.columns[i].no_wrap, part.columns[i].overflow = False, "fold"
    return parts or [table]


def _width(console: Console, table: Table) -> int:
    """That of the whole table, however wide the console is."""
    return Measurement.get(console, console.options.update(width=1 << 12), table).maximum


def _of_columns(table: Table, columns: Sequence[Column]) -> Table:
    part = copy.copy(table)
    part.title = part.caption = None
    part.columns = [copy.copy(column) for column in columns]
    for i, column in enumerate(part.columns):
        column._index = i
    return part


def print_error(error: Exception | str) -> None:
    """One error, without its traceback, on the standard error output; what is in brackets is text, not markup."""
    console = Console(stderr=True)
    text = Text.assemble(("error:", "bold red"), f" {error}")
    console.print(text, highlight=False, soft_wrap=not console.is_terminal)


def print_stopped(what: str, why: str = "stopped.") -> None:
    """Why the command stopped, the keyboard say, and what the same command does next."""
    text = f"{why.rstrip('.')}; the same command {what}."
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


def devices_line() -> str:
    """What the run computes on, for the report."""
    d, n = jax.devices(), jax.process_count()
    return f"{len(d)} x {d[0].device_kind}{f' in {n} processes' if n > 1 else ''}, jax {jax.__version__}"
