"""The published allocation problems of HAWQ-V3, solved to optimality: seconds of each.

Command: ``python -m tests.benchmarks allocation``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from jaxcomp.search import allocate
from tests.benchmarks.timing import Report, Row
from tests.search.knapsacks import HAWQ_COSTS, halfway, hawq


def run() -> Iterator[Report]:
    """A row for each network and cost."""
    rows = []
    for network in ("resnet18", "resnet50"):
        table = hawq(network)
        for cost in HAWQ_COSTS:
            budget, took = {cost: halfway(table, cost)}, []
            for _ in range(5):
                began = time.perf_counter()
                plan = allocate(table, budget)
                took.append(time.perf_counter() - began)
            assert plan.gap == 0
            rows.append(Row(f"{network}, {cost}", float(np.median(took)), min(took), max(took), "gap 0", "<= 1"))
    yield Report("HAWQ-V3's problems, milp of scipy", "a second", rows, [])
