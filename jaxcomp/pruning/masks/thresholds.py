"""Exactly the k smallest of one or several arrays, without a sort.

A float32's bits, read as an unsigned integer, order like the number. The k-th smallest is selected on those bits by
counting: by two 16-bit histograms where scatters are cheap (one CPU), else by bisection over the 32 bits, which needs
only sums. So do ties on several devices: which of them are marked is a selection too, by their indices. No sharded
array is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from jaxcomp.core.meshes import spread
from jaxcomp.core.specs import share_of, written

_BLOCK = 1024
_CHUNK = 1 << 14
_SMALL = 1 << 17  # below this a histogram's cumulative sum costs more than counting 32 times
MAX_COUNT = 2**31 - 1
_PLACES = 10**6  # a digit of six decimal places: float32 tells all decimals of so many apart

Pair = tuple[jax.Array, jax.Array]


@jax.jit
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
    of = (list(keys), list(eligible), count)
    if spread(keys) or sum(k.size for k in keys) < _SMALL:
        kth, wanted = _kth_by_bisection(*of)
    else:
        kth, wanted = jax.lax.platform_dependent(*of, cpu=_kth_by_radix, default=_kth_by_bisection)
    out = []
    for k, e in zip(keys, eligible, strict=True):
        take, end = _last_tie(k, e, kth, wanted)
        wanted = wanted - take
        chosen = (k < kth) | ((k == kth) & _up_to(end, k.shape))
        out.append(_among(chosen, e) & (count > 0))
    return out


def fraction_of(total: UInt32[Array, ""] | int, fraction: Float[Array, ""] | float) -> UInt32[Array, ""]:
    """``total * fraction`` rounded, half to even, in integers; both at most 1 and ``MAX_COUNT``.

    A float is the decimal that it prints, exactly. An array, as a schedule gives, is the decimal of at most six places
    that it is nearest to in float32 (up to an ulp or two, so a schedule's end is the number that was written); where
    there is none, its value, to 2**-31. Of less than 0 and NaN it gives 0, above 1 all.

    >>> int(fraction_of(jnp.uint32(10_000_000), 0.9)), int(fraction_of(5, 0.1)), int(fraction_of(5, jnp.float32(0.1)))
    (9000000, 0, 0)
    """
    if isinstance(fraction, float) and isinstance(total, int):
        return jnp.uint32(share_of(fraction, total))
    whole = jnp.asarray(total, jnp.uint32)
    if isinstance(fraction, float):
        return _times_digits(whole, _digits(fraction))
    f = fraction.astype(jnp.float32)
    f = jnp.where(f > 0, jnp.minimum(f, 1), jnp.zeros_like(f))
    places = jnp.round(f * _PLACES)
    is_decimal = jnp.abs(f - places * (1 / _PLACES)) <= f * 2.0**-23
    fixed = (f * 2.0**31).astype(jnp.uint32)
    return jnp.where(is_decimal, _times_digits(whole, [places.astype(jnp.uint32)]), _times_fixed(whole, fixed))


def _digits(fraction: float) -> list[UInt32[Array, ""]]:
    """The decimal in digits of six places, the first one first; what a uint32 times the rest gives is below 1/4."""
    rest = written(fraction)
    digits: list[int] = []
    while rest and len(digits) < 5:
        digits.append(int(rest * _PLACES))
        rest = rest * _PLACES - digits[-1]
    return [jnp.uint32(d) for d in digits or [0]]


@jax.jit
def _times_digits(total: UInt32[Array, ""], digits: list[UInt32[Array, ""]]) -> UInt32[Array, ""]:
    """``total`` times a decimal in digits of six places, rounded half to even: long multiplication from the last on."""
    product, below, rest = jnp.uint32(0), jnp.bool_(False), jnp.uint32(0)
    for digit in reversed(digits):
        below = below | (rest > 0)
        product, rest = _times_digit(total, digit, product)
    half = jnp.uint32(_PLACES // 2)
    return product + ((rest > half) | ((rest == half) & (below | (product & 1 == 1)))).astype(jnp.uint32)


def _times_digit(total: jax.Array, digit: jax.Array, carry: jax.Array) -> Pair:
    """``divmod(total * digit + carry, 10**6)`` for a digit up to 10**6 and a carry up to the total, in 32 bits."""
    places, root = jnp.uint32(_PLACES), jnp.uint32(1000)
    high, low = total // places, total % places
    middle = digit * (low // root)
    last = middle % root * root + digit * (low % root) + carry % places
    return digit * high + middle // root + carry // places + last // places, last % places


@jax.jit
def _times_fixed(total: UInt32[Array, ""], fixed: UInt32[Array, ""]) -> UInt32[Array, ""]:
    """``round(total * fixed / 2**31)``, half to even, for ``fixed`` up to 2**31: a product of half-words."""
    half_word = jnp.uint32(0xFFFF)
    a, b, c, d = total >> 16, total & half_word, fixed >> 16, fixed & half_word
    low = b * d
    middle = a * d + (low >> 16)
    cross = b * c + (middle & half_word)
    high = a * c + (middle >> 16) + (cross >> 16)
    low = (cross << 16) | (low & half_word)
    whole, rest, half = (high << 1) | (low >> 31), low & jnp.uint32(2**31 - 1), jnp.uint32(2**30)
    return whole + ((rest > half) | ((rest == half) & (whole & 1 == 1))).astype(jnp.uint32)


def _among(x: jax.Array, eligible: jax.Array | None) -> jax.Array:
    return x if eligible is None else x & eligible


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, dtype=jnp.uint32)


def _kth_by_radix(keys: list[jax.Array], eligible: list[jax.Array | None], count: jax.Array) -> Pair:
    """The count-th smallest key, and its rank from 1 among its equals, from a histogram of each half-word."""
    high, left = jnp.uint32(0), jnp.maximum(count, 1)
    for low_pass in (False, True):
        hist = jnp.zeros(1 << 16, jnp.uint32)
        for k, e in zip(keys, eligible, strict=True):
            hist = _counted(hist, k.reshape(-1), None if e is None else e.reshape(-1), high if low_pass else None)
        sums = jnp.cumsum(hist, dtype=jnp.uint32)
        digit = jnp.minimum(_sum(sums < left), jnp.uint32(0xFFFF))
        left = left - (sums[digit] - hist[digit])
        if not low_pass:
            high = digit
    return (high << 16) | digit, left


def _counted(hist: jax.Array, keys: jax.Array, eligible: jax.Array | None, high: jax.Array | None) -> jax.Array:
    """The histogram with the keys' high half-words added, or the low ones of those keys whose high one is ``high``.

    Chunk by chunk: a scatter writes its indices and its increments out, which for all keys at once would be two more
    copies of them, and twice the time.
    """

    def add(hist: jax.Array, k: jax.Array, e: jax.Array | None) -> jax.Array:
        counted = e if high is None else _among(k >> 16 == high, e)
        ones = jnp.ones(k.shape, jnp.uint32) if counted is None else counted.astype(jnp.uint32)
        digit = k >> 16 if high is None else k & 0xFFFF
        return hist.at[digit].add(ones, mode="promise_in_bounds")

    def add_chunk(i: jax.Array, hist: jax.Array) -> jax.Array:
        chunk = partial(jax.lax.dynamic_slice_in_dim, start_index=i * _CHUNK, slice_size=_CHUNK)
        return add(hist, chunk(keys), None if eligible is None else chunk(eligible))

    whole = keys.size // _CHUNK
    if whole:
        hist = jax.lax.fori_loop(0, whole, add_chunk, hist)
    rest = whole * _CHUNK
    return hist if rest == keys.size else add(hist, keys[rest:], None if eligible is None else eligible[rest:])


def _kth_by_bisection(keys: list[jax.Array], eligible: list[jax.Array | None], count: jax.Array) -> Pair:
    """The same: the largest t with fewer than count keys below it, bit by bit from the highest."""

    def below(t: jax.Array) -> jax.Array:
        return sum((_sum(_among(k < t, e)) for k, e in zip(keys, eligible, strict=True)), jnp.uint32(0))

    def step(i: jax.Array, found: jax.Array) -> jax.Array:
        trial = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(below(trial) < jnp.maximum(count, 1), trial, found)

    kth = jax.lax.fori_loop(0, 32, step, jnp.uint32(0))
    return kth, jnp.maximum(count, 1) - below(kth)


def _last_tie(keys: jax.Array, eligible: jax.Array | None, kth: jax.Array, wanted: jax.Array) -> Pair:
    """How many keys equal to the kth are marked, all or those wanted, and the C-order index after the last of them."""
    of = (keys, eligible, kth, wanted)
    if spread([keys]):
        return _last_tie_by_index(*of)
    if keys.size < _SMALL:
        return _last_tie_by_scan(*of)
    return jax.lax.platform_dependent(*of, cpu=_last_tie_by_chunk, default=_last_tie_by_scan)


def _last_tie_by_scan(keys: jax.Array, eligible: jax.Array | None, kth: jax.Array, wanted: jax.Array) -> Pair:
    """Where not all ties are marked, and only there, they are laid in a row."""
    ties = _among(keys == kth, eligible)
    here = _sum(ties)
    take = jnp.minimum(here, wanted)

    def scan() -> jax.Array:
        flat = ties.reshape(-1)
        return _end_of(partial(jax.lax.dynamic_slice_in_dim, flat), _block_sums(flat), keys.size, take)

    return take, jax.lax.cond(take == here, lambda: jnp.uint32(keys.size), scan)


def _last_tie_by_index(keys: jax.Array, eligible: jax.Array | None, kth: jax.Array, wanted: jax.Array) -> Pair:
    """Where not all ties are marked, and only there, the last of them is the ``take``-th smallest of their indices."""
    ties = _among(keys == kth, eligible)
    here = _sum(ties)
    take = jnp.minimum(here, wanted)

    def select() -> jax.Array:
        last, _ = _kth_by_bisection([_index(keys.shape)], [ties], take)
        return jnp.where(take > 0, last + 1, jnp.zeros_like(last))

    return take, jax.lax.cond(take == here, lambda: jnp.uint32(keys.size), select)


def _last_tie_by_chunk(keys: jax.Array, eligible: jax.Array | None, kth: jax.Array, wanted: jax.Array) -> Pair:
    """Without an array of all ties, which XLA would write out to sum it."""
    flat, among = keys.reshape(-1), None if eligible is None else eligible.reshape(-1)

    def ties(start: jax.Array, size: int) -> jax.Array:
        here = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        return _among(here(flat) == kth, None if among is None else here(among))

    chunks = keys.size // _CHUNK
    rest = keys.size - chunks * _CHUNK
    sums = jax.lax.map(lambda i: _block_sums(ties(i * _CHUNK, _CHUNK)), jnp.arange(chunks)).reshape(-1)
    if rest:
        sums = jnp.append(sums, _block_sums(ties(jnp.int32(chunks * _CHUNK), rest)))
    here = _sum(sums)
    take = jnp.minimum(here, wanted)
    return take, jnp.where(take == here, jnp.uint32(keys.size), _end_of(ties, sums, keys.size, take))


def _block_sums(marks: jax.Array) -> jax.Array:
    """How many marks each ``_BLOCK`` of a vector has; the last block may be shorter."""
    whole = marks.size // _BLOCK * _BLOCK
    sums = jnp.sum(marks[:whole].reshape(-1, _BLOCK), axis=1, dtype=jnp.uint32)
    return sums if whole == marks.size else jnp.append(sums, _sum(marks[whole:]))


def _end_of(marks: Callable[..., jax.Array], sums: jax.Array, size: int, take: jax.Array) -> jax.Array:
    """The index after the ``take``-th mark: by the sums of blocks, then inside the one that holds it.

    ``marks(start, length)`` gives a part of them.
    """
    length = min(_BLOCK, size)
    ends = jnp.cumsum(jnp.pad(sums, (1, 0)), dtype=jnp.uint32)
    block = jnp.maximum(_sum(ends < take).astype(jnp.int32) - 1, 0)
    start = jnp.minimum(block * _BLOCK, size - length)
    index = start + jnp.arange(length, dtype=jnp.int32)
    row = marks(start, length) & (index >= block * _BLOCK)
    inside = _sum(jnp.cumsum(row, dtype=jnp.uint32) < take - ends[block])
    return jnp.where(take == 0, jnp.uint32(0), start.astype(jnp.uint32) + inside + 1)


def _up_to(end: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Marks the entries whose C-order index is below ``end``."""
    return _index(shape) < end


def _index(shape: tuple[int, ...]) -> jax.Array:
    """The C-order index of each entry, axis by axis, so that each device makes its own."""
    strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
    parts = (jax.lax.broadcasted_iota(jnp.uint32, shape, i) * jnp.uint32(n) for i, n in enumerate(strides))
    return sum(parts, jnp.zeros(shape, jnp.uint32))
