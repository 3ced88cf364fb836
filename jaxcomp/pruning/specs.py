"""What pruning takes as one unit, over which leaves an amount is spread, and where gradients go, in frozen values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import jax

from jaxcomp.core.paths import Where, describe
from jaxcomp.core.specs import Global, Local, Spec, checked_fraction, is_integer, is_number
from jaxcomp.core.types import Step

Amount = float | int | Callable[[Step], float | jax.Array]
"""How much is pruned: a fraction in [0, 1), a count of units (an int), or a schedule ``step -> fraction``."""


def checked_amount(owner: str, amount: object) -> Amount:
    """An amount as a float, an int or a schedule.

    Raises:
      ValueError: a fraction outside [0, 1), a negative count, or none of the three.

    >>> checked_amount("prune", 0.5), checked_amount("prune", 3)
    (0.5, 3)
    """
    if callable(amount):
        return amount
    if is_integer(amount) and amount >= 0:
        return int(amount)
    return checked_fraction(owner, amount, "a number in [0, 1) or a schedule, or an int that counts units")


class Units(Spec):
    """A structure whose units lie in one array and are chosen by a threshold over their scores.

    A new one is a frozen dataclass below this class and a score of its units, registered with
    :func:`~jaxcomp.pruning.masks.units.unit_scores`.
    """


@dataclass(frozen=True)
class Element(Units):
    """Prune single elements."""


@dataclass(frozen=True)
class NM(Spec):
    """Keep the ``n`` best of every ``m`` neighbours along an axis: it fixes the sparsity, ``1 - n/m``.

    What is left over where ``m`` does not divide the axis is a group too, filled up with entries that go first.

    Args:
      n, m: ``0 < n < m``; 2 and 4 is what sparse tensor cores take. With ``m`` the whole axis this is a sparsity for
        each output, as Wanda compares.
      axis: along which the products are summed. The default is the last such axis of each leaf, by its roles (see
        :func:`~jaxcomp.pruning.transform.prune`): a convolution's input features, not its window.

    Raises:
      ValueError: n or m is not an integer with ``0 < n < m``.

    >>> NM(2, 4)
    NM(n=2, m=4, axis=None)
    >>> NM(4, 2)
    Traceback (most recent call last):
    ...
    ValueError: NM: keeps n of every m, wants integers 0 < n < m, got n=4, m=2.

    Source: Mishra et al. 2021, arXiv:2104.08378.
    """

    n: int
    m: int
    axis: int | None = None

    def __post_init__(self) -> None:
        if not (is_integer(self.n) and is_integer(self.m) and 0 < self.n < self.m):
            raise ValueError(f"NM: keeps n of every m, wants integers 0 < n < m, got n={self.n!r}, m={self.m!r}.")
        if self.axis is not None and not is_integer(self.axis):
            raise ValueError(f"NM: axis must be one integer, got {self.axis!r}.")


@dataclass(frozen=True)
class Block(Units):
    """Prune whole blocks: ``shape[i]`` neighbours along ``axes[i]``; the last block of an axis may be smaller.

    Args:
      shape: the block's extent along each of ``axes``.
      axes: distinct axes; by default the last ones.
      pool: a block's score is the "mean" or the "max" of its elements' scores.

    Raises:
      ValueError: extents below 1, axes that are not distinct or not as many as the extents, or another pool.

    >>> Block((4, 4), pool="max").axes
    (-2, -1)
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    pool: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple | list) or not isinstance(self.axes, tuple | list):
            raise ValueError(
                f"Block: shape and axes must be tuples, such as (4, 4) and (-2, -1), got {self.shape!r} and"
                f" {self.axes!r}."
            )
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "axes", tuple(self.axes) or tuple(range(-len(self.shape), 0)))
        if not self.shape or not all(is_integer(s) and s >= 1 for s in self.shape):
            raise ValueError(f"Block: the shape must be positive integers, got {self.shape!r}.")
        if len(set(self.axes)) != len(self.shape) or len(self.axes) != len(self.shape):
            raise ValueError(f"Block: wants one distinct axis for each extent of {self.shape}, got axes {self.axes!r}.")
        if self.pool not in ("mean", "max"):
            raise ValueError(f"Block: pool must be 'mean' or 'max', got {self.pool!r}.")


Order = int | float | Literal["fro", "nuc"]


