"""The product of many rows of codes and a packed weight in groups by a processor's matrix instructions (Intel AMX).

The codes of 32 features become numbers in the order of tiles once for all rows. A group's sums of products are exact,
become floats, and meet its scales.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxcomp.kernels import llvm_amx
from jaxcomp.kernels.llvm_amx import HALVES, PAIR, ROW, ROWS, SUMS, cleared, configured, halves_of, multiplied, tile
from jaxcomp.kernels.llvm_calls import Work, call
from jaxcomp.kernels.llvm_code import (
    Operand,
    Types,
    Writer,
    behind,
    counted,
    element,
    everywhere,
    intrinsic,
    least,
    turned,
)
from jaxcomp.kernels.llvm_numbers import code_of, constant, fma
from jaxcomp.kernels.llvm_tiles import padded, scale_of_block, sums_by_group, units_of
from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.kernels.runs import Reading, once, reading

if TYPE_CHECKING:
    from llvmlite import ir

PANELS = 2
"""Of 16 features, that rows meet at once."""
_BYTES = ROWS * ROW
"""Of a tile."""


def refusal(rows: int, w: PackedWeight) -> str | None:
    """Why so many rows meet no such weight in tiles on the machine that is here; None if they do."""
    if why := llvm_amx.refusal(rows):
        return why
    if w.scale.shape[-1] == 1:
        return "it is for several scales a feature"
    return None if reading(w, ROW).length == ROW else f"groups of {w.group} do not fill the rows of tiles, {ROW} each"


def amx_product(x: jax.Array, w: PackedWeight) -> jax.Array:
    """``x @ values(w).T``, one rounding for each scale that sums meet.

    Args:
      x: int8 ``(rows, length)``.
      w: ``(features, length)``, that :func:`refusal` lets through.

    Returns:
      ``(rows, features)``, float32.
    """
    read, given = reading(w, ROW), [padded(x, w), w.codes, w.scale]
    if w.zero is not None:
        given += [sums_by_group(x.astype(jnp.float32), w), w.zero]
    name = f"integers_amx_{read.bits}_{read.block}_{read.group}_{len(given)}"
    work = Work(name, partial(_chunk, read), PANELS * ROWS, by=1)
    return call(work, jax.ShapeDtypeStruct((x.shape[0], w.codes.shape[0]), jnp.float32), *given)


def _chunk(read: Reading, b: ir.IRBuilder, operands: list[Operand], first: ir.Value, last: ir.Value) -> None:
    """Some features, 32 at most, of all rows."""
    code, t = _Code(read, b, operands), Types()
    with configured(b):
        code.lay(first, last)
        groups = b.sdiv(b.add(code.out.rows, t.word(2 * ROWS - 1)), t.word(2 * ROWS))
        with counted(b, t.word(0), groups) as group:
            code.multiply(halves_of(b, group, t.word(0), code.out.rows), first, last)
    code.free()


class _Code:
    """Writes the code of some rows by two panels of features."""

    def __init__(self, read: Reading, b: ir.IRBuilder, operands: list[Operand]) -> None:
        from llvmlite import ir

        self.read, self.b, self.t, self.w = read, b, Types(), Writer(b, Types())
        self.x, self.codes, self.scale, *self.zeros, self.out = operands
        t = self.t
        self.bytes, self.ints = ir.VectorType(t.i8, ROW), ir.VectorType(t.i32, ROWS)
        self.floats = ir.VectorType(t.f32, ROWS)
        self.blocks, self.keys = b.sdiv(self.codes.columns, t.word(read.size)), read.by_scale()
        # Of each panel tiles of numbers, then scales, then zero points.
        self.laid = b.mul(self.blocks, t.word(len(read.runs) * _BYTES))
        self.scales = b.mul(self.blocks, t.word(len(self.keys) * ROW))
        self.size = b.add(self.laid, b.mul(self.scales, t.word(2 if self.zeros else 1)))
        self.room = self.w.libc("malloc", t.pointer, b.mul(self.size, t.word(PANELS)))
        with b.goto_entry_block():
            self.found, self.totals = b.alloca(self.ints, 4 * ROWS), b.alloca(self.floats, 4 * ROWS)

    def free(self) -> None:
        """What was laid out is gone."""
        self.w.libc("free", self.t.void, self.room)

    def _panel(self, panel: int) -> ir.Value:
        return behind(self.b, self.room, self.b.mul(self.size, self.t.word(panel)))

    def _tile(self, panel: int, block: ir.Value, number: int) -> ir.Value:
        """Where the numbers of a run of a block are, of 16 features."""
        b, t = self.b, self.t
        index = b.add(b.mul(block, t.word(len(self.read.runs))), t.word(number))
        return behind(self.b, self._panel(panel), b.mul(index, t.word(_BYTES)))

    def _of_scale(self, panel: int, block: ir.Value, key: int, *, zero: bool = False) -> ir.Value:
        """Where the scales of 16 features are, or their zero points."""
        b, t = self.b, self.t
        index = b.add(b.mul(block, t.word(len(self.keys))), t.word(key))
        start = b.add(self.laid, self.scales) if zero else self.laid
        return behind(self.b, self._panel(panel), b.add(start, b.mul(index, t.word(ROW))))

    def lay(self, first: ir.Value, last: ir.Value) -> None:
        """Lays out the features from one to before another, the last one again where there are no more."""
        b, t = self.b, self.t
        most = b.sub(last, t.word(1))
        for panel in range(PANELS):
            features = [b.add(first, t.word(panel * ROWS + i)) for i in range(ROWS)]
            features = [least(b, feature, most) for feature in features]
            with counted(b, t.word(0), self.blocks) as block:
                self._lay_numbers(panel, block, features)
                for number, (key, _) in enumerate(self.keys):
                    group = self._group(block, key)
                    self._lay_column(self.scale, group, features, self._of_scale(panel, block, number))
                    if self.zeros:
                        place = self._of_scale(panel, block, number, zero=True)
                        self._lay_column(self.zeros[1], group, features, place)

    def _lay_numbers(self, panel: int, block: ir.Value, features: list[ir.Value]) -> None:
        b, t, read = self.b, self.t, self.read
        start = b.mul(block, t.word(read.size))

        def loaded(feature: ir.Value, offset: int) -> ir.Value:
            index = b.add(b.mul(feature, self.codes.columns), b.add(start, t.word(offset)))
            return b.load(element(b, self.codes, index, t.i8), typ=self.bytes, align=1)

        loads = [once(partial(loaded, feature)) for feature in features]
        lowest = constant(self.bytes, 0 if read.bits == 8 else 2 ** (read.bits - 1))
        for number, run in enumerate(read.runs):
            rows = [b.bitcast(b.sub(code_of(b, run, read.bits, load), lowest), self.ints) for load in loads]
            place = self._tile(panel, block, number)
            for i, column in enumerate(turned(b, rows)):
                b.store(column, behind(self.b, place, t.word(i * ROW)), align=1)

    def _lay_column(self, matrix: Operand, column: ir.Value, rows: list[ir.Value], place: ir.Value) -> None:
        """Elements of a column, side by side."""
        b, t = self.b, self.t
        for i, row in enumerate(rows):
            index = b.add(b.mul(row, matrix.columns), column)
            b.store(b.load(element(b, matrix, index, t.f32), typ=t.f32), behind(self.b, place, t.word(4 * i)))

    def _group(self, block: ir.Value, key: int) -> ir.Value:
        return scale_of_block(self.b, self.read, block, key, self.scale)

    def multiply(self, halves: list[ir.Value], first: ir.Value, last: ir.Value) -> None:
        """The products of the rows from the first of each half on."""
        b, t = self.b, self.t
        self._cleared()
        with counted(b, t.word(0), self.blocks) as block:
            for number, (key, runs) in enumerate(self.keys):
                cleared(b)
                for run in runs:
                    column = b.add(b.mul(block, t.word(self.read.block)), t.word(run.start))
                    for half, register in zip(halves, HALVES, strict=True):
                        index = b.add(b.mul(half, self.x.columns), column)
                        tile(b, "tileloadd", register, element(b, self.x, index, t.i8), self.x.columns)
                    for panel, register in enumerate(PAIR):
                        place = self._tile(panel, block, self.read.runs.index(run))
                        tile(b, "tileloadd", register, place, t.word(ROW))
                    multiplied(b)
                for total in SUMS:
                    tile(b, "tilestored", total, self._line(self.found, total, t.word(0)), t.word(ROW))
                self._scaled(halves, block, number, key)
        self._kept(halves, first, last)

    def _line(self, room: ir.Value, total: int, line: ir.Value) -> ir.Value:
        """The place of a row of a tile in memory."""
        return self.b.gep(room, [self.b.add(line, self.t.word(total * ROWS))])

    def _cleared(self) -> None:
        b, t = self.b, self.t
        with counted(b, t.word(0), t.word(4 * ROWS)) as line:
            b.store(self.floats(None), self._line(self.totals, 0, line))

    def _scaled(self, halves: list[ir.Value], block: ir.Value, number: int, key: int) -> None:
        """A group's sums meet its scales."""
        b, t = self.b, self.t
        scales = [b.load(self._of_scale(p, block, number), typ=self.floats, align=4) for p in range(PANELS)]
        zeros = []
        if self.zeros:
            places = [self._of_scale(panel, block, number, zero=True) for panel in range(PANELS)]
            zeros = [b.fneg(b.load(place, typ=self.floats, align=4)) for place in places]
        # The sums of rows are those of a whole group, which may lie in several blocks; padding is none.
        unit, parts = units_of(self.read)
        index = b.add(b.mul(block, t.word(unit)), t.word(key))
        first, there = b.srem(index, t.word(parts)), b.sdiv(index, t.word(parts))
        begins = b.and_(b.icmp_signed("==", first, t.word(0)), b.icmp_signed("<", there, self.scale.columns))
        with counted(b, t.word(0), t.word(ROWS)) as line:
            for total in SUMS:
                half, panel = total % 2, total // 2
                found = b.sitofp(b.load(self._line(self.found, total, line), typ=self.ints), self.floats)
                if zeros:
                    index = b.add(b.mul(b.add(halves[half], line), self.zeros[0].columns), self._group(block, key))
                    of_row = b.load(element(b, self.zeros[0], index, t.f32), typ=t.f32)
                    of_row = b.select(begins, of_row, t.f32(0.0))
                    found = fma(b, zeros[panel], everywhere(b, of_row, ROWS), found)
                place = self._line(self.totals, total, line)
                b.store(fma(b, scales[panel], found, b.load(place, typ=self.floats)), place)

    def _kept(self, halves: list[ir.Value], first: ir.Value, last: ir.Value) -> None:
        """The totals become the result's, of the features that there are."""
        from llvmlite import ir

        b, t, bit = self.b, self.t, ir.IntType(ROWS)
        masks = []
        for panel in range(PANELS):
            beyond = b.sub(b.add(first, t.word((panel + 1) * ROWS)), last)
            for end, order in ((0, "<"), (ROWS, ">")):
                beyond = b.select(b.icmp_signed(order, beyond, t.word(end)), t.word(end), beyond)
            ones = b.trunc(b.lshr(t.word(2**ROWS - 1), beyond), bit)
            masks.append(b.bitcast(ones, ir.VectorType(ir.IntType(1), ROWS)))
        with counted(b, t.word(0), t.word(ROWS)) as line:
            for total in SUMS:
                panel, row = total // 2, b.add(halves[total % 2], line)
                index = b.add(b.mul(row, self.out.columns), b.add(first, t.word(panel * ROWS)))
                value = b.load(self._line(self.totals, total, line), typ=self.floats)
                place = element(b, self.out, index, t.f32)
                intrinsic(b, f"llvm.masked.store.v{ROWS}f32.p0", t.void, value, place, t.i32(4), masks[panel])
