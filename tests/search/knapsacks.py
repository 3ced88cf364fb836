"""Problems of allocation, and what solves them otherwise: by trying all, and by the states that none beats."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxcomp.search import Option, Table, Unit

HAWQ = json.loads((Path(__file__).parent / "hawq_v3.json").read_text())
"""The published problems, by network."""
HAWQ_COSTS = ("bytes", "bops", "ms")


def hawq(network: str) -> Table:
    """A published problem as a table: 4 or 8 bits for each layer, those of a residual sum alike."""
    data = HAWQ[network]
    tied = {i: f"sum {n}" for n, pair in enumerate(data["tied"]) for i in pair}

    def unit(i: int) -> Unit:
        def option(bits: int) -> Option:
            size, macs = data["parameters"][i] * bits / 8, data["macs"][i] * bits * bits
            costs = {"bytes": size, "bops": float(macs), "ms": data[f"latency{bits}"][i]}
            ties = {tied[i]: f"{bits} bits"} if i in tied else {}
            return Option(f"int{bits}", costs=costs, loss=data["trace"][i] * data[f"error{bits}"][i], ties=ties)

        return Unit(f"layer {i}", (f"layer {i}",), (option(4), option(8)))

    return Table(tuple(unit(i) for i in range(len(data["trace"]))), "Ω")


def halfway(table: Table, cost: str) -> float:
    """The budget of the notebook: midway between all layers at 4 and all at 8 bits."""
    small, large = (sum(u.option(f"int{b}").costs[cost] for u in table) for b in (4, 8))
    return small + 0.5 * (large - small)


def tied_together(table: Table) -> list[list[tuple[float, dict[str, float]]]]:
    """Each decision's ``(loss, costs)`` by level, tied units as one; all units have the same labels."""
    groups: dict[str, list[Unit]] = {}
    for unit in table:
        groups.setdefault(next(iter(unit.options[0].ties), unit.name), []).append(unit)
    found = []
    for units in groups.values():
        labels = [o.label for o in units[0].options]
        rows = [[u.option(label) for u in units] for label in labels]
        found.append(
            [(math.fsum(o.loss for o in r), {k: math.fsum(o.costs[k] for o in r) for k in r[0].costs}) for r in rows]
        )
    return found


def least_by_states(table: Table, cost: str, budget: float) -> float:
    """The least loss under one budget: of all sums of a prefix only those are kept that none beats in both."""
    states = np.zeros((1, 2))
    for options in tied_together(table):
        grown = np.concatenate([states + np.array([costs[cost], loss]) for loss, costs in options])
        grown = grown[grown[:, 0] <= budget * (1 + 1e-12)]
        grown = grown[np.lexsort((grown[:, 1], grown[:, 0]))]
        best = np.minimum.accumulate(grown[:, 1])
        states = grown[np.concatenate([[True], best[1:] < best[:-1]])]
    return float(states[:, 1].min())


def least_by_trying(table: Table, budgets: dict[str, float]) -> float | None:
    """The least loss of all choices that agree on ties and are within the budgets."""
    best = None
    for chosen in itertools.product(*(unit.options for unit in table)):
        said: dict[str, set[str]] = {}
        for option in chosen:
            for tie, level in option.ties.items():
                said.setdefault(tie, set()).add(level)
        sums = {k: math.fsum(o.costs[k] for o in chosen) for k in budgets}
        loss = math.fsum(o.loss for o in chosen)
        if all(len(levels) == 1 for levels in said.values()) and all(sums[k] <= b for k, b in budgets.items()):
            best = loss if best is None else min(best, loss)
    return best


def random_table(seed: int, *, units: int, options: int, tied: Sequence[int] = ()) -> Table:
    """Losses over many orders of magnitude, as bits have them, and two costs."""
    rng = np.random.default_rng(seed)

    def unit(i: int) -> Unit:
        rows = tuple(
            Option(
                f"o{j}",
                costs={"a": float(rng.integers(1, 50)), "b": float(rng.random())},
                loss=float(10.0 ** rng.uniform(-9, 1)),
                ties={"t": f"l{j}"} if i in tied else {},
            )
            for j in range(options)
        )
        return Unit(f"u{i}", (f"u{i}/kernel",), rows)

    return Table(tuple(unit(i) for i in range(units)))
