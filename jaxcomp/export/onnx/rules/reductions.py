"""Operators over whole axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from jaxcomp.core.types import DType
from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.values import Const, Tensor, Value, is_static

PLAIN = {
    "reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_prod": "ReduceProd",
    "reduce_and": "ReduceMin", "reduce_or": "ReduceMax",
}  # fmt: skip
"""Primitives that are one operator with the axes as its second input."""


@rule(*PLAIN)
def _reduce(step: Step) -> Value:
    """Axes are named where they lie, so nothing is moved."""
    value, op = step.graph.array(step.values[0]), PLAIN[step.name]
    if step.name in ("reduce_and", "reduce_or") and step.dtype != np.bool_:
        step.refuse("bits of integers are not reduced", "compare them to 0 first")
    wide = t.kernel_type(op, step.dtype)
    if wide is None:
        step.refuse(f"no runtime has {op} in {step.dtype}", "cast to another type first")
    axes = cast(Sequence[int], step.eqn.params["axes"])
    value = t.cast(step.graph, value, wide)
    if not axes:
        return t.cast(step.graph, value, step.dtype)
    if isinstance(value, Const) or value.repeats & set(axes):
        value = step.graph.tensor(step.graph.plain(value), value.shape, value.dtype)
    kept = [i for i in range(len(value.shape)) if i not in axes]
    new = {old: i for i, old in enumerate(kept)}
    where = step.graph.ints([k for k, axis in enumerate(value.order) if axis in axes])
    (name,) = step.graph.run(op, [value.name, where], keepdims=0)
    lies = tuple(new[axis] for axis in value.order if axis not in axes)
    found = Tensor(name, step.shape, wide, lies, frozenset(new[i] for i in value.repeats))
    return t.narrowed(step.graph, found, step.dtype)


@rule("argmax", "argmin")
def _arg(step: Step) -> Value:
    """The first index of the extreme. NaN, which JAX takes for it, is looked for first: ArgMax passes it by."""
    graph, x = step.graph, step.graph.array(step.values[0])
    (axis,) = cast(Sequence[int], step.eqn.params["axes"])
    op = "ArgMax" if step.name == "argmax" else "ArgMin"
    wide = t.kernel_type(op, np.dtype(x.dtype))
    if wide is None:
        step.refuse(f"no runtime has {op} of {x.dtype}", "cast to another type first")
    x = t.cast(graph, x, wide)
    found = _first(step, op, x, axis)
    if np.dtype(x.dtype).kind == "f":
        lost = graph.elementwise("Cast", [graph.elementwise("IsNaN", [x], t.BOOL)], t.U8, to=t.U8)
        shape = step.shape
        some = graph.node("ReduceMax", [graph.plain(lost), graph.ints([axis])], shape, t.U8, keepdims=0)
        found = t.where(graph, t.cast(graph, some, t.BOOL), _first(step, "ArgMax", lost, axis), found)
    return t.cast(graph, found, step.dtype)


def _first(step: Step, op: str, x: Value, axis: int) -> Tensor:
    return step.graph.node(op, [step.graph.plain(x)], step.shape, t.I64, axis=axis, keepdims=0)


@rule("cumsum")
def _cumsum(step: Step) -> Value:
    graph, axis = step.graph, cast(int, step.eqn.params["axis"])
    wide = t.kernel_type("CumSum", step.dtype)
    if wide is None:
        step.refuse(f"no runtime has CumSum in {step.dtype}", "cast to another type first")
    x = graph.plain(t.cast(graph, graph.array(step.values[0]), wide))
    found = graph.node(
        "CumSum", [x, graph.constant(axis, t.I64)], step.shape, wide, reverse=int(bool(step.eqn.params["reverse"]))
    )
    return t.narrowed(graph, found, step.dtype)


def _log_add(graph: Graph, a: Value, b: Value, dtype: DType) -> Tensor:
    """``log(exp(a) + exp(b))`` without overflow; where both are -inf too."""
    top = t.typed(graph, "Max", [a, b], dtype)
    low = np.finfo(dtype).min
    base = t.typed(graph, "Max", [top, t.number(low, dtype)], dtype)
    parts = [t.typed(graph, "Exp", [t.typed(graph, "Sub", [v, base], dtype)], dtype) for v in (a, b)]
    return t.typed(graph, "Add", [base, t.typed(graph, "Log", [t.typed(graph, "Add", parts, dtype)], dtype)], dtype)


_Join = Callable[[Graph, Value, Value, DType], Tensor]
_RUNNING: dict[str, _Join] = {
    "cumprod": lambda graph, a, b, dtype: t.typed(graph, "Mul", [a, b], dtype),
    "cummax": lambda graph, a, b, dtype: t.typed(graph, "Max", [a, b], dtype),
    "cummin": lambda graph, a, b, dtype: t.typed(graph, "Min", [a, b], dtype),
    "cumlogsumexp": _log_add,
}


@rule(*_RUNNING)
def _running(step: Step) -> Value:
    """By doubling: each round joins an element with that as far before it as the rounds so far have reached."""
    graph, axis, join = step.graph, cast(int, step.eqn.params["axis"]), _RUNNING[step.name]
    length = step.shape[axis]
    if not is_static([length]):
        step.refuse("its axis has a length that is known later", "give the length as a number")
    x: Value = graph.array(step.values[0])
    ends, shape = bool(step.eqn.params["reverse"]), step.shape

    def cut(v: Value, start: int, stop: int) -> Tensor:
        sized = (*shape[:axis], stop - start, *shape[axis + 1 :])
        bounds = [graph.ints([n]) for n in (start, stop, axis)]
        return graph.node("Slice", [graph.plain(v), *bounds], sized, v.dtype)

    reach, n = 1, length
    while reach < n:
        if ends:
            joined, still = join(graph, cut(x, 0, n - reach), cut(x, reach, n), step.dtype), cut(x, n - reach, n)
            parts = [joined, still]
        else:
            joined, still = join(graph, cut(x, reach, n), cut(x, 0, n - reach), step.dtype), cut(x, 0, reach)
            parts = [still, joined]
        x = graph.node("Concat", [graph.plain(p) for p in parts], shape, step.dtype, axis=axis)
        reach *= 2
    return x