@dataclass(frozen=True)
class Filters(Units):
    """Prune whole slices: output features, heads, the filters of a convolution, of each stacked layer its own.

    Args:
      axis: an axis, or axes; every index combination of them is one unit, all other axes go with it. The default are
        the axes of each leaf that no product sums over, by its roles (see :func:`~jaxcomp.pruning.transform.prune`).
      order: the p of the unit's ℓp norm: any number, ``±inf`` (largest or smallest entry), 0 (how many are not zero),
        "fro" (2), or "nuc", the sum of the singular values, of units that are matrices. With 1 scores are summed as
        they are, so those below zero lower the unit's.

    Raises:
      ValueError: an axis that is no integer, or an order that is none of these.
    """

    axis: int | tuple[int, ...] | None = None
    order: Order = 1.0

    def __post_init__(self) -> None:
        named = self.axis if isinstance(self.axis, tuple | list) else (self.axis,)
        if self.axis is not None and not (named and all(map(is_integer, named))):
            raise ValueError(f"Filters: axis must be an integer, or several, got {self.axis!r}.")
        _check_order("Filters", self.order)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes as a tuple.

        Raises:
          ValueError: they are the leaf's to say.
        """
        if self.axis is None:
            raise ValueError("wants axes that are named, as in Filters(-1)")
        return tuple(self.axis) if isinstance(self.axis, tuple | list) else (int(self.axis),)


@dataclass(frozen=True)
class Tied(Spec):
    """Prune slices of several leaves together: unit i is slice i of each, its score the sum of their scores.

    Args:
      axes: rule to axis, in order, first match wins. A rule is a regular expression over the whole path; leaves for
        which its capturing groups hold the same text belong together, and all leaves where there are none.
      order: the p of each slice's ℓp norm, see :class:`Filters`.

    Raises:
      ValueError: no rule, a rule that is not a regular expression, or an order that is none.

    >>> heads = Tied({r"(.*)/(?:query|key|value)/kernel": 1, r"(.*)/out/kernel": 0})
    >>> heads.find("block_0/attn/key/kernel"), heads.find("block_0/attn/out/kernel"), heads.find("mlp/kernel")
    (('block_0/attn', 1), ('block_0/attn', 0), None)
    """

    axes: Mapping[str, int]
    order: Order = 1.0

    def __post_init__(self) -> None:
        if not self.axes or not all(isinstance(r, str) and is_integer(a) for r, a in self.axes.items()):
            raise ValueError(f"Tied: wants a table of regular expression to axis, got {self.axes!r}.")
        for rule in self.axes:
            try:
                re.compile(rule)
            except re.error as e:
                raise ValueError(f"Tied: rule {rule!r} is not a regular expression: {e}.") from e
        _check_order("Tied", self.order)

    def find(self, path: str) -> tuple[str, int] | None:
        """The name of the path's group and its axis there, or None where no rule matches."""
        for rule, axis in self.axes.items():
            match = re.fullmatch(rule, path)
            if match:
                return "+".join(g for g in match.groups() if g is not None) or "all", axis
        return None


Structure = Units | NM | Tied


@dataclass(frozen=True)
class ERK(Spec):
    """Each leaf by itself, denser the smaller it is: ``density_i = min(1, ε (Σ dims_i / Π dims_i)**power)``.

    ε is such that all leaves together meet the sparsity; a leaf whose density would pass 1 stays dense.

    Args:
      power: 1 is Erdős–Rényi-Kernel; below 1 the densities come closer to each other.

    Source: Evci et al. 2019 (RigL), arXiv:1911.11134, section 3; rounding as jaxpruner's (Lee et al. 2023,
    arXiv:2304.14082): a leaf counts ``floor(sparsity * size)`` zeros toward the total.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        if not (is_number(self.power) and 0 <= self.power < math.inf):
            raise ValueError(f"ERK: power must be a number that is not negative, got {self.power!r}.")


@dataclass(frozen=True)
class Heuristic(Spec):
    """Each leaf by itself, sparser the larger it is: ``sparsity_i = min(most, α log(size_i))``.

    α is such that all leaves together meet the sparsity.

    Args:
      most: no leaf gets sparser than this.

    Source: PocketFlow's "heurist" protocol of weight sparsification (Wu et al. 2018), which has no limit and may ask
    for more than the whole leaf; below the limit the numbers are the same.
    """

    most: float = 0.99

    def __post_init__(self) -> None:
        if not checked_fraction("Heuristic", self.most) > 0:
            raise ValueError(f"Heuristic: most must be above 0, got {self.most!r}.")


@dataclass(frozen=True)
class Given(Spec):
    """Each leaf by itself, by a table of rule to amount; first match wins. ``prune`` then takes no sparsity itself.

    Args:
      amounts: rule (regular expression or predicate) to fraction, count or schedule.

    Raises:
      ValueError: no rule, or an amount that is none.

    >>> Given({r".*/head/kernel": 0.0, r".*": 0.9}).amounts[r".*"]
    0.9
    """

    amounts: Mapping[Where, Amount]

    def __post_init__(self) -> None:
        if not self.amounts:
            raise ValueError("Given: wants a table of rule to sparsity, got none.")
        for rule, amount in self.amounts.items():
            checked_amount(f"Given: rule {describe(rule)}", amount)


Scope = Local | Global | ERK | Heuristic | Given


@dataclass(frozen=True)
class Cut(Spec):
    """No gradient reaches what is masked."""


@dataclass(frozen=True)
class StraightThrough(Spec):
    """The gradient passes the mask: masked weights go on learning and may come back at the next update.

    Source: Bengio et al. 2013, arXiv:1308.3432 (the estimator); Lin et al. 2020, arXiv:2006.07253 (on masks).
    """


Gradient = Cut | StraightThrough


def _check_order(owner: str, order: object) -> None:
    if not is_number(order) and order not in ("fro", "nuc"):
        raise ValueError(f"{owner}: the order of the norm must be a number, 'fro' or 'nuc', got {order!r}.")
