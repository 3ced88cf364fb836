"""Lookups and updates at places that are known when the graph runs.

A general gather or scatter becomes GatherND or ScatterND: for each window its place along every axis that is indexed,
the windows' own steps added. Places are clipped, or what lies outside is filled or dropped, as the equation says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import lax

from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.rules.movement import cut, tensor
from jaxcomp.export.onnx.tables import rows
from jaxcomp.export.onnx.values import Const, Dims, Tensor, Value, is_static

FILL = lax.GatherScatterMode.FILL_OR_DROP


class Windows(NamedTuple):
    """Where windows begin, and which axes are looked up.

    Attributes:
      batch: the shape of the windows' places, without the vector of each.
      indexed: axes of the operand along which a place is given, those shared with the places first.
      shared: how many of them are shared.
      sizes: of a window, along every axis.
      starts: (*batch, places), int64.
    """

    batch: Dims
    indexed: tuple[int, ...]
    shared: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]
    starts: Const | Tensor


@rule("gather")
def _gather(step: Step) -> Value:
    numbers, sizes = step.eqn.params["dimension_numbers"], step.eqn.params["slice_sizes"]
    at = tuple(numbers.start_index_map)
    shape = step.of(0).shape
    whole = all(sizes[i] == n for i, n in enumerate(shape) if i not in at)
    if len(at) == 1 and sizes[at[0]] == 1 and whole and not numbers.operand_batching_dims:
        return _rows(step, at[0])
    return _general(step)


def _rows(step: Step, axis: int) -> Value:
    """Whole slices at places along one axis: Gather, whose result lies as the operand does."""
    graph, numbers = step.graph, step.eqn.params["dimension_numbers"]
    places = t.cast(graph, graph.array(step.values[1]), t.I64)
    batch = places.shape[:-1]
    ids = _squeezed(graph, places)
    if step.eqn.params["mode"] != FILL or isinstance(ids, Const):
        inside, ids = None, _clipped(graph, ids, step.of(0).shape[axis] - 1)
    else:
        inside, ids = _within(graph, ids, step.of(0).shape[axis] - 1)
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


def _squeezed(graph: Graph, places: Const | Tensor) -> Const | Tensor:
    """The places without their vectors' axis, of length 1."""
    if isinstance(places, Const):
        return Const(places.array[..., 0], places.shape[:-1])
    last = len(places.shape) - 1
    return cut_away(graph, places, last)


def cut_away(graph: Graph, value: Tensor, axis: int) -> Tensor:
    """A tensor without an axis of length 1."""
    name = graph.once("Squeeze", [value.name, graph.ints([value.order.index(axis)])])
    new = {old: i for i, old in enumerate(i for i in range(len(value.shape)) if i != axis)}
    order = tuple(new[i] for i in value.order if i != axis)
    shape = tuple(n for i, n in enumerate(value.shape) if i != axis)
    return Tensor(name, shape, value.dtype, order, frozenset(new[i] for i in value.repeats if i != axis))


def _clipped(graph: Graph, places: Const | Tensor, most: Any) -> Const | Tensor:
    """Places within 0 and ``most``, numbers or vectors."""
    if isinstance(places, Const) and isinstance(most, int | np.integer | np.ndarray):
        return Const(np.clip(places.array, 0, most), places.shape)
    if isinstance(most, int | np.integer):
        return graph.elementwise("Clip", [places, t.number(0, t.I64), t.number(int(most), t.I64)], t.I64)
    raised = graph.elementwise("Max", [places, t.number(0, t.I64)], t.I64)
    return graph.elementwise("Min", [raised, _most(graph, most, places.shape)], t.I64)


def _most(graph: Graph, most: Any, shape: Dims) -> Const | Tensor:
    """The last place along an axis, or along each of several, which are the last axis of ``shape``."""
    if isinstance(most, int | np.integer):
        return t.number(int(most), t.I64)
    if isinstance(most, np.ndarray):
        return Const(most.reshape([*[1] * (len(shape) - 1), -1]), shape)
    name = graph.once("Squeeze", [graph.shape((most,))])  # a dimension that is known later
    return graph.tensor(name, (), t.I64)


