"""Floats onto a grid of integers on a CPU, in LLVM code: codes in bytes, and where there is NaN, in one pass.

XLA on CPU rounds in one pass, and looks for NaN, which no code stands for, in two more.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.types import Shape
from jaxcomp.kernels.llvm_calls import Work, call_for, missing, parts
from jaxcomp.kernels.llvm_code import (
    Operand,
    Types,
    counted,
    element,
    everywhere,
    intrinsic,
    least,
    loaded,
    row_of_words,
)
from jaxcomp.kernels.llvm_numbers import on_grid
from jaxcomp.quantization.numerics.rounding import WHOLE

if TYPE_CHECKING:
    from llvmlite import ir

LEAST = 8
"""Numbers that lie side by side on one grid; fewer are left to XLA."""
PIECE = 2**14
"""Numbers that a thread takes at a time."""


class Ends(NamedTuple):
    """Codes go from ``low`` to ``high``, and are kept less ``shift`` in int8."""

    low: int
    high: int
    shift: int


def refusal(x: Shape, grids: Shape, rows: Shape) -> str | None:
    """Why numbers of this shape are not rounded by such code; None if they are.

    Args:
      x: their shape.
      grids: how many there are along each axis.
      rows: along each axis, how many parts NaN is looked for in.
    """
    if why := missing():
        return why
    if not all(isinstance(n, int) for n in x):
        return "it counts numbers, and they are any number"
    if any(many not in (1, n) for each in (grids, rows) for n, many in zip(x, each, strict=True)):
        return "blocks cut an axis"
    columns = math.prod(x[_lead(grids, rows) :])
    return None if columns >= LEAST else f"only {columns} numbers lie side by side on a grid"


def _lead(*blocks: Shape) -> int:
    """The axes before what lies side by side in one block of each kind."""
    return max((i + 1 for shape in blocks for i, n in enumerate(shape) if n > 1), default=0)


def llvm_codes(x: jax.Array, grid: jax.Array, rows: Shape, ends: Ends) -> tuple[jax.Array, jax.Array]:
    """``clip(round(x * less * reciprocal), low - zero, high - zero) + zero - shift``, and NaN where there is one.

    Args:
      x: float32.
      grid: float32 ``(3, *grids)``: the zero point, ``less`` and ``reciprocal``.
      rows: of what NaN is looked for in; :func:`refusal` lets it and both shapes through.
      ends: of the codes.

    Returns:
      int8 codes of the shape of ``x``, and float32 of the shape ``rows``: NaN where ``x`` has one, else 0.
    """
    grids = grid.shape[1:]
    lead = _lead(grids, rows)
    count, columns = math.prod(x.shape[:lead]), math.prod(x.shape[lead:])
    if math.prod(grids) > 1:
        grid = jnp.broadcast_to(grid, (3, *x.shape[:lead], *grids[lead:]))
    pieces = -(-columns // PIECE)
    tasks = parts(count * pieces, max(1, PIECE // min(columns, PIECE)))
    results = [jax.ShapeDtypeStruct((count, columns), jnp.int8), jax.ShapeDtypeStruct((count, pieces), jnp.float32)]
    work = Work("codes_" + "_".join(map(str, ends)).replace("-", "n"), partial(_rounded, ends), 1, by=2, results=2)
    codes, lost = call_for(work, results, x.reshape(count, columns), grid.reshape(3, -1), tasks)
    lost = lost.sum(1).reshape(*x.shape[:lead], *rows[lead:])
    over = tuple(i for i, n in enumerate(rows) if n == 1 < lost.shape[i])
    return codes.reshape(x.shape), lost.sum(over, keepdims=True) if over else lost


def _rounded(ends: Ends, b: ir.IRBuilder, operands: list[Operand], first: ir.Value, last: ir.Value) -> None:
    """Some tasks: pieces of rows from one to before another."""
    x, grid, tasks, codes, lost = operands
    t = Types()
    with counted(b, first, last) as task:
        begin, end = row_of_words(b, tasks, task, 2)
        with counted(b, begin, end) as cell:
            row = b.sdiv(cell, lost.columns)
            start = b.mul(b.srem(cell, lost.columns), t.word(PIECE))
            stop = b.add(start, t.word(PIECE))
            stop = least(b, stop, x.columns)
            number = b.select(b.icmp_signed(">", grid.columns, t.word(1)), row, t.word(0))
            known = [loaded(b, grid, b.add(number, b.mul(grid.columns, t.word(i))), t.f32) for i in range(3)]
            piece = _Piece(b, known, ends, (x, codes), b.mul(row, x.columns))
            found = piece.write(start, stop)
            b.store(b.select(found, t.f32(math.nan), t.f32(0.0)), element(b, lost, cell, t.f32))


class _Piece:
    """Writes the code of numbers side by side on one grid, 8 at least."""

    def __init__(
        self,
        b: ir.IRBuilder,
        known: list[ir.Value],
        ends: Ends,
        matrices: tuple[Operand, Operand],
        row: ir.Value,
    ) -> None:
        from llvmlite import ir

        self.b, self.t, self.row, (self.x, self.codes) = b, Types(), row, matrices
        zero, *self.factors = known
        self.low, self.high = (b.fsub(self.t.f32(end), zero) for end in (ends.low, ends.high))
        self.whole = b.fadd(b.fsub(zero, self.t.f32(ends.shift)), self.t.f32(WHOLE))
        self.ints = partial(ir.VectorType, self.t.i32)

    def write(self, start: ir.Value, stop: ir.Value) -> ir.Value:
        """Whether there was NaN."""
        b, t = self.b, self.t
        with b.goto_entry_block():
            found = b.alloca(self.ints(LEAST))
        b.store(found.allocated_type(None), found)
        count = b.sub(stop, start)
        many = b.sdiv(count, t.word(4 * LEAST))
        with counted(b, t.word(0), many) as number:
            self._some(b.add(start, b.mul(number, t.word(4 * LEAST))), 4, found)
        rest = b.add(start, b.mul(many, t.word(4 * LEAST)))
        few = b.sdiv(b.add(b.sub(stop, rest), t.word(LEAST - 1)), t.word(LEAST))
        most = b.sub(stop, t.word(LEAST))
        with counted(b, t.word(0), few) as number:
            at = b.add(rest, b.mul(number, t.word(LEAST)))
            self._some(least(b, at, most), 1, found)
        ored = intrinsic(b, f"llvm.vector.reduce.or.v{LEAST}i32", t.i32, b.load(found, typ=found.allocated_type))
        return b.icmp_signed("!=", ored, t.i32(0))

    def _some(self, start: ir.Value, vectors: int, found: ir.Value) -> None:
        """So many vectors from there on."""
        from llvmlite import ir

        b, t = self.b, self.t
        at, n = b.add(self.row, start), vectors * LEAST
        kind, ints = ir.VectorType(t.f32, n), self.ints(n)
        x = b.load(element(b, self.x, at, t.f32), typ=kind, align=4)
        lost = b.sext(b.fcmp_unordered("uno", x, x), ints)
        total = b.load(found, typ=found.allocated_type)
        for i in range(vectors):
            part = ir.Constant(self.ints(LEAST), list(range(i * LEAST, (i + 1) * LEAST)))
            total = b.or_(total, b.shuffle_vector(lost, lost, part))
        b.store(total, found)
        wide = partial(everywhere, b, width=n)
        code = on_grid(b, x, [*map(wide, self.factors)], (wide(self.low), wide(self.high)), wide(self.whole))
        b.store(code, element(b, self.codes, at, t.i8), align=1)
