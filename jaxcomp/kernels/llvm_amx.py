"""Sums of products of codes by a processor's matrix instructions (Intel AMX), in LLVM code.

A register of them, a tile, has 16 rows of 64 bytes; one instruction adds to 16 by 16 sums the products of 16 rows of 64
codes and of 16 features' 64 codes, of which a row has four of each feature: as they lie in a panel. The codes that some
windows meet are gathered first; then 32 of them meet two panels at a time.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxcomp.kernels.llvm_calls import Work, call, features
from jaxcomp.kernels.llvm_code import Operand, Types, Writer, counted, element, intrinsic, row_of_words
from jaxcomp.kernels.llvm_images import Pixels
from jaxcomp.kernels.llvm_panel_sums import Given, Panel
from jaxcomp.kernels.panels import FEATURES, unit, width

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llvmlite import ir

ROWS, ROW = 16, 64
"""Of a tile: rows, and bytes of each."""
WINDOWS = 2 * ROWS
"""That meet two panels at a time."""
MANY, PANELS = 4 * WINDOWS, 8
"""What a thread takes at a time."""
SUMS, HALVES, PAIR = range(4), (4, 5), (6, 7)
"""Tiles: of sums of each of two halves of rows by each of two panels, of these halves, and of this pair."""
_ASK, _TILES = 0x1023, 18
"""``arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)``, as Linux wants it of a process before it uses tiles."""
_ARCH_PRCTL = 158


@cache
def _granted() -> bool:
    """Whether the system lets this process use tiles; it is asked once, for all threads."""
    if not sys.platform.startswith("linux"):
        return False
    ask = ctypes.CDLL(None, use_errno=True).syscall
    return ask(ctypes.c_long(_ARCH_PRCTL), ctypes.c_long(_ASK), ctypes.c_long(_TILES)) == 0


def refusal(windows: int) -> str | None:
    """Why so many windows of a matrix, or rows, meet nothing in tiles on the machine that is here; None if they do."""
    if not {"amx-int8", "avx512bw"} <= features():
        return "the processor has no AMX"
    if windows < ROWS:
        return f"tiles take {ROWS} rows or windows and more, and there are {windows}"
    return None if _granted() else "the system lets no program use the processor's AMX"


def amx_sums(bits: int, *given: *Given) -> jax.Array:
    """The sums of products of windows and panels, int32 ``(matrices * windows, 16 * panels)``.

    Args:
      bits: of the codes of panels.
      given: images int8, and windows :data:`ROWS` at least.
    """
    x, around, codes, (batch, windows, panels) = given
    parts, sides = -(-windows // MANY), -(-panels // PANELS)
    number = jnp.arange(batch * parts * sides, dtype=jnp.int32)
    one, part, side = number // (parts * sides), number // sides % parts, number % sides
    first, panel = part * MANY, one * panels + side * PANELS
    stop, end = jnp.minimum(first + MANY, windows), jnp.minimum(panel + PANELS, (one + 1) * panels)
    first = jnp.minimum(first, windows - ROWS)
    tasks = jnp.stack([panel, end, one * windows + first, one * windows + stop], 1)
    result = jax.ShapeDtypeStruct((batch * windows, panels * FEATURES), jnp.int32)
    work = Work(f"panels_amx_{bits}", partial(_chunk, bits), 1, by=4)
    return call(work, result, x, *around, codes, tasks)


def _chunk(bits: int, b: ir.IRBuilder, operands: list[Operand], first: ir.Value, last: ir.Value) -> None:
    """Some tasks: the panels from one to before another, and the windows from one to before another."""
    *given, tasks, out = operands
    code = _Code(bits, b, [*given, out])
    with configured(b), counted(b, first, last) as task:
        code.write(*row_of_words(b, tasks, task, 4))


@contextmanager
def configured(b: ir.IRBuilder) -> Iterator[None]:
    """The processor's tiles are of full size, and free again afterwards."""
    from llvmlite import ir

    # The first palette; from byte 16 on two bytes for the columns of each tile, from byte 48 on one for its rows.
    words = [1, *[0] * 15, *[ROW, 0] * 8, *[0] * 16, *[ROWS] * 8, *[0] * 8]
    kind = ir.VectorType(ir.IntType(8), ROW)
    with b.goto_entry_block():
        place = b.alloca(kind)
    b.store(ir.Constant(kind, words), place, align=1)
    intrinsic(b, "llvm.x86.ldtilecfg", Types().void, place)
    yield
    intrinsic(b, "llvm.x86.tilerelease", Types().void)


