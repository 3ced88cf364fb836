"""The column solver over its own linear algebra, and what it takes to compile, at 4096 inputs and 1024 columns.

Command: ``python -m tests.benchmarks column_solver``; ``--toy`` shows that it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp import NM, Int
from jaxcomp.ptq.columns import BLOCK, Rows, Rule, solve
from tests.benchmarks.timing import Report, Row, measure

INPUTS, COLUMNS = 4096, 1024
AIM, COMPILE = 1.3, 2.0


def _algebra(h: jax.Array, w: jax.Array) -> jax.Array:
    """What no such solver does without: a factor of the moments, and each block's product with the rows before it."""
    factor = jnp.linalg.cholesky(h)
    starts = range(BLOCK, len(h), BLOCK)
    return jnp.stack(
        [jnp.dot(lax.slice_in_dim(factor[s : s + BLOCK], 0, s, axis=1), w[:s], precision="highest") for s in starts]
    )


def run(*, toy: bool = False) -> Iterator[Report]:
    """The report."""
    inputs, columns = (512, 128) if toy else (INPUTS, COLUMNS)
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (inputs + inputs // 2, inputs))
    h, w = x.T @ x, jax.random.normal(keys[1], (inputs, columns))
    scale = jnp.broadcast_to(jnp.max(jnp.abs(w), axis=0) / 7.5, w.shape)
    rules = {
        "int4 a column": (Rule(Int(4), 0, None, None, True, 0.01), Rows(w, scale)),
        "int4, groups of 128": (Rule(Int(4), 128, None, None, True, 0.01), Rows(w)),
        "2:4": (Rule(None, 0, None, NM(2, 4), True, 0.01), Rows(w)),
        "50%": (Rule(None, 0, None, 0.5, True, 0.01), Rows(w)),
        "2:4 and int4": (Rule(Int(4), 0, None, NM(2, 4), True, 0.01), Rows(w, scale)),
    }
    algebra, took, cases = jax.jit(_algebra), {}, {}
    cases["linear algebra"] = lambda: algebra(h, w)
    cases["control"] = lambda: algebra(h, w)
    for name, (rule, rows) in rules.items():
        start = perf_counter()
        compiled = solve.lower(rows, h, rule).compile()
        took[name] = perf_counter() - start
        cases[name] = lambda compiled=compiled, rows=rows: compiled(rows, h)
    times = measure(cases, rounds=2 if toy else 5)
    lines: list[Row] = [times.row("control", "linear algebra")]
    for name in rules:
        note = f"{times.median(name):.2f} s, compiled in {took[name]:.1f} s (aim {COMPILE:g})"
        target = f"<= {AIM}" if name == "int4 a column" else ""
        lines.append(times.row(name, "linear algebra", detail=note, target=target))
    title = f"column solver, {inputs} inputs, {columns} columns"
    yield Report(title, f"Cholesky and block products ({times.median('linear algebra'):.2f} s)", lines, times.notes())
