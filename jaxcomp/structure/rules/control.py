"""Rules of control: calls, scans, loops and branches, walked from inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jax.extend import core

from jaxcomp.structure.atoms import FREE, FROZEN, Dim, Label, arrays
from jaxcomp.structure.labelling import ONE, Product, Result, Walk, Walked, rule, unknown
from jaxcomp.trace.nested import Closed, branches, call_body, scan_parts, while_parts
from jaxcomp.trace.primitives import CALLS, EXPANDS


@rule(*CALLS, *EXPANDS)
def call(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """A call is its body."""
    body = call_body(eqn)
    if body is None:
        return unknown(walk, eqn, ins)
    walked, outs = walk.run(body, ins)
    return ins, outs, {"call": walked}


def _carried(walk: Walk, carry: Sequence[Label]) -> list[Label]:
    """Labels of a loop's state: as it begins, with atoms wherever the steps could bring some."""
    labels = []
    for c in carry:
        dims: list[Dim] = []
        for d, n in zip(c.dims, c.shape, strict=True):
            walk.mark(d)
            if n == 1:
                walk.freeze(d, why=ONE)
            dims.append(FROZEN if n == 1 or d is FROZEN else d if isinstance(d, np.ndarray) else walk.atoms.fresh(n))
        zero = tuple(c.zero_at(k) for k in range(len(dims)))
        labels.append(Label(c.shape, tuple(dims), zero, c.null))
    return labels


def _meet(walk: Walk, carry: list[Label], outs: Sequence[Label]) -> tuple[list[Label], bool]:
    """Ties the state after a step to that before it; also whether less is known to be zero than was assumed."""
    met = []
    for c, o in zip(carry, outs, strict=True):
        walk.mark(*o.dims)
        dims = tuple(walk.join(a, b) for a, b in zip(c.dims, o.dims, strict=True))
        zero = tuple(z and o.zero_at(d) for d, z in enumerate(c.zero))
        met.append(Label(c.shape, dims, zero, c.null and o.null))
    return met, any(m.zero != c.zero or m.null != c.null for m, c in zip(met, carry, strict=True))


def _fixpoint(
    walk: Walk, body: Closed, consts: Sequence[Label], carry: Sequence[Label], xs: Sequence[Label]
) -> tuple[Walked, list[Label], list[Label]]:
    """Walks a loop's body until what is assumed of its state holds after a step."""
    state = _carried(walk, carry)
    while True:
        met = len(walk.products)
        walked, outs = walk.run(body, [*consts, *state, *xs])
        state, again = _meet(walk, state, outs[: len(state)])
        if not again:
            ends = (*(s.dims for s in state), *(o.dims for o in outs[len(state) :]))
            return replace(walked, outs=ends), state, outs[len(state) :]
        del walk.products[met:]


@rule("scan")
def scan(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """A scan's steps share the atoms of each layer's slice; stacked and carried state goes round."""
    parts = scan_parts(eqn)
    consts, carry = ins[: parts.consts], ins[parts.consts : parts.consts + parts.carry]
    stacked = ins[parts.consts + parts.carry :]
    for x in stacked:
        walk.freeze(x.dims[0], why="a scan steps over it")
        walk.stacked.extend(arrays(x.dims[1:]))
        if walk.depth or not x.shape[1:]:
            walk.mark(*x.dims)
    for c in consts:
        walk.mark(*c.dims)
    slices = [Label(x.shape[1:], x.dims[1:], x.zero[1:], x.null) for x in stacked]
    walk.depth, walk.repeat = walk.depth + 1, walk.repeat * parts.length
    walked, state, ys = _fixpoint(walk, parts.body, consts, carry, slices)
    walk.depth, walk.repeat = walk.depth - 1, walk.repeat // parts.length
    outs = [*state, *(Label((parts.length, *y.shape), (FROZEN, *y.dims), (False, *y.zero), y.null) for y in ys)]
    for y in ys:
        walk.mark(*y.dims)
    uses = [*consts, *(c.with_dims(s.dims) for c, s in zip(carry, state, strict=True)), *stacked]
    return uses, outs, {"body": walked}


@rule("while")
def while_(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """A loop's state goes round; what decides its end stays."""
    parts = while_parts(eqn)
    tests, consts = ins[: parts.cond_consts], ins[parts.cond_consts : parts.cond_consts + parts.body_consts]
    walk.depth += 2
    walked, state, _ = _fixpoint(walk, parts.body, consts, ins[parts.cond_consts + parts.body_consts :], ())
    test, _ = walk.run(parts.cond, [*tests, *state])
    walk.depth -= 2
    return [*tests, *consts, *state], state, {"cond": test, "body": walked}


@rule("cond")
def cond(walk: Walk, eqn: core.JaxprEqn, ins: list[Label]) -> Result:
    """The results of the branches go together; the dearest branch is counted."""
    start, inner, results = len(walk.products), [], []
    best: list[Product] = []
    for branch in branches(eqn):
        walked, outs = walk.run(branch, ins[1:])
        inner.append(walked)
        results.append(outs)
        taken = walk.products[start:]
        del walk.products[start:]
        best = max(best, taken, key=lambda t: sum(p.count * float(np.prod([len(d) for d in p.dims])) for p in t))
    walk.products.extend(best)
    outs = [_either(walk, options) for options in zip(*results, strict=True)]
    ends = tuple(o.dims for o in outs)
    return ins, outs, {f"branch{i}": replace(w, outs=ends) for i, w in enumerate(inner)}


def _either(walk: Walk, options: Sequence[Label]) -> Label:
    """The label of a value that is one of several."""
    dims = [walk.join(*(o.dims[d] for o in options)) for d in range(len(options[0].shape))]
    dims = [d if arrays([d]) or d is FROZEN else FREE for d in dims]
    zero = tuple(all(o.zero_at(d) for o in options) for d in range(len(dims)))
    return Label(options[0].shape, tuple(dims), zero, all(o.null for o in options))
