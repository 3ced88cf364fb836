"""The product of floats and a sparse weight on a CPU: each number that is kept meets its column of up to 32 rows.

Rows of activations lie beside each other, up to 32 of them, so that a number is read once and multiplied by a vector,
as in the sparse products of Elsen et al., Fast Sparse ConvNets (2020). One row is gathered, number by number.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxcomp.kernels.llvm_calls import Work, call, missing
from jaxcomp.kernels.llvm_code import Operand, Types, counted, element, everywhere
from jaxcomp.kernels.sparse import SparseWeight

if TYPE_CHECKING:
    from llvmlite import ir

PANELS = (1, 8, 16, 32)
"""Rows that lie beside each other: the fewest that hold all, else the most."""
FEATURES = 16
"""Of a chunk, what a thread takes at a time."""


def refusal(w: SparseWeight) -> str | None:
    """Why the kernel cannot run a weight on the machine that is here; None if it can."""
    if w.lead:
        return f"the weight is a stack of shape {w.shape}, and the kernel takes one matrix"
    if w.computed != jnp.float32:
        return f"its sums are in float32, and the weight's are {w.computed}"
    return missing() or (None if w.kept.size else "no number of the weight is kept")


def llvm_sparse_product(x: jax.Array, w: SparseWeight) -> jax.Array:
    """``x @ values(w).T`` with sums in float32.

    Args:
      x: ``(rows, length)``.
      w: ``(features, length)``, that :func:`refusal` lets through.

    Returns:
      ``(rows, features)``, float32.
    """
    rows, features = x.shape[0], w.shape[0]
    panel = next((size for size in PANELS if rows <= size), PANELS[-1])
    beside = jnp.pad(x.astype(jnp.float32), ((0, -rows % panel), (0, 0))).reshape(-1, panel, w.length)
    columns = beside.swapaxes(1, 2).reshape(-1, panel)
    kept = w.kept if w.kept.dtype == jnp.int8 else w.kept.astype(jnp.float32)
    name = f"sparse_{kept.dtype.name}_{w.index.dtype.name}_{panel}"
    shape = jax.ShapeDtypeStruct((beside.shape[0] * features, panel), jnp.float32)
    work = Work(name, partial(_chunk, panel, kept.dtype == jnp.int8, w.index.dtype == jnp.uint16), FEATURES, by=4)
    y = call(work, shape, columns, kept[None], w.index[None], w.starts[None])
    y = y.reshape(-1, features, panel).swapaxes(1, 2).reshape(-1, features)[:rows]
    return y if w.scale is None else y * w.scale.T


def _chunk(
    panel: int,
    coded: bool,
    short: bool,
    b: ir.IRBuilder,
    operands: list[Operand],
    first: ir.Value,
    last: ir.Value,
) -> None:
    """Some rows of the result: features of one panel after another."""
    features = b.sub(operands[3].columns, Types().word(1))
    with counted(b, first, last) as row:
        _Sum(panel, coded, short, b, operands).write(b.sdiv(row, features), b.srem(row, features), row)


class _Sum:
    """Writes the code of the products of one feature and the rows of a panel."""

    def __init__(self, panel: int, coded: bool, short: bool, b: ir.IRBuilder, operands: list[Operand]) -> None:
        from llvmlite import ir

        self.panel, self.coded, self.b, self.t = panel, coded, b, Types()
        self.place = ir.IntType(16) if short else self.t.i32
        self.floats = self.t.f32 if panel == 1 else ir.VectorType(self.t.f32, panel)
        self.x, self.kept, self.index, self.starts, self.out = operands

    def write(self, group: ir.Value, feature: ir.Value, row: ir.Value) -> None:
        """Of a panel, a feature, and the row of the result that holds their sums."""
        from llvmlite import ir

        b, t = self.b, self.t
        with b.goto_entry_block():
            total = b.alloca(self.floats)
        b.store(ir.Constant(self.floats, 0.0 if self.panel == 1 else None), total)
        edges = [self._loaded(self.starts, b.add(feature, t.word(i)), t.i32) for i in range(2)]
        first, last = (b.sext(edge, t.i64) for edge in edges)
        length = b.sdiv(self.x.rows, b.sdiv(self.out.rows, b.sub(self.starts.columns, t.word(1))))
        top = b.mul(group, length)
        with counted(b, first, last) as k:
            column = b.zext(self._loaded(self.index, k, self.place), t.i64)
            number = self._loaded(self.kept, k, t.i8 if self.coded else t.f32)
            if self.coded:
                number = b.sitofp(b.sext(number, t.i32), t.f32)
            x = self._loaded(self.x, b.mul(b.add(top, column), t.word(self.panel)), self.floats)
            wide = number if self.panel == 1 else everywhere(b, number, self.panel)
            product = b.fmul(wide, x, flags=("contract",))
            flags = ("reassoc", "contract")
            b.store(b.fadd(b.load(total, typ=self.floats), product, flags=flags), total)
        place = element(b, self.out, b.mul(row, t.word(self.panel)), t.f32)
        b.store(b.load(total, typ=self.floats), place, align=4)

    def _loaded(self, operand: Operand, index: ir.Value, kind: ir.Type) -> ir.Value:
        """The number with this index, or a vector of floats that begins there."""
        wide = kind == self.floats
        place = element(self.b, operand, index, self.t.f32 if wide else kind)
        return self.b.load(place, typ=kind, align=4 if wide else None)
