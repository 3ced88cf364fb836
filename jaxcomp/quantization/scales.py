"""How a range is found and how values are rounded on the way to a grid: frozen choices, the slots of quantize."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.core.errors import count_known
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.specs import Spec
from jaxcomp.core.types import Key, PyTree, Shape
from jaxcomp.quantization.numerics.ranges import Ends, absmax_range, mean_range, mse_range, percentile_range

OnGrid = Callable[[jax.Array, jax.Array | None], jax.Array]
"""The values on the grid of a range: ``on_grid(top, bottom)``."""


class FoundRange(Spec, ABC):
    """A rule that finds the range of each block in its values."""

    @abstractmethod
    def ends(self, x: jax.Array, blocks: Shape, mask: jax.Array | None, *, symmetric: bool, on_grid: OnGrid) -> Ends:
        """The two ends, one of each a block; the lower is None for ``-top``.

        Args:
          x: the values, through which no gradient flows.
          blocks: how many there are along each axis.
          mask: which values count; what it hides is 0.
          symmetric: whether the grid has one end for both signs.
          on_grid: the values on the grid of a range.
        """


@dataclass(frozen=True)
class AbsMax(FoundRange):
    """A block's range ends at its largest magnitude, or at its two extremes for an asymmetric grid."""

    def ends(  # noqa: D102
        self, x: jax.Array, blocks: Shape, mask: jax.Array | None, *, symmetric: bool, on_grid: OnGrid
    ) -> Ends:
        return absmax_range(x, blocks, symmetric)


@dataclass(frozen=True)
class MeanAbs(FoundRange):
    """A block's range ends at its mean magnitude: the scale of a sign, least squares for it.

    Source: Rastegari et al. 2016, arXiv:1603.05279, equation 6.
    """

    def ends(  # noqa: D102
        self, x: jax.Array, blocks: Shape, mask: jax.Array | None, *, symmetric: bool, on_grid: OnGrid
    ) -> Ends:
        return mean_range(x, blocks, mask)


@dataclass(frozen=True)
class Percentile(FoundRange):
    """A block's range ends at a percentile of its magnitudes, or of its values at both sides for an asymmetric grid.

    It is the smallest magnitude that at least ``percent`` of the block's do not exceed; what lies beyond saturates.
    Zeros are not counted, a mask's or others: they are on the grid whatever its range, and of mostly zeros the range
    would be 0.

    Args:
      percent: above 50, at most 100.

    Raises:
      ValueError: another number.
    """

    percent: float = 99.9

    def __post_init__(self) -> None:
        if not isinstance(self.percent, numbers.Real) or not 50 < float(self.percent) <= 100:
            raise ValueError(f"Percentile: percent must be a number in (50, 100], got {self.percent!r}.")

    def ends(  # noqa: D102
        self, x: jax.Array, blocks: Shape, mask: jax.Array | None, *, symmetric: bool, on_grid: OnGrid
    ) -> Ends:
        top, bottom = percentile_range(x, blocks, percent=float(self.percent), symmetric=symmetric)
        lost = ~jnp.isfinite(absmax_range(x, blocks, True)[0])  # a percentile may pass NaN and infinity by
        return jnp.where(lost, jnp.nan, top), bottom


@dataclass(frozen=True)
class MSE(FoundRange):
    """Of ``steps`` ranges from ``smallest`` times a block's largest magnitude up to it, the one of least squared error.

    Args:
      smallest: the fraction to begin at, in (0, 1).
      steps: how many ranges are tried, at least 2.

    Raises:
      ValueError: another fraction or fewer steps.
    """

    smallest: float = 0.3
    steps: int = 57

    def __post_init__(self) -> None:
        if not isinstance(self.smallest, numbers.Real) or not 0 < float(self.smallest) < 1:
            raise ValueError(f"MSE: smallest must be a fraction in (0, 1), got {self.smallest!r}.")
        if not isinstance(self.steps, numbers.Integral) or self.steps < 2:
            raise ValueError(f"MSE: steps must be an integer of at least 2, got {self.steps!r}.")

    def ends(  # noqa: D102
        self, x: jax.Array, blocks: Shape, mask: jax.Array | None, *, symmetric: bool, on_grid: OnGrid
    ) -> Ends:
        ratios = np.linspace(1.0, float(self.smallest), int(self.steps))
        return mse_range(x, blocks, absmax_range(x, blocks, symmetric), ratios, on_grid)


@dataclass(frozen=True, eq=False)
class Fixed(Spec):
    """A given range: ``[-end, end]``, where ``end`` is a number, or a tree of arrays by the parameters' paths.

    Args:
      end: a positive number, or a tree with an array for each selected leaf that broadcasts to the scale's shape.

    Raises:
      ValueError: a number that is not positive and finite, in a tree too.
    """

    end: float | PyTree

    def __post_init__(self) -> None:
        if isinstance(self.end, numbers.Real) and not 0 < float(self.end) < math.inf:
            raise ValueError(f"Fixed: the range's end must be positive and finite, got {self.end!r}.")
        for path, x in leaves_with_paths(self.end)[0]:
            if count_known(lambda x: ~((x > 0) & jnp.isfinite(x)), x):
                raise ValueError(f"Fixed: the range's end at {path!r} must be positive and finite, got {x!r}.")


ScaleRule = FoundRange | Fixed


def checked_rule(owner: str, rule: object) -> None:
    """Raises TypeError where ``rule`` is neither None nor a rule that finds a range."""
    if rule is not None and not isinstance(rule, ScaleRule):
        raise TypeError(f"{owner}: scale must be a rule such as AbsMax() or MSE(), got {rule!r}.")


@dataclass(frozen=True)
class Nearest(Spec):
    """Rounds to the nearest level; ties as the grid says."""


@dataclass(frozen=True, eq=False)
class Stochastic(Spec):
    """Rounds up or down at random, such that the expectation is the value itself, clipped to the range.

    Each ``update`` folds its step into the key, and each leaf its path, so a step and a leaf have their own numbers.

    Args:
      key: one typed key, such as ``jax.random.key(0)``.

    Raises:
      TypeError: anything else.

    Source: Gupta et al. 2015, arXiv:1502.02551, section 3.
    """

    key: Key

    def __post_init__(self) -> None:
        typed = hasattr(self.key, "dtype") and jnp.issubdtype(self.key.dtype, jax.dtypes.prng_key)
        if not typed or self.key.shape != ():
            raise TypeError(f"Stochastic: wants one typed key such as jax.random.key(0), got {self.key!r}.")


Rounding = Nearest | Stochastic


def checked_rounding(owner: str, rounding: object) -> None:
    """Raises TypeError where ``rounding`` is no way of rounding."""
    if not isinstance(rounding, Rounding):
        raise TypeError(f"{owner}: rounding must be Nearest() or Stochastic(key), got {rounding!r}.")
