"""Vectors as codes, each with a scale of its own: what a cache keeps of keys and values."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxcomp.core.bits import compute_dtype
from jaxcomp.core.leaves import CompressedLeaf
from jaxcomp.core.packed import compressed_leaf
from jaxcomp.core.types import DType, Shape
from jaxcomp.kernels.packing import FIELDS, pack_blocks, unpack_blocks
from jaxcomp.kernels.runs import Run, runs_of
from jaxcomp.quantization.grids import Grid
from jaxcomp.quantization.numerics.affine import dequantize, in_type
from jaxcomp.quantization.numerics.ranges import absmax_range


@compressed_leaf(meta=("grid", "width", "dense_dtype"))
class CodedRows(CompressedLeaf):
    """``dense[..., :] == (number[..., :] - zero[..., 0]) * scale[..., 0]``: one scale a vector along the last axis.

    No static field knows how many vectors there are, so that a scan may step over them, ``vmap`` map over them, and a
    slice of each field is a leaf again.

    Fields:
      codes: int8 for 8-bit integers of a symmetric grid, else uint8: the lowest number of a grid is code 0, minifloats
        are their bit patterns, and codes of fewer bits are packed along the last axis, those of a vector's first half
        in the low nibbles (:func:`~jaxcomp.kernels.packing.pack_blocks`): ``(..., bytes of a vector)``.
      scale: ``(..., 1)``, in the type of computing. What is not finite makes its vector NaN, and then its numbers are
        the zero point, never NaN themselves: what is masked stays out of sums.
      zero: uint8 of the scale's shape, or None for 0.
      grid: of the numbers, static.
      width: of a vector, static.
      dense_dtype: static.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    grid: Grid
    width: int
    dense_dtype: DType

    made_by: ClassVar[str] = "kv_cache"

    @property
    def method(self) -> str:  # noqa: D102
        return f"CodedRows {self.grid.label}"

    @property
    def shape(self) -> Shape:  # noqa: D102
        return (*self.codes.shape[:-1], self.width)

    @property
    def dtype(self) -> DType:  # noqa: D102
        return self.dense_dtype

    def numbers(self) -> jax.Array:
        """The numbers that codes stand for: int8 or int16, or of a table, a minifloat's too, in the scale's type."""
        low = _lowest(self.grid)
        if self.grid.bits == 8 and low:
            return self.codes
        raw = self.codes
        if self.grid.bits < 8:
            raw = unpack_blocks(raw, self.grid.bits, _block(self.grid, self.width))[..., : self.width]
        if self.grid.code_range is None:
            return self.grid.loaded(raw, self.scale.dtype)
        return raw.astype(jnp.int8) + jnp.int8(low) if self.grid.bits < 8 else raw.astype(jnp.int16)

    @property
    def lowest(self) -> int:
        """What code 0 stands for; of a table it is a name."""
        return _lowest(self.grid)

    def runs(self, length: int) -> tuple[Run, ...] | None:
        """How the codes of a vector are read, in runs of so many; None where they do not lie in such."""
        if self.width % length:
            return None
        return runs_of(self.grid.bits, _block(self.grid, self.width), length)

    def offsets(self) -> jax.Array | None:
        """The zero points in the scale's type."""
        return None if self.zero is None else self.zero.astype(self.scale.dtype)

    def materialize(self) -> jax.Array:
        """All vectors, in the scale's type, then cast."""
        return in_type(dequantize(self.numbers(), self.scale, self.offsets()), self.scale, self.dense_dtype)

    def pack(self) -> CodedRows:
        """Itself: codes are packed from the start."""
        return self

    def of(self, x: jax.Array) -> CodedRows:
        """Vectors ``(..., width)`` in codes like these, through which no gradient flows."""
        return _encoded(self, x)


def blank_rows(shape: Shape, grid: Grid, dtype: DType) -> CodedRows:
    """Vectors of zeros, of the dense ``shape``."""
    rows, width, scale_type = shape[:-1], shape[-1], compute_dtype(jnp.dtype(dtype))
    block = _block(grid, width)
    kind = jnp.int8 if grid.bits == 8 and _lowest(grid) else jnp.uint8
    zero = jnp.zeros((*rows, 1), jnp.uint8) if grid.asymmetric else None
    codes = jnp.zeros((*rows, width if grid.bits == 8 else block * grid.bits // 8), kind)
    return CodedRows(codes, jnp.zeros((*rows, 1), scale_type), zero, grid, width, jnp.dtype(dtype))


def checked_grid(owner: str, name: str, grid: object) -> Grid:
    """The grid, if a vector's scale stands outside its codes.

    Raises:
      TypeError: it does not.
    """
    if isinstance(grid, Grid) and grid.linear and grid.has_zero and grid.scale_grid is None:
        return grid
    raise TypeError(
        f"{owner}: {name} must be a grid that has a zero and one scale outside its codes, such as Int(8), Int(4),"
        f" E4M3 or NF4(), got {grid!r}."
    )


def _encoded(like: CodedRows, x: jax.Array) -> CodedRows:
    grid = like.grid
    x = x.astype(like.scale.dtype)
    top, bottom = absmax_range(x, (*x.shape[:-1], 1), not grid.asymmetric)
    scale, zero = grid.scale_of(top, bottom)
    nothing = jnp.zeros_like(scale) if zero is None else jnp.where(jnp.isfinite(zero), zero, 0.0)
    numbers = jnp.where(jnp.isfinite(scale), grid.encode(x, scale, zero), nothing)
    stored, low = grid.stored(numbers)
    if grid.bits == 8:
        codes = stored.astype(like.codes.dtype)
    else:
        raw = (stored.astype(jnp.int16) - jnp.int16(low)).astype(jnp.uint8)
        codes = pack_blocks(raw, grid.bits, _block(grid, like.width))
    return replace(like, codes=codes, scale=scale, zero=None if zero is None else nothing.astype(jnp.uint8))


def _lowest(grid: Grid) -> int:
    """What code 0 stands for; of a table it is a name."""
    signed = grid.code_range is not None and grid.code_range[0] < 0
    return -(2 ** (grid.bits - 1)) if signed else 0


def _block(grid: Grid, width: int) -> int:
    """How many codes a vector is packed as: the fewest that fill their bytes."""
    step = 8 // FIELDS[grid.bits][-1]
    return -(-width // step) * step


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def no_gradient(owner: str, x: jax.Array) -> jax.Array:
    """``x``, through which nothing can be differentiated: codes would make its gradient 0 without a word."""
    return x


@no_gradient.defjvp
def _refused(owner: str, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    raise TypeError(
        f"{owner}: a cache of codes has no gradient, and one was asked for; differentiate attention on float keys and"
        " values, or pass jax.lax.stop_gradient of what goes in."
    )
