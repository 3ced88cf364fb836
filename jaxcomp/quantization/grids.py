"""What a grid is: numbers that codes name. The uniform grid of integers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxcomp.core.specs import Spec, check_bits
from jaxcomp.core.types import DType
from jaxcomp.quantization.numerics.affine import affine_scale, dequantize, in_steps, scale_for, spread
from jaxcomp.quantization.numerics.levels import Minifloat, table_codes, to_table
from jaxcomp.quantization.numerics.rounding import round_with
from jaxcomp.quantization.scales import AbsMax, MeanAbs, ScaleRule

ScaleAndZero = tuple[jax.Array, jax.Array | None]
"""The scale of each block, and its zero point: integers in the scale's type and shape, or None for 0."""


class Numbers(Spec, ABC):
    """Numbers that codes of ``bits`` bits name; ``dense == decode(numbers, scale, zero_point)``.

    In training a leaf holds the numbers, in the scale's type; packed, it holds their codes.
    """

    proportional: ClassVar[bool] = True
    """Whether ``decode`` is ``(numbers - zero_point) * scale``."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Width of a code."""

    @property
    def label(self) -> str:
        """The grid in a word or two, for reports."""
        return repr(self).removesuffix("()").replace("bits=", "")

    @abstractmethod
    def stored(self, numbers: jax.Array) -> tuple[jax.Array, int]:
        """What a packed leaf keeps: integers, in any type, and the lowest of the ``2**bits`` that there may be."""

    @abstractmethod
    def loaded(self, stored: jax.Array, dtype: DType) -> jax.Array:
        """The inverse of :meth:`stored`: numbers in an integer type, or in ``dtype``, the type of the scale."""

    def decode(self, numbers: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
        """``(numbers - zero_point) * scale``, in the scale's type."""
        return dequantize(numbers, scale, zero_point)

    @property
    def code_of_zero(self) -> int:
        """What :meth:`stored` gives for 0; 0 where 0 is no number."""
        return 0

    @property
    def of_zero(self) -> float:
        """The number for a weight of 0."""
        return 0.0

    @property
    def has_zero(self) -> bool:
        """Whether 0 is a number; where it is none a packed block of zeros has scale 0."""
        return self.of_zero == 0

    @property
    def code_range(self) -> tuple[int, int] | None:
        """The lowest and the highest number where they are integers and ``decode`` is linear in them; else None."""
        return None

    @property
    def minifloat(self) -> Minifloat | None:
        """What codes mean where they are the bit patterns of small floats; else None."""
        return None


class ScaleGrid(Numbers):
    """A grid that scales may lie on."""

    @abstractmethod
    def scales_of(self, top: jax.Array, elements: Grid) -> tuple[jax.Array, jax.Array]:
        """The scales of blocks on this grid, and the one number over all of them, in the same rank.

        Args:
          top: the largest magnitude of each block.
          elements: the grid of the blocks' elements.
        """


class Grid(Numbers):
    """A grid for weights. A new one is a class with the abstract members, here and in :class:`Numbers`.

    A frozen dataclass; for a table of numbers derive from :class:`~jaxcomp.quantization.level_grids.LevelGrid`, which
    asks for ``levels`` alone.
    """

    goes_into: ClassVar[str] = "quantize"

    linear: ClassVar[bool] = True
    """Whether ``decode`` is linear in the scale, so that the scale can be trained, or be on a grid of its own."""

    @property
    @abstractmethod
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest number."""

    @abstractmethod
    def scale_of(self, top: jax.Array, bottom: jax.Array | None) -> ScaleAndZero:
        """Scale and zero point with which the grid's ends meet those of a range.

        Args:
          top: the range's upper end, one a block.
          bottom: its lower end; None means ``-top``.
        """

    @abstractmethod
    def encode(
        self,
        w: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | None,
        *,
        noise: jax.Array | None = None,
        clipped: bool = True,
    ) -> jax.Array:
        """The number for each weight, in the scale's type, with a straight-through gradient in ``w``.

        Args:
          w: the weights.
          scale, zero_point: as :meth:`scale_of` gives them.
          noise: of the weights' shape, uniform in [0, 1): round at random; None rounds to nearest.
          clipped: whether the gradient is cut outside the range.
        """

    def encode_to_even(
        self, w: jax.Array, scale: jax.Array, *, noise: jax.Array | None = None, clipped: bool = True
    ) -> jax.Array:
        """:meth:`encode` with halves to the even code where the grid knows how: what microscaling formats ask for."""
        return self.encode(w, scale, None, noise=noise, clipped=clipped)

    @property
    def of_zero(self) -> float:
        """The number for a weight of 0, asked of :meth:`encode`."""
        return _of_zero(self)

    @property
    def top(self) -> float:
        """The largest magnitude that both signs have, or, of a table, that one of them has."""
        return max(-self.ends[0], self.ends[1])

    @property
    def finest(self) -> float:
        """The smallest magnitude beside 0."""
        return 1.0

    @property
    def clips(self) -> bool:
        """Whether values beyond the ends are clipped, and get no gradient."""
        return True

    @property
    def asymmetric(self) -> bool:
        """Whether both ends of a range matter, and there is a zero point."""
        return False

    @property
    def default_rule(self) -> ScaleRule:
        """How the range is found where nothing is said."""
        return AbsMax()

    @property
    def elements(self) -> Grid:
        """The grid that the numbers are on: this one, unless it is one of blocks."""
        return self

    @property
    def scale_grid(self) -> ScaleGrid | None:
        """The grid that the scales lie on, if there is one."""
        return None

    @property
    def fraction_bits(self) -> int:
        """How many bits of a number are behind the point in a microscaling block."""
        return 0


@cache
def _of_zero(grid: Grid) -> float:
    with jax.ensure_compile_time_eval():
        nothing, one = jnp.zeros(1), jnp.ones(1)
        return float(grid.encode(nothing, one, nothing if grid.asymmetric else None)[0])


_SIGNS = (-1.0, 1.0)


@dataclass(frozen=True)
class Int(Grid):
    """A uniform integer grid: ``dense == (codes - zero_point) * scale`` with codes of ``bits`` bits.

    Symmetric codes are two's complement in ``[-2**(bits-1), 2**(bits-1) - 1]`` with zero point 0 and
    ``scale = absmax / (2**(bits-1) - 0.5)``, which rounds both ends by half a step, towards zero: under ``AbsMax()``
    the lowest code is left out, and the codes of ``-w`` are those of ``w`` with the other sign. Asymmetric codes are
    in ``[0, 2**bits - 1]`` and their range always holds 0, so that zeros stay zero. Halves go towards zero, and so does
    what is one but for rounding errors: codes do not depend on the last bit of a weight or on its unit.

    ``Int(1)`` is the sign: codes -1 and 1, 1 for a weight of 0, ``scale`` the mean magnitude. It has no zero: what a
    mask hides stays zero by the mask alone, and a block of zeros is zero by its scale. A sign has no range either, so
    its gradient is cut nowhere.

    Args:
      bits: width of a code, 1..8.
      symmetric: whether the zero point is 0.
      narrow: leave the lowest symmetric code out, so that the grid is its own mirror image
        (``scale = absmax / (2**(bits-1) - 1)``; with two bits this is the ternary grid).

    Raises:
      ValueError: bits outside 1..8, or narrow without symmetric or with one bit.

    >>> Int(4)
    Int(bits=4, symmetric=True, narrow=False)
    >>> Int(bits=9)
    Traceback (most recent call last):
    ...
    ValueError: Int: bits must be an integer in 1..8, got 9.

    Source: Krishnamoorthi 2018, arXiv:1806.08342, sections 2.1 and 2.2; the half-step scale is that of a
    mid-tread grid whose two end cells are full. The sign: Courbariaux et al. 2015, arXiv:1511.00363, with the scale of
    Rastegari et al. 2016, arXiv:1603.05279.
    """

    bits: int = 8
    symmetric: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        check_bits("Int", self.bits, least=1)
        if self.narrow and not self.symmetric:
            raise ValueError("Int: narrow leaves out the lowest code of a symmetric grid; got symmetric=False.")
        if self.narrow and self.bits == 1:
            raise ValueError("Int: narrow leaves one code of one bit; the ternary grid is Int(2, narrow=True).")

    @property
    def label(self) -> str:
        """As "int4", and "narrow" or "asymmetric" where it is."""
        return f"int{self.bits}" + " narrow" * self.narrow + " asymmetric" * self.asymmetric

    @property
    def is_sign(self) -> bool:
        """Whether the codes are -1 and 1."""
        return self.symmetric and self.bits == 1

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        if not self.symmetric:
            return 0, 2**self.bits - 1
        if self.is_sign:
            return -1, 1
        return -(2 ** (self.bits - 1)) + self.narrow, 2 ** (self.bits - 1) - 1

    @property
    def ends(self) -> tuple[int, int]:  # noqa: D102
        return self.code_range

    @property
    def top(self) -> int:
        """The highest code."""
        return self.code_range[1]

    @property
    def of_zero(self) -> float:  # noqa: D102
        return 1.0 if self.is_sign else 0.0

    @property
    def clips(self) -> bool:  # noqa: D102
        return not self.is_sign

    @property
    def asymmetric(self) -> bool:  # noqa: D102
        return not self.symmetric

    @property
    def default_rule(self) -> ScaleRule:
        """The sign's scale is a mean."""
        return MeanAbs() if self.is_sign else AbsMax()

    @property
    def fraction_bits(self) -> int:
        """MX's integers are fractions, ``code / 2**(bits - 2)``."""
        return self.bits - 2

    def scale_of(self, top: jax.Array, bottom: jax.Array | None) -> ScaleAndZero:  # noqa: D102
        if not self.symmetric and bottom is not None:
            return affine_scale(top, bottom, self.top)
        steps = self.top if self.narrow or self.is_sign else self.top + 0.5
        scale = scale_for(top, steps)
        return scale, None if self.symmetric else jnp.zeros_like(scale)

    def encode(
        self,
        w: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | None,
        *,
        noise: jax.Array | None = None,
        clipped: bool = True,
    ) -> jax.Array:
        """``clip(round(w / scale) + zero_point)``."""
        steps = in_steps(w, scale)
        if self.is_sign:
            return to_table(steps, _SIGNS, noise=noise, clipped=False)
        low, high = self.code_range
        if zero_point is None:
            return round_with(steps, low, high, noise=noise, clipped=clipped)
        zero = spread(zero_point, w.shape)
        return round_with(steps, low - zero, high - zero, noise=noise, clipped=clipped) + zero

    def encode_to_even(  # noqa: D102
        self, w: jax.Array, scale: jax.Array, *, noise: jax.Array | None = None, clipped: bool = True
    ) -> jax.Array:
        return round_with(in_steps(w, scale), *self.code_range, noise=noise, clipped=clipped, to_even=True)

    def stored(self, numbers: jax.Array) -> tuple[jax.Array, int]:
        """Two's complement for a symmetric grid, narrow or not; a sign is a bit."""
        if self.is_sign:
            return table_codes(numbers, _SIGNS), 0
        return numbers, -(2 ** (self.bits - 1)) if self.symmetric else 0

    def loaded(self, stored: jax.Array, dtype: DType) -> jax.Array:  # noqa: D102
        return stored.astype(jnp.int8) * 2 - 1 if self.is_sign else stored
