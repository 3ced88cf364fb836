"""Blocks of 32 weights as bytes, and back: numbers, their scale in float16, and for some a smallest value."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxcomp.export.coded import Coded, Parts
from jaxcomp.export.errors import ExportError
from jaxcomp.quantization.grids import Int
from jaxcomp.quantization.level_grids import E2M1
from jaxcomp.quantization.microscaling import E8M0

BLOCK = 32
PLAIN = {
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    24: np.dtype(np.int8),
    25: np.dtype("<i2"),
    26: np.dtype("<i4"),
    27: np.dtype("<i8"),
    28: np.dtype("<f8"),
    30: np.dtype(ml_dtypes.bfloat16),
}
"""Types of single numbers, by their number in the file."""
GRIDS = "Int(8) (Q8_0), Int(4) (Q4_0), Int(4, symmetric=False) (Q4_1), Int(5) (Q5_0) and recipes.mx(E2M1) (MXFP4)"


class Kind(NamedTuple):
    """A type of blocks.

    Fields:
      name: in the words of the format.
      number: in a file.
      bits: of a code.
      size: bytes of a block.
      offset: whether blocks have a smallest value.
      file_type: what "general.file_type" says where most weights are of this type.
    """

    name: str
    number: int
    bits: int
    size: int
    offset: bool
    file_type: int


Q4_0 = Kind("Q4_0", 2, 4, 18, False, 2)
Q4_1 = Kind("Q4_1", 3, 4, 20, True, 3)
Q5_0 = Kind("Q5_0", 6, 5, 22, False, 8)
Q8_0 = Kind("Q8_0", 8, 8, 34, False, 7)
MXFP4 = Kind("MXFP4", 39, 4, 17, False, 38)
KINDS = {kind.number: kind for kind in (Q4_0, Q4_1, Q5_0, Q8_0, MXFP4)}


def kind_of(x: Coded) -> Kind:
    """The type for a matrix of codes.

    Raises:
      ExportError: there is none; the message goes after the path.
    """
    rows, columns = x.shape
    if columns % BLOCK:
        raise ExportError(f"has {columns} inputs, and GGUF wants a multiple of {BLOCK}.")
    if rows % x.blocks[0] or (columns // x.blocks[1]) % BLOCK:
        raise ExportError(
            f"has its scales in groups of {columns // x.blocks[1]} inputs, and each block of {BLOCK} of GGUF has one;"
            f" quantize with per=Groups({BLOCK}), or a multiple of it."
        )
    if x.grid == E2M1 and x.parts is not None and x.parts.grid == E8M0() and x.parts.outer == 1:
        return MXFP4
    reach = x.grid.code_range
    if reach is not None and x.grid.bits > 1:
        found = next((k for k in (Q4_0, Q4_1, Q5_0, Q8_0) if (k.bits, k.offset) == (x.grid.bits, reach[0] == 0)), None)
        if found is not None:
            return found
    raise ExportError(f"is on {x.grid.label}, which GGUF has no blocks for; it has them for {GRIDS}.")


def block_bytes(x: Coded, kind: Kind) -> np.ndarray:
    """The blocks of a matrix as bytes, row by row.

    Raises:
      ExportError: float16 cannot say its scales; the message goes after the path.
    """
    rows, columns = x.shape
    x = x.cut((rows, columns // BLOCK))
    codes = x.codes.reshape(-1, BLOCK)
    if kind == MXFP4:
        assert x.parts is not None
        return np.concatenate([x.parts.codes.reshape(-1, 1), _halves(codes)], 1)
    scale, zero = x.scale.reshape(-1, 1), None if x.zero is None else x.zero.reshape(-1, 1)
    return _MAKERS[kind.number](codes, narrowed(scale, zero, kind.bits), zero)


def _q8_0(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
    return np.concatenate([_half(scale), codes ^ np.uint8(128)], 1)


def _q4(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
    least = [] if zero is None else [_half(-scale * zero)]
    return np.concatenate([_half(scale), *least, _halves(codes)], 1)


def _q5_0(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
    high = np.packbits(codes >> 4, axis=1, bitorder="little")
    return np.concatenate([_half(scale), high, _halves(codes & np.uint8(15))], 1)


_MAKERS: dict[int, Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]] = {
    Q8_0.number: _q8_0,
    Q4_0.number: _q4,
    Q4_1.number: _q4,
    Q5_0.number: _q5_0,
}


def _half(x: np.ndarray) -> np.ndarray:
    return x.astype("<f2").view(np.uint8)


def _halves(codes: np.ndarray) -> np.ndarray:
    """Codes of four bits, those of a block's second half above those of its first."""
    return codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << np.uint8(4)