def tile(b: ir.IRBuilder, name: str, register: int, place: ir.Value, stride: ir.Value) -> None:
    """Reads or writes a tile, its rows so many bytes apart."""
    intrinsic(b, f"llvm.x86.{name}64", Types().void, Types().i8(register), place, stride)


def cleared(b: ir.IRBuilder) -> None:
    """All sums are zero."""
    for total in SUMS:
        intrinsic(b, "llvm.x86.tilezero", Types().void, Types().i8(total))


def multiplied(b: ir.IRBuilder) -> None:
    """The products of both halves and both panels are added to their sums."""
    for total in SUMS:
        registers = [Types().i8(i) for i in (total, HALVES[total % 2], PAIR[total // 2])]
        intrinsic(b, "llvm.x86.tdpbssd", Types().void, *registers)


def halves_of(b: ir.IRBuilder, group: ir.Value, start: ir.Value, stop: ir.Value) -> list[ir.Value]:
    """The first rows of the halves of a group of 32: the last ones are met again where there are no more."""
    t, most = Types(), b.sub(stop, Types().word(ROWS))
    found = [b.add(start, b.add(b.mul(group, t.word(2 * ROWS)), t.word(first))) for first in (0, ROWS)]
    return [b.select(b.icmp_signed("<", at, most), at, most) for at in found]


class _Code:
    """Writes the code of some windows by some panels."""

    def __init__(self, bits: int, b: ir.IRBuilder, operands: list[Operand]) -> None:
        from llvmlite import ir

        t = Types()
        self.bits, self.b, self.t, self.w, self.panel = bits, b, t, Writer(b, t), Panel(bits, FEATURES, b)
        x, blank, self.sources, self.codes, self.out = operands
        self.pixels, self.channels = Pixels(b, t.i8, (x, blank, self.sources), self.out.rows), x.columns
        self.row = ir.VectorType(t.i8, ROW)
        self.length = b.mul(x.columns, self.sources.columns)
        self.steps = b.sdiv(b.add(self.length, t.word(ROW - 1)), t.word(ROW))
        # An odd number of lines, that rows do not fall upon the same places of the cache.
        self.stride = b.mul(b.or_(self.steps, t.word(1)), t.word(ROW))

    def write(self, panel: ir.Value, end: ir.Value, start: ir.Value, stop: ir.Value) -> None:
        """The sums of windows and panels, each from one to before another."""
        b, t = self.b, self.t
        groups = b.sdiv(b.add(b.sub(stop, start), t.word(WINDOWS - 1)), t.word(WINDOWS))
        gathered = b.mul(b.mul(groups, t.word(WINDOWS)), self.stride)
        laid = b.mul(self.steps, t.word(ROWS * ROW))
        room = self.w.libc("malloc", t.pointer, b.add(b.add(gathered, t.word(ROW)), b.mul(laid, t.word(2))))
        behind = self._behind(room, b.add(gathered, t.word(ROW)))
        scratch = [behind, self._behind(behind, laid)]
        with counted(b, t.word(0), groups) as group:
            self._gathered(halves_of(b, group, start, stop), self._behind(room, self._rows(group)))
        with counted(b, t.word(0), b.sdiv(b.add(b.sub(end, panel), t.word(1)), t.word(2))) as number:
            both = [b.add(b.add(panel, b.mul(number, t.word(2))), t.word(i)) for i in range(2)]
            both[1] = b.select(b.icmp_signed("<", both[1], end), both[1], both[0])
            for one, place in zip(both, scratch, strict=True):
                self._laid(one, place)
            with counted(b, t.word(0), groups) as group:
                self._sums(self._behind(room, self._rows(group)), both, scratch)
                self._kept(halves_of(b, group, start, stop), both)
        self.w.libc("free", t.void, room)

    def _behind(self, place: ir.Value, by: ir.Value) -> ir.Value:
        return self.b.gep(place, [by], source_etype=self.t.i8)

    def _rows(self, group: ir.Value) -> ir.Value:
        return self.b.mul(self.b.mul(group, self.t.word(WINDOWS)), self.stride)

    def _gathered(self, halves: Sequence[ir.Value], place: ir.Value) -> None:
        """The codes that the windows of a group meet, a row of them for each."""
        b, t, (first, second) = self.b, self.t, halves
        with counted(b, t.word(0), t.word(WINDOWS)) as number:
            upper = b.icmp_signed("<", number, t.word(ROWS))
            row = b.add(number, b.select(upper, first, b.sub(second, t.word(ROWS))))
            image = b.sdiv(row, self.sources.rows)
            window = b.sub(row, b.mul(image, self.sources.rows))
            own = self._behind(place, b.mul(number, self.stride))
            with counted(b, t.word(0), self.sources.columns) as tap:
                found = self.pixels.place(image, window, tap)
                self._copied(found, self._behind(own, b.mul(tap, self.channels)))

    def _copied(self, found: ir.Value, place: ir.Value) -> None:
        """The channels of a pixel; behind them zeros of a row at most, which what comes next is written over."""
        from llvmlite import ir

        b, t, bit = self.b, self.t, ir.IntType(ROW)
        rest, line = b.srem(self.channels, t.word(ROW)), t.word(ROW)
        with counted(b, t.word(0), b.sdiv(self.channels, line)) as number:
            at = b.mul(number, line)
            b.store(b.load(self._behind(found, at), typ=self.row, align=1), self._behind(place, at), align=1)
        with b.if_then(b.icmp_signed(">", rest, t.word(0))):
            at, name = b.sub(self.channels, rest), f"llvm.masked.load.v{ROW}i8.p0"
            mask = b.bitcast(b.lshr(bit(-1), b.sub(line, rest)), ir.VectorType(ir.IntType(1), ROW))
            numbers = intrinsic(b, name, self.row, self._behind(found, at), t.i32(1), mask, self.row(None))
            b.store(numbers, self._behind(place, at), align=1)

    def _laid(self, panel: ir.Value, place: ir.Value) -> None:
        """Codes of less than a byte become numbers; of others only those behind the last full tile, then zeros."""
        b, t, codes = self.b, self.t, self._codes(panel)
        last, line = b.mul(self.steps, t.word(ROWS * ROW)), t.word(ROW)
        done = b.mul(self.length, t.word(FEATURES))
        if width(self.bits) < 8:
            with counted(b, t.word(0), b.sdiv(self.length, t.word(unit(self.bits)))) as block:
                for channel, (numbers,) in self.panel.numbers(block, codes):
                    b.store(numbers, self._behind(place, b.mul(channel, t.word(FEATURES))), align=1)
        else:
            first = b.mul(self._full(), t.word(ROWS * ROW))
            with counted(b, t.word(0), b.sdiv(b.sub(done, first), line)) as number:
                at = b.add(first, b.mul(number, line))
                found = b.load(self._behind(codes, at), typ=self.row, align=1)
                b.store(found, self._behind(place, at), align=1)
        with counted(b, t.word(0), b.sdiv(b.sub(last, done), line)) as number:
            b.store(self.row(None), self._behind(place, b.add(done, b.mul(number, line))), align=1)

    def _codes(self, panel: ir.Value) -> ir.Value:
        return element(self.b, self.codes, self.b.mul(panel, self.codes.columns), self.t.i8)

    def _full(self) -> ir.Value:
        """How many tiles of a panel can be read where they lie."""
        return self.b.sdiv(self.length, self.t.word(ROW)) if width(self.bits) == 8 else self.t.word(0)

    def _sums(self, windows: ir.Value, panels: Sequence[ir.Value], scratch: Sequence[ir.Value]) -> None:
        """Of a group's windows and two panels."""
        b, t, full = self.b, self.t, self._full()
        cleared(b)
        with counted(b, t.word(0), self.steps) as step:
            for half, register in enumerate(HALVES):
                at = b.add(b.mul(step, t.word(ROW)), b.mul(self.stride, t.word(half * ROWS)))
                tile(b, "tileloadd", register, self._behind(windows, at), self.stride)
            for panel, laid, register in zip(panels, scratch, PAIR, strict=True):
                base = b.select(b.icmp_signed("<", step, full), self._codes(panel), laid)
                place = self._behind(base, b.mul(step, t.word(ROWS * ROW)))
                tile(b, "tileloadd", register, place, t.word(ROW))
            multiplied(b)

    def _kept(self, halves: Sequence[ir.Value], panels: Sequence[ir.Value]) -> None:
        """The sums become those of the windows of a group."""
        b, t, columns = self.b, self.t, self.out.columns
        across = b.sdiv(columns, t.word(FEATURES))
        for total in SUMS:
            column = b.mul(b.srem(panels[total // 2], across), t.word(FEATURES))
            place = element(b, self.out, b.add(b.mul(halves[total % 2], columns), column), t.i32)
            tile(b, "tilestored", total, place, b.mul(columns, t.word(4)))
