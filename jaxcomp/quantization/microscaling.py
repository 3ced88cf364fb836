"""Grids whose block scales lie on a grid of their own: what MX and NVFP4 are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxcomp.core.types import DType
from jaxcomp.quantization.grids import Grid, ScaleAndZero, ScaleGrid
from jaxcomp.quantization.numerics.levels import exponent_of, power_of_two


@dataclass(frozen=True)
class E8M0(ScaleGrid):
    """A power of two in a byte, ``2**(code - 127)``: the scale of a microscaling block. Without sign or zero.

    Deviation: the codes below 27 and 255 (NaN) are not used, so that every level times its scale is a normal number of
    float32.

    Source: OCP microscaling formats (MX) specification 1.0, section 5.4.1.
    """

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 8

    def scales_of(self, top: jax.Array, elements: Grid) -> tuple[jax.Array, jax.Array]:
        """``2**(floor(log2(top)) - floor(log2(elements.top)))``; over them what a unit of an element's number is."""
        unit = 2.0**-elements.fraction_bits
        e = jnp.clip(exponent_of(top) - (math.frexp(elements.top * unit)[1] - 1), -100, 127)
        lost = jnp.any(~jnp.isfinite(top))  # which a power of two cannot say
        return power_of_two(e, top.dtype), jnp.full((1,) * top.ndim, jnp.where(lost, jnp.nan, unit), top.dtype)

    def stored(self, numbers: jax.Array) -> tuple[jax.Array, int]:
        """The biased exponent."""
        return (exponent_of(numbers) + 127).astype(jnp.uint8), 0

    def loaded(self, stored: jax.Array, dtype: DType) -> jax.Array:  # noqa: D102
        return power_of_two(stored.astype(jnp.uint8).astype(jnp.int32) - 127, dtype)


@dataclass(frozen=True)
class Blocked(Grid):
    """A grid whose block scales lie on a grid of their own: one byte a block.

    With ``E8M0`` scales a block's is ``2**(floor(log2(absmax)) - floor(log2(top)))``; larger magnitudes than the grid
    then reaches saturate. With ``Float`` scales it is ``absmax / top``, rounded on that grid, over one float32 scale
    for the whole leaf, such that the largest block scale is the top of the scales' grid.

    Args:
      grid: of the elements.
      scales: ``E8M0()`` or a ``Float``.

    Raises:
      TypeError: a grid or scales of another kind.
      ValueError: an ``Int`` that is asymmetric or of one bit, or a table without 0, for no scale says that a block is
        of zeros.

    >>> from jaxcomp.quantization.grids import Int
    >>> Blocked(Int(4), E8M0()).bits
    4

    Source: OCP microscaling formats (MX) specification 1.0, section 6.3; double quantization: Dettmers et al. 2023,
    arXiv:2305.14314, section 3.
    """

    grid: Grid
    scales: ScaleGrid

    linear: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """As "int4 with E8M0 scales"."""
        return f"{self.grid.label} with {self.scales.label} scales"

    def __post_init__(self) -> None:
        if not isinstance(self.grid, Grid) or not self.grid.linear or not isinstance(self.scales, ScaleGrid):
            raise TypeError(
                f"Blocked: wants a grid such as E2M1 and scales E8M0() or a Float, got {self.grid!r} and"
                f" {self.scales!r}."
            )
        if self.grid.asymmetric or not self.grid.clips:
            raise ValueError(f"Blocked: an Int grid must be symmetric, of two bits or more, got {self.grid!r}.")
        if not self.grid.has_zero:
            raise ValueError(f"Blocked: a block of zeros wants a grid with 0 among its numbers, got {self.grid!r}.")

    @property
    def bits(self) -> int:
        """Width of an element's code."""
        return self.grid.bits

    @property
    def of_zero(self) -> float:  # noqa: D102
        return 0.0

    @property
    def ends(self) -> tuple[float, float]:  # noqa: D102
        return self.grid.ends

    @property
    def elements(self) -> Grid:  # noqa: D102
        return self.grid

    @property
    def scale_grid(self) -> ScaleGrid:  # noqa: D102
        return self.scales

    def scale_of(self, top: jax.Array, bottom: jax.Array | None) -> ScaleAndZero:  # noqa: D102
        part, outer = self.scales.scales_of(top, self.grid)
        return part * outer, None

    def encode(
        self,
        w: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | None,
        *,
        noise: jax.Array | None = None,
        clipped: bool = True,
    ) -> jax.Array:
        """The elements' own numbers, halves to even."""
        return self.grid.encode_to_even(w, scale, noise=noise, clipped=clipped)

    def stored(self, numbers: jax.Array) -> tuple[jax.Array, int]:  # noqa: D102
        return self.grid.stored(numbers)

    def loaded(self, stored: jax.Array, dtype: DType) -> jax.Array:  # noqa: D102
        return self.grid.loaded(stored, dtype)
