"""An operand of a product as codes, and what a product needs to know of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxcomp.core.types import DType
from jaxcomp.quantization.numerics.affine import dequantize

EXACT = 2**24
"""Integers below it are exact in float32, and so are their sums while they stay below."""


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale", "zero"], meta_fields=["reach"])
@dataclass(frozen=True)
class Factor:
    """One operand: ``value == (codes - zero) * scale``.

    Attributes:
      codes: int8, float8, or a float type that holds either, without a zero then.
      scale: float, of the codes' rank; each dimension divides the codes'.
      zero: int32, of the scale's shape or 1 where that says more, as which rows hold NaN; or None for 0.
      reach: the largest ``|codes - zero|``; 0 for float8, whose sums are floats.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    reach: int

    @property
    def sum_type(self) -> DType:
        """The type in which products of its codes are summed."""
        return jnp.dtype(jnp.int32) if self.codes.dtype == jnp.int8 else self.scale.dtype

    def value(self) -> jax.Array:
        """The array that the codes stand for, in the scale's type."""
        zero = self.zero if self.zero is None else jnp.broadcast_to(self.zero, self.scale.shape)
        return dequantize(self.codes, self.scale, zero if zero is None else zero.astype(self.scale.dtype))


def total(codes: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The sum over some axes, kept as 1; in float32 where that is exact, for on CPU only sums of floats are fast."""
    n = math.prod(codes.shape[i] for i in axes)
    exact = n * 128 <= EXACT
    return jnp.sum(codes.astype(jnp.float32 if exact else jnp.int32), axes, keepdims=True).astype(jnp.int32)
