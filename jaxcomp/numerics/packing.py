"""Codes of 1 to 8 bits in a byte stream with no byte wasted: eight codes of b bits take b bytes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, UInt8

_PERIOD = 8  # codes after which the stream is at a byte boundary whatever their width


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
        per_byte = 8 // bits
        rows = _pad_to(flat, per_byte).reshape(-1, per_byte)
        out = rows[:, 0]
        for j in range(1, per_byte):
            out = out | (rows[:, j] << (j * bits))
        return out
    rows = _pad_to(flat, _PERIOD).reshape(-1, _PERIOD)
    out = jnp.stack([_byte_of(rows, b, bits) for b in range(bits)], axis=1)
    return out.reshape(-1)[: packed_size(count, bits)]


def unpack_bits(data: UInt8[Array, " bytes"], bits: int, count: int) -> UInt8[Array, " count"]:
    """The inverse of :func:`pack_bits`: the first ``count`` codes of the stream.

    >>> unpack_bits(pack_bits(jnp.array([1, 2, 5, 7]), 3), 3, 4)
    Array([1, 2, 5, 7], dtype=uint8)

    Raises:
      ValueError: the stream is not as long as ``count`` codes are.
    """
    if data.size != packed_size(count, bits):
        raise ValueError(f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, got {data.size}.")
    if bits == 8:
        return data
    low_bits = jnp.uint8(2**bits - 1)
    if 8 % bits == 0:
        shifts = jnp.arange(8 // bits, dtype=jnp.uint8) * jnp.uint8(bits)
        return ((data[:, None] >> shifts) & low_bits).reshape(-1)[:count]
    rows = _pad_to(data, bits).reshape(-1, bits)
    codes = jnp.stack([_code_of(rows, j, bits) for j in range(_PERIOD)], axis=1)
    return codes.reshape(-1)[:count]


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
    return out & jnp.uint8(2**bits - 1)
