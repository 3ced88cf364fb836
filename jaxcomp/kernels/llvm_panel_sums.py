"""LLVM code of the sums of the products of some windows and a panel of features, all of integers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxcomp.kernels.llvm_code import Types, behind, beside, counted, everywhere, intrinsic, least
from jaxcomp.kernels.llvm_numbers import code_of, constant, dot
from jaxcomp.kernels.panels import BYTES, DEEP, FEATURES, unit, width
from jaxcomp.kernels.runs import once, runs_of

if TYPE_CHECKING:
    from llvmlite import ir

VECTOR = 8
"""Sums of a vector of 256 bits; two of them are a panel's, or one of 512 bits."""


Given = tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array, tuple[int, int, int]]
"""What windows and panels are made of.

Images, channels last, as many as fill blocks; what lies around all images or around each, a row of channels, and where
each element of the kernel meets an image, ``(windows of an image, taps)``, -1 for what lies around it; ``(panels,
bytes)`` of codes as a :class:`~jaxcomp.kernels.panels.PanelWeight` has them; how many matrices there are, and of each
how many windows and panels.
"""


class Panel:
    """Some windows and a panel of features, or several.

    Attributes:
      rows: windows.
      lanes: sums of a vector.
      kind: of what is multiplied.
      dtype: of the sums, 32 bits each.
      size: bytes of a block of codes.
      totals: where the sums of each window are, by vectors.
    """

    rows: int
    kind: ir.Type
    dtype = jnp.dtype(jnp.int32)
    totals: list[list[ir.Value]]

    @staticmethod
    def panels(lanes: int) -> int:
        """How many panels these windows meet at once."""
        del lanes
        return 1

    def __init__(self, bits: int, lanes: int, b: ir.IRBuilder) -> None:
        from llvmlite import ir

        self.bits, self.lanes, self.b, self.t = bits, lanes, b, Types()
        self.vectors = self.panels(lanes) * FEATURES // lanes
        self.size = unit(bits) * FEATURES * width(bits) // 8
        self.words, self.wide = ir.VectorType(ir.IntType(16), 2 * lanes), ir.VectorType(self.t.i32, lanes)
        self.many = ir.VectorType(self.t.i8, BYTES)

    def _places(self, kind: ir.Type) -> list[list[ir.Value]]:
        with self.b.goto_entry_block():
            return [[self.b.alloca(kind) for _ in range(self.vectors)] for _ in range(self.rows)]

    def numbers(self, block: ir.Value, codes: ir.Value) -> Iterator[tuple[ir.Value, list[ir.Value]]]:
        """A channel of a block, and the numbers of the panel for it and its three neighbours, by vectors.

        A vector of them has the four of a feature in 32 bits.
        """

        b, t, bits = self.b, self.t, width(self.bits)
        start, vector = b.mul(block, t.word(self.size)), self.many

        def loaded(offset: int) -> ir.Value:
            place = behind(b, codes, b.add(start, t.word(offset)))
            return b.load(place, typ=vector, align=1)

        first, load = b.mul(block, t.word(unit(self.bits))), once(loaded)
        runs = runs_of(bits, unit(self.bits) * FEATURES, vector.count)
        assert runs is not None
        found = [self._number(code_of(b, run, bits, load)) for run in sorted(runs)]
        for at in range(0, len(found), FEATURES // VECTOR):
            channel = b.add(first, t.word(at * VECTOR // FEATURES * DEEP))
            both = found[at : at + FEATURES // VECTOR]
            yield channel, both if self.lanes == VECTOR else [beside(b, *both)]

    def _number(self, code: ir.Value) -> ir.Value:
        return self.b.sub(code, constant(code.type, 2 ** (self.bits - 1))) if width(self.bits) < 8 else code


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
        return self.b.bitcast(everywhere(self.b, self.b.load(place, typ=self.t.i32, align=1), self.lanes), kind)


class Words(Sums):
    """Of numbers in 16 bits and codes of 7 and 8 bits."""

    rows = 6

    def __init__(self, bits: int, lanes: int, b: ir.IRBuilder) -> None:
        super().__init__(bits, lanes, b)
        self.kind, self.totals = self.words.element, self._places(self.wide)

    def add(self, block: ir.Value, codes: ir.Value, pixels: list[ir.Value]) -> None:  # noqa: D102
        for channel, both in self.numbers(block, codes):
            for first in range(0, DEEP, 2):
                ys, at = [self._two(y, first) for y in both], self.b.add(channel, self.t.word(first))
                for row, pixel in enumerate(pixels):
                    x = self._everywhere(pixel, at, self.words)
                    for half, y in enumerate(ys):
                        self._more(self.totals[row][half], self._pairs(x, y))

    def _two(self, numbers: ir.Value, first: int) -> ir.Value:
        """Two neighbours of the four of each feature, as words: each byte becomes the upper one of its word."""
        from llvmlite import ir

        b, count = self.b, self.many.count
        order = [k for i in range(0, count, DEEP) for k in (count, i + first, count, i + first + 1)]
        places = ir.Constant(ir.VectorType(self.t.i32, count), order)
        upper = b.bitcast(b.shuffle_vector(numbers, self.many(None), places), self.words)
        return b.ashr(upper, constant(self.words, 8))


class Bytes(Sums):
    """Of bytes and codes of 6 bits and fewer.

    Attributes:
      held: how many blocks' products 16 bits hold.
    """

    rows = 4

    def __init__(self, bits: int, lanes: int, b: ir.IRBuilder) -> None:
        super().__init__(bits, lanes, b)
        self.kind = self.t.i8
        self.held = (2**15 - 1) // (2 * 255 * 2 ** (bits - 1)) * DEEP // unit(bits)
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
        last = least(b, last, blocks)
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
        for channel, ys in self.numbers(block, codes):
            for row, pixel in enumerate(pixels):
                x = self._everywhere(pixel, channel, self.many)
                for half, y in enumerate(ys):
                    pairs = intrinsic(self.b, "llvm.x86.avx2.pmadd.ub.sw", self.words, x, y)
                    self._more(self.short[row][half], pairs)


class Dots(Sums):
    """Of bytes and codes of any width, by the processor's dot products of four bytes."""

    def __init__(self, bits: int, lanes: int, b: ir.IRBuilder) -> None:
        self.rows = 8 if lanes == FEATURES else 6
        super().__init__(bits, lanes, b)
        self.kind, self.totals = self.t.i8, self._places(self.wide)

    def add(self, block: ir.Value, codes: ir.Value, pixels: list[ir.Value]) -> None:  # noqa: D102
        b = self.b
        for channel, numbers in self.numbers(block, codes):
            ys = [b.bitcast(y, self.wide) for y in numbers]
            for pixel, places in zip(pixels, self.totals, strict=True):
                x = self._everywhere(pixel, channel, self.wide)
                for place, y in zip(places, ys, strict=True):
                    b.store(dot(b, b.load(place, typ=self.wide), x, y), place)
