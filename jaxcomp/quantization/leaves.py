"""Quantized leaves: codes with a scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxcomp.core.errors import count_known
from jaxcomp.core.leaves import CompressedLeaf, Packed, compressed_leaf, dense, pack, unpacked
from jaxcomp.quantization.level_grids import LevelGrid
from jaxcomp.quantization.microscaling import Grid
from jaxcomp.quantization.numerics.affine import spread
from jaxcomp.quantization.numerics.coding import decode, loaded_codes, stored_codes


@compressed_leaf(meta=("grid", "dense_dtype"))
class Quantized(CompressedLeaf):
    """``dense == expand((numbers - zero_point) * scale)``, where expand is the grid's, or nothing for most grids.

    The numbers are the codes themselves for an integer grid, and the levels that the codes name for a table.

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
    scale: Any
    zero_point: jax.Array | None
    grid: Grid
    dense_dtype: Any

    made_by: ClassVar[str] = "quantize"
    coded: ClassVar[str] = "codes"

    @property
    def code_bits(self) -> int:  # noqa: D102
        return self.grid.bits

    def code_of_zero(self, shape: tuple[int, ...]) -> Any:  # noqa: D102
        if isinstance(self.grid, LevelGrid):
            return int(stored_codes(jnp.zeros((), jnp.float32), self.grid)[0]) if 0.0 in self.grid.levels else 0
        return 0 if self.zero_point is None else jnp.broadcast_to(spread(self.zero_point, shape), shape)

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> Any:  # noqa: D102
        return self.dense_dtype

    @property
    def packed(self) -> bool:
        """Whether the codes are stored ones."""
        return isinstance(self.codes, Packed) or not jnp.issubdtype(self.codes.dtype, jnp.floating)

    def numbers(self) -> jax.Array:
        """The numbers, in whatever type holds them: ``dense == expand((numbers - zero_point) * scale)``."""
        codes = self.codes.wide() if isinstance(self.codes, Packed) else self.codes
        return loaded_codes(codes, self.grid, dense(self.scale).dtype) if self.packed else codes

    def materialize(self) -> jax.Array:
        """Dequantizes, in the scale's type, then casts to the dense type."""
        return decode(self.numbers(), dense(self.scale), self.zero_point, self.grid).astype(self.dense_dtype)

    def pack(self) -> Quantized:
        """Codes in int8 or uint8 for 8 bits, else ``bits`` bits each."""
        if self.packed:
            return self
        self._check_numbers()
        stored, low = stored_codes(unpacked(self.codes), self.grid)
        narrow: Any = jnp.int8 if low < 0 else jnp.uint8
        codes = stored.astype(narrow) if self.grid.bits == 8 else Packed.of(stored, self.grid.bits, low)
        return replace(self, codes=codes, scale=pack(self.scale))

    def _check_numbers(self) -> None:
        """Raises ValueError where concrete values are NaN, which integers cannot say."""
        if count_known(jnp.isnan, self.codes) or count_known(jnp.isnan, dense(self.scale)):
            raise ValueError("was quantized from values that are NaN; mend the training that made them")


@compressed_leaf(meta=("dense_shape",))
class Folded(CompressedLeaf):
    """``dense == rows.reshape(-1)[:size].reshape(dense_shape)``: the leaf as rows of equal length, the last one padded.

    Fields:
      rows: a leaf of shape ``(ceil(size / length), length)``.
      dense_shape: static.
    """

    rows: Any
    dense_shape: tuple[int, ...]

    made_by: ClassVar[str] = "quantize"

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.dense_shape

    @property
    def dtype(self) -> Any:  # noqa: D102
        return self.rows.dtype

    def materialize(self) -> jax.Array:
        """Unfolds the rows."""
        return dense(self.rows).reshape(-1)[: self.size].reshape(self.dense_shape)

    def pack(self) -> Folded:
        """The rows packed."""
        return replace(self, rows=pack(self.rows))
