"""LLVM code by short names: types, loops, words of memory, calls of functions at an address."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from llvmlite import ir


class Operand(NamedTuple):
    """A matrix in memory: its address and the numbers of its rows and columns, all int64."""

    data: ir.Value
    rows: ir.Value
    columns: ir.Value


class Types:
    """Types and constants by short names."""

    def __init__(self) -> None:
        from llvmlite import ir

        self.i8, self.i16, self.i32, self.i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
        self.f32, self.pointer, self.void = ir.FloatType(), ir.PointerType(), ir.VoidType()

    def word(self, value: int) -> ir.Value:
        """An int64."""
        return self.i64(value)


def element(b: ir.IRBuilder, matrix: Operand, index: ir.Value, kind: ir.Type) -> ir.Value:
    """The place of the element of a matrix with this index, row after row."""
    return b.gep(b.inttoptr(matrix.data, Types().pointer), [index], source_etype=kind)


def loaded(b: ir.IRBuilder, matrix: Operand, index: ir.Value, kind: ir.Type) -> ir.Value:
    """The number there."""
    return b.load(element(b, matrix, index, kind), typ=kind)


def behind(b: ir.IRBuilder, place: ir.Value, by: ir.Value) -> ir.Value:
    """The place so many bytes further."""
    return b.gep(place, [by], source_etype=Types().i8)


def row_of_words(b: ir.IRBuilder, matrix: Operand, row: ir.Value, count: int) -> list[ir.Value]:
    """A row of so many int32, as int64."""
    t = Types()
    first = b.mul(row, t.word(count))
    return [b.sext(loaded(b, matrix, b.add(first, t.word(i)), t.i32), t.i64) for i in range(count)]


def everywhere(b: ir.IRBuilder, value: ir.Value, width: int) -> ir.Value:
    """A number in all places of a vector."""
    from llvmlite import ir

    i32 = ir.IntType(32)
    one = b.insert_element(ir.Constant(ir.VectorType(value.type, width), ir.Undefined), value, i32(0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(i32, width), [0] * width))


def intrinsic(b: ir.IRBuilder, name: str, result: ir.Type, *given: ir.Value, flags: tuple[str, ...] = ()) -> ir.Value:
    """Calls one of LLVM's own functions."""
    from llvmlite import ir

    kind = ir.FunctionType(result, [x.type for x in given])
    found = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(found, given, fastmath=flags)


def added(b: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """The sum of a vector of floats, in any order."""
    name, one = f"llvm.vector.reduce.fadd.v{vector.type.count}f32", vector.type.element
    return intrinsic(b, name, one, one(0.0), vector, flags=("reassoc",))


def halves(b: ir.IRBuilder, vector: ir.Value) -> list[ir.Value]:
    """The first and the second half of a vector."""
    from llvmlite import ir

    n = vector.type.count // 2
    kind = ir.VectorType(ir.IntType(32), n)
    return [b.shuffle_vector(vector, vector, ir.Constant(kind, list(range(at, at + n)))) for at in (0, n)]


def beside(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """A vector of the numbers of two."""
    from llvmlite import ir

    n = 2 * x.type.count
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), n), list(range(n))))


def turned(b: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """The columns of a square of numbers given by its rows, as many vectors of as many, a power of two."""
    from llvmlite import ir

    n, step = len(rows), 1
    kind = ir.VectorType(ir.IntType(32), n)
    while step < n:
        at = range(n)
        # Of rows i and i + step, blocks of this size change places: the second of the one, the first of the other.
        first = ir.Constant(kind, [j if not j & step else n + j - step for j in at])
        second = ir.Constant(kind, [j + step if not j & step else n + j for j in at])
        made = list(rows)
        for i in at:
            if not i & step:
                made[i] = b.shuffle_vector(rows[i], rows[i + step], first)
                made[i + step] = b.shuffle_vector(rows[i], rows[i + step], second)
        rows, step = made, 2 * step
    return rows


def least(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The smaller of two words."""
    return b.select(b.icmp_signed("<", x, y), x, y)


@contextmanager
def counted(b: ir.IRBuilder, first: ir.Value, last: ir.Value) -> Iterator[ir.Value]:
    """A loop: its body sees the numbers from the first to the one before the last."""
    start, body, done = (b.append_basic_block(x) for x in ("loop", "body", "done"))
    before = b.block
    b.branch(start)
    b.position_at_end(start)
    number = b.phi(first.type)
    number.add_incoming(first, before)
    b.cbranch(b.icmp_signed("<", number, last), body, done)
    b.position_at_end(body)
    yield number
    number.add_incoming(b.add(number, number.type(1)), b.block)
    b.branch(start)
    b.position_at_end(done)


class Writer:
    """Reads and writes words of memory."""

    def __init__(self, b: ir.IRBuilder, t: Types) -> None:
        self.b, self.t = b, t

    def at(self, base: ir.Value, word: int) -> ir.Value:
        """The place of a word behind an address, given as an int64 or a pointer."""
        if base.type == self.t.i64:
            base = self.b.inttoptr(base, self.t.pointer)
        return self.b.gep(base, [self.t.word(word)], source_etype=self.t.i64)

    def load(self, base: ir.Value, word: int) -> ir.Value:
        """A word behind an address."""
        return self.b.load(self.at(base, word), typ=self.t.i64)

    def store(self, base: ir.Value, word: int, value: ir.Value) -> None:
        """Writes a word behind an address."""
        self.b.store(value, self.at(base, word))

    def added(self, base: ir.Value, word: int, by: int) -> ir.Value:
        """What a word was before so much was added to it, for all threads at once."""
        return self.b.atomic_rmw("add", self.at(base, word), self.t.word(by), "seq_cst")

    def foreign(self, address: ir.Value, result: ir.Type, *given: ir.Value) -> ir.Value:
        """Calls a function at an address."""
        from llvmlite import ir

        kind = ir.FunctionType(result, [x.type for x in given])
        function = self.b.inttoptr(address, kind.as_pointer())
        return self.b.call(function, list(given))

    def libc(self, name: str, result: ir.Type, *given: ir.Value) -> ir.Value:
        """Calls a function of the C library's; Python's own would want its lock where allocations are traced."""
        library = ctypes.CDLL("ucrtbase" if os.name == "nt" else None)
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        return self.foreign(self.t.word(address or 0), result, *given)
