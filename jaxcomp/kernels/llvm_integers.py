"""The product of activations in codes and a packed weight on a CPU: integers multiplied as integers, in LLVM code.

Products of codes are summed as the processor does it: of bytes by four into 32 bits (VNNI), or in pairs into 16 bits,
as often as these hold it; or of 16 bits in pairs into 32. The sums of a run of codes with one scale are exact, become
floats, and meet the scale.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.kernels import llvm_amx_groups
from jaxcomp.kernels.llvm_calls import dots, features
from jaxcomp.kernels.llvm_code import Operand, element, everywhere, halves, intrinsic
from jaxcomp.kernels.llvm_numbers import constant, dot
from jaxcomp.kernels.llvm_tiles import Cell, Layout, Tile, lowest_of, operands_of, padded, product, unreadable
from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.kernels.runs import Reading, Run, reading

if TYPE_CHECKING:
    from llvmlite import ir

LEAST = 16
"""Neighbouring codes that share bytes and scales: as many as make a short vector of sums."""
MOST = 32
"""As many as a vector of bytes takes, where there are no dot products of longer ones."""
SIGN = 128
"""What a byte of a number of 8 bits, its sign turned, is above it."""


def refusal(w: PackedWeight) -> str | None:
    """Why the kernel cannot run a weight on the machine that is here; None if it can."""
    return unreadable(w, LEAST)


def llvm_integer_product(x: jax.Array, w: PackedWeight) -> jax.Array:
    """``x @ values(w).T``: sums of integers, one rounding for each scale they meet.

    Args:
      x: ``(rows, length)``, int8, or int16 of 255 at most; fastest where those of a row are 255 apart at most, as
        codes of 8 bits less a zero point are.
      w: ``(features, length)``, that :func:`refusal` lets through.

    Returns:
      ``(rows, features)``, float32.
    """
    tiles = not llvm_amx_groups.refusal(x.shape[0], w)
    plain, shifted_kind = (_Dots, _ShiftedDots) if dots() else (_Bytes, _Shifted)
    if "avx2" not in features() or (w.bits == 8 and not dots()):
        return _product(_Words, x.astype(jnp.int16), w)
    if x.dtype == jnp.int8:
        return llvm_amx_groups.amx_product(x, w) if tiles else _product(plain, x, w)
    # Codes less their zero point: bytes, but for what is added to all of a row.
    low, high = (end(x, -1, keepdims=True).astype(jnp.int32) for end in (jnp.min, jnp.max))
    near = (high - low < 256).all()

    def shifted(x: jax.Array, w: PackedWeight, low: jax.Array) -> jax.Array:
        offset = low + 128
        codes = (x.astype(jnp.int32) - offset).astype(jnp.int8)
        if not tiles:
            return _product(shifted_kind, x, w, codes, offset)
        y = llvm_amx_groups.amx_product(jnp.concatenate([codes, jnp.ones_like(codes[:1])]), w)
        return y[:-1] + offset.astype(y.dtype) * y[-1:]

    return lax.cond(near, shifted, lambda x, w, _: _product(_Words, x, w), x, w, low)


def _product(kind: type[_Integers], x: jax.Array, w: PackedWeight, *given: jax.Array) -> jax.Array:
    """In tiles of a kind, which are given the activations in their place."""
    of_dots = issubclass(kind, _Dots)
    read = reading(w, dots() if of_dots else MOST)
    lowest = float(SIGN) if of_dots and w.bits == 8 else lowest_of(w)
    layout = Layout(read, read, lowest, kind)
    operands = operands_of(x, w, lowest)
    if given:
        operands = [padded(given[0], w), *given[1:], *operands[1:]]
    widened = "" if "avx2" in features() else "_plain"
    return product(f"integers_{kind.__name__}{widened}_{read.length}", layout, *operands, codes=max(1, len(given)))


class _Integers(Tile):
    """Codes and activations are integers, summed in 32 bits."""

    together = 1
    exact = True

    @property
    def kind(self) -> ir.Type:
        from llvmlite import ir

        return ir.VectorType(self.t.i32, self.width)

    def parts(self, block: ir.Value, runs: list[Run]) -> dict[Cell, ir.Value]:
        sums = dict.fromkeys(self.cells(), self.kind(None))
        self.summed(block, runs, sums)
        return sums

    def plus(self, total: ir.Value, part: ir.Value) -> ir.Value:
        return self.b.add(total, part)

    def number(self, total: ir.Value, cell: Cell) -> ir.Value:
        b, t, (row, feature) = self.b, self.t, cell
        number = intrinsic(b, f"llvm.vector.reduce.add.v{self.width}i32", t.i32, total)
        if self.sums:
            off = t.i32(int(self.lowest))
            if len(self.sums) > 1:
                off = b.add(off, self._integer(self.sums[1], self.features[feature]))
            number = b.sub(number, b.mul(off, self._integer(self.sums[0], self.rows[row])))
        return b.sitofp(number, t.f32)

    def _integer(self, column: Operand, row: ir.Value) -> ir.Value:
        """One of a column of floats that are small integers."""
        return self.b.fptosi(self.b.load(self.at(column, row, self.t.word(0), self.t.f32), typ=self.t.f32), self.t.i32)

    def float_of(self, part: ir.Value) -> ir.Value:
        return self.b.sitofp(part, self.floats)

    def loaded(self, block: ir.Value, feature: ir.Value, offset: int) -> ir.Value:
        return self.data(block, feature, offset)

    @abstractmethod
    def summed(self, block: ir.Value, runs: list[Run], sums: dict[Cell, ir.Value]) -> None:
        """Adds the products of runs to vectors of sums."""

    def numbers(self, row: ir.Value, column: ir.Value, kind: ir.Type, count: int) -> ir.Value:
        """Activations from a column on."""
        from llvmlite import ir

        place = self.at(self.x, row, column, kind)
        return self.b.load(place, typ=ir.VectorType(kind, count), align=kind.width // 8)

    def pairs(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Products of integers of 16 bits, added up by two into as many sums as there are."""
        b = self.b
        if "avx2" in features():
            name = "llvm.x86.avx2.pmadd.wd" if self.width == 8 else "llvm.x86.sse2.pmadd.wd"
            return intrinsic(self.b, name, self.kind, x, y)
        parts = [[b.sext(part, self.kind) for part in halves(b, v)] for v in (x, y)]
        return b.add(*(b.mul(*both) for both in zip(*parts, strict=True)))


