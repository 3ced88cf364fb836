"""LLVM code of the sums of the products of some windows and a panel of features: of bytes, of words and of floats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import jax.numpy as jnp

from jaxcomp.kernels.llvm_code import Types, counted, everywhere, intrinsic
from jaxcomp.kernels.llvm_numbers import code_of, constant, fma
from jaxcomp.kernels.panels import BYTES, FEATURES, deep, unit, width
from jaxcomp.kernels.runs import once, runs_of

if TYPE_CHECKING:
    from llvmlite import ir

VECTOR = 8
"""Sums of a vector; two of them are a panel's."""


class Panel:
    """Some windows and a panel of features.

    Attributes:
      rows: windows.
      kind: of what is multiplied.
      dtype: of the sums, 32 bits each.
      size: bytes of a block of codes.
      totals: where the sums of each window are, by halves of the panel.
    """

    rows: int
    kind: ir.Type
    dtype = jnp.dtype(jnp.int32)
    totals: list[list[ir.Value]]

    def __init__(self, bits: int, b: ir.IRBuilder) -> None:
        from llvmlite import ir

        self.bits, self.b, self.t = bits, b, Types()
        self.size = unit(bits) * FEATURES * width(bits) // 8
        self.words, self.wide = ir.VectorType(ir.IntType(16), 2 * VECTOR), ir.VectorType(self.t.i32, VECTOR)
        self.many = ir.VectorType(self.t.i8, BYTES)

    def _places(self, kind: ir.Type) -> list[list[ir.Value]]:
        with self.b.goto_entry_block():
            return [[self.b.alloca(kind) for _ in range(FEATURES // VECTOR)] for _ in range(self.rows)]

    def _numbers(self, block: ir.Value, codes: ir.Value) -> Iterator[tuple[ir.Value, list[ir.Value]]]:
        """A channel of a block, and the numbers of both halves of the panel for it and its neighbours in a sum.

        A vector of them has those of one feature in 32 bits: two words, or four bytes.
        """
        from llvmlite import ir

        b, t, bits = self.b, self.t, width(self.bits)
        start, vector = b.mul(block, t.word(self.size)), ir.VectorType(t.i8, deep(self.bits) * VECTOR)

        def loaded(offset: int) -> ir.Value:
            place = b.gep(codes, [b.add(start, t.word(offset))], source_etype=t.i8)
            return b.load(place, typ=vector, align=1)

        first, load = b.mul(block, t.word(unit(self.bits))), once(loaded)
        runs = runs_of(bits, unit(self.bits) * FEATURES, vector.count)
        assert runs is not None
        found = [self._number(code_of(b, run, bits, load)) for run in sorted(runs)]
        for at in range(0, len(found), FEATURES // VECTOR):
            channel = b.add(first, t.word(at * VECTOR // FEATURES * deep(self.bits)))
            yield channel, found[at : at + FEATURES // VECTOR]

    def _number(self, code: ir.Value) -> ir.Value:
        if width(self.bits) < 8:
            return self.b.sub(code, constant(code.type, 2 ** (self.bits - 1)))
        return self.b.sext(code, self.words) if deep(self.bits) == 2 else code

    def _float(self, lane: ir.Value, k: int) -> ir.Value:
        """The number of a neighbour, of those that 32 bits hold, as floats."""
        from llvmlite import ir

        b, bits = self.b, 32 // deep(self.bits)
        alone = b.shl(lane, constant(self.wide, 32 - bits * (k + 1)))
        return b.sitofp(b.ashr(alone, constant(self.wide, 32 - bits)), ir.VectorType(self.t.f32, VECTOR))


class Sums(Panel, ABC):
    """Sums of the products of integers, block by block."""

    def begin(self) -> None:
        """All are zero."""
        self._cleared(self.totals)

    def ended(self, row: int) -> Sequence[ir.Value]:
        """Those of a window."""
        return [self.b.load(place, typ=place.allocated_type) for place in self.totals[row]]

    @contextmanager
    def each(self, blocks: ir.Value) -> Iterator[ir.Value]:
        """A loop over all blocks of a pixel."""
        with counted(self.b, self.t.word(0), blocks) as block:
            yield block

    @abstractmethod
    def add(self, block: ir.Value, codes: ir.Value, pixels: list[ir.Value]) -> None:
        """The products of a block of channels."""

    def _cleared(self, places: list[list[ir.Value]]) -> None:
        for place in (place for pair in places for place in pair):
            self.b.store(place.allocated_type(None), place)

    def _more(self, place: ir.Value, value: ir.Value) -> None:
        self.b.store(self.b.add(self.b.load(place, typ=value.type), value), place)

    def _pairs(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Products of words, added up by two."""
        return intrinsic(self.b, "llvm.x86.avx2.pmadd.wd", self.wide, x, y)

    def _everywhere(self, pixel: ir.Value, channel: ir.Value, kind: ir.Type) -> ir.Value:
        """Four bytes of a pixel, for all features."""
        place = self.b.gep(pixel, [channel], source_etype=self.kind)
        return self.b.bitcast(everywhere(self.b, self.b.load(place, typ=self.t.i32, align=1), VECTOR), kind)


class Words(Sums):
    """Of numbers in 16 bits and codes of 7 and 8 bits."""

    rows = 6

    def __init__(self, bits: int, b: ir.IRBuilder) -> None:
        super().__init__(bits, b)
        self.kind, self.totals = self.words.element, self._places(self.wide)

    def add(self, block: ir.Value, codes: ir.Value, pixels: list[ir.Value]) -> None:  # noqa: D102
        for channel, ys in self._numbers(block, codes):
            for row, pixel in enumerate(pixels):
                x = self._everywhere(pixel, channel, self.words)
                for half, y in enumerate(ys):
                    self._more(self.totals[row][half], self._pairs(x, y))


class Bytes(Sums):
    """Of bytes and codes of 6 bits and fewer.

    Attributes:
      held: how many blocks' products 16 bits hold.
    """

    rows = 4

    def __init__(self, bits: int, b: ir.IRBuilder) -> None:
        super().__init__(bits, b)
        self.kind = self.t.i8
        self.held = (2**15 - 1) // (2 * 255 * 2 ** (bits - 1)) * deep(bits) // unit(bits)
        self.totals, self.short = self._places(self.wide), self._places(self.words)
        with b.goto_entry_block():
            self.room, self.next = b.alloca(self.t.i64), b.alloca(self.t.i64)

    def begin(self) -> None:  # noqa: D102
        super().begin()
        self._cleared(self.short)
        self.b.store(self.t.word(self.held), self.room)

    def ended(self, row: int) -> Sequence[ir.Value]:  # noqa: D102
        return [self._with_short(*places) for places in zip(self.totals[row], self.short[row], strict=True)]

    def _with_short(self, total: ir.Value, short: ir.Value) -> ir.Value:
        b = self.b
        pairs = self._pairs(b.load(short, typ=self.words), constant(self.words, 1))
        return b.add(b.load(total, typ=self.wide), pairs)

    @contextmanager
    def each(self, blocks: ir.Value) -> Iterator[ir.Value]:
        """The same; what 16 bits hold is added to 32 when they are full."""
        b, t = self.b, self.t
        more, body, done = (b.append_basic_block(name) for name in ("more", "body", "done"))
        b.store(t.word(0), self.next)
        b.branch(more)
        b.position_at_end(more)
        first, room = b.load(self.next, typ=t.i64), b.load(self.room, typ=t.i64)
        b.cbranch(b.icmp_signed("<", first, blocks), body, done)
        b.position_at_end(body)
        last = b.add(first, room)
        last = b.select(b.icmp_signed("<", last, blocks), last, blocks)
        with counted(b, first, last) as block:
            yield block
        b.store(last, self.next)
        room = b.sub(room, b.sub(last, first))
        b.store(room, self.room)
        with b.if_then(b.icmp_signed("==", room, t.word(0))):
            for totals, shorts in zip(self.totals, self.short, strict=True):
                for total, short in zip(totals, shorts, strict=True):
                    b.store(self._with_short(total, short), total)
            self._cleared(self.short)
            b.store(t.word(self.held), self.room)
        b.branch(more)
        b.position_at_end(done)

    def add(self, block: ir.Value, codes: ir.Value, pixels: list[ir.Value]) -> None:  # noqa: D102
        for channel, ys in self._numbers(block, codes):
            for row, pixel in enumerate(pixels):
                x = self._everywhere(pixel, channel, self.many)
                for half, y in enumerate(ys):
                    pairs = intrinsic(self.b, "llvm.x86.avx2.pmadd.ub.sw", self.words, x, y)
                    self._more(self.short[row][half], pairs)


class Floats(Sums):
    """Of floats and codes, whose numbers become floats where they are met: for few windows."""

    rows = 4
    dtype = jnp.dtype(jnp.float32)

    def __init__(self, bits: int, b: ir.IRBuilder) -> None:
        from llvmlite import ir

        super().__init__(bits, b)
        self.kind, self.floats = self.t.f32, ir.VectorType(self.t.f32, VECTOR)
        self.totals = self._places(self.floats)

    def add(self, block: ir.Value, codes: ir.Value, pixels: list[ir.Value]) -> None:  # noqa: D102
        b, t = self.b, self.t
        for channel, found in self._numbers(block, codes):
            lanes = [b.bitcast(y, self.wide) for y in found]
            for k in range(deep(self.bits)):
                ys = [self._float(lane, k) for lane in lanes]
                for row, pixel in enumerate(pixels):
                    place = b.gep(pixel, [b.add(channel, t.word(k))], source_etype=t.f32)
                    x = everywhere(b, b.load(place, typ=t.f32), VECTOR)
                    for half, y in enumerate(ys):
                        total = self.totals[row][half]
                        b.store(fma(b, x, y, b.load(total, typ=self.floats)), total)


class ManyFloats(Panel):
    """Of floats and codes, whose numbers become floats a piece at a time; sums lie in the result meanwhile."""

    rows = 6
    dtype = jnp.dtype(jnp.float32)
    piece = 256
    """Channels: as floats of all features they fit into the nearest cache beside some pixels."""

    def __init__(self, bits: int, b: ir.IRBuilder) -> None:
        from llvmlite import ir

        super().__init__(bits, b)
        self.kind, self.floats = self.t.f32, ir.VectorType(self.t.f32, VECTOR)
        with b.goto_entry_block():
            self.numbers = b.alloca(self.floats, self.piece * FEATURES // VECTOR)
            self.totals = self._places(self.floats)

    @contextmanager
    def pieces(self, blocks: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
        """A loop over pieces: the first block, and the one after the last."""
        b, t, step = self.b, self.t, self.t.word(self.piece // unit(self.bits))
        count = b.sdiv(b.add(blocks, b.sub(step, t.word(1))), step)
        with counted(b, t.word(0), count) as number:
            begin = b.mul(number, step)
            end = b.add(begin, step)
            yield begin, b.select(b.icmp_signed("<", end, blocks), end, blocks)

    def unpacked(self, codes: ir.Value, begin: ir.Value, end: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Makes numbers of some blocks floats; the first channel of theirs, and how many they are."""
        b, t = self.b, self.t
        first = b.mul(begin, t.word(unit(self.bits)))
        with counted(b, begin, end) as block:
            for channel, found in self._numbers(block, codes):
                for half, lane in enumerate(b.bitcast(y, self.wide) for y in found):
                    for k in range(deep(self.bits)):
                        y = self._float(lane, k)
                        b.store(y, self._number_at(b.add(b.sub(channel, first), t.word(k)), half))
        return first, b.mul(b.sub(end, begin), t.word(unit(self.bits)))

    def _number_at(self, channel: ir.Value, half: int) -> ir.Value:
        halves = self.t.word(FEATURES // VECTOR)
        return self.b.gep(self.numbers, [self.b.add(self.b.mul(channel, halves), self.t.word(half))])

    def add_up(
        self,
        pixels: list[ir.Value],
        channels: tuple[ir.Value, ir.Value],
        places: list[list[ir.Value]],
        fresh: ir.Value,
    ) -> None:
        """The products of a piece, added to what lies at these places, or to nothing if sums are fresh."""
        b, t, (first, count) = self.b, self.t, channels
        for totals, there in zip(self.totals, places, strict=True):
            for total, place in zip(totals, there, strict=True):
                before = b.load(place, typ=self.floats, align=4)
                b.store(b.select(fresh, self.floats(None), before), total)
        with counted(b, t.word(0), count) as channel:
            ys = [b.load(self._number_at(channel, half), typ=self.floats) for half in range(FEATURES // VECTOR)]
            for pixel, totals in zip(pixels, self.totals, strict=True):
                x = b.load(b.gep(pixel, [b.add(first, channel)], source_etype=t.f32), typ=t.f32)
                for y, total in zip(ys, totals, strict=True):
                    b.store(fma(b, everywhere(b, x, VECTOR), y, b.load(total, typ=self.floats)), total)
        for totals, there in zip(self.totals, places, strict=True):
            for total, place in zip(totals, there, strict=True):
                b.store(b.load(total, typ=self.floats), place, align=4)
