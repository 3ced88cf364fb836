"""``report``: what a compression did, as one page that needs nothing beside it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from jaxcomp.activations.coverage import Coverage
from jaxcomp.artifact.files import file_size, write_atomically
from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.progress import each
from jaxcomp.core.types import Leaf, PyTree
from jaxcomp.report.compare import Change, Side, changes
from jaxcomp.report.contents import Contents, Drawn, Total
from jaxcomp.report.frontier import Point
from jaxcomp.report.histograms import histogram, kept_of
from jaxcomp.report.html import frame_of, html_of
from jaxcomp.report.markdown import markdown_of
from jaxcomp.report.plain import plain_of
from jaxcomp.trace.cost import Cost

SUFFIXES = (".html", ".md", ".json")
_SPARSE = 0.3


class Report(Contents):
    """A comparison of two trees; ``save`` writes it, a notebook shows it.

    Attributes: those of :class:`~jaxcomp.report.contents.Contents`, among them ``before`` and ``after``, the totals,
    ``layers``, what became of each leaf, and ``frontier``, the measured networks that none beats.
    """

    def html(self) -> str:
        """One page, pictures and styles within, no scripts.

        Raises:
          ImportError: the extra ``report`` is not installed; the message says how to.
        """
        check_output("report.html")
        return html_of(self)

    def markdown(self) -> str:
        """The tables of the page, for a pull request or a log."""
        return markdown_of(self)

    def json(self) -> str:
        """All numbers of the page, those of the histograms too; what is not finite is null."""
        return json.dumps(plain_of(self), indent=1, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page, whole or not at all; the suffix says which kind: .html, .md or .json.

        Raises:
          ValueError: another suffix.
          ImportError: HTML without the extra ``report``.
          FileError: it cannot be written.
        """
        kinds = dict(zip(SUFFIXES, (self.html, self.markdown, self.json), strict=True))
        write_atomically(path, kinds[check_output(path)]().encode())

    def __str__(self) -> str:
        return self.markdown()

    def __repr__(self) -> str:
        sizes = f"{self.before.bytes:,} bytes became {self.after.bytes:,}"
        return f"Report({self.title!r}: {sizes}, {len(self.layers)} leaves)"

    def _repr_html_(self) -> str | None:
        try:
            check_output("report.html")
        except ImportError:
            return None  # which shows the line above
        return frame_of(self)


def check_output(path: str | os.PathLike[str]) -> str:
    """The suffix of a page's file, one of ``SUFFIXES``.

    Raises:
      ValueError: another suffix.
      ImportError: HTML without the extra ``report``.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"report: {os.fspath(path)!r} must end in {' or '.join(SUFFIXES)}; name the file so.")
    if suffix == ".html" and (missing := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]):
        raise ImportError(
            f"report: HTML wants {' and '.join(missing)}: pip install 'jaxcomp[report]'; .md and .json want nothing."
        )
    return suffix


def report(
    before: PyTree,
    after: PyTree,
    *,
    title: str = "What compression did",
    points: Sequence[Point] = (),
    score: str = "accuracy",
    higher: bool = True,
    sizes: tuple[int, int] | None = None,
    costs: tuple[Cost, Cost] | None = None,
    coverage: Coverage | None = None,
    pictures: int = 12,
) -> Report:
    """Compares a tree with what compression made of it; ``.save("page.html")`` writes a page, or Markdown, or JSON.

    Bytes are those of the files that :func:`jaxcomp.save` would write, zeros are counted, errors are measured on the
    values. Leaves belong together by path; one that was shrunk, added or removed is listed as such.

    Args:
      before: the tree as it was, mostly of arrays.
      after: the tree as it is, with compressed leaves or without.
      title: of the page.
      points: networks that you measured, each with the bytes of its file and its score.
      score: what the score is called.
      higher: whether a higher score is better.
      sizes: bytes of the files, where there are files: they hold metadata too.
      costs: ``jaxcomp.cost(fn)(params, *args)`` of both, for their multiply-accumulates.
      coverage: ``jaxcomp.coverage(fn, rules)(after, *args)``: what runs on integers, and why not more.
      pictures: of how many leaves, those with the most weights, the page has pictures.

    Raises:
      TypeError: a leaf that a file cannot hold, or that has no values.
      ValueError: a negative number of pictures, or a tree without arrays.

    >>> import jax.numpy as jnp, jaxcomp as jc
    >>> w = {"kernel": jnp.linspace(-1, 1, 4096).reshape(64, 64)}
    >>> done = report(w, jc.quantize(jc.Int(4)).apply((), w))
    >>> round(done.layers[0].after.bits, 2), done.layers[0].error < 0.1, done.ratio > 5
    (4.5, True, True)
    """
    if pictures < 0:
        raise ValueError(f"report: pictures must be a number of leaves, 0 or more, got {pictures!r}.")
    layers = changes(before, after)
    if not any(side and side.size for layer in layers for side in (layer.before, layer.after)):
        raise ValueError("report: neither tree holds an array; give it trees of parameters.")
    macs = [None, None] if costs is None else [c.macs for c in costs]
    old, new = (dict(leaves_with_paths(tree, is_leaf=is_compressed)[0]) for tree in (before, after))
    chosen = {layer.path: None for layer in _largest(layers, pictures)}
    one, other = (file_size(before), file_size(after)) if sizes is None else sizes
    return Report(
        title=title,
        before=_total(one, [layer.before for layer in layers], macs[0]),
        after=_total(other, [layer.after for layer in layers], macs[1]),
        layers=layers,
        points=tuple(points),
        score=score,
        higher=higher,
        coverage=coverage,
        drawn=tuple(each(lambda path, _: _drawn(path, old.get(path), new[path]), chosen, "report: pictures").values()),
    )


def _total(size: int, sides: list[Side | None], macs: int | None) -> Total:
    arrays = [side for side in sides if side is not None and side.zeros is not None]
    weights = sum(side.size for side in arrays)
    zeros = sum(round((side.zeros or 0.0) * side.size) for side in arrays)
    return Total(size, weights, zeros / max(weights, 1), macs)


def _largest(layers: Sequence[Change], count: int) -> list[Change]:
    """The leaves with the most weights, in the order of the tree: of those that were compressed, if any was."""
    sides = [(x, x.before, x.after) for x in layers if not x.same]
    worth = [(x, was, now) for x, was, now in sides if now is not None and now.zeros is not None and now.size > 1]
    compressed = [
        x for x, was, now in worth if was is None or was.method != now.method or _more_zeros(was, now) > _SPARSE
    ]
    found = compressed or [x for x, _, _ in worth]
    kept = {x.path for x in sorted(found, key=lambda x: -x.after.size if x.after else 0)[:count]}
    return [x for x in found if x.path in kept]


def _more_zeros(was: Side, now: Side) -> float:
    return (now.zeros or 0.0) - (was.zeros or 0.0)


def _drawn(path: str, before: Leaf | None, after: Leaf) -> Drawn:
    values = np.asarray(dense(after))
    old = None if before is None else np.asarray(dense(before))
    fits = old is not None and old.shape == values.shape and values.dtype.kind != "c"
    zeros = 1 - np.count_nonzero(values) / max(math.prod(values.shape), 1)
    sparse = zeros >= _SPARSE or (zeros > 0 and kept_of(after) is not None)
    return Drawn(path, histogram(old, after) if fits and old is not None else None, values != 0 if sparse else None)
