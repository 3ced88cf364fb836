"""Writing the file: in the plain layout each tensor is one of safetensors; in the compact one all are pieces of one.

Bytes are made, hashed and written block by block. Checksums are put in their places at the end.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from jaxcomp.artifact.container import DIGEST, FORMAT_VERSION, KEY, SUM, ZEROS
from jaxcomp.artifact.disk import Sink, write_all
from jaxcomp.artifact.tensors import NAMES, Tensor
from jaxcomp.core.types import Json

_RESERVED = 256
"""Bytes of the header of a compact file, of which all but the numbers are known before the pieces are written."""

Coder = Callable[[Tensor], tuple[Json, Iterable[np.ndarray]]]
"""What is said of a tensor's code, None where it is stored as it is; and the bytes that are stored."""
Advance = Callable[[int], None]
"""Told how many bytes were written, again and again."""


class Layout(Protocol):
    """What writes a file."""

    def __call__(self, f: Sink, tensors: Sequence[Tensor], said: Mapping[str, Json], advance: Advance) -> int:
        """As :func:`write_plain`."""


def by_alignment(tensors: Sequence[Tensor]) -> list[Tensor]:
    """In the order of a file: those of larger items first, so that each is aligned to its own."""
    return sorted(tensors, key=lambda t: -t.dtype.itemsize)


def write_plain(f: Sink, tensors: Sequence[Tensor], said: Mapping[str, Json], advance: Advance) -> int:
    """Writes a file of which every tensor can be opened by any reader of safetensors; returns its size.

    Args:
      f: at its beginning.
      tensors: those of the tree.
      said: the tree and the metadata; tensors in it stand for their numbers.
      advance: told of the tensors' bytes.
    """
    ordered = by_alignment(tensors)
    header, at = plain_header(ordered, said)
    write_all(f, len(header).to_bytes(8, "little") + header)
    with ThreadPoolExecutor(1) as hashing:  # beside the writing of the same block
        sums = b"".join(_copy(f, t.pieces(), hashing, advance)[1] for t in ordered)
    text = base64.b64encode(sums)
    header = header[:at] + text + header[at + len(text) :]
    f.seek(8)
    write_all(f, sealed(header))
    return 8 + len(header) + sum(t.nbytes for t in tensors)


def plain_header(ordered: Sequence[Tensor], said: Mapping[str, Json]) -> tuple[bytes, int]:
    """The header of a plain file with no checksum in it yet, and where in it those of the tensors begin."""
    room = "A" * (-(-len(ordered) * SUM // 3) * 4)
    described = {"version": FORMAT_VERSION, "sums": room, **said}
    header: dict[str, Json] = {"__metadata__": {"sha256": ZEROS, KEY: _text(described, ordered)}}
    start = 0
    for t in ordered:
        stop = start + t.nbytes
        header[t.name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, stop]}
        start = stop
    data = json.dumps(header, separators=(",", ":")).encode()
    return data + b" " * (-len(data) % 8), data.index(b'sums\\":\\"') + len(b'sums\\":\\"')


def compact_layout(code: Coder) -> Layout:
    """The layout in which the tensors are pieces of one, coded where it pays, and the tree is deflated behind them.

    No size must be known before it is written, and a small tensor takes little more than its bytes.
    """

    def write(f: Sink, tensors: Sequence[Tensor], said: Mapping[str, Json], advance: Advance) -> int:
        write_all(f, bytes(8 + _RESERVED))
        ordered, pieces, sums, size = by_alignment(tensors), [], [], 0
        with ThreadPoolExecutor(1) as hashing:
            for t in ordered:
                coded, data = code(t)
                written, one = _copy(f, data, hashing, advance)
                shape = [NAMES[t.dtype], list(t.shape)]
                pieces.append(shape if coded is None else [*shape, written, coded])
                sums.append(one)
                size += written
        described = {"sums": base64.b64encode(b"".join(sums)).decode(), "pieces": pieces, **said}
        directory = _text(described, ordered).encode()
        deflated = zlib.compress(directory, 9)
        write_all(f, deflated)
        f.seek(0)
        header = _compact_header(size + len(deflated), [len(deflated), len(directory)], deflated)
        write_all(f, len(header).to_bytes(8, "little") + sealed(header))
        return 8 + len(header) + size + len(deflated)

    return write


def _compact_header(size: int, directory: list[int], deflated: bytes) -> bytes:
    of_directory = base64.b64encode(hashlib.sha256(deflated).digest()[:SUM]).decode()
    described = {"version": FORMAT_VERSION, "sums": of_directory, "directory": directory}
    said = {
        "__metadata__": {"sha256": ZEROS, KEY: _text(described, [])},
        KEY: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
    }
    header = json.dumps(said, separators=(",", ":")).encode()
    assert len(header) <= _RESERVED
    return header.ljust(_RESERVED)


def sealed(header: bytes) -> bytes:
    """A header with the digest of itself in the place of zeros."""
    assert header.startswith(DIGEST + ZEROS.encode())
    return DIGEST + hashlib.sha256(header).hexdigest().encode() + header[len(DIGEST) + 64 :]


def _text(described: Mapping[str, Json], ordered: Sequence[Tensor]) -> str:
    numbers = {t: n for n, t in enumerate(ordered)}
    return json.dumps(described, separators=(",", ":"), default=numbers.__getitem__)


def _copy(f: Sink, blocks: Iterable[np.ndarray], hashing: ThreadPoolExecutor, advance: Advance) -> tuple[int, bytes]:
    """Writes the blocks; how many bytes they are, and their checksum."""
    sha, written = hashlib.sha256(), 0
    for block in blocks:
        hashed = hashing.submit(sha.update, block)
        write_all(f, memoryview(block))
        hashed.result()
        written += block.nbytes
        advance(block.nbytes)
    return written, sha.digest()[:SUM]
