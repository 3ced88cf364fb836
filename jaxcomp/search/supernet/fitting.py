"""Widths within budgets: what they cost, and the nearest possible ones to those that cost too much."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxcomp.core.paths import some_paths
from jaxcomp.search.allocation import Infeasible, allocate
from jaxcomp.search.options import Option, Table, Unit
from jaxcomp.search.supernet.widths import Supernet
from jaxcomp.structure.groups import Term
from jaxcomp.structure.plans import Plan

Counts = tuple[int, ...]
"""How many units of each group stay."""
CostOf = Callable[[Plan], float]
"""What a plan costs; less, the fewer units stay."""
_COMBINED = 4096
_TERMS: Mapping[str, Callable[[Supernet], Sequence[Term]]] = {
    "macs": lambda net: net.groups.mac_terms,
    "parameters": lambda net: net.groups.parameter_terms,
}


class Budgets:
    """Which widths are within all budgets.

    Raises:
      ValueError: no budget, one that is not positive and finite or of what nobody counts, or one that the narrowest
        exceeds; a cost of that one that is no finite number.
    """

    def __init__(self, net: Supernet, limits: Mapping[str, float], costs: Mapping[str, CostOf]) -> None:
        known: dict[str, CostOf] = {"macs": lambda plan: plan.macs, "parameters": lambda plan: plan.parameters, **costs}
        for name, limit in limits.items():
            if name not in known:
                raise ValueError(f"narrow: nothing counts {name!r}; wanted of {some_paths(known)}, or one of costs=.")
            if not 0 < limit < math.inf:
                raise ValueError(f"narrow: the budget of {name} must be positive and finite, got {limit!r}.")
        if not limits:
            raise ValueError(f"narrow: no budget; give one of {some_paths(known)}, such as {{'macs': 1e6}}.")
        self.net, self.limits, self.known = net, dict(limits), {name: known[name] for name in limits}
        self.seen: dict[Counts, dict[str, float]] = {}
        least = self.costs(_counts(net.narrowest))
        if unknown := [name for name, cost in least.items() if not math.isfinite(cost)]:
            raise ValueError(
                f"narrow: of the narrowest network costs= counts {least[unknown[0]]!r} {unknown[0]}; it must give a "
                "finite number."
            )
        if over := [f"{least[k]:,g} {k} of {limit:,g}" for k, limit in self.limits.items() if least[k] > limit]:
            raise ValueError(
                f"narrow: the narrowest network exceeds the budgets: {', '.join(over)}; allow more, or make the "
                "supernet with lower levels."
            )

    def costs(self, counts: Counts) -> dict[str, float]:
        """What these widths cost, by budget."""
        if counts not in self.seen:
            plan = self.net.plan(counts)
            self.seen[counts] = {name: float(cost(plan)) for name, cost in self.known.items()}
        return self.seen[counts]

    def meets(self, counts: Counts) -> bool:
        """Whether they are within all budgets."""
        found = self.costs(counts)
        return all(found[name] <= limit for name, limit in self.limits.items())

    def uniform(self) -> Counts:
        """The widest level, alike in all groups, that is within; the narrowest is."""
        columns = (_counts(column) for column in self.net.table.T[::-1])
        return next(counts for counts in columns if self.meets(counts))

    def repaired(self, counts: Counts) -> Counts:
        """Widths within the budgets that leave nothing of them unused, near the given ones.

        Groups get narrower a level at a time, in an order that is drawn from the widths themselves, until they are
        within; then each gets as wide as there is room for, in such an order.
        """
        rng = np.random.default_rng([len(counts), *counts])
        levels = [sorted(set(row)) for row in self.net.table.tolist()]
        at = [row.index(n) for row, n in zip(levels, counts, strict=True)]
        moves = rng.permutation(np.repeat(np.arange(len(at)), at))

        def after(taken: int) -> list[int]:
            down = np.bincount(moves[:taken], minlength=len(at))
            return [i - int(d) for i, d in zip(at, down, strict=True)]

        def widths(at: Sequence[int]) -> Counts:
            return tuple(row[i] for row, i in zip(levels, at, strict=True))

        low, high = 0, len(moves)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.meets(widths(after(middle))) else (middle + 1, high)
        at = after(low)
        for g in rng.permutation(len(at)):
            while at[g] + 1 < len(levels[g]) and self.meets(widths([*at[:g], at[g] + 1, *at[g + 1 :]])):
                at[g] += 1
        return widths(at)

    def allocated(self, losses: Sequence[Mapping[int, float]]) -> Counts | None:
        """The exact best if losses of groups added up: by an integer program.

        A product's work is that of all groups that meet there, so each set of groups that do is a unit of costs, tied
        to their decisions. None where a cost is a function of one's own, which is no sum, or where so many groups meet,
        as in layers that are all joined to those after them, that their counts have more than 4096 combinations.

        Args:
          losses: of each group what each of its counts loses.
        """
        if not set(self.limits) <= set(_TERMS):
            return None
        none = dict.fromkeys(self.limits, 0.0)
        units = [
            Unit(str(g), (), tuple(Option(str(n), costs=none, loss=x, ties={str(g): str(n)}) for n, x in found.items()))
            for g, found in enumerate(losses)
        ]
        parts: dict[tuple[int, ...], dict[str, list[Term]]] = {}
        for name in self.limits:
            for term in _TERMS[name](self.net):
                parts.setdefault(_groups(term), {}).setdefault(name, []).append(term)
        if any(math.prod(len(losses[g]) for g in met) > _COMBINED for met in parts):
            return None
        units += [self._shared(met, terms, losses) for met, terms in parts.items()]
        try:
            plan = allocate(Table(tuple(units)), self.limits)
        except Infeasible:  # by rounding alone: the narrowest is within
            return None
        return tuple(int(plan.choice[str(g)]) for g in range(len(losses)))

    def _shared(
        self, met: tuple[int, ...], terms: Mapping[str, Sequence[Term]], losses: Sequence[Mapping[int, float]]
    ) -> Unit:
        """What the products cost where these groups meet, at all their counts."""
        options = []
        for at in itertools.product(*(losses[g] for g in met)):
            kept = [g.units for g in self.net.groups]
            for g, n in zip(met, at, strict=True):
                kept[g] = n
            costs = {name: float(sum(term(kept) for term in terms.get(name, ()))) for name in self.limits}
            ties = {str(g): str(n) for g, n in zip(met, at, strict=True)}
            options.append(Option(" ".join(map(str, at)) or "all", costs=costs, loss=0.0, ties=ties))
        return Unit("at " + " ".join(map(str, met)), (), tuple(options))


def _groups(term: Term) -> tuple[int, ...]:
    return tuple(sorted({g for _, per in term.widths for g, _ in per}))


def _counts(row: np.ndarray) -> Counts:
    return tuple(row.tolist())
