"""The product of two matrices of codes on a CPU, in LLVM code: one is laid out in panels, and met as a kernel's are.

XLA's own product of int8 is no faster than that of floats where a processor has no dot products of bytes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxcomp.kernels.llvm_calls import Work, call_for
from jaxcomp.kernels.llvm_code import Operand, Types, counted, element, least, row_of_words, turned
from jaxcomp.kernels.llvm_panel_sums import VECTOR
from jaxcomp.kernels.llvm_panels import more_of, refusal_of_codes, sums_of_codes
from jaxcomp.kernels.llvm_results import AS_SUMS, Rescaled, Written
from jaxcomp.kernels.panels import DEEP, FEATURES, PanelWeight, unit

if TYPE_CHECKING:
    from llvmlite import ir

BYTES = 5
"""Numbers of so many bits, a byte each, are summed in pairs of bytes."""


FEWEST, SMALLEST = 64, 2**18
"""Rows and products up to which XLA's own is as good, for one of the two matrices is laid out anew."""


def refusal(batch: int, rows: int, features: int, length: int) -> str | None:
    """Why so many products run in no such code on the machine that is here; None if they do."""
    sizes = batch, rows, features, length
    if not all(isinstance(n, int) for n in sizes):
        return "it counts products, and they are any number"
    if why := refusal_of_codes():
        return why
    if rows <= FEWEST or features < FEATURES or length < FEATURES or math.prod(sizes) < SMALLEST:
        return f"they are few: {batch} times {rows} rows by {features} features of {length}"
    return None


