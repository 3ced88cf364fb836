"""What a file holds: named tensors whose bytes are made when they are written, each of equal ones once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jaxcomp.core.types import Shape

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""The types of safetensors that arrays are of."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 1 << 22
"""Bytes of an array that are hashed and written at once."""
_BEGINNING = 1 << 16


@dataclass(frozen=True, eq=False)
class Tensor:
    """An array in a file; ``blocks`` makes its elements, flat and in order, each time it is called."""

    name: str
    dtype: np.dtype
    shape: Shape
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """How many bytes the blocks are together."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    def pieces(self) -> Iterator[np.ndarray]:
        """The bytes, some at a time."""
        return (np.ascontiguousarray(block).view(np.uint8) for block in self.blocks())

    def beginning(self) -> bytes:
        """A hash of some of the first bytes."""
        return hashlib.sha256(next(self.pieces(), np.empty(0, np.uint8))[:_BEGINNING]).digest()

    def sha256(self) -> bytes:
        """Of all bytes."""
        sha = hashlib.sha256()
        for piece in self.pieces():
            sha.update(piece)
        return sha.digest()


def blocks_of(x: np.ndarray) -> Iterator[np.ndarray]:
    """The elements of an array in C order, as bytes."""
    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, BLOCK):
        yield flat[start : start + BLOCK]


class Tensors:
    """Those of one file, gathered."""

    def __init__(self, keep: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """``keep`` takes over each new tensor, whose blocks may need memory that is wanted for the next one."""
        self._keep = keep
        self.all: list[Tensor] = []
        self._names = {"", "__metadata__"}  # an empty name, and the one that the format keeps for itself
        self._alike: dict[tuple[np.dtype, Shape, bytes], list[Tensor]] = {}

    def add_array(self, name: str, x: np.ndarray) -> Tensor:
        """Adds all of an array."""
        return self.add(name, x.dtype, tuple(x.shape), lambda: blocks_of(x))

    def add(self, name: str, dtype: np.dtype, shape: Shape, blocks: Callable[[], Iterator[np.ndarray]]) -> Tensor:
        """Adds a tensor, or gives the one that is there already with the same type, shape and bits.

        Its name is the wanted one, with a number behind it where another tensor has that.
        """
        new = Tensor(self._free(name), dtype, shape, blocks)
        alike = self._alike.setdefault((dtype, shape, new.beginning()), [])
        if alike:
            digest = new.sha256()
            for old in alike:
                if old.sha256() == digest:
                    return old
        new = self._keep(new)
        alike.append(new)
        self.all.append(new)
        self._names.add(new.name)
        return new

    def _free(self, name: str) -> str:
        wanted = name.encode("utf-8", "backslashreplace").decode() or "tree"
        found, n = wanted, 1
        while found in self._names:
            found, n = f"{wanted}~{n + 1}", n + 1
        return found
