"""Products with pruned weights on a CPU over the dense float32 product beside them, by sparsity and rows.

``python -m tests.benchmarks sparse``, under ``taskset -c 0`` for one core. Weights are random, pruned by magnitude, and
prepared with ``sparse=``: float32, and int8 codes with a scale a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

import jaxcomp as jc
from tests.benchmarks.gpu_cases import Call, Compiled, Setting, run_cases
from tests.benchmarks.timing import Report

FLOAT, AGAIN = "dense float32", "dense float32 again (control)"
SPARSITIES = (0.8, 0.9, 0.95)
ROWS = (1, 16, 256)


def product(p: Any, x: jax.Array) -> jax.Array:
    """One dense layer."""
    return x @ p["w"]


def run(*, toy: bool = False) -> Iterator[Report]:
    """A report for each number of rows."""
    setting = Setting.lasting(3600, toy=toy)
    d = setting.pick(4096, 128)
    params = {"w": jax.random.normal(jax.random.key(0), (d, d)) / np.sqrt(d).astype(np.float32)}
    for rows in ROWS:
        yield compared(setting, params, jax.random.normal(jax.random.key(1), (rows, d)))


def compared(setting: Setting, params: Any, x: jax.Array) -> Report:
    """All sparsities."""
    makers: dict[str, Callable[[], Call]] = {name: partial(Compiled, product, params, x) for name in (FLOAT, AGAIN)}
    for sparsity in SPARSITIES:
        pruned = jc.prune(sparsity, roles=jc.roles(product)(params, x))
        for name, steps in {"float32": [pruned], "int8": [pruned, jc.quantize(jc.Int(8))]}.items():
            makers[f"{sparsity:.0%} zeros, {name}"] = partial(_prepared, jc.chain(*steps), params, x)
    ran = run_cases(makers, setting, inner=3, rounds=11)
    rows = [ran.speed(name, FLOAT, compared=False) for name in makers if name != FLOAT]
    return ran.report(f"{x.shape[1]}^2, {len(x)} rows", rows, FLOAT)


def _prepared(compress: jc.Transform, params: Any, x: jax.Array) -> Call:
    tree = jc.prepare(jc.pack(compress.apply(compress.init(params), params)), product, x, sparse=0.5)
    return Compiled(jc.quantize_function(product, {}, integer=True), tree, None, x)
