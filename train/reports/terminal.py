"""What the command lines print on, and how they say an error or what they computed on."""

from __future__ import annotations

import jax
from rich.console import Console


def make_console(width: int = 120) -> Console:
    """The terminal; where there is none, wide enough for a table of ``width`` characters."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def print_error(error: Exception) -> None:
    """One error, without its traceback, on the standard error output."""
    Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)


def devices_line() -> str:
    """What the run computes on, for the report."""
    d = jax.local_devices()
    return f"{len(d)} x {d[0].device_kind}, jax {jax.__version__}"
