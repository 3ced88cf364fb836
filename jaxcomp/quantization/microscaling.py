"""Grids whose block scales lie on a grid of their own: what MX and NVFP4 are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from jaxcomp.core.specs import Spec
from jaxcomp.quantization.grids import Companded, Int
from jaxcomp.quantization.level_grids import NF4, APoT, Float, LevelGrid, Levels, PoT


@dataclass(frozen=True)
class E8M0(Spec):
    """A power of two in a byte, ``2**(code - 127)``: the scale of a microscaling block. Without sign or zero.

    Deviation: the codes below 27 and 255 (NaN) are not used, so that every level times its scale is a normal number of
    float32.

    Source: OCP microscaling formats (MX) specification 1.0, section 5.4.1.
    """

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 8


@dataclass(frozen=True)
class Blocked(Spec):
    """A grid whose block scales lie on a grid of their own: one byte a block.

    With ``E8M0`` scales a block's is ``2**(floor(log2(absmax)) - floor(log2(top)))``; larger magnitudes than the grid
    then reaches saturate. With ``Float`` scales it is ``absmax / top``, rounded on that grid, over one float32 scale
    for the whole leaf, such that the largest block scale is the top of the scales' grid.

    Args:
      grid: of the elements.
      scales: ``E8M0()`` or a ``Float``.

    Raises:
      TypeError: a grid or scales of another kind.
      ValueError: an ``Int`` that is asymmetric or of one bit.

    >>> Blocked(Int(4), E8M0()).bits
    4

    Source: OCP microscaling formats (MX) specification 1.0, section 6.3; double quantization: Dettmers et al. 2023,
    arXiv:2305.14314, section 3.
    """

    grid: Int | Float | Levels | PoT | APoT | NF4
    scales: E8M0 | Float

    def __post_init__(self) -> None:
        if not isinstance(self.grid, Int | LevelGrid) or not isinstance(self.scales, E8M0 | Float):
            raise TypeError(
                f"Blocked: wants a grid such as E2M1 and scales E8M0() or a Float, got {self.grid!r} and"
                f" {self.scales!r}."
            )
        if isinstance(self.grid, Int) and (self.grid.is_sign or not self.grid.symmetric):
            raise ValueError(f"Blocked: an Int grid must be symmetric, of two bits or more, got {self.grid!r}.")

    @property
    def bits(self) -> int:
        """Width of an element's code."""
        return self.grid.bits

    @property
    def shift(self) -> int:
        """The power of two that an element's code counts: MX's integers are fractions, ``code / 2**(bits - 2)``."""
        return 2 - self.grid.bits if isinstance(self.grid, Int) else 0

    @cached_property
    def top_exponent(self) -> int:
        """``floor(log2)`` of the largest element."""
        top = math.ldexp(self.grid.code_range[1], self.shift) if isinstance(self.grid, Int) else self.grid.top
        return math.frexp(top)[1] - 1


Grid = Int | Companded | Float | Levels | PoT | APoT | NF4 | E8M0


def has_zero(grid: Grid) -> bool:
    """Whether 0 is on the grid: else a zero stays zero under a mask only."""
    if isinstance(grid, LevelGrid):
        return 0.0 in grid.levels
    return not isinstance(grid, E8M0) and not (isinstance(grid, Int) and grid.is_sign)
