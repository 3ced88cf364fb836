"""What the command lines print on, and how they say an error."""

from __future__ import annotations

from rich.console import Console


def make_console(width: int = 120) -> Console:
    """The terminal; where there is none, wide enough for a table of ``width`` characters."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def print_error(error: Exception) -> None:
    """One error, without its traceback, on the standard error output."""
    Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
