"""What goes over the wire for one array: messages of a code an element, and of a rotated array."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxcomp.core.leaves import dense
from jaxcomp.core.packed import Packed, compressed_leaf
from jaxcomp.core.types import DType, Leaf
from jaxcomp.federated.arrays import pack_wide, unpack_wide, unrotated, weighted_mean, width_of
from jaxcomp.federated.messages import MessageLeaf, agreed, combined_leaf, poisoned

_MOST = 2**30  # a sum of codes is doubled in int32


@compressed_leaf(meta=("vote", "dense_shape", "dense_dtype"))
class Signs(MessageLeaf):
    """``dense == scale`` where the bit is set, ``-scale`` elsewhere.

    Fields:
      bits: a bit an element.
      scale: a scalar, in float32 or float64.
      vote: whether messages are combined by majority. Static, as are dense_shape, dense_dtype.
    """

    bits: Packed
    scale: jax.Array
    vote: bool
    dense_shape: tuple[int, ...]
    dense_dtype: DType

    made_by: ClassVar[str] = "sign"

    def materialize(self) -> jax.Array:
        """The scale with the signs."""
        return jnp.where(self.bits.unpack(), self.scale, -self.scale).astype(self.dense_dtype)

    def combined(self, weights: jax.Array | None) -> Leaf:
        """The mean, a dense array; or with ``vote`` the sign of the majority and the mean scale, as :class:`Votes`."""
        if not self.vote:
            return super().combined(weights)
        signs = jax.vmap(lambda m: jnp.where(m.bits.unpack(), jnp.int8(1), jnp.int8(-1)))(self)
        if weights is None:
            total: jax.Array = jnp.sum(signs, 0, dtype=jnp.int32)
        else:
            total = weighted_mean(signs.astype(jnp.float32), weights)
        ballot = Packed.of(jnp.sign(total), 2, -1)
        return Votes(ballot, weighted_mean(self.scale, weights), self.dense_shape, self.dense_dtype)


@compressed_leaf(meta=("dense_shape", "dense_dtype"))
class Votes(MessageLeaf):
    """``dense == ballot * scale``, the ballot -1, 1, or 0 for a tie.

    Fields:
      ballot: two bits an element.
      scale: a scalar.
    """

    ballot: Packed
    scale: jax.Array
    dense_shape: tuple[int, ...]
    dense_dtype: DType

    made_by: ClassVar[str] = "sign"

    def materialize(self) -> jax.Array:
        """The scale with the signs, 0 at ties."""
        return (self.ballot.unpack().astype(self.scale.dtype) * self.scale).astype(self.dense_dtype)


@compressed_leaf(meta=("bits", "parts", "common", "dense_shape", "dense_dtype"))
class Uniform(MessageLeaf):
    """``dense == (2 codes - parts (2**bits - 1)) * half_step / parts``: one message, or the sum of ``parts`` of them.

    Fields:
      codes: uint8, integers in ``[0, parts (2**bits - 1)]`` packed in as few bits as hold them.
      half_step: a scalar, in float32 or float64.
      bits, parts: static.
      common: whether all messages of a round have the same half step. Static, as are dense_shape, dense_dtype.
    """

    codes: jax.Array
    half_step: jax.Array
    bits: int
    parts: int
    common: bool
    dense_shape: tuple[int, ...]
    dense_dtype: DType

    made_by: ClassVar[str] = "uniform"

    def integers(self) -> jax.Array:
        """The codes as uint32, flat."""
        return unpack_wide(self.codes, width_of(self.parts * (2**self.bits - 1)), self.size)

    def materialize(self) -> jax.Array:
        """Centers the codes and multiplies."""
        centered = 2 * self.integers().astype(jnp.int32) - self.parts * (2**self.bits - 1)
        step = self.half_step * (1 / self.parts)
        return (centered.astype(step.dtype) * step).astype(self.dense_dtype).reshape(self.dense_shape)

    def combined(self, weights: jax.Array | None) -> Leaf:
        """With a common half step and no weights the sum of the codes, in integers; else the mean, a dense array."""
        if not self.common or weights is not None:
            return super().combined(weights)
        step, one = agreed(self.half_step, "half steps", "give uniform the same limit=, or an axis_name=.")
        parts = self.half_step.shape[0] * self.parts
        if parts * (2**self.bits - 1) > _MOST:
            raise ValueError(
                f"combine: the codes of {parts} messages of {self.bits} bits sum to more than {_MOST}; combine fewer,"
                " and average what they decode to."
            )
        total = jnp.sum(jax.vmap(Uniform.integers)(self), 0, dtype=jnp.uint32)
        codes = pack_wide(total, width_of(parts * (2**self.bits - 1)))
        return replace(self, codes=codes, half_step=step * one.astype(step.dtype), parts=parts)


@compressed_leaf(meta=("block", "dense_shape", "dense_dtype"))
class Rotated(MessageLeaf):
    """``dense == D H inner``: a message about the rotated array.

    Fields:
      inner: an array or a message leaf, of one axis.
      seed: uint32 scalar, of the random signs.
      block: length of the Hadamard transform. Static, as are dense_shape, dense_dtype.
    """

    inner: Leaf
    seed: jax.Array
    block: int
    dense_shape: tuple[int, ...]
    dense_dtype: DType

    made_by: ClassVar[str] = "rotate"

    def materialize(self) -> jax.Array:
        """Decodes, then turns back."""
        return (
            unrotated(dense(self.inner), self.seed, self.block, self.size)
            .astype(self.dense_dtype)
            .reshape(self.dense_shape)
        )

    def combined(self, weights: jax.Array | None) -> Rotated:
        """Combines what is inside: a rotation is linear."""
        seed, one = agreed(self.seed, "rotations", "give encode the round's key as shared=, the same to all.")
        inner = combined_leaf(self.inner, weights)
        return replace(self, inner=poisoned(inner, one), seed=seed)
