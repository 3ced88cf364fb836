"""Sorts: by TopK, which is stable and puts NaN last, as JAX does."""

from __future__ import annotations

from typing import cast

import numpy as np

from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.values import Const, Tensor, Value


@rule("sort")
def _sort(step: Step) -> list[Value]:
    """By the last key first: each sort keeps the order of what is equal."""
    axis, keys = cast(int, step.eqn.params["dimension"]), cast(int, step.eqn.params["num_keys"])
    values = [step.graph.array(v) for v in step.values]
    for i in reversed(range(keys)):
        at = _order(step, values[i], axis, step.of(0).shape[axis], largest=0)[1]
        values = [_taken(step, v, at, axis) for v in values]
    return list(values)


@rule("top_k")
def _top_k(step: Step) -> list[Value]:
    axis = cast(int, step.eqn.params.get("axis", len(step.shape) - 1)) % len(step.shape)
    value, at = _order(step, step.graph.array(step.values[0]), axis, step.eqn.params["k"], largest=1)
    return [value, t.cast(step.graph, at, np.dtype(step.eqn.outvars[1].aval.dtype))]  # type: ignore[attr-defined]


def _order(step: Step, x: Const | Tensor, axis: int, count: int, *, largest: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` elements along an axis in order, and their indices."""
    graph, dtype = step.graph, np.dtype(x.dtype)
    wide = t.kernel_type("TopK", dtype)
    if wide is None or dtype == np.uint64:
        step.refuse(f"no runtime sorts {dtype}", "cast to another type first")
    shape = tuple(count if i == axis else n for i, n in enumerate(x.shape))
    number = graph.shape((count,))
    names = graph.run("TopK", [graph.plain(t.cast(graph, x, wide)), number], count=2, axis=axis, largest=largest)
    value = graph.tensor(names[0], shape, wide)
    return t.narrowed(graph, value, dtype), graph.tensor(names[1], shape, t.I64)


def _taken(step: Step, x: Const | Tensor, at: Tensor, axis: int) -> Tensor:
    """The elements of ``x`` in another order along an axis."""
    graph = step.graph
    return graph.node("GatherElements", [graph.plain(x), at.name], x.shape, x.dtype, axis=axis)
