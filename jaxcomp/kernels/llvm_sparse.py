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
from jaxcomp.kernels.llvm_kept import Kept
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
    kept = Kept.of(w)
    shape = jax.ShapeDtypeStruct((beside.shape[0] * features, panel), jnp.float32)
    work = Work(f"sparse_{kept}_{panel}", partial(_chunk, panel, kept), FEATURES, by=4)
    y = call(work, shape, columns, *kept.operands(w))
    y = y.reshape(-1, features, panel).swapaxes(1, 2).reshape(-1, features)[:rows]
    return y if w.scale is None else y * w.scale.T


def _chunk(panel: int, kept: Kept, b: ir.IRBuilder, operands: list[Operand], first: ir.Value, last: ir.Value) -> None:
    """Some rows of the result: features of one panel after another."""
    from llvmlite import ir

    t, (x, *numbers, out) = Types(), operands
    floats = t.f32 if panel == 1 else ir.VectorType(t.f32, panel)
    features = b.sub(numbers[2].columns, t.word(1))
    length = b.sdiv(x.rows, b.sdiv(out.rows, features))
    with b.goto_entry_block():
        total = b.alloca(floats)
    with counted(b, first, last) as row:
        b.store(ir.Constant(floats, 0.0 if panel == 1 else None), total)
        top = b.mul(b.sdiv(row, features), length)
        with kept.each(b, numbers, b.srem(row, features)) as (position, number):
            place = element(b, x, b.mul(b.add(top, position), t.word(panel)), t.f32)
            wide = number if panel == 1 else everywhere(b, number, panel)
            product = b.fmul(wide, b.load(place, typ=floats, align=4), flags=("contract",))
            flags = ("reassoc", "contract")
            b.store(b.fadd(b.load(total, typ=floats), product, flags=flags), total)
        place = element(b, out, b.mul(row, t.word(panel)), t.f32)
        b.store(b.load(total, typ=floats), place, align=4)
