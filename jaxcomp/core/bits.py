"""Codes of 1 to 8 bits in a byte stream with no byte wasted: eight codes of b bits take b bytes.

In jax for programs, and by numpy for arrays that lie in the host's memory, such as those that a file is made of.
"""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, UInt8, UInt32

from jaxcomp.core.barriers import made_once

_PERIOD = 8  # codes after which the stream is at a byte boundary whatever their width
CHUNK = 1 << 18
"""How many elements the functions on the host handle at once: a multiple of 8, and what a core's cache holds."""


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take.

    >>> packed_size(10, 4), packed_size(10, 3), packed_size(0, 2)
    (5, 4, 0)
    """
    return -(-count * bits // 8)


def pack_bits(codes: Integer[Array, "*shape"], bits: int) -> UInt8[Array, " bytes"]:
    """Flattens codes in ``[0, 2**bits)`` in C order into a little-endian bit stream.

    Code i holds bits ``i*bits`` to ``(i+1)*bits - 1`` of the stream, the low one first; the last byte is padded with
    zeros.

    >>> pack_bits(jnp.array([1, 2, 15]), 4)
    Array([33, 15], dtype=uint8)
    """
    flat = codes.reshape(-1).astype(jnp.uint8)
    count = flat.size
    if bits == 8:
        return flat
    if 8 % bits == 0:
        return _pack_within_bytes(codes.astype(jnp.uint8), bits)
    rows = _pad_to(flat, _PERIOD).reshape(-1, _PERIOD)
    out = jnp.stack([_byte_of(rows, b, bits) for b in range(bits)], axis=1)
    return out.reshape(-1)[: packed_size(count, bits)]


def unpack_bits(
    data: UInt8[Array, " bytes"], bits: int, count: int, dtype: Any = jnp.uint8
) -> Integer[Array, " count"]:
    """The inverse of :func:`pack_bits`: the first ``count`` codes of the stream, in the given type.

    >>> unpack_bits(pack_bits(jnp.array([1, 2, 5, 7]), 3), 3, 4)
    Array([1, 2, 5, 7], dtype=uint8)

    Raises:
      ValueError: the stream is not as long as ``count`` codes are.
    """
    if data.size != packed_size(count, bits):
        raise ValueError(f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, got {data.size}.")
    if bits == 8:
        return data.astype(dtype)
    if 32 % bits == 0 or 24 % bits == 0:
        size = 4 if 32 % bits == 0 else 3
        shifts = jnp.arange(8 * size // bits, dtype=jnp.uint32) * jnp.uint32(bits)
        codes = (_words(data, size)[:, None] >> shifts[None, :]) & jnp.uint32(2**bits - 1)
        return codes.astype(dtype).reshape(-1)[:count]
    rows = _pad_to(data, bits).reshape(-1, bits).astype(dtype)
    codes = jnp.stack([_code_of(rows, j, bits) for j in range(_PERIOD)], axis=1)
    return codes.reshape(-1)[:count]


def in_host_memory(x: object) -> np.ndarray | None:
    """The array's own memory where its values are known and lie in that of one CPU device; else None."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array) or len(x.devices()) != 1:
        return None
    return np.asarray(x) if next(iter(x.devices())).platform == "cpu" else None


def put_beside(host: np.ndarray, x: jax.Array) -> jax.Array:
    """An array of these values on the one device of ``x``; committed to it only where ``x`` is."""
    return jax.device_put(host, next(iter(x.devices())) if x.committed else None)


def aligned(size: int) -> np.ndarray:
    """So many bytes, not yet set, that jax takes over without a copy."""
    room = np.empty(size + 63, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size]


def as_bytes(codes: jax.Array, *, signed: bool) -> jax.Array:
    """Integers of at most 8 bits, held in any type, as int8 or uint8."""
    dtype = np.dtype(np.int8 if signed else np.uint8)
    host = in_host_memory(codes)
    if host is None:
        return codes.astype(dtype)
    out = aligned(host.size).view(dtype).reshape(host.shape)
    np.copyto(out, host, casting="unsafe")
    return put_beside(out, codes)


def pack_bits_on_host(codes: np.ndarray, bits: int, low: int = 0) -> np.ndarray:
    """:func:`pack_bits` of ``codes - low`` by numpy, which compiles nothing; codes in any type that holds them.

    >>> pack_bits_on_host(np.array([1.0, 2.0, -1.0]), 4, -8)
    array([169,   7], dtype=uint8)
    """
    flat = codes.reshape(-1)
    out = aligned(packed_size(flat.size, bits))
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        if part.dtype == np.bool_:
            part = part.view(np.uint8)
        elif part.dtype != np.uint8 or low:
            part = (part.astype(np.int16) - np.int16(low)).astype(np.uint8)
        at = start * bits // 8
        out[at : at + packed_size(part.size, bits)] = squeezed(part, bits)
    return out


