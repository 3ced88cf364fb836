"""Updates at places that are known when the graph runs: ScatterND, what lies outside clipped or dropped."""

from __future__ import annotations

import numpy as np

from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.rules.places import Windows, clipped, indices, vector, windows
from jaxcomp.export.onnx.values import Tensor, Value, is_static

SCATTERS = {
    "scatter": "none", "scatter-add": "add", "scatter_add": "add", "scatter-mul": "mul", "scatter_mul": "mul",
    "scatter-min": "min", "scatter_min": "min", "scatter-max": "max", "scatter_max": "max",
}  # fmt: skip


@rule(*SCATTERS)
def _scatter(step: Step) -> Value:
    """ScatterND; windows that do not lie within go to a row that is cut off again."""
    graph, numbers = step.graph, step.eqn.params["dimension_numbers"]
    operand, updates = step.of(0).shape, graph.array(step.values[2])
    shared = list(zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True))
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    kept = [i for i in range(len(operand)) if i not in gone]
    sizes = [1] * len(operand)
    for i, axis in zip(kept, numbers.update_window_dims, strict=True):
        sizes[i] = updates.shape[axis]
    w = windows(step, numbers.scatter_dims_to_operand_dims, shared, sizes)
    ahead = [*numbers.operand_batching_dims, *w.indexed]
    rest = [i for i in range(len(operand)) if i not in ahead]
    if any(sizes[i] != operand[i] for i in rest):
        step.refuse("its windows are smaller than the array where no place is given", "update with whole windows")
    index, inside, counted = indices(step, w)
    places = dict(zip(kept, numbers.update_window_dims, strict=True))
    batch = [i for i in range(len(updates.shape)) if i not in numbers.update_window_dims]
    ones = [places[i] for i in w.indexed if i in places and i not in counted]
    new = graph.plain(updates, order=[*ones, *batch, *(places[i] for i in counted), *(places[i] for i in rest)])
    new = graph.once("Squeeze", [new, graph.ints(range(len(ones)))]) if ones else new
    base = graph.plain(step.values[0], order=(*ahead, *rest))
    if inside is not None:
        base, index = _with_spare(step, w, base, index, inside, len(counted))
    (name,) = graph.run("ScatterND", [base, index, new], reduction=SCATTERS[step.name])
    if inside is not None:
        ends = [graph.ints([n]) for n in (0, operand[ahead[0]], 0)]
        name = graph.once("Slice", [name, *ends])
    return Tensor(name, step.shape, step.dtype, (*ahead, *rest))


def _with_spare(step: Step, w: Windows, base: str, index: str, inside: Tensor, counted: int) -> tuple[str, str]:
    """The array with one more row, and the places with that row for windows that do not lie within."""
    graph = step.graph
    ahead = [*(i for i, _ in w.shared), *w.indexed]
    operand = step.of(0).shape
    rest = [i for i in range(len(operand)) if i not in ahead]
    spare = (1, *(operand[i] for i in (*ahead[1:], *rest)))
    base = graph.once("Concat", [base, graph.constant(np.zeros(spare, step.dtype))], axis=0)
    outside = np.zeros(len(ahead), np.int64)
    outside[0] = operand[ahead[0]]
    flags = graph.once("Unsqueeze", [graph.plain(inside), graph.ints(range(-counted - 1, 0))])
    return base, graph.once("Where", [flags, index, graph.constant(outside)])


@rule("dynamic_update_slice")
def _dynamic_update_slice(step: Step) -> Value:
    """Whole windows along every axis but one go in between what is before and behind; others by ScatterND."""
    graph, operand, update = step.graph, step.of(0).shape, tuple(step.of(1).shape)
    moving = [i for i, n in enumerate(update) if n != operand[i]]
    if not moving:
        return t.cast(graph, graph.array(step.values[1]), step.dtype)
    if not is_static(operand) or not is_static(update):
        step.refuse("its window or array has a dimension that is known later", "give it as a number")
    starts = [
        vector(graph, clipped(graph, t.cast(graph, graph.array(step.values[2 + i]), t.I64), operand[i] - update[i]))
        for i in moving
    ]
    shape = [int(update[i]) for i in moving]
    added = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).astype(np.int64)
    index = graph.once("Add", [graph.constant(added), graph.once("Concat", starts, axis=0)])
    rest = [i for i in range(len(operand)) if i not in moving]
    base, new = (graph.plain(v, order=(*moving, *rest)) for v in step.values[:2])
    (name,) = graph.run("ScatterND", [base, index, new])
    return Tensor(name, step.shape, step.dtype, (*moving, *rest))
