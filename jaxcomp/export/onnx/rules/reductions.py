"""Operators over whole axes."""

from __future__ import annotations

from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.values import Tensor

PLAIN = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_prod": "ReduceProd"}
"""Primitives that are one operator with the axes as its second input."""


def _reduce(step: Step) -> Tensor:
    """Axes are named where they lie, so nothing is moved."""
    value = step.graph.array(step.values[0])
    axes = step.eqn.params["axes"]
    assert isinstance(value, Tensor)
    if not axes:
        return value
    if value.repeats & set(axes):
        value = step.graph.tensor(step.graph.plain(value), value.shape, value.dtype)
    kept = [i for i in range(len(value.shape)) if i not in axes]
    new = {old: i for i, old in enumerate(kept)}
    where = step.graph.ints([k for k, axis in enumerate(value.order) if axis in axes])
    (name,) = step.graph.run(PLAIN[step.name], [value.name, where], keepdims=0)
    lies = tuple(new[axis] for axis in value.order if axis not in axes)
    return Tensor(name, step.shape, step.dtype, lies, frozenset(new[i] for i in value.repeats))


rule(*PLAIN)(_reduce)
