"""The file itself, read tensor by tensor: safetensors' header, checksums, and the pieces of a compact file.

The safetensors package reads whole files to memory; here a tensor is read into the memory that jax takes over, and
hashed beside the reading of the next one. Only what is read is checked, and the header always.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import FileIO
from typing import NamedTuple

import numpy as np

from jaxcomp.artifact.coding.blocks import decode
from jaxcomp.artifact.limits import MAX_HEADER, Budget, parsed, shape_of
from jaxcomp.artifact.tensors import BLOCK, DTYPES
from jaxcomp.core.bits import aligned
from jaxcomp.core.types import Json, Shape

FORMAT_VERSION = 4
KEY = "jaxcomp"
DIGEST = b'{"__metadata__":{"sha256":"'
"""How a header begins; its digest is of itself with zeros there."""
ZEROS = "0" * 64
SUM = 8
"""Bytes of a checksum: the first ones of SHA-256."""
EDITED = "does not match its checksum: it was damaged or edited; get the file again"


class Entry(NamedTuple):
    """One tensor of a file: its name, type and shape, where its bytes are, and how they are coded if they are."""

    name: str
    dtype: np.dtype
    shape: Shape
    start: int
    stop: int
    code: Json = None

    @property
    def nbytes(self) -> int:
        """In memory."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


@dataclass(frozen=True)
class Reader:
    """An open file whose header was read and found sound.

    Fields:
      file, size: open for reading, and how many bytes it has.
      header: its bytes.
      metadata: of the header.
      entries: the tensors in the order of their bytes; numbers count them.
      sums: a checksum of each tensor, or nothing where the file has none.
      budget: what may be read.
    """

    file: FileIO
    size: int
    header: bytes
    metadata: Mapping[str, str]
    entries: Sequence[Entry]
    hashing: ThreadPoolExecutor
    budget: Budget
    sums: bytes = b""
    _pending: dict[int, tuple[str, Future[bytes]]] = field(default_factory=dict)

    def read(self, number: int, path: str | None = None) -> np.ndarray:
        """One tensor, in memory of its own. Whether it matches its checksum is known after :meth:`finish`.

        Args:
          number: of the tensor.
          path: of the leaf that it is for, for messages.

        Raises:
          ValueError: there is none of this number, the file ends before it does, or it is more than may be read.
        """
        entry = self.entry(number)
        name = entry.name if path is None else path
        self.budget.take(entry.nbytes, name)
        room = aligned(entry.stop - entry.start)
        self.fill(room, entry.start, name)
        if self.sums and number not in self._pending:
            self._pending[number] = name, self.hashing.submit(sum_of, room)
        if entry.code is None:
            return room.view(entry.dtype).reshape(entry.shape)
        if self.sums:
            self._wait(number)  # a decoder sees only what was written
        return _decoded(entry, room, name)

    def view(self, number: int, mapped: np.ndarray, path: str) -> np.ndarray:
        """The same of the mapped file, without a copy where it is aligned; it is read once, for its checksum."""
        entry = self.entry(number)
        data = mapped[entry.start : entry.stop]
        if data.ctypes.data % entry.dtype.itemsize:
            return self.read(number, path)
        if self.sums:
            self._pending[number] = path, self.hashing.submit(sum_of, data)
        return data.view(entry.dtype).reshape(entry.shape)

    def again(self, limit: int | None) -> Reader:
        """A reader of the same file that has read nothing."""
        return replace(self, budget=Budget(limit, self.size), _pending={})

    def entry(self, number: int) -> Entry:
        """The tensor of this number."""
        if not 0 <= number < len(self.entries):
            raise ValueError(f"the tree refers to tensor {number} of {len(self.entries)}")
        return self.entries[number]

    def finish(self, *, whole: bool) -> None:
        """Waits until what was read is checked, and, of the ``whole`` file, checks what was not read.

        Raises:
          ValueError: a tensor does not match its checksum; names the leaf and the bytes.
        """
        for number in list(self._pending):
            self._wait(number)
        if whole and self.sums:
            read = {*self._pending}
            for number, entry in enumerate(self.entries):
                if number not in read:
                    self._compare(number, entry.name, self.sha256(entry).digest()[:SUM])

    def sha256(self, entry: Entry, sha: hashlib._Hash | None = None) -> hashlib._Hash:
        """Hashes a tensor's bytes in the file, some at a time."""
        sha = hashlib.sha256() if sha is None else sha
        room = np.empty(BLOCK, np.uint8)
        for start in range(entry.start, entry.stop, BLOCK):
            piece = room[: min(BLOCK, entry.stop - start)]
            self.fill(piece, start, entry.name)
            sha.update(piece)
        return sha

    def fill(self, room: np.ndarray, start: int, name: str) -> None:
        """Reads bytes from this place on."""
        left, at = memoryview(room), start
        while len(left):
            got = os.preadv(self.file.fileno(), [left[: 1 << 30]], at)
            if not got:
                raise ValueError(f"is truncated: {name!r} ends {len(left)} bytes early, at byte {at}")
            left, at = left[got:], at + got

    def _wait(self, number: int) -> None:
        name, future = self._pending[number]
        self._compare(number, name, future.result())

    def _compare(self, number: int, name: str, found: bytes) -> None:
        if found != self.sums[number * SUM : (number + 1) * SUM]:
            _, _, _, start, stop, _ = self.entries[number]
            raise ValueError(
                f"does not match its checksum: {name!r}, bytes {start} to {stop}, was damaged or edited; get the file"
                " again"
            )


