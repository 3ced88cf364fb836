"""Rows of words in columns, as every report prints them."""

from __future__ import annotations

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
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in used]
    sides = [right[i : i + 1] for i in used]
    lines = []
    for row in rows:
        cells = [
            row[i].rjust(w) if side == "r" else row[i].ljust(w) for i, w, side in zip(used, widths, sides, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
