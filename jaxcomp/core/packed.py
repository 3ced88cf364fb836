"""Frozen pytree dataclasses, and the one that every packed leaf holds: integers of a few bits in a byte stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.bits import in_host_memory, pack_bits, pack_bits_on_host, put_beside, spread_out, unpack_bits
from jaxcomp.core.types import DType, Shape
from jaxcomp.core.words import on_hand, shape_words

Cls = TypeVar("Cls", bound=type)


@dataclass_transform(frozen_default=True, eq_default=False)
def compressed_leaf(*, meta: tuple[str, ...] = ()) -> Callable[[Cls], Cls]:
    """Class decorator: a frozen dataclass registered as a pytree, with the ``meta`` fields static.

    Args:
      meta: names of the fields that are static: hashable, compared by value, no arrays.

    >>> from jaxcomp.core.leaves import CompressedLeaf
    >>> @compressed_leaf(meta=("times",))
    ... class Scaled(CompressedLeaf):
    ...     "``dense == values * times``."
    ...
    ...     values: jax.Array
    ...     times: float
    ...
    ...     def materialize(self):
    ...         return self.values * self.times
    ...
    ...     pack = lambda self: self
    ...     shape = property(lambda self: self.values.shape)
    ...     dtype = property(lambda self: self.values.dtype)
    >>> jax.tree.map(lambda x: x + 1, Scaled(jnp.zeros(2), 3.0)).materialize()
    Array([3., 3.], dtype=float32)
    """

    def decorate(cls: Any) -> Any:
        cls = dataclass(frozen=True, eq=False, repr=False)(cls)
        data = [f.name for f in fields(cls) if f.name not in meta]
        cls.data_fields, cls.meta_fields = tuple(data), meta
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(meta))

    return decorate


@compressed_leaf(meta=("bits", "low", "shape"))
class Packed:
    """Integers of ``bits`` bits in a byte stream: ``value == stream code + low``; one bit and low 0 is a boolean.

    Fields:
      data: uint8 of ``ceil(size * bits / 8)`` bytes, the low bits first, C order.
      bits, low, shape: static.
    """

    data: jax.Array
    bits: int
    low: int
    shape: Shape

    @staticmethod
    def of(values: jax.Array, bits: int, low: int) -> Packed:
        """Packs integers in ``[low, low + 2**bits)``, held in any type."""
        host = in_host_memory(values)
        if host is not None:
            return Packed(put_beside(pack_bits_on_host(host, bits, low), values), bits, low, tuple(values.shape))
        return Packed(_stream_of(values, bits, low), bits, low, tuple(values.shape))

    def __repr__(self) -> str:
        return f"<Packed, {self.bits} bits, {shape_words(self.shape)}>"

    def on_host(self) -> np.ndarray | None:
        """The integers, by numpy, where they are few and known here; else None."""
        data, count = on_hand(self.data), int(np.prod(self.shape, dtype=np.int64))
        if data is None:
            return None
        return (spread_out(data, self.bits, count).astype(np.int16) + self.low).reshape(self.shape)

    def unpack(self) -> jax.Array:
        """The integers as int8 or uint8, or the booleans."""
        if self.bits == 1:
            return self._stream(jnp.uint8).astype(bool)
        return self.wide().astype(jnp.int8 if self.low < 0 else jnp.uint8)

    def wide(self) -> jax.Array:
        """The integers as int32, for arithmetic: each narrower type on the way to a float is one more conversion."""
        return self._stream(jnp.int32) + self.low

    def _stream(self, dtype: DType) -> jax.Array:
        return unpack_bits(self.data, self.bits, math.prod(self.shape), dtype).reshape(self.shape)


# One program an array where nobody else compiles one; inside jit it is inlined.
@partial(jax.jit, static_argnums=(1, 2), inline=True)
def _stream_of(values: jax.Array, bits: int, low: int) -> jax.Array:
    return pack_bits((values.astype(jnp.int32) - low).astype(jnp.uint8), bits)


def unpacked(x: jax.Array | Packed) -> jax.Array:
    """``x``, unpacked if it is :class:`Packed`."""
    return x.unpack() if isinstance(x, Packed) else x