def sum_of(data: np.ndarray) -> bytes:
    """The checksum of some bytes."""
    return hashlib.sha256(data).digest()[:SUM]


def _decoded(entry: Entry, data: np.ndarray, name: str) -> np.ndarray:
    try:
        found = decode(entry.code, data, entry.dtype, entry.shape)
    except ValueError as e:
        raise ValueError(f"holds {name!r}, whose code in bytes {entry.start} to {entry.stop} {e}") from e
    if (found.dtype, found.shape) != (entry.dtype, entry.shape):
        raise ValueError(f"holds {name!r} of shape {entry.shape}, and its bytes decode to {found.shape}")
    return found


class Header(NamedTuple):
    """What a file's header says, found sound: its bytes, the metadata, and the tensors in the order of their bytes."""

    size: int
    header: bytes
    metadata: Mapping[str, str]
    entries: Sequence[Entry]


def opened(file: FileIO, hashing: ThreadPoolExecutor, limit: int | None = None) -> Reader:
    """Reads a file's header.

    Args:
      file: open, at its beginning.
      hashing: where checksums are made.
      limit: the bytes of memory that what is read may take; None is 1 GiB, or a hundred times the file's size.

    Raises:
      ValueError: as :func:`header_of`.
    """
    found = header_of(file)
    return Reader(file, *found, hashing, Budget(limit, found.size))


def header_of(file: FileIO) -> Header:
    """The header of a safetensors file, ours or another's, that is open at its beginning.

    Raises:
      ValueError: it is no safetensors file, truncated, or its header says what cannot be.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8) or b"", "little")
    if not 2 <= length <= size - 8:
        raise ValueError("is truncated or not a safetensors file")
    if length > MAX_HEADER:
        raise ValueError(f"has a header of {length} bytes, more than the {MAX_HEADER} that there may be")
    header = file.read(length) or b""
    said = parsed(header, "is truncated or not a safetensors file")
    if len(header) != length or not isinstance(said, dict):
        raise ValueError("is truncated or not a safetensors file")
    metadata = said.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("has a damaged header: its metadata are no strings; get the file again")
    entries = sorted((_entry(k, v, 8 + length) for k, v in said.items()), key=lambda e: (e.start, e.stop))
    end = 8 + length
    for e in entries:
        if e.start != end:
            raise ValueError(f"is damaged: {e.name!r} begins at byte {e.start} and not at {end}; get the file again")
        end = e.stop
    if end != size:
        raise ValueError(f"is truncated or damaged: it has {size} bytes, and its header describes {end}")
    return Header(size, header, metadata, entries)


def _entry(name: str, said: Json, first: int) -> Entry:
    try:
        dtype, shape, (start, stop) = said["dtype"], said["shape"], said["data_offsets"]
        whole = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (start, stop))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"is damaged: the header's entry of {name!r} is none; get the file again")
    entry = Entry(name, dtype_of(dtype, name), shape_of(shape, name), first + start, first + stop)
    if stop - start != entry.nbytes:
        raise ValueError(
            f"is damaged: {name!r} of type {dtype} and shape {shape} has {stop - start} bytes; get the file again"
        )
    return entry


def dtype_of(dtype: Json, name: str) -> np.dtype:
    """The type of this name in safetensors."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"holds {name!r} of type {dtype}, which is not known")
    return DTYPES[dtype]
