"""A weight in panels: features side by side, as a processor's sums of products of integers lie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxcomp.core.types import DType, Shape
from jaxcomp.kernels.packing import FIELDS, pack_blocks, unpack_blocks
from jaxcomp.quantization.grids import Numbers
from jaxcomp.quantization.numerics.affine import in_type

FEATURES = 16
"""Of a panel."""
BYTES = 32
"""Of a vector."""
DEEP = 4
"""Neighbouring channels of a feature that lie side by side: as many bytes as processors sum up in 32 bits."""


def width(bits: int) -> int:
    """Bits that a code takes: a byte from 5 on, for what is cut out of three fields costs more than it saves."""
    return bits if bits < 5 else 8


def unit(bits: int) -> int:
    """Channels of a block: the fewest, of 4 at least, whose every field fills vectors.

    >>> [unit(bits) for bits in (2, 3, 4, 8)]
    [8, 16, 4, 4]
    """
    return max(DEEP, BYTES * 8 // math.gcd(*FIELDS[width(bits)]) // FEATURES)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "totals"],
    meta_fields=["grid", "taps", "channels", "features", "dtype"],
)
@dataclass(frozen=True)
class PanelWeight:
    """``dense[..., n, k] == number(..., n, k) * scale[..., n, 0]``; along ``k`` elements of the kernel before channels.

    The weight of a dot is a kernel of one element, whose channels are what is summed over.

    Sixteen features are a panel, the last one filled up with features of zeros. A panel is its elements one after
    another, each of so many channels that they fill blocks, zeros behind those that there are: a block is
    :func:`unit` channels of 16 features, in the order ``(channels / 4, features, 4)``, and packed as a block of
    :class:`~jaxcomp.kernels.packing.PackedWeight` is.

    Attributes:
      codes: uint8 ``(*lead, panels, bytes)``; of 5 bits and more the bytes of int8 numbers, else codes from 0 on.
      scale: ``(*lead, features, 1)``, float.
      totals: int32 ``(*lead, features)``, the sum of the numbers of each feature.
      grid: what codes stand for, static.
      taps: elements of the kernel, static.
      channels: of the images, static.
      features: static.
      dtype: the dense array's type, static.
    """

    codes: jax.Array
    scale: jax.Array
    totals: jax.Array
    grid: Numbers
    taps: int
    channels: int
    features: int
    dtype: DType

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.grid.bits

    @property
    def length(self) -> int:
        """What a feature sums over."""
        return self.taps * self.channels

    @property
    def shape(self) -> Shape:
        """``(*lead, features, length)``."""
        return (*self.codes.shape[:-2], self.features, self.length)

    @property
    def computed(self) -> DType:
        """The type of what sums are scaled to."""
        return self.scale.dtype

    @property
    def lead(self) -> int:
        """How many axes weights are stacked along."""
        return self.codes.ndim - 2

    @property
    def filled(self) -> int:
        """Channels with those that fill the last block."""
        return -(-self.channels // unit(self.bits)) * unit(self.bits)

    def numbers(self) -> jax.Array:
        """``(*lead, features, length)``, int8."""
        if width(self.bits) == 8:
            x = jax.lax.bitcast_convert_type(self.codes, jnp.int8)
        else:
            raw = unpack_blocks(self.codes, self.bits, unit(self.bits) * FEATURES)
            x = raw.astype(jnp.int8) - jnp.int8(2 ** (self.bits - 1))
        lead = self.codes.shape[:-2]
        x = x.reshape(*lead, -1, self.taps, self.filled // DEEP, FEATURES, DEEP)
        x = jnp.moveaxis(x, -2, -4).reshape(*lead, -1, self.taps, self.filled)
        return x[..., : self.features, :, : self.channels].reshape(self.shape)

    def values(self) -> jax.Array:
        """``numbers * scale`` in the scale's type."""
        return self.numbers().astype(self.scale.dtype) * self.scale

    def dense(self) -> jax.Array:
        """The weight: the same bits that the leaf it was made of gives."""
        return in_type(self.values(), self.scale, self.dtype)


def panel_codes(numbers: jax.Array, bits: int, channels: int) -> jax.Array:
    """The codes of a :class:`PanelWeight` of int8 numbers ``(*lead, features, length)``."""
    *lead, features, length = numbers.shape
    u = unit(bits)
    x = numbers.reshape(*lead, features, length // channels, channels)
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, -features % FEATURES), (0, 0), (0, -channels % u)])
    x = x.reshape(*lead, -1, FEATURES, length // channels, x.shape[-1] // DEEP, DEEP)
    x = jnp.moveaxis(x, -4, -2).reshape(*lead, x.shape[-5], -1)
    if width(bits) == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint8)
    raw = (x.astype(jnp.int16) + 2 ** (bits - 1)).astype(jnp.uint8)
    return pack_blocks(raw, bits, u * FEATURES)
