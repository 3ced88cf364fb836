"""A mask in the fewest bytes: a bit an element, the distances of what it keeps, or the patterns that its groups have.

Distances win where little is kept, from 1 in 9 on. Patterns win where N of M are kept along an axis: of the 16 that
four bits can have, 2 of 4 takes six, so 3 bits. Arrays in, arrays out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxcomp.artifact.masking import Kept, ahead, part_of_stream, stream_of
from jaxcomp.core.bits import CHUNK, packed_size

ESCAPE = 255
"""A distance that says: so many elements that are not kept, and no more."""
_PAYS = 0.75
"""Distances take longer to write and to read than bits: what they must save."""
_SAMPLE = 4096
"""Groups that are looked at before all are."""


class Patterns(NamedTuple):
    """The groups of an array read as rows of ``group`` by ``inner``: group j of a row is column j, first bit lowest.

    Fields:
      group, inner: elements of a group, and how far apart they lie.
      bits: of a code.
      table: the patterns that there are, ascending; codes count them.
    """

    group: int
    inner: int
    bits: int
    table: np.ndarray


def distances(kept: Kept) -> np.ndarray:
    """How many elements lie before each kept one, since the last; behind them, escapes for the rest of the array."""
    out, since, part = [], 0, part_of_stream(kept.bits, 1)
    sizes = [min(CHUNK, kept.size - start) for start in range(0, kept.size, CHUNK)]
    found = ahead(lambda start: np.flatnonzero(part(start, min(start + CHUNK, kept.size))), range(0, kept.size, CHUNK))
    for size, places in zip(sizes, found, strict=True):
        if places.size:
            out.append(_with_escapes(np.diff(places, prepend=-1 - since) - 1))
            since = size - 1 - int(places[-1])
        else:
            since += size
    out.append(np.full(since // ESCAPE, ESCAPE, np.uint8))
    return np.concatenate(out)


def _with_escapes(gaps: np.ndarray) -> np.ndarray:
    escapes = gaps // ESCAPE
    ends = np.cumsum(escapes + 1) - 1
    out = np.full(ends[-1] + 1, ESCAPE, np.uint8)
    out[ends] = gaps % ESCAPE
    return out


def from_distances(stored: np.ndarray, size: int) -> np.ndarray:
    """The bits of :func:`distances`.

    Raises:
      ValueError: they are of another size.
    """
    bits, at = np.zeros(packed_size(size, 1), np.uint8), 0
    for start in range(0, stored.size, CHUNK):
        part = stored[start : start + CHUNK]
        ends = np.cumsum(part + (part != ESCAPE).astype(np.int64)) + at
        at = int(ends[-1])
        if at > size:
            break
        places = ends[part != ESCAPE] - 1
        np.bitwise_or.at(bits, places // 8, np.left_shift(np.uint8(1), (places % 8).astype(np.uint8)))
    if not at <= size < at + ESCAPE:
        raise ValueError(f"distances over {at} elements")
    return bits


def patterns_of(kept: Kept) -> Patterns | None:
    """The patterns in fewer bits than the groups have, over the axis and the size of group where they are fewest."""
    found = [_patterns(kept, axis, group) for axis in range(len(kept.shape)) for group in (4, 8)]
    return min((p for p in found if p is not None), key=lambda p: p.bits / p.group, default=None)


def _patterns(kept: Kept, axis: int, group: int) -> Patterns | None:
    if not kept.size or kept.shape[axis] % group or kept.size < 64 * group:
        return None
    inner = math.prod(kept.shape[axis + 1 :])
    few, seen = -(-_SAMPLE // inner), np.zeros(256, np.int64)
    for rows in _rows(kept, group, inner, step=few):
        seen += np.bincount(rows.reshape(-1), minlength=256)
        width = max(1, int(np.count_nonzero(seen) - 1).bit_length())
        if width >= group:
            return None
    return Patterns(group, inner, width, np.flatnonzero(seen).astype(np.uint8))


def _rows(kept: Kept, group: int, inner: int, *, step: int) -> Iterator[np.ndarray]:
    """The patterns of all groups, some rows of them at a time; the first time few, then as many as a chunk holds."""
    part, done, shifts = part_of_stream(kept.bits, 1), 0, np.arange(group, dtype=np.uint8)[:, None]
    while done < kept.size:
        stop = min(kept.size, done + step * group * inner)
        rows = part(done, stop).reshape(-1, group, inner)
        yield np.bitwise_or.reduce(rows << shifts, axis=1)
        done, step = stop, max(1, CHUNK // (group * inner))


def pattern_codes(kept: Kept, patterns: Patterns) -> Iterator[np.ndarray]:
    """The stream of the groups' codes."""
    code = np.zeros(256, np.uint8)
    code[patterns.table] = np.arange(patterns.table.size)
    step = max(1, CHUNK // (patterns.group * patterns.inner))
    rows = _rows(kept, patterns.group, patterns.inner, step=step)
    return stream_of((code[r].reshape(-1) for r in rows), patterns.bits)


def from_patterns(stream: np.ndarray, size: int, patterns: Patterns) -> np.ndarray:
    """The bits that :func:`pattern_codes` and the table stand for.

    Raises:
      ValueError: a code is none, or they are of another size.
    """
    group, inner, bits, table = patterns
    row = group * inner
    if not 1 <= bits <= 8 or row <= 0 or size % row or stream.size != packed_size(size // group, bits):
        raise ValueError(f"patterns of {group} by {inner} in {stream.size} bytes")
    part, shifts = part_of_stream(stream, bits), np.arange(group, dtype=np.uint8)[:, None]
    step = max(1, CHUNK // row) * inner

    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, size // group, step):
            codes = part(start, min(start + step, size // group))
            if codes.size and codes.max() >= table.size:
                raise ValueError(f"a pattern {codes.max()} of {table.size}")
            yield ((table[codes].reshape(-1, 1, inner) >> shifts) & np.uint8(1)).reshape(-1)

    return np.concatenate([np.empty(0, np.uint8), *stream_of(chunks(), 1)])


@dataclass(frozen=True, eq=False)
class Smallest:
    """A mask's smallest form: distances, or patterns, or neither, which is its bits.

    Fields:
      nbytes: of it.
    """

    nbytes: int
    distances: np.ndarray | None = None
    patterns: Patterns | None = None

    @staticmethod
    def of(kept: Kept) -> Smallest:
        """Of a mask."""
        found, count = [Smallest(len(kept.bits))], kept.count()
        if count + kept.size // (ESCAPE + 1) < _PAYS * len(kept.bits):
            stored = distances(kept)
            found.append(Smallest(int(stored.size / _PAYS), distances=stored))
        p = patterns_of(kept)
        if p is not None:
            found.append(Smallest(packed_size(kept.size // p.group, p.bits) + p.table.size, patterns=p))
        return min(found, key=lambda f: f.nbytes)


def bits_of_form(node: Any, size: int, read: Callable[[Any], np.ndarray], path: str) -> np.ndarray:
    """The bits of a mask that a file says by distances or patterns.

    Args:
      node: what the file says, from JSON.
      size: of the mask.
      read: a tensor by its number.
      path: of the leaf, for messages.

    Raises:
      ValueError: it says what cannot be. The message names the path.
    """
    kind = next(iter(node), None)
    if kind not in ("distances", "patterns"):
        raise ValueError(f"{path!r} has a mask of kind {kind!r}, which is not known here")
    said = node[kind] if kind == "patterns" else [node[kind]]
    wanted = 5 if kind == "patterns" else 1
    if not isinstance(said, list) or len(said) != wanted or not all(type(n) is int for n in said):
        raise ValueError(f"{path!r} has a mask that is said to be {str(node)[:40]}")
    tensors = [read(n) for n in said[-2:]]
    if any(t.dtype != np.uint8 or t.ndim != 1 for t in tensors):
        raise ValueError(f"{path!r} has a mask in tensors that are not bytes")
    try:
        if kind == "distances":
            return from_distances(tensors[0], size)
        group, inner, bits = said[:3]
        return from_patterns(tensors[1], size, Patterns(group, inner, bits, tensors[0]))
    except ValueError as e:
        raise ValueError(f"{path!r} has a mask of {size} elements in {e}") from None
