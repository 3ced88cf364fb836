"""LLVM code of attention in floats to the heads of keys and values, one after the other.

A few queries at a time: their scores lie in a core's nearest cache, and never in memory. Keys and values of a head are
laid out once for many queries, from where the program has them; the result is written where it wants it. A panel of
keys that a mask hides from all these queries is not multiplied, nor are values whose weights are all 0: half of what a
causal mask has.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from jaxcomp.kernels.llvm_beside import Numbers
from jaxcomp.kernels.llvm_code import Operand, Types, Writer, counted, everywhere, least
from jaxcomp.kernels.llvm_float_laid import QUERIES, Heads, Laid, Strides
from jaxcomp.kernels.llvm_hidden import Mask, mask_of
from jaxcomp.kernels.llvm_numbers import fma
from jaxcomp.kernels.llvm_rowwise import Row, Tail, write_passes
from jaxcomp.kernels.row_passes import Passes

if TYPE_CHECKING:
    from llvmlite import ir

ROWS = 6
"""Queries that meet a key or a value while it lies in a register."""
TOGETHER = (3, 2, 1)
"""Queries whose scores are gone over at once: the first that divides those."""


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
        self.laid = Laid(code, b)
        self.rows = min(ROWS, code.sizes[code.queries])
        self.row = self.passes.slots * self.laid.padded
        # Weights may be 0 for many keys if something that meets the scores differs from key to key.
        self.hides = any(along[code.keys] for along, _ in code.beside)
        self.mask = self._mask()
        with b.goto_entry_block():
            self.last = b.alloca(t.i64)  # behind the last key that one of a few queries sees

    def _mask(self) -> Mask | None:
        """The mask of which whole panels may be asked."""
        found = mask_of(self.code.function)
        if found is None or not self.beside[found.which][1][self.code.keys] or self.length < self.laid.panel:
            return None
        return found

    def _tail(self) -> Tail | None:
        """The keys at the end that are hidden from a few queries, where nothing else tells them apart."""
        steps = zip(self.code.function, self.code.varying[1:], strict=True)
        met = {int(step.number) for step, varies in steps if step.name == "operand" and varies}
        if self.mask is None or met != {self.mask.which} or self.passes.result:
            return None
        last = least(self.b, self.b.load(self.last, typ=self.t.i64), self.t.word(self.length))
        return Tail(last, (self.mask.which, not self.mask.shows))

    def write(self) -> None:
        """All of it."""
        b, t, code = self.b, self.t, self.code
        w = Writer(b, t)
        laid, scores = self.laid.room, self.rows * self.row
        base = w.libc("malloc", t.i64, t.word(4 * (laid + scores) + 64))
        room = Numbers(b, b.and_(b.add(base, t.word(63)), t.word(-64)))
        self.laid.lay(room, self.k, self.v)
        self.scores = room.behind(t.word(laid))
        count = code.sizes[code.queries]
        begin = b.mul(self.block, t.word(QUERIES))
        end = least(b, b.add(begin, t.word(QUERIES)), t.word(count))
        groups = b.sdiv(b.add(b.sub(end, begin), t.word(self.rows - 1)), t.word(self.rows))
        with counted(b, t.word(0), groups) as group:
            top = b.add(begin, b.mul(group, t.word(self.rows)))
            self.at = [least(b, b.add(top, t.word(i)), t.word(count - 1)) for i in range(self.rows)]
            self._scored()
            some, tail = next(n for n in TOGETHER if self.rows % n == 0), self._tail()
            with counted(b, t.word(0), t.word(self.rows // some)) as group:
                places = [b.add(b.mul(group, t.word(some)), t.word(i)) for i in range(some)]
                rows = [self._row(i, least(b, b.add(top, i), t.word(count - 1)))._replace(tail=tail) for i in places]
                write_passes(b, self.passes, rows)
            self._mixed()
        w.libc("free", t.void, base)

    def _row(self, i: ir.Value, query: ir.Value) -> Row:
        """The scores of a query; slots hold whole vectors."""

        def read(slot: int, place: ir.Value, _: int) -> ir.Value:
            return self._vector(self.scores, self._score(i, slot, place))

        def write(slot: int, place: ir.Value, _: int, value: ir.Value) -> None:
            self.scores.store(self._score(i, slot, place), value, self.lanes)

        return Row(self.length, self.lanes, read, write, partial(self._met, query))

    # ---- products

    def _scored(self) -> None:
        """The scores of a few queries; 0 where a mask hides a panel from all of them."""
        b, t = self.b, self.t
        b.store(t.word(0), self.last)
        with counted(b, t.word(0), t.word(self.laid.panels)) as panel:
            if self.mask is None:
                self._panel_scored(panel)
            else:
                with b.if_else(self._shown(panel, self.mask)) as (then, otherwise):
                    with then:
                        self._panel_scored(panel)
                        b.store(b.mul(b.add(panel, t.word(1)), t.word(self.laid.panel)), self.last)
                    with otherwise:
                        self._keep(panel, dict.fromkeys(self._places(self.code.several), self.kind(None)))

    def _panel_scored(self, panel: ir.Value) -> None:
        b, t, code, lanes = self.b, self.t, self.code, self.lanes
        queries = [b.mul(query, t.word(code.q.along[code.queries])) for query in self.at]
        keys = b.mul(panel, t.word(code.widths[0] * self.laid.panel))
        sums = self._sums(code.several)
        with counted(b, t.word(0), t.word(code.widths[0])) as at:
            row = b.add(keys, b.mul(at, t.word(self.laid.panel)))
            some = [self._vector(self.laid.keys, b.add(row, t.word(j * lanes))) for j in range(code.several)]
            step = b.mul(at, t.word(code.q.width))
            numbers = [self.q.number(b.add(query, step)) for query in queries]
            self._multiplied(sums, numbers, some)
        self._keep(panel, {at: b.load(place, typ=self.kind) for at, place in sums.items()})

    def _keep(self, panel: ir.Value, scores: dict[tuple[int, int], ir.Value]) -> None:
        """Writes the scores of a panel, of each query some vectors."""
        b, t = self.b, self.t
        for (i, j), value in scores.items():
            index = b.add(b.mul(panel, t.word(self.laid.panel)), t.word(j * self.lanes))
            self.scores.store(self._score(t.word(i), 0, index), value, self.lanes)

    def _shown(self, panel: ir.Value, mask: Mask) -> ir.Value:
        """Whether one of the queries sees a key of a panel."""
        b, t, (values, along) = self.b, self.t, self.beside[mask.which]
        first = least(b, b.mul(panel, t.word(self.laid.panel)), t.word(self.length - self.laid.panel))
        any_of = None
        for query in self.at:
            index = b.add(b.mul(query, t.word(along[self.code.queries])), first)
            truth = values.vector(index, self.laid.panel, self.laid.panel)
            truth = truth if mask.shows else b.not_(truth)
            any_of = truth if any_of is None else b.or_(any_of, truth)
        return self._is_any(any_of)

    def _mixed(self) -> None:
        """The values, times what was made of the scores."""
        b, t, code, lanes = self.b, self.t, self.code, self.lanes
        width = code.widths[1]
        for first in range(0, width, code.most * lanes):
            columns = range(first, min(first + code.most * lanes, width), lanes)
            sums = self._sums(len(columns))
            if self.hides:
                self._added_by_panels(sums, columns)
            else:
                self._added(sums, columns, t.word(0), t.word(self.length))
            for (i, j), place in sums.items():
                index = b.add(b.mul(self.at[i], t.word(code.result.along[code.queries])), t.word(columns[j]))
                self.out.store(index, b.load(place, typ=self.kind), lanes)

    def _added_by_panels(self, sums: dict[tuple[int, int], ir.Value], columns: range) -> None:
        """Adds the values of all keys, times their weights, but for panels that weigh nothing."""
        b, t = self.b, self.t
        with (
            counted(b, t.word(0), t.word(self.laid.panels)) as panel,
            b.if_else(self._weighs(panel)) as (then, otherwise),
        ):
            with then:
                self._added(sums, columns, *self.laid.of(panel))
            with otherwise:
                row = b.mul(panel, t.word(self.code.widths[1]))
                unseen = [self._vector(self.laid.unseen, b.add(row, t.word(at))) for at in columns]
                for (_, j), place in sums.items():
                    b.store(b.fadd(b.load(place, typ=self.kind), unseen[j]), place)

    def _added(self, sums: dict[tuple[int, int], ir.Value], columns: range, first: ir.Value, last: ir.Value) -> None:
        """Adds the values of some keys, times their weights."""
        b, t = self.b, self.t
        with counted(b, first, last) as key:
            row = b.mul(key, t.word(self.code.widths[1]))
            some = [self._vector(self.laid.values, b.add(row, t.word(at))) for at in columns]
            places = (self._score(t.word(i), self.passes.result, key) for i in range(self.rows))
            self._multiplied(sums, [self.scores.number(place) for place in places], some)

    def _weighs(self, panel: ir.Value) -> ir.Value:
        """Whether a weight of a panel is not 0, of any query; those beyond the last key are any."""
        from llvmlite import ir

        b, t, found = self.b, self.t, None
        bits = ir.VectorType(t.i32, self.lanes)
        for i, j in self._places(self.code.several):
            index = b.add(b.mul(panel, t.word(self.laid.panel)), t.word(j * self.lanes))
            weights = b.bitcast(self._vector(self.scores, self._score(t.word(i), self.passes.result, index)), bits)
            found = weights if found is None else b.or_(found, weights)
        return self._is_any(b.icmp_unsigned("!=", found, bits(None)))

    def _is_any(self, truth: ir.Value) -> ir.Value:
        """Whether one of a vector is true."""
        from llvmlite import ir

        kind = ir.IntType(truth.type.count)
        return self.b.icmp_unsigned("!=", self.b.bitcast(truth, kind), kind(0))

    def _places(self, columns: int) -> list[tuple[int, int]]:
        """Of each query so many vectors."""
        return [(i, j) for i in range(self.rows) for j in range(columns)]

    def _sums(self, columns: int) -> dict[tuple[int, int], ir.Value]:
        """For each query some vectors, of zeros."""
        with self.b.goto_entry_block():
            sums = {place: self.b.alloca(self.kind) for place in self._places(columns)}
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
        row = b.add(b.mul(i, t.word(self.row)), t.word(slot * self.laid.padded))
        return b.add(row, index)

    def _vector(self, numbers: Numbers, index: ir.Value) -> ir.Value:
        return numbers.vector(index, self.lanes, self.lanes)
