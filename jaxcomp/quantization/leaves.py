"""Quantized leaves: codes with a scale."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.bits import CHUNK, as_bytes, in_host_memory
from jaxcomp.core.errors import count_known
from jaxcomp.core.gradients import masked_through
from jaxcomp.core.leaves import CompressedLeaf, dense, method_of, pack
from jaxcomp.core.packed import Packed, compressed_leaf, unpacked
from jaxcomp.core.types import DType, Leaf, Shape
from jaxcomp.core.words import block_words, on_hand, repeated
from jaxcomp.quantization.grids import Grid, Numbers
from jaxcomp.quantization.numerics.affine import block_absmax, in_type, no_weights, spread


class How(TypedDict, total=False):
    """Of rounding, as :meth:`~jaxcomp.quantization.grids.Grid.encode` has it."""

    noise: jax.Array | None
    clipped: bool


@compressed_leaf(meta=("grid", "dense_dtype"))
class Quantized(CompressedLeaf):
    """``dense == expand((numbers - zero_point) * scale)``, where expand is the grid's, or nothing for most grids.

    The numbers are the codes themselves for an integer grid, and the levels that the codes name for a table. Of a grid
    without a zero a block of zeros has numbers 0 while training, and packed the scale 0. What lies beyond the largest
    number of the dense type is that number.

    Fields:
      codes: the numbers, of the dense shape, in a float type while training (so that the straight-through gradient can
        flow); after ``pack`` the codes, in an integer type, or bit-packed where the width is not 8.
      scale: of the dense rank; each dimension divides the dense one, and an entry serves a block. An array, or a leaf
        that stands for one: scales on a grid of their own.
      zero_point: integers in the scale's type and shape, or None for a symmetric grid.
      grid: the spec, static.
      dense_dtype: the dense array's type, static.
    """

    codes: jax.Array | Packed
    scale: Leaf
    zero_point: jax.Array | None
    grid: Numbers
    dense_dtype: DType

    made_by: ClassVar[str] = "quantize"
    coded: ClassVar[str] = "codes"

    @property
    def method(self) -> str:  # noqa: D102
        return f"Quantized {self.grid.label}"

    def details(self) -> tuple[str, ...]:  # noqa: D102
        said = [block_words(self.shape, tuple(self.scale.shape))]
        if isinstance(self.scale, Quantized):
            said.append(f"{self.scale.grid.label} scales")
        return tuple(said) if self.packed else (*said, "not packed")

    def zeros_at(self) -> np.ndarray | None:  # noqa: D102
        codes = self.codes.on_host() if isinstance(self.codes, Packed) else on_hand(self.codes)
        scale, zero = on_hand(self.scale), on_hand(np.zeros(()) if self.zero_point is None else self.zero_point)
        if codes is None or scale is None or zero is None:
            return None
        none: np.ndarray = repeated(scale, self.shape) == 0
        if self.zero_point is not None:
            none |= codes == repeated(zero, self.shape)
        elif not self.packed or self.grid.has_zero:
            none |= codes == (self.grid.code_of_zero if self.packed else 0)
        return none

    @property
    def code_bits(self) -> int:  # noqa: D102
        return self.grid.bits

    def code_of_zero(self, shape: Shape) -> int | jax.Array:  # noqa: D102
        if self.zero_point is None:
            return self.grid.code_of_zero
        return jnp.broadcast_to(spread(self.zero_point, shape), shape)

    @property
    def shape(self) -> Shape:  # noqa: D102
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> DType:  # noqa: D102
        return self.dense_dtype

    @property
    def packed(self) -> bool:
        """Whether the codes are stored ones."""
        return isinstance(self.codes, Packed) or not jnp.issubdtype(self.codes.dtype, jnp.floating)

    def numbers(self) -> jax.Array:
        """The numbers, in whatever type holds them: ``dense == expand((numbers - zero_point) * scale)``."""
        codes = self.codes.wide() if isinstance(self.codes, Packed) else self.codes
        return self.grid.loaded(codes, dense(self.scale).dtype) if self.packed else codes

    def materialize(self) -> jax.Array:
        """Dequantizes, in the scale's type, then casts to the dense type."""
        scale = dense(self.scale)
        return in_type(self.grid.decode(self.numbers(), scale, self.zero_point), scale, self.dense_dtype)

    def pack(self) -> Quantized:
        """Codes in int8 or uint8 for 8 bits, else ``bits`` bits each."""
        if self.packed:
            return self
        self._check_numbers()
        numbers, scale = (unpacked(self.codes), self.scale) if self.grid.has_zero else self._by_scale()
        stored, low = self.grid.stored(numbers)
        codes = as_bytes(stored, signed=low < 0) if self.grid.bits == 8 else Packed.of(stored, self.grid.bits, low)
        return replace(self, codes=codes, scale=pack(scale))

    def _by_scale(self) -> tuple[jax.Array, jax.Array]:
        """Numbers and scales where a number of the grid times a scale of 0 says that a block is of zeros."""
        numbers, scale = unpacked(self.codes), dense(self.scale)
        nothing = block_absmax(numbers, scale.shape) == 0
        some = self.grid.of_zero
        # Times a negative number 0 would be -0.
        return jnp.where(spread(nothing, self.shape), some, numbers), jnp.where(nothing, 0 * some, scale)

    def _check_numbers(self) -> None:
        """Raises ValueError where concrete values are NaN, which integers cannot say."""
        if _holds_nan(unpacked(self.codes)) or _holds_nan(dense(self.scale)):
            raise ValueError("was quantized from values that are NaN; mend the training that made them")


