"""A tensor as blocks: some of its bytes at a time, each block in the smallest of a few codings.

The tensor's elements are cut into chunks of 4,200,000 bytes, each into planes of bytes
(:mod:`~jaxcomp.artifact.coding.planes`), and each plane of a chunk is a block: a byte that says how it is coded, the
size of what follows as uint32, and that.

  0         the bytes as they are
  1 to 8    coded by :mod:`~jaxcomp.artifact.coding.ans`, so many bits a symbol, weights of one byte
  17 to 24  the same, 16 more than the bits a symbol, weights of two bytes
  32        a frame of zstd

Zeros may follow the last block, so that a coded tensor never stands for more than 4096 times its bytes: who reads one
knows from its size how much memory it takes at most.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import numpy as np

from jaxcomp.artifact.coding import ans
from jaxcomp.artifact.coding.packages import package
from jaxcomp.artifact.coding.planes import planes_of, put_planes
from jaxcomp.artifact.tensors import Tensor
from jaxcomp.core.bits import aligned
from jaxcomp.core.types import Shape

Coding = Literal["zstd", "ans"]
CODINGS: tuple[Coding, ...] = get_args(Coding)
"""Fast, and smallest."""
CHUNK = 8 * ans.PERIOD * 5000
"""Bytes of a tensor that are coded at once: whole items of any type, and whole codes of any number of bits."""
MAX_RATIO = 4096
_CODEC = "blocks"
_RAW, _WIDE, _ZSTD = 0, 16, 32
_HEAD = 5
_SAMPLE = 1 << 15
"""Bytes of a block that say whether zstd would be better than symbols on their own: whether they repeat."""
_SAID = 16
"""What saying that a tensor is coded takes in a file, about."""


def check(coding: Coding, *, owner: str) -> None:
    """That a coding is known, and what it wants is installed; errors begin with the ``owner``.

    Raises:
      ValueError: there is no such coding.
      ImportError: a package is missing. The message names the extra.
    """
    if coding not in CODINGS:
        raise ValueError(f"{owner}: coding must be None, {' or '.join(map(repr, CODINGS))}, got {coding!r}.")
    for name in ("zstandard",) if coding == "zstd" else ("zstandard", "constriction"):
        package(name)


def encode(tensor: Tensor, coding: Coding) -> tuple[dict[str, Any] | None, Iterator[np.ndarray]]:
    """What :func:`decode` must be told of a coded tensor, and its bytes; None, and the tensor's own bytes, where coding
    does not pay.

    The bytes are made as they are asked for, and the tensor's once. The result depends on nothing but those. Of a long
    tensor its first chunk says whether coding pays.

    Args:
      tensor: of any type.
      coding: "zstd" is fast, "ans" small.

    Raises:
      ImportError: what codes is not installed. The message names the extra.
    """
    chunks = _chunks(tensor)
    beginning = next(chunks, np.empty(0, tensor.dtype))
    first = _coded_planes(beginning, coding)
    if len(first) + _SAID >= min(tensor.nbytes, CHUNK):
        return None, (chunk.view(np.uint8) for chunk in itertools.chain([beginning], chunks))
    coded = itertools.chain([first], (_coded_planes(chunk, coding) for chunk in chunks))
    return {"codec": _CODEC}, _as_arrays(coded, -(-tensor.nbytes // MAX_RATIO))


def _coded_planes(chunk: np.ndarray, coding: Coding) -> bytes:
    return b"".join(_coded(plane, coding) for plane in planes_of(chunk) if plane.size)


def _as_arrays(pieces: Iterable[bytes], least: int) -> Iterator[np.ndarray]:
    """Of the pieces, and zeros up to the ``least`` number of bytes."""
    size = 0
    for piece in pieces:
        size += len(piece)
        yield np.frombuffer(piece, np.uint8)
    if size < least:
        yield np.zeros(least - size, np.uint8)


def _chunks(tensor: Tensor) -> Iterator[np.ndarray]:
    """The tensor's elements, so many bytes at a time."""
    room, held = np.empty(CHUNK, np.uint8), 0
    for piece in tensor.pieces():
        while piece.size:
            part = piece[: CHUNK - held]
            room[held : held + part.size] = part
            held, piece = held + part.size, piece[part.size :]
            if held == CHUNK:
                yield room.view(tensor.dtype)
                held = 0
    if held:
        yield room[:held].view(tensor.dtype)


