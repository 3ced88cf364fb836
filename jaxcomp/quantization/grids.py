"""Uniform grids of integers, and grids that are uniform after a monotone function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxcomp.core.specs import Spec, check_bits


@dataclass(frozen=True)
class Int(Spec):
    """A uniform integer grid: ``dense == (codes - zero_point) * scale`` with codes of ``bits`` bits.

    Symmetric codes are two's complement in ``[-2**(bits-1), 2**(bits-1) - 1]`` with zero point 0 and
    ``scale = absmax / (2**(bits-1) - 0.5)``, which rounds both ends by half a step. Asymmetric codes are
    in ``[0, 2**bits - 1]`` and their range always holds 0, so that zeros stay zero.

    ``Int(1)`` is the sign: codes -1 and 1, 1 for a weight of 0, ``scale`` the mean magnitude. It has no zero: what a
    mask hides stays zero by the mask alone. A sign has no range either, so its gradient is cut nowhere.

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
    def low(self) -> int:
        """The code that is stored as 0: two's complement's lowest for a symmetric grid, narrow or not."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0


@dataclass(frozen=True)
class Compander:
    """A monotone odd pair ``(compress, expand)``, ``expand(compress(w)) == w``, with a name that files can hold.

    Args:
      name: how a saved file refers to the pair.
      compress: elementwise ``f``; ``f(0) == 0``, increasing, odd.
      expand: its inverse; differentiable at 0 too, or weights whose code is 0 stop learning.
    """

    name: str
    compress: Callable[[jax.Array], jax.Array]
    expand: Callable[[jax.Array], jax.Array]

    def __post_init__(self) -> None:
        if not self.name or not callable(self.compress) or not callable(self.expand):
            raise ValueError(f"Compander: wants a name and two functions, got {self!r}.")


@jax.custom_jvp
def _log_compress(w: jax.Array) -> jax.Array:
    return jnp.sign(w) * jnp.log1p(jnp.abs(w))


@jax.custom_jvp
def _log_expand(v: jax.Array) -> jax.Array:
    return jnp.sign(v) * jnp.expm1(jnp.abs(v))


# Written out, for |.| has no derivative at 0 and a weight whose code is 0 must go on learning.
_log_compress.defjvps(lambda t, _, w: t / (1 + jnp.abs(w)))


_log_expand.defjvps(lambda t, _, v: t * jnp.exp(jnp.abs(v)))


LOG = Compander("log1p", _log_compress, _log_expand)
"""``f(w) = sign(w) log(1 + |w|)`` and its inverse ``sign(v) (exp(|v|) - 1)``."""


@dataclass(frozen=True)
class Companded(Spec):
    """A non-uniform grid: uniform in ``f(w)``, so ``dense == f⁻¹(codes * step)``.

    ``codes = round(f(w) * s)`` with ``s = (2**(bits-1) - 1) / f(max|w|)`` and ``step = 1 / s``; codes are
    symmetric, zeros stay zero.

    Args:
      bits: width of a code with its sign, 2..8.
      compander: the pair ``f``, ``f⁻¹``.

    Raises:
      ValueError: bits outside 2..8.

    >>> Companded(4).compander.name
    'log1p'

    Source: companding as in ITU-T G.711 (μ-law, here with μ = 1 in the weight's own units).
    """

    bits: int = 8
    compander: Compander = LOG

    def __post_init__(self) -> None:
        check_bits("Companded", self.bits)

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return -(2 ** (self.bits - 1)) + 1, 2 ** (self.bits - 1) - 1

    @property
    def low(self) -> int:
        """The code that is stored as 0: two's complement's lowest for a symmetric grid, narrow or not."""
        return -(2 ** (self.bits - 1))


def Log(bits: int = 8) -> Companded:
    """The logarithmic grid, ``Companded(bits, LOG)``."""
    return Companded(bits)
