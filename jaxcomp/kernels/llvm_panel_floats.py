"""LLVM code of the sums of the products of some windows of floats and a panel of features in codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import jax.numpy as jnp

from jaxcomp.kernels.llvm_code import counted, everywhere, least
from jaxcomp.kernels.llvm_numbers import constant, fma
from jaxcomp.kernels.llvm_panel_sums import Panel, Sums
from jaxcomp.kernels.panels import DEEP, FEATURES, unit

if TYPE_CHECKING:
    from llvmlite import ir


class Floats(Sums):
    """Of floats and codes, whose numbers become floats where they are met: for few windows."""

    rows = 4
    dtype = jnp.dtype(jnp.float32)

    def __init__(self, bits: int, lanes: int, b: ir.IRBuilder) -> None:
        from llvmlite import ir

        super().__init__(bits, lanes, b)
        self.kind, self.floats = self.t.f32, ir.VectorType(self.t.f32, lanes)
        self.totals = self._places(self.floats)

    def add(self, block: ir.Value, codes: ir.Value, pixels: list[ir.Value]) -> None:  # noqa: D102
        b, t = self.b, self.t
        for channel, found in self.numbers(block, codes):
            for k in range(DEEP):
                ys = [_float(self, b.bitcast(y, self.wide), k) for y in found]
                for row, pixel in enumerate(pixels):
                    place = b.gep(pixel, [b.add(channel, t.word(k))], source_etype=t.f32)
                    x = everywhere(b, b.load(place, typ=t.f32), self.lanes)
                    for total, y in zip(self.totals[row], ys, strict=True):
                        b.store(fma(b, x, y, b.load(total, typ=self.floats)), total)


class ManyFloats(Panel):
    """Of floats and codes, whose numbers become floats a piece at a time; sums lie in the result meanwhile."""

    rows = 6
    dtype = jnp.dtype(jnp.float32)

    @staticmethod
    def panels(lanes: int) -> int:  # noqa: D102
        return 2 if lanes == FEATURES else 1

    def __init__(self, bits: int, lanes: int, b: ir.IRBuilder) -> None:
        from llvmlite import ir

        super().__init__(bits, lanes, b)
        self.kind, self.floats = self.t.f32, ir.VectorType(self.t.f32, lanes)
        # Channels: as floats of all features they fit into the nearest cache beside some pixels.
        self.piece = 256 // self.panels(lanes)
        with b.goto_entry_block():
            self.room = b.alloca(self.floats, self.piece * self.vectors)
            self.totals = self._places(self.floats)

    @contextmanager
    def pieces(self, blocks: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
        """A loop over pieces: the first block, and the one after the last."""
        b, t, step = self.b, self.t, self.t.word(self.piece // unit(self.bits))
        count = b.sdiv(b.add(blocks, b.sub(step, t.word(1))), step)
        with counted(b, t.word(0), count) as number:
            begin = b.mul(number, step)
            end = b.add(begin, step)
            yield begin, least(b, end, blocks)

    def unpacked(self, codes: Sequence[ir.Value], begin: ir.Value, end: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Makes numbers of some blocks of each panel floats; the first channel of theirs, and how many they are."""
        b, t = self.b, self.t
        first = b.mul(begin, t.word(unit(self.bits)))
        with counted(b, begin, end) as block:
            for both in zip(*(self.numbers(block, place) for place in codes), strict=True):
                channel = both[0][0]
                vectors = [b.bitcast(y, self.wide) for _, found in both for y in found]
                for part, numbers in enumerate(vectors):
                    for k in range(DEEP):
                        y = _float(self, numbers, k)
                        b.store(y, self._number_at(b.add(b.sub(channel, first), t.word(k)), part))
        return first, b.mul(b.sub(end, begin), t.word(unit(self.bits)))

    def _number_at(self, channel: ir.Value, part: int) -> ir.Value:
        index = self.b.add(self.b.mul(channel, self.t.word(self.vectors)), self.t.word(part))
        return self.b.gep(self.room, [index])

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
            ys = [b.load(self._number_at(channel, part), typ=self.floats) for part in range(self.vectors)]
            for pixel, totals in zip(pixels, self.totals, strict=True):
                x = b.load(b.gep(pixel, [b.add(first, channel)], source_etype=t.f32), typ=t.f32)
                for y, total in zip(ys, totals, strict=True):
                    b.store(fma(b, everywhere(b, x, self.lanes), y, b.load(total, typ=self.floats)), total)
        for totals, there in zip(self.totals, places, strict=True):
            for total, place in zip(totals, there, strict=True):
                b.store(b.load(total, typ=self.floats), place, align=4)


def _float(panel: Panel, numbers: ir.Value, k: int) -> ir.Value:
    """The number of a neighbour, of the four that 32 bits hold, as floats."""
    from llvmlite import ir

    b, bits = panel.b, 32 // DEEP
    alone = b.shl(numbers, constant(panel.wide, 32 - bits * (k + 1)))
    return b.sitofp(b.ashr(alone, constant(panel.wide, 32 - bits)), ir.VectorType(panel.t.f32, panel.lanes))
