"""Ranges of blocks: largest and mean magnitudes, percentiles, least squared error. Arrays in, arrays out.

A range is its two ends, each a number a block; a bottom of None means ``-top``. A mask (True is kept) tells what
counts. No gradient flows into a range.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from jaxcomp.quantization.numerics.affine import block_absmax, block_reduce, blocked, in_steps, scale_for, spread

Ends = tuple[jax.Array, jax.Array | None]


def absmax_range(x: Float[Array, "*shape"], blocks: tuple[int, ...], symmetric: bool) -> Ends:
    """``[-max|x|, max|x|]``, or the extremes."""
    if symmetric:
        return block_absmax(x, blocks), None
    return block_reduce(x, blocks, jnp.max), block_reduce(x, blocks, jnp.min)


def mean_range(x: Float[Array, "*shape"], blocks: tuple[int, ...], mask: Bool[Array, "*shape"] | None) -> Ends:
    """``mean|x|`` over what counts; 0 of nothing. Near the type's end a sum would be infinite: it is of less there."""
    large = block_absmax(x, blocks) > 2.0**64
    less = jnp.where(large, 2.0**-64, 1.0).astype(x.dtype)
    more = jnp.where(large, 2.0**64, 1.0).astype(x.dtype)
    sums = block_reduce(jnp.abs(x) * spread(less, x.shape), blocks, jnp.sum)
    if mask is None:
        return sums * (1.0 / max(x.size // max(sums.size, 1), 1)) * more, None
    counts = block_reduce(mask.astype(jnp.int32), blocks, jnp.sum)
    return sums / jnp.maximum(counts, 1).astype(x.dtype) * more, None


def percentile_range(x: Float[Array, "*shape"], blocks: tuple[int, ...], *, percent: float, symmetric: bool) -> Ends:
    """The ``percent`` nearest-rank percentile of the magnitudes, or of the values and of their negatives.

    Zeros do not count: they are on the grid whatever its range, and where most weights are zeros the range would be 0.
    """
    if symmetric:
        return _percentile(jnp.abs(x), blocks, percent), None
    return _percentile(x, blocks, percent), -_percentile(-x, blocks, percent)


def _percentile(x: jax.Array, blocks: tuple[int, ...], percent: float) -> jax.Array:
    """The smallest of each block's numbers but 0 that at least so many percent of them do not exceed; 0 of none."""
    rows = _rows(jnp.where(x == 0, jnp.full_like(x, -jnp.inf), x), blocks)
    count = jnp.sum(_rows(x != 0, blocks), axis=-1, dtype=jnp.int32, keepdims=True)
    at = rows.shape[-1] - 1 - beyond(count, percent)
    found = jnp.take_along_axis(jnp.sort(rows, axis=-1), at, axis=-1).reshape(blocks)
    return jnp.where(count.reshape(blocks) > 0, found, jnp.zeros_like(found))


def beyond(count: Int32[Array, "*blocks"], percent: float) -> Int32[Array, "*blocks"]:
    """How many of ``count`` numbers may exceed their percentile, ``floor(count * (1 - percent / 100))``, exactly.

    In integers, for floats count to 2**24 alone, and bit by bit of the fraction, so that no product overflows. A
    percentage is the decimal fraction that it is written as, up to seven digits behind its point.

    >>> beyond(jnp.array([1000, 999, 2**31 - 1]), 99.9)
    Array([      1,       0, 2147483], dtype=int32)
    """
    part = (1 - Fraction(str(percent)) / 100).limit_denominator(2**30 - 1)
    whole, rest = jnp.divmod(count.astype(jnp.uint32), np.uint32(part.denominator))
    quotient = left = jnp.zeros_like(rest)
    for bit in f"{part.numerator:b}":
        left = 2 * left + rest * int(bit)
        quotient, left = 2 * quotient + left // part.denominator, left % part.denominator
    return (whole * np.uint32(part.numerator) + quotient).astype(jnp.int32)


def _rows(x: jax.Array, blocks: tuple[int, ...]) -> jax.Array:
    """A block a row: ``(*blocks, elements of a block)``."""
    split = blocked(x, blocks)
    order = (*range(0, split.ndim, 2), *range(1, split.ndim, 2))
    return split.transpose(order).reshape(*blocks, -1)


def mse_range(
    x: Float[Array, "*shape"],
    blocks: tuple[int, ...],
    ends: Ends,
    ratios: np.ndarray,
    coded: Callable[[jax.Array, jax.Array | None], jax.Array],
) -> Ends:
    """Of the ranges ``ratio * ends``, for each block the one of least squared error; the largest of equals.

    Args:
      x: the values.
      blocks: the scale's shape.
      ends: the widest range.
      ratios: descending from 1.
      coded: ``coded(top, bottom)``, the values on the grid of that range.
    """
    top, bottom = ends
    widest = top if bottom is None else jnp.maximum(jnp.abs(top), jnp.abs(bottom))
    unit = scale_for(widest, 1.0)  # errors are counted in it, so that no square overflows

    def scaled(ratio: jax.Array) -> Ends:
        return top * ratio, None if bottom is None else bottom * ratio

    def body(best: tuple[jax.Array, jax.Array], ratio: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        least, chosen = best
        error = block_reduce(jnp.square(in_steps(coded(*scaled(ratio)) - x, unit)), blocks, jnp.sum)
        better = error < least * (1 - 2.0**-14)  # equal but for rounding errors is equal
        return (jnp.where(better, error, least), jnp.where(better, ratio, chosen)), None

    start = (jnp.full_like(widest, jnp.inf), jnp.ones_like(widest))
    # A loop is compiled as one whole in jit and out of it, so that both find the same range.
    (_, chosen), _ = jax.lax.scan(body, start, jnp.asarray(ratios, x.dtype))
    return scaled(chosen)
