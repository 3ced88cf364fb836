"""Files of version 4, taken apart and put together by hand: any JSON and bytes with the right checksums."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from dataclasses import dataclass, replace
from typing import Any


def checksum(data: bytes) -> bytes:
    """Of one tensor or directory."""
    return hashlib.sha256(data).digest()[:8]


def sealed(said: Any, text: str, room: int = 0) -> bytes:
    """A header with its digest in it, and its length before it."""
    head = {"__metadata__": {"sha256": "0" * 64, "jaxcomp": text}, **said}
    header = json.dumps(head, separators=(",", ":")).encode().ljust(room)
    header = header.replace(b"0" * 64, hashlib.sha256(header).hexdigest().encode(), 1)
    return len(header).to_bytes(8, "little") + header


@dataclass(frozen=True)
class Plain:
    """What a plain file says.

    Fields:
      entries: those of safetensors, without the metadata.
      said: what the entry "jaxcomp" holds.
      data: the bytes behind the header.
    """

    entries: Any
    said: Any
    data: bytes

    @staticmethod
    def of(file: bytes) -> Plain:
        """Takes a file apart."""
        length = int.from_bytes(file[:8], "little")
        entries = json.loads(file[8 : 8 + length])
        return Plain(entries, json.loads(entries.pop("__metadata__")["jaxcomp"]), file[8 + length :])

    def file(self) -> bytes:
        """Puts it together; checksums are of what the entries say as far as they say anything."""
        spans = [e.get("data_offsets") if isinstance(e, dict) else None for e in self.entries.values()]
        good = sorted(s for s in spans if isinstance(s, list) and len(s) == 2 and all(type(n) is int for n in s))
        sums = b"".join(checksum(self.data[max(a, 0) : max(b, 0)]) for a, b in good)
        said = self.said
        if isinstance(said, dict) and isinstance(said.get("sums"), str):
            said = {**said, "sums": base64.b64encode(sums).decode()}
        return sealed(self.entries, json.dumps(said)) + self.data


@dataclass(frozen=True)
class Compact:
    """What a compact file says.

    Fields:
      said: its directory.
      data: the bytes of its pieces.
      about: fields of the header's entry "jaxcomp" that are to be others.
    """

    said: Any
    data: bytes
    about: Any = None

    @staticmethod
    def of(file: bytes) -> Compact:
        """Takes a file apart."""
        outer = Plain.of(file)
        size = outer.said["directory"][0]
        return Compact(json.loads(zlib.decompress(outer.data[-size:])), outer.data[:-size])

    def summed(self) -> Compact:
        """With the checksums that its pieces have, as far as their sizes can be told."""
        sizes = {"F32": 4, "F64": 8, "I32": 4, "I64": 8, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
        at, sums = 0, b""
        try:
            for dtype, shape, *more in self.said["pieces"]:
                nbytes = sizes.get(dtype, 1)
                for n in shape:
                    nbytes *= n
                nbytes = more[0] if more else nbytes
                sums += checksum(self.data[at : at + nbytes])
                at += nbytes
        except (KeyError, TypeError, ValueError, OverflowError, MemoryError):
            return self
        return replace(self, said={**self.said, "sums": base64.b64encode(sums).decode()})

    def file(self) -> bytes:
        """Puts it together."""
        text = self.said if isinstance(self.said, bytes) else json.dumps(self.said).encode()
        deflated = zlib.compress(text)
        sums = base64.b64encode(checksum(deflated)).decode()
        about = {"version": 4, "sums": sums, "directory": [len(deflated), len(text)], **(self.about or {})}
        size = len(self.data) + len(deflated)
        entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        return sealed({"jaxcomp": entry}, json.dumps(about), 256) + self.data + deflated
