"""Blocks of bytes by asymmetric numeral systems: as many bits as the entropy of their symbols, and a table of weights.

The symbols are what a little-endian bit stream gives when it is read some bits at a time, 1 to 8. One that is the codes
of a grid is read by codes, or by as many as there are in a byte: fewer symbols are coded then, and faster.

A block is one byte, the number of symbols of the alphabet less one; their weights; and the coder's words, uint32. From
the weights everyone makes the same whole numbers, whose sum is 2**24, so nothing depends on how a machine rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcomp.artifact.coding.packages import package
from jaxcomp.core.bits import spread_out, squeezed

PRECISION = 24
WIDTHS = (8, 4, 6, 5, 7, 3)
"""Bits of a symbol, most wanted first: 4 for a table that is small, 3, 5, 6 and 7 for codes that lie across bytes."""
_CLOSE = 1.002
"""A width that is more wanted may take so many times as many bytes."""
PERIOD = 105
"""Bytes after which symbols of any width begin at a byte again."""
_SAMPLE = 80 * PERIOD
"""Bytes at the beginning and in the middle of a block that say which width is best."""
_NARROW: np.dtype = np.dtype(np.uint8)
_BROAD: np.dtype = np.dtype("<u2")


@dataclass(frozen=True, eq=False)
class Plan:
    """How a block would be coded.

    Fields:
      width: bits of a symbol.
      symbols, weights: what is coded; how often each comes, in whole numbers of one or two bytes.
      size: the bytes that the block will take, by the entropy of the symbols under these weights.
    """

    width: int
    symbols: np.ndarray
    weights: np.ndarray
    size: float


def planned(data: np.ndarray) -> Plan:
    """The best width and weights for some bytes."""
    middle = data.size // 2 // PERIOD * PERIOD
    sample = data if middle < _SAMPLE else np.concatenate([data[:_SAMPLE], data[middle:][:_SAMPLE]])
    plans = [_plan(sample, w) for w in WIDTHS]
    sizes = [_for_all(p, data.size, sample.size) for p in plans]
    best = next(p for p, size in zip(plans, sizes, strict=True) if size <= min(sizes) * _CLOSE)
    return best if sample is data else _plan(data, best.width)


def _for_all(plan: Plan, size: int, sample: int) -> float:
    """What a plan for a sample takes for all bytes: the table is there once.

    A sample has less entropy than what it is of, by half a nat a symbol of the alphabet (Miller 1955).
    """
    table = 1 + plan.weights.nbytes
    missed = (np.count_nonzero(plan.weights) - 1) / (2 * math.log(2) * 8)
    return table + (plan.size - table + missed) * size / sample


def _plan(data: np.ndarray, width: int) -> Plan:
    symbols = symbols_of(data, width)
    counts = np.bincount(symbols)
    counts = np.pad(counts, (0, max(0, 2 - counts.size)))
    plans = [Plan(width, symbols, w, _size(counts, w)) for w in _weights(counts)]
    return min(plans, key=lambda p: p.size)


def _weights(counts: np.ndarray) -> list[np.ndarray]:
    """Candidates: the counts scaled so that the largest is as large as one and two bytes hold; none is lost."""
    found = []
    for dtype, most in ((_NARROW, 0xFF), (_BROAD, 0xFFFF)):
        top = min(int(counts.max()), most)
        scaled = np.rint(counts * (top / counts.max()))
        found.append(np.maximum(scaled, counts > 0).astype(dtype))
    return found


def _size(counts: np.ndarray, weights: np.ndarray) -> float:
    bits = counts @ (PRECISION - np.log2(frequencies(weights)))
    return 1 + weights.nbytes + 4 * np.ceil(bits / 32 + 0.5)


def frequencies(weights: np.ndarray) -> np.ndarray:
    """Whole numbers that sum to 2**24, at least one for each symbol: ``1 + w * (2**24 - n) // sum(w)``.

    What is left over goes to the first of the largest.
    """
    w, free = weights.astype(np.int64), (1 << PRECISION) - weights.size
    shares = w * free // w.sum()
    shares[shares.argmax()] += free - shares.sum()
    return shares + 1


def symbols_of(data: np.ndarray, width: int) -> np.ndarray:
    """A stream of bits, some at a time; zeros stand behind its end."""
    if 8 % width == 0:
        return spread_out(data, width, data.size * 8 // width)
    rest = -data.size % width
    return spread_out(np.pad(data, (0, rest)) if rest else data, width, -(-data.size * 8 // width))


def encoded(plan: Plan) -> bytes:
    """The block."""
    coder = package("constriction").stream.stack.AnsCoder()
    coder.encode_reverse(plan.symbols.astype(np.int32), _model(plan.weights))
    words: np.ndarray = coder.get_compressed()
    return bytes([plan.weights.size - 1]) + plan.weights.tobytes() + words.astype("<u4").tobytes()


def decoded(data: np.ndarray, width: int, *, size: int, wide: bool) -> np.ndarray:
    """The inverse of :func:`encoded`.

    Args:
      data, width: of the block.
      size: how many bytes it stands for.
      wide: weights are of two bytes.

    Raises:
      ValueError: it is no such block.
    """
    dtype = _BROAD if wide else _NARROW
    start = 1 + (int(data[0]) + 1) * dtype.itemsize if data.size else 1
    if start > data.size or (data.size - start) % 4:
        raise ValueError(f"has a block of {data.size} bytes, which ends within its table or a word")
    weights, words = data[1:start].copy().view(dtype), data[start:].copy().view("<u4").astype(np.uint32)
    if not 2 <= weights.size <= 1 << width or not weights.any() or (words.size and not words[-1]):
        raise ValueError(f"has a block whose table of {weights.size} symbols of {width} bits or whose words are none")
    count = -(-size * 8 // width)
    coder = package("constriction").stream.stack.AnsCoder(words)
    symbols: np.ndarray = coder.decode(_model(weights), count).astype(np.uint8)
    if not coder.is_empty():
        raise ValueError("has a block with words left over")
    return squeezed(symbols, width)[:size]


def _model(weights: np.ndarray) -> Any:
    """The coder's: it gives each symbol one of 2**24, and the others by these parts, whose sum is what is left."""
    shares = (frequencies(weights) - 1).astype(np.float64)
    return package("constriction").stream.model.Categorical(shares, perfect=False)


def entropy(counts: Sequence[int] | np.ndarray) -> float:
    """Bits of so many symbols of each kind, at best: the empirical entropy of order 0, times their number.

    >>> entropy([2, 2]), entropy([4, 0])
    (4.0, 0.0)
    """
    n = np.asarray(counts, np.float64)
    n = n[n > 0]
    return float(-(n * np.log2(n / n.sum())).sum()) + 0.0
