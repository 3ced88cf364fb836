"""What goes over the wire for one array: the base, and messages that leave elements or directions out."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.bits import compute_dtype, packed_size
from jaxcomp.core.leaves import CompressedLeaf, dense
from jaxcomp.core.packed import Packed, compressed_leaf
from jaxcomp.core.types import DType, Leaf, PyTree
from jaxcomp.federated.arrays import drawn, pack_wide, unpack_wide, weighted_mean, width_of


class MessageLeaf(CompressedLeaf):
    """A compressed leaf whose fields are the very bytes that are sent, and that can be averaged with its like."""

    dense_shape: tuple[int, ...]
    dense_dtype: DType

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.dense_shape

    @property
    def dtype(self) -> DType:  # noqa: D102
        return self.dense_dtype

    def pack(self) -> MessageLeaf:
        """The leaf itself."""
        return self

    def combined(self, weights: jax.Array | None) -> Leaf:
        """Of n stacked messages (each field with an axis in front), one whose dense array is the mean of theirs.

        Args:
          weights: float32 of shape (n,) with sum 1, or None for the plain mean.
        """
        return weighted_mean(jax.vmap(dense)(self), weights)


def agreed(stacked: jax.Array, what: str, mend: str) -> tuple[jax.Array, jax.Array]:
    """The value that n messages share, and a factor: 1, or NaN where (inside jit) they turn out not to share it.

    Raises:
      ValueError: they are concrete, and differ.
    """
    same = jnp.all(stacked == stacked[0])
    if not isinstance(same, jax.core.Tracer) and not bool(same):
        raise ValueError(f"combine: the messages were made with different {what}; {mend}")
    return stacked[0], jnp.where(same, jnp.float32(1), jnp.float32(jnp.nan))


@compressed_leaf(meta=("count", "bitmap", "dense_shape", "dense_dtype"))
class Sparse(MessageLeaf):
    """``dense.flat[places[i]] += values[i]``, zero elsewhere.

    Fields:
      values: (count,), in the dense type.
      places: uint8; the places as a bitmap of the dense size (rising, each once), or as integers of
        ``ceil(log2(size))`` bits.
      count, bitmap, dense_shape, dense_dtype: static.
    """

    values: jax.Array
    places: jax.Array
    count: int
    bitmap: bool
    dense_shape: tuple[int, ...]
    dense_dtype: DType

    made_by: ClassVar[str] = "topk"

    @staticmethod
    def of(x: jax.Array, places: jax.Array) -> Sparse:
        """The values of ``x`` at rising ``places``; the smaller encoding of those."""
        count, bits = places.size, width_of(x.size - 1)
        bitmap = packed_size(x.size, 1) < packed_size(count, bits)
        if bitmap:
            stream = Packed.of(jnp.zeros(x.size, bool).at[places].set(True), 1, 0).data
        else:
            stream = pack_wide(places, bits)
        return Sparse(x.reshape(-1)[places], stream, count, bitmap, tuple(x.shape), jnp.dtype(x.dtype))

    def positions(self) -> jax.Array:
        """The places as int32."""
        if self.bitmap:
            mask = Packed(self.places, 1, 0, (self.size,)).unpack()
            return jnp.nonzero(mask, size=self.count)[0].astype(jnp.int32)
        return unpack_wide(self.places, width_of(self.size - 1), self.count).astype(jnp.int32)

    def materialize(self) -> jax.Array:
        """Adds the values up at their places."""
        wide = compute_dtype(self.dense_dtype)  # a joined list may name a place many times
        flat = jnp.zeros(self.size, wide).at[self.positions()].add(self.values.astype(wide))
        return flat.astype(self.dense_dtype).reshape(self.dense_shape)

    def combined(self, weights: jax.Array | None) -> Leaf:
        """The lists one after the other, n * count long, the values weighted; the dense mean where that is smaller."""
        n, bits = self.values.shape[0], width_of(self.size - 1)
        if packed_size(n * self.count, bits + 8 * self.values.dtype.itemsize) >= self.size * self.values.dtype.itemsize:
            return super().combined(weights)
        share = jnp.full(n, 1 / n, jnp.float32) if weights is None else weights
        wide = self.values.astype(compute_dtype(self.dense_dtype))
        values = (wide * share.astype(wide.dtype)[:, None]).astype(self.dense_dtype).reshape(-1)
        places = jax.vmap(Sparse.positions)(self).reshape(-1)
        stream = pack_wide(places, bits)
        return Sparse(values, stream, places.size, False, self.dense_shape, self.dense_dtype)


@compressed_leaf(meta=("gain", "dense_shape", "dense_dtype"))
class Drawn(MessageLeaf):
    """``dense.flat[drawn(seed)[i]] == gain * values[i]``, zero elsewhere; the places are drawn again, not sent.

    Fields:
      values: (count,), in the dense type.
      seed: uint32 scalar.
      gain, dense_shape, dense_dtype: static.
    """

    values: jax.Array
    seed: jax.Array
    gain: float
    dense_shape: tuple[int, ...]
    dense_dtype: DType

    made_by: ClassVar[str] = "randomk"

    def materialize(self) -> jax.Array:
        """Draws the places again and puts the values there."""
        places = drawn(self.seed, self.size, self.values.size)
        flat = jnp.zeros(self.size, self.dense_dtype).at[places].set(self.values * self.gain)
        return flat.reshape(self.dense_shape)

    def combined(self, weights: jax.Array | None) -> Drawn:
        """The mean of the values: as small as one message."""
        seed, one = agreed(self.seed, "random places", "give encode the round's key as shared=, the same to all.")
        return replace(self, values=weighted_mean(self.values, weights) * one.astype(self.dense_dtype), seed=seed)


@compressed_leaf(meta=("dense_shape", "dense_dtype"))
class Factors(MessageLeaf):
    """``dense == (p @ q.T).reshape(dense_shape)``.

    Fields:
      p: (rows, rank), rows the product of all axes but the last.
      q: (columns, rank).
    """

    p: jax.Array
    q: jax.Array
    dense_shape: tuple[int, ...]
    dense_dtype: DType

    made_by: ClassVar[str] = "powersgd"

    def materialize(self) -> jax.Array:
        """The product, in float32 at least."""
        wide = compute_dtype(self.p.dtype)
        product = jnp.matmul(self.p.astype(wide), self.q.astype(wide).T, precision=jax.lax.Precision.HIGHEST)
        return product.astype(self.dense_dtype).reshape(self.dense_shape)

    def combined(self, weights: jax.Array | None) -> Leaf:
        """The factors side by side, n times the rank; the dense mean where that is smaller."""
        n, rows, rank = self.p.shape
        columns = self.q.shape[1]
        if n * rank * (rows + columns) >= rows * columns:
            return super().combined(weights)
        share = jnp.full(n, 1 / n, jnp.float32) if weights is None else weights
        wide = compute_dtype(self.p.dtype)
        q = (self.q.astype(wide) * share.astype(wide)[:, None, None]).astype(self.q.dtype)
        p, q = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], n * rank) for x in (self.p, q))
        return replace(self, p=p, q=q)


def poisoned(message: PyTree, one: jax.Array) -> PyTree:
    """The message with its floating fields times a factor that is 1 or NaN; every message leaf has such a field."""
    return jax.tree.map(lambda x: x * one.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, message)


def combined_leaf(stacked: Leaf, weights: jax.Array | None) -> Leaf:
    """One leaf of n stacked messages, an array or a message leaf, as one that stands for their mean."""
    return stacked.combined(weights) if isinstance(stacked, MessageLeaf) else weighted_mean(stacked, weights)


def array_bits(x: Leaf) -> int:
    """Bits of an array, or of the shape of one."""
    return 8 * int(np.prod(x.shape, dtype=np.int64)) * jnp.dtype(x.dtype).itemsize