def _within(graph: Graph, places: Const | Tensor, most: Any) -> tuple[Tensor, Const | Tensor]:
    """Which places lie within, and the places with others at 0."""
    low = graph.elementwise("GreaterOrEqual", [places, t.number(0, t.I64)], t.BOOL)
    high = graph.elementwise("LessOrEqual", [places, _most(graph, most, places.shape)], t.BOOL)
    inside = graph.elementwise("And", [low, high], t.BOOL)
    return inside, t.where(graph, inside, places, t.number(0, t.I64))


def _filled(step: Step, result: Tensor, inside: Tensor) -> Value:
    """The result with what stands for elements outside: NaN, the lowest integer, or what was asked for."""
    graph = step.graph
    axes = [i for i in range(len(step.shape)) if i not in step.eqn.params["dimension_numbers"].offset_dims]
    others = [i for i in range(len(step.shape)) if i not in axes]
    name = graph.plain(inside)
    name = graph.once("Unsqueeze", [name, graph.ints(others)]) if others else name
    repeats = frozenset(i for i in others if not (is_static([step.shape[i]]) and step.shape[i] == 1))
    which = Tensor(name, step.shape, t.BOOL, tuple(range(len(step.shape))), repeats)
    return chosen(graph, which, result, _fill(step))


def _fill(step: Step) -> Const:
    given, dtype = step.eqn.params["fill_value"], step.dtype
    if given is None:
        signed = np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max if dtype.kind == "u" else np.nan
        given = True if dtype == np.bool_ else signed
    return Const.of(np.asarray(given, dtype))


def chosen(graph: Graph, which: Value, yes: Value, no: Value) -> Tensor:
    """``yes`` where ``which`` holds, else ``no``; truth through numbers."""
    if np.dtype(yes.dtype) != np.bool_:
        return t.where(graph, which, yes, no)
    found = t.where(graph, which, t.cast(graph, yes, t.U8), t.cast(graph, no, t.U8))
    return t.narrowed(graph, found, t.BOOL)


# ---- any gather and scatter


def _windows(step: Step, mapped: Sequence[int], shared: Sequence[tuple[int, int]], sizes: Sequence[int]) -> Windows:
    """The windows of a gather or scatter, places along shared axes written out."""
    graph = step.graph
    places = t.cast(graph, graph.array(step.values[1]), t.I64)
    return Windows(places.shape[:-1], tuple(mapped), tuple(shared), tuple(sizes), places)


def _indices(step: Step, w: Windows) -> tuple[str, Tensor | None, list[int]]:
    """For GatherND: places (*batch, *window steps, axes), which windows lie within, and the axes that steps count."""
    graph, operand = step.graph, step.of(0).shape
    if not is_static(operand) or not is_static(w.batch):
        step.refuse("its places go along a dimension that is known later", "give the dimension as a number")
    limits = np.array([operand[i] - w.sizes[i] for i in w.indexed], np.int64)
    inside = None
    starts: Const | Tensor = w.starts
    if step.eqn.params["mode"] == FILL:
        flags, starts = _within(graph, starts, limits)
        every = graph.elementwise("Cast", [flags], t.U8, to=t.U8)
        last = len(w.batch)
        inside = graph.node("ReduceMin", [graph.plain(every), graph.ints([last])], w.batch, t.U8, keepdims=0)
        inside = graph.elementwise("Cast", [inside], t.BOOL, to=t.BOOL)
    else:
        starts = _clipped(graph, starts, limits)
    counted = [i for i in w.indexed if w.sizes[i] != 1]
    rank = len(w.batch) + len(counted)
    shape = (*w.batch, *(w.sizes[i] for i in counted))
    name = graph.plain(starts)
    if counted:
        name = graph.once("Unsqueeze", [name, graph.ints(range(len(w.batch), rank))])
        name = graph.once("Add", [name, graph.constant(_steps(w, counted, len(w.batch)))])
    name = _with_shared(graph, w, name, shape)
    return name, inside, counted


def _steps(w: Windows, counted: list[int], lead: int) -> np.ndarray:
    """What a window's steps add to its place: (1, …, *steps, axes)."""
    shape = [w.sizes[i] for i in counted]
    added = np.zeros([*[1] * lead, *shape, len(w.indexed)], np.int64)
    for k, axis in enumerate(counted):
        counts = np.arange(w.sizes[axis]).reshape([-1 if j == k else 1 for j in range(len(shape))])
        added[..., w.indexed.index(axis)] = counts
    return added


