"""Grids that are a table of at most 256 levels times a scale: minifloats, powers of two, NF4, any table; their scales.

A level grid has ``bits``, ``levels`` (ascending) and ``top`` (the largest magnitude: what the range's end maps to). In
training the codes of a :class:`~jaxcomp.quantization.leaves.Quantized` leaf are the levels themselves in
a float type; packed, they are the levels' codes, ``bits`` each. Every grid here but a :class:`Levels` table without one
has a zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

from jaxcomp.core.specs import MAX_BITS, Spec, check_bits, is_integer


@dataclass(frozen=True)
class Float(Spec):
    """A minifloat: a sign, ``exponent`` and ``mantissa`` bits; subnormal numbers, no infinities among the levels.

    The code is the format's own bit pattern, the sign on top. Values round to nearest, ties to even, and saturate.

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
        return _mirrored(self.magnitudes)

    @property
    def top(self) -> float:
        """The largest value."""
        return self.magnitudes[-1]


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
class Levels(Spec):
    """Any table: ``dense == values[code] * scale``.

    A value halfway between two levels goes to the one nearer zero, and between a negative and a positive one to the
    latter.

    Args:
      values: 2 to 256 finite numbers, ascending.

    Raises:
      ValueError: too few or too many values, or values that do not ascend or that float32 does not tell apart.

    >>> Levels((-1.0, -0.25, 0.0, 0.25, 1.0)).bits
    3
    """

    values: tuple[float, ...]

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
    def bits(self) -> int:
        """Width of a code."""
        return (len(self.values) - 1).bit_length()

    @property
    def levels(self) -> tuple[float, ...]:
        """All values, ascending."""
        return self.values

    @property
    def top(self) -> float:
        """The largest magnitude."""
        return max(-self.values[0], self.values[-1])


@dataclass(frozen=True)
class PoT(Spec):
    """Powers of two: ``{0, ±2**-i for i in 0 .. 2**(bits-1) - 2}``.

    Args:
      bits: width of a code with its sign, 2..6: more would only add levels below ``2**-30`` of the largest.

    Raises:
      ValueError: bits outside 2..6.

    >>> PoT(3).levels
    (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)

    Source: Zhou et al. 2017, arXiv:1702.03044; Li et al. 2020, arXiv:1909.13144, equation 2 (one level fewer a sign,
    so that zero has its code).
    """

    bits: int = 4

    def __post_init__(self) -> None:
        check_bits("PoT", self.bits)
        if self.bits > 6:
            raise ValueError(f"PoT: bits must be an integer in 2..6, got {self.bits!r}; APoT makes use of more.")

    @property
    def levels(self) -> tuple[float, ...]:
        """All values, ascending."""
        return _mirrored((0.0, *(2.0**-i for i in reversed(range(2 ** (self.bits - 1) - 1)))))

    @property
    def top(self) -> float:
        """The largest value."""
        return 1.0


@dataclass(frozen=True)
class APoT(Spec):
    """Additive powers of two: a magnitude is a sum of terms, each 0 or one of three powers of two; the top is 1.

    The ``bits - 1`` bits of a magnitude are cut into pairs, which choose among the four values of their term; an odd
    bit chooses 0 or one power. The powers ``2**-1, 2**-2, …`` are dealt to the terms in turn.

    Args:
      bits: width of a code with its sign, 2..8.

    Raises:
      ValueError: bits outside 2..8.

    >>> [round(v, 6) for v in APoT(4).levels[7:]]
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0]

    Source: Li et al. 2020, arXiv:1909.13144, equations 3 to 6 with k = 2; the odd bit as in its authors' code. The
    range's end is the clipping threshold α: give it by ``scale=Fixed(α)``, or train it by ``learned``.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        check_bits("APoT", self.bits)

    @property
    def levels(self) -> tuple[float, ...]:
        """All values, ascending."""
        return _apot_levels(self.bits)

    @property
    def top(self) -> float:
        """The largest value."""
        return 1.0


@cache
def _apot_levels(bits: int) -> tuple[float, ...]:
    pairs, odd = divmod(bits - 1, 2)
    terms: list[list[float]] = [[0.0] for _ in range(pairs + odd)]
    power = 0
    for turn in range(3):
        dealt = terms[:pairs] if turn < 2 else [*terms[pairs:], *terms[:pairs]]
        for term in dealt:
            power -= 1
            term.append(2.0**power)
    sums = {0.0}
    for term in terms:
        sums = {s + t for s in sums for t in term}
    top = max(sums)
    return _mirrored(tuple(sorted(s / top for s in sums)))


# Quantiles of the normal distribution: of p = 0.9677083 down to 1/2 in 8 steps above zero and in 7 below, over the
# largest. tests/test_grids.py derives them again.
# fmt: off
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


@dataclass(frozen=True)
class NF4(Spec):
    """NormalFloat: 16 levels at quantiles of the normal distribution, -1, 0 and 1 among them.

    >>> NF4().bits, NF4().levels[7]
    (4, 0.0)

    Source: Dettmers et al. 2023, arXiv:2305.14314, appendix E.
    """

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 4

    @property
    def levels(self) -> tuple[float, ...]:
        """All values, ascending."""
        return _NF4

    @property
    def top(self) -> float:
        """The largest value."""
        return 1.0


def _mirrored(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    return (*(-m for m in reversed(magnitudes[1:])), *magnitudes)


LevelGrid = Float | Levels | PoT | APoT | NF4
