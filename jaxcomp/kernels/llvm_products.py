"""The product of floats and a packed weight on a CPU, from the bytes as they lie: LLVM code for each layout of codes.

One feature after another: vectors of bytes are cut into codes, converted, and multiplied by the activations of up to
four rows; each group's sums meet its scale as vectors, and are added up once, at the end of the feature. Only packed
bytes are read, and nothing is written but the result.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.kernels.llvm_calls import Work, call, missing
from jaxcomp.kernels.llvm_code import Operand, Types, counted, element, everywhere
from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.kernels.runs import Reading, Run, matrix_of_integers, reading, short_runs

if TYPE_CHECKING:
    from llvmlite import ir

LEAST = 8
"""Neighbouring codes that share bytes and scales: as many as a vector takes."""
PANEL = 4
"""Rows of activations that meet a code while it lies in a register."""
TILE = 2
"""Features that then share the activations that lie in registers."""
FEATURES = 16
"""Of a chunk, what a thread takes at a time."""

Cell = tuple[int, int]
"""A row and a feature of a tile."""


def refusal(w: PackedWeight) -> str | None:
    """Why the kernel cannot run a weight on the machine that is here; None if it can."""
    if w.scale.dtype != jnp.float32:
        return f"its sums are in float32, and the scale is {w.scale.dtype}"
    return missing() or matrix_of_integers(w) or short_runs(w, LEAST)


def llvm_product(x: jax.Array, w: PackedWeight) -> jax.Array:
    """``x @ values(w).T`` with sums in float32.

    Args:
      x: ``(rows, length)``.
      w: ``(features, length)``, that :func:`refusal` lets through.

    Returns:
      ``(rows, features)``, float32.
    """
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, w.padded - w.length)))
    layout = _Layout(reading(w, 16), reading(w, 8), 0.0 if w.bits == 8 else 2.0 ** (w.bits - 1))
    operands = [x, w.codes, w.scale]
    if w.zero is not None or layout.lowest:
        operands.append(_sums_by_group(x[:, : w.length], w))
    if w.zero is not None:
        operands.append(w.zero)
    name = f"weight_only_{w.bits}_{w.block}_{layout.long.group}_{len(operands)}"
    shape = jax.ShapeDtypeStruct((x.shape[0], w.codes.shape[0]), jnp.float32)
    return call(Work(name, partial(_chunk, layout), FEATURES, by=1), shape, *operands)


def _sums_by_group(x: jax.Array, w: PackedWeight) -> jax.Array:
    """Of the activations: ``(rows, groups)``."""
    groups = w.scale.shape[-1]
    if groups == 1:
        return x.sum(-1, keepdims=True)
    return jnp.pad(x, ((0, 0), (0, groups * w.group - w.length))).reshape(len(x), groups, -1).sum(-1)


class _Layout(NamedTuple):
    """How codes are read for one row, in longer vectors, and for more; what code 0 is below 0."""

    long: Reading
    short: Reading
    lowest: float


def _chunk(layout: _Layout, b: ir.IRBuilder, operands: list[Operand], first: ir.Value, last: ir.Value) -> None:
    """Some features of all rows: four rows at a time, then those that are left, one by one."""
    x, t = operands[0], Types()
    panels = b.sdiv(x.rows, t.word(PANEL))
    with counted(b, t.word(0), panels) as panel:
        top = b.mul(panel, t.word(PANEL))
        rows = [b.add(top, t.word(i)) for i in range(PANEL)]
        _tiles(_Tile(layout.short, layout.lowest, b, operands, rows), TILE, first, last)
    with counted(b, b.mul(panels, t.word(PANEL)), x.rows) as row:
        _tiles(_Tile(layout.long, layout.lowest, b, operands, [row]), 1, first, last)


def _tiles(tile: _Tile, size: int, first: ir.Value, last: ir.Value) -> None:
    """All features of a chunk, so many at a time; the last one again where they do not fill a tile."""
    b, t = tile.b, tile.t
    count = b.sdiv(b.add(b.sub(last, first), t.word(size - 1)), t.word(size))
    most = b.sub(last, t.word(1))
    with counted(b, t.word(0), count) as number:
        features = [b.add(b.add(first, b.mul(number, t.word(size))), t.word(i)) for i in range(size)]
        tile.write([b.select(b.icmp_signed("<", feature, most), feature, most) for feature in features])


class _Tile:
    """Writes the code of the products of some rows and some features."""

    def __init__(
        self,
        read: Reading,
        lowest: float,
        b: ir.IRBuilder,
        operands: list[Operand],
        rows: list[ir.Value],
    ) -> None:
        from llvmlite import ir

        self.read, self.lowest, self.b, self.t = read, lowest, b, Types()
        self.x, self.codes, self.scale, *self.sums, self.out = operands
        self.rows = rows
        self.features: list[ir.Value] = []
        self.width = read.length
        self.floats = ir.VectorType(self.t.f32, self.width)
        self.ints = ir.VectorType(self.t.i32, self.width)
        self.bytes = ir.VectorType(self.t.i8, self.width)
        self.nothing = ir.Constant(self.floats, None)

    def write(self, features: list[ir.Value]) -> None:
        """All of it for these features."""
        b, t, read = self.b, self.t, self.read
        self.features = features
        cells = self.cells()
        with b.goto_entry_block():
            totals = {cell: b.alloca(self.floats) for cell in cells}
            shifts = {cell: b.alloca(t.f32) for cell in cells}
        for cell in cells:
            b.store(self.nothing, totals[cell])
            b.store(t.f32(0.0), shifts[cell])
        blocks = b.sdiv(self.codes.columns, t.word(read.size))
        with counted(b, t.word(0), blocks) as block:
            for key, runs in read.by_scale():
                parts = self._parts(block, runs)
                scales = None if read.group is None else self._wide_scales(self._group(block, key))
                for cell, part in parts.items():
                    total = b.load(totals[cell], typ=self.floats)
                    total = b.fadd(total, part) if scales is None else self._fma(scales[cell[1]], part, total)
                    b.store(total, totals[cell])
        if self.sums:
            with counted(b, t.word(0), self.scale.columns) as group:
                self._shifted(group, shifts)
        for i, j in cells:
            value = self._added(b.load(totals[i, j], typ=self.floats))
            if read.group is None:
                value = b.fmul(value, self._scale(self.features[j], t.word(0)))
            value = b.fadd(value, b.load(shifts[i, j], typ=t.f32))
            b.store(value, self._at(self.out, self.rows[i], self.features[j], t.f32))

    def cells(self) -> list[Cell]:
        """By their places in the tile."""
        return [(i, j) for j in range(len(self.features)) for i in range(len(self.rows))]

    def _parts(self, block: ir.Value, runs: list[Run]) -> dict[Cell, ir.Value]:
        """Vectors of sums of codes times activations: each begins anew, so that one need not wait for another."""
        b, t = self.b, self.t
        parts = dict.fromkeys(self.cells(), self.nothing)
        held: dict[tuple[int, int], ir.Value] = {}
        for run in runs:
            column = b.add(b.mul(block, t.word(self.read.block)), t.word(run.start))
            places = [self._at(self.x, row, column, t.f32) for row in self.rows]
            xs = [b.load(place, typ=self.floats, align=4) for place in places]
            for j in range(len(self.features)):
                numbers = b.sitofp(self._codes(block, run, j, held), self.floats)
                for i, x in enumerate(xs):
                    parts[i, j] = self._fma(numbers, x, parts[i, j])
        return parts

    def _codes(self, block: ir.Value, run: Run, j: int, held: dict[tuple[int, int], ir.Value]) -> ir.Value:
        """Of a run; bytes that two runs share are loaded once."""
        b, code = self.b, None
        for part in run.parts:
            if (part.offset, j) not in held:
                held[part.offset, j] = self._loaded(block, part.offset, self.features[j])
            field = held[part.offset, j]
            if self.read.bits < 8:
                field = b.and_(b.lshr(field, self._each(part.shift)), self._each(2**part.width - 1))
                field = b.shl(field, self._each(part.place))
            code = field if code is None else b.or_(code, field)
        return code

    def _loaded(self, block: ir.Value, offset: int, feature: ir.Value) -> ir.Value:
        """Bytes of a block as integers."""
        b, t = self.b, self.t
        column = b.add(b.mul(block, t.word(self.read.size)), t.word(offset))
        data = b.load(self._at(self.codes, feature, column, t.i8), typ=self.bytes, align=1)
        return (b.sext if self.read.bits == 8 else b.zext)(data, self.ints)

    def _group(self, block: ir.Value, key: int) -> ir.Value:
        """The scale of a block's codes with this key; the last one where all is padding."""
        b, t, read = self.b, self.t, self.read
        assert read.group is not None
        unit = math.gcd(read.group, read.block)
        index = b.add(b.mul(block, t.word(read.block // unit)), t.word(key))
        group = b.sdiv(index, t.word(read.group // unit))
        last = b.sub(self.scale.columns, t.word(1))
        return b.select(b.icmp_signed("<", group, last), group, last)

    def _wide_scales(self, group: ir.Value) -> list[ir.Value]:
        """Vectors, one a feature."""
        return [everywhere(self.b, self._scale(feature, group), self.width) for feature in self.features]

    def _scale(self, feature: ir.Value, group: ir.Value) -> ir.Value:
        return self.b.load(self._at(self.scale, feature, group, self.t.f32), typ=self.t.f32)

    def _shifted(self, group: ir.Value, shifts: dict[Cell, ir.Value]) -> None:
        """Adds what a group's codes are off by, times the sum of the activations."""
        b, t = self.b, self.t
        for j, feature in enumerate(self.features):
            off = t.f32(-self.lowest)
            if len(self.sums) > 1:
                off = b.fsub(off, b.load(self._at(self.sums[1], feature, group, t.f32), typ=t.f32))
            off = b.fmul(off, self._scale(feature, group))
            for i, row in enumerate(self.rows):
                total = b.load(self._at(self.sums[0], row, group, t.f32), typ=t.f32)
                b.store(self._fma(off, total, b.load(shifts[i, j], typ=t.f32)), shifts[i, j])

    # ---- vectors

    def _at(self, matrix: Operand, row: ir.Value, column: ir.Value, kind: ir.Type) -> ir.Value:
        index = self.b.add(self.b.mul(row, matrix.columns), column)
        return element(self.b, matrix, index, kind)

    def _each(self, value: int) -> ir.Value:
        from llvmlite import ir

        return ir.Constant(self.ints, [value] * self.width)

    def _fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """One operation where the processor has it, else two."""
        kind = "f32" if x.type == self.t.f32 else f"v{self.width}f32"
        return self._intrinsic(f"llvm.fmuladd.{kind}", x, y, z)

    def _added(self, x: ir.Value) -> ir.Value:
        """The sum of a vector, in any order."""
        return self._intrinsic(f"llvm.vector.reduce.fadd.v{self.width}f32", self.t.f32(0.0), x, flags=("reassoc",))

    def _intrinsic(self, name: str, *given: ir.Value, flags: tuple[str, ...] = ()) -> ir.Value:
        """One of LLVM's own; all here give what the first argument is."""
        from llvmlite import ir

        kind = ir.FunctionType(given[0].type, [x.type for x in given])
        found = self.b.module.globals.get(name) or ir.Function(self.b.module, kind, name)
        return self.b.call(found, given, fastmath=flags)
