"""Products of factors over the dense product, forward and with gradients; and what the decompositions cost.

Command: ``python -m tests.benchmarks low_rank``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.sparse.linalg import svds

import jaxcomp as jc
from jaxcomp.activations import factored
from jaxcomp.factorization.decompositions import right_rows
from jaxcomp.factorization.rank_one import deflate
from jaxcomp.factorization.specs import SVD, Method, RankOne, Tucker2
from jaxcomp.trace import cost
from tests.benchmarks.timing import Report, Row, Timings, measure

SIZE, RANK, BATCH = 1024, 64, 1024
ALLOWANCE = 1.5
"""A thin product may take this much more than its share of the multiply-accumulates."""


def _dot(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"]


def _conv(p: Any, x: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _rows(fn: Any, params: Any, thin: dict[str, Any], x: jax.Array) -> tuple[list[Row], Timings]:
    """The factored function beside the dense one, forward and backward."""

    def backward(f: Any) -> Any:
        return jax.jit(jax.grad(lambda p, x: jnp.sum(f(p, x) ** 2)))

    forward, back = jax.jit(fn), backward(fn)
    cases: dict[str, Callable[[], Any]] = {"dense": lambda: forward(params, x), "control": lambda: forward(params, x)}
    cases["dense, gradients"] = lambda: back(params, x)
    for name, tree in thin.items():
        f, g = jax.jit(factored(fn)), backward(factored(fn))
        cases[name] = lambda f=f, tree=tree: f(tree, x)
        cases[f"{name}, gradients"] = lambda g=g, tree=tree: g(tree, x)
    times = measure(cases, rounds=15)
    dense = cost(fn)(params, x).macs
    rows = [times.row("control", "dense")]
    for name, tree in thin.items():
        limit = cost(factored(fn))(tree, x).macs / dense
        note = f"{times.median(name) * 1e3:.2f} ms; multiply-accumulates {limit:.4f}"
        rows.append(times.row(name, "dense", detail=note, target=f"<= {ALLOWANCE * limit:.3f}"))
        rows.append(times.row(f"{name}, gradients", "dense, gradients"))
    return rows, times


def _factors(w: jax.Array, rank: Any, method: Method = SVD(1, 0)) -> Any:  # noqa: B008 - frozen
    return jc.factorize({"w": w}, rank, where="w", method=method)


def run() -> Iterator[Report]:
    """The reports."""
    keys = jax.random.split(jax.random.key(0), 4)
    w, x = jax.random.normal(keys[0], (SIZE, SIZE)), jax.random.normal(keys[1], (BATCH, SIZE))
    rows, times = _rows(_dot, {"w": w}, {f"rank {RANK}": _factors(w, RANK)}, x)
    title = f"{SIZE}x{SIZE} kernel, {BATCH} rows"
    yield Report(title, f"dense ({times.median('dense') * 1e3:.1f} ms)", rows, times.notes())

    kernel, image = jax.random.normal(keys[2], (3, 3, 128, 128)), jax.random.normal(keys[3], (8, 32, 32, 128))
    thin = {"Tucker-2 (32, 32)": _factors(kernel, 32, Tucker2(stacked=0)), "SVD, rank 32": _factors(kernel, 32)}
    rows, times = _rows(_conv, {"w": kernel}, thin, image)
    title = "3x3 kernel, 128 to 128 features, 8 images of 32x32"
    yield Report(title, f"dense ({times.median('dense') * 1e3:.1f} ms)", rows, times.notes())

    small = w[:512, :512]
    host = np.asarray(small)
    spec = RankOne()
    by_rows = jax.jit(lambda m: right_rows(m, 32))
    terms = lambda refits: deflate(small, rank=32, steps=spec.steps, refits=refits)  # noqa: E731
    cases: dict[str, Callable[[], Any]] = {
        "numpy.linalg.svd": lambda: np.linalg.svd(host, full_matrices=False),
        "scipy.sparse.linalg.svds, 32": lambda: svds(host, k=32, random_state=0),
        "ours, SVD, rank 32": lambda: by_rows(small),
        "ours, SVD, rank 32, again (control)": lambda: by_rows(small),
        "ours, 32 rank-one terms": lambda: terms(0),
        "ours, 32 rank-one terms, refitted": lambda: terms(spec.refits),
    }
    times = measure(cases, rounds=5, warm=True)
    peer = "numpy.linalg.svd"
    rows = [times.row(name, peer) for name in cases if name != peer]
    yield Report("Decomposing 512x512", f"{peer} ({times.median(peer) * 1e3:.0f} ms)", rows, times.notes())

    s = np.linalg.svd(host.astype(np.float64), compute_uv=False)
    basis = np.asarray(by_rows(small), np.float64)
    error = np.linalg.norm(host - host @ basis.T @ basis) / np.linalg.norm(s[32:])
    name = "error of ours, SVD, rank 32"
    yield Report("Decomposing 512x512", "the least error of rank 32", [Row(name, error, error, error)], times.notes())
