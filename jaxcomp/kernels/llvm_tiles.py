"""LLVM code of the product of some rows and a packed weight, tile by tile: what is the same for floats and integers.

One feature after another: vectors of bytes are cut into codes and multiplied by the activations of up to four rows;
each group's sums meet its scale as vectors, and are added up once, at the end of the feature. Only packed bytes are
read, and nothing is written but the result.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial, reduce
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.kernels.llvm_calls import Work, call, missing
from jaxcomp.kernels.llvm_code import Operand, Types, added, counted, element, everywhere, least
from jaxcomp.kernels.llvm_numbers import code_of, fma
from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.kernels.runs import Reading, Run, matrix_of_integers, once, short_runs

if TYPE_CHECKING:
    from llvmlite import ir

PANEL = 4
"""Rows of activations that meet a code while it lies in a register."""
SLOTS = 4
"""Sums of one row and feature that are kept apart, so that a group need not wait for the one before."""
FEATURES = 16
"""Of a chunk, what a thread takes at a time."""

Cell = tuple[int, int]
"""A row and a feature of a tile."""


class Layout(NamedTuple):
    """How codes are read for one row and for more, what code 0 is below 0, and the tiles."""

    long: Reading
    short: Reading
    lowest: float
    kind: type[Tile]


def unreadable(w: PackedWeight, least: int) -> str | None:
    """Why no tiles can be made of a weight on the machine that is here; None if they can.

    Args:
      w: the weight.
      least: neighbouring codes that must share bytes and scales.
    """
    if w.scale.dtype != jnp.float32:
        return f"its sums are in float32, and the scale is {w.scale.dtype}"
    return missing() or matrix_of_integers(w) or short_runs(w, least)


def lowest_of(w: PackedWeight) -> float:
    """What code 0 is below 0."""
    return 0.0 if w.bits == 8 else 2.0 ** (w.bits - 1)


def operands_of(x: jax.Array, w: PackedWeight, lowest: float) -> list[jax.Array]:
    """What the code is given: activations to the end of the last block, codes, scales, and where codes are off by
    something the sums of activations by group ``(rows, groups)`` and the zero points.
    """
    operands = [padded(x, w), w.codes, w.scale]
    if w.zero is not None or lowest:
        operands.append(sums_by_group(x.astype(jnp.float32), w))
    if w.zero is not None:
        operands.append(w.zero)
    return operands


def padded(x: jax.Array, w: PackedWeight) -> jax.Array:
    """Activations to the end of the last block."""
    return jnp.pad(x, ((0, 0), (0, w.padded - w.length)))


def sums_by_group(x: jax.Array, w: PackedWeight) -> jax.Array:
    """Of activations ``(rows, groups)``."""
    groups = w.scale.shape[-1]
    if groups == 1:
        return x.sum(-1, keepdims=True)
    return jnp.pad(x, ((0, 0), (0, groups * w.group - w.length))).reshape(len(x), groups, -1).sum(-1)


def product(name: str, layout: Layout, *operands: jax.Array, codes: int = 1) -> jax.Array:
    """``(rows, features)`` in float32 of operands as the layout's tiles take them.

    Args:
      name: of the tiles.
      layout: theirs.
      operands: activations first.
      codes: which of them the codes are.
    """
    read = layout.long
    work = Work(
        f"{name}_{read.bits}_{read.block}_{read.group}_{len(operands)}", partial(_chunk, layout), FEATURES, by=codes
    )
    shape = (operands[0].shape[0], operands[codes].shape[0])
    return call(work, jax.ShapeDtypeStruct(shape, jnp.float32), *operands)


def _chunk(layout: Layout, b: ir.IRBuilder, operands: list[Operand], first: ir.Value, last: ir.Value) -> None:
    """Some features of all rows: four rows at a time, then those that are left, one by one."""
    x, t = operands[0], Types()
    panels = b.sdiv(x.rows, t.word(PANEL))
    with counted(b, t.word(0), panels) as panel:
        top = b.mul(panel, t.word(PANEL))
        rows = [b.add(top, t.word(i)) for i in range(PANEL)]
        _tiles(layout.kind(layout.short, layout.lowest, b, operands, rows), layout.kind.together, first, last)
    with counted(b, b.mul(panels, t.word(PANEL)), x.rows) as row:
        _tiles(layout.kind(layout.long, layout.lowest, b, operands, [row]), 1, first, last)


def _tiles(tile: Tile, size: int, first: ir.Value, last: ir.Value) -> None:
    """All features of a chunk, so many at a time; the last one again where they do not fill a tile."""
    b, t = tile.b, tile.t
    count = b.sdiv(b.add(b.sub(last, first), t.word(size - 1)), t.word(size))
    most = b.sub(last, t.word(1))
    with counted(b, t.word(0), count) as number:
        features = [b.add(b.add(first, b.mul(number, t.word(size))), t.word(i)) for i in range(size)]
        tile.write([least(b, feature, most) for feature in features])


def units_of(read: Reading) -> tuple[int, int]:
    """How many parts with one key a block has, and a group."""
    assert read.group is not None
    unit = math.gcd(read.group, read.block)
    return read.block // unit, read.group // unit


def scale_of_block(b: ir.IRBuilder, read: Reading, block: ir.Value, key: int, scale: Operand) -> ir.Value:
    """The column of the scale of a block's codes with this key; the last one where all is padding."""
    t, (of_block, of_group) = Types(), units_of(read)
    index = b.add(b.mul(block, t.word(of_block)), t.word(key))
    group, last = b.sdiv(index, t.word(of_group)), b.sub(scale.columns, t.word(1))
    return least(b, group, last)


