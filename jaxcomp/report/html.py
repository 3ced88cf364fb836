"""A report as one page of HTML. Wants the extra ``report``."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import NamedTuple

from jaxcomp.report import words
from jaxcomp.report.compare import Change
from jaxcomp.report.contents import Contents, Drawn
from jaxcomp.report.markdown import coverage_rows
from jaxcomp.report.pictures import frontier_png, histogram_png, mask_pixels, mask_png


class Layer(NamedTuple):
    """One row of the page's table: what it says, and how long its bars are, in percent of the longest."""

    change: Change
    bits: float
    zeros: float
    before: float
    after: float


class Card(NamedTuple):
    """The pictures of one leaf, as addresses that hold them."""

    path: str
    says: str
    histogram: str
    counted: str
    mask: str
    mask_says: str
    mask_size: tuple[int, int]


def html_of(report: Contents) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["broken"] = lambda path: Markup("/<wbr>").join(path.split("/"))
    for said in (words.percent, words.count, words.short, words.size, words.score):
        environment.globals[said.__name__] = said
    page = environment.from_string(Path(__file__).with_name("page.html.jinja").read_text("utf-8"))
    by_path = {layer.path: layer for layer in report.layers}
    picture = frontier_png(report.points, score=report.score, higher=report.higher) if report.points else b""
    return page.render(
        report=report,
        layers=_layers(report),
        frontier=_address(picture) if picture else "",
        cards=[_card(drawn, by_path[drawn.path]) for drawn in report.drawn],
        coverage=coverage_rows(report),
    )


def frame_of(report: Contents) -> str:
    """The page in a frame of its own, so that neither its styles nor a notebook's reach the other."""
    return (
        f'<iframe title="{escape(report.title, quote=True)}" srcdoc="{escape(html_of(report), quote=True)}"'
        ' style="width:100%;height:640px;border:1px solid #d5dce2;border-radius:6px;background:#fff"></iframe>'
    )


def _layers(report: Contents) -> list[Layer]:
    sides = [side for layer in report.layers for side in (layer.before, layer.after) if side is not None]
    most_bytes = max((side.bytes for side in sides), default=0) or 1
    most_bits = max((side.bits or 0 for side in sides if side.size > 1), default=0) or 1
    rows = []
    for layer in report.layers:
        was, now = layer.before, layer.after
        rows.append(
            Layer(
                layer,
                bits=min(100.0, 100 * ((now and now.bits) or 0) / most_bits),
                zeros=100 * ((now and now.zeros) or 0),
                before=100 * (was.bytes if was else 0) / most_bytes,
                after=100 * (now.bytes if now else 0) / most_bytes,
            )
        )
    return rows


def _card(drawn: Drawn, layer: Change) -> Card:
    now = layer.after
    assert now is not None
    says = [now.method, words.size(now.shape), f"{words.short(now.bits)} bits a weight"]
    says.append(f"{words.percent(now.zeros)} zeros")
    if layer.error is not None:
        says.append(f"error {words.percent(layer.error)}")
    histogram, counted, mask, mask_says, pixels = "", "", "", "", (0, 0)
    if drawn.histogram is not None:
        histogram = _address(histogram_png(drawn.histogram))
        looked, of = drawn.histogram.counted
        counted = f"{looked:,} of {of:,} weights" if looked < of else ""
    if drawn.kept is not None:
        shown, turned = mask_pixels(drawn.kept)
        mask, pixels = _address(mask_png(shown)), _shown_size(shown.shape)
        across, down = ("other axes", "last axis") if turned else ("last axis", "other axes")
        mask_says = f"dark: kept; across the {across}, down the {down}"
    return Card(drawn.path, ", ".join(says), histogram, counted, mask, mask_says, pixels)


def _shown_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Width and height on the page: whole pixels where there are few, so that each is a square."""
    rows, columns = shape
    factor = max(1, min(440 // columns, 180 // max(rows, 1)))
    return columns * factor, rows * factor


def _address(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
