"""Codes as the layout stores them: rows of whole 32-bit words, pairs of float4, scales; numpy only."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jaxcomp.core.bits import pack_bits_on_host, spread_out


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Each row of codes as a little-endian stream of bits, in int32 words.

    Args:
      codes: uint8, (rows, columns), below ``2**bits``.
      bits: of a code.

    >>> words(np.array([[1, 2, 15]], np.uint8), 4).tolist()
    [[3873]]
    """
    rows, columns = codes.shape
    padded = np.zeros((rows, -(-columns // 32) * 32), np.uint8)  # 32 codes take whole words, whatever their width
    padded[:, :columns] = codes
    stream = pack_bits_on_host(padded, bits).view("<i4").reshape(rows, -1)
    return np.ascontiguousarray(stream[:, : -(-columns * bits // 32)])


def codes_of(x: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The inverse of :func:`words`.

    >>> codes_of(np.array([[3873]], np.int32), 4, 3)
    array([[ 1,  2, 15]], dtype=uint8)
    """
    rows, wide = x.shape
    padded = np.zeros((rows, -(-wide // bits) * bits), "<i4")
    padded[:, :wide] = x
    codes = spread_out(padded.view(np.uint8).reshape(-1), bits, rows * padded.shape[1] * 32 // bits)
    return np.ascontiguousarray(codes.reshape(rows, -1)[:, :columns])


def codes_of_lanes(x: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The same of files before 0.18, whose words hold ``32 // bits`` whole codes each.

    >>> codes_of_lanes(np.array([[1 | 2 << 3, 5]], np.int32), 3, 11).tolist()
    [[1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 5]]
    """
    each = 32 // bits
    lanes = x.view(np.uint32)[..., None] >> (np.arange(each, dtype=np.uint32) * np.uint32(bits))
    return (lanes & np.uint32(2**bits - 1)).astype(np.uint8).reshape(len(x), -1)[:, :columns]


def pairs(codes: np.ndarray) -> np.ndarray:
    """Two codes of four bits a byte, the first one low; of rows of whole bytes.

    >>> pairs(np.array([[1, 15]], np.uint8))
    array([[241]], dtype=uint8)
    """
    return pack_bits_on_host(codes, 4).reshape(len(codes), codes.shape[1] // 2)


def unpaired(x: np.ndarray) -> np.ndarray:
    """The inverse of :func:`pairs`."""
    return spread_out(x.reshape(-1), 4, 2 * x.size).reshape(len(x), 2 * x.shape[1])


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E4M3 = np.array([(8 + m) * 2.0 ** (e - 10) if e else m * 2.0**-9 for e in range(16) for m in range(8)], np.float32)


def global_scale(outer: float) -> np.float32 | None:
    """The divisor with which NVFP4 weights are those of a factor ``outer``, rounded to bfloat16; None if there is none.

    A reader computes ``bfloat16(level * (scale / divisor))``, and a leaf ``level * (scale * outer)``. All products of
    a level and a scale are tried, for the reciprocal and its neighbours.
    """
    return _inverse(outer, np.multiply, np.divide)


def factor_of(divisor: float) -> np.float32 | None:
    """The inverse of :func:`global_scale`."""
    return _inverse(divisor, np.divide, np.multiply)


def _inverse(given: float, known: np.ufunc, wanted: np.ufunc) -> np.float32 | None:
    if not np.isfinite(given) or not given > 0:
        return None
    with np.errstate(all="ignore"):
        aim = _products(known, np.float32(given))
        up = down = np.float32(1) / np.float32(given)
        for _ in range(16):
            for x in (up, down):
                if np.isfinite(x) and np.array_equal(_products(wanted, x), aim):
                    return x
            up, down = np.nextafter(up, np.float32(np.inf)), np.nextafter(down, np.float32(0))
    return None


def _products(how: np.ufunc, by: np.float32) -> np.ndarray:
    """Of all levels and scales, as bits of bfloat16."""
    return (_E2M1[:, None] * how(_E4M3[:127], by)).astype(ml_dtypes.bfloat16).view(np.uint16)
