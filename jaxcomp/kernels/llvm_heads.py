"""LLVM code of attention to the heads of a cache in codes, one after the other.

Sixty-four tokens' codes become floats in registers and meet the queries that share the head; of their scores the
exponentials are taken with the largest score so far, and these meet the values' codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from jaxcomp.kernels.llvm_code import (
    Operand,
    Types,
    added,
    counted,
    element,
    everywhere,
    intrinsic,
    least,
    loaded,
    turned,
)
from jaxcomp.kernels.llvm_numbers import code_of, constant, exponential, fma, minifloats
from jaxcomp.kernels.rows import CodedRows
from jaxcomp.kernels.runs import Run, once
from jaxcomp.quantization.numerics.levels import Minifloat

if TYPE_CHECKING:
    from llvmlite import ir

WIDE = 8
"""Numbers of a vector."""
BLOCK = 64
"""Tokens between two looks at the largest score."""
PANEL = 4
"""Queries that meet a code while it lies in a register."""


class Codes(NamedTuple):
    """How vectors are read.

    Fields:
      bits: of a code.
      width: of a vector.
      signed: whether a code is an int8.
      lowest: what code 0 is below 0.
      zeros: whether there are zero points.
      minifloat: what codes mean that are bit patterns.
      runs: of a vector.
    """

    bits: int
    width: int
    signed: bool
    lowest: int
    zeros: bool
    minifloat: Minifloat | None
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, rows: CodedRows) -> Codes:
        """Those of keys or values that have runs of eight."""
        runs, signed, grid = rows.runs(WIDE), rows.codes.dtype == jnp.int8, rows.grid
        assert runs is not None
        lowest, zeros = 0 if signed else -rows.lowest, rows.zero is not None
        return cls(grid.bits, rows.width, signed, lowest, zeros, grid.minifloat, runs)

    @property
    def shifted(self) -> bool:
        """Whether codes are not the numbers that the scale multiplies."""
        return self.zeros or bool(self.lowest)


class Heads(NamedTuple):
    """What the code depends on."""

    keys: Codes
    values: Codes
    sharing: int
    queries: int
    heads: int
    by_row: bool

    @property
    def name(self) -> str:
        """A name of all of it."""
        codes = [
            (c.bits, c.width, int(c.signed), c.lowest, int(c.zeros), *(c.minifloat or ()))
            for c in (self.keys, self.values)
        ]
        parts = [*codes, (self.sharing, self.queries, self.heads, int(self.by_row))]
        return "__".join("_".join(map(str, part)) for part in parts)


def attended(shape: Heads, b: ir.IRBuilder, operands: list[Operand], first: ir.Value, last: ir.Value) -> None:
    """The queries of one head of the cache, some at a time."""
    total = shape.sharing * shape.queries
    for top in range(0, total, PANEL):
        _Panel(shape, b, operands, first, range(top, min(top + PANEL, total))).write()


class _Cached(NamedTuple):
    """Keys or values: how they are read, their codes, scales and zero points."""

    how: Codes
    codes: Operand
    scale: Operand
    zero: Operand | None


class _Panel:
    """Writes the code for some queries of a head."""

    def __init__(self, shape: Heads, b: ir.IRBuilder, operands: list[Operand], first: ir.Value, rows: range) -> None:
        from llvmlite import ir

        self.shape, self.b, self.t = shape, b, Types()
        t, given = self.t, iter(operands)
        self.q = next(given)
        self.keys, self.values = (
            _Cached(how, next(given), next(given), next(given) if how.zeros else None)
            for how in (shape.keys, shape.values)
        )
        self.bias, self.bounds, self.out = given
        self.floats = ir.VectorType(t.f32, WIDE)
        self.hidden = constant(self.floats, -math.inf)
        self.count, self.queries = len(rows), rows
        self.first = first
        total = t.word(shape.sharing * shape.queries)
        head = b.sdiv(first, total)
        self.row = b.add(b.mul(self._bound(2), b.sdiv(self.q.rows, total)), head)
        self.batch = b.sdiv(head, t.word(shape.heads)) if shape.by_row else t.word(0)

    def write(self) -> None:
        """All of it."""
        b, t, n, width = self.b, self.t, self.count, self.shape.values.width
        self.scores, self.parts, self.sums = (self._room(n * size) for size in (BLOCK, WIDE * WIDE, width))
        self.top, self.total, self.off = (self._room(n) for _ in range(3))
        for i in range(n):
            self._set(self.top, i, t.f32(-math.inf))
            self._set(self.total, i, t.f32(0.0))
            self._set(self.off, i, t.f32(0.0))
            for at in range(0, width, WIDE):
                b.store(self.floats(None), self._place(self.sums, t.word(i * width + at)), align=4)
        totals = [self._total(i) if self.shape.keys.shifted else None for i in range(n)]
        begin = b.sdiv(self._bound(0), t.word(BLOCK))
        end = b.sdiv(b.add(self._bound(1), t.word(BLOCK - 1)), t.word(BLOCK))
        with counted(b, begin, end) as block:
            token = b.mul(block, t.word(BLOCK))
            left = b.sub(self.bias.columns, token)
            tokens = least(b, left, t.word(BLOCK))
            self._scored(token, tokens, totals)
            self._weighed(token, tokens)
            self._summed(token, tokens)
        for i in range(n):
            self._finished(i)

    # ---- scores

    def _total(self, i: int) -> ir.Value:
        """The sum of a query."""
        b, total = self.b, self.floats(None)
        for at in range(0, self.shape.keys.width, WIDE):
            total = b.fadd(total, self._query(i, at))
        return everywhere(b, added(b, total), WIDE)

    def _query(self, i: int, at: int) -> ir.Value:
        index = self.b.mul(self.b.add(self.first, self.t.word(self.queries[i])), self.q.columns)
        place = element(self.b, self.q, self.b.add(index, self.t.word(at)), self.t.f32)
        return self.b.load(place, typ=self.floats, align=4)

    def _scored(self, token: ir.Value, tokens: ir.Value, totals: list[ir.Value | None]) -> None:
        """The scores of a block, and the largest so far; the sums so far shrink to it."""
        b, t, n = self.b, self.t, self.count
        with b.goto_entry_block():
            tops = [b.alloca(self.floats) for _ in range(n)]
        for top in tops:
            b.store(self.hidden, top)
        with counted(b, t.word(0), b.sdiv(tokens, t.word(WIDE))) as group:
            inside = b.mul(group, t.word(WIDE))
            at = b.add(token, inside)
            with counted(b, t.word(0), t.word(WIDE)) as one:
                self._products(b.add(at, one), one)
            scale, offset = self._per_token(self.keys, at)
            for i in range(n):
                rows = [self._vector(self.parts, t.word((i * WIDE + j) * WIDE)) for j in range(WIDE)]
                columns = turned(b, rows)
                while len(columns) > 1:
                    columns = [b.fadd(x, y) for x, y in zip(columns[::2], columns[1::2], strict=True)]
                score = columns[0]
                if offset is not None:
                    score = b.fsub(score, b.fmul(offset, totals[i]))
                bias = self._bias(i, at)
                score = b.fadd(b.fmul(score, scale), bias)
                score = b.select(b.fcmp_ordered("==", bias, self.hidden), self.hidden, score)
                b.store(score, self._place(self.scores, b.add(t.word(i * BLOCK), inside)), align=4)
                b.store(self._larger(b.load(tops[i], typ=self.floats), score), tops[i])
        for i in range(n):
            best = intrinsic(b, f"llvm.vector.reduce.fmaximum.v{WIDE}f32", t.f32, b.load(tops[i], typ=self.floats))
            self._risen(i, best)

    def _products(self, token: ir.Value, place: ir.Value) -> None:
        """A token's key times each query, as vectors that are still to be added up."""
        b, t = self.b, self.t
        sums, numbers_of = [self.floats(None)] * self.count, self._numbers(self.keys, token)
        for run in self.keys.how.runs:
            numbers = numbers_of(run)
            for i in range(self.count):
                sums[i] = fma(b, numbers, self._query(i, run.start), sums[i])
        for i, value in enumerate(sums):
            at = b.mul(b.add(t.word(i * WIDE), place), t.word(WIDE))
            b.store(value, self._place(self.parts, at), align=4)

    def _risen(self, i: int, best: ir.Value) -> None:
        """The largest score is this one, if it is larger; what was summed counts so much less."""
        b, t, width = self.b, self.t, self.shape.values.width
        old = self._get(self.top, i)
        new = intrinsic(b, "llvm.maximum.f32", t.f32, old, best)
        self._set(self.top, i, new)
        less = b.extract_element(exponential(b, everywhere(b, b.fsub(old, self._finite(new)), WIDE)), t.i32(0))
        for place in (self.total, self.off):
            self._set(place, i, b.fmul(self._get(place, i), less))
        wide = everywhere(b, less, WIDE)
        for at in range(0, width, WIDE):
            place = self._place(self.sums, t.word(i * width + at))
            b.store(b.fmul(b.load(place, typ=self.floats, align=4), wide), place, align=4)

    # ---- weights

    def _weighed(self, token: ir.Value, tokens: ir.Value) -> None:
        """The exponentials of the scores, times the values' scales, in their place."""
        b, t, n = self.b, self.t, self.count
        with b.goto_entry_block():
            totals, offs = ([b.alloca(self.floats) for _ in range(n)] for _ in range(2))
        for place in (*totals, *offs):
            b.store(self.floats(None), place)
        tops = [everywhere(b, self._finite(self._get(self.top, i)), WIDE) for i in range(n)]
        with counted(b, t.word(0), b.sdiv(tokens, t.word(WIDE))) as group:
            inside = b.mul(group, t.word(WIDE))
            scale, offset = self._per_token(self.values, b.add(token, inside))
            for i in range(n):
                place = self._place(self.scores, b.add(t.word(i * BLOCK), inside))
                score = b.load(place, typ=self.floats, align=4)
                weight = exponential(b, b.fsub(score, tops[i]))
                b.store(b.fadd(b.load(totals[i], typ=self.floats), weight), totals[i])
                nothing = b.fcmp_ordered("==", score, self.hidden)  # the scale of what is hidden may be NaN
                weight = b.select(nothing, self.floats(None), b.fmul(weight, scale))
                b.store(weight, place, align=4)
                if offset is not None:
                    off = b.select(nothing, self.floats(None), b.fmul(weight, offset))
                    b.store(b.fadd(b.load(offs[i], typ=self.floats), off), offs[i])
        for i in range(n):
            for kept, new in ((self.total, totals[i]), (self.off, offs[i])):
                self._set(kept, i, b.fadd(self._get(kept, i), added(b, b.load(new, typ=self.floats))))

    # ---- values

    def _summed(self, token: ir.Value, tokens: ir.Value) -> None:
        """Adds the block's values times their weights, sixteen columns at a time."""
        b, t, n, width = self.b, self.t, self.count, self.shape.values.width
        runs = self.values.how.runs
        for first in range(0, len(runs), 2):
            some = runs[first : first + 2]
            with b.goto_entry_block():
                sums = {(i, run.start): b.alloca(self.floats) for i in range(n) for run in some}
            places = {(i, at): self._place(self.sums, t.word(i * width + at)) for i, at in sums}
            for key, place in places.items():
                b.store(b.load(place, typ=self.floats, align=4), sums[key])
            with counted(b, t.word(0), tokens) as one:
                numbers_of = self._numbers(self.values, b.add(token, one))
                numbers = {run.start: numbers_of(run) for run in some}
                for i in range(n):
                    weight = b.load(self._place(self.scores, b.add(t.word(i * BLOCK), one)), typ=t.f32)
                    wide = everywhere(b, weight, WIDE)
                    for run in some:
                        place = sums[i, run.start]
                        b.store(fma(b, wide, numbers[run.start], b.load(place, typ=self.floats)), place)
            for key, place in places.items():
                b.store(b.load(sums[key], typ=self.floats), place, align=4)

    def _finished(self, i: int) -> None:
        """A query's result."""
        b, t, width = self.b, self.t, self.shape.values.width
        total = self._get(self.total, i)
        total = b.select(b.fcmp_ordered("==", total, t.f32(0.0)), t.f32(1.0), total)
        over, off = everywhere(b, total, WIDE), everywhere(b, self._get(self.off, i), WIDE)
        row = b.mul(b.add(self.first, t.word(self.queries[i])), self.out.columns)
        for at in range(0, width, WIDE):
            value = b.fsub(self._vector(self.sums, t.word(i * width + at)), off)
            place = element(b, self.out, b.add(row, t.word(at)), t.f32)
            b.store(b.fdiv(value, over), place, align=4)

    # ---- reading

    def _bound(self, index: int) -> ir.Value:
        return self.b.sext(loaded(self.b, self.bounds, self.t.word(index), self.t.i32), self.t.i64)

    def _bias(self, i: int, token: ir.Value) -> ir.Value:
        """0 for tokens that a query sees, else the score of what is hidden."""
        b, t, queries = self.b, self.t, self.shape.queries
        row = b.add(b.mul(self.batch, t.word(queries)), t.word(self.queries[i] % queries))
        place = element(b, self.bias, b.add(b.mul(row, self.bias.columns), token), t.f32)
        return b.load(place, typ=self.floats, align=4)

    def _per_token(self, cached: _Cached, token: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        """Of eight tokens the scales, and what is to be taken off their codes."""
        from llvmlite import ir

        b, t = self.b, self.t
        index = b.add(b.mul(self.row, self.bias.columns), token)
        scale = b.load(element(b, cached.scale, index, t.f32), typ=self.floats, align=4)
        if not cached.how.shifted:
            return scale, None
        offset = constant(self.floats, cached.how.lowest)
        if cached.zero is not None:
            data = b.load(element(b, cached.zero, index, t.i8), typ=ir.VectorType(t.i8, WIDE), align=1)
            offset = b.fadd(offset, b.uitofp(data, self.floats))
        return scale, offset

    def _numbers(self, cached: _Cached, token: ir.Value) -> Callable[[Run], ir.Value]:
        """The numbers of a run of a token as floats; bytes that two runs share are loaded once."""
        from llvmlite import ir

        b, t, how = self.b, self.t, cached.how
        first = b.mul(b.add(b.mul(self.row, self.bias.columns), token), cached.codes.columns)
        ints, bytes_ = (ir.VectorType(kind, WIDE) for kind in (t.i32, t.i8))

        def load(offset: int) -> ir.Value:
            place = element(b, cached.codes, b.add(first, t.word(offset)), t.i8)
            return (b.sext if how.signed else b.zext)(b.load(place, typ=bytes_, align=1), ints)

        bytes_at = once(load)

        def numbers(run: Run) -> ir.Value:
            code = code_of(b, run, how.bits, bytes_at)
            if how.minifloat is None:
                return b.sitofp(code, self.floats)
            return minifloats(b, code, how.minifloat, self.floats)

        return numbers

    # ---- numbers

    def _finite(self, top: ir.Value) -> ir.Value:
        """The largest score, or 0 where there is none yet."""
        none = self.b.fcmp_ordered("==", top, self.t.f32(-math.inf))
        return self.b.select(none, self.t.f32(0.0), top)

    def _larger(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return intrinsic(self.b, f"llvm.maximum.v{WIDE}f32", self.floats, x, y)

    # ---- memory

    def _room(self, count: int) -> ir.Value:
        """For so many floats, on the stack."""
        with self.b.goto_entry_block():
            return self.b.ptrtoint(self.b.alloca(self.t.f32, count), self.t.i64)

    def _place(self, base: ir.Value, index: ir.Value) -> ir.Value:
        return self.b.gep(self.b.inttoptr(base, self.t.pointer), [index], source_etype=self.t.f32)

    def _vector(self, base: ir.Value, index: ir.Value) -> ir.Value:
        return self.b.load(self._place(base, index), typ=self.floats, align=4)

    def _get(self, base: ir.Value, i: int) -> ir.Value:
        return self.b.load(self._place(base, self.t.word(i)), typ=self.t.f32)

    def _set(self, base: ir.Value, i: int, value: ir.Value) -> None:
        self.b.store(value, self._place(base, self.t.word(i)))
