"""The file itself: a safetensors file, written and read tensor by tensor.

The safetensors package reads and writes whole files from and to memory; here a tensor's bytes are made, hashed and
written block by block, and read into the memory that jax takes over. Files can be opened by that package and the other
way round.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from typing import NamedTuple

import numpy as np

from jaxcomp.artifact.disk import write_all
from jaxcomp.artifact.statics import Json
from jaxcomp.artifact.tensors import BLOCK, DTYPES, MAX_DIMS, NAMES, Tensor
from jaxcomp.core.bits import aligned
from jaxcomp.core.types import Shape

KEY = "jaxcomp"
_DIGEST = '{"__metadata__":{"sha256":"'
"""How a header of version 3 begins; its digest is of itself with zeros there, and of the digests of the tensors."""
_ZEROS = "0" * 64
MAX_HEADER = 100_000_000
"""Bytes of a header; the limit of safetensors too."""


class Entry(NamedTuple):
    """One tensor of a file: its name, type and shape, and where its bytes are in the file."""

    name: str
    dtype: np.dtype
    shape: Shape
    start: int
    stop: int

    def digest(self) -> hashlib._Hash:
        """A hash of what the header says of it; its bytes are to follow."""
        return hashlib.sha256(f"{self.name} {NAMES[self.dtype]} {list(self.shape)}\n".encode())


def write(
    f: FileIO,
    tensors: Sequence[Tensor],
    text: Callable[[Mapping[Tensor, int]], str],
    *,
    advance: Callable[[int], None] = lambda written: None,
) -> int:
    """Writes a file; returns its size in bytes.

    Args:
      f: at its beginning.
      tensors: those of the tree.
      text: of the entry "jaxcomp", from the tensors' numbers.
      advance: told how many bytes of tensors were written, again and again.
    """
    header, entries = beginning(tensors, text)
    write_all(f, len(header).to_bytes(8, "little") + header)
    sha = hashlib.sha256(header)
    with ThreadPoolExecutor(1) as hashing:  # beside the writing of the same block
        for t, entry in entries:
            one = entry.digest()
            for piece in t.pieces():
                hashed = hashing.submit(one.update, piece)
                write_all(f, memoryview(piece))
                hashed.result()
                advance(piece.nbytes)
            sha.update(one.digest())
    f.seek(8 + len(_DIGEST))
    write_all(f, sha.hexdigest().encode())
    return 8 + len(header) + sum(t.nbytes for t in tensors)


def beginning(
    tensors: Sequence[Tensor], text: Callable[[Mapping[Tensor, int]], str]
) -> tuple[bytes, list[tuple[Tensor, Entry]]]:
    """The header of a file without its digest, and the tensors in the order of their bytes; see :func:`write`."""
    ordered = sorted(tensors, key=lambda t: -t.dtype.itemsize)  # so that each is aligned to its items
    described, entries, start = text({t: n for n, t in enumerate(ordered)}), [], 0
    for t in ordered:
        entries.append(Entry(t.name, t.dtype, t.shape, start, start + t.nbytes))
        start += t.nbytes
    return _header(described, entries), list(zip(ordered, entries, strict=True))


def _header(described: str, entries: Sequence[Entry]) -> bytes:
    said: dict[str, Json] = {"__metadata__": {"sha256": _ZEROS, KEY: described}}
    for e in entries:
        said[e.name] = {"dtype": NAMES[e.dtype], "shape": list(e.shape), "data_offsets": [e.start, e.stop]}
    header = json.dumps(said, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


@dataclass(frozen=True)
class Reader:
    """An open file whose header was read and found sound.

    Fields:
      file, size: open for reading, and how many bytes it has.
      header: its bytes.
      metadata: of the header.
      entries: the tensors in the order of their bytes; numbers count them.
    """

    file: FileIO
    size: int
    header: bytes
    metadata: Mapping[str, str]
    entries: Sequence[Entry]
    _hashing: ThreadPoolExecutor
    _digests: dict[int, Future[bytes]] = field(default_factory=dict)

    def read(self, number: int) -> np.ndarray:
        """One tensor, in memory of its own.

        Raises:
          ValueError: there is none of this number, or the file ends before it does.
        """
        if not 0 <= number < len(self.entries):
            raise ValueError(f"the tree refers to tensor {number} of {len(self.entries)}")
        entry = self.entries[number]
        room = aligned(entry.stop - entry.start)
        self._fill(room, entry)
        if number not in self._digests:
            self._digests[number] = self._hashing.submit(_digest_of, entry, room)
        return room.view(entry.dtype).reshape(entry.shape)

    def matches_digest(self) -> bool:
        """Whether nothing was changed since the file was written. Reads the tensors that were not read yet."""
        if not self.header.startswith(_DIGEST.encode()):
            return False
        at = len(_DIGEST)
        wanted = self.header[at : at + 64]
        sha = hashlib.sha256(self.header[:at] + _ZEROS.encode() + self.header[at + 64 :])
        for number, entry in enumerate(self.entries):
            known = self._digests.get(number)
            sha.update(self._digest_in_pieces(entry) if known is None else known.result())
        return sha.hexdigest().encode() == wanted

    def _fill(self, room: np.ndarray, entry: Entry, start: int = 0) -> None:
        left, at = memoryview(room), entry.start + start
        while len(left):
            got = os.preadv(self.file.fileno(), [left[: 1 << 30]], at)
            if not got:
                raise ValueError(f"is truncated: {entry.name!r} ends {len(left)} bytes early")
            left, at = left[got:], at + got

    def _digest_in_pieces(self, entry: Entry) -> bytes:
        sha, room = entry.digest(), np.empty(BLOCK, np.uint8)
        for start in range(0, entry.stop - entry.start, BLOCK):
            piece = room[: min(BLOCK, entry.stop - entry.start - start)]
            self._fill(piece, entry, start)
            sha.update(piece)
        return sha.digest()


def _digest_of(entry: Entry, data: np.ndarray) -> bytes:
    sha = entry.digest()
    sha.update(data)
    return sha.digest()


def opened(file: FileIO, hashing: ThreadPoolExecutor) -> Reader:
    """Reads a file's header.

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
    return Reader(file, size, header, metadata, entries, hashing)


def parsed(text: bytes | str, otherwise: str) -> Json:
    """JSON, or ValueError with these words."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested deeper than any file that jaxcomp.save writes") from None
    except ValueError:
        raise ValueError(otherwise) from None


def _entry(name: str, said: Json, first: int) -> Entry:
    try:
        dtype, shape, (start, stop) = said["dtype"], said["shape"], said["data_offsets"]
        whole = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"is damaged: the header's entry of {name!r} is none; get the file again")
    if dtype not in DTYPES:
        raise ValueError(f"holds {name!r} of type {dtype}, which is not known")
    if len(shape) > MAX_DIMS:
        raise ValueError(f"holds {name!r} of {len(shape)} dimensions; an array has at most {MAX_DIMS}")
    size = DTYPES[dtype].itemsize
    for n in shape:
        size *= n
    if stop - start != size:
        raise ValueError(
            f"is damaged: {name!r} of type {dtype} and shape {shape} has {stop - start} bytes; get the file again"
        )
    return Entry(name, DTYPES[dtype], tuple(shape), first + start, first + stop)
