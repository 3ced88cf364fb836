"""The column solver over its own linear algebra, what it takes to compile, and published codes on the same problem.

Command: ``JAXCOMP_IST=<folder> python -m tests.benchmarks column_solver``, at 4096 inputs and 1024 columns; the folder
is that of :mod:`tests.benchmarks.solver_peers`, and without it there is no row for it. ``--toy`` shows that it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcomp import NM, Int
from jaxcomp.ptq.columns import BLOCK, Done, Rows, Rule, factored, solve
from tests.benchmarks.solver_peers import peers
from tests.benchmarks.timing import Report, Row, measure

INPUTS, COLUMNS, SEEN = 4096, 1024, 2048
"""``SEEN``: rows of inputs, where the moments are made too."""
AIM, COMPILE = 1.3, 2.0
PER_COLUMN = Rule(Int(4), 0, None, None, True, 0.01)


def _algebra(h: jax.Array, w: jax.Array) -> jax.Array:
    """What no such solver does without: a factor of the moments, and each block's product with the rows before it."""
    factor = jnp.linalg.cholesky(h)
    starts = range(BLOCK, len(h), BLOCK)
    return jnp.stack(
        [jnp.dot(lax.slice_in_dim(factor[s : s + BLOCK], 0, s, axis=1), w[:s], precision="highest") for s in starts]
    )


@partial(jax.jit, static_argnames="rule")
def _solved(rows: Rows, h: jax.Array, rule: Rule) -> Done:
    return solve(rows, factored(h, rule), rule)


def _moments(x: jax.Array) -> jax.Array:
    return jnp.dot(x.T, x, precision="highest")


@partial(jax.jit, static_argnames="rule")
def _solved_from(rows: Rows, x: jax.Array, rule: Rule) -> Done:
    return solve(rows, factored(_moments(x), rule), rule)


def _algebra_from(x: jax.Array, w: jax.Array) -> jax.Array:
    """The same with the moments; fewer rows than inputs have a factor only if damped, as every solver does."""
    h = _moments(x)
    return _algebra(h + jnp.diag(jnp.full(len(h), PER_COLUMN.damping * jnp.mean(jnp.diagonal(h)))), w)


def run(*, toy: bool = False) -> Iterator[Report]:
    """All reports."""
    inputs, columns = (512, 128) if toy else (INPUTS, COLUMNS)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (inputs + inputs // 2, inputs))
    w = jax.random.normal(keys[1], (inputs, columns))
    scale = jnp.broadcast_to(jnp.max(jnp.abs(w), axis=0) / 7.5, w.shape)
    yield _whole(Rows(w, scale), x[: inputs // 2 if toy else SEEN], rounds=2 if toy else 5)
    yield _speeds(Rows(w, scale), x.T @ x, rounds=2 if toy else 5)
    decay = jnp.exp(-jnp.arange(inputs) / (inputs / 5))[:, None]
    x = x @ (jax.random.normal(keys[2], (inputs, inputs)) * decay)
    yield _peers(Rows(w, scale), x.T @ x, rounds=5, toy=toy)


def _whole(rows: Rows, x: jax.Array, *, rounds: int) -> Report:
    """From inputs to codes, over the linear algebra of that."""
    algebra = jax.jit(_algebra_from)
    cases = {
        "linear algebra": lambda: algebra(x, rows.w),
        "control": lambda: algebra(x, rows.w),
        "int4 a column": lambda: _solved_from(rows, x, PER_COLUMN),
    }
    times = measure(cases, rounds=rounds)
    note = f"{times.median('int4 a column'):.2f} s"
    lines = [
        times.row("control", "linear algebra"),
        times.row("int4 a column", "linear algebra", detail=note, target=f"<= {AIM}"),
    ]
    title = f"column solver with its moments, {x.shape[0]} rows of {x.shape[1]} inputs, {rows.w.shape[1]} columns"
    own = f"moments, Cholesky and block products ({times.median('linear algebra'):.2f} s)"
    return Report(title, own, lines, times.notes())


def _speeds(rows: Rows, h: jax.Array, *, rounds: int) -> Report:
    """Each mode over the linear algebra of one."""
    bare = rows._replace(scale=None)
    rules = {
        "int4 a column": (PER_COLUMN, rows),
        "int4, groups of 128": (Rule(Int(4), 128, None, None, True, 0.01), bare),
        "2:4": (Rule(None, 0, None, NM(2, 4), True, 0.01), bare),
        "50%": (Rule(None, 0, None, 0.5, True, 0.01), bare),
        "2:4 and int4, scales given": (Rule(Int(4), 0, None, NM(2, 4), True, 0.01), rows),
    }
    algebra, took, cases = jax.jit(_algebra), {}, {}
    cases["linear algebra"] = lambda: algebra(h, rows.w)
    cases["control"] = lambda: algebra(h, rows.w)
    for name, (rule, given) in rules.items():
        start = perf_counter()
        compiled = _solved.lower(given, h, rule).compile()
        took[name] = perf_counter() - start
        cases[name] = lambda compiled=compiled, given=given: compiled(given, h)
    times = measure(cases, rounds=rounds)
    lines: list[Row] = [times.row("control", "linear algebra")]
    for name in rules:
        note = f"{times.median(name):.2f} s, compiled in {took[name]:.1f} s (aim {COMPILE:g})"
        lines.append(times.row(name, "linear algebra", detail=note))
    title = f"column solver, {len(h)} inputs, {rows.w.shape[1]} columns"
    return Report(title, f"Cholesky and block products ({times.median('linear algebra'):.2f} s)", lines, times.notes())


def _peers(rows: Rows, h: jax.Array, *, rounds: int, toy: bool) -> Report:
    """int4 a column beside published codes; what each loses on the moments."""
    w = np.asarray(rows.w)
    found, missing = peers(w, np.asarray(h), eager=not toy)
    ours = np.asarray(_solved(rows, h, PER_COLUMN).values)
    times = measure({"ours": lambda: _solved(rows, h, PER_COLUMN), **found}, rounds=rounds)
    nearest = np.asarray(Int(4).decode(Int(4).encode(rows.w, rows.scale, None), rows.scale, None))
    least = _loss(w - nearest, h)
    lines: list[Row] = []
    for name, solved in found.items():
        values = solved()
        note = f"{times.median(name):.2f} s; loses {_loss(w - values, h) / least:.4f} of what rounding to nearest does"
        same = np.mean(np.isclose(values, ours, rtol=1e-4))
        lines.append(times.row(name, "ours", detail=f"{note}; {same:.2%} of the weights are ours"))
    title = f"published GPTQ beside ours, {len(h)} correlated inputs, {w.shape[1]} columns, int4"
    own = f"ours ({times.median('ours'):.2f} s; loses {_loss(w - ours, h) / least:.4f})"
    return Report(title, own, lines, [*times.notes(), *missing])


def _loss(error: np.ndarray, h: jax.Array) -> float:
    moments = np.asarray(h, np.float64)
    return float(np.sum(error * (moments @ error)))
