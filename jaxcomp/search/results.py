"""What ``compress`` gives: the smaller network, the function that runs it, the plan, and the evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxcomp.core.leaves import materialize
from jaxcomp.core.types import Params, PyTree
from jaxcomp.report.frontier import Point
from jaxcomp.report.page import Report, report
from jaxcomp.search.plans import Plan
from jaxcomp.structure.plans import Plan as Kept
from jaxcomp.structure.shrinking import shrink


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed network.

    Attributes:
      params: its leaves, compressed and packed; ``jaxcomp.save`` writes them with ``coding``.
      original: the function that was compressed, ``original(params, *args)``.
      before: the parameters as they were.
      plan: what was decided, of each unit; ``print`` it.
      kept: which channels stay, where some went.
      coding: of the file.
      costs, costs_before: what it takes, and took; the bytes are those of the files.
      score, score_before: on held-out data: of your own quality, or the distance from the original's outputs.
      score_name, higher: what that is, and whether more is better.
      met: whether budget and quality are kept.
      points: the networks that were tried, for the frontier.
      notes: in words, what one should know.
      seconds: that each stage took.
    """

    params: Params
    original: Callable[..., PyTree]
    before: Params
    plan: Plan
    kept: Kept | None
    coding: str | None
    costs: Mapping[str, float]
    costs_before: Mapping[str, float]
    score: float
    score_before: float
    score_name: str
    higher: bool
    met: bool
    points: tuple[Point, ...]
    notes: tuple[str, ...]
    seconds: Mapping[str, float]

    @property
    def fn(self) -> Callable[..., PyTree]:
        """``fn(params, *args)`` of the compressed parameters; put it under ``jax.jit``."""
        run = self.original if self.kept is None else shrink(self.original, self.kept)
        return lambda params, *args: run(materialize(params), *args)

    @property
    def ratio(self) -> float:
        """How many times smaller the file is."""
        return self.costs_before["bytes"] / max(self.costs["bytes"], 1)

    def report(self, title: str = "What compression did") -> Report:
        """A page: each leaf before and after, and the frontier of what was tried.

        Args:
          title: of the page.
        """
        sizes = (int(self.costs_before["bytes"]), int(self.costs["bytes"]))
        return report(
            self.before,
            self.params,
            title=title,
            points=self.points,
            score=self.score_name,
            higher=self.higher,
            sizes=sizes,
        )

    def __repr__(self) -> str:
        less = ", ".join(
            f"{self.costs[k]:,.6g} of {was:,.6g} {k} ({was / max(self.costs[k], 1e-300):.3g}x less)"
            for k, was in self.costs_before.items()
            if was
        )
        lines = [
            f"Compressed: {less}.",
            f"{self.score_name}: {self.score:.6g}, of the original {self.score_before:.6g}.",
            *self.notes,
            f"Seconds: {', '.join(f'{k} {s:.1f}' for k, s in self.seconds.items())}.",
        ]
        return "\n".join(lines)
