"""``allocate``: one option for each unit, so that the least is lost under all budgets; exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from jaxcomp.core.paths import some_paths
from jaxcomp.search.knapsack import LOSS, Knapsack, sum_of
from jaxcomp.search.options import Table, Unit
from jaxcomp.search.plans import Plan


class Infeasible(ValueError):
    """No choice meets the budgets.

    Attributes:
      nearest: the plan that exceeds them by the smallest factor, or None where the ties alone cannot be met.
    """

    def __init__(self, message: str, nearest: Plan | None) -> None:
        super().__init__(message)
        self.nearest = nearest


def allocate(
    table: Table,
    budgets: Mapping[str, float],
    *,
    each: Mapping[str, float] | None = None,
    minimize: str = LOSS,
    seconds: float = 60.0,
) -> Plan:
    """Chooses one option for each unit: the least loss in sum within all budgets, as a multiple-choice knapsack.

    It is solved to optimality by branch and bound; ``plan.bound`` says what no choice can be below, and ``plan.gap`` is
    0 unless time ran out. Sums are checked again in exact arithmetic.

    Args:
      table: what there is to choose from, losses measured.
      budgets: at most so much of each cost in sum over the units. With another ``minimize`` the loss may be bounded
        too: ``allocate(table, {"loss": 0.01}, minimize="bytes")``.
      each: at most so much of a cost in every single unit, such as the activations that are in memory at once.
      minimize: the loss, or a cost.
      seconds: after which the best choice found so far is given.

    Raises:
      Infeasible: no choice meets the budgets; the nearest one is named, and is the error's ``nearest``.
      ValueError: a budget that is not positive or of an unknown cost; an option whose loss was not measured.

    >>> from jaxcomp.search import Option, Table, Unit
    >>> def options(**losses):
    ...     return tuple(Option(f"int{b}", costs={"bytes": float(b)}, loss=losses[f"b{b}"]) for b in (2, 4, 8))
    >>> a, b = Unit("a", ("a",), options(b2=9, b4=1, b8=0)), Unit("b", ("b",), options(b2=0.5, b4=0.1, b8=0))
    >>> plan = allocate(Table((a, b)), {"bytes": 10})
    >>> plan.choice, plan.loss, plan.costs, plan.gap
    ({'a': 'int8', 'b': 'int2'}, 0.5, {'bytes': 10.0}, 0.0)

    Source: the integer program is that of Yao et al. 2021 (HAWQ-V3), arXiv:2011.10680, section 3.4, with any number of
    options and budgets, and with ties between units.
    """
    _check(table, {**budgets, **(each or {})}, minimize)
    usable = _usable(table, each or {})
    problem = Knapsack(usable, {k: float(v) for k, v in budgets.items()}, minimize, seconds)
    found = problem.best()
    if found is None:
        raise _infeasible(table, problem)
    chosen, bound = found
    choice = {unit.name: option.label for unit, option in zip(usable, chosen, strict=True)}
    return Plan(table, choice, dict(budgets), bound=bound, minimize=minimize)


def frontier(table: Table, cost: str, *, points: int = 12, budgets: Mapping[str, float] | None = None) -> list[Plan]:
    """The plans of the least loss at some budgets of one cost, evenly spaced on a logarithmic scale; cheapest first.

    Args:
      table: as of :func:`allocate`.
      cost: which.
      points: how many budgets are tried; plans that come out alike are given once.
      budgets: of other costs, for all of them.

    Raises:
      Infeasible: the other budgets cannot be met.
      ValueError: what :func:`allocate` raises, or fewer than two points.

    >>> from jaxcomp.search import Option, Table, Unit
    >>> small, large = (Option(f"int{b}", costs={"bytes": float(b)}, loss=1 / b) for b in (4, 8))
    >>> [p.costs["bytes"] for p in frontier(Table((Unit("a", ("a",), (small, large)),)), "bytes")]
    [4.0, 8.0]
    """
    if points < 2:
        raise ValueError(f"frontier: points must be at least 2, got {points!r}.")
    others = dict(budgets or {})
    low = allocate(table, others, minimize=cost).costs[cost]
    best = allocate(table, others)
    high = best.costs[cost]
    limits = [low, *np.geomspace(low, high, points)[1:-1]] if 0 < low < high else []
    tried = [*(allocate(table, {**others, cost: float(limit)}) for limit in limits), best]
    plans = {tuple(plan.choice.values()): plan for plan in reversed(tried)}
    return sorted(plans.values(), key=lambda plan: plan.costs[cost])


def _check(table: Table, budgets: Mapping[str, float], minimize: str) -> None:
    known = {*table.costs, LOSS}
    for name in (*budgets, minimize):
        if name not in known:
            raise ValueError(
                f"allocate: no unit has a cost {name!r}; the table has {some_paths(sorted(known))}. Give its options"
                " costs, as jaxcomp.search.choosing(fn, params, *args).priced(table) does."
            )
    for name, limit in budgets.items():
        if not (limit > 0 and math.isfinite(limit)):
            raise ValueError(f"allocate: the budget of {name} must be a positive finite number, got {limit!r}.")
    for unit in table:
        for option in unit.options:
            if not option.measured:
                raise ValueError(
                    f"allocate: nobody measured what {unit.name!r} loses as {option.label!r}; fill the table's losses,"
                    " as jaxcomp.search.measure does."
                )


def _usable(table: Table, each: Mapping[str, float]) -> list[Unit]:
    """The units with the options that may be chosen: of a finite loss, and small enough by themselves."""
    units = []
    for unit in table:
        fitting = [o for o in unit.options if all(o.costs.get(k, 0.0) <= limit for k, limit in each.items())]
        if not fitting:
            k = min(each, key=lambda k: each[k] / max(o.costs.get(k, 0.0) for o in unit.options))
            least = min(unit.options, key=lambda o: o.costs.get(k, 0.0))
            takes = f"{unit.name!r} takes {least.costs[k]:,.10g} {k} at least, as {least.label!r}"
            raise Infeasible(
                f"allocate: {takes}, and {each[k]:,.10g} are allowed in each unit; allow more, or give it a cheaper"
                " option.",
                None,
            )
        finite = tuple(o for o in fitting if math.isfinite(o.loss))
        if not finite:
            raise ValueError(
                f"allocate: every option of {unit.name!r} leaves a network whose outputs are not finite; give it an"
                " option that leaves it as it is."
            )
        units.append(Unit(unit.name, unit.leaves, finite))
    return units


def _infeasible(table: Table, problem: Knapsack) -> Infeasible:
    chosen = problem.nearest()
    if chosen is None:
        ties = sorted({tie for _, option in problem.flat for tie in option.ties})
        return Infeasible(
            f"allocate: no choice agrees on the ties {some_paths(ties)}: tied units need options that say the same.",
            None,
        )
    choice = {unit.name: option.label for unit, option in zip(problem.units, chosen, strict=True)}
    asked = " and ".join(f"{limit:,.10g} {k}" for k, limit in problem.budgets.items())
    least = " and ".join(f"{sum_of(chosen, k):,.10g} {k}" for k in problem.budgets)
    return Infeasible(
        f"allocate: no choice takes at most {asked}; the nearest takes {least}. Allow that, or give units cheaper"
        " options.",
        Plan(table, choice, dict(problem.budgets)),
    )
