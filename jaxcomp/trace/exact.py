"""Counts and sums that no number of batches stops or blurs: two words each, for JAX has no wider numbers by default."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.types import Shape


class Count(NamedTuple):
    """``low + 2**32 * high``, exact up to ``2**64``; float32 would stop at ``2**24``, int32 at ``2**31``.

    >>> counted(jnp.uint32(2**32 - 1)).plus(counted(jnp.uint32(3))).total().item()
    4294967298
    """

    low: jax.Array
    high: jax.Array

    def plus(self, other: Count) -> Count:
        """The sum; the same in any order."""
        low = self.low + other.low
        return Count(low, self.high + other.high + (low < self.low).astype(jnp.uint32))

    def total(self) -> np.ndarray:
        """The counts as numbers of 64 bits, on the host."""
        return joined(np.asarray(self.low), np.asarray(self.high))

    def rounded(self) -> jax.Array:
        """The nearest float32, or one beside it."""
        return self.high.astype(jnp.float32) * jnp.float32(2**32) + self.low.astype(jnp.float32)

    @property
    def shape(self) -> Shape:
        """The shape of the counts."""
        return self.low.shape


def joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The two words of counts as numbers of 64 bits."""
    return low.astype(np.uint64) + (high.astype(np.uint64) << np.uint64(32))


def counted(n: jax.Array) -> Count:
    """A count of one word."""
    low = jnp.asarray(n, jnp.uint32)
    return Count(low, jnp.zeros_like(low))


class Sum(NamedTuple):
    """``value + rest``: a sum of float32 numbers with about 48 bits; ``rest`` is what the rounding of ``value`` lost.

    >>> total = summed(jnp.float32(2**24))
    >>> for _ in range(4):
    ...     total = total.plus(summed(jnp.float32(1)))
    >>> int(total.rounded()) - 2**24
    4

    Source: Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
    """

    value: jax.Array
    rest: jax.Array

    def plus(self, other: Sum) -> Sum:
        """The sum; the same in any order, to about 48 bits."""
        value = self.value + other.value
        part = value - self.value
        lost = (self.value - (value - part)) + (other.value - part)
        rest = lost + (self.rest + other.rest)
        whole = value + rest
        return Sum(whole, rest - (whole - value))

    def rounded(self) -> jax.Array:
        """The nearest number of the type."""
        return self.value + self.rest


def summed(x: jax.Array) -> Sum:
    """A sum of one number."""
    return Sum(x, jnp.zeros_like(x))


class Squares(NamedTuple):
    """A sum of squares, ``total * unit**2`` with ``unit`` a power of two near the largest magnitude: none overflows.

    >>> norm = squared(jnp.array([[3e30], [-4e30]]), axis=0).plus(squared(jnp.zeros((1, 1)), axis=0)).root()
    >>> bool(jnp.isclose(norm[0], 5e30))
    True
    """

    unit: jax.Array
    total: Sum

    def plus(self, other: Squares) -> Squares:
        """The sum; the same in any order, to about 48 bits."""
        unit = jnp.maximum(self.unit, other.unit)
        own, others = (s._in(unit) for s in (self, other))
        return Squares(unit, own.plus(others))

    def _in(self, unit: jax.Array) -> Sum:
        """The sum in another unit: exact, or too small to count."""
        ratio = jnp.where(unit > 0, self.unit / jnp.where(unit > 0, unit, jnp.ones_like(unit)), jnp.zeros_like(unit))
        return Sum(*(part * ratio * ratio for part in self.total))

    def root(self) -> jax.Array:
        """The root of the sum."""
        return jnp.sqrt(self.total.rounded()) * self.unit


def squared(x: jax.Array, axis: int | tuple[int, ...]) -> Squares:
    """The sum of squares along some axes."""
    unit = _unit(jnp.max(jnp.abs(x), axis=axis, initial=0))
    return Squares(unit, summed(jnp.sum(jnp.square(x / jnp.expand_dims(unit, axis)), axis=axis)))


def squared_by_group(rows: jax.Array, group: jax.Array, groups: int) -> Squares:
    """The sum of squares of each column over the rows of each group; a row of no group counts nowhere.

    >>> squared_by_group(jnp.array([[3.0], [5.0], [4.0]]), jnp.array([0, 1, 0]), 2).root()
    Array([[5.],
           [5.]], dtype=float32)
    """
    unit = _unit(jnp.maximum(jax.ops.segment_max(jnp.abs(rows), group, groups), 0))
    return Squares(unit, summed(jax.ops.segment_sum(jnp.square(rows / unit[group]), group, groups)))


def _unit(largest: jax.Array) -> jax.Array:
    """A power of two near the largest magnitude, with a reciprocal that is no subnormal number."""
    _, exponent = jnp.frexp(largest)
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(exponent, -126, 126))
