"""Arrays of a file, from the JSON that says how they are stored: as they are, by their mask, or in a stream of bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import jax
import numpy as np

from jaxcomp.artifact.limits import Budget, shape_of
from jaxcomp.artifact.masking import Kept, constant, gathered, part_of
from jaxcomp.artifact.masks import bits_of_form
from jaxcomp.artifact.statics import OTHERS, dtype_named
from jaxcomp.core.bits import aligned, bits_of, packed_size, spread_out
from jaxcomp.core.types import Json, Leaf, Shape


class Source(Protocol):
    """Where tensors are read from."""

    @property
    def budget(self) -> Budget:
        """What the tree may take in memory."""

    def read(self, number: int, path: str) -> np.ndarray:
        """One tensor for the leaf at this path, in memory that nobody else writes to."""


@dataclass(frozen=True)
class Arrays:
    """Those of one tree.

    Fields:
      source: of the tensors.
      stay: in the host's memory, for who puts them on devices leaf by leaf.
    """

    source: Source
    stay: bool
    _made: dict[int, Leaf] = field(default_factory=dict)

    def array(self, number: int, path: str) -> Leaf:
        """A tensor as an array of jax; the same one for all that refer to it."""
        if self.stay:
            return self.read(number, path)  # kept for no other leaf: a tree may be larger than the host's memory
        if number not in self._made:
            self._made[number] = self.put(self.read(number, path))
        return self._made[number]

    def read(self, number: Json, path: str) -> np.ndarray:
        """A tensor in the host's memory."""
        return self.source.read(number_of(number), path)

    def put(self, x: np.ndarray) -> Leaf:
        """Handed over to jax without a copy where that is possible; jax would narrow a type that it does not have."""
        stays = self.stay or jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype
        return x if stays else jax.device_put(x)

    def host(self, node: Json, path: str) -> np.ndarray:
        """An array in the host's memory."""
        if type(node) is int:
            return self.read(node, path)
        if "typed" in node:
            name, shape, number = node["typed"]
            dtype, shape = dtype_named(name), shape_of(shape, path)
            self.source.budget.take(math.prod(shape) * dtype.itemsize, path)
            return _typed(dtype, shape, self.read(number, path), path)
        shape, mask, number = node["sparse"]
        return self.spread(self.read(number, path), self.kept(mask, shape_of(shape, path), path), path)

    def spread(self, stored: np.ndarray, kept: Kept, path: str) -> np.ndarray:
        """The entries at the kept places, zeros elsewhere."""
        if stored.shape != (kept.count(),):
            raise ValueError(f"{path!r} has entries of shape {stored.shape} where its mask keeps {kept.count()}")
        self.source.budget.take(kept.size * stored.itemsize, path)
        chunks = kept.put(part_of(stored), constant(0, stored.dtype))
        return gathered(chunks, stored.dtype, kept.size).reshape(kept.shape)

    def kept(self, node: Json, shape: Shape, path: str) -> Kept:
        """A mask of this shape."""
        size = math.prod(shape)
        if isinstance(node, dict):
            self.source.budget.take(packed_size(size, 1), path)
            return Kept(bits_of_form(node, size, lambda number: self.read(number, path), path), shape)
        bits = self.read(node, path)
        if bits.dtype != np.uint8 or bits.shape != (packed_size(size, 1),):
            raise ValueError(f"{path!r} has a mask of shape {shape} in {bits.nbytes} bytes of type {bits.dtype}")
        return Kept(bits, shape)


def _typed(dtype: np.dtype, shape: Shape, stored: np.ndarray, path: str) -> np.ndarray:
    """An array of a type that safetensors does not have."""
    if dtype not in OTHERS:
        raise ValueError(f"{path!r} is said to be of type {dtype}, which files hold as it is")
    size = math.prod(shape)
    if dtype.kind == "c":
        wanted, parts = (2 * size,), np.dtype(f"<f{dtype.itemsize // 2}")
    else:
        wanted, parts = (packed_size(size, bits_of(dtype)),), np.dtype(np.uint8)
    if stored.shape != wanted or stored.dtype != parts:
        raise ValueError(f"{path!r} of type {dtype} and shape {shape} has {stored.nbytes} bytes")
    if dtype.kind == "c":
        return stored.view(dtype).reshape(shape)
    bits = bits_of(dtype)
    out = aligned(size)
    out[:] = spread_out(stored, bits, size)
    return out.view(dtype).reshape(shape)


def number_of(number: Json) -> int:
    """A tensor's number, from JSON.

    Raises:
      ValueError: it is none.
    """
    if type(number) is not int:
        raise ValueError(f"{str(number)[:40]!r} stands where a tensor's number is wanted")
    return number