class _Words(_Integers):
    """Both in 16 bits."""

    @staticmethod
    def places(length: int) -> int:
        return 8

    def summed(self, block: ir.Value, runs: list[Run], sums: dict[Cell, ir.Value]) -> None:
        from llvmlite import ir

        b, words = self.b, ir.VectorType(ir.IntType(16), 16)
        codes_of = self.codes_of(block)
        for run in runs:
            codes = [codes_of(run, j) for j in range(len(self.features))]
            parts = [[code] if code.type.count == 16 else halves(b, code) for code in codes]
            for at in range(len(parts[0])):
                column = b.add(self.column(block, run), self.t.word(16 * at))
                xs = [self.numbers(row, column, words.element, 16) for row in self.rows]
                for j, part in enumerate(parts):
                    y = (b.sext if self.read.bits == 8 else b.zext)(part[at], words)
                    for i, x in enumerate(xs):
                        sums[i, j] = b.add(sums[i, j], self.pairs(x, y))


class _Bytes(_Integers):
    """Both in bytes, the codes from 0 on; their products are added up in 16 bits while these hold them."""

    @staticmethod
    def places(length: int) -> int:
        return length // 4

    def summed(self, block: ir.Value, runs: list[Run], sums: dict[Cell, ir.Value]) -> None:
        from llvmlite import ir

        b, words = self.b, ir.VectorType(ir.IntType(16), self.read.length // 2)
        name = "llvm.x86.avx2.pmadd.ub.sw" if words.count == 16 else "llvm.x86.ssse3.pmadd.ub.sw.128"
        ones, codes_of = constant(words, 1), self.codes_of(block)
        at_once = (2**15 - 1) // (2 * (2**self.read.bits - 1) * 128)
        for start in range(0, len(runs), at_once):
            short: dict[Cell, ir.Value] = {}
            for run in runs[start : start + at_once]:
                codes = [codes_of(run, j) for j in range(len(self.features))]
                xs = self.beside(run, self.column(block, run))
                for i, j in sums:
                    pairs = intrinsic(self.b, name, words, codes[j], xs[i])
                    short[i, j] = b.add(short[i, j], pairs) if (i, j) in short else pairs
            for cell, value in short.items():
                sums[cell] = b.add(sums[cell], self.pairs(value, ones))

    def beside(self, run: Run, column: ir.Value) -> list[ir.Value]:
        """What the codes of a run meet."""
        return [self.numbers(row, column, self.t.i8, self.read.length) for row in self.rows]


class _Dots(_Bytes):
    """The same by the processor's dot products of four bytes, codes of 8 bits too."""

    def loaded(self, block: ir.Value, feature: ir.Value, offset: int) -> ir.Value:
        data = super().loaded(block, feature, offset)
        return self.b.xor(data, constant(self.bytes, -SIGN)) if self.read.bits == 8 else data

    def summed(self, block: ir.Value, runs: list[Run], sums: dict[Cell, ir.Value]) -> None:
        b, codes_of = self.b, self.codes_of(block)
        for run in runs:
            codes = [b.bitcast(codes_of(run, j), self.kind) for j in range(len(self.features))]
            xs = [b.bitcast(x, self.kind) for x in self.beside(run, self.column(block, run))]
            for i, j in sums:
                sums[i, j] = dot(b, sums[i, j], codes[j], xs[i])


class _Shifted(_Bytes):
    """Activations that are bytes and a number that is added to all of a row, the second operand."""

    def __init__(
        self, read: Reading, lowest: float, b: ir.IRBuilder, operands: list[Operand], rows: list[ir.Value]
    ) -> None:
        x, self.offsets, *rest = operands
        super().__init__(read, lowest, b, [x, *rest], rows)

    def beside(self, run: Run, column: ir.Value) -> list[ir.Value]:
        return [*super().beside(run, column), constant(self.bytes, 1)]

    def parts(self, block: ir.Value, runs: list[Run]) -> dict[Cell, ir.Value]:
        b, count = self.b, len(self.rows)
        last = [(count, j) for j in range(len(self.features))]
        sums = dict.fromkeys([*self.cells(), *last], self.kind(None))
        self.summed(block, runs, sums)
        for i, j in self.cells():
            offset = b.load(element(b, self.offsets, self.rows[i], self.t.i32), typ=self.t.i32)
            sums[i, j] = b.add(sums[i, j], b.mul(everywhere(b, offset, self.width), sums[count, j]))
        return {cell: sums[cell] for cell in self.cells()}


class _ShiftedDots(_Shifted, _Dots):
    """Such activations by dot products."""
