"""Functions of rows in LLVM code: passes over a row that lies in memory, each up to the next sum or maximum of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxcomp.kernels.llvm_code import Types, added, counted, everywhere, halves
from jaxcomp.kernels.llvm_numbers import constant, exponential
from jaxcomp.kernels.llvm_pointwise import stepped
from jaxcomp.trace.pointwise import TRUTH, Pointwise
from jaxcomp.trace.rowwise import REDUCTIONS

if TYPE_CHECKING:
    from llvmlite import ir


class Passes:
    """How a function of rows goes over a row, number by number.

    Values are named by their steps: 0 is the row's number, ``i`` what step ``i - 1`` gives.

    Args:
      function: it; its last step varies along the row.
      varying: for each value whether it does.
      given: whether the row may only be read, so that nothing else may lie in its slot, nor in the result's.

    Attributes:
      slots: how many rows of numbers are kept at once.
      result: which of them is the function's at last; slot 0 is the row at first.
      rows, sums, divisors: of each pass the numbers of the whole row that it reads, the reductions that it ends with,
        and the numbers of the row that others are divided by.

    >>> from jaxcomp.trace.pointwise import Step
    >>> softmax = (Step("reduce_max", (0,)), Step("sub", (0, 1)), Step("exp", (2,)), Step("reduce_sum", (3,)),
    ...            Step("div", (3, 4)))
    >>> passes = Passes(softmax, [True, False, True, True, False, True])
    >>> passes.count, passes.slots, [passes.kept(at) for at in range(3)]
    (3, 1, [[], [3], [5]])
    """

    def __init__(self, function: Pointwise, varying: Sequence[bool], *, given: bool = False) -> None:
        self.function, self.varying = function, varying
        self._level = [0]
        for step in function:
            before = max((self._level[i] for i in step.operands), default=0)
            self._level.append(before + 1 if step.name in REDUCTIONS else before)
        self.count = self._level[-1] + 1
        self._last = {len(function): self.count}  # of what is kept the last pass that reads it
        self.rows, self.sums, self.divisors = ([set[int]() for _ in range(self.count)] for _ in range(3))
        for at in reversed(range(self.count)):
            seen: set[int] = set()
            for i in (*self.kept(at), *(self._summed(i) for i in self.sums[at])):
                self._visit(i, at, seen)
        self.slots, self._slot = self._placed(given=given)
        self.result = self._slot[len(function)]

    def kept(self, at: int) -> list[int]:
        """What a pass makes that is read later."""
        return sorted(i for i in self._last if i and self._level[i] == at)

    def slot(self, i: int, at: int) -> int | None:
        """Where a pass finds a value that an earlier one kept."""
        return self._slot[i] if self._is_earlier(i, at) else None

    def falls(self, i: int) -> bool:
        """Whether a value is what another is less than its largest number of the row."""
        step = self.function[i - 1] if i else None
        if step is None or step.name != "sub":
            return False
        value, top = step.operands
        return top > 0 and self._is_top(top, value)

    def _is_top(self, i: int, value: int) -> bool:
        step = self.function[i - 1] if i else None
        if step is not None and step.name == "max":
            return any(self._is_top(operand, value) for operand in step.operands)
        return step is not None and step.name == "reduce_max" and step.operands == (value,)

    def _summed(self, i: int) -> int:
        return self.function[i - 1].operands[0]

    def _is_earlier(self, i: int, at: int) -> bool:
        """Whether a pass finds it kept; what is read from elsewhere, or no float, is made again."""
        return i == 0 or (self._level[i] < at and self.function[i - 1].name not in TRUTH | {"operand", "constant"})

    def _visit(self, i: int, at: int, seen: set[int]) -> None:
        """Learns what a value needs in a pass."""
        if i in seen:
            return
        seen.add(i)
        if not self.varying[i]:
            self.rows[at].add(i)
            self._visit_row(i)
        elif self._is_earlier(i, at):
            self._last[i] = max(self._last.get(i, 0), at)
        else:
            step = self.function[i - 1]
            if step.name == "div" and not self.varying[step.operands[1]]:
                self.divisors[at].add(step.operands[1])
            for operand in step.operands:
                self._visit(operand, at, seen)

    def _visit_row(self, i: int) -> None:
        if self.function[i - 1].name in REDUCTIONS:
            self.sums[self._level[i] - 1].add(i)
        else:
            for operand in self.function[i - 1].operands:
                self._visit_row(operand)

    def _placed(self, *, given: bool) -> tuple[int, dict[int, int]]:
        """The slots: what a pass reads for the last time makes room for what it keeps."""
        slot, count = {0: 0}, 1
        free = [] if given or 0 in self._last else [0]
        for at in range(self.count):
            free += [slot[i] for i, last in self._last.items() if last == at and i in slot and (i or not given)]
            for i in self.kept(at):
                if not free or (given and i == len(self.function)):
                    free, count = [*free, count], count + 1
                slot[i] = free.pop()
        return count, slot


class Row(NamedTuple):
    """A row in memory, read and written by vectors, of which so many numbers are there.

    Attributes:
      length: how many numbers there are.
      width: of a vector.
      read: the vector of a slot at a place in the row.
      write: puts one there.
      load: reads another value: which, and the place; without one the number that is the whole row's.
    """

    length: int
    width: int
    read: Callable[[int, ir.Value, int], ir.Value]
    write: Callable[[int, ir.Value, int, ir.Value], None]
    load: Callable[[int, ir.Value | None, int], ir.Value]


def write_passes(b: ir.IRBuilder, passes: Passes, rows: Sequence[Row]) -> None:
    """The code for some rows at once, which are alike: what one waits for, another's work hides."""
    codes = [_Code(passes, b, row) for row in rows]
    t, (width, length) = Types(), (rows[0].width, rows[0].length)
    full, left = divmod(length, width)
    for at in range(passes.count):
        for code in codes:
            code.begin(at)
        with counted(b, t.word(0), t.word(full)) as group:
            for code in codes:
                _Vector(code, at, b.mul(group, t.word(width)), width).write()
        if left:
            for code in codes:
                _Vector(code, at, t.word(full * width), left).write()
        for code in codes:
            code.end()


