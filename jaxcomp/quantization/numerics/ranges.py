"""Ranges of blocks: largest and mean magnitudes, percentiles, least squared error. Arrays in, arrays out.

A range is its two ends, each a number a block; a bottom of None means ``-top``. A mask (True is kept) tells what
counts. No gradient flows into a range.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcomp.quantization.numerics.affine import block_absmax, block_reduce, blocked, spread

Ends = tuple[jax.Array, jax.Array | None]


def absmax_range(x: Float[Array, "*shape"], blocks: tuple[int, ...], symmetric: bool) -> Ends:
    """``[-max|x|, max|x|]``, or the extremes."""
    if symmetric:
        return block_absmax(x, blocks), None
    return block_reduce(x, blocks, jnp.max), block_reduce(x, blocks, jnp.min)


def mean_range(x: Float[Array, "*shape"], blocks: tuple[int, ...], mask: Bool[Array, "*shape"] | None) -> Ends:
    """``mean|x|`` over what counts, and the sums are exact enough: pairwise by XLA, in the type of x."""
    if mask is None:
        return block_reduce(jnp.abs(x), blocks, jnp.mean), None
    kept = jnp.where(mask, jnp.abs(x), jnp.zeros_like(x))
    count = block_reduce(mask.astype(x.dtype), blocks, jnp.sum)
    return block_reduce(kept, blocks, jnp.sum) / jnp.maximum(count, 1.0), None


def percentile_range(
    x: Float[Array, "*shape"],
    blocks: tuple[int, ...],
    mask: Bool[Array, "*shape"] | None,
    *,
    percent: float,
    symmetric: bool,
) -> Ends:
    """The ``percent`` nearest-rank percentile of the magnitudes, or of the values and of their negatives."""
    if symmetric:
        return _percentile(jnp.abs(x), blocks, mask, percent), None
    return _percentile(x, blocks, mask, percent), -_percentile(-x, blocks, mask, percent)


def _percentile(x: jax.Array, blocks: tuple[int, ...], mask: jax.Array | None, percent: float) -> jax.Array:
    """The smallest of each block's numbers that at least so many percent of them do not exceed; 0 of none."""
    lowest = jnp.asarray(-jnp.inf, x.dtype)
    rows = _rows(x if mask is None else jnp.where(mask, x, lowest), blocks)
    size = rows.shape[-1]
    ordered = jnp.sort(rows, axis=-1)
    if mask is None:
        return ordered[..., math.ceil(size * percent / 100 - 1e-9) - 1].reshape(blocks)
    count = jnp.sum(_rows(mask, blocks), axis=-1, dtype=jnp.int32, keepdims=True)
    rank = jnp.ceil(count.astype(jnp.float32) * jnp.float32(percent / 100)).astype(jnp.int32)
    at = size - count + jnp.clip(rank, 1, jnp.maximum(count, 1)) - 1
    found = jnp.take_along_axis(ordered, jnp.minimum(at, size - 1), axis=-1).reshape(blocks)
    return jnp.where(count.reshape(blocks) > 0, found, jnp.zeros_like(found))


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

    def scaled(ratio: jax.Array) -> Ends:
        return top * ratio, None if bottom is None else bottom * ratio

    def body(best: tuple[jax.Array, jax.Array], ratio: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        least, chosen = best
        # Over the range, so that no square overflows.
        unit = spread(1.0 / jnp.where(widest > 0, widest, jnp.ones_like(widest)), x.shape)
        error = block_reduce(jnp.square((coded(*scaled(ratio)) - x) * unit), blocks, jnp.sum)
        better = error < least
        return (jnp.where(better, error, least), jnp.where(better, ratio, chosen)), None

    widest = top if bottom is None else jnp.maximum(jnp.abs(top), jnp.abs(bottom))
    start = (jnp.full_like(widest, jnp.inf), jnp.ones_like(widest))
    # A loop is compiled as one whole in jit and out of it, so that both find the same range.
    (_, chosen), _ = jax.lax.scan(body, start, jnp.asarray(ratios, x.dtype))
    return scaled(chosen)