def narrowed(scale: np.ndarray, zero: np.ndarray | None, bits: int) -> np.ndarray:
    """Scales that float16 holds, as float32, and with which ``scale * zero`` is one of its numbers too.

    The second takes bits off a scale: as many as its zero point has, less the zeros behind them. So zeros stay zero,
    and what a reader computes is ``(code - zero) * scale`` to the bit.

    Raises:
      ExportError: a number would move by more than half a step; the message goes after the path.

    >>> third, seven = np.array([1 / 3], np.float32), np.array([7])
    >>> narrowed(third, None, 4).item(), narrowed(third, seven, 4).item()
    (0.333251953125, 0.333984375)
    """
    points = np.zeros(scale.shape, np.int64) if zero is None else zero.astype(np.int64)
    odd = points // np.maximum(points & -points, 1)
    kept = 11 - np.where(odd > 1, np.ceil(np.log2(np.maximum(odd, 1) + 1)), 0)  # significant bits of the scale
    _, exponent = np.frexp(scale.astype(np.float64))
    unit = np.ldexp(1.0, np.maximum(exponent - kept.astype(int), -24))
    near = (np.round(scale / unit) * unit).astype(np.float32)
    most = 2 ** (bits - 1) if zero is None else np.maximum(points, 2**bits - 1 - points)
    with np.errstate(over="ignore"):
        whole = np.isfinite(near.astype(np.float16)) & np.isfinite((near * points).astype(np.float16))
    lost = ~whole | (np.abs(near.astype(np.float64) - scale) * most > np.abs(scale) / 2)
    if lost.any():
        raise ExportError(
            f"has a scale of {scale[lost][0]:.3g}, which float16, the type of GGUF's scales, rounds by more than half a"
            " step of the largest code; prune or clip such small blocks, or quantize larger groups."
        )
    return near


def from_bytes(data: np.ndarray, kind: Kind, columns: int) -> Coded | np.ndarray:
    """The matrix of blocks, or its values in float32 where no leaf has them exactly.

    Args:
      data: the bytes.
      kind: of the blocks.
      columns: of a row.
    """
    blocks = data.reshape(-1, kind.size)
    if kind == MXFP4:
        return _mxfp4(blocks, columns)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    codes = blocks[:, 2:] ^ np.uint8(128) if kind == Q8_0 else _unhalved(blocks[:, -BLOCK // 2 :])
    if kind == Q5_0:
        codes = codes | np.unpackbits(np.ascontiguousarray(blocks[:, 2:6]), axis=1, bitorder="little") << np.uint8(4)
    if kind != Q4_1:
        return _matrix(codes, scale, None, Int(kind.bits), columns)
    least = np.ascontiguousarray(blocks[:, 2:4]).view("<f2").astype(np.float32)
    with np.errstate(all="ignore"):
        zero = np.round(np.where(scale == 0, 0, -least / scale))
        fits = (zero >= 0) & (zero <= 15) & (scale >= 0) & (-zero * scale == least)
    if not fits.all():
        return (scale * codes.astype(np.float32) + least).reshape(-1, columns)
    return _matrix(codes, scale, zero.astype(np.uint8), Int(4, symmetric=False), columns)


def _matrix(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, grid: Int, columns: int) -> Coded:
    blocks = (-1, columns // BLOCK)
    held = np.ascontiguousarray(codes).reshape(-1, columns)
    return Coded(held, scale.reshape(blocks), None if zero is None else zero.reshape(blocks), grid)


def _mxfp4(blocks: np.ndarray, columns: int) -> Coded | np.ndarray:
    scale, codes = np.ascontiguousarray(blocks[:, :1]), _unhalved(blocks[:, 1:])
    if ((scale < 27) | (scale == 255)).any():  # beyond our scales, 2**-100 and up
        twice = np.array([*E2M1.magnitudes, *(-x for x in E2M1.magnitudes)], np.float32)[codes] * 2
        return (twice * np.ldexp(np.float32(1), scale.astype(int) - 128)).reshape(-1, columns)
    blocks_of = scale.reshape(-1, columns // BLOCK)
    held = codes.reshape(-1, columns)
    return Coded(held, blocks_of.astype(np.float32), None, E2M1, Parts(E8M0(), blocks_of, 1.0))


def _unhalved(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x & np.uint8(15), x >> np.uint8(4)], 1)
