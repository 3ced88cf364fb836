"""Tables of levels that papers give: powers of two, sums of them, quantiles of the normal distribution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from jaxcomp.core.specs import check_bits
from jaxcomp.quantization.level_grids import LevelGrid, mirrored


@dataclass(frozen=True)
class PoT(LevelGrid):
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
        return mirrored((0.0, *(2.0**-i for i in reversed(range(2 ** (self.bits - 1) - 1)))))


@dataclass(frozen=True)
class APoT(LevelGrid):
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
    return mirrored(tuple(sorted(s / top for s in sums)))


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
class NF4(LevelGrid):
    """NormalFloat: 16 levels at quantiles of the normal distribution, -1, 0 and 1 among them.

    >>> NF4().bits, NF4().levels[7]
    (4, 0.0)

    Source: Dettmers et al. 2023, arXiv:2305.14314, appendix E.
    """

    @property
    def levels(self) -> tuple[float, ...]:
        """All values, ascending."""
        return _NF4
