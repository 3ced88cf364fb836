"""What becomes of sums of products of codes in LLVM code: they are written as they are, or as the codes of a grid.

Of codes the sums themselves are never written: a product, what it is scaled by, its bias, the function of each number
behind it and the rounding of what follows are one pass.
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


_SUMS = jnp.dtype(jnp.int32)


class Written(NamedTuple):
    """How sums are written: as they are, or as codes.

    Attributes:
      operands: what the code reads to make codes; none, and sums are written.
      then: the function of each number on its way, static.
    """

    operands: tuple[jax.Array, ...] = ()
    then: Pointwise = ()

    def dtype(self, of_sums: DType = _SUMS) -> DType:
        """Of what is written, of sums of this type."""
        return jnp.dtype(jnp.int8) if self.operands else of_sums

    @property
    def name(self) -> str:
        """What the name of code that writes it ends in."""
        return f"_codes{name_of(self.then)}" if self.operands else ""


AS_SUMS = Written()


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
        return Written((by_feature, known[None]), self.then)


class Results:
    """Writes vectors of sums where they belong, as they are or as codes.

    Args:
      b: the code.
      operands: those of :class:`Written`, if there are any, and the results.
      lanes: sums of a vector.
      then: the function on the way to codes.
    """

    def __init__(self, b: ir.IRBuilder, operands: Sequence[Operand], lanes: int, then: Pointwise = ()) -> None:
        from llvmlite import ir

        self.b, self.t, self.then = b, Types(), then
        *self.given, self.out = operands
        self.floats, self.ints = (ir.VectorType(kind, lanes) for kind in (self.t.f32, self.t.i32))
        self.known: list[ir.Value] = []
        if self.given:
            each = (loaded(b, self.given[1], self.t.word(i), self.t.f32) for i in range(5))
            self.known = [everywhere(b, value, lanes) for value in each]

    def of_features(self, column: ir.Value) -> list[ir.Value]:
        """What sums of the features from a column on need: nothing where they are written as they are."""
        if not self.given:
            return []
        b, by_feature, kinds = self.b, self.given[0], (self.floats, self.floats, self.ints)
        rows = (b.add(b.mul(by_feature.columns, self.t.word(i)), column) for i in range(len(kinds)))
        places = (element(b, by_feature, row, self.t.f32) for row in rows)
        return [b.load(place, typ=kind, align=4) for place, kind in zip(places, kinds, strict=True)]

    def write(self, sums: ir.Value, needed: Sequence[ir.Value], row: ir.Value, column: ir.Value) -> None:
        """Sums of a row, of neighbouring features from a column on."""
        b, index = self.b, self.b.add(self.b.mul(row, self.out.columns), column)
        if needed:
            b.store(self._codes(sums, needed), element(b, self.out, index, self.t.i8), align=1)
        else:
            b.store(sums, element(b, self.out, index, self.t.i32), align=4)

    def _codes(self, sums: ir.Value, needed: Sequence[ir.Value]) -> ir.Value:
        b, (scale, bias, off), (less, reciprocal, low, high, whole) = self.b, needed, self.known
        x = pointwise(b, self.then, fma(b, b.sitofp(b.sub(sums, off), self.floats), scale, bias))
        return on_grid(b, x, (less, reciprocal), (low, high), whole)
