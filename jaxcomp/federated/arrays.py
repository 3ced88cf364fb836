"""Array mathematics of update compression: rotations, draws, stochastic codes, wide bit streams."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Integer, Num, PRNGKeyArray, UInt8, UInt32

from jaxcomp.core.bits import compute_dtype, pack_bits, packed_size, unpack_bits

_LOG_FACTOR = 7  # a Walsh-Hadamard transform runs as products with matrices of at most 2**7


def seed_of(key: PRNGKeyArray) -> UInt32[Array, ""]:
    """32 bits of a key, which can be sent; :func:`key_of` makes a key of them on the other side."""
    return jax.random.bits(key, (), jnp.uint32)


def key_of(seed: UInt32[Array, ""]) -> PRNGKeyArray:
    """A key of the bits that were sent; always threefry, so that both sides draw the same whatever their settings."""
    return jax.random.key(seed, impl="threefry2x32")


@functools.cache
def _hadamard_matrix(log: int) -> np.ndarray:
    """The ±1 matrix of size ``2**log``: entry (i, j) is the parity of the bits that i and j share."""
    i = np.arange(2**log)
    return 1 - 2 * (np.bitwise_count(i[:, None] & i[None, :]) & 1).astype(np.int8)


def hadamard(x: Float[Array, "rows n"]) -> Float[Array, "rows n"]:
    """The orthonormal Walsh-Hadamard transform of each row, ``n`` a power of two; it is its own inverse.

    ``H[n] = H[a] ⊗ H[b] ⊗ …`` with factors of at most 128, each one matrix product: a few passes over the data instead
    of ``log2 n``.

    >>> hadamard(jnp.array([[1.0, 0.0, 0.0, 0.0]]))
    Array([[0.5, 0.5, 0.5, 0.5]], dtype=float32)

    Raises:
      ValueError: the length is not a power of two.
    """
    rows, n = x.shape
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: the length must be a power of two, got {n}.")
    log = n.bit_length() - 1
    parts = max(1, -(-log // _LOG_FACTOR))
    logs = [log // parts + (i < log % parts) for i in range(parts)]
    y = x.reshape(rows, *(2**p for p in logs))
    for axis, p in enumerate(logs, start=1):
        matrix = jnp.asarray(_hadamard_matrix(p), x.dtype)
        y = jnp.moveaxis(jnp.tensordot(y, matrix, (axis, 0), precision=jax.lax.Precision.HIGHEST), -1, axis)
    return y.reshape(rows, n) * (1 / math.sqrt(n))


def rotation_block(size: int, block: int | None) -> int:
    """The length of the transform: ``block``, or the power of two that holds all ``size`` elements."""
    whole = 1 << max(size - 1, 0).bit_length()
    return whole if block is None else min(block, whole)


def rotated(x: Float[Array, " n"], seed: UInt32[Array, ""], block: int) -> Float[Array, " padded"]:
    """``H D x``: random signs, then the Hadamard transform of each block; padded with zeros to whole blocks.

    Every element of the result has nearly a normal distribution whose width is the root mean square of ``x``: no
    outlier sets the range. Lengths (in the l2 norm) are kept.

    Source: Suresh et al. 2017, arXiv:1611.00429, section 3. Its rotation has one block.
    """
    padded = jnp.pad(x, (0, -x.size % block))
    signs = jax.random.rademacher(key_of(seed), padded.shape, padded.dtype)
    return hadamard((padded * signs).reshape(-1, block)).reshape(-1)


def unrotated(y: Float[Array, " padded"], seed: UInt32[Array, ""], block: int, size: int) -> Float[Array, " size"]:
    """The inverse of :func:`rotated`: the first ``size`` elements of ``D H y``."""
    signs = jax.random.rademacher(key_of(seed), y.shape, y.dtype)
    return (hadamard(y.reshape(-1, block)).reshape(-1) * signs)[:size]


def largest(x: Float[Array, " n"], count: int) -> Int32[Array, " count"]:
    """The places of the ``count`` largest magnitudes, in order of place; of equal ones the first.

    >>> largest(jnp.array([1.0, -3.0, 0.5, 2.0]), 2)
    Array([1, 3], dtype=int32)
    """
    return jnp.sort(jax.lax.top_k(jnp.abs(x), count)[1].astype(jnp.int32))


def drawn(seed: UInt32[Array, ""], size: int, count: int) -> Int32[Array, " count"]:
    """``count`` different places of ``size``, each set of them equally likely; the same for the same seed."""
    return jax.random.permutation(key_of(seed), jnp.arange(size, dtype=jnp.int32))[:count]


def half_step_of(limit: Float[Array, ""], bits: int) -> Float[Array, ""]:
    """Half the distance between the ``2**bits`` levels that divide ``[-limit, limit]``; 0 where it is too small."""
    half = limit * (1 / (2**bits - 1))
    return jnp.where(half < jnp.finfo(half.dtype).tiny, jnp.zeros_like(half), half)


def stochastic_codes(
    x: Float[Array, " n"], half_step: Float[Array, ""], bits: int, key: PRNGKeyArray
) -> UInt8[Array, " n"]:
    """Codes c in ``[0, 2**bits)`` with ``E[(2c - (2**bits - 1)) half_step] == x`` for x within the range.

    Each is rounded up with the probability that its distance to the level below says.

    Source: Suresh et al. 2017, arXiv:1611.00429, section 2.2; Alistarh et al. 2017 (QSGD), arXiv:1610.02132.
    """
    levels = 2**bits - 1
    inverse = jnp.where(half_step > 0, 1 / half_step, jnp.zeros_like(half_step))
    place = jnp.clip((x * inverse + levels) * 0.5, 0, levels)
    up = jax.random.uniform(key, x.shape, x.dtype)
    return jnp.clip(jnp.floor(place + up), 0, levels).astype(jnp.uint8)


def orthonormal(m: Float[Array, "rows rank"]) -> Float[Array, "rows rank"]:
    """Orthonormal columns that span those of ``m``; where they are dependent, more are made up."""
    return jnp.linalg.qr(m)[0]


def pack_wide(values: Integer[Array, " n"], bits: int) -> UInt8[Array, " bytes"]:
    """Integers in ``[0, 2**bits)``, up to 32 bits, in ``ceil(n * bits / 8)`` bytes.

    First the low byte of all values, then the next; last a stream of the ``bits % 8`` high bits of each.

    >>> pack_wide(jnp.array([513, 1]), 12)
    Array([1, 1, 2], dtype=uint8)
    """
    x = values.astype(jnp.uint32)
    planes = [(x >> (8 * i)).astype(jnp.uint8) for i in range(bits // 8)]
    if bits % 8:
        planes.append(pack_bits((x >> (8 * (bits // 8))).astype(jnp.uint8), bits % 8))
    return jnp.concatenate([*planes, jnp.zeros(0, jnp.uint8)])


def unpack_wide(data: UInt8[Array, " bytes"], bits: int, count: int) -> UInt32[Array, " count"]:
    """The inverse of :func:`pack_wide`.

    Raises:
      ValueError: the stream is not as long as ``count`` integers are.
    """
    if data.size != packed_size(count, bits):
        raise ValueError(f"{count} integers of {bits} bits take {packed_size(count, bits)} bytes, got {data.size}.")
    out = jnp.zeros(count, jnp.uint32)
    for i in range(bits // 8):
        out = out | (data[i * count : (i + 1) * count].astype(jnp.uint32) << (8 * i))
    if bits % 8:
        whole = bits // 8
        out = out | (unpack_bits(data[whole * count :], bits % 8, count).astype(jnp.uint32) << (8 * whole))
    return out


def width_of(largest_value: int) -> int:
    """Bits that hold 0 to ``largest_value``; at least one.

    >>> width_of(0), width_of(255), width_of(256)
    (1, 8, 9)
    """
    return max(1, int(largest_value).bit_length())


def weighted_mean(x: Num[Array, "n ..."], weights: Float[Array, " n"] | None) -> Array:
    """``Σ w_i x_i`` over the first axis, or the plain mean without weights; in float32 at least, then x's own type."""
    wide = x.astype(compute_dtype(x.dtype))
    if weights is None:
        return (jnp.sum(wide, 0) * (1 / x.shape[0])).astype(x.dtype)
    return jnp.tensordot(weights.astype(wide.dtype), wide, 1, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)
