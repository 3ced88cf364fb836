"""Elements that a bitmap keeps, taken out of a stream of codes or an array and put back. Arrays in, arrays out.

All by chunks of the bitmap, so that what is unpacked on the way stays small, and by numpy, which compiles nothing.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from jaxcomp.core.bits import CHUNK, aligned, packed_size, spread_out, squeezed
from jaxcomp.core.types import Shape

T = TypeVar("T")
Part = Callable[[int, int], np.ndarray]
"""The elements from one place to another, flat."""


@dataclass(frozen=True)
class Kept:
    """Which elements of an array of some shape are kept, a bit each, the first one lowest."""

    bits: np.ndarray
    shape: Shape

    @staticmethod
    def of(mask: np.ndarray, mask_shape: Shape, shape: Shape) -> Kept:
        """From the bits of a mask that broadcasts to the shape."""
        if mask_shape == shape:
            return Kept(mask, shape)
        small = np.unpackbits(mask, count=_size(mask_shape), bitorder="little").reshape(mask_shape)
        return Kept(np.packbits(np.broadcast_to(small, shape), bitorder="little"), shape)

    @property
    def size(self) -> int:
        """How many elements there are."""
        return _size(self.shape)

    def count(self) -> int:
        """How many are kept."""
        whole, rest = divmod(self.size, 8)
        last = int(self.bits[whole]) & ((1 << rest) - 1) if rest else 0
        return (
            sum(
                int(np.bitwise_count(self.bits[i : min(i + CHUNK, whole)]).sum(dtype=np.int64))
                for i in range(0, whole, CHUNK)
            )
            + last.bit_count()
        )

    def take(self, part: Part) -> Iterator[np.ndarray]:
        """The kept elements, chunk by chunk."""
        return ahead(lambda start: part(start, self._stop(start)).take(self._places(start)), range(0, self.size, CHUNK))

    def put(self, stored: Part, rest: Part, *, bits: int = 0) -> Iterator[np.ndarray]:
        """The inverse of :meth:`take`: chunks of all elements, where those that are not kept are ``rest``.

        Args:
          stored, rest: the kept ones, one after the other; and the others, at their places.
          bits: where it is not 0, chunks are of the stream of codes of so many bits.
        """

        def one(chunk: tuple[int, int]) -> np.ndarray:
            start, done = chunk
            places = self._places(start)
            out = rest(start, self._stop(start)).copy()
            out[places] = stored(done, done + len(places))
            return squeezed(out, bits) if bits else out

        return ahead(one, self._chunks())

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Where each chunk begins, and how many are kept before it."""
        done = 0
        for start in range(0, self.size, CHUNK):
            yield start, done
            done += Kept(self.bits[start // 8 :], (self._stop(start) - start,)).count()

    def _stop(self, start: int) -> int:
        return min(start + CHUNK, self.size)

    def _places(self, start: int) -> np.ndarray:
        stop = self._stop(start)
        mask = np.unpackbits(self.bits[start // 8 : packed_size(stop, 1)], count=stop - start, bitorder="little")
        return _nonzero(mask.view(bool))


def _nonzero(mask: np.ndarray) -> np.ndarray:
    """``np.flatnonzero``, which up to a tenth of ones takes a loop with a branch for each of them (numpy 2.5).

    From 6% on that is the slower way, twice so at a tenth: more ones behind the end make it take the other.
    """
    count = int(np.count_nonzero(mask))
    if not 0.06 * mask.size < count <= 0.1 * mask.size:
        return np.flatnonzero(mask)
    return np.flatnonzero(np.concatenate([mask, np.ones(mask.size // 8, bool)]))[:count]


def ahead(fn: Callable[[T], np.ndarray], items: Iterable[T]) -> Iterator[np.ndarray]:
    """``map(fn, items)`` by as many threads as there are cores, with a few results ready before they are asked for.

    The first is made alone: who wants only the beginning pays for nothing else.
    """
    items, cores = iter(items), os.cpu_count() or 1
    yield from map(fn, itertools.islice(items, None if cores < 2 else 1))
    second = list(itertools.islice(items, 1))
    if not second:
        return
    with ThreadPoolExecutor(cores) as pool:
        ready: deque[Future[np.ndarray]] = deque()
        for item in itertools.chain(second, items):
            ready.append(pool.submit(fn, item))
            if len(ready) > 2 * cores:
                yield ready.popleft().result()
        while ready:
            yield ready.popleft().result()


def bitmap(mask: Part, size: int) -> Iterator[np.ndarray]:
    """The bits of booleans, chunk by chunk."""
    for start in range(0, size, CHUNK):
        yield np.packbits(mask(start, min(start + CHUNK, size)), bitorder="little")


def part_of(x: np.ndarray) -> Part:
    """The elements of an array in C order."""
    flat = x.reshape(-1)
    return lambda start, stop: flat[start:stop]


def part_of_stream(data: np.ndarray, bits: int) -> Part:
    """The codes of a stream, from a whole byte on."""

    def part(start: int, stop: int) -> np.ndarray:
        first = start // 8 * 8
        codes = spread_out(data[first * bits // 8 : packed_size(stop, bits)], bits, stop - first)
        return codes[start - first :]

    return part


def constant(value: int, dtype: np.dtype) -> Part:
    """One number everywhere."""
    whole = np.full(CHUNK, value, dtype)
    return lambda start, stop: whole[: stop - start]


def stream_of(chunks: Iterable[np.ndarray], bits: int) -> Iterator[np.ndarray]:
    """Chunks of codes as one stream of bits."""
    left = np.empty(0, np.uint8)
    for chunk in chunks:
        codes = np.concatenate([left, chunk]) if left.size else chunk
        whole = codes.size // 8 * 8
        left = codes[whole:]
        if whole:
            yield squeezed(codes[:whole], bits)
    if left.size:
        yield squeezed(left, bits)


def gathered(chunks: Iterable[np.ndarray], dtype: np.dtype, size: int) -> np.ndarray:
    """The chunks as one array, where jax can take it over."""
    out = aligned(size * dtype.itemsize).view(dtype)
    done = 0
    for chunk in chunks:
        out[done : done + chunk.size] = chunk
        done += chunk.size
    return out


def nonzero_bits(x: np.ndarray) -> np.ndarray:
    """The bits of an array as unsigned integers: where they are not 0, -0.0 counts, so that it survives."""
    return x.view(f"<u{x.itemsize}")


def _size(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))
