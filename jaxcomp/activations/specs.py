"""What a rule says of activations: how many bits, whose range, and what shares a scale."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

from jaxcomp.specs import Int, check_bits


@dataclass(frozen=True)
class Static:
    """The range is the one given in ``ranges`` and carries no gradient."""


@dataclass(frozen=True)
class Dynamic:
    """The range is the value's own at run time: its largest magnitude, or its extremes for an asymmetric grid."""


@dataclass(frozen=True)
class LSQ:
    """The range given in ``ranges`` is learned by the rounding's own gradient.

    With step ``s`` and code ``q`` of ``v = x / s + z``, ``dx̂/ds = round(v) - v`` inside the grid and ``q - z`` where it
    clips, times ``1 / sqrt(n * q_max)`` for ``n`` elements.

    Source: Esser et al. 2020, arXiv:1902.08153, equations 3 to 5; asymmetric as in arXiv:2004.09576. Deviation: what is
    trained are the ends of the range, ``s = (high - low) / levels``, so that calibration's result is the start; the
    gradient of an end is that of the step by the chain rule.
    """


@dataclass(frozen=True)
class PACT:
    """The range is ``(0, high)``, and ``high`` is learned by the clip's gradient: 1 where ``x >= high``, else 0.

    Source: Choi et al. 2018, arXiv:1805.06085, equations 1 and 3.
    """


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole value."""


@dataclass(frozen=True)
class PerToken:
    """One scale for each index of the axes that are not summed over: a row of a dot, an image of a convolution."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for each row and each ``size`` neighbours along the last axis that a dot sums over.

    Raises:
      ValueError: a size below 1.
    """

    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.size, numbers.Integral) or isinstance(self.size, bool) or self.size < 1:
            raise ValueError(f"PerGroup: size must be a positive integer, got {self.size!r}.")


RangeKind = Static | Dynamic | LSQ | PACT
Sharing = PerTensor | PerToken | PerGroup


@dataclass(frozen=True)
class Act:
    """How the activations that enter a site are quantized.

    Args:
      bits: width of a code, 2..8.
      symmetric: whether the zero point is 0.
      range: where the range comes from.
      per: what shares a scale; anything finer than the tensor needs ``Dynamic``.

    Raises:
      TypeError: range or per is something else.
      ValueError: bits outside 2..8, or fields that do not go together.

    >>> Act(8).grid, Act(4, symmetric=True, range=Dynamic(), per=PerToken()).per
    (Int(bits=8, group=None, symmetric=False, narrow=False), PerToken())
    >>> Act(per=PerToken())
    Traceback (most recent call last):
    ...
    ValueError: Act: per=PerToken() needs range=Dynamic(), got Static(); ranges given from outside are per tensor.
    """

    bits: int = 8
    symmetric: bool = False
    range: RangeKind = Static()
    per: Sharing = PerTensor()

    def __post_init__(self) -> None:
        check_bits("Act", self.bits)
        if not isinstance(self.range, RangeKind):
            raise TypeError(f"Act: range must be Static(), Dynamic(), LSQ() or PACT(), got {self.range!r}.")
        if not isinstance(self.per, Sharing):
            raise TypeError(f"Act: per must be PerTensor(), PerToken() or PerGroup(size), got {self.per!r}.")
        if not isinstance(self.per, PerTensor) and not isinstance(self.range, Dynamic):
            raise ValueError(
                f"Act: per={self.per!r} needs range=Dynamic(), got {self.range!r}; ranges given from outside are per "
                "tensor."
            )
        if isinstance(self.range, PACT) and self.symmetric:
            raise ValueError("Act: PACT's range begins at 0, so it needs symmetric=False.")

    @property
    def grid(self) -> Int:
        """The grid of the codes."""
        return Int(self.bits, symmetric=self.symmetric)

    @property
    def needs_range(self) -> bool:
        """Whether ``ranges`` must name the activation."""
        return not isinstance(self.range, Dynamic)

    def __str__(self) -> str:
        words = [f"{self.bits} bits", "symmetric" if self.symmetric else "asymmetric", type(self.range).__name__]
        return ", ".join(words if isinstance(self.per, PerTensor) else [*words, repr(self.per)])