class _Code:
    """Writes the code of passes over a row."""

    def __init__(self, passes: Passes, b: ir.IRBuilder, row: Row) -> None:
        from llvmlite import ir

        self.p, self.b, self.t, self.row = passes, b, Types(), row
        self.kind = ir.VectorType(self.t.f32, row.width)
        self.numbers: dict[int, ir.Value] = {}  # of the whole row, and their reciprocals
        self.over: dict[int, ir.Value] = {}
        self.totals: dict[int, ir.Value] = {}  # where reductions keep what they have found

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
            if self.is_max(i):
                while total.type.count > 1:
                    total = larger(self.b, *halves(self.b, total))
                one = self.b.extract_element(total, self.t.i32(0))
            else:
                one = added(self.b, total)
            self.numbers[i] = everywhere(self.b, one, self.row.width)

    def is_max(self, i: int) -> bool:
        """Whether a reduction is a maximum, and no sum."""
        return self.p.function[i - 1].name == "reduce_max"

    def _total(self, i: int) -> ir.Value:
        with self.b.goto_entry_block():
            place = self.b.alloca(self.kind)
        self.b.store(constant(self.kind, -math.inf if self.is_max(i) else 0.0), place)
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


def larger(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger numbers of two vectors; NaN where either has it."""
    found = b.select(b.fcmp_ordered(">", x, y), x, y)
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
            found = larger(b, value, before) if self.code.is_max(i) else b.fadd(before, value)
            b.store(self._there(found, before), total)
        for i, value in kept.items():
            slot = p.slot(i, self.at + 1)
            assert slot is not None
            self.code.row.write(slot, self.place, self.there, value)

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
        b, p, row = self.code.b, self.code.p, self.code.row
        if (slot := p.slot(i, self.at)) is not None:
            return row.read(slot, self.place, self.there)
        step = p.function[i - 1]
        if step.name == "operand":
            return row.load(int(step.number), self.place, self.there)
        given = [self._value(operand) for operand in step.operands]
        if step.name == "exp" and p.falls(step.operands[0]):
            return exponential(b, given[0])
        if step.name == "div" and step.operands[1] in self.code.over:
            return b.fmul(given[0], self.code.over[step.operands[1]])
        return stepped(b, step, self.code.kind, given)
