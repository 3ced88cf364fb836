"""Grids that are uniform after a monotone function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxcomp.core.specs import check_bits
from jaxcomp.core.types import DType
from jaxcomp.quantization.grids import Grid, ScaleAndZero
from jaxcomp.quantization.numerics.affine import dequantize, in_steps, scale_for
from jaxcomp.quantization.numerics.rounding import round_with


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
class Companded(Grid):
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

    linear: ClassVar[bool] = False
    proportional: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bits("Companded", self.bits)

    def __repr__(self) -> str:
        return f"Log({self.bits})" if self.compander is LOG else f"Companded({self.bits}, {self.compander.name})"

    @property
    def of_zero(self) -> float:  # noqa: D102
        return 0.0

    @property
    def ends(self) -> tuple[int, int]:  # noqa: D102
        return -(2 ** (self.bits - 1)) + 1, 2 ** (self.bits - 1) - 1

    def scale_of(self, top: jax.Array, bottom: jax.Array | None) -> ScaleAndZero:
        """``f(top) / (2**(bits-1) - 1)``: the width of a cell in the companded domain."""
        return scale_for(self.compander.compress(top), self.ends[1]), None

    def encode(
        self,
        w: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | None,
        *,
        noise: jax.Array | None = None,
        clipped: bool = True,
    ) -> jax.Array:
        """``clip(round(f(w) / step))``; the gradient passes ``f`` and skips the rounding."""
        steps = in_steps(self.compander.compress(w.astype(scale.dtype)), scale)
        return round_with(steps, *self.ends, noise=noise, clipped=clipped)

    def decode(self, numbers: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
        """``f⁻¹(numbers * step)``."""
        return self.compander.expand(dequantize(numbers, scale, zero_point))

    def stored(self, numbers: jax.Array) -> tuple[jax.Array, int]:
        """Two's complement, whose lowest code is never there."""
        return numbers, -(2 ** (self.bits - 1))

    def loaded(self, stored: jax.Array, dtype: DType) -> jax.Array:  # noqa: D102
        return stored


def Log(bits: int = 8) -> Companded:
    """The logarithmic grid, ``Companded(bits, LOG)``."""
    return Companded(bits)
