"""The file itself: a header of metadata and of what each tensor is, then the tensors' bytes.

Written and read here, not by the package gguf: its reader takes a damaged header for any exception or a loop without an
end, and its writer opens files of its own, which a stop in between leaves half-written.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from typing import NamedTuple

import numpy as np

from jaxcomp.artifact.disk import write_all
from jaxcomp.artifact.tensors import blocks_of
from jaxcomp.core.types import Shape

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
MAX_NAME, MAX_DIMS = 63, 4
"""Of a tensor: bytes of its name and axes, as llama.cpp has them."""
MAX_HEADER = 1 << 27
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_OF_NUMPY = {np.dtype(code): kind for kind, code in _SCALARS.items()}
_STRING, _ARRAY = 8, 9

Value = bool | int | float | str | Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str]


class Info(NamedTuple):
    """A tensor: its name, its shape (the slowest axis first), the number of its type, and where its bytes begin."""

    name: str
    shape: Shape
    kind: int
    offset: int


def value_bytes(value: object) -> bytes:
    """The type and the bytes of a value of the metadata: an integer is uint32 where it fits, else int32 or a wider one.

    Raises:
      TypeError: the format has nothing for it.

    >>> value_bytes(7), value_bytes(np.uint8(7)), value_bytes("ab")[:5]
    (b'\\x04\\x00\\x00\\x00\\x07\\x00\\x00\\x00', b'\\x00\\x00\\x00\\x00\\x07', b'\\x08\\x00\\x00\\x00\\x02')
    """
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + string_bytes(value)
    if isinstance(value, list | tuple | np.ndarray):
        items = list(value)
        kind = _kind(items[0], items) if items else 5
        body = b"".join(string_bytes(x) if kind == _STRING else struct.pack(f"<{_SCALARS[kind]}", x) for x in items)
        return struct.pack("<IIQ", _ARRAY, kind, len(items)) + body
    kind = _kind(value, [value])
    return struct.pack(f"<I{_SCALARS[kind]}", kind, value)


def _kind(value: object, beside: Sequence[object]) -> int:
    kinds = {type(x) for x in beside}
    if isinstance(value, np.generic) and value.dtype in _OF_NUMPY and len(kinds) == 1:
        return _OF_NUMPY[value.dtype]
    if kinds == {str}:
        return _STRING
    if kinds == {bool}:
        return 7
    if kinds == {float} or kinds == {float, int}:
        return 6
    if kinds == {int}:
        whole = [x for x in beside if isinstance(x, int)]
        low, high = min(whole), max(whole)
        fitting = ((4, 0, 2**32), (5, -(2**31), 2**31), (11, -(2**63), 2**63), (10, 0, 2**64))
        found = next((kind for kind, least, most in fitting if least <= low and high < most), None)
        if found is not None:
            return found
    raise TypeError(f"{value!r} is no boolean, number, string or list of one of these")


def string_bytes(text: str) -> bytes:
    """The length in eight bytes, then UTF-8."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def padded(size: int) -> int:
    """``size`` rounded up to where the next tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def write(f: FileIO, metadata: Mapping[str, object], tensors: Sequence[tuple[str, Shape, int, np.ndarray]]) -> int:
    """Writes a file; returns its bytes.

    Args:
      f: at its beginning.
      metadata: by key.
      tensors: name, shape, number of the type, and the bytes of each.
    """
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    head += [string_bytes(key) + value_bytes(value) for key, value in metadata.items()]
    at = 0
    for name, shape, kind, data in tensors:
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head.append(string_bytes(name) + dims + struct.pack("<IQ", kind, at))
        at += padded(data.nbytes)
    header = b"".join(head)
    write_all(f, header + b"\0" * (padded(len(header)) - len(header)))
    for *_, data in tensors:
        for block in blocks_of(data):
            write_all(f, memoryview(block))
        write_all(f, b"\0" * (padded(data.nbytes) - data.nbytes))
    return padded(len(header)) + at


@dataclass
class Header:
    """What a file says before its tensors."""

    metadata: dict[str, object]
    tensors: list[Info]
    start: int

    def read(self, f: FileIO, info: Info, size: int) -> np.ndarray:
        """The ``size`` bytes of a tensor."""
        data = np.empty(size, np.uint8)
        left = memoryview(data)
        f.seek(self.start + info.offset)
        while len(left):
            got = f.readinto(left[: 1 << 30])
            if not got:
                raise ValueError(f"is truncated: {info.name!r} ends {len(left)} bytes early")
            left = left[got:]
        return data


class _Cursor:
    """Reads a header's parts, never beyond the file's end, and never more than a header may have."""

    def __init__(self, f: FileIO, size: int) -> None:
        self.at, self._f, self._size = 0, f, size
        self._room, self._from = b"", 0

    def left(self) -> int:
        """Bytes of the file behind here."""
        return self._size - self.at

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.left():
            raise ValueError(f"is truncated or damaged: {count} bytes are wanted at byte {self.at} of {self._size}")
        if self.at + count > MAX_HEADER:
            raise ValueError(f"has a header of more than the {MAX_HEADER} bytes that there may be")
        start = self.at - self._from
        if start + count > len(self._room):
            self._f.seek(self.at)
            self._room, self._from, start = self._more(max(count, 1 << 16)), self.at, 0
        self.at += count
        if start + count > len(self._room):
            raise ValueError(f"is truncated at byte {self.at}")
        return self._room[start : start + count]

    def _more(self, count: int) -> bytes:
        return self._f.read(count) or b""

    def number(self, code: str) -> int:
        """One number of this struct code."""
        found: int = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        return found

    def text(self) -> str:
        """A string."""
        at = self.at
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise ValueError(f"is damaged: the string at byte {at} is no UTF-8") from None

    def value(self, kind: int) -> object:
        """A value of the metadata."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise ValueError(f"is damaged: the metadata at byte {self.at} are of type {kind}, which is not known")
        return self.number("B") != 0 if kind == 7 else self.number(_SCALARS[kind])

    def _array(self) -> list[str] | np.ndarray:
        at, kind, count = self.at, self.number("I"), self.number("Q")
        if kind != _STRING and kind not in _SCALARS:
            raise ValueError(f"is damaged: the list at byte {at} is of type {kind}, which no list may hold")
        size = 8 if kind == _STRING else struct.calcsize(f"<{_SCALARS[kind]}")
        if count * size > self.left():
            raise ValueError(f"is truncated or damaged: the list at byte {at} has {count} entries")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        dtype = np.dtype("u1" if kind == 7 else _SCALARS[kind]).newbyteorder("<")
        found = np.frombuffer(self.take(count * size), dtype)
        return found != 0 if kind == 7 else found


