"""Where adapters start, in frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxcomp.core.specs import Spec, is_integer


@dataclass(frozen=True)
class Zeros(Spec):
    """An adapter starts at 0: of its factors the one that the inputs meet is random, the other one zero.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """

    goes_into: ClassVar[str] = "adapt"


@dataclass(frozen=True)
class Residual(Spec):
    """An adapter starts at what the base's transform lost, in turns: ``Q = q(W - A)``, then ``A = svd(W - Q)``.

    Args:
      rounds: how often.

    Source: LoftQ, Li et al. 2023, arXiv:2310.08659, algorithm 1.
    """

    rounds: int = 1

    goes_into: ClassVar[str] = "adapt"

    def __post_init__(self) -> None:
        if not is_integer(self.rounds) or self.rounds < 1:
            raise ValueError(f"Residual: rounds must be a positive integer, got {self.rounds!r}.")


@dataclass(frozen=True)
class Principal(Spec):
    """An adapter starts at the largest components of the weights; the base is what they leave.

    Source: PiSSA, Meng et al. 2024, arXiv:2404.02948, section 3.
    """

    goes_into: ClassVar[str] = "adapt"


Start = Zeros | Residual | Principal
"""Where adapters start."""
