"""Functions of rows done by LLVM code, in a room as wide as whole vectors."""

from __future__ import annotations

import hashlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.kernels.llvm_calls import Work, call
from jaxcomp.kernels.llvm_code import Operand, Types, counted, element, everywhere
from jaxcomp.kernels.llvm_rowwise import Row, write_passes
from jaxcomp.kernels.row_passes import Passes
from tests.trace.rowwise import Rows


def _chunk(rows: Rows, lanes: int, together: int, length: int, b, operands, first, last) -> None:
    """The row is copied to the first slot of the result's, whose others begin as NaN."""
    from llvmlite import ir

    t, kind = Types(), ir.VectorType(Types().f32, lanes)
    x, *others, y = operands
    passes = Passes(rows.function, rows.varying)

    def place(row: ir.Value, slot: int, index: ir.Value) -> ir.Value:
        at = b.add(b.mul(row, y.columns), b.add(b.mul(x.columns, t.word(slot)), index))
        return element(b, y, at, t.f32)

    def load(row: ir.Value, which: int, index: ir.Value | None, there: int) -> ir.Value:
        one: Operand = others[which]
        start = b.mul(row, one.columns)
        if index is None:
            found = everywhere(b, b.load(element(b, one, start, t.f32), typ=t.f32), lanes)
        else:
            found = b.load(element(b, one, b.add(start, index), t.f32), typ=kind, align=4)
        truth = rows.values[which].dtype == bool
        return b.fcmp_unordered("!=", found, kind(None)) if truth else found

    def row_of(row: ir.Value) -> Row:
        def read(slot: int, index: ir.Value, _: int) -> ir.Value:
            return b.load(place(row, slot, index), typ=kind, align=4)

        def write(slot: int, index: ir.Value, _: int, value: ir.Value) -> None:
            b.store(value, place(row, slot, index), align=4)

        return Row(length, lanes, read, write, partial(load, row))

    with counted(b, t.word(0), b.sdiv(b.sub(last, first), t.word(together))) as group:
        each = [b.add(first, b.add(b.mul(group, t.word(together)), t.word(i))) for i in range(together)]
        for row in each:
            with counted(b, t.word(0), b.sdiv(y.columns, t.word(lanes))) as part:
                index = b.mul(part, t.word(lanes))
                b.store(kind([float("nan")] * lanes), place(row, 0, index), align=4)
            with counted(b, t.word(0), b.sdiv(x.columns, t.word(lanes))) as part:
                index = b.mul(part, t.word(lanes))
                found = b.load(element(b, x, b.add(b.mul(row, x.columns), index), t.f32), typ=kind, align=4)
                b.store(found, place(row, 0, index), align=4)
        write_passes(b, passes, [row_of(row) for row in each])


def _padded(x: np.ndarray, width: int) -> jax.Array:
    """Rows of whole vectors, whose ends are NaN."""
    return jnp.asarray(np.pad(x.astype(np.float32), ((0, 0), (0, width - x.shape[1])), constant_values=np.nan))


def by_llvm(rows: Rows, lanes: int, x: np.ndarray, together: int = 1) -> np.ndarray:
    """Of each row."""
    count, length = x.shape
    width = -(-length // lanes) * lanes
    passes = Passes(rows.function, rows.varying)
    given = [_padded(x, width)]
    for value, one in zip(rows.values, rows.beside, strict=True):
        laid = np.broadcast_to(value, (count, value.shape[-1] if one.axes[1] is not None else 1))
        given.append(_padded(laid, width if one.axes[1] is not None else 1))
    text = repr((rows.function, rows.varying, [v.dtype for v in rows.values], lanes, together, length))
    work = Work(
        f"test_rowwise_{hashlib.sha256(text.encode()).hexdigest()[:16]}",
        partial(_chunk, rows, lanes, together, length),
        count,
        by=0,
    )
    out = jax.ShapeDtypeStruct((count, passes.slots * width), jnp.float32)
    y = np.asarray(jax.jit(lambda *given: call(work, out, *given))(*given)).reshape(count, passes.slots, width)
    return y[:, passes.result, :length]
