"""What version 4 adds to a safetensors file: checksums, and a directory of pieces in compact files."""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from dataclasses import replace

import numpy as np

from jaxcomp.artifact.container import DIGEST, EDITED, SUM, ZEROS, Entry, Reader, dtype_of, sum_of
from jaxcomp.artifact.limits import MAX_HEADER, parsed, shape_of
from jaxcomp.core.types import Json


def checked(reader: Reader, described: dict[str, Json]) -> tuple[Reader, dict[str, Json]]:
    """A file of version 4 whose header, and directory if there is one, match their checksums, and what it says.

    Raises:
      ValueError: they do not, or say what cannot be.
    """
    at = len(DIGEST)
    without = reader.header[:at] + ZEROS.encode() + reader.header[at + 64 :]
    if (
        not reader.header.startswith(DIGEST)
        or hashlib.sha256(without).hexdigest().encode() != reader.header[at : at + 64]
    ):
        raise ValueError(EDITED)
    reader = replace(reader, sums=_sums(described, len(reader.entries)))
    return _compact(reader, described["directory"]) if "directory" in described else (reader, described)


def _sums(described: dict[str, Json], count: int) -> bytes:
    try:
        sums = base64.b64decode(described["sums"], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error):
        sums = b""
    if len(sums) != count * SUM:
        raise ValueError(f"has {len(sums) // SUM} checksums of {count} tensors; get the file again")
    return sums


def _compact(reader: Reader, sizes: Json) -> tuple[Reader, dict[str, Json]]:
    """A reader of the pieces of a file's one tensor, and what its directory says."""
    good = isinstance(sizes, list) and len(sizes) == 2 and all(type(n) is int and 0 < n <= MAX_HEADER for n in sizes)
    if not good or len(reader.entries) != 1 or sizes[0] > reader.entries[0].stop - reader.entries[0].start:
        raise ValueError("has a damaged header; get the file again")
    (whole,), (deflated, size) = reader.entries, sizes
    data = np.empty(deflated, np.uint8)
    reader.fill(data, whole.stop - deflated, "its directory")
    if sum_of(data) != reader.sums:
        raise ValueError(f"{EDITED} (its directory, bytes {whole.stop - deflated} to {whole.stop})")
    described = parsed(_inflated(data, size), "has a damaged directory; get the file again")
    if not isinstance(described, dict) or not isinstance(described.get("pieces"), list) or "tree" not in described:
        raise ValueError("has a damaged directory; get the file again")
    entries, start = [], whole.start
    for number, said in enumerate(described["pieces"]):
        entries.append(_piece(f"piece {number}", said, start))
        start = entries[-1].stop
    if start != whole.stop - deflated:
        raise ValueError(f"is damaged: its pieces end at byte {start} and not at {whole.stop - deflated}")
    return replace(reader, entries=entries, sums=_sums(described, len(entries))), described


def _inflated(data: np.ndarray, size: int) -> bytes:
    inflating = zlib.decompressobj()
    try:
        text = inflating.decompress(data.tobytes(), size + 1)
    except zlib.error:
        text = b""
    if len(text) != size or not inflating.eof or inflating.unused_data:
        raise ValueError(f"has a directory that does not inflate to the {size} bytes that it should")
    return text


def _piece(name: str, said: Json, start: int) -> Entry:
    good = isinstance(said, list) and len(said) in (2, 4)
    if not good or not all(type(n) is int and n >= 0 for n in said[2:3]):
        raise ValueError(f"is damaged: {name} of its directory is none; get the file again")
    entry = Entry(name, dtype_of(said[0], name), shape_of(said[1], name), start, start, said[3] if said[2:] else None)
    if said[2:] and not isinstance(entry.code, dict):
        raise ValueError(f"is damaged: {name} of its directory has no code; get the file again")
    return entry._replace(stop=start + (said[2] if said[2:] else entry.nbytes))
