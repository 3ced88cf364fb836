"""A report in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from jaxcomp.report.compare import Change
from jaxcomp.report.contents import Contents
from jaxcomp.report.words import count, percent, score, short, size

Row = Sequence[str]
LAYER_HEAD = ("path", "shape", "was", "is", "bits", "zeros", "bytes before", "after", "error", "note")


def markdown_of(report: Contents) -> str:
    """The tables of a report."""
    before, after = report.before, report.after
    totals = [
        ("bytes of the file", count(before.bytes), count(after.bytes)),
        ("weights", count(before.weights), count(after.weights)),
        ("bits a weight", short(before.bits), short(after.bits)),
        ("zeros", percent(before.zeros), percent(after.zeros)),
    ]
    if before.macs is not None:
        totals.append(("multiply-accumulates", count(before.macs), count(after.macs)))
    ratio = report.ratio
    says = f"{ratio:.1f} times fewer bytes." if ratio >= 1 else f"{1 / ratio:.1f} times more bytes."
    parts = [f"# {_escaped(report.title)}", says, _table(("", "before", "after"), totals)]
    if report.points:
        best = report.frontier
        rows = [(p.name, count(p.bytes), score(p.score), "best" if p in best else "") for p in report.points]
        parts += ["## Frontier", _table(("network", "bytes", report.score, ""), rows)]
    parts += ["## Layers", _table(LAYER_HEAD, [layer_row(layer) for layer in report.layers])]
    if report.coverage is not None:
        parts += ["## Coverage", _table(*coverage_rows(report))]
    return "\n\n".join(parts) + "\n"


def layer_row(layer: Change) -> Row:
    """One layer in the columns of ``LAYER_HEAD``."""
    was, now = layer.before, layer.after
    some = now or was
    assert some is not None
    return (
        layer.path,
        size(some.shape),
        was.method if was else "",
        now.method if now else "",
        short(now.bits if now else None),
        percent(now.zeros if now else None),
        count(was.bytes if was else None),
        count(now.bytes if now else None),
        percent(layer.error),
        layer.note,
    )


def coverage_rows(report: Contents) -> tuple[Row, list[Row]]:
    """The head and the rows of the coverage."""
    head = ("site", "kind", "done", "form", "weight", "activations", "why no more")
    rows = report.coverage.rows if report.coverage is not None else ()
    return head, [(r.path, r.kind, r.done, r.form, r.weight, r.activations, r.why) for r in rows]


def _table(head: Row, rows: Sequence[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)


def _escaped(text: str) -> str:
    r"""Text that Markdown shows as it is.

    >>> _escaped("a_b|c <i>")
    'a\\_b\\|c &lt;i>'
    """
    for mark in "\\|*_`[]":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("<", "&lt;").replace("\n", " ")