def _coded(plane: np.ndarray, coding: Coding) -> bytes:
    """One block."""
    plane = np.ascontiguousarray(plane)
    found = [(_RAW, plane.tobytes())]
    if coding == "ans":
        plan = ans.planned(plane)
        if plan.size < plane.size:
            found.append((plan.width + _WIDE * (plan.weights.itemsize - 1), ans.encoded(plan)))
    best = len(found[-1][1])
    if coding == "zstd" or len(_zstd(plane[:_SAMPLE])) * plane.size < best * plane[:_SAMPLE].size:
        found.append((_ZSTD, _zstd(plane)))
    kind, data = min(found, key=lambda f: len(f[1]))
    return bytes([kind]) + len(data).to_bytes(4, "little") + data


def _zstd(plane: np.ndarray) -> bytes:
    frame: bytes = package("zstandard").ZstdCompressor(write_content_size=True).compress(plane)
    return frame


def decode(said: Any, data: np.ndarray, dtype: np.dtype, shape: Shape) -> np.ndarray:
    """The tensor that :func:`encode` coded, in memory that jax can take over.

    At most 4096 times the bytes of ``data`` are taken; all that ``said`` and ``data`` claim is checked.

    Args:
      said: what the file says of its code, from JSON.
      data: the coded bytes, uint8, flat.
      dtype, shape: of the tensor, as the file claims them.

    Raises:
      ValueError: they are not what :func:`encode` gives, or what decodes is not installed. The message goes on after
        "it": "has a block of 3 bytes ...".
    """
    codec = said.get("codec") if isinstance(said, dict) else said
    if codec != _CODEC:
        raise ValueError(f"is coded as {str(codec)[:40]!r}, which is not known here; use the jaxcomp that wrote it")
    size = math.prod(shape) * dtype.itemsize
    if size > MAX_RATIO * data.size:
        raise ValueError(f"claims {size} bytes, more than {MAX_RATIO} times the {data.size} that it is coded in")
    out, done, at = aligned(size), 0, 0
    while done < size:
        chunk = out[done : done + CHUNK].view(dtype)
        planes = []
        for _ in range(dtype.itemsize):
            plane, at = _block(data, at, chunk.size)
            planes.append(plane)
        put_planes(chunk, planes)
        done += chunk.nbytes
    if data[at:].any():
        raise ValueError(f"has bytes behind its last block, from {at} on")
    return out.view(dtype).reshape(shape)


def _block(data: np.ndarray, at: int, size: int) -> tuple[np.ndarray, int]:
    """The bytes of the block that begins there, and where the next one does."""
    kind, length = (
        int(data[at]) if at < data.size else _RAW,
        int.from_bytes(data[at + 1 : at + _HEAD].tobytes(), "little"),
    )
    stop = at + _HEAD + length
    if stop > data.size:
        raise ValueError(f"is cut off: the block at byte {at} ends at {stop}, and there are {data.size}")
    inside = data[at + _HEAD : stop]
    try:
        return _decoded(kind, inside, size), stop
    except ImportError as e:
        raise ValueError(f"cannot be decoded: {e}") from e
    except ValueError as e:
        raise ValueError(f"{e} (the block at byte {at})") from None


def _decoded(kind: int, inside: np.ndarray, size: int) -> np.ndarray:
    width = kind % _WIDE
    if kind == _ZSTD:
        return _from_zstd(inside, size)
    if kind == _RAW and inside.size == size:
        return inside
    if kind < _ZSTD and 1 <= width <= 8:
        return ans.decoded(inside, width, size=size, wide=kind > _WIDE)
    raise ValueError(f"has a block of kind {kind} and {inside.size} bytes for {size}, which is none")


def _from_zstd(inside: np.ndarray, size: int) -> np.ndarray:
    zstd = package("zstandard")
    try:
        if zstd.frame_content_size(inside) != size:
            raise ValueError(f"has a frame of zstd that is not said to hold {size} bytes")
        out = zstd.ZstdDecompressor(max_window_size=2 * CHUNK).decompress(inside, allow_extra_data=False)
    except zstd.ZstdError as e:
        raise ValueError(f"has a damaged frame of zstd ({e})") from None
    if len(out) != size:
        raise ValueError(f"has a frame of zstd that holds {len(out)} bytes instead of {size}")
    return np.frombuffer(out, np.uint8)
