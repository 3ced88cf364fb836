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
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxcomp.kernels.llvm_amx_windows import ROW, ROWS, Gathered, InPlace
from jaxcomp.kernels.llvm_calls import Work, call, features
from jaxcomp.kernels.llvm_code import Operand, Types, Writer, behind, counted, element, intrinsic, least, row_of_words
from jaxcomp.kernels.llvm_panel_sums import Given, Panel
from jaxcomp.kernels.llvm_results import AS_SUMS, Kept, Results, Written
from jaxcomp.kernels.panels import FEATURES, unit, width

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llvmlite import ir

WINDOWS = 2 * ROWS
"""That meet two panels at a time."""
MANY, PANELS = 4 * WINDOWS, 8
"""What a thread takes at a time."""
TOGETHER = 2
"""Rows of sums that become something else at once."""
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


def amx_sums(bits: int, *given: *Given, results: Written = AS_SUMS, pointwise: bool = False) -> jax.Array:
    """The sums of products of windows and panels, int32 ``(matrices * windows, 16 * panels)``; or codes of them.

    Args:
      bits: of the codes of panels.
      given: images int8, and windows :data:`ROWS` at least.
      results: how they are written.
      pointwise: whether each window is the pixel of its own number, all of it.
    """
    x, around, codes, (batch, windows, panels) = given
    parts, sides = -(-windows // MANY), -(-panels // PANELS)
    number = jnp.arange(batch * parts * sides, dtype=jnp.int32)
    one, part, side = number // (parts * sides), number // sides % parts, number % sides
    first, panel = part * MANY, one * panels + side * PANELS
    stop, end = jnp.minimum(first + MANY, windows), jnp.minimum(panel + PANELS, (one + 1) * panels)
    first = jnp.minimum(first, windows - ROWS)
    tasks = jnp.stack([panel, end, one * windows + first, one * windows + stop], 1)
    result = jax.ShapeDtypeStruct((batch * windows, panels * FEATURES), results.kept.dtype)
    name = f"panels_amx_{bits}{'_in_place' if pointwise else ''}{results.kept.name}"
    work = Work(name, partial(_chunk, InPlace if pointwise else Gathered, bits, results.kept), 1, by=4)
    return call(work, result, x, *around, codes, tasks, *results.operands)


def _chunk(
    kind: type[Gathered],
    bits: int,
    kept: Kept,
    b: ir.IRBuilder,
    operands: list[Operand],
    first: ir.Value,
    last: ir.Value,
) -> None:
    """Some tasks: the panels from one to before another, and the windows from one to before another."""
    x, blank, sources, codes, tasks, *results = operands
    code = _Code(kind, bits, b, [x, blank, sources, codes], Results(b, results, FEATURES, kept))
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
    return [least(b, at, most) for at in found]


class _Code:
    """Writes the code of some windows by some panels."""

    def __init__(
        self, kind: type[Gathered], bits: int, b: ir.IRBuilder, operands: list[Operand], results: Results
    ) -> None:
        from llvmlite import ir

        t = Types()
        self.bits, self.b, self.t, self.w, self.panel = bits, b, t, Writer(b, t), Panel(bits, FEATURES, b)
        x, blank, sources, self.codes = operands
        self.results, self.out = results, results.out
        self.windows = kind(b, (x, blank, sources), self.out.rows)
        self.length, self.steps = self.windows.length, self.windows.steps
        self.row, self.words = ir.VectorType(t.i8, ROW), ir.VectorType(t.i32, FEATURES)

    def write(self, panel: ir.Value, end: ir.Value, start: ir.Value, stop: ir.Value) -> None:
        """The sums of windows and panels, each from one to before another."""
        b, t = self.b, self.t
        groups = b.sdiv(b.add(b.sub(stop, start), t.word(WINDOWS - 1)), t.word(WINDOWS))
        gathered = b.mul(b.mul(groups, t.word(WINDOWS)), self.windows.stride)
        laid = b.mul(self.steps, t.word(ROWS * ROW))
        begin = b.add(gathered, t.word(ROW))
        size = b.add(begin, b.mul(laid, t.word(2)))
        sums = b.mul(b.sub(stop, start), t.word(PANELS * ROW)) if self.results.given else t.word(0)
        room = self.w.libc("malloc", t.pointer, b.add(size, sums))
        first = behind(b, room, begin)
        scratch, self.sums = [first, behind(b, first, laid)], behind(b, room, size)
        with counted(b, t.word(0), groups) as group:
            self.windows.begun(halves_of(b, group, start, stop), behind(b, room, self._rows(group)))
        with counted(b, t.word(0), b.sdiv(b.add(b.sub(end, panel), t.word(1)), t.word(2))) as number:
            both = [b.add(b.add(panel, b.mul(number, t.word(2))), t.word(i)) for i in range(2)]
            both[1] = b.select(b.icmp_signed("<", both[1], end), both[1], both[0])
            for one, place in zip(both, scratch, strict=True):
                self._laid(one, place)
            with counted(b, t.word(0), groups) as group:
                halves = halves_of(b, group, start, stop)
                self._added(self.windows.met(halves, behind(b, room, self._rows(group))), both, scratch)
                self._kept(halves, both, (start, panel))
        if self.results.given:
            self._written((start, stop), (panel, end))
        self.w.libc("free", t.void, room)

    def _rows(self, group: ir.Value) -> ir.Value:
        return self.b.mul(self.b.mul(group, self.t.word(WINDOWS)), self.windows.stride)

    def _laid(self, panel: ir.Value, place: ir.Value) -> None:
        """Codes of less than a byte become numbers; of others only those behind the last full tile, then zeros."""
        b, t, codes = self.b, self.t, self._codes(panel)
        last, line = b.mul(self.steps, t.word(ROWS * ROW)), t.word(ROW)
        done = b.mul(self.length, t.word(FEATURES))
        if width(self.bits) < 8:
            with counted(b, t.word(0), b.sdiv(self.length, t.word(unit(self.bits)))) as block:
                for channel, (numbers,) in self.panel.numbers(block, codes):
                    b.store(numbers, behind(b, place, b.mul(channel, t.word(FEATURES))), align=1)
        else:
            first = b.mul(self._full(), t.word(ROWS * ROW))
            with counted(b, t.word(0), b.sdiv(b.sub(done, first), line)) as number:
                at = b.add(first, b.mul(number, line))
                found = b.load(behind(b, codes, at), typ=self.row, align=1)
                b.store(found, behind(b, place, at), align=1)
        with counted(b, t.word(0), b.sdiv(b.sub(last, done), line)) as number:
            b.store(self.row(None), behind(b, place, b.add(done, b.mul(number, line))), align=1)

    def _codes(self, panel: ir.Value) -> ir.Value:
        return element(self.b, self.codes, self.b.mul(panel, self.codes.columns), self.t.i8)

    def _full(self) -> ir.Value:
        """How many tiles of a panel can be read where they lie."""
        return self.b.sdiv(self.length, self.t.word(ROW)) if width(self.bits) == 8 else self.t.word(0)

    def _added(
        self, met: tuple[list[ir.Value], ir.Value], panels: Sequence[ir.Value], scratch: Sequence[ir.Value]
    ) -> None:
        """Of a group's windows and two panels."""
        b, t, full, (places, stride) = self.b, self.t, self._full(), met
        cleared(b)
        with counted(b, t.word(0), self.steps) as step:
            for place, register in zip(places, HALVES, strict=True):
                tile(b, "tileloadd", register, behind(b, place, b.mul(step, t.word(ROW))), stride)
            for panel, laid, register in zip(panels, scratch, PAIR, strict=True):
                base = b.select(b.icmp_signed("<", step, full), self._codes(panel), laid)
                place = behind(b, base, b.mul(step, t.word(ROWS * ROW)))
                tile(b, "tileloadd", register, place, t.word(ROW))
            multiplied(b)

    def _kept(self, halves: Sequence[ir.Value], panels: Sequence[ir.Value], first: tuple[ir.Value, ir.Value]) -> None:
        """The sums of the windows of a group leave the tiles; of a panel that is there twice once."""
        b = self.b
        for side, panel in enumerate(panels):
            with b.if_then(b.icmp_signed("!=", *panels)) if side else nullcontext():
                for half, row in enumerate(halves):
                    place, stride = self._place(row, panel, first)
                    tile(b, "tilestored", SUMS[2 * side + half], place, stride)

    def _place(self, row: ir.Value, panel: ir.Value, first: tuple[ir.Value, ir.Value]) -> tuple[ir.Value, ir.Value]:
        """Where sums go from a row and a panel on, and bytes from one row to the next: if to memory of a task's own."""
        b, t = self.b, self.t
        if self.results.given:
            at = b.add(b.mul(b.sub(row, first[0]), t.word(PANELS)), b.sub(panel, first[1]))
            return behind(b, self.sums, b.mul(at, t.word(ROW))), t.word(PANELS * ROW)
        place = element(b, self.out, b.add(b.mul(row, self.out.columns), self._column(panel)), t.i32)
        return place, b.mul(self.out.columns, t.word(4))

    def _column(self, panel: ir.Value) -> ir.Value:
        b, t = self.b, self.t
        return b.mul(b.srem(panel, b.sdiv(self.out.columns, t.word(FEATURES))), t.word(FEATURES))

    def _written(self, rows: tuple[ir.Value, ir.Value], panels: tuple[ir.Value, ir.Value]) -> None:
        """A task's sums become something else, a few rows at once: memory gives tiles back some time after."""
        b, t, (start, stop) = self.b, self.t, rows
        count = b.sdiv(b.add(b.sub(stop, start), t.word(TOGETHER - 1)), t.word(TOGETHER))
        first = self._column(panels[0])
        with counted(b, t.word(0), count) as group:
            some = [b.add(start, b.add(b.mul(group, t.word(TOGETHER)), t.word(i))) for i in range(TOGETHER)]
            some = [b.select(b.icmp_signed("<", row, stop), row, b.sub(stop, t.word(1))) for row in some]
            of_rows = [self.results.of_row(row) for row in some]
            with counted(b, *panels) as panel:
                column = b.add(first, b.mul(b.sub(panel, panels[0]), t.word(FEATURES)))
                of_features = self.results.of_features(column)
                for row, of_row in zip(some, of_rows, strict=True):
                    place, _ = self._place(row, panel, (start, panels[0]))
                    sums = b.load(place, typ=self.words, align=4)
                    self.results.write(sums, of_features, of_row, (row, column))
