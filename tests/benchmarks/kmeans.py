"""k-means of a million scalars: time against scikit-learn's, inertia against the optimum.

Command: ``python -m tests.benchmarks kmeans``
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from sklearn.cluster import KMeans

from jaxcomp.numerics.kmeans import fit
from jaxcomp.numerics.kmeans_inits import optimal, plus_plus
from tests.benchmarks.timing import Report, Row, measure

SIZE = 1_000_000
CLUSTERS = (16, 256)
TARGETS = {16: "<= 1.001", 256: "<= 1.02"}
PEER = "scikit-learn KMeans(n_init=1)"


def inertia(x: np.ndarray, table: Any) -> float:
    """In double precision."""
    t = np.unique(np.asarray(table, np.float64))
    return float(((x - t[np.searchsorted((t[1:] + t[:-1]) / 2, x)]) ** 2).sum())


def optimum(x: np.ndarray, clusters: int) -> float:
    """The inertia of the dynamic program's table over 8,192 cells, polished by Lloyd in double precision."""
    x = np.sort(x)
    sums = np.concatenate([[0.0], np.cumsum(x)])
    table = np.asarray(fit(jax.numpy.asarray(x, np.float32), None, clusters=clusters, init=optimal), np.float64)
    for _ in range(500):
        ends = np.concatenate([[0], np.searchsorted(x, (table[1:] + table[:-1]) / 2, side="right"), [x.size]])
        new = np.diff(sums[ends]) / np.maximum(np.diff(ends), 1)
        if (new == table).all():
            break
        table = new
    return inertia(x, table)


def run() -> Iterator[Report]:
    """The reports."""
    x = jax.random.normal(jax.random.key(0), (SIZE,))
    host = np.asarray(x, np.float64)
    for clusters in CLUSTERS:
        column = np.asarray(x)[:, None]
        by_sklearn = lambda k=clusters, c=column: KMeans(k, n_init=1, random_state=0).fit(c)  # noqa: E731
        ours = lambda k=clusters: fit(x, None, clusters=k)  # noqa: E731
        seeded = lambda k=clusters: fit(x, None, clusters=k, init=plus_plus, key=jax.random.key(1))  # noqa: E731
        cases = {"ours, near_optimal": ours, "ours, plus_plus": seeded, "ours again (control)": ours}
        times = measure(cases, rounds=11)
        both = measure({PEER: by_sklearn, "ours, near_optimal": ours}, rounds=1 if clusters > 16 else 3)
        best = optimum(host, clusters)
        over = {
            "ours, near_optimal": inertia(host, ours()) / best,
            "ours, plus_plus": inertia(host, seeded()) / best,
            PEER: float(by_sklearn().inertia_) / best,
        }
        title = f"k-means of 1M normal scalars, K = {clusters}"
        rows = [both.row("ours, near_optimal", PEER)]
        rows += [times.row(name, "ours, near_optimal") for name in cases if name != "ours, near_optimal"]
        yield Report(f"{title}: time (the last two over near_optimal)", PEER, rows, times.notes())
        low, middle, high = np.quantile(times.seconds["ours, near_optimal"] * 1e3, (0.1, 0.5, 0.9))
        rows = [Row("milliseconds, near_optimal", middle, low, high, target="<= 50" if clusters == 16 else "")]
        for name, ratio in over.items():
            rows.append(Row(f"inertia, {name}", ratio, ratio, ratio, target="" if name == PEER else TARGETS[clusters]))
        rows[2] = Row(rows[2].name, rows[2].ratio, rows[2].low, rows[2].high)
        yield Report(f"{title}: figures, inertia over the optimum", "the optimum", rows, times.notes())
