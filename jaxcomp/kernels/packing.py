"""A weight laid out for the kernels that read it: contracted axis last, codes in bytes in the order of reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxcomp.core.types import DType, Shape
from jaxcomp.quantization.grids import Numbers
from jaxcomp.quantization.numerics.affine import in_type

FIELDS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""The bits of a code as fields that no byte boundary cuts, the low bits first."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "zero"],
    meta_fields=["grid", "length", "group", "block", "dtype"],
)
@dataclass(frozen=True)
class PackedWeight:
    """``dense[..., n, k] == (number(..., n, k) - zero[..., n, k // group]) * scale[..., n, k // group]``.

    A number is what its code says: of an integer grid ``code - 2**(bits - 1)``, with codes from 0 on (numbers of an
    asymmetric grid are lowered by half their range, and so is the zero point); of a table the level that the code, an
    index, names. The codes of 8-bit integers are the numbers themselves, in int8.

    The contracted axis is cut into blocks of ``block`` codes, the last one padded with code 0. A block of b-bit codes
    is ``block * b / 8`` bytes: first all codes' low field, then the next (``FIELDS``: 3 bits are 2 and 1). A field of f
    bits takes ``block * f / 8`` bytes, and byte j holds, the low bits first, those of the codes
    ``j, j + block * f / 8, j + 2 * block * f / 8, …``: so that a byte's shifts are whole runs of codes, and a
    kernel permutes nothing. With 4 bits the low nibbles of a block's bytes are its first half, the high nibbles its
    second.

    Attributes:
      codes: int8 (8 bits) or uint8, of shape ``(*lead, features, ceil(length / block) * block * bits / 8)``.
      scale: ``(*lead, features, ceil(length / group))``, float.
      zero: integers in the scale's type and shape, or None for 0.
      grid: what codes stand for, static.
      length: of the contracted axis, without padding, static.
      group: how many neighbours along it share a scale, static.
      block: how many codes are packed together, a multiple of 8, static.
      dtype: the dense array's type, static.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    grid: Numbers
    length: int
    group: int
    block: int
    dtype: DType

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.grid.bits

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers proportional to the weight, not names of levels."""
        return self.grid.code_range is not None

    @property
    def shape(self) -> Shape:
        """``(*lead, features, length)``."""
        return (*self.codes.shape[:-1], self.length)

    @property
    def computed(self) -> DType:
        """The type of sums."""
        return self.scale.dtype

    @property
    def lead(self) -> int:
        """How many axes weights are stacked along."""
        return self.codes.ndim - 2

    @property
    def padded(self) -> int:
        """The contracted axis with its padding."""
        return -(-self.length // self.block) * self.block

    def numbers(self) -> jax.Array:
        """The numbers in their order, without padding: int8, or of a table in the scale's type."""
        return self.named(unpack_blocks(self.codes, self.bits, self.block)[..., : self.length])

    def named(self, fields: jax.Array) -> jax.Array:
        """The numbers of codes; in the scale's type those of a table, in int8 integers."""
        if not self.is_integer:
            return self.grid.loaded(fields, self.scale.dtype)
        if self.bits == 8:
            return fields
        return fields.astype(jnp.int8) - jnp.int8(2 ** (self.bits - 1))

    def values(self) -> jax.Array:
        """``(numbers - zero) * scale`` in the scale's type."""
        x = self.numbers().astype(self.scale.dtype)
        if self.zero is not None:
            x = x - spread_groups(self.zero, self.group, self.length)
        return x * spread_groups(self.scale, self.group, self.length)

    def dense(self) -> jax.Array:
        """The weight, contracted axis last: the same bits that the leaf it was made of gives."""
        return in_type(self.values(), spread_groups(self.scale, self.group, self.length), self.dtype)


def spread_groups(v: jax.Array, group: int, length: int) -> jax.Array:
    """A value for each group as one for each element of the last axis."""
    if v.shape[-1] == 1:
        return jnp.broadcast_to(v, (*v.shape[:-1], length))
    wide = jnp.broadcast_to(v[..., None], (*v.shape, group))
    return wide.reshape(*v.shape[:-1], -1)[..., :length]


def pack_blocks(codes: jax.Array, bits: int, block: int) -> jax.Array:
    """Raw codes ``(..., length)`` in ``[0, 2**bits)`` as bytes, see :class:`PackedWeight`.

    >>> pack_blocks(jnp.array([1, 2, 3, 4, 5, 6, 7, 8, 9]), 4, 8).tolist()
    [81, 98, 115, 132, 9, 0, 0, 0]
    """
    *lead, length = codes.shape
    padding = [(0, 0)] * len(lead) + [(0, -length % block)]
    blocks = jnp.pad(codes.astype(jnp.uint8), padding).reshape(*lead, -1, block)
    parts, done = [], 0
    for width in FIELDS[bits]:
        field = (blocks >> done) & jnp.uint8(2**width - 1)
        runs = field.reshape(*lead, -1, 8 // width, block * width // 8)
        shifts = jnp.arange(0, 8, width, dtype=jnp.uint8).reshape(*(1,) * (runs.ndim - 2), -1, 1)
        parts.append(jnp.sum(runs << shifts, axis=-2, dtype=jnp.uint8))
        done += width
    return jnp.concatenate(parts, axis=-1).reshape(*lead, -1)


def unpack_blocks(data: jax.Array, bits: int, block: int) -> jax.Array:
    """The inverse of :func:`pack_blocks`, with its padding: uint8, or int8 as it came for 8 bits.

    >>> unpack_blocks(pack_blocks(jnp.arange(8), 3, 8), 3, 8).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if bits == 8:
        return data
    lead = data.shape[:-1]
    blocks = data.reshape(*lead, -1, block * bits // 8)
    codes, at, done = None, 0, 0
    for width in FIELDS[bits]:
        size = block * width // 8
        field = jnp.concatenate(_runs(blocks[..., at : at + size], width), axis=-1)
        codes = field if codes is None else codes | (field << done)
        at, done = at + size, done + width
    assert codes is not None
    return codes.reshape(*lead, -1)


def _runs(part: jax.Array, width: int) -> Sequence[jax.Array]:
    """The runs of codes that the bytes of a field hold."""
    mask = jnp.uint8(2**width - 1)
    return [(part >> jnp.uint8(shift)) & mask for shift in range(0, 8, width)]
