"""``summary``: what each leaf of a tree is, what it takes, and what a program does with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.activations.coverage import Coverage, Covered, coverage
from jaxcomp.activations.planning import Rules
from jaxcomp.core.leaves import CompressedLeaf, dense, is_compressed, method_of, pack
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.tables import columns, html_table
from jaxcomp.core.types import Leaf, PyTree, Shape
from jaxcomp.core.words import bytes_of, known_here, percent_words, shape_words
from jaxcomp.core.wrappers import Switch
from jaxcomp.trace.program import is_array_like, shapes_of, trace
from jaxcomp.trace.sites import Site, sites_of, unread

_HEAD = ("leaf", "shape", "method", "details", "bits", "entropy", "zeros", "bytes", "share", "MACs", "done", "why")
_ENTROPY = _HEAD.index("entropy")
_SIDES = "llllrrrrr"
"""Of the columns from the left; that of the entropy, where there is one, makes one more."""


@dataclass(frozen=True)
class Row:
    """One leaf.

    Attributes:
      path: of the leaf.
      shape, dtype: of the array that it stands for.
      method: what was done to it, "Masked Quantized int4"; of an array its type.
      details: what shares a scale or a table, and the like.
      bytes: what its arrays take packed, the bytes that ``pack`` leaves.
      held: what its arrays take now.
      plain: what the array would take that it stands for.
      share: ``bytes`` as a fraction of the whole tree's.
      zeros: the fraction of its elements that are 0; None where the values are not known, as in jit, and of what is
        not of numbers.
      macs: multiply-accumulates of its products in one run of the function; None without a function.
      done: what the function does with its products ("integer", "fake", "weight-only", "lookup", "exact", …).
      why: why no more is done, or why nothing multiplies it.
      entropy: bits for each element that its codes and its mask take at their entropy, where that was asked for.
    """

    path: str
    shape: Shape
    dtype: str
    method: str
    details: str
    bytes: int
    held: int
    plain: int
    share: float
    zeros: float | None
    macs: int | None = None
    done: str = ""
    why: str = ""
    entropy: float | None = None

    @property
    def size(self) -> int:
        """How many elements there are."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bits(self) -> float:
        """Packed bits for each element, scales, masks and tables included; 0 without elements."""
        return 8 * self.bytes / self.size if self.size else 0.0


