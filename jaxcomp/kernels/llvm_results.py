"""What becomes of sums of products of codes in LLVM code: they are written as they are, as floats, or as codes.

Of floats and codes the sums themselves are never written: a product and what it is scaled by are one pass, and for
codes its bias, the function of each number behind it and the rounding of what follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.core.types import DType
from jaxcomp.kernels.llvm_code import Operand, Types, element, everywhere, loaded
from jaxcomp.kernels.llvm_numbers import fma, on_grid
from jaxcomp.kernels.llvm_pointwise import name_of, pointwise
from jaxcomp.quantization.numerics.rounding import WHOLE
from jaxcomp.trace.pointwise import Pointwise

if TYPE_CHECKING:
    from llvmlite import ir


class Kept(NamedTuple):
    """What code writes: int32 sums, float32 numbers, or int8 codes, behind a function of each number."""

    dtype: DType = jnp.dtype(jnp.int32)
    then: Pointwise = ()

    @property
    def name(self) -> str:
        """What the name of code that writes it ends in."""
        return _NAMES[self.dtype] + name_of(self.then)


_NAMES = {jnp.dtype(jnp.int32): "", jnp.dtype(jnp.float32): "_floats", jnp.dtype(jnp.int8): "_codes"}


class Written(NamedTuple):
    """How sums are written.

    Attributes:
      operands: what the code reads to make something else of them.
      kept: what it writes, static.
    """

    operands: tuple[jax.Array, ...] = ()
    kept: Kept = Kept()

    def dtype(self, of_sums: DType) -> DType:
        """Of what is written, of sums of this type."""
        return self.kept.dtype if self.operands else of_sums


AS_SUMS = Written()


class Rescaled(NamedTuple):
    """``(sum - zero * total) * (by_row * by_feature)`` of sums, as floats.

    Attributes:
      by_row: float32 ``(rows,)``, a NaN where the row has it.
      zero: int32 ``(rows,)``.
      by_feature: float32 ``(features,)``.
      totals: int32 ``(features,)``, sums of the weight's numbers.
    """

    by_row: jax.Array
    zero: jax.Array
    by_feature: jax.Array
    totals: jax.Array

    def written(self, more: int, columns: int) -> Written:
        """The code reads int32 ``(2, columns)``, bits of scales, and totals; and ``(rows, 2)``, of scales, and zeros.

        Args:
          more: what codes are more where they meet panels, for the instructions of this processor.
          columns: of the sums, as many as features and more.
        """
        by_feature, by_row = (jax.lax.bitcast_convert_type(v, jnp.int32) for v in (self.by_feature, self.by_row))
        by_feature = jnp.stack([by_feature, self.totals])
        by_feature = jnp.pad(by_feature, ((0, 0), (0, columns - len(self.totals))))
        return Written((by_feature, jnp.stack([by_row, self.zero + more], 1)), Kept(jnp.dtype(jnp.float32)))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "bias", "zero", "less", "reciprocal"],
    meta_fields=["then", "codes", "shift"],
)
@dataclass(frozen=True)
class Requantized:
    """``clip(round(then(sum * scale + bias) * less * reciprocal), *(codes - zero)) + zero - shift`` of sums.

    Attributes:
      scale, bias: float32 ``(features,)``.
      zero, less, reciprocal: float32, of one element: the zero point of the codes, and the two factors that stand for a
        division by their scale.
      then: a function of each number, static.
      codes: the lowest and the highest, static.
      shift: what is kept is so much less, in int8, static.
    """

    scale: jax.Array
    bias: jax.Array
    zero: jax.Array
    less: jax.Array
    reciprocal: jax.Array
    then: Pointwise
    codes: tuple[int, int]
    shift: int

    def written(self, off: jax.Array, columns: int) -> Written:
        """The code reads int32 ``(3, columns)``, bits of scales and of biases and what sums are more; and ``(1, 5)``.

        Args:
          off: int32 ``(features,)``.
          columns: of the sums, as many as features and more.
        """
        # As integers: no float that they are not may be made of the bits.
        floats = jax.lax.bitcast_convert_type(jnp.stack([self.scale, self.bias]), jnp.int32)
        by_feature = jnp.concatenate([floats, off[None]])
        zero, less, reciprocal = (v.reshape(()) for v in (self.zero, self.less, self.reciprocal))
        low, high = (jnp.float32(end) - zero for end in self.codes)
        whole = zero - jnp.float32(self.shift) + jnp.float32(WHOLE)
        known = jnp.stack([less, reciprocal, low, high, whole])
        by_feature = jnp.pad(by_feature, ((0, 0), (0, columns - len(self.scale))))
        return Written((by_feature, known[None]), Kept(jnp.dtype(jnp.int8), self.then))


class Results:
    """Writes vectors of sums where they belong.

    Args:
      b: the code.
      operands: those of :class:`Written`, if there are any, and the results.
      lanes: sums of a vector.
      kept: what is written.
    """

    def __init__(self, b: ir.IRBuilder, operands: Sequence[Operand], lanes: int, kept: Kept) -> None:
        from llvmlite import ir

        self.b, self.t, self.lanes, self.kept = b, Types(), lanes, kept
        *self.given, self.out = operands
        self.floats, self.ints = (ir.VectorType(kind, lanes) for kind in (self.t.f32, self.t.i32))
        self.codes = kept.dtype == jnp.int8
        self.known: list[ir.Value] = []
        if self.codes:
            each = (loaded(b, self.given[1], self.t.word(i), self.t.f32) for i in range(5))
            self.known = [everywhere(b, value, lanes) for value in each]

    def of_features(self, column: ir.Value) -> list[ir.Value]:
        """What sums of the features from a column on need: nothing where they are written as they are."""
        if not self.given:
            return []
        b, by_feature, kinds = self.b, self.given[0], (self.floats, self.floats, self.ints)[0 if self.codes else 1 :]
        rows = (b.add(b.mul(by_feature.columns, self.t.word(i)), column) for i in range(len(kinds)))
        places = (element(b, by_feature, row, self.t.f32) for row in rows)
        return [b.load(place, typ=kind, align=4) for place, kind in zip(places, kinds, strict=True)]

    def of_row(self, row: ir.Value) -> list[ir.Value]:
        """What sums of a row need: nothing but where they become floats."""
        if self.kept.dtype != jnp.float32:
            return []
        b, first = self.b, self.b.mul(row, self.t.word(2))
        by_row = loaded(b, self.given[1], first, self.t.f32)
        zero = loaded(b, self.given[1], b.add(first, self.t.word(1)), self.t.i32)
        return [everywhere(b, value, self.lanes) for value in (by_row, zero)]

    def write(
        self, sums: ir.Value, of_features: Sequence[ir.Value], of_row: Sequence[ir.Value], at: tuple[ir.Value, ir.Value]
    ) -> None:
        """Sums of neighbouring features, with what they need: of a row and the features from a column on."""
        b, (row, column) = self.b, at
        index = b.add(b.mul(row, self.out.columns), column)
        if self.codes:
            b.store(self._codes(sums, of_features), element(b, self.out, index, self.t.i8), align=1)
        else:
            value = self._rescaled(sums, of_features, of_row) if of_features else sums
            b.store(value, element(b, self.out, index, self.t.i32), align=4)

    def _codes(self, sums: ir.Value, of_features: Sequence[ir.Value]) -> ir.Value:
        b, (scale, bias, off), (less, reciprocal, low, high, whole) = self.b, of_features, self.known
        x = pointwise(b, self.kept.then, fma(b, b.sitofp(b.sub(sums, off), self.floats), scale, bias))
        return on_grid(b, x, (less, reciprocal), (low, high), whole)

    def _rescaled(self, sums: ir.Value, of_features: Sequence[ir.Value], of_row: Sequence[ir.Value]) -> ir.Value:
        b, (scale, total), (by_row, zero) = self.b, of_features, of_row
        return b.fmul(b.sitofp(b.sub(sums, b.mul(zero, total)), self.floats), b.fmul(by_row, scale))
