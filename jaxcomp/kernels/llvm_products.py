"""The product of floats and a packed weight on a CPU, from bytes as they lie: LLVM code for each layout of codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxcomp.kernels.llvm_code import added
from jaxcomp.kernels.llvm_numbers import fma
from jaxcomp.kernels.llvm_tiles import Cell, Layout, Tile, lowest_of, operands_of, product, unreadable
from jaxcomp.kernels.packing import PackedWeight
from jaxcomp.kernels.runs import Run, reading

if TYPE_CHECKING:
    from llvmlite import ir

LEAST = 8
"""Neighbouring codes that share bytes and scales: as many as a vector takes."""


def refusal(w: PackedWeight) -> str | None:
    """Why the kernel cannot run a weight on the machine that is here; None if it can."""
    return unreadable(w, LEAST)


def llvm_product(x: jax.Array, w: PackedWeight) -> jax.Array:
    """``x @ values(w).T`` with sums in float32.

    Args:
      x: ``(rows, length)``.
      w: ``(features, length)``, that :func:`refusal` lets through.

    Returns:
      ``(rows, features)``, float32.
    """
    layout = Layout(reading(w, 16), reading(w, 8), lowest_of(w), _Floats)
    return product("weight_only", layout, *operands_of(x.astype(jnp.float32), w, lowest_of(w)))


class _Floats(Tile):
    """Codes are made floats, and multiplied as such."""

    together = 2

    @staticmethod
    def places(length: int) -> int:
        return length

    @property
    def kind(self) -> ir.Type:
        return self.floats

    def parts(self, block: ir.Value, runs: list[Run]) -> dict[Cell, ir.Value]:
        b = self.b
        parts = dict.fromkeys(self.cells(), self.kind(None))
        codes = self.codes_of(block)
        for run in runs:
            column = self.column(block, run)
            places = [self.at(self.x, row, column, self.t.f32) for row in self.rows]
            xs = [b.load(place, typ=self.floats, align=4) for place in places]
            for j in range(len(self.features)):
                numbers = b.sitofp(codes(run, j), self.floats)
                for i, x in enumerate(xs):
                    parts[i, j] = fma(b, numbers, x, parts[i, j])
        return parts

    def plus(self, total: ir.Value, part: ir.Value) -> ir.Value:
        return self.b.fadd(total, part)

    def number(self, total: ir.Value, cell: Cell) -> ir.Value:
        return added(self.b, total)

    def float_of(self, part: ir.Value) -> ir.Value:
        return part

    def loaded(self, block: ir.Value, feature: ir.Value, offset: int) -> ir.Value:
        from llvmlite import ir

        extend = self.b.sext if self.read.bits == 8 else self.b.zext
        return extend(self.data(block, feature, offset), ir.VectorType(self.t.i32, self.width))
