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

from jaxcomp.kernels.llvm_amx_windows import ROW, ROWS, Gathered, InPlace
from jaxcomp.kernels.llvm_calls import Work, call, features
from jaxcomp.kernels.llvm_code import Operand, Types, Writer, behind, counted, element, intrinsic, row_of_words
from jaxcomp.kernels.llvm_panel_sums import Given, Panel
from jaxcomp.kernels.llvm_results import AS_SUMS, Results, Written
from jaxcomp.kernels.panels import FEATURES, unit, width
from jaxcomp.trace.pointwise import Pointwise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llvmlite import ir

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
    result = jax.ShapeDtypeStruct((batch * windows, panels * FEATURES), results.dtype())
    name = f"panels_amx_{bits}{'_in_place' if pointwise else ''}{results.name}"
    work = Work(name, partial(_chunk, InPlace if pointwise else Gathered, bits, results.then), 1, by=4)
    return call(work, result, x, *around, codes, tasks, *results.operands)


def _chunk(
    kind: type[Gathered],
    bits: int,
    then: Pointwise,
    b: ir.IRBuilder,
    operands: list[Operand],
    first: ir.Value,
    last: ir.Value,
) -> None:
    """Some tasks: the panels from one to before another, and the windows from one to before another."""
    x, blank, sources, codes, tasks, *results = operands
    code = _Code(kind, bits, b, [x, blank, sources, codes], Results(b, results, FEATURES, then))
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
        with b.goto_entry_block():
            self.sums = b.alloca(self.words, ROWS)

    def write(self, panel: ir.Value, end: ir.Value, start: ir.Value, stop: ir.Value) -> None:
        """The sums of windows and panels, each from one to before another."""
        b, t = self.b, self.t
        groups = b.sdiv(b.add(b.sub(stop, start), t.word(WINDOWS - 1)), t.word(WINDOWS))
        gathered = b.mul(b.mul(groups, t.word(WINDOWS)), self.windows.stride)
        laid = b.mul(self.steps, t.word(ROWS * ROW))
        room = self.w.libc("malloc", t.pointer, b.add(b.add(gathered, t.word(ROW)), b.mul(laid, t.word(2))))
        first = behind(b, room, b.add(gathered, t.word(ROW)))
        scratch = [first, behind(b, first, laid)]
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
                self._kept(halves, both)
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

    def _kept(self, halves: Sequence[ir.Value], panels: Sequence[ir.Value]) -> None:
        """The sums become those of the windows of a group, or their codes; of a panel that is there twice once."""
        self._written(0, halves, panels[0])
        with self.b.if_then(self.b.icmp_signed("!=", *panels)):
            self._written(1, halves, panels[1])

    def _written(self, side: int, halves: Sequence[ir.Value], panel: ir.Value) -> None:
        b, t, columns = self.b, self.t, self.out.columns
        column = b.mul(b.srem(panel, b.sdiv(columns, t.word(FEATURES))), t.word(FEATURES))
        needed = self.results.of_features(column)
        for half, first in enumerate(halves):
            total = SUMS[2 * side + half]
            if not needed:
                place = element(b, self.out, b.add(b.mul(first, columns), column), t.i32)
                tile(b, "tilestored", total, place, b.mul(columns, t.word(4)))
                continue
            tile(b, "tilestored", total, self.sums, t.word(ROW))
            with counted(b, t.word(0), t.word(ROWS)) as row:
                place = behind(b, self.sums, b.mul(row, t.word(ROW)))
                self.results.write(b.load(place, typ=self.words, align=4), needed, b.add(first, row), column)