def llvm_dot(a: jax.Array, b: jax.Array, reach: int, *, last: bool) -> tuple[jax.Array, jax.Array]:
    """Products of matrices of codes, and the sums over the columns of the second; exact while within int32.

    Args:
      a: int8 ``(batch, rows, length)``.
      b: int8 ``(batch, features, length)`` where ``last``, else ``(batch, length, features)``.
      reach: the largest magnitude in it.
      last: whether what is summed over lies last there.

    Returns:
      int32 ``(batch, rows, features)`` and ``(batch, features)``.
    """
    bits = 8 if reach > 2 ** (BYTES - 1) else BYTES
    features, length = b.shape[1 if last else 2], a.shape[-1]
    filled = max(-(-length // unit(bits)) * unit(bits), DEEP * VECTOR if last else 0)
    more = (0, filled - length)
    b = jnp.pad(b, ((0, 0), (0, 0), more) if last else ((0, 0), more, (0, -features % FEATURES)))
    panels, totals = _panels(b, features, last=last)
    sums = _sums(a, panels, totals.reshape(a.shape[0], -1), bits)
    return sums[..., :features], totals.reshape(a.shape[0], -1)[:, :features]


def llvm_panel_dot(a: jax.Array, w: PanelWeight) -> jax.Array:
    """Products of codes, int8 ``(rows, length)``, and a weight of one tap: int32 ``(rows, features)``, exact."""
    side = w.codes.shape[0] * FEATURES
    totals = jnp.pad(w.totals, (0, side - w.features))
    return _sums(a[None], w.codes, totals[None], w.bits)[0, :, : w.features]


def llvm_panel_floats(a: jax.Array, w: PanelWeight, by_row: jax.Array, zero: jax.Array) -> jax.Array:
    """The product of ``(a - zero) * by_row``, of a row each, and the values of a weight of one tap, float32.

    Args:
      a: int8 ``(rows, length)``.
      w: the weight.
      by_row: float32 ``(rows,)``.
      zero: int32 ``(rows,)``.
    """
    to = Rescaled(by_row, zero, w.scale.reshape(-1), w.totals)
    results = to.written(more_of(w.bits, a.shape[0]), w.codes.shape[0] * FEATURES)
    return _products(a[None], w.codes, w.bits, results)[:, : w.features]


def _sums(a: jax.Array, panels: jax.Array, totals: jax.Array, bits: int) -> jax.Array:
    """``(batch, rows, 16 panels)``: products with panels, as many for each of the batch."""
    y, more = _products(a, panels, bits).reshape(*a.shape[:2], -1), more_of(bits, a.shape[1])
    return y - more * totals[:, None] if more else y


def _products(a: jax.Array, panels: jax.Array, bits: int, results: Written = AS_SUMS) -> jax.Array:
    """``(batch * rows, 16 panels)``."""
    batch, rows, length = a.shape
    a = jnp.pad(a, ((0, 0), (0, 0), (0, -length % unit(bits)))).reshape(batch * rows, -1)
    around = jnp.zeros((1, a.shape[-1]), a.dtype), jnp.zeros((1, 1), jnp.int32)
    wanted = batch, rows, panels.shape[0] // batch
    return sums_of_codes(bits, a, around, panels, wanted, results=results, pointwise=True)


def _panels(b: jax.Array, features: int, *, last: bool) -> tuple[jax.Array, jax.Array]:
    """``(batch * panels, bytes)`` and the sums of their numbers ``(batch * panels, 16)``."""
    batch, length, side = b.shape[0], b.shape[2 if last else 1], -(-features // FEATURES)
    results = [
        jax.ShapeDtypeStruct((batch * side, length * FEATURES), jnp.uint8),
        jax.ShapeDtypeStruct((batch * side, FEATURES), jnp.int32),
    ]
    work = Work(f"laid_{'last' if last else 'first'}", partial(_laid, last), 1, by=2, results=2)
    panels, totals = call_for(work, results, b.reshape(-1, b.shape[-1]), jnp.full((1, 1), batch, jnp.int32))
    return panels, totals


def _laid(last: bool, b: ir.IRBuilder, operands: list[Operand], first: ir.Value, stop: ir.Value) -> None:
    """Some panels."""
    given, count, panels, totals = operands
    (batch,) = row_of_words(b, count, Types().word(0), 1)
    side = b.sdiv(panels.rows, batch)
    lay = _ByFeatures(b, given, panels) if last else _ByLength(b, given, panels)
    with counted(b, first, stop) as panel:
        lay.write(b.sdiv(panel, side), b.srem(panel, side), batch, panel)
        _total(b, panels, panel, totals)


def _total(b: ir.IRBuilder, panels: Operand, panel: ir.Value, totals: Operand) -> None:
    """The sums of each feature of a panel."""
    from llvmlite import ir

    t = Types()
    kind, wide = ir.VectorType(t.i8, FEATURES * DEEP), ir.VectorType(t.i32, FEATURES)
    with b.goto_entry_block():
        place = b.alloca(wide)
    b.store(wide(None), place)
    start, size = b.mul(panel, panels.columns), t.word(FEATURES * DEEP)
    with counted(b, t.word(0), b.sdiv(panels.columns, size)) as unit:
        found = b.load(element(b, panels, b.add(start, b.mul(unit, size)), t.i8), typ=kind, align=1)
        total = b.load(place, typ=wide)
        for i in range(DEEP):
            order = ir.Constant(ir.VectorType(t.i32, FEATURES), list(range(i, FEATURES * DEEP, DEEP)))
            total = b.add(total, b.sext(b.shuffle_vector(found, found, order), wide))
        b.store(total, place)
    b.store(b.load(place, typ=wide), element(b, totals, b.mul(panel, t.word(FEATURES)), t.i32), align=4)


class _Laying(ABC):
    """Writes the code that lays out one panel: of four neighbours along the length, those of 16 features."""

    def __init__(self, b: ir.IRBuilder, given: Operand, panels: Operand) -> None:
        self.b, self.t, self.given, self.panels = b, Types(), given, panels

    @abstractmethod
    def write(self, one: ir.Value, side: ir.Value, batch: ir.Value, panel: ir.Value) -> None:
        """The panel with this number, on this side of a matrix of the batch."""


class _ByFeatures(_Laying):
    """What is summed over lies last: squares of features and neighbours are turned."""

    def write(self, one: ir.Value, side: ir.Value, batch: ir.Value, panel: ir.Value) -> None:
        from llvmlite import ir

        b, t = self.b, self.t
        features = b.sdiv(self.given.rows, batch)
        top = b.mul(one, features)
        unit = ir.IntType(8 * DEEP)
        row_kind, step = ir.VectorType(unit, VECTOR), t.word(VECTOR * DEEP)
        length = self.given.columns
        most, count = b.sub(length, step), b.sdiv(b.add(length, t.word(VECTOR * DEEP - 1)), step)
        rows = []
        for i in range(FEATURES):
            feature, end = b.add(b.mul(side, t.word(FEATURES)), t.word(i)), b.sub(features, t.word(1))
            feature = least(b, feature, end)
            rows.append(b.mul(b.add(top, feature), length))
        start = b.mul(panel, self.panels.columns)
        with counted(b, t.word(0), count) as number:
            at = b.mul(number, step)
            at = least(b, at, most)
            for half in range(FEATURES // VECTOR):
                square = [
                    b.load(element(b, self.given, b.add(row, at), t.i8), typ=row_kind, align=1)
                    for row in rows[half * VECTOR : (half + 1) * VECTOR]
                ]
                for i, column in enumerate(turned(b, square)):
                    offset = t.word((i * FEATURES + half * VECTOR) * DEEP)
                    index = b.add(start, b.add(b.mul(at, t.word(FEATURES)), offset))
                    b.store(column, element(b, self.panels, index, t.i8), align=1)


class _ByLength(_Laying):
    """Features lie last: rows of them are put side by side."""

    def write(self, one: ir.Value, side: ir.Value, batch: ir.Value, panel: ir.Value) -> None:
        from llvmlite import ir

        b, t = self.b, self.t
        length = b.sdiv(self.given.rows, batch)
        kind = ir.VectorType(t.i8, FEATURES)
        first = b.add(b.mul(b.mul(one, length), self.given.columns), b.mul(side, t.word(FEATURES)))
        start = b.mul(panel, self.panels.columns)
        with counted(b, t.word(0), b.sdiv(length, t.word(DEEP))) as number:
            at = b.mul(number, t.word(DEEP))
            rows = []
            for i in range(DEEP):
                index = b.add(first, b.mul(b.add(at, t.word(i)), self.given.columns))
                rows.append(b.load(element(b, self.given, index, t.i8), typ=kind, align=1))
            while len(rows) > 1:
                half = len(rows) // 2
                rows = [self._mixed(rows[i], rows[i + half]) for i in range(half)]
            b.store(rows[0], element(b, self.panels, b.add(start, b.mul(at, t.word(FEATURES))), t.i8), align=1)

    def _mixed(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Of two vectors one number after the other."""
        from llvmlite import ir

        n = x.type.count
        order = [i for j in range(n) for i in (j, n + j)]
        return self.b.shuffle_vector(x, y, ir.Constant(ir.VectorType(self.t.i32, 2 * n), order))
