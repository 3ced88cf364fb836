"""Functions of rows in LLVM code: passes over rows that lie in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

from jaxcomp.kernels.llvm_code import Types, added, counted, everywhere, halves
from jaxcomp.kernels.llvm_numbers import constant, exponential, on_grid
from jaxcomp.kernels.llvm_pointwise import stepped
from jaxcomp.kernels.row_passes import CODES, Passes
from jaxcomp.quantization.numerics.rounding import WHOLE

if TYPE_CHECKING:
    from llvmlite import ir


class Tail(NamedTuple):
    """The numbers at the end of a row, if they are all alike: those that a mask hides.

    The row lies in the slot of the result, and what is 0 there is written already.

    Attributes:
      start: where it begins: at the end of the row, where there is none, or at a whole vector.
      mask: which value hides them, and what it is there.
    """

    start: ir.Value
    mask: tuple[int, bool]


class Row(NamedTuple):
    """A row in memory, read and written by vectors, of which so many numbers are there.

    Attributes:
      length: how many numbers there are.
      width: of a vector.
      read: the vector of a slot at a place in the row.
      write: puts one there.
      load: reads another value: which, and the place; without one the number that is the whole row's.
      tail: its end, if that is all alike, which all rows have that are gone over at once.
    """

    length: int
    width: int
    read: Callable[[int, ir.Value, int], ir.Value]
    write: Callable[[int, ir.Value, int, ir.Value], None]
    load: Callable[[int, ir.Value | None, int], ir.Value]
    tail: Tail | None = None


def write_passes(b: ir.IRBuilder, passes: Passes, rows: Sequence[Row]) -> list[list[ir.Value]]:
    """The code for some rows at once, which are alike: what one waits for, another's work hides.

    Returns:
      for each row the numbers that are wanted of it.
    """
    codes = [_Code(passes, b, row) for row in rows]
    t, (width, length), tail = Types(), (rows[0].width, rows[0].length), rows[0].tail
    full, left = divmod(length, width)
    whole = t.word(full) if tail is None else b.sdiv(tail.start, t.word(width))
    for at in range(passes.count):
        for code in codes:
            code.begin(at)
        with counted(b, t.word(0), whole) as group:
            for code in codes:
                _Vector(code, at, b.mul(group, t.word(width)), width).write()
        if left:
            with nullcontext() if tail is None else b.if_then(b.icmp_signed("==", tail.start, t.word(length))):
                for code in codes:
                    _Vector(code, at, t.word(full * width), left).write()
        for code in codes:
            if tail is not None:
                _End(code, at, tail).write()
            code.end()
    for code in codes:
        code.fill()
    return [[b.extract_element(code.numbers[i], t.i32(0)) for i in passes.numbers] for code in codes]


class _Code:
    """Writes the code of passes over a row."""

    def __init__(self, passes: Passes, b: ir.IRBuilder, row: Row) -> None:
        from llvmlite import ir

        self.p, self.b, self.t, self.row = passes, b, Types(), row
        self.kind = ir.VectorType(self.t.f32, row.width)
        self.numbers: dict[int, ir.Value] = {}  # of the whole row, and their reciprocals
        self.over: dict[int, ir.Value] = {}
        self.totals: dict[int, ir.Value] = {}  # where reductions keep what they have found
        self.ends: dict[int, ir.Value] = {}  # what is kept of the numbers of a tail

    def begin(self, at: int) -> None:
        """What a pass needs to know."""
        for i in sorted(self.p.rows[at] | self.p.divisors[at]):
            self._number(i)
        for i in sorted(self.p.divisors[at]):
            self.over[i] = self.b.fdiv(constant(self.kind, 1.0), self.numbers[i])
        self.totals = {i: self._total(i) for i in sorted(self.p.sums[at])}

    def end(self) -> None:
        """What its reductions have found."""
        for i, place in self.totals.items():
            total = self.b.load(place, typ=self.kind)
            if sign := self.sign(i):
                while total.type.count > 1:
                    total = extreme(self.b, sign, *halves(self.b, total))
                one = self.b.extract_element(total, self.t.i32(0))
            else:
                one = added(self.b, total)
            self.numbers[i] = everywhere(self.b, one, self.row.width)

    def fill(self) -> None:
        """Writes the result of a tail, where it is not 0."""
        from llvmlite import ir

        b, t, row, bits = self.b, self.t, self.row, ir.IntType(self.row.width)
        if row.tail is None:
            return
        found = self.ends[len(self.p.function)]
        some = b.bitcast(b.fcmp_unordered("!=", found, self.kind(None)), bits)
        with b.if_then(b.icmp_unsigned("!=", some, bits(0))):
            first, last = b.sdiv(row.tail.start, t.word(row.width)), t.word(-(-row.length // row.width))
            with counted(b, first, last) as group:
                row.write(self.p.result, b.mul(group, t.word(row.width)), row.width, found)

    def sign(self, i: int) -> str | None:
        """Which of two numbers a reduction keeps; None if their sum."""
        return {"reduce_max": ">", "reduce_min": "<"}.get(self.p.function[i - 1].name)

    def _total(self, i: int) -> ir.Value:
        with self.b.goto_entry_block():
            place = self.b.alloca(self.kind)
        first = {">": -math.inf, "<": math.inf, None: 0.0}[self.sign(i)]
        self.b.store(constant(self.kind, first), place)
        return place

    def _number(self, i: int) -> ir.Value:
        """A number of the whole row, in all places of a vector."""
        if i not in self.numbers:
            step = self.p.function[i - 1]
            if step.name == "operand":
                self.numbers[i] = self.row.load(int(step.number), None, 1)
            else:
                given = [self._number(operand) for operand in step.operands]
                self.numbers[i] = stepped(self.b, step, self.kind, given)
        return self.numbers[i]


def extreme(b: ir.IRBuilder, sign: str, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger or the smaller numbers of two vectors; NaN where either has it."""
    found = b.select(b.fcmp_ordered(sign, x, y), x, y)
    return b.select(b.fcmp_unordered("uno", x, x), x, found)


