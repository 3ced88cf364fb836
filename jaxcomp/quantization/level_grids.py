"""Grids that are a table of at most 256 levels times a scale: what they share, minifloats, any table.

In training the codes of a :class:`~jaxcomp.quantization.leaves.Quantized` leaf are the levels themselves in a float
type; packed, they are the levels' codes, ``bits`` each. Every one of the package but a :class:`Levels` table without
one has a zero.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.specs import MAX_BITS, is_integer
from jaxcomp.core.types import DType
from jaxcomp.quantization.grids import Grid, ScaleAndZero, ScaleGrid
from jaxcomp.quantization.numerics.affine import in_steps, scale_for
from jaxcomp.quantization.numerics.levels import (
    Minifloat,
    minifloat_codes,
    minifloat_values,
    table_codes,
    table_values,
    to_minifloat,
    to_table,
)


class LevelGrid(Grid):
    """``dense == levels[code] * scale``: a grid that is its table.

    A value halfway between two levels, but for rounding errors, goes to the one nearer zero, and at 0 to the positive
    one.

    >>> @dataclass(frozen=True)
    ... class Quarters(LevelGrid):
    ...     @property
    ...     def levels(self):
    ...         return (-1.0, -0.25, 0.0, 0.25, 1.0)
    >>> Quarters().bits, Quarters().nearest(jnp.array([0.3, -9.0]))
    (3, Array([ 0.25, -1.  ], dtype=float32))
    """

    @property
    @abstractmethod
    def levels(self) -> tuple[float, ...]:
        """All values, ascending."""

    @property
    def bits(self) -> int:  # noqa: D102
        return (len(self.levels) - 1).bit_length()

    @property
    def ends(self) -> tuple[float, float]:  # noqa: D102
        return self.levels[0], self.levels[-1]

    @property
    def finest(self) -> float:  # noqa: D102
        return min(abs(v) for v in self.levels if v)

    @property
    def of_zero(self) -> float:  # noqa: D102
        return min(self.levels, key=lambda v: (abs(v), -v))

    @property
    def code_of_zero(self) -> int:  # noqa: D102
        return self.levels.index(0.0) if self.has_zero else 0

    def nearest(self, x: jax.Array, *, noise: jax.Array | None = None, clipped: bool = True) -> jax.Array:
        """The nearest level, in units of the scale; ``noise`` and ``clipped`` as in :meth:`encode`."""
        return to_table(x, self.levels, noise=noise, clipped=clipped)

    def scale_of(self, top: jax.Array, bottom: jax.Array | None) -> ScaleAndZero:
        """``range's end / top``, such that no level times it is subnormal."""
        return scale_for(top, self.top, least=1 / self.finest), None

    def encode(
        self,
        w: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | None,
        *,
        noise: jax.Array | None = None,
        clipped: bool = True,
    ) -> jax.Array:
        """The level nearest to ``w / scale``."""
        return self.nearest(in_steps(w, scale), noise=noise, clipped=clipped)

    def stored(self, numbers: jax.Array) -> tuple[jax.Array, int]:
        """The index in the table."""
        return table_codes(numbers, self.levels), 0

    def loaded(self, stored: jax.Array, dtype: DType) -> jax.Array:  # noqa: D102
        return table_values(stored.astype(jnp.uint8), self.levels, dtype)


