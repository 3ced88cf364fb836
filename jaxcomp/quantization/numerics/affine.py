"""Quantizers: arrays in, codes and scales out. No tree is known here.

A scale has the rank of its array, and each of its dimensions divides the array's: one number serves a block. A
dimension of 1 is shared along the whole axis, a full one gives each index its own, and one in between makes groups.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, Shaped

from jaxcomp.core.bits import compute_dtype
from jaxcomp.quantization.grids import Companded, Compander, Int
from jaxcomp.quantization.numerics.rounding import round_ste

Rounded = Callable[[jax.Array, int, int], jax.Array]
"""``rounded(x, low, high)``: integers in the range, with a gradient."""


def blocked(x: Shaped[Array, "*shape"], blocks: tuple[int, ...]) -> Shaped[Array, "*split"]:
    """Splits each axis i of size n into ``(blocks[i], n // blocks[i])``.

    >>> blocked(jnp.zeros((4, 6)), (2, 6)).shape
    (2, 2, 6, 1)
    """
    return x.reshape([d for n, b in zip(x.shape, blocks, strict=True) for d in (b, n // b)])


def block_reduce(
    x: Float[Array, "*shape"], blocks: tuple[int, ...], reduce: Callable[..., jax.Array]
) -> Float[Array, "*blocks"]:
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


def spread(scale: Float[Array, "*blocks"], shape: tuple[int, ...]) -> Float[Array, "*spread"]:
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


def positive(scale: Float[Array, "*blocks"], least: float = 1.0) -> Float[Array, "*blocks"]:
    """At least ``least`` times the smallest normal number; a block of zeros gets 1: its codes are 0, its values too.

    NaN stays NaN, so that a block with NaN is NaN on every grid, packed or not.
    """
    floor = float(jnp.finfo(scale.dtype).tiny) * least
    return jnp.where(scale <= 0, jnp.ones_like(scale), jnp.maximum(scale, floor))


def int_scale(
    w: Float[Array, "*shape"], spec: Int, blocks: tuple[int, ...]
) -> tuple[Float[Array, "*blocks"], Float[Array, "*blocks"]]:
    """Scale and zero point of each block, from the largest magnitude (symmetric) or the extremes (asymmetric).

    No gradient flows into either.
    """
    x = jax.lax.stop_gradient(w).astype(compute_dtype(w.dtype))
    if spec.symmetric:
        return int_scale_of(block_absmax(x, blocks), None, spec)
    return int_scale_of(block_reduce(x, blocks, jnp.max), block_reduce(x, blocks, jnp.min), spec)


def int_scale_of(
    top: Float[Array, "*blocks"], bottom: Float[Array, "*blocks"] | None, spec: Int
) -> tuple[Float[Array, "*blocks"], Float[Array, "*blocks"]]:
    """Scale and zero point of the range ``[bottom, top]``, or ``[-top, top]`` for a symmetric grid.

    Multiplications by constants, never divisions, and a clip between each product and a sum, which a compiler would
    fuse into one rounding: so jit equals eager.
    """
    low, high = spec.code_range
    if spec.symmetric or bottom is None:
        steps = high if spec.narrow or spec.is_sign else high + 0.5
        scale = positive(top * (1.0 / steps))
        return scale, jnp.zeros_like(scale)
    step = 1.0 / (high - low)
    scale = positive(jnp.maximum(top * step, 0.0) - jnp.minimum(bottom * step, 0.0))
    return scale, jnp.clip(jnp.round(-jnp.minimum(bottom, 0.0) / scale), low, high)


def int_codes(
    w: Float[Array, "*shape"],
    scale: Float[Array, "*blocks"],
    zero_point: Float[Array, "*blocks"] | None,
    spec: Int,
    rounded: Rounded = round_ste,
) -> Float[Array, "*shape"]:
    """``clip(round(w / scale) + zero_point)``: integers in a float type, with a straight-through gradient in w."""
    low, high = spec.code_range
    # By the reciprocal: XLA rewrites a division so where it sees that the divisor is broadcast, in jit only.
    x = w.astype(scale.dtype) * spread(1.0 / scale, w.shape)
    if spec.symmetric or zero_point is None:
        return rounded(x, low, high)
    # The clip changes no code and keeps the product and the sum two roundings, in jit as in eager.
    x = jnp.clip(x, -high - 1.0, high + 1.0)
    return rounded(x + spread(zero_point, w.shape), low, high)


def companded_step(top: Float[Array, "*blocks"], spec: Companded) -> Float[Array, "*blocks"]:
    """``f(top) / (2**(bits-1) - 1)`` of each block: the width of a cell in the companded domain."""
    return positive(spec.compander.compress(top) * (1.0 / spec.code_range[1]))


def companded_codes(
    w: Float[Array, "*shape"], step: Float[Array, "*blocks"], spec: Companded, rounded: Rounded = round_ste
) -> Float[Array, "*shape"]:
    """``clip(round(f(w) / step))``; the gradient passes ``f`` and skips the rounding."""
    low, high = spec.code_range
    return rounded(spec.compander.compress(w.astype(step.dtype)) / spread(step, w.shape), low, high)


def dequantize(
    codes: Num[Array, "*shape"],
    scale: Float[Array, "*blocks"],
    zero_point: Float[Array, "*blocks"] | None = None,
    compander: Compander | None = None,
) -> Float[Array, "*shape"]:
    """``(codes - zero_point) * scale``, expanded where the grid is companded.

    The factors are rounded once each, in this order, in the scale's type: what training computes from float codes and
    what a reader computes from packed ones are the same bits.
    """
    x = codes.astype(scale.dtype)
    if zero_point is not None:
        x = x - spread(zero_point, codes.shape)
    x = x * spread(scale, codes.shape)
    return x if compander is None else compander.expand(x)
