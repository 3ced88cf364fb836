"""Loops and branches: written out where that is short or where layers are stacked, else as Scan, Loop and If."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxcomp.activations.codes import Codes
from jaxcomp.core.types import DType
from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.rules.movement import index
from jaxcomp.export.onnx.values import Coded, Const, Dims, Tensor, Value
from jaxcomp.trace import nested, walk
from jaxcomp.trace.nested import Closed, Scan

SHORT = 8
"""Scans of this many steps are written out, step after step: runtimes fuse across steps then."""


@rule("scan")
def _scan(step: Step) -> list[Value]:
    parts = nested.scan_parts(step.eqn)
    stacked = step.values[parts.consts + parts.carry :]
    if parts.length <= SHORT or any(isinstance(v, Coded) or _is_weight(v) for v in stacked):
        return _written_out(step, parts)
    return _looped(step, parts)


def _is_weight(value: Value) -> bool:
    """Whether it is large enough that a step should have its slice as a constant of its own."""
    return isinstance(value, Const) and value.array.ndim > 2


def _written_out(step: Step, parts: Scan) -> list[Value]:
    """Every step in its turn, with its own slice of what is stacked."""
    split = parts.consts + parts.carry
    consts, carry, stacked = step.values[: parts.consts], step.values[parts.consts : split], step.values[split:]
    made: list[list[Value]] = []
    order = range(parts.length)
    for i in reversed(order) if parts.reverse else order:
        slices = [slice_of(step.graph, v, i) for v in stacked]
        at, layers = (*step.at, "body"), (*step.layers, i) if is_layered(step) else step.layers
        results = step.run(step.graph, parts.body, [*consts, *carry, *slices], at, layers)
        carry = results[: parts.carry]
        made.append(results[parts.carry :])
    made = made[::-1] if parts.reverse else made
    outs = step.eqn.outvars[parts.carry :]
    return [*carry, *(_stacked(step.graph, [row[k] for row in made], walk.aval_of(v)) for k, v in enumerate(outs))]


def is_layered(step: Step) -> bool:
    """Whether ranges have an entry for each step: parameters are stacked along it."""
    parts = nested.scan_parts(step.eqn)
    return any(isinstance(v, Coded | Const) and len(v.shape) > 0 for v in step.values[parts.consts + parts.carry :])


def slice_of(graph: Graph, value: Value, i: int) -> Value:
    """Step ``i`` of what is stacked."""
    if isinstance(value, Tensor):
        return index(graph, value, 0, i)
    if isinstance(value, Const):
        return Const(value.array[0 if value.array.shape[0] == 1 else i], value.shape[1:])
    box = value.codes
    size = box.codes.shape[0]

    def one(v: jax.Array) -> jax.Array:
        return v[i * v.shape[0] // size]

    zero = None if box.zero is None else one(box.zero)
    return Coded(Codes(one(box.codes), one(box.scale), zero, box.dtype, box.reach))


def _stacked(graph: Graph, values: Sequence[Value], aval: jax.core.ShapedArray) -> Value:
    if not values:
        return Const.of(np.zeros(aval.shape, aval.dtype))
    if all(isinstance(v, Const) for v in values):
        return Const.of(np.stack([v.full() for v in values if isinstance(v, Const)]))
    parts = [graph.once("Unsqueeze", [graph.plain(v), graph.ints([0])]) for v in values]
    return graph.node("Concat", parts, tuple(aval.shape), np.dtype(aval.dtype), axis=0)


def _input(graph: Graph, stem: str, shape: Dims, dtype: DType) -> Tensor:
    """An input of an inner graph."""
    made = graph.tensor(graph.fresh(stem), shape, dtype)
    graph.inputs.append(made)
    return made


def _result(graph: Graph, value: Value, shape: Dims, dtype: DType) -> None:
    """A result of an inner graph, as a node of it gave it."""
    (name,) = graph.run("Identity", [graph.plain(value)])
    graph.outputs.append(graph.tensor(name, shape, dtype))


def _avals(variables: Sequence[Any]) -> list[jax.core.ShapedArray]:
    return [walk.aval_of(v) for v in variables]


def _looped(step: Step, parts: Scan) -> list[Value]:
    """Scan: what it carries first, then what it steps over; without that it counts."""
    graph, inner = step.graph, step.graph.inner()
    split = parts.consts + parts.carry
    consts = step.values[: parts.consts]
    invars = _avals(parts.body.jaxpr.invars)
    carried = [_input(inner, "carried", tuple(a.shape), np.dtype(a.dtype)) for a in invars[parts.consts : split]]
    slices = [_input(inner, "slice", tuple(a.shape), np.dtype(a.dtype)) for a in invars[split:]]
    stacked = [graph.plain(v) for v in step.values[split:]]
    if not stacked:
        _input(inner, "slice", (), t.I32)
        stacked = [graph.constant(np.zeros(parts.length, np.int32))]
    results = step.run(inner, parts.body, [*consts, *carried, *slices], (*step.at, "body"), step.layers)
    for value, aval in zip(results, _avals(parts.body.jaxpr.outvars), strict=True):
        _result(inner, value, tuple(aval.shape), np.dtype(aval.dtype))
    way, outs = int(parts.reverse), len(results) - parts.carry
    names = graph.run(
        "Scan",
        [*(graph.plain(v) for v in step.values[parts.consts : split]), *stacked],
        count=len(results),
        body=inner,
        num_scan_inputs=len(stacked),
        scan_input_directions=[way] * len(stacked),
        **({"scan_output_directions": [way] * outs} if outs else {}),
    )
    return [graph.tensor(n, a.shape, a.dtype) for n, a in zip(names, _avals(step.eqn.outvars), strict=True)]


@rule("while")
def _while(step: Step) -> list[Value]:
    """Loop: the condition is asked once before it, and at the end of each round."""
    graph, inner, parts = step.graph, step.graph.inner(), nested.while_parts(step.eqn)
    split = parts.cond_consts + parts.body_consts
    asked, consts, carry = step.values[: parts.cond_consts], step.values[parts.cond_consts : split], step.values[split:]
    (goes_on,) = step.run(graph, parts.cond, [*asked, *carry], (*step.at, "cond"), step.layers)
    avals = _avals(parts.body.jaxpr.outvars)
    _input(inner, "round", (), t.I64)
    _input(inner, "before", (), t.BOOL)
    carried = [_input(inner, "carried", tuple(a.shape), np.dtype(a.dtype)) for a in avals]
    results = step.run(inner, parts.body, [*consts, *carried], (*step.at, "body"), step.layers)
    (again,) = step.run(inner, parts.cond, [*asked, *results], (*step.at, "cond"), step.layers)
    _result(inner, again, (), t.BOOL)
    for value, aval in zip(results, avals, strict=True):
        _result(inner, value, tuple(aval.shape), np.dtype(aval.dtype))
    first = [graph.plain(v) for v in (goes_on, *carry)]
    names = graph.run("Loop", ["", *first], count=len(avals), body=inner)
    return [graph.tensor(n, a.shape, a.dtype) for n, a in zip(names, avals, strict=True)]


@rule("cond")
def _cond(step: Step) -> list[Value]:
    """If, or one in the other where there are more than two branches; a number beyond them is the last."""
    which, *operands = step.values
    branches = nested.branches(step.eqn)
    which = step.graph.array(which)
    if isinstance(which, Const):
        i = int(which.array)
        i = i if 0 <= i < len(branches) else len(branches) - 1
        return step.run(step.graph, branches[i], operands, (*step.at, f"branch{i}"), step.layers)
    return _chosen(step, step.graph, which, list(enumerate(branches)), operands)


def _chosen(
    step: Step, graph: Graph, which: Tensor, branches: list[tuple[int, Closed]], operands: Sequence[Value]
) -> list[Value]:
    avals = _avals(step.eqn.outvars)
    (i, first), rest = branches[0], branches[1:]
    if not rest:
        return step.run(graph, first, operands, (*step.at, f"branch{i}"), step.layers)
    here = graph.plain(t.compared(graph, "Equal", [which, t.number(i, which.dtype)]))
    yes, no = graph.inner(), graph.inner()
    taken = step.run(yes, first, operands, (*step.at, f"branch{i}"), step.layers)
    others = _chosen(step, no, which, rest, operands)
    for inner, results in ((yes, taken), (no, others)):
        for value, aval in zip(results, avals, strict=True):
            _result(inner, value, tuple(aval.shape), np.dtype(aval.dtype))
    names = graph.run("If", [here], count=len(avals), then_branch=yes, else_branch=no)
    return [graph.tensor(n, a.shape, a.dtype) for n, a in zip(names, avals, strict=True)]