def squeezed(codes: np.ndarray, bits: int) -> np.ndarray:
    """:func:`pack_bits` of a chunk of bytes."""
    if bits == 8:
        return codes
    if bits == 1:
        return np.packbits(codes, bitorder="little")
    size = packed_size(codes.size, bits)
    codes = np.pad(codes, (0, -codes.size % _PERIOD)) if codes.size % _PERIOD else np.ascontiguousarray(codes)
    if 8 % bits == 0:  # no code lies across two bytes: those of one byte are a word
        lanes = codes.view(f"<u{8 // bits}")
        out = lanes.copy()
        for j in range(1, 8 // bits):
            out |= lanes >> ((8 - bits) * j)
        return out.astype(np.uint8)[:size]
    words, width, held = codes.view("<u8"), 8, bits
    for _ in range(3):  # neighbours move together: 8 lanes of ``bits`` bits, 4 of twice as many, ...
        mask = _lanes(2 * width, held)
        words = (words & mask) | ((words >> np.uint64(width - held)) & (mask << np.uint64(held)))
        width, held = 2 * width, 2 * held
    return words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)[:size]


def spread_out(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of :func:`squeezed`: a chunk's first ``count`` codes, as bytes."""
    if bits == 8:
        return data[:count]
    if bits == 1:
        return np.unpackbits(data, count=count, bitorder="little")
    if 8 % bits == 0:
        lanes = data.astype(f"<u{8 // bits}")
        out = lanes.copy()
        for j in range(1, 8 // bits):
            out |= lanes << ((8 - bits) * j)
        out &= int.from_bytes(bytes([2**bits - 1]) * (8 // bits), "little")
        return out.view(np.uint8)[:count]
    rows = np.zeros((-(-count // _PERIOD), 8), np.uint8)
    rows[:, :bits] = np.pad(data, (0, len(rows) * bits - data.size)).reshape(-1, bits)
    words, width, held = rows.view("<u8").reshape(-1), 64, 8 * bits
    for _ in range(3):
        width, held = width // 2, held // 2
        mask = _lanes(2 * width, held)
        words = (words & mask) | ((words & (mask << np.uint64(held))) << np.uint64(width - held))
    return words.view(np.uint8)[:count]


def _lanes(width: int, held: int) -> np.uint64:
    """A word whose lanes of ``width`` bits have their low ``held`` bits set."""
    return np.uint64(sum(((1 << held) - 1) << start for start in range(0, 64, width)))


def _words(data: jax.Array, size: int) -> jax.Array:
    """The stream by ``size`` bytes (3 or 4) as uint32, the first byte the low one.

    A word gives its codes to a whole vector at once on CPU: 1.5 times as fast as byte by byte at 4 bits, 5 times at 3.
    The barrier keeps XLA from putting the word together anew for each of them.
    """
    rows = _pad_to(data, size).reshape(-1, size)
    if size == 4 and isinstance(rows.shape[0], int):  # of any number jax.export writes what no one can run
        return jax.lax.bitcast_convert_type(rows, jnp.uint32)
    return made_once(reduce(operator.or_, (rows[:, i].astype(jnp.uint32) << (8 * i) for i in range(size))))


def _pack_within_bytes(codes: jax.Array, bits: int) -> jax.Array:
    """Packs where no code lies across two bytes: each byte is a sum of shifted codes, whose bits do not overlap.

    The axes stay as they are up to the barrier, so that XLA fuses the packing with what computed the codes in that
    one's own loop, without an index to take apart for each element: four times as fast on CPU.
    """
    per_byte = 8 // bits
    if codes.ndim and codes.shape[-1] % per_byte == 0:
        rows = codes.reshape(*codes.shape[:-1], -1, per_byte) if codes.size else codes.reshape(0, per_byte)
    else:
        rows = _pad_to(codes.reshape(-1), per_byte).reshape(-1, per_byte)
    shifts = jnp.arange(per_byte, dtype=jnp.uint8) * jnp.uint8(bits)
    shifted = jnp.left_shift(rows, jax.lax.broadcast_in_dim(shifts, rows.shape, (rows.ndim - 1,)))
    return made_once(jnp.sum(shifted, axis=-1, dtype=jnp.uint8)).reshape(-1)


def _pad_to(flat: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(flat, (0, -flat.size % multiple))


def _byte_of(rows: jax.Array, byte: int, bits: int) -> jax.Array:
    """Byte ``byte`` of every period, from the codes that overlap it."""
    out = jnp.zeros(rows.shape[:1], jnp.uint8)
    for j in range(_PERIOD):
        shift = j * bits - byte * 8
        if -bits < shift < 8:
            out = out | (rows[:, j] << shift if shift >= 0 else rows[:, j] >> -shift)
    return out


def _code_of(rows: jax.Array, j: int, bits: int) -> jax.Array:
    """Code ``j`` of every period, from the one or two bytes that hold it."""
    first, shift = divmod(j * bits, 8)
    out = rows[:, first] >> shift
    if shift + bits > 8:
        out = out | (rows[:, first + 1] << (8 - shift))
    return out & np.asarray(2**bits - 1, out.dtype)


def bits_of(dtype: np.dtype) -> int:
    """How many bits a number of this type has; it may take a byte all the same.

    >>> bits_of(np.dtype(jnp.int4)), bits_of(np.dtype(jnp.bfloat16))
    (4, 16)
    """
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).bits


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Codes and scales are computed in float32, or in float64 where the array is that wide."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def order_keys(scores: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Unsigned integers that order as the scores do; -0 and 0 are equal, NaN is above infinity.

    Scores wider than float32 are rounded to it.
    """
    x = scores.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, jnp.zeros_like(x), x), jnp.uint32)
    negative = (bits >> 31) == 1
    keys = jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))
    return jnp.where(jnp.isnan(x), jnp.uint32(0xFFFFFFFF), keys)