class Tile(ABC):
    """Writes the code of the products of some rows and some features.

    Attributes:
      together: features that share the activations of a panel that lie in registers.
      exact: whether codes of one scale are summed without rounding.
    """

    together: ClassVar[int]
    exact: ClassVar[bool] = False

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
        self.width = self.places(read.length)
        self.floats = ir.VectorType(self.t.f32, self.width)
        self.bytes = ir.VectorType(self.t.i8, read.length)

    @staticmethod
    @abstractmethod
    def places(length: int) -> int:
        """How many sums a run of codes is added to."""

    @property
    @abstractmethod
    def kind(self) -> ir.Type:
        """Of a vector of sums of codes times activations."""

    @abstractmethod
    def parts(self, block: ir.Value, runs: list[Run]) -> dict[Cell, ir.Value]:
        """Such vectors: each begins anew, so that one need not wait for another."""

    @abstractmethod
    def plus(self, total: ir.Value, part: ir.Value) -> ir.Value:
        """Both of this kind."""

    @abstractmethod
    def number(self, total: ir.Value, cell: Cell) -> ir.Value:
        """The sum of such a vector, a float; if tiles are exact of what codes stand for, less their zero points."""

    @abstractmethod
    def float_of(self, part: ir.Value) -> ir.Value:
        """Such a vector in floats."""

    @abstractmethod
    def loaded(self, block: ir.Value, feature: ir.Value, offset: int) -> ir.Value:
        """Bytes of a block as the vector that codes are cut out of."""

    def write(self, features: list[ir.Value]) -> None:
        """All of it for these features."""
        b, t, read = self.b, self.t, self.read
        self.features = features
        cells, single, by_scale = self.cells(), read.group is None, read.by_scale()
        kept = self.kind if single else self.floats
        slots = min(SLOTS, len(by_scale)) if len(cells) == 1 else 1
        with b.goto_entry_block():
            totals = {cell: [b.alloca(kept) for _ in range(slots)] for cell in cells}
            shifts = {cell: b.alloca(t.f32) for cell in cells}
        for cell in cells:
            for place in totals[cell]:
                b.store(kept(None), place)
            b.store(t.f32(0.0), shifts[cell])
        blocks = b.sdiv(self.codes.columns, t.word(read.size))
        with counted(b, t.word(0), blocks) as block:
            for number, (key, runs) in enumerate(by_scale):
                parts = self.parts(block, runs)
                scales = [] if single else self._wide_scales(scale_of_block(b, read, block, key, self.scale))
                for cell, part in parts.items():
                    place = totals[cell][number % slots]
                    total = b.load(place, typ=kept)
                    total = self.plus(total, part) if single else fma(b, scales[cell[1]], self.float_of(part), total)
                    b.store(total, place)
        if self.sums and not (single and self.exact):
            with counted(b, t.word(0), self.scale.columns) as group:
                self._shifted(group, shifts)
        for i, j in cells:
            each = [b.load(place, typ=kept) for place in totals[i, j]]
            total = reduce(b.fadd, each) if slots > 1 else each[0]
            scale = self._scale(self.features[j], t.word(0)) if single else None
            value = added(b, total) if scale is None else b.fmul(self.number(total, (i, j)), scale)
            value = b.fadd(value, b.load(shifts[i, j], typ=t.f32))
            b.store(value, self.at(self.out, self.rows[i], self.features[j], t.f32))

    def cells(self) -> list[Cell]:
        """By their places in the tile."""
        return [(i, j) for j in range(len(self.features)) for i in range(len(self.rows))]

    def column(self, block: ir.Value, run: Run) -> ir.Value:
        """The place of a run's first code along the contracted axis."""
        return self.b.add(self.b.mul(block, self.t.word(self.read.block)), self.t.word(run.start))

    def codes_of(self, block: ir.Value) -> Callable[[Run, int], ir.Value]:
        """The codes of a run and a feature, from 0 on; bytes that two runs share are loaded once."""
        loads = [once(partial(self.loaded, block, feature)) for feature in self.features]
        return lambda run, j: code_of(self.b, run, self.read.bits, loads[j])

    def data(self, block: ir.Value, feature: ir.Value, offset: int) -> ir.Value:
        """Bytes of a block."""
        b, t = self.b, self.t
        column = b.add(b.mul(block, t.word(self.read.size)), t.word(offset))
        return b.load(self.at(self.codes, feature, column, t.i8), typ=self.bytes, align=1)

    def _wide_scales(self, group: ir.Value) -> list[ir.Value]:
        """Vectors, one a feature."""
        return [everywhere(self.b, self._scale(feature, group), self.width) for feature in self.features]

    def _scale(self, feature: ir.Value, group: ir.Value) -> ir.Value:
        return self.b.load(self.at(self.scale, feature, group, self.t.f32), typ=self.t.f32)

    def _shifted(self, group: ir.Value, shifts: dict[Cell, ir.Value]) -> None:
        """Adds what a group's codes are off by, times the sum of the activations."""
        b, t = self.b, self.t
        for j, feature in enumerate(self.features):
            off = t.f32(-self.lowest)
            if len(self.sums) > 1:
                off = b.fsub(off, b.load(self.at(self.sums[1], feature, group, t.f32), typ=t.f32))
            off = b.fmul(off, self._scale(feature, group))
            for i, row in enumerate(self.rows):
                total = b.load(self.at(self.sums[0], row, group, t.f32), typ=t.f32)
                b.store(fma(b, off, total, b.load(shifts[i, j], typ=t.f32)), shifts[i, j])

    def at(self, matrix: Operand, row: ir.Value, column: ir.Value, kind: ir.Type) -> ir.Value:
        """The place of an element."""
        index = self.b.add(self.b.mul(row, matrix.columns), column)
        return element(self.b, matrix, index, kind)
