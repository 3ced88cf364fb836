"""What a report holds, whatever it is written as."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxcomp.activations.coverage import Coverage
from jaxcomp.report.compare import Change
from jaxcomp.report.frontier import Point, frontier
from jaxcomp.report.histograms import Histogram


@dataclass(frozen=True, eq=False)
class Drawn:
    """What is drawn of one leaf.

    Attributes:
      path: of the leaf.
      histogram: of its weights; None where there is nothing to compare them with.
      kept: where its weights are not 0; None where few of them are.
    """

    path: str
    histogram: Histogram | None
    kept: np.ndarray | None


@dataclass(frozen=True)
class Total:
    """All leaves of one tree together.

    Attributes:
      bytes: of the file.
      weights: how many numbers its arrays have.
      zeros: the fraction of them that are 0.
      macs: multiply-accumulates of one run, where they were asked for.
    """

    bytes: int
    weights: int
    zeros: float
    macs: int | None

    @property
    def bits(self) -> float:
        """Bits of the file for each weight."""
        return 8 * self.bytes / max(self.weights, 1)


@dataclass(frozen=True, eq=False, repr=False)
class Contents:
    """Two trees compared.

    Attributes:
      title: of the page.
      before, after: the totals.
      layers: what became of each leaf.
      points: networks that were measured, for the frontier.
      score: what their score is called.
      higher: whether a higher score is better.
      coverage: what runs how, where it was given.
      drawn: the leaves that the page has pictures of.
    """

    title: str
    before: Total
    after: Total
    layers: tuple[Change, ...]
    points: tuple[Point, ...]
    score: str
    higher: bool
    coverage: Coverage | None
    drawn: tuple[Drawn, ...]

    @property
    def ratio(self) -> float:
        """How many times smaller the file is."""
        return self.before.bytes / self.after.bytes

    @property
    def frontier(self) -> tuple[Point, ...]:
        """The points that none beats."""
        return frontier(self.points, higher=self.higher)
