"""k-means of a million scalars: time against scikit-learn's, inertia against the optimum's.

Command: ``python -m tests.benchmarks kmeans``
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from sklearn.cluster import KMeans

import jaxcomp as jc
from jaxcomp.core.layouts import Channels, Tensor
from jaxcomp.sharing.kmeans.fit import fit
from jaxcomp.sharing.kmeans.inits import optimal, plus_plus
from tests.benchmarks.timing import Report, Row, measure

SIZE = 1_000_000
CLUSTERS = (16, 256)
TARGETS = {16: "<= 1.001", 256: "<= 1.02"}
PEER = "scikit-learn KMeans(n_init=1)"
OURS = "near_optimal"


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


def spreads(size: int) -> dict[str, np.ndarray]:
    """Data beside the normal: heavy tails, few distinct values, two bumps."""
    rng = np.random.default_rng(0)
    two = np.where(rng.random(size) < 0.5, rng.normal(-1, 0.1, size), rng.normal(2, 0.5, size))
    found = {"Laplace": rng.laplace(size=size), "Student t, 3 degrees": rng.standard_t(3, size=size)}
    found |= {"1,000 distinct values": rng.integers(0, 1000, size) ** 1.5, "two bumps": two}
    return {name: x.astype(np.float32) for name, x in found.items()}


def figure(name: str, value: float, target: str = "") -> Row:
    """A row of one number."""
    return Row(name, value, value, value, target=target)


def channels() -> Report:
    """A table for each channel against one for the leaf: of a kernel, and of a small encoder's kernels."""
    key = jax.random.key(0)
    encoder = {"attention": (4, 192, 192), "up": (192, 768), "down": (768, 192)}
    drawn = {
        n: {"kernel": jax.random.normal(jax.random.fold_in(key, i), s)} for i, (n, s) in enumerate(encoder.items())
    }
    trees = {"384 x 384": {"kernel": jax.random.normal(key, (384, 384))}, "encoder block, 442,368 weights": drawn}
    rows, notes = [], []
    for name, params in trees.items():
        leaf, own = (jc.share(16, per=per) for per in (Tensor(), Channels(-1)))
        cases = {"leaf": lambda t=leaf, p=params: t.init(p), "channels": lambda t=own, p=params: t.init(p)}
        times = measure(cases, rounds=9)
        row = times.row("channels", "leaf", target="<= 3")
        rows.append(replace(row, name=name))
        notes = times.notes()
    return Report("share(16, per=Channels(-1)).init", "one table a leaf", rows, notes)


def run() -> Iterator[Report]:
    """The reports."""
    yield channels()
    x = jax.random.normal(jax.random.key(0), (SIZE,))
    host = np.asarray(x)
    for clusters in CLUSTERS:
        target = TARGETS[clusters]
        model = KMeans(clusters, n_init=1, random_state=0)
        by_sklearn = lambda model=model: model.fit(host[:, None])  # noqa: E731
        ours = lambda k=clusters, x=x: fit(x, None, clusters=k)  # noqa: E731
        seeded = lambda k=clusters: fit(x, None, clusters=k, init=plus_plus, key=jax.random.key(1))  # noqa: E731
        exact = lambda k=clusters: fit(x, None, clusters=k, init=optimal)  # noqa: E731
        title = f"k-means of 1M normal scalars, K = {clusters}"

        both = measure({PEER: by_sklearn, OURS: ours}, rounds=1 if clusters > 16 else 3)
        seconds = f"{PEER} ({both.median(PEER):.2f} s)"
        yield Report(f"{title}: time", seconds, [both.row(OURS, PEER)], both.notes())

        cases = {OURS: ours, "again (control)": ours, "plus_plus": seeded, "optimal (on the host)": exact}
        times = measure(cases, rounds=7)
        rows = [times.row(name, OURS) for name in cases if name != OURS]
        yield Report(f"{title}: starts", f"{OURS} ({times.median(OURS) * 1e3:.1f} ms)", rows, times.notes())

        low, middle, high = np.quantile(times.seconds[OURS] * 1e3, (0.1, 0.5, 0.9))
        rows = [Row(f"milliseconds, {OURS}", middle, low, high, target="<= 50" if clusters == 16 else "")]
        best = optimum(host.astype(np.float64), clusters)
        over = lambda table, x=host, best=best: inertia(x.astype(np.float64), table) / best  # noqa: E731
        rows.append(figure(f"inertia, {OURS}", over(ours()), target))
        rows.append(figure("inertia, plus_plus", over(seeded())))
        rows.append(figure(f"inertia, {PEER}", over(np.sort(model.cluster_centers_[:, 0]))))
        for name, other in spreads(SIZE).items():
            best = optimum(other.astype(np.float64), clusters)
            rows.append(figure(f"inertia, {OURS}, {name}", over(ours(x=other), x=other, best=best), target))
        yield Report(f"{title}: figures", "the optimum's inertia", rows, times.notes())
