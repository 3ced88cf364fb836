"""Messages as bytes: a header of fixed size, then the arrays of the message, nothing else."""

from __future__ import annotations

import dataclasses
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.federated.base import Message, bits

_HEADER = struct.Struct("<4sHHII")  # magic, version, unused, checksum of the layout, checksum of the rest
_MAGIC = b"JCUP"
VERSION = 1
HEADER_BYTES = _HEADER.size
"""What precedes the arrays of a message, whatever it holds."""


class WireError(ValueError):
    """Bytes that are not a message of the wanted layout."""


def to_bytes(message: Message) -> bytes:
    """The message as it is sent: ``HEADER_BYTES + bits(message) / 8`` bytes.

    The header says which layout (names, shapes, types and static settings of all fields) the message has, as a checksum
    of 32 bits; the layout itself is known to both sides, for both have the model and the compressor.

    >>> from jaxcomp.federated import sign
    >>> t = sign()
    >>> update = {"w": jnp.array([3.0, -1.0, 2.0, -2.0])}
    >>> data = to_bytes(t.encode((), update)[0])
    >>> len(data) - HEADER_BYTES
    5
    >>> layout = jax.eval_shape(lambda u: t.encode((), u)[0], update)
    >>> t.decode(from_bytes(data, like=layout))["w"]
    Array([ 2., -2.,  2., -2.], dtype=float32)
    """
    payload = b"".join(_little(np.asarray(x)).tobytes() for x in jax.tree.leaves(message))
    return _HEADER.pack(_MAGIC, VERSION, 0, _layout(message), zlib.crc32(payload)) + payload


def from_bytes(data: bytes, *, like: Message) -> Message:
    """The inverse of :func:`to_bytes`.

    Args:
      data: the bytes.
      like: a message of the same layout; ``jax.eval_shape`` of the encoding makes one without arrays.

    Raises:
      WireError: the bytes are truncated, damaged, no message, of a newer version, or of another layout than ``like``.

    >>> from jaxcomp.federated import sign
    >>> message, _ = sign().encode((), {"w": jnp.array([3.0, -1.0])})
    >>> sign().decode(from_bytes(to_bytes(message), like=message))["w"].tolist()
    [2.0, -2.0]
    """
    if len(data) < HEADER_BYTES or data[:4] != _MAGIC:
        raise WireError(f"from_bytes: these {len(data)} bytes are no message of jaxcomp.federated.")
    _, version, _, layout, checksum = _HEADER.unpack_from(data)
    if version != VERSION:
        raise WireError(f"from_bytes: the message has version {version}, this jaxcomp reads {VERSION}.")
    if layout != _layout(like):
        raise WireError(
            "from_bytes: the message has another layout than like=; both sides must use the same model and compressor."
        )
    payload = data[HEADER_BYTES:]
    if 8 * len(payload) != bits(like):
        raise WireError(f"from_bytes: the message has {len(payload)} bytes after its header, wanted {bits(like) // 8}.")
    if zlib.crc32(payload) != checksum:
        raise WireError("from_bytes: the message does not match its checksum; have it sent again.")
    leaves = jax.tree.leaves(like)
    out, start = [], 0
    for x in leaves:
        dtype = jnp.dtype(x.dtype)
        count = int(np.prod(x.shape, dtype=np.int64))
        piece = np.frombuffer(payload, np.uint8, count * dtype.itemsize, start)
        out.append(jnp.asarray(_little(piece.view(dtype)).reshape(x.shape)))
        start += count * dtype.itemsize
    return jax.tree.unflatten(jax.tree.structure(like), out)


def _little(x: np.ndarray) -> np.ndarray:
    """In little-endian order, on whatever machine."""
    return x.byteswap() if np.little_endian is False and x.itemsize > 1 else x


def _layout(message: Message) -> int:
    named, _ = leaves_with_paths(message, is_leaf=is_compressed)
    text = "\n".join(f"{path} {_described(x)}" for path, x in named)
    return zlib.crc32(text.encode())


def _described(x: object) -> str:
    """A field and all that is in it, but the values of arrays."""
    if dataclasses.is_dataclass(x):
        inside = (f"{f.name}={_described(getattr(x, f.name))}" for f in dataclasses.fields(x))
        return f"{type(x).__name__}({', '.join(inside)})"
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{jnp.dtype(x.dtype)}{list(x.shape)}"
    return repr(x)
