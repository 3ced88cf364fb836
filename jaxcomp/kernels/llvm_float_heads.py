"""LLVM code of attention in floats to the heads of keys and values, one after the other.

A few queries at a time: their scores lie in a core's nearest cache, and never in memory. Keys and values of a head are
laid out once for many queries, from where the program has them; the result is written where it wants it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from jaxcomp.core.types import Shape
from jaxcomp.kernels.llvm_beside import Numbers
from jaxcomp.kernels.llvm_code import Operand, Types, Writer, counted, everywhere, turned
from jaxcomp.kernels.llvm_numbers import fma
from jaxcomp.kernels.llvm_rowwise import Passes, Row, write_passes
from jaxcomp.trace.pointwise import Pointwise

if TYPE_CHECKING:
    from llvmlite import ir

ROWS = 6
"""Queries that meet a key or a value while it lies in a register."""
TOGETHER = (3, 2, 1)
"""Queries whose scores are gone over at once: the first that divides those."""
QUERIES = 256
"""Queries of a head for which its keys and values are laid out."""

Strides = tuple[int, ...]
"""Numbers from one index of each axis of the scores to the next."""


class Place(NamedTuple):
    """Steps along the axes of the scores, and from one feature to the next."""

    along: Strides
    width: int


class Heads(NamedTuple):
    """What the code depends on.

    Attributes:
      sizes: of the scores.
      keys, queries: the axes of the scores that these are; along the others are heads.
      widths: of keys and of values.
      q, k, v, result: where they are.
      beside: of the values that meet the scores the steps, and whether they are booleans.
      function: what is made of the scores.
      varying: for each of its values whether it varies along a row.
      lanes: numbers of a vector.
      several: vectors of keys that queries meet at once.
      most: vectors of values, at most.
    """

    sizes: Shape
    keys: int
    queries: int
    widths: tuple[int, int]
    q: Place
    k: Place
    v: Place
    result: Place
    beside: tuple[tuple[Strides, bool], ...]
    function: Pointwise
    varying: tuple[bool, ...]
    lanes: int
    several: int
    most: int

    @property
    def blocks(self) -> int:
        """Parts of the queries of a head."""
        return -(-self.sizes[self.queries] // QUERIES)

    @property
    def chunks(self) -> int:
        """Such parts, of all heads."""
        return self.blocks * math.prod(n for i, n in enumerate(self.sizes) if i not in (self.keys, self.queries))


def mixed(code: Heads, b: ir.IRBuilder, operands: list[Operand], first: ir.Value, _: ir.Value) -> None:
    """Some queries of a head."""
    _Chunk(code, b, operands, first).write()


class _Chunk:
    """Writes the code for some queries of a head."""

    def __init__(self, code: Heads, b: ir.IRBuilder, operands: list[Operand], number: ir.Value) -> None:
        from llvmlite import ir

        self.code, self.b, self.t = code, b, Types()
        t, self.length, self.lanes = self.t, code.sizes[code.keys], code.lanes
        self.kind = ir.VectorType(t.f32, code.lanes)
        self.passes = Passes(code.function, code.varying)
        blocks = t.word(code.blocks)
        head, self.block = b.sdiv(number, blocks), b.srem(number, blocks)
        index = self._index(head)
        _, q, k, v, *beside, out = operands
        self.q, self.k, self.v, self.out = (
            Numbers(b, x.data).behind(self._offset(index, place.along))
            for x, place in zip((q, k, v, out), (code.q, code.k, code.v, code.result), strict=True)
        )
        self.beside = [
            (Numbers(b, x.data, boolean).behind(self._offset(index, along)), along)
            for x, (along, boolean) in zip(beside, code.beside, strict=True)
        ]
        self.panel = code.several * code.lanes
        self.padded = -(-self.length // self.panel) * self.panel
        self.rows = min(ROWS, code.sizes[code.queries])
        self.row = self.passes.slots * self.padded

    def write(self) -> None:
        """All of it."""
        b, t, code = self.b, self.t, self.code
        w = Writer(b, t)
        room = self.padded * (code.widths[0] + code.widths[1]) + self.rows * self.row
        base = w.libc("malloc", t.i64, t.word(4 * room + 64))
        self.laid_keys = Numbers(b, b.and_(b.add(base, t.word(63)), t.word(-64)))
        self.laid_values = self.laid_keys.behind(t.word(self.padded * code.widths[0]))
        self.scores = self.laid_values.behind(t.word(self.padded * code.widths[1]))
        self._lay_keys()
        self._lay_values()
        count = code.sizes[code.queries]
        begin = b.mul(self.block, t.word(QUERIES))
        end = self._least(b.add(begin, t.word(QUERIES)), t.word(count))
        groups = b.sdiv(b.add(b.sub(end, begin), t.word(self.rows - 1)), t.word(self.rows))
        with counted(b, t.word(0), groups) as group:
            top = b.add(begin, b.mul(group, t.word(self.rows)))
            self.at = [self._least(b.add(top, t.word(i)), t.word(count - 1)) for i in range(self.rows)]
            self._scored()
            some = next(n for n in TOGETHER if self.rows % n == 0)
            with counted(b, t.word(0), t.word(self.rows // some)) as group:
                rows = [b.add(b.mul(group, t.word(some)), t.word(i)) for i in range(some)]
                write_passes(
                    b, self.passes, [self._row(i, self._least(b.add(top, i), t.word(count - 1))) for i in rows]
                )
            self._mixed()
        w.libc("free", t.void, base)

    def _row(self, i: ir.Value, query: ir.Value) -> Row:
        """The scores of a query; slots hold whole vectors."""

        def read(slot: int, place: ir.Value, _: int) -> ir.Value:
            return self._vector(self.scores, self._score(i, slot, place))

        def write(slot: int, place: ir.Value, _: int, value: ir.Value) -> None:
            self.scores.store(self._score(i, slot, place), value, self.lanes)

        return Row(self.length, self.lanes, read, write, partial(self._met, query))

    # ---- keys and values of a head, laid out

    def _lay_keys(self) -> None:
        """Panels of keys: for each feature of theirs a few vectors of keys; the last key stands for those beyond."""
        b, t, code, lanes = self.b, self.t, self.code, self.lanes
        step, last = t.word(code.k.along[code.keys]), t.word(self.length - 1)
        with counted(b, t.word(0), t.word(self.padded // lanes)) as group:
            panel, place = (f(group, t.word(code.several)) for f in (b.sdiv, b.srem))
            to = b.add(b.mul(panel, t.word(code.widths[0] * self.panel)), b.mul(place, t.word(lanes)))
            first = b.mul(group, t.word(lanes))
            keys = [b.mul(self._least(b.add(first, t.word(i)), last), step) for i in range(lanes)]
            with counted(b, t.word(0), t.word(code.widths[0] // lanes)) as part:
                at = b.mul(part, t.word(lanes))
                square = turned(b, [self._vector(self.k, b.add(key, at)) for key in keys])
                for i, column in enumerate(square):
                    index = b.add(to, b.mul(b.add(at, t.word(i)), t.word(self.panel)))
                    self.laid_keys.store(index, column, lanes)

    def _lay_values(self) -> None:
        """One after the other."""
        b, t, code, width = self.b, self.t, self.code, self.code.widths[1]
        with counted(b, t.word(0), t.word(self.length)) as key:
            where, to = b.mul(key, t.word(code.v.along[code.keys])), b.mul(key, t.word(width))
            for at in range(0, width, self.lanes):
                value = self._vector(self.v, b.add(where, t.word(at)))
                self.laid_values.store(b.add(to, t.word(at)), value, self.lanes)

    # ---- products

    def _scored(self) -> None:
        """The scores of a few queries."""
        b, t, code, lanes = self.b, self.t, self.code, self.lanes
        queries = [b.mul(query, t.word(code.q.along[code.queries])) for query in self.at]
        with counted(b, t.word(0), t.word(self.padded // self.panel)) as panel:
            keys = b.mul(panel, t.word(code.widths[0] * self.panel))
            sums = self._sums(code.several)
            with counted(b, t.word(0), t.word(code.widths[0])) as at:
                row = b.add(keys, b.mul(at, t.word(self.panel)))
                some = [self._vector(self.laid_keys, b.add(row, t.word(j * lanes))) for j in range(code.several)]
                step = b.mul(at, t.word(code.q.width))
                numbers = [self.q.number(b.add(query, step)) for query in queries]
                self._multiplied(sums, numbers, some)
            for (i, j), place in sums.items():
                index = b.add(b.mul(panel, t.word(self.panel)), t.word(j * lanes))
                self.scores.store(self._score(t.word(i), 0, index), b.load(place, typ=self.kind), lanes)

    def _mixed(self) -> None:
        """The values, times what was made of the scores."""
        b, t, code, lanes = self.b, self.t, self.code, self.lanes
        width = code.widths[1]
        for first in range(0, width, code.most * lanes):
            columns = range(first, min(first + code.most * lanes, width), lanes)
            sums = self._sums(len(columns))
            with counted(b, t.word(0), t.word(self.length)) as key:
                row = b.mul(key, t.word(width))
                some = [self._vector(self.laid_values, b.add(row, t.word(at))) for at in columns]
                places = (self._score(t.word(i), self.passes.result, key) for i in range(self.rows))
                weights = [self.scores.number(place) for place in places]
                self._multiplied(sums, weights, some)
            for (i, j), place in sums.items():
                index = b.add(b.mul(self.at[i], t.word(code.result.along[code.queries])), t.word(columns[j]))
                self.out.store(index, b.load(place, typ=self.kind), lanes)

    def _sums(self, columns: int) -> dict[tuple[int, int], ir.Value]:
        """For each query some vectors, of zeros."""
        with self.b.goto_entry_block():
            sums = {(i, j): self.b.alloca(self.kind) for i in range(self.rows) for j in range(columns)}
        for place in sums.values():
            self.b.store(self.kind(None), place)
        return sums

    def _multiplied(
        self, sums: dict[tuple[int, int], ir.Value], numbers: Sequence[ir.Value], vectors: Sequence[ir.Value]
    ) -> None:
        """To each sum its number times its vector is added."""
        b = self.b
        for i, number in enumerate(numbers):
            wide = everywhere(b, number, self.lanes)
            for j, vector in enumerate(vectors):
                b.store(fma(b, wide, vector, b.load(sums[i, j], typ=self.kind)), sums[i, j])

    # ---- other values

    def _met(self, query: ir.Value, which: int, place: ir.Value | None, there: int) -> ir.Value:
        """What meets the scores of a query: numbers from a place on, or one for all."""
        b, (values, along) = self.b, self.beside[which]
        start = b.mul(query, self.t.word(along[self.code.queries]))
        if place is None:
            return everywhere(b, values.number(start), self.lanes)
        return values.vector(b.add(start, place), self.lanes, there)

    # ---- places

    def _index(self, head: ir.Value) -> dict[int, ir.Value]:
        """The indices of a head along the axes of the scores that are neither of queries nor of keys."""
        b, t, found = self.b, self.t, {}
        for axis in reversed(range(len(self.code.sizes))):
            size = self.code.sizes[axis]
            if axis not in (self.code.keys, self.code.queries) and size != 1:
                found[axis], head = b.srem(head, t.word(size)), b.sdiv(head, t.word(size))
        return found

    def _offset(self, index: dict[int, ir.Value], along: Strides) -> ir.Value:
        b, t, total = self.b, self.t, self.t.word(0)
        for axis, at in index.items():
            total = b.add(total, b.mul(at, t.word(along[axis])))
        return total

    def _score(self, i: ir.Value, slot: int, index: ir.Value) -> ir.Value:
        """The index of a number of a query's row in a slot."""
        b, t = self.b, self.t
        row = b.add(b.mul(i, t.word(self.row)), t.word(slot * self.padded))
        return b.add(row, index)

    def _vector(self, numbers: Numbers, index: ir.Value) -> ir.Value:
        return numbers.vector(index, self.lanes, self.lanes)

    def _least(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)
