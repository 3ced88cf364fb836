"""What is asked of a compressed network: budgets of what it takes, and a quality that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxcomp.core.paths import some_paths
from jaxcomp.core.specs import Spec, is_number
from jaxcomp.core.types import PyTree

Run = Callable[..., PyTree]
"""``run(*args)``: a network's outputs."""


@dataclass(frozen=True)
class Smaller(Spec):
    """A budget as a fraction of what the original takes: ``Smaller(8)`` is an eighth.

    Raises:
      ValueError: not above 1.
    """

    times: float

    def __post_init__(self) -> None:
        if not is_number(self.times) or not self.times > 1:
            raise ValueError(f"Smaller: times must be a number above 1, got {self.times!r}.")


Budget = float | Smaller | Mapping[str, float | Smaller]
"""How many times smaller the file is; or, of "bytes", "macs", "bops" or "seconds", how much, or how many times less."""


@dataclass(frozen=True)
class Quality:
    """What the network must keep of a score of your own.

    Args:
      measure: ``measure(run)`` gives the score, where ``run(*args)`` gives a network's outputs; on data that
        ``compress`` has not seen, labels and all.
      drop: by how much it may be worse than the original's.
      name: of the score.
      higher: whether a higher one is better.
    """

    measure: Callable[[Run], float]
    drop: float
    name: str = "accuracy"
    higher: bool = True

    def __post_init__(self) -> None:
        if not is_number(self.drop) or not self.drop >= 0:
            raise ValueError(f"Quality: drop must be a number, 0 or more, got {self.drop!r}.")

    def kept(self, score: float, original: float) -> bool:
        """Whether a score is good enough."""
        return score >= original - self.drop if self.higher else score <= original + self.drop


def limits_of(budget: Budget | None, original: Mapping[str, float]) -> dict[str, float]:
    """Budgets as numbers.

    Args:
      budget: as the user says it.
      original: what the network takes as it is.

    Raises:
      ValueError: a budget of what is not counted, or one that is not positive.

    >>> limits_of(8, {"bytes": 800.0}), limits_of({"macs": Smaller(2), "bytes": 30}, {"bytes": 800.0, "macs": 64.0})
    ({'bytes': 100.0}, {'macs': 32.0, 'bytes': 30.0})
    """
    if budget is None:
        return {}
    asked = dict(budget) if isinstance(budget, Mapping) else {"bytes": Smaller(budget) if is_number(budget) else budget}
    found = {}
    for name, limit in asked.items():
        if name not in original:
            raise ValueError(
                f"compress: there is no cost {name!r}; budgets are of {some_paths(sorted(original))}"
                + (", and of 'seconds' with terms=Terms(device=...)." if name == "seconds" else ".")
            )
        value = original[name] / limit.times if isinstance(limit, Smaller) else limit
        if not is_number(value) or not value > 0:
            raise ValueError(f"compress: the budget of {name} must be positive or Smaller(times), got {limit!r}.")
        found[name] = float(value)
    return found
