"""The multiple-choice knapsack with ties as an integer program, solved to optimality by scipy's HiGHS."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from jaxcomp.search.options import Option, Unit

LOSS = "loss"
"""What is minimized, or bounded, beside costs."""
_ROUNDS = 200


def _value(option: Option, name: str) -> float:
    return option.loss if name == LOSS else option.costs.get(name, 0.0)


def sum_of(options: list[Option], name: str) -> float:
    """What is taken of a cost, or lost, together; correctly rounded."""
    return math.fsum(_value(o, name) for o in options)


@dataclass
class Knapsack:
    """The integer program: a 0/1 variable an option, one 1 a unit."""

    units: list[Unit]
    budgets: dict[str, float]
    minimize: str
    seconds: float
    forbidden: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.flat = [(i, o) for i, unit in enumerate(self.units) for o in unit.options]
        self.owner = np.array([i for i, _ in self.flat])

    def column(self, name: str) -> np.ndarray:
        """A cost, or the loss, of every variable."""
        return np.array([_value(o, name) for _, o in self.flat])

    def best(self) -> tuple[list[Option], float] | None:
        """The best choice, and what none can be below; None where there is none.

        The solver stops at an absolute gap of 1e-6. So what is minimized is counted from each unit's least, and solved
        again in units of what was found, without the options that lose more by themselves, until that no longer helps.
        """
        value = self.column(self.minimize)
        least = np.array([value[self.owner == i].min() for i in range(len(self.units))])
        excess, base = value - least[self.owner], math.fsum(least)
        scale = max(float(excess.max()), np.finfo(float).tiny)
        while True:
            solved = self._solve(1e3 * excess / scale, allowed=excess <= scale * (1 + 1e-9))
            if solved is None:
                return None
            at, bound = solved
            found = math.fsum(excess[at])
            if found > 0.5 * scale or found == 0.0 or scale <= 1e-300:
                total = sum_of([self.flat[i][1] for i in at], self.minimize)
                low = min(total, base + bound * scale / 1e3)
                near = total - low <= 2e-9 * max(found, abs(total) * 1e-6)
                return [self.flat[i][1] for i in at], total if near else low
            scale = found

    def _solve(self, objective: np.ndarray, *, allowed: np.ndarray) -> tuple[list[int], float] | None:
        """The variables that are 1, whose sums were checked, and the bound in the objective's unit."""
        from scipy.optimize import Bounds, milp

        ties = self._ties(len(objective))
        for _ in range(_ROUNDS):
            done = milp(
                objective,
                integrality=np.ones(len(objective)),
                bounds=Bounds(0, allowed.astype(float)),
                constraints=self._constraints(),
                options={"mip_rel_gap": 0.0, "time_limit": self.seconds},
            )
            if done.x is None:
                if done.status == 1:
                    raise ValueError(f"allocate: no choice was found in {self.seconds:g} seconds; allow more seconds.")
                return None
            at = self._rounded(done.x)
            if self._serves(at, ties):
                bound = done.mip_dual_bound
                return at, float(objective[at].sum()) if bound is None else float(bound)
            self.forbidden.append(tuple(at))  # within the solver's tolerance, and not in fact
        raise ValueError(f"allocate: {_ROUNDS} choices exceed a budget or break a tie by rounding; change it a little.")

    def _serves(self, at: list[int], ties: list[np.ndarray]) -> bool:
        """Whether a choice keeps budgets and ties: the solver does not always do what it says (scipy issue 24141)."""
        chosen = np.isin(np.arange(len(self.flat)), at).astype(float)
        within = (sum_of([self.flat[i][1] for i in at], name) <= limit for name, limit in self.budgets.items())
        return all(within) and all(row @ chosen == 0 for row in ties)

    def _rounded(self, x: np.ndarray) -> list[int]:
        return [int(np.flatnonzero(self.owner == i)[np.argmax(x[self.owner == i])]) for i in range(len(self.units))]

    def _constraints(self, extra: int = 0) -> list[object]:
        """One option a unit, equal ties, budgets, choices that are out; ``extra`` columns stand behind."""
        from scipy.optimize import LinearConstraint

        count, width = len(self.flat), len(self.flat) + extra
        one = np.zeros((len(self.units), width))
        one[self.owner, np.arange(count)] = 1
        rows, upper = [self.column(k) / limit for k, limit in self.budgets.items()], [1.0] * len(self.budgets)
        for at in self.forbidden:
            rows.append(np.isin(np.arange(count), at).astype(float))
            upper.append(len(at) - 1.0)
        found: list[object] = [LinearConstraint(one, 1, 1)]
        if ties := self._ties(width):
            found.append(LinearConstraint(np.array(ties), 0, 0))
        if rows and not extra:
            found.append(LinearConstraint(np.array(rows), -np.inf, np.array(upper)))
        return found

    def _ties(self, width: int) -> list[np.ndarray]:
        """A row for each tie, level and second unit: as many 1s say it there as in the first unit that says it."""
        says: dict[str, dict[int, dict[str, list[int]]]] = {}
        for at, (unit, option) in enumerate(self.flat):
            for tie, level in option.ties.items():
                says.setdefault(tie, {}).setdefault(unit, {}).setdefault(level, []).append(at)
        rows = []
        for by_unit in says.values():
            first, *others = by_unit.values()
            for other in others:
                for level in dict.fromkeys((*first, *other)):
                    row = np.zeros(width)
                    row[first.get(level, [])] = 1
                    row[other.get(level, [])] = -1
                    rows.append(row)
        return rows

    def nearest(self) -> list[Option] | None:
        """The choice that exceeds the budgets by the smallest factor."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        count = len(self.flat)
        over = np.array([[*self.column(k) / limit, -1.0] for k, limit in self.budgets.items()]).reshape(-1, count + 1)
        done = milp(
            np.array([*np.zeros(count), 1.0]),
            integrality=np.array([*np.ones(count), 0]),
            bounds=Bounds(0, np.array([*np.ones(count), np.inf])),
            constraints=[*self._constraints(extra=1), LinearConstraint(over, -np.inf, 0)],
            options={"mip_rel_gap": 0.0, "time_limit": self.seconds},
        )
        return None if done.x is None else [self.flat[i][1] for i in self._rounded(done.x[:count])]
