"""Which indices of its inputs a walked program reads: those that something of its results is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
from jax.extend import core
from numpy.typing import NDArray

from jaxcomp.structure.atoms import Dim, Label, arrays
from jaxcomp.structure.labelling import Step, Walked
from jaxcomp.trace.nested import Closed, branches, call_body, scan_parts, while_parts
from jaxcomp.trace.walk import shape_of

Live = tuple[NDArray[np.bool_], ...]
"""For each dimension of an array, which of its indices are read."""


def read(jaxpr: Closed, walked: Walked, outs: Sequence[Live | None]) -> list[Live | None]:
    """What is read of each input where ``outs`` is read of the results; None where nothing is.

    An index that a slice leaves out is not read, unless something else takes it. What a primitive does with its
    operands is told from the labels: an operand's index that is an index of the results is read where that is,
    any other is.
    """
    live: dict[core.Var, Live] = {}

    def need(v: core.Var | core.Literal, found: Live | None) -> None:
        if found is not None and not isinstance(v, core.Literal):
            live[v] = _either(live[v], found) if v in live else found

    for v, found in zip(jaxpr.jaxpr.outvars, outs, strict=True):
        need(v, found)
    for eqn, step in zip(reversed(jaxpr.jaxpr.eqns), reversed(walked.steps), strict=True):
        wanted = [live.get(v) for v in eqn.outvars]
        if any(w is not None for w in wanted) or eqn.effects:
            for v, found in zip(eqn.invars, _operands(eqn, step, wanted), strict=True):
                need(v, found)
    return [live.get(v) for v in jaxpr.jaxpr.invars]


def every(v: core.Var | core.Literal) -> Live:
    """All of a variable's indices."""
    return tuple(np.full(n, True) for n in shape_of(v))


def _either(a: Live, b: Live) -> Live:
    return tuple(x | y for x, y in zip(a, b, strict=True))


def _operands(eqn: core.JaxprEqn, step: Step, wanted: Sequence[Live | None]) -> list[Live | None]:
    """What an equation reads of its operands."""
    body = call_body(eqn)
    if body is not None and "call" in step.inner:
        return read(body, step.inner["call"], wanted)
    whole: list[Live | None] = [every(v) for v in eqn.invars]
    match eqn.primitive.name:
        case "scan":
            scan = scan_parts(eqn)
            inside = read(scan.body, step.inner["body"], [every(v) for v in scan.body.jaxpr.outvars])
            xs = [None if w is None else (np.full(scan.length, True), *w) for w in inside[scan.consts + scan.carry :]]
            return [*inside[: scan.consts], *whole[scan.consts : scan.consts + scan.carry], *xs]
        case "while":
            loop = while_parts(eqn)
            parts = (loop.cond, "cond", loop.cond_consts), (loop.body, "body", loop.body_consts)
            consts = [read(j, step.inner[name], [every(v) for v in j.jaxpr.outvars])[:n] for j, name, n in parts]
            return [*consts[0], *consts[1], *whole[loop.cond_consts + loop.body_consts :]]
        case "cond":
            taken = [read(j, step.inner[f"branch{i}"], wanted) for i, j in enumerate(branches(eqn))]
            return [whole[0], *map(_any, zip(*taken, strict=True))]
    known, needed = _alive(step.outs, wanted)
    return [_operand(use, known, needed) for use in step.uses]


def _any(options: Sequence[Live | None]) -> Live | None:
    found = [o for o in options if o is not None]
    return reduce(_either, found) if found else None


def _alive(outs: Sequence[Label], wanted: Sequence[Live | None]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The atoms of the results, and those of them that are read."""
    known, needed = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for out, live in zip(outs, wanted, strict=True):
        known += arrays(out.dims)
        if live is not None:
            needed += [d[on] for d, on in zip(out.dims, live, strict=True) if isinstance(d, np.ndarray)]
    return np.concatenate(known), np.concatenate(needed)


def _operand(use: Label, known: NDArray[np.int64], needed: NDArray[np.int64]) -> Live:
    def of(d: Dim, n: int) -> NDArray[np.bool_]:
        passes = isinstance(d, np.ndarray) and bool(np.isin(d, known).any())
        return np.isin(d, needed) if isinstance(d, np.ndarray) and passes else np.full(n, True)

    return tuple(map(of, use.dims, use.shape))