def header(f: FileIO, size: int) -> Header:
    """Reads what a file says before its tensors.

    Raises:
      ValueError: it is no GGUF file, truncated, or says what cannot be; the message goes after the file's name.
    """
    cursor = _Cursor(f, size)
    if size < 24 or cursor.take(4) != MAGIC:
        raise ValueError("is no GGUF file")
    version = cursor.number("I")
    if version not in (2, 3):
        swapped = version & 0xFFFF == 0
        raise ValueError(
            "is a big-endian file; convert it" if swapped else f"has GGUF version {version}; read are 2 and 3"
        )
    count, keys = cursor.number("Q"), cursor.number("Q")
    if count * 24 + keys * 13 > cursor.left():
        raise ValueError(f"is truncated or damaged: it announces {count} tensors and {keys} entries of metadata")
    metadata: dict[str, object] = {}
    for _ in range(keys):
        at, key = cursor.at, cursor.text()
        if key in metadata:
            raise ValueError(f"is damaged: {key!r} at byte {at} is in its metadata twice")
        metadata[key] = cursor.value(cursor.number("I"))
    tensors = [_info(cursor) for _ in range(count)]
    align = metadata.get("general.alignment", ALIGNMENT)
    if type(align) is not int or not 8 <= align <= 1 << 20 or align & (align - 1):
        raise ValueError(f"is damaged: its alignment is {align!r}")
    if len({t.name for t in tensors}) < count:
        raise ValueError("is damaged: two of its tensors have one name")
    return Header(metadata, tensors, -(-cursor.at // align) * align)


def _info(cursor: _Cursor) -> Info:
    at, name, axes = cursor.at, cursor.text(), cursor.number("I")
    if axes > MAX_DIMS:
        raise ValueError(f"is damaged: {name!r} at byte {at} has {axes} axes; there are at most {MAX_DIMS}")
    shape = tuple(reversed([cursor.number("Q") for _ in range(axes)]))
    if any(n >= 1 << 48 for n in shape):
        raise ValueError(f"is damaged: {name!r} at byte {at} is of shape {shape}")
    return Info(name, shape, cursor.number("I"), cursor.number("Q"))
