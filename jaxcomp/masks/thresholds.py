"""Exactly the k smallest of one or several arrays, without a sort.

A float32's bits, read as an unsigned integer, order like the number. The k-th smallest is selected on those bits by
counting: by two 16-bit histograms where scatters are cheap (CPU), else by bisection over the 32 bits, which needs
only sums and so works on sharded arrays without gathering them.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

_BLOCK = 1024
MAX_COUNT = 2**31 - 1


def order_keys(scores: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Unsigned integers that order as the scores do; -0 and 0 are equal, NaN is above infinity.

    Scores wider than float32 are rounded to it.
    """
    x = scores.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, jnp.zeros_like(x), x), jnp.uint32)
    negative = (bits >> 31) == 1
    keys = jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))
    return jnp.where(jnp.isnan(x), jnp.uint32(0xFFFFFFFF), keys)


def smallest(
    keys: Sequence[UInt32[Array, ...]],
    eligible: Sequence[Bool[Array, ...] | None],
    count: UInt32[Array, ""],
) -> list[Bool[Array, ...]]:
    """Marks the ``count`` smallest eligible keys of all arrays together.

    Exactly ``count`` are marked (all eligible ones where there are fewer). Of equal keys those of earlier arrays, and
    of lower C-order index, are marked first.

    Args:
      keys: from :func:`order_keys`.
      eligible: booleans of the keys' shapes, or None for all.
      count: scalar uint32.

    >>> [m.tolist() for m in smallest([jnp.array([3, 1, 1], jnp.uint32)], [None], jnp.uint32(2))]
    [[False, True, True]]
    """
    kth = jax.lax.platform_dependent(list(keys), list(eligible), count, cpu=_kth_by_radix, default=_kth_by_bisection)
    below = [_among(k < kth, e) for k, e in zip(keys, eligible, strict=True)]
    ties = [_among(k == kth, e) for k, e in zip(keys, eligible, strict=True)]
    wanted = jnp.maximum(count, 1) - sum((_total(b) for b in below), jnp.uint32(0))
    out = []
    for b, t in zip(below, ties, strict=True):
        here = _total(t)
        take = jnp.minimum(here, wanted)
        wanted = wanted - take
        out.append((b | _first(t, take, here)) & (count > 0))
    return out


def fraction_of(total: UInt32[Array, ""], fraction: Float[Array, ""] | float) -> UInt32[Array, ""]:
    """``round(total * fraction)``, half to even, exact in integers; ``fraction`` in [0, 1] to 2**-31.

    Source: the product is formed bit by bit, from the lowest, as ``a ← (a + bit·total) / 2``, whose nested floors are
    exact; the bits dropped are remembered for the tie.

    >>> int(fraction_of(jnp.uint32(10_000_000), 0.9)), int(fraction_of(jnp.uint32(5), 0.5))
    (9000000, 2)
    """
    if isinstance(fraction, float):
        fixed = jnp.uint32(round(fraction * 2**31))
    else:
        fixed = (fraction.astype(jnp.float32) * 2.0**31).astype(jnp.uint32)
    total = total.astype(jnp.uint32)

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        twice, dropped = carry
        dropped = dropped | ((twice & 1) == 1)
        return (twice >> 1) + ((fixed >> i.astype(jnp.uint32)) & 1) * total, dropped

    # After bit i has been added, `twice` is floor(total · (bits up to i) / 2**i); bit 31 stands for 1.
    start = ((fixed & 1) * total, jnp.bool_(False))
    last, dropped = jax.lax.fori_loop(1, 31, step, start)
    whole = fixed >> 31
    odd, rest = (last >> 1) & 1, last & 1
    up = rest & (odd | dropped.astype(jnp.uint32))
    return jnp.where(whole == 1, total, (last >> 1) + up)


def _among(x: jax.Array, eligible: jax.Array | None) -> jax.Array:
    return x if eligible is None else x & eligible


def _total(x: jax.Array) -> jax.Array:
    return jnp.sum(x, dtype=jnp.uint32)


def _kth_by_radix(keys: list[jax.Array], eligible: list[jax.Array | None], count: jax.Array) -> jax.Array:
    """The count-th smallest key from a histogram of the high half-words and one of the low ones."""
    high, left = jnp.uint32(0), jnp.maximum(count, 1)
    for low_pass in (False, True):
        hist = jnp.zeros(1 << 16, jnp.uint32)
        for k, e in zip(keys, eligible, strict=True):
            counted = _among(k >> 16 == high, e) if low_pass else e
            digit = (k & 0xFFFF) if low_pass else (k >> 16)
            ones = jnp.uint32(1) if counted is None else counted.astype(jnp.uint32)
            hist = hist.at[digit.reshape(-1)].add(jnp.broadcast_to(ones, k.shape).reshape(-1), mode="promise_in_bounds")
        sums = jnp.cumsum(hist, dtype=jnp.uint32)
        digit = jnp.minimum(_total(sums < left), jnp.uint32(0xFFFF))
        left = left - (sums[digit] - hist[digit])
        if not low_pass:
            high = digit
    return (high << 16) | digit


def _kth_by_bisection(keys: list[jax.Array], eligible: list[jax.Array | None], count: jax.Array) -> jax.Array:
    """The largest t with fewer than count keys below it, bit by bit from the highest."""

    def step(i: jax.Array, found: jax.Array) -> jax.Array:
        trial = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        below = sum((_total(_among(k < trial, e)) for k, e in zip(keys, eligible, strict=True)), jnp.uint32(0))
        return jnp.where(below < jnp.maximum(count, 1), trial, found)

    return jax.lax.fori_loop(0, 32, step, jnp.uint32(0))


def _first(marks: jax.Array, take: jax.Array, total: jax.Array) -> jax.Array:
    """The first ``take`` of the ``total`` marks, in C order; nothing is scanned where that is all of them."""
    return jax.lax.cond(take == total, lambda: marks, lambda: _first_by_blocks(marks, take))


def _first_by_blocks(marks: jax.Array, take: jax.Array) -> jax.Array:
    flat = marks.reshape(-1)
    rows = jnp.pad(flat, (0, -flat.size % _BLOCK)).reshape(-1, _BLOCK)
    ends = jnp.cumsum(jnp.sum(rows, axis=1, dtype=jnp.uint32), dtype=jnp.uint32)
    partial = _total(ends <= take).astype(jnp.int32)
    block = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None]
    row = jax.lax.dynamic_index_in_dim(rows, partial, keepdims=False)
    before = jnp.where(partial > 0, ends[partial - 1], jnp.uint32(0))
    inside = row & (jnp.cumsum(row, dtype=jnp.uint32) <= take - before)
    kept = (rows & (block < partial)) | ((block == partial) & inside)
    return kept.reshape(-1)[: flat.size].reshape(marks.shape)
