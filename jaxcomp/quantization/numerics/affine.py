"""Quantizers: arrays in, codes and scales out. No tree is known here.

A scale has the rank of its array, and each of its dimensions divides the array's: one number serves a block. A
dimension of 1 is shared along the whole axis, a full one gives each index its own, and one in between makes groups.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num, Shaped

from jaxcomp.core.gradients import clip_through
from jaxcomp.core.types import DType
from jaxcomp.quantization.numerics.rounding import nearest


def blocked(x: Shaped[Array, "*shape"], blocks: tuple[int, ...]) -> Shaped[Array, "*split"]:
    """Splits each axis i of size n into ``(blocks[i], n // blocks[i])``.

    >>> blocked(jnp.zeros((4, 6)), (2, 6)).shape
    (2, 2, 6, 1)
    """
    return x.reshape([d for n, b in zip(x.shape, blocks, strict=True) for d in (b, n // b)])


def block_reduce(
    x: Num[Array, "*shape"], blocks: tuple[int, ...], reduce: Callable[..., jax.Array]
) -> Num[Array, "*blocks"]:
    """``reduce`` (such as ``jnp.max``) over each block; one number a block."""
    if blocks == x.shape:
        return x
    if not _cut(blocks, x.shape):
        axes = tuple(i for i, (b, n) in enumerate(zip(blocks, x.shape, strict=True)) if b == 1 and n != 1)
        return reduce(x, axis=axes, keepdims=True)
    # Only the axes that are reduced are split off: an axis of one element more would cost XLA its vector loop.
    split = [(b, n // b) if b < n else (b,) for b, n in zip(blocks, x.shape, strict=True)]
    ends = np.cumsum([len(part) for part in split])
    axes = tuple(int(end) - 1 for end, part in zip(ends, split, strict=True) if len(part) == 2)
    return reduce(x.reshape([d for part in split for d in part]), axis=axes).reshape(blocks)


def block_absmax(x: Float[Array, "*shape"], blocks: tuple[int, ...]) -> Float[Array, "*blocks"]:
    """The largest magnitude of each block.

    Where blocks cut an axis it is found from the extremes: XLA on CPU writes ``|x|`` out before it reduces a reshaped
    one, which makes this ten times slower.

    >>> block_absmax(jnp.array([1.0, -3.0, 2.0, 0.0]), (2,))
    Array([3., 2.], dtype=float32)
    """
    if not _cut(blocks, x.shape):
        return block_reduce(jnp.abs(x), blocks, jnp.max)
    return jnp.maximum(block_reduce(x, blocks, jnp.max), -block_reduce(x, blocks, jnp.min))


def _cut(blocks: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether an axis is cut into several blocks of several elements."""
    return any(b not in (1, n) for b, n in zip(blocks, shape, strict=True))


def spread(scale: Shaped[Array, "*blocks"], shape: tuple[int, ...]) -> Shaped[Array, "*spread"]:
    """A scale in a shape that broadcasts against ``shape``, each number over its block.

    >>> spread(jnp.array([[1.0], [2.0]]), (4, 3)).shape
    (4, 1)
    """
    if not _cut(scale.shape, shape):
        return scale
    wide = [d for b, n in zip(scale.shape, shape, strict=True) for d in (b, 1 if b == 1 else n // b)]
    out = [1 if b == 1 else n for b, n in zip(scale.shape, shape, strict=True)]
    narrow = [d for b in scale.shape for d in (b, 1)]
    return jnp.broadcast_to(scale.reshape(narrow), wide).reshape(out)


def scale_for(top: Float[Array, "*blocks"], number: int | float, *, least: float = 1.0) -> Float[Array, "*blocks"]:
    """``top / number``: the scale with which a number of a grid meets the end of a range.

    A normal number, at least ``least`` times the smallest; a block of zeros gets 1. An end that is infinite or NaN
    stays, so that its block is NaN on every grid, packed or not.

    >>> scale_for(jnp.array([6.0, 0.0, jnp.nan]), 4)
    Array([1.5, 1. , nan], dtype=float32)
    """
    return _normal(top * (1.0 / number), top, least)


def _normal(scale: jax.Array, end: jax.Array, least: float = 1.0) -> jax.Array:
    """The scale of a range that reaches to ``end`` on either side, between the ends of the normal numbers."""
    info = jnp.finfo(scale.dtype)
    bounded = jnp.clip(scale, float(info.tiny) * max(least, 1.0), float(info.max))
    scale = jnp.where(end < jnp.inf, bounded, end)
    return jnp.where(end < float(info.tiny), jnp.ones_like(scale), scale)


def no_weights(w: Float[Array, "*shape"], blocks: tuple[int, ...]) -> Bool[Array, "*blocks"]:
    """Which blocks hold zeros alone; subnormal numbers count as zeros, as XLA on CPU reads them."""
    return block_absmax(w, blocks) < float(jnp.finfo(w.dtype).tiny)


def in_steps(w: Float[Array, "*shape"], scale: Float[Array, "*blocks"]) -> Float[Array, "*shape"]:
    """``w / scale`` in the scale's type, each number over its block.

    By the reciprocal: XLA rewrites a division so where it sees that the divisor is broadcast, in jit only.

    >>> in_steps(jnp.array([1.0, 3.0, 3e38]), jnp.array([2.0, 2.0, 1.5e38]))
    Array([0.5, 1.5, 2. ], dtype=float32)
    """
    return by_factors(w, *factors_of(scale))


def factors_of(scale: Float[Array, "*blocks"]) -> tuple[Float[Array, "*blocks"], Float[Array, "*blocks"]]:
    """Two factors, in this order, for a division by ``scale``; most often the first is 1.

    The reciprocal of a scale near the type's end would be subnormal, which XLA on CPU reads as 0: what is divided and
    what it is divided by are both made smaller before.
    """
    less = jnp.where(scale > 2.0**64, jnp.full_like(scale, 2.0**-64), jnp.ones_like(scale))
    return less, 1.0 / (scale * less)


def by_factors(
    w: Float[Array, "*shape"], less: Float[Array, "*blocks"], reciprocal: Float[Array, "*blocks"]
) -> Float[Array, "*shape"]:
    """``w`` times the two :func:`factors_of` a scale, in their type, each number over its block."""
    return w.astype(less.dtype) * spread(less, w.shape) * spread(reciprocal, w.shape)


def affine_scale(
    top: Float[Array, "*blocks"], bottom: Float[Array, "*blocks"], high: int
) -> tuple[Float[Array, "*blocks"], Float[Array, "*blocks"]]:
    """Scale and zero point of codes in ``[0, high]`` for the range ``[bottom, top]``, widened to hold 0.

    Multiplications by constants, never divisions, and a clip between each product and a sum, which a compiler would
    fuse into one rounding: so jit equals eager. The zero point is rounded as codes are, a half towards zero: that of a
    range as wide on both sides is one.

    >>> affine_scale(jnp.array([2.0]), jnp.array([-1.0]), 3)
    (Array([1.], dtype=float32), Array([1.], dtype=float32))
    """
    step = 1.0 / high
    width = jnp.maximum(top * step, 0.0) - jnp.minimum(bottom * step, 0.0)
    scale = _normal(width, jnp.maximum(jnp.abs(top), jnp.abs(bottom)))
    return scale, jnp.clip(nearest(-jnp.minimum(bottom, 0.0) / scale), 0, high)


def dequantize(
    codes: Num[Array, "*shape"], scale: Float[Array, "*blocks"], zero_point: Float[Array, "*blocks"] | None = None
) -> Float[Array, "*shape"]:
    """``(codes - zero_point) * scale``.

    The factors are rounded once each, in this order, in the scale's type: what training computes from float codes and
    what a reader computes from packed ones are the same bits.
    """
    x = codes.astype(scale.dtype)
    if zero_point is not None:
        x = x - spread(zero_point, codes.shape)
    return x * spread(scale, codes.shape)


def in_type(x: Float[Array, "*shape"], scale: Float[Array, "*blocks"], dtype: DType) -> Float[Array, "*shape"]:
    """Dequantized values in the dense type; a number times a finite scale is finite: at most the type's largest.

    The end of a grid may lie beyond the range that its scale is of, and so beyond the type. The gradient passes.

    >>> in_type(jnp.array([-7e4, 1.0]), jnp.array([3.5e4]), jnp.dtype("float16"))
    Array([-6.55e+04,  1.00e+00], dtype=float16)
    """
    most = min(float(jnp.finfo(x.dtype).max), float(jnp.finfo(dtype).max))
    if most == float(jnp.finfo(scale.dtype).max):
        end = jnp.maximum(scale, most)  # as below, in less program
    else:
        end = jnp.where(scale < jnp.inf, jnp.full_like(scale, most), jnp.full_like(scale, jnp.inf))
    return clip_through(x, spread(end, x.shape)).astype(dtype)
