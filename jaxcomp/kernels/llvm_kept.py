"""The numbers that a sparse weight keeps, as code of our own reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.kernels.llvm_code import Operand, Types, counted, loaded
from jaxcomp.kernels.sparse import SparseWeight

if TYPE_CHECKING:
    from llvmlite import ir


class Kept(NamedTuple):
    """How numbers are read: whether they are int8 codes, not float32, and their positions 16 bits, not 32."""

    coded: bool
    short: bool

    @classmethod
    def of(cls, w: SparseWeight) -> Kept:
        """Of a weight."""
        return cls(w.kept.dtype == jnp.int8, w.index.dtype == jnp.uint16)

    def __str__(self) -> str:
        return f"{'int8' if self.coded else 'float32'}_{'uint16' if self.short else 'int32'}"

    def operands(self, w: SparseWeight) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The numbers, their positions and where features start, each as a matrix of one row."""
        return (w.kept if self.coded else w.kept.astype(jnp.float32))[None], w.index[None], w.starts[None]

    @contextmanager
    def each(
        self, b: ir.IRBuilder, operands: Sequence[Operand], feature: ir.Value
    ) -> Iterator[tuple[ir.Value, ir.Value]]:
        """A loop over the numbers of a feature: its body sees a position and a float."""
        from llvmlite import ir

        t, (kept, index, starts) = Types(), operands
        edges = [b.sext(loaded(b, starts, b.add(feature, t.word(i)), t.i32), t.i64) for i in range(2)]
        with counted(b, *edges) as k:
            position = b.zext(loaded(b, index, k, ir.IntType(16) if self.short else t.i32), t.i64)
            number = loaded(b, kept, k, t.i8 if self.coded else t.f32)
            yield position, b.sitofp(b.sext(number, t.i32), t.f32) if self.coded else number
