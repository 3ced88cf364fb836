"""Masks, codes and shared tables made on a GPU, beside ``x * 2`` and a sort of the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from tests.benchmarks.gpu_cases import Call, Compiled, Setting, run_cases
from tests.benchmarks.kmeans import inertia
from tests.benchmarks.timing import Report

COPY = "x * 2"


def doubled(p: Any) -> Any:
    """Each weight read and written once."""
    return jax.tree.map(lambda x: x * 2, p)


def masks(setting: Setting) -> Iterator[Report]:
    """A global mask and 2:4 masks of two leaves."""
    for size in setting.pick((100_000_000, 1_000_000_000), (96_000,)):
        yield _masked(setting, size)


def _masked(setting: Setting, size: int) -> Report:
    drawn = [jax.random.normal(jax.random.key(i), (size // 2000, 1000)) for i in (0, 1)]
    params = {f"layer_{i}": {"kernel": w} for i, w in enumerate(drawn)}
    middle = lambda p: jnp.sort(jnp.concatenate([jnp.abs(v).ravel() for v in jax.tree.leaves(p)]))[size // 2]  # noqa: E731

    def mask(transform: jc.Transform) -> Call:
        return Compiled(lambda p: transform.update(None, p, step=jnp.int32(0)), params)

    makers: dict[str, Callable[[], Call]] = {
        COPY: partial(Compiled, doubled, params),
        "global mask": partial(mask, jc.prune(0.5, scope=jc.Global())),
        "2:4 mask": partial(mask, jc.prune(structure=jc.NM(2, 4))),
    }
    if size <= 100_000_000:
        makers["jnp.sort, for one threshold"] = partial(Compiled, middle, params)
    ran = run_cases(makers, setting, rounds=5, inner=2)
    rows = [ran.time(name, COPY, target="<= 5" if name == "global mask" else "") for name in makers if name != COPY]
    temp = lambda case: case.temporaries() / (4 * size)  # noqa: E731
    rows.append(ran.counted("global mask", "temporaries over the weights", temp))
    return ran.report(f"masks of {size / 1e6:g}M weights", rows, COPY, unit="time")


def quantize(setting: Setting) -> Iterator[Report]:
    """Codes of 268M weights and back, weights a second."""
    n = setting.pick(16384, 256)
    weights = {"kernel": jax.random.normal(jax.random.key(0), (n, n))}
    ways = {
        "int8": jc.quantize(jc.Int(8)),
        "int4, groups of 128": jc.quantize(jc.Int(4), per=jc.Groups(128)),
        "NF4": jc.recipes.nf4(),
        "NVFP4": jc.recipes.nvfp4(),
    }
    aims = {"int8": ">= 0.9", "NF4": ">= 0.8", "NVFP4": ">= 0.8"}
    for name, transform in ways.items():
        make = lambda p, t=transform: jc.pack(t.apply((), p))  # noqa: E731
        makers = {
            COPY: partial(Compiled, doubled, weights),
            f"{name}, quantize and pack": partial(Compiled, make, weights),
            f"{name}, dequantize": lambda make=make: Compiled(jc.materialize, jax.jit(make)(weights)),
        }
        ran = run_cases(makers, setting, rounds=5, inner=3)
        to, back = list(makers)[1:]
        rows = [ran.speed(to, COPY, target=aims.get(name, "")), ran.speed(back, COPY)]
        yield ran.report(f"{n * n / 1e6:g}M weights, weights a second", rows, COPY)


def kmeans(setting: Setting) -> Iterator[Report]:
    """A table of 16.8M weights."""
    n = setting.pick(4096, 128)
    weights = {"kernel": jax.random.normal(jax.random.key(0), (n, n))}
    host = np.asarray(weights["kernel"], np.float64).ravel()
    for clusters, target in ((16, "<= 10"), (256, "<= 15")):
        share = jc.share(clusters)
        fitted = lambda p, t=share: t.update(t.init(p), p, step=jnp.int32(0))  # noqa: E731
        makers = {
            "sort": partial(Compiled, lambda p: jnp.sort(p["kernel"].ravel()), weights),
            "share": partial(Compiled, fitted, weights),
        }
        ran = run_cases(makers, setting, rounds=5, inner=1)
        rows = [ran.milliseconds("share", target=target), ran.milliseconds("sort")]
        error = lambda case, t=share: _error(t, case(), weights, host)  # noqa: E731
        rows.append(ran.counted("share", "squared error over the optimum's of a normal", error))
        yield ran.report(f"k-means of {n * n / 1e6:g}M weights, K = {clusters}", rows, "sort", unit="milliseconds")


def _error(transform: jc.Transform, state: Any, params: Any, host: np.ndarray) -> float:
    """Over the high-resolution limit ``pi * sqrt(3) / (2 K**2)``. Source: Panter and Dite 1951, equation 18."""
    shared = np.asarray(jc.materialize(transform.apply(state, params))["kernel"], np.float64)
    table = np.unique(shared)
    return inertia(host, table) / host.size / (np.pi * np.sqrt(3) / 2 / table.size**2)
