"""What a rule says of activations: how many bits, whose range, and what shares a scale; and how gradients round."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from jaxcomp.core.layouts import Groups, Tensor, Tokens, checked_layout
from jaxcomp.core.specs import check_bits
from jaxcomp.core.types import DType
from jaxcomp.quantization.grids import Int


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


RangeKind = Static | Dynamic | LSQ | PACT
ActLayout = Tensor | Tokens | Groups
"""What of an activation can share a scale; the groups lie along the last axis that the site sums over."""
_WHOLE = Tensor()


@dataclass(frozen=True)
class Act:
    """How the activations that enter a site are quantized.

    Args:
      bits: width of a code, 2..8.
      symmetric: whether the zero point is 0.
      range: where the range comes from.
      per: what shares a scale: ``Tensor()``, ``Tokens()`` or ``Groups(size)``; anything finer than the tensor needs
        ``Dynamic``.

    Raises:
      TypeError: range or per is something else.
      ValueError: bits outside 2..8, or fields that do not go together.

    >>> Act(8).grid, Act(4, symmetric=True, range=Dynamic(), per=Tokens()).per
    (Int(bits=8, symmetric=False, narrow=False), Tokens())
    >>> Act(per=Tokens())
    Traceback (most recent call last):
    ...
    ValueError: Act: per=Tokens() needs range=Dynamic(), got Static(); ranges given from outside are per tensor.
    """

    bits: int = 8
    symmetric: bool = False
    range: RangeKind = Static()
    per: ActLayout = _WHOLE

    def __post_init__(self) -> None:
        check_bits("Act", self.bits)
        if not isinstance(self.range, RangeKind):
            raise TypeError(f"Act: range must be Static(), Dynamic(), LSQ() or PACT(), got {self.range!r}.")
        _check_layout("Act", self.per, self.range)
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
        signs = "symmetric" if self.symmetric else "asymmetric"
        return _words(f"{self.bits} bits, {signs}", self.per, self.range)


@dataclass(frozen=True)
class Float8:
    """Activations in eight-bit floats: ``x ≈ float8(x / scale) * scale``, ``scale`` = largest magnitude / top.

    Rounded to nearest, ties to even, clipped at the format's largest number; the gradient passes straight through and
    is cut where it clips.

    Args:
      exponent: bits of the exponent: 4 for e4m3 (top 448, no infinities), 5 for e5m2 (top 57344).
      range: ``Static()`` or ``Dynamic()``.
      per: what shares a scale: ``Tensor()``, ``Tokens()`` or ``Groups(size)``; anything finer than the tensor needs
        ``Dynamic``.

    Raises:
      TypeError: range or per is something else.
      ValueError: an exponent of other width, or fields that do not go together.

    >>> Float8().top, str(Float8(5, range=Static()))
    (448.0, 'float8_e5m2, Static')

    Source: Micikevicius et al. 2022, arXiv:2209.05433.
    """

    exponent: int = 4
    range: Static | Dynamic = Dynamic()
    per: ActLayout = _WHOLE

    def __post_init__(self) -> None:
        if self.exponent not in (4, 5):
            raise ValueError(f"Float8: exponent must be 4 (e4m3) or 5 (e5m2), got {self.exponent!r}.")
        if not isinstance(self.range, Static | Dynamic):
            raise TypeError(f"Float8: range must be Static() or Dynamic(), got {self.range!r}.")
        _check_layout("Float8", self.per, self.range)

    @property
    def dtype(self) -> DType:
        """The type of the codes."""
        return jnp.dtype(jnp.float8_e4m3fn if self.exponent == 4 else jnp.float8_e5m2)

    @property
    def top(self) -> float:
        """The largest code."""
        return float(jnp.finfo(self.dtype).max)

    @property
    def needs_range(self) -> bool:
        """Whether ``ranges`` must name the activation."""
        return isinstance(self.range, Static)

    def __str__(self) -> str:
        return _words("float8_e4m3" if self.exponent == 4 else "float8_e5m2", self.per, self.range)


ActSpec = Act | Float8
"""What a rule may ask of activations."""


@dataclass(frozen=True)
class Backward:
    """The two products of a site's gradient on rounded codes: ``dL/da`` and ``dL/db`` of ``y = a·b``.

    Each multiplies the incoming gradient with the other operand. Both factors are put on symmetric grids, with a scale
    for each index that the product does not sum over, and multiplied as int8 with sums in int32. Sums that may leave
    int32, the kernel gradients of grouped convolutions, and on CPU and CUDA all convolutions, run in float on the same
    codes.

    Args:
      bits: width of a code, 2..8.
      stochastic: round up with the probability of the remainder, so that the gradient's expectation is the unrounded
        one; else to nearest.

    Raises:
      ValueError: bits outside 2..8.

    >>> Backward()
    Backward(bits=8, stochastic=True)

    Source: Gupta et al. 2015, arXiv:1502.02551, section 3; Banner et al. 2018, arXiv:1805.11046, for 8 bits.
    """

    bits: int = 8
    stochastic: bool = True

    def __post_init__(self) -> None:
        check_bits("Backward", self.bits)

    @property
    def grid(self) -> Int:
        """The grid of the codes, its own mirror image."""
        return Int(self.bits, narrow=True)


def _check_layout(owner: str, per: object, source: RangeKind) -> None:
    checked_layout(owner, per, (Tensor, Tokens, Groups))
    if isinstance(per, Groups) and per.axis is not None:
        raise ValueError(
            f"{owner}: per={per!r} names an axis, and the groups of an activation lie along the last axis that its site"
            f" sums over; take Groups({per.size})."
        )
    if not isinstance(per, Tensor) and not isinstance(source, Dynamic):
        raise ValueError(
            f"{owner}: per={per!r} needs range=Dynamic(), got {source!r}; ranges given from outside are per tensor."
        )


def _words(grid: str, per: ActLayout, source: RangeKind) -> str:
    words = [grid, type(source).__name__]
    return ", ".join(words if isinstance(per, Tensor) else [*words, repr(per)])