class _Vector:
    """Writes the code of a pass for one vector of the row, so many of whose numbers are there."""

    def __init__(self, code: _Code, at: int, place: ir.Value, there: int) -> None:
        self.code, self.at, self.place, self.there = code, at, place, there
        self.known: dict[int, ir.Value] = {}

    def write(self) -> None:
        """What the pass keeps, and what its reductions find."""
        b, p = self.code.b, self.code.p
        kept = {i: self._value(i) for i in p.kept(self.at)}
        for i, total in self.code.totals.items():
            value, before = self._value(p.function[i - 1].operands[0]), b.load(total, typ=self.code.kind)
            sign = self.code.sign(i)
            found = extreme(b, sign, value, before) if sign else b.fadd(before, self._summed(value))
            b.store(self._there(found, before), total)
        self._keep(kept)

    def _keep(self, kept: dict[int, ir.Value]) -> None:
        """For later passes."""
        for i, value in kept.items():
            slot = self.code.p.slot(i, self.at + 1)
            assert slot is not None
            self.code.row.write(slot, self.place, self.there, value)

    def _summed(self, value: ir.Value) -> ir.Value:
        """What is added to the sum of a value."""
        return value

    def _there(self, found: ir.Value, before: ir.Value) -> ir.Value:
        """The one where there are numbers, elsewhere the other."""
        from llvmlite import ir

        width = self.code.row.width
        if self.there == width:
            return found
        places = [i if i < self.there else width + i for i in range(width)]
        return self.code.b.shuffle_vector(found, before, ir.Constant(ir.VectorType(self.code.t.i32, width), places))

    def _value(self, i: int) -> ir.Value:
        if not self.code.p.varying[i]:
            return self.code.numbers[i]
        if i not in self.known:
            self.known[i] = self._made(i)
        return self.known[i]

    def _made(self, i: int) -> ir.Value:
        b, p = self.code.b, self.code.p
        if (slot := p.slot(i, self.at)) is not None:
            return self._earlier(i, slot)
        step = p.function[i - 1]
        if step.name == "operand":
            return self._operand(int(step.number))
        given = [self._value(operand) for operand in step.operands]
        if step.name == "exp" and p.falls(step.operands[0]):
            return exponential(b, given[0])
        if step.name == "div" and step.operands[1] in self.code.over:
            return b.fmul(given[0], self.code.over[step.operands[1]])
        if step.name == CODES:
            return _on_grid(b, *given)
        return stepped(b, step, self.code.kind, given)

    def _earlier(self, i: int, slot: int) -> ir.Value:
        """A value that an earlier pass kept."""
        return self.code.row.read(slot, self.place, self.there)

    def _operand(self, which: int) -> ir.Value:
        return self.code.row.load(which, self.place, self.there)


class _End(_Vector):
    """Writes the code of a pass for a tail: one vector stands for all of its numbers."""

    def __init__(self, code: _Code, at: int, tail: Tail) -> None:
        super().__init__(code, at, tail.start, code.row.width)
        self.tail = tail
        b, length = code.b, code.t.word(code.row.length)
        self.count = b.sub(length, tail.start)

    def _keep(self, kept: dict[int, ir.Value]) -> None:
        self.code.ends |= kept

    def _earlier(self, i: int, slot: int) -> ir.Value:
        del slot
        return self.code.ends[i] if i else self.code.kind(None)  # the number that is hidden is any

    def _operand(self, which: int) -> ir.Value:
        from llvmlite import ir

        hides, truth = self.tail.mask
        assert which == hides
        return ir.Constant(ir.VectorType(ir.IntType(1), self.code.row.width), [truth] * self.code.row.width)

    def _summed(self, value: ir.Value) -> ir.Value:
        """As often as there are such numbers."""
        b, t, kind = self.code.b, self.code.t, self.code.kind
        whole = b.fmul(b.extract_element(value, t.i32(0)), b.sitofp(self.count, t.f32))
        return b.insert_element(kind(None), whole, t.i32(0))

    def _there(self, found: ir.Value, before: ir.Value) -> ir.Value:
        b = self.code.b
        return b.select(b.icmp_signed(">", self.count, self.code.t.word(0)), found, before)


def _on_grid(b: ir.IRBuilder, x: ir.Value, zero: ir.Value, *known: ir.Value) -> ir.Value:
    """Codes in bytes."""
    less, reciprocal, low, high, shift = known
    whole = b.fadd(b.fsub(zero, shift), constant(x.type, WHOLE))
    return on_grid(b, x, [less, reciprocal], (b.fsub(low, zero), b.fsub(high, zero)), whole)