def _holds_nan(x: jax.Array) -> bool:
    host = in_host_memory(x)
    if host is None:
        return bool(count_known(jnp.isnan, x))
    flat = host.reshape(-1)
    return any(np.isnan(flat[start : start + CHUNK]).any() for start in range(0, flat.size, CHUNK))


def encoded(w: jax.Array, grid: Grid, scale: jax.Array, zero_point: jax.Array | None, **how: Unpack[How]) -> jax.Array:
    """The numbers of a :class:`Quantized` leaf in training: those of the grid, and 0 for blocks of zeros.

    Args:
      w: the weights.
      grid: of the numbers.
      scale, zero_point, how: as :meth:`~jaxcomp.quantization.grids.Grid.encode` has them.
    """
    numbers = grid.encode(w, scale, zero_point, **how)
    if grid.has_zero:
        return numbers
    return masked_through(numbers, spread(~no_weights(w, scale.shape), w.shape))


def scales_and_zero(grid: Grid, top: jax.Array, bottom: jax.Array | None) -> tuple[Leaf, jax.Array | None]:
    """The scale of a range as a leaf keeps it, in codes where the scales lie on a grid of their own; the zero point."""
    if grid.scale_grid is None:
        return grid.scale_of(top, bottom)
    part, outer = grid.scale_grid.scales_of(top, grid.elements)
    return Quantized(part, outer, None, grid.scale_grid, part.dtype), None


@compressed_leaf(meta=("dense_shape",))
class Folded(CompressedLeaf):
    """``dense == rows.reshape(-1)[:size].reshape(dense_shape)``: the leaf as rows of equal length, the last one padded.

    Fields:
      rows: a leaf of shape ``(ceil(size / length), length)``.
      dense_shape: static.
    """

    rows: Leaf
    dense_shape: Shape

    made_by: ClassVar[str] = "quantize"

    @property
    def method(self) -> str:  # noqa: D102
        return method_of(self.rows)

    def details(self) -> tuple[str, ...]:  # noqa: D102
        return (f"buckets of {self.rows.shape[-1]}",)

    @property
    def shape(self) -> Shape:  # noqa: D102
        return self.dense_shape

    @property
    def dtype(self) -> DType:  # noqa: D102
        return self.rows.dtype

    def materialize(self) -> jax.Array:
        """Unfolds the rows."""
        return dense(self.rows).reshape(-1)[: self.size].reshape(self.dense_shape)

    def pack(self) -> Folded:
        """The rows packed."""
        return replace(self, rows=pack(self.rows))