def _with_shared(graph: Graph, w: Windows, name: str, shape: Dims) -> str:
    """The places along axes that operand and places share put in front: each its own index."""
    if not w.shared:
        return name
    columns = []
    for _, where in w.shared:
        counts = np.arange(int(shape[where])).reshape([-1 if j == where else 1 for j in range(len(shape))])
        columns.append(np.broadcast_to(counts, shape)[..., None])
    full = graph.once("Expand", [name, graph.shape((*shape, len(w.indexed)))])
    return graph.once("Concat", [graph.constant(np.concatenate(columns, -1).astype(np.int64)), full], axis=len(shape))


def _general(step: Step) -> Value:
    """Any gather: what is not indexed is cut to the window's size, then GatherND, then the axes are put in place."""
    graph, p = step.graph, step.eqn.params
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    shared = list(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    w = _windows(step, numbers.start_index_map, shared, sizes)
    value = tensor(graph, graph.array(step.values[0]))
    ahead = [*numbers.operand_batching_dims, *w.indexed]
    rest = [i for i in range(len(value.shape)) if i not in ahead]
    cuts = {i: (0, sizes[i], 1) for i in rest if sizes[i] != value.shape[i]}
    if cuts:
        value = cut(graph, value, cuts, tuple(sizes[i] if i in cuts else n for i, n in enumerate(value.shape)))
    index, inside, counted = _indices(step, w)
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
    w = _windows(step, numbers.scatter_dims_to_operand_dims, shared, sizes)
    ahead = [*numbers.operand_batching_dims, *w.indexed]
    rest = [i for i in range(len(operand)) if i not in ahead]
    if any(sizes[i] != operand[i] for i in rest):
        step.refuse("its windows are smaller than the array where no place is given", "update with whole windows")
    index, inside, counted = _indices(step, w)
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


@rule("dynamic_slice")
def _dynamic_slice(step: Step) -> Value:
    """Slice, its start clipped so that the window lies within."""
    graph, value = step.graph, tensor(step.graph, step.values[0])
    sizes, spans = step.eqn.params["slice_sizes"], {}
    for i, size in enumerate(sizes):
        if i in value.repeats or value.shape[i] == size:
            continue
        spans[i] = (_clipped(graph, t.cast(graph, graph.array(step.values[1 + i]), t.I64), value.shape[i] - size), size)
    if not spans:
        return cut(graph, value, {}, step.shape)
    starts = [_vector(graph, start) for start, _ in spans.values()]
    stops = [graph.once("Add", [s, graph.shape((n,))]) for s, (_, n) in zip(starts, spans.values(), strict=True)]
    first, last = (graph.once("Concat", names, axis=0) for names in (starts, stops))
    where = graph.ints([value.order.index(i) for i in spans])
    name = graph.once("Slice", [value.name, first, last, where])
    ones = {i for i, n in enumerate(step.shape) if is_static([n]) and n == 1}
    return Tensor(name, step.shape, step.dtype, value.order, value.repeats - ones)


def _vector(graph: Graph, number: Const | Tensor) -> str:
    return graph.once("Reshape", [graph.compact(number), graph.ints([1])])


@rule("dynamic_update_slice")
def _dynamic_update_slice(step: Step) -> Value:
    """Whole windows along every axis but one go in between what is before and behind; others by ScatterND."""
    graph, operand, update = step.graph, step.of(0).shape, graph_shape(step.values[1])
    moving = [i for i, n in enumerate(update) if n != operand[i]]
    if not moving:
        return t.cast(graph, graph.array(step.values[1]), step.dtype)
    if not is_static(operand) or not is_static(update):
        step.refuse("its window or array has a dimension that is known later", "give it as a number")
    starts = [
        _vector(graph, _clipped(graph, t.cast(graph, graph.array(step.values[2 + i]), t.I64), operand[i] - update[i]))
        for i in moving
    ]
    shape = [int(update[i]) for i in moving]
    added = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).astype(np.int64)
    index = graph.once("Add", [graph.constant(added), graph.once("Concat", starts, axis=0)])
    rest = [i for i in range(len(operand)) if i not in moving]
    base, new = (graph.plain(v, order=(*moving, *rest)) for v in step.values[:2])
    (name,) = graph.run("ScatterND", [base, index, new])
    return Tensor(name, step.shape, step.dtype, (*moving, *rest))


def graph_shape(value: Value) -> tuple[Any, ...]:
    """The shape of a value."""
    return tuple(value.shape)