@dataclass(frozen=True)
class Float(LevelGrid, ScaleGrid):
    """A minifloat: a sign, ``exponent`` and ``mantissa`` bits; subnormal numbers, no infinities among the levels.

    The code is the format's own bit pattern, the sign on top. Values round to nearest and saturate; halves go towards
    zero, as on every grid here, and in a ``Blocked`` one, whose formats say so, to the even code.

    Args:
      exponent: bits of the exponent, at least 1.
      mantissa: bits of the mantissa, at least 1.
      reserved: how many of the highest magnitudes stand for infinities and NaN.
      bias: of the exponent; None is ``2**(exponent - 1) - 1``.

    Raises:
      ValueError: a width outside 3..8, or fields that leave no levels or levels beyond float32's.

    >>> E2M1.levels[7:]
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    >>> E4M3.top, E5M2.top, E2M3.top, E3M2.top
    (448.0, 57344.0, 7.5, 28.0)

    Source: OCP 8-bit floating point specification 1.0; OCP microscaling formats (MX) specification 1.0, section 5.3.
    """

    exponent: int
    mantissa: int
    reserved: int = 0
    bias: int | None = None

    def __post_init__(self) -> None:
        given = {"exponent": self.exponent, "mantissa": self.mantissa, "reserved": self.reserved}
        for name, value in (given if self.bias is None else {**given, "bias": self.bias}).items():
            if not is_integer(value):
                raise ValueError(f"Float: {name} must be an integer, got {value!r}.")
        if min(self.exponent, self.mantissa) < 1 or self.bits > MAX_BITS:
            raise ValueError(
                f"Float: exponent and mantissa take at least a bit each and {MAX_BITS - 1} together, got"
                f" {self.exponent} and {self.mantissa}."
            )
        if not 0 <= self.reserved <= 2 ** (self.bits - 1) - 2:
            raise ValueError(f"Float: reserved must be in 0..{2 ** (self.bits - 1) - 2}, got {self.reserved!r}.")
        if abs(self.offset) > 64:
            raise ValueError(f"Float: bias must be in -64..64, got {self.bias!r}.")

    @property
    def bits(self) -> int:
        """Width of a code with its sign."""
        return 1 + self.exponent + self.mantissa

    @property
    def label(self) -> str:
        """As "float8 e4m3"."""
        return f"float{self.bits} e{self.exponent}m{self.mantissa}"

    @property
    def offset(self) -> int:
        """The exponent's bias."""
        return 2 ** (self.exponent - 1) - 1 if self.bias is None else self.bias

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """What the codes without a sign stand for, ascending from 0."""
        m, values = self.mantissa, []
        for code in range(2 ** (self.bits - 1) - self.reserved):
            field, fraction = divmod(code, 2**m)
            values.append(math.ldexp(fraction + (2**m if field else 0), max(field, 1) - self.offset - m))
        return tuple(values)

    @property
    def levels(self) -> tuple[float, ...]:
        """All values, ascending."""
        return mirrored(self.magnitudes)

    @property
    def code_of_zero(self) -> int:  # noqa: D102
        return 0

    @property
    def minifloat(self) -> Minifloat:  # noqa: D102
        return Minifloat(self.bits, self.mantissa, self.offset)

    def nearest(self, x: jax.Array, *, noise: jax.Array | None = None, clipped: bool = True) -> jax.Array:
        """The nearest level, ties to even; ``noise`` and ``clipped`` as in :meth:`encode`."""
        return to_minifloat(x, self.minifloat, self.levels, noise=noise, clipped=clipped)

    def encode(
        self,
        w: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | None,
        *,
        noise: jax.Array | None = None,
        clipped: bool = True,
    ) -> jax.Array:
        """The level nearest to ``w / scale``."""
        steps = in_steps(w, scale)
        return to_minifloat(steps, self.minifloat, self.levels, noise=noise, clipped=clipped, to_even=False)

    def encode_to_even(  # noqa: D102
        self, w: jax.Array, scale: jax.Array, *, noise: jax.Array | None = None, clipped: bool = True
    ) -> jax.Array:
        return self.nearest(in_steps(w, scale), noise=noise, clipped=clipped)

    def stored(self, numbers: jax.Array) -> tuple[jax.Array, int]:
        """The bit pattern."""
        return minifloat_codes(numbers, self.minifloat), 0

    def loaded(self, stored: jax.Array, dtype: DType) -> jax.Array:  # noqa: D102
        return minifloat_values(stored.astype(jnp.uint8), self.minifloat, dtype)

    def scales_of(self, top: jax.Array, elements: Grid) -> tuple[jax.Array, jax.Array]:
        """``top / elements.top`` rounded on this grid, under one scale with which the largest of them is its top.

        Deviation: none is smaller than the smallest positive level, so that a block of small weights does not vanish
        because another one is large.
        """
        wanted = top * (1.0 / elements.top)
        outer = scale_for(jnp.max(wanted, keepdims=True), self.top, least=2.0**20)
        return self.nearest(jnp.maximum(wanted * (1.0 / outer), self.finest)), outer


E4M3 = Float(4, 3, reserved=1)
"""8 bits up to 448, no infinities; the format of fp8 weights."""
E5M2 = Float(5, 2, reserved=4)
"""8 bits up to 57344, IEEE infinities; the format of fp8 gradients."""
E3M2 = Float(3, 2)
"""6 bits up to 28."""
E2M3 = Float(2, 3)
"""6 bits up to 7.5."""
E2M1 = Float(2, 1)
"""4 bits up to 6."""


@dataclass(frozen=True)
class Levels(LevelGrid):
    """Any table: ``dense == values[code] * scale``.

    Args:
      values: 2 to 256 finite numbers, ascending.

    Raises:
      ValueError: too few or too many values, or values that do not ascend or that float32 does not tell apart.

    >>> Levels((-1.0, -0.25, 0.0, 0.25, 1.0)).bits
    3
    """

    values: tuple[float, ...]

    @property
    def label(self) -> str:
        """As "5 levels"."""
        return f"{len(self.values)} levels"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(v) for v in self.values))
        if not 2 <= len(self.values) <= 2**MAX_BITS or not all(map(math.isfinite, self.values)):
            raise ValueError(f"Levels: wants 2 to {2**MAX_BITS} finite values, got {self.values!r}.")
        tiny, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
        if any(v and not tiny <= abs(v) <= most for v in self.values):
            raise ValueError(f"Levels: values must be 0 or normal float32 numbers, got {self.values!r}.")
        narrow = [np.float32(v) for v in self.values]
        if any(a >= b for a, b in pairwise(narrow)):
            raise ValueError(f"Levels: values must ascend, as float32 too, got {self.values!r}.")

    @property
    def levels(self) -> tuple[float, ...]:
        """All values, ascending."""
        return self.values


def mirrored(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    """Magnitudes, ascending from 0, with both signs."""
    return (*(-m for m in reversed(magnitudes[1:])), *magnitudes)
