"""The rows of codes that windows meet tiles as, in LLVM code: gathered, or where pixels lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from jaxcomp.kernels.llvm_code import Operand, Types, behind, counted, element, intrinsic
from jaxcomp.kernels.llvm_images import Pixels

if TYPE_CHECKING:
    from llvmlite import ir

ROWS, ROW = 16, 64
"""Of a tile: rows, and bytes of each."""
FEW = (4, 16, 32)
"""Channels of a pixel that are read as one vector."""


class Gathered:
    """The codes that windows meet, copied into rows side by side.

    Attributes:
      length: codes that a window meets.
      steps: tiles of them.
      stride: bytes from row to row.
    """

    def __init__(self, b: ir.IRBuilder, given: tuple[Operand, Operand, Operand], windows: ir.Value) -> None:
        from llvmlite import ir

        self.b, self.t = b, Types()
        self.x, _, self.sources = given
        self.pixels, self.channels = Pixels(b, self.t.i8, given, windows), self.x.columns
        self.row = ir.VectorType(self.t.i8, ROW)
        with b.goto_entry_block():
            self.window = [b.alloca(self.t.i64), b.alloca(self.t.i64)]
        t = self.t
        self.length = b.mul(self.channels, self.sources.columns)
        self.steps = b.sdiv(b.add(self.length, t.word(ROW - 1)), t.word(ROW))
        # An odd number of lines, that rows do not fall upon the same places of the cache.
        self.stride = b.mul(b.or_(self.steps, t.word(1)), t.word(ROW))

    def begun(self, halves: Sequence[ir.Value], place: ir.Value) -> None:
        """What a group needs before it meets panels."""
        self._gather(halves, place)

    def met(self, halves: Sequence[ir.Value], place: ir.Value) -> tuple[list[ir.Value], ir.Value]:
        """Where the rows of both halves are that meet panels, and how far apart they lie."""
        del halves
        second = behind(self.b, place, self.b.mul(self.stride, self.t.word(ROWS)))
        return [place, second], self.stride

    def _gather(self, halves: Sequence[ir.Value], place: ir.Value) -> None:
        """The codes that the windows of a group meet, a row of them for each."""
        b, t, windows = self.b, self.t, self.sources.rows
        with counted(b, t.word(0), t.word(len(halves))) as half:
            first = b.select(b.icmp_signed("==", half, t.word(0)), *halves)
            image = b.sdiv(first, windows)
            for value, at in zip((image, b.sub(first, b.mul(image, windows))), self.window, strict=True):
                b.store(value, at)
            with counted(b, t.word(0), t.word(ROWS)) as number:
                row = b.add(b.mul(half, t.word(ROWS)), number)
                image, window = (b.load(at, typ=t.i64) for at in self.window)
                self._row(image, window, behind(self.b, place, b.mul(row, self.stride)))
                over = b.icmp_signed("==", b.add(window, t.word(1)), windows)
                b.store(b.add(image, b.zext(over, t.i64)), self.window[0])
                b.store(b.select(over, t.word(0), b.add(window, t.word(1))), self.window[1])

    def _row(self, image: ir.Value, window: ir.Value, place: ir.Value, sizes: Sequence[int] = FEW) -> None:
        """The codes that a window meets; where a pixel has so few channels, one vector of them for each element."""
        b, t = self.b, self.t

        def copied(copy: Callable[[ir.Value, ir.Value], None]) -> None:
            with counted(b, t.word(0), self.sources.columns) as tap:
                copy(self.pixels.place(image, window, tap), behind(self.b, place, b.mul(tap, self.channels)))

        if not sizes:
            copied(self._copied)
            return
        with b.if_else(b.icmp_signed("==", self.channels, t.word(sizes[0]))) as (few, other):
            with few:
                copied(partial(self._moved, sizes[0]))
            with other:
                self._row(image, window, place, sizes[1:])

    def _moved(self, size: int, found: ir.Value, place: ir.Value) -> None:
        """So many bytes."""
        from llvmlite import ir

        kind = ir.VectorType(self.t.i8, size)
        self.b.store(self.b.load(found, typ=kind, align=1), place, align=1)

    def _copied(self, found: ir.Value, place: ir.Value) -> None:
        """The channels of a pixel; behind them zeros of a row at most, which what comes next is written over."""
        from llvmlite import ir

        b, t, bit = self.b, self.t, ir.IntType(ROW)
        rest, line = b.srem(self.channels, t.word(ROW)), t.word(ROW)
        with counted(b, t.word(0), b.sdiv(self.channels, line)) as number:
            at = b.mul(number, line)
            self._moved(ROW, behind(self.b, found, at), behind(self.b, place, at))
        with b.if_then(b.icmp_signed(">", rest, t.word(0))):
            at, name = b.sub(self.channels, rest), f"llvm.masked.load.v{ROW}i8.p0"
            mask = b.bitcast(b.lshr(bit(-1), b.sub(line, rest)), ir.VectorType(ir.IntType(1), ROW))
            numbers = intrinsic(b, name, self.row, behind(self.b, found, at), t.i32(1), mask, self.row(None))
            b.store(numbers, behind(self.b, place, at), align=1)


class InPlace(Gathered):
    """Windows that are pixels, and meet panels where they lie.

    Behind the channels of a pixel a tile has those of the next, which meet zeros. Only what would be read behind the
    last pixel is gathered.
    """

    def begun(self, halves: Sequence[ir.Value], place: ir.Value) -> None:  # noqa: D102
        with self.b.if_then(self._over(halves)):
            self._gather(halves, place)

    def met(self, halves: Sequence[ir.Value], place: ir.Value) -> tuple[list[ir.Value], ir.Value]:  # noqa: D102
        b, over = self.b, self._over(halves)
        own = [element(b, self.x, b.mul(half, self.channels), self.t.i8) for half in halves]
        gathered, stride = super().met(halves, place)
        places = [b.select(over, there, here) for there, here in zip(gathered, own, strict=True)]
        return places, b.select(over, stride, self.channels)

    def _over(self, halves: Sequence[ir.Value]) -> ir.Value:
        """Whether a tile of these rows would be read beyond the pixels."""
        b, t = self.b, self.t
        last = b.mul(b.add(halves[1], t.word(ROWS - 1)), self.channels)
        end = b.add(last, b.mul(self.steps, t.word(ROW)))
        return b.icmp_signed(">", end, b.mul(self.x.rows, self.channels))
