"""Lookups at places that are known when the graph runs: Gather of whole rows, Slice of one window, else GatherND."""

from __future__ import annotations

import numpy as np

from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.rules.movement import cut, tensor
from jaxcomp.export.onnx.rules.places import FILL, clipped, indices, vector, windows, within
from jaxcomp.export.onnx.tables import rows
from jaxcomp.export.onnx.values import Const, Tensor, Value, is_static


@rule("gather")
def _gather(step: Step) -> Value:
    numbers, sizes = step.eqn.params["dimension_numbers"], step.eqn.params["slice_sizes"]
    at, shape = tuple(numbers.start_index_map), step.of(0).shape
    if step.eqn.params["mode"] != FILL and len(at) > 1:  # a place along an axis that is taken whole is clipped to 0
        at = tuple(i for i in at if sizes[i] != shape[i])
    whole = all(sizes[i] == n for i, n in enumerate(shape) if i not in at)
    alone = not numbers.operand_batching_dims and set(numbers.collapsed_slice_dims) <= set(at)
    if len(at) == 1 and sizes[at[0]] == 1 and whole and alone:
        return _rows(step, at[0])
    return _general(step)


def _rows(step: Step, axis: int) -> Value:
    """Whole slices at places along one axis: Gather, whose result lies as the operand does."""
    graph, numbers = step.graph, step.eqn.params["dimension_numbers"]
    places = t.cast(graph, graph.array(step.values[1]), t.I64)
    batch = places.shape[:-1]
    ids = _column(graph, places, numbers.start_index_map.index(axis))
    if step.eqn.params["mode"] != FILL or isinstance(ids, Const):
        inside, ids = None, clipped(graph, ids, step.of(0).shape[axis] - 1)
    else:
        inside, ids = within(graph, ids, step.of(0).shape[axis] - 1)
    offsets = list(numbers.offset_dims)
    if axis not in numbers.collapsed_slice_dims:
        del offsets[axis]
    lie = [i for i in range(len(step.shape)) if i not in numbers.offset_dims]
    found = rows(graph, step.values[0], axis, graph.plain(ids), len(batch))
    placed = dict(zip((k for k in range(len(step.of(0).shape)) if k != axis), offsets, strict=True))
    order = [p for source in found.order for p in ([placed[source]] if source != axis else lie)]
    name = found.name
    if axis not in numbers.collapsed_slice_dims:
        extra = numbers.offset_dims[axis]
        name, order = graph.once("Unsqueeze", [name, graph.ints([0])]), [extra, *order]
    result = Tensor(name, step.shape, step.dtype, tuple(order))
    return result if inside is None else _filled(step, result, inside)


def _column(graph: Graph, places: Const | Tensor, k: int) -> Const | Tensor:
    """Number k of each vector of places."""
    if isinstance(places, Const):
        return Const(places.array[..., k], places.shape[:-1])
    last = len(places.shape) - 1
    if places.shape[last] != 1:
        places = tensor(graph, cut(graph, places, {last: (k, k + 1, 1)}, (*places.shape[:-1], 1)))
    return cut_away(graph, places, last)


def cut_away(graph: Graph, value: Tensor, axis: int) -> Tensor:
    """A tensor without an axis of length 1."""
    name = graph.once("Squeeze", [value.name, graph.ints([value.order.index(axis)])])
    new = {old: i for i, old in enumerate(i for i in range(len(value.shape)) if i != axis)}
    order = tuple(new[i] for i in value.order if i != axis)
    shape = tuple(n for i, n in enumerate(value.shape) if i != axis)
    return Tensor(name, shape, value.dtype, order, frozenset(new[i] for i in value.repeats if i != axis))


def _filled(step: Step, result: Tensor, inside: Tensor) -> Value:
    """The result with what stands for elements outside: NaN, the lowest integer, or what was asked for."""
    graph = step.graph
    axes = [i for i in range(len(step.shape)) if i not in step.eqn.params["dimension_numbers"].offset_dims]
    others = [i for i in range(len(step.shape)) if i not in axes]
    name = graph.plain(inside)
    name = graph.once("Unsqueeze", [name, graph.ints(others)]) if others else name
    repeats = frozenset(i for i in others if not (is_static([step.shape[i]]) and step.shape[i] == 1))
    which = Tensor(name, step.shape, t.BOOL, tuple(range(len(step.shape))), repeats)
    return t.where(graph, which, result, _fill(step))


def _fill(step: Step) -> Const:
    given, dtype = step.eqn.params["fill_value"], step.dtype
    if given is None:
        signed = np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max if dtype.kind == "u" else np.nan
        given = True if dtype == np.bool_ else signed
    return Const.of(np.asarray(given, dtype))


def _general(step: Step) -> Value:
    """Any gather: what is not indexed is cut to the window's size, then GatherND, then the axes are put in place."""
    graph, p = step.graph, step.eqn.params
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    shared = list(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    w = windows(step, numbers.start_index_map, shared, sizes)
    value = tensor(graph, graph.array(step.values[0]))
    ahead = [*numbers.operand_batching_dims, *w.indexed]
    rest = [i for i in range(len(value.shape)) if i not in ahead]
    cuts = {i: (0, sizes[i], 1) for i in rest if sizes[i] != value.shape[i]}
    if cuts:
        value = cut(graph, value, cuts, tuple(sizes[i] if i in cuts else n for i, n in enumerate(value.shape)))
    index, inside, counted = indices(step, w)
    source = graph.plain(value, order=(*ahead, *rest))
    name = graph.once("GatherND", [source, index])
    kept = [i for i in range(len(sizes)) if i not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)]
    places = dict(zip(kept, numbers.offset_dims, strict=True))
    batch = [i for i in range(len(step.shape)) if i not in numbers.offset_dims]
    order = [*batch, *(places[i] for i in counted), *(places[i] for i in rest if i in places)]
    missing = [i for i in kept if i in w.indexed and i not in counted]  # windows of one element, kept as an axis
    if missing:
        name = graph.once("Unsqueeze", [name, graph.ints(range(len(missing)))])
        order = [*(places[i] for i in missing), *order]
    result = Tensor(name, step.shape, step.dtype, tuple(order))
    return result if inside is None else _filled(step, result, inside)


@rule("dynamic_slice")
def _dynamic_slice(step: Step) -> Value:
    """Slice, its start clipped so that the window lies within."""
    graph, value = step.graph, tensor(step.graph, step.values[0])
    sizes, spans = step.eqn.params["slice_sizes"], {}
    for i, size in enumerate(sizes):
        if i in value.repeats or value.shape[i] == size:
            continue
        spans[i] = (clipped(graph, t.cast(graph, graph.array(step.values[1 + i]), t.I64), value.shape[i] - size), size)
    if not spans:
        return cut(graph, value, {}, step.shape)
    starts = [vector(graph, start) for start, _ in spans.values()]
    stops = [graph.once("Add", [s, graph.shape((n,))]) for s, (_, n) in zip(starts, spans.values(), strict=True)]
    first, last = (graph.once("Concat", names, axis=0) for names in (starts, stops))
    where = graph.ints([value.order.index(i) for i in spans])
    name = graph.once("Slice", [value.name, first, last, where])
    ones = {i for i, n in enumerate(step.shape) if is_static([n]) and n == 1}
    return Tensor(name, step.shape, step.dtype, value.order, value.repeats - ones)