@dataclass(frozen=True)
class Summary:
    """The rows of a tree; ``print`` it for a table, or leave it at the end of a notebook's cell.

    Attributes:
      rows: a leaf each, in the tree's order.
      unread: what of the function may multiply and is counted nowhere, in words.
      between: multiply-accumulates of products between activations, such as attention's.
    """

    rows: tuple[Row, ...]
    unread: tuple[str, ...] = ()
    between: int = 0

    @property
    def size(self) -> int:
        """How many elements all leaves stand for."""
        return sum(row.size for row in self.rows)

    @property
    def bytes(self) -> int:
        """What all arrays take, packed."""
        return sum(row.bytes for row in self.rows)

    @property
    def held(self) -> int:
        """What all arrays take now."""
        return sum(row.held for row in self.rows)

    @property
    def plain(self) -> int:
        """What the arrays would take that the leaves stand for."""
        return sum(row.plain for row in self.rows)

    @property
    def bits(self) -> float:
        """Packed bits for each element."""
        return 8 * self.bytes / self.size if self.size else 0.0

    @property
    def zeros(self) -> float | None:
        """The fraction of elements that are 0, where all leaves' are known."""
        known = [row.zeros * row.size for row in self.rows if row.zeros is not None]
        return sum(known) / self.size if len(known) == len(self.rows) and self.size else None

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of all products with a leaf; None without a function."""
        known = [row.macs for row in self.rows if row.macs is not None]
        return sum(known) if known else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What one should know beside the table."""
        notes = [f"not counted: {words}" for words in self.unread]
        if self.between:
            notes.append(f"{self.between:,} more MACs are between activations.")
        if self.held > self.bytes:
            more = " more than as plain arrays," if self.held > self.plain else ""
            notes.append(
                f"In training form the tree takes {self.held:,} bytes of memory,{more} packed {self.bytes:,}: call"
                " jaxcomp.pack."
            )
        return tuple(notes)

    def cells(self) -> list[tuple[str, ...]]:
        """The table in words: its head, a row a leaf, the sums."""
        zeros = "" if self.zeros is None else percent_words(self.zeros)
        macs = "" if self.macs is None else f"{self.macs:,}"
        ratio = f"{self.plain / self.bytes:.3g}x smaller" if 0 < self.bytes < self.plain else ""
        measured = (f"{self.bits:.3g}", "", zeros, f"{self.bytes:,}", "100%", macs)
        all_cells = [_HEAD, *map(_cells, self.rows), ("total", f"{self.size:,}", ratio, "", *measured, "", "")]
        return all_cells if self._with_entropy else [(*row[:_ENTROPY], *row[_ENTROPY + 1 :]) for row in all_cells]

    @property
    def _with_entropy(self) -> bool:
        return any(row.entropy is not None for row in self.rows)

    @property
    def _sides(self) -> str:
        return _SIDES + "r" * self._with_entropy

    def __str__(self) -> str:
        return "\n".join([columns(self.cells(), self._sides), *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self.cells(), self._sides, sums=True) + "".join(
            f"<p>{escape(note)}</p>" for note in self.notes
        )


def summary(
    tree: PyTree,
    fn: Callable[..., PyTree] | None = None,
    *args: PyTree,
    rules: Rules | None = None,
    integer: bool = False,
) -> Summary:
    """What each leaf of a tree is, what it takes and, with a function, what is done with it and why no more.

    Sizes come from shapes alone. Zeros are counted where values are known.

    Args:
      tree: parameters, with compressed leaves or without; leaves may be tracers or ``jax.ShapeDtypeStruct``.
      fn: a pure function ``fn(params, *args)`` of the materialized tree; it is traced on shapes, and nothing of it is
        computed.
      args: its other arguments, or their shapes.
      rules, integer: of activations, as :func:`~jaxcomp.activations.function.quantize_function` has them; without, the
        products' activations stay as they are.

    Raises:
      ValueError: ``fn`` reads no leaf of the tree by a product, or what :func:`~jaxcomp.activations.coverage.coverage`
        raises of rules.

    >>> import jaxcomp as jc
    >>> params = {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}
    >>> tree = jc.pack(jc.quantize(jc.Int(4)).apply((), params))
    >>> print(summary(tree, lambda p, x: x @ p["kernel"] + p["bias"][None], jnp.ones((1, 8))))
    leaf    shape  method          details  bits  zeros  bytes  share  MACs  done   why
    bias    8      float32                    32   100%     32    33%     0         no product reads it
    kernel  8x8    Quantized int4  8 scales    8    88%     64    67%    64  exact
    total   72     3x smaller               10.7    89%     96   100%    64
    """
    named, _ = leaves_with_paths(tree, is_leaf=is_compressed)
    rows = [_row(path, leaf) for path, leaf in named if is_array_like(leaf)]
    total = sum(row.bytes for row in rows) or 1
    rows = [replace(row, share=row.bytes / total) for row in rows]
    if fn is None:
        return Summary(tuple(rows))
    program = trace(fn, shapes_of(tree), *args)
    found = sites_of(program)
    covered = coverage(fn, {} if rules is None else rules, integer=integer)(tree, *args) if found else Coverage(())
    done = {row.path: row for row in covered.rows}
    asked = rules is not None
    rows = [_run(row, [(s, done[s.path]) for s in found if _owner(s) == row.path], found, asked=asked) for row in rows]
    between = sum(s.macs for s in found if _owner(s) is None)
    notes = [f"{u.path} ({u.primitive}): {u.why}" for u in unread(program)]
    return Summary(tuple(rows), tuple(notes), between)


def _row(path: str, leaf: Leaf) -> Row:
    small = jax.eval_shape(pack, leaf) if isinstance(leaf, CompressedLeaf) and not isinstance(leaf, Switch) else leaf
    return Row(
        path,
        tuple(leaf.shape),
        str(leaf.dtype),
        method_of(leaf),
        ", ".join(leaf.details()) if isinstance(leaf, CompressedLeaf) else "",
        bytes=bytes_of(small),
        held=bytes_of(leaf),
        plain=bytes_of(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)),
        share=0.0,
        zeros=_zeros(leaf),
    )


def _zeros(leaf: Leaf) -> float | None:
    """Counted in the dense array where it is known here."""
    if isinstance(leaf, CompressedLeaf) and (seen := leaf.zeros_seen()) is not None:
        return seen
    if not all(map(known_here, jax.tree.leaves(leaf))):
        return None
    x = dense(leaf)
    if not x.size or not jnp.issubdtype(x.dtype, jnp.number):
        return None
    return 1 - int(np.count_nonzero(np.asarray(x))) / x.size


def _owner(site: Site) -> str | None:
    """The leaf that a site's work is counted to: the first of several that its weight is computed from."""
    if site.weight is None:
        return None
    return site.leaf or next(iter(site.operands[site.weight].params), None)


def _run(row: Row, own: list[tuple[Site, Covered]], found: Sequence[Site], *, asked: bool) -> Row:
    """The row with what a function does with it."""
    others = any(row.path in operand.params for site in found for operand in site.operands)
    why = []
    if not own:
        why.append("a product's weight is computed from it" if others else "no product reads it")
    elif row.method == row.dtype:
        why.append("no transform took it")
    why += [covered.why for _, covered in own if covered.why and asked]
    done = dict.fromkeys(covered.done for _, covered in own)
    return replace(row, macs=sum(site.macs for site, _ in own), done=", ".join(done), why="; ".join(dict.fromkeys(why)))


def _cells(row: Row) -> tuple[str, ...]:
    zeros = "" if row.zeros is None else percent_words(row.zeros)
    macs = "" if row.macs is None else f"{row.macs:,}"
    ideal = "" if row.entropy is None else f"{row.entropy:.3g}"
    measured = (f"{row.bits:.3g}", ideal, zeros, f"{row.bytes:,}", percent_words(row.share), macs)
    return (row.path, shape_words(row.shape), row.method, row.details, *measured, row.done, row.why)
