"""Values that meet the rows of another: how they are laid out, and read in LLVM code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import jax

from jaxcomp.kernels.llvm_code import Types
from jaxcomp.trace.rowwise import Axes

if TYPE_CHECKING:
    from llvmlite import ir

T = TypeVar("T")


def laid_beside(x: jax.Array, axes: Axes, along: int) -> jax.Array:
    """A value with the axes of the rows' value, that of the rows last, of size 1 where it does not vary.

    >>> import jax.numpy as jnp
    >>> laid_beside(jnp.ones((5, 2)), (None, 0, 1), 1).shape
    (1, 2, 5)
    """
    order = along_last(axes, along)
    kept = [axis for axis in order if axis is not None]
    x = x[tuple(slice(None) if i in kept else slice(0, 1) for i in range(x.ndim))]
    sizes = [1 if axis is None else x.shape[axis] for axis in order]
    return x.transpose(*kept, *(i for i in range(x.ndim) if i not in kept)).reshape(sizes)


def along_last(axes: Sequence[T], along: int) -> list[T]:
    """With one moved to the end."""
    return [*axes[:along], *axes[along + 1 :], axes[along]]


class Numbers(NamedTuple):
    """Numbers in memory, float32, or booleans and other bytes.

    Attributes:
      b: the code.
      data: their address.
      boolean: whether they are bytes, which are read as booleans.
    """

    b: ir.IRBuilder
    data: ir.Value
    boolean: bool = False

    def behind(self, count: ir.Value) -> Numbers:
        """Those behind so many."""
        size = Types().word(1 if self.boolean else 4)
        return self._replace(data=self.b.add(self.data, self.b.mul(count, size)))

    def number(self, index: ir.Value) -> ir.Value:
        """One."""
        found = self.b.load(self._place(index), typ=self._kind())
        return self.b.icmp_unsigned("!=", found, found.type(0)) if self.boolean else found

    def vector(self, index: ir.Value, width: int, there: int) -> ir.Value:
        """A vector from there on, so many of whose numbers may be read; the others are any."""
        from llvmlite import ir

        b, t = self.b, Types()
        if there == width:
            kind = ir.VectorType(self._kind(), width)
            found = b.load(self._place(index), typ=kind, align=1 if self.boolean else 4)
            return b.icmp_unsigned("!=", found, kind(None)) if self.boolean else found
        found = ir.VectorType(ir.IntType(1) if self.boolean else t.f32, width)(None)
        for i in range(there):
            found = b.insert_element(found, self.number(b.add(index, t.word(i))), t.i32(i))
        return found

    def store(self, index: ir.Value, value: ir.Value, there: int) -> None:
        """Writes so many numbers of a vector."""
        b, t = self.b, Types()
        if there == value.type.count:
            b.store(value, self._place(index), align=1 if self.boolean else 4)
            return
        for i in range(there):
            b.store(b.extract_element(value, t.i32(i)), self._place(b.add(index, t.word(i))))

    def _kind(self) -> ir.Type:
        return Types().i8 if self.boolean else Types().f32

    def _place(self, index: ir.Value) -> ir.Value:
        return self.b.gep(self.b.inttoptr(self.data, Types().pointer), [index], source_etype=self._kind())
