"""Rows of words in columns, as every report prints them and notebooks show them."""

from __future__ import annotations

import html
from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Rows, the first of them the heads, in columns as wide as they must be; empty columns are left out.

    Args:
      rows: of cells, as many in each.
      right: a letter a column, "r" where its cells end at the right; what is missing begins at the left.

    >>> print(columns([("leaf", "bytes", "why"), ("kernel", "1,024", ""), ("b", "64", "")], "lr"))
    leaf    bytes
    kernel  1,024
    b          64
    """
    used = _used(rows)
    widths = [max(len(row[i]) for row in rows) for i in used]
    sides = [right[i : i + 1] for i in used]
    lines = []
    for row in rows:
        cells = [
            row[i].rjust(w) if side == "r" else row[i].ljust(w) for i, w, side in zip(used, widths, sides, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def html_table(rows: Sequence[Sequence[str]], right: str = "", *, sums: bool = False) -> str:
    """The same as an HTML table without styles of its own; ``sums`` says that the last row is the others' sum.

    >>> html_table([("leaf", "why"), ("<w>", "")])
    '<table><tr><th style="text-align:left">leaf</th></tr><tr><td style="text-align:left">&lt;w&gt;</td></tr></table>'
    """
    used, last = _used(rows), len(rows) - 1 if sums else 0
    lines = []
    for n, row in enumerate(rows):
        tag = "th" if n in (0, last) else "td"
        aligned = (("right" if right[i : i + 1] == "r" else "left", html.escape(row[i])) for i in used)
        cells = "".join(f'<{tag} style="text-align:{side}">{text}</{tag}>' for side, text in aligned)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _used(rows: Sequence[Sequence[str]]) -> list[int]:
    """The columns that hold a word below their head; of a table of heads alone, all."""
    return [i for i in range(len(rows[0])) if len(rows) == 1 or any(row[i] for row in rows[1:])]
