"""Operators that cut, join, pad, turn round and count: what moves elements and is no view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.rules.layout import reshape
from jaxcomp.export.onnx.values import Const, Dims, Tensor, Value, is_static, repeats_of

BEFORE_ALL = np.iinfo(np.int64).min
Span = tuple[Any, Any, int]
"""Start, stop and step along an axis."""


def tensor(graph: Graph, value: Value) -> Tensor:
    """A value as a tensor of the graph, as compact as it was."""
    value = graph.array(value)
    if isinstance(value, Tensor):
        return value
    order = tuple(range(len(value.shape)))
    return Tensor(graph.compact(value), value.shape, np.dtype(value.dtype), order, repeats_of(value))


def cut(graph: Graph, value: Tensor, spans: Mapping[int, Span], shape: Dims) -> Tensor:
    """A tensor cut along some axes where it lies; what it repeats is not cut."""
    axes = [i for i in spans if i not in value.repeats]
    ends = {i: n for i, n in enumerate(shape) if is_static([n]) and n == 1}
    repeats = value.repeats - ends.keys()
    if not axes:
        return replace(value, shape=shape, repeats=repeats)
    starts, stops, steps = zip(*(spans[i] for i in axes), strict=True)
    where = graph.ints([value.order.index(i) for i in axes])
    names = [graph.shape(starts), graph.shape(stops), where, graph.ints(steps)]
    return replace(value, name=graph.once("Slice", [value.name, *names]), shape=shape, repeats=repeats)


@rule("slice")
def _slice(step: Step) -> Value:
    p, value = step.eqn.params, tensor(step.graph, step.values[0])
    steps = p["strides"] or (1,) * len(step.shape)
    spans = enumerate(zip(p["start_indices"], p["limit_indices"], steps, strict=True))
    cuts = {i: span for i, span in spans if span != (0, value.shape[i], 1)}
    return cut(step.graph, value, cuts, step.shape)


@rule("rev")
def _rev(step: Step) -> Value:
    spans = dict.fromkeys(step.eqn.params["dimensions"], (-1, BEFORE_ALL, -1))
    return cut(step.graph, tensor(step.graph, step.values[0]), spans, step.shape)


@rule("split")
def _split(step: Step) -> list[Value]:
    """The pieces between the ends of the sizes before them."""
    value, axis, start = tensor(step.graph, step.values[0]), step.eqn.params["axis"], 0
    pieces: list[Value] = []
    for size in step.eqn.params["sizes"]:
        shape = (*value.shape[:axis], size, *value.shape[axis + 1 :])
        pieces.append(cut(step.graph, value, {axis: (start, start + size, 1)}, shape))
        start = start + size
    return pieces


@rule("unstack")
def _unstack(step: Step) -> list[Value]:
    """The pieces of length 1, without the axis."""
    axis, graph = step.eqn.params["axis"], step.graph
    value = tensor(graph, step.values[0])
    if axis in value.repeats:
        value = tensor(graph, graph.tensor(graph.plain(value), value.shape, value.dtype))
    return [index(graph, value, axis, i) for i in range(len(step.eqn.outvars))]


def index(graph: Graph, value: Tensor, axis: int, at: int | str) -> Tensor:
    """``value[at]`` along an axis, which goes; ``at`` may be the name of a number."""
    name = graph.constant(at, t.I64) if isinstance(at, int) else at
    new = {old: i for i, old in enumerate(i for i in range(len(value.shape)) if i != axis)}
    if axis in value.repeats:
        name = graph.once("Squeeze", [value.name, graph.ints([value.order.index(axis)])])
    else:
        name = graph.once("Gather", [value.name, name], axis=value.order.index(axis))
    order = tuple(new[i] for i in value.order if i != axis)
    shape = (*value.shape[:axis], *value.shape[axis + 1 :])
    return Tensor(name, shape, value.dtype, order, frozenset(new[i] for i in value.repeats if i != axis))


@rule("concatenate")
def _concatenate(step: Step) -> Value:
    """Where most of the operands lie alike, the result lies so too."""
    graph, axis = step.graph, step.eqn.params["dimension"]
    tensors = [v for v in map(graph.array, step.values) if isinstance(v, Tensor)]
    order = tensors[0].order if tensors else tuple(range(len(step.shape)))
    names = [graph.plain(v, order=order) for v in step.values]
    return Tensor(graph.once("Concat", names, axis=order.index(axis)), step.shape, step.dtype, order)


@rule("stack")
def _stack(step: Step) -> Value:
    graph, axis = step.graph, step.eqn.params["axis"]
    parts = [graph.once("Unsqueeze", [graph.plain(v), graph.ints([axis])]) for v in step.values]
    return step.node("Concat", parts, axis=axis)


@rule("tile")
def _tile(step: Step) -> Value:
    return step.node("Tile", [step.graph.plain(step.values[0]), step.graph.ints(step.eqn.params["reps"])])


@rule("pad")
def _pad(step: Step) -> Value:
    """Holes first, then cuts where the padding is negative, then the padding."""
    graph, value = step.graph, tensor(step.graph, step.values[0])
    config = step.eqn.params["padding_config"]
    fill = graph.array(step.values[1])
    wide = t.kernel_type("Pad", step.dtype) or step.dtype
    name, shape = graph.plain(t.cast(graph, value, wide)), list(value.shape)
    number = graph.plain(t.cast(graph, fill, wide))
    for axis, (_, _, inner) in enumerate(config):
        if inner:
            name = _with_holes(graph, name, shape, axis, inner, number)
    cuts = {i: (max(-low, 0), shape[i] - max(-high, 0), 1) for i, (low, high, _) in enumerate(config)}
    cuts = {i: span for i, span in cuts.items() if span != (0, shape[i], 1)}
    if cuts:
        left = tuple(cuts[i][1] - cuts[i][0] if i in cuts else n for i, n in enumerate(shape))
        name = cut(graph, graph.tensor(name, tuple(shape), wide), cuts, left).name
    pads = [max(low, 0) for low, _, _ in config] + [max(high, 0) for _, high, _ in config]
    if any(pads):
        name = graph.once("Pad", [name, graph.ints(pads), number])
    return t.narrowed(graph, graph.tensor(name, step.shape, wide), step.dtype)


def _with_holes(graph: Graph, name: str, shape: list[Any], axis: int, inner: int, fill: str) -> str:
    """``inner`` fillings between the elements of an axis: each gets them behind it, and those of the last go."""
    rank = len(shape) + 1
    name = graph.once("Unsqueeze", [name, graph.ints([axis + 1])])
    ends = graph.ints([0] * (rank + axis + 1) + [inner] + [0] * (rank - axis - 2))
    name = graph.once("Pad", [name, ends, fill])
    shape[axis] = shape[axis] * (inner + 1)
    name = reshape(graph, name, tuple(shape))
    shape[axis] = shape[axis] - inner
    stop = graph.shape((shape[axis],))
    return graph.once("Slice", [name, graph.ints([0]), stop, graph.ints([axis])])


@rule("iota")
def _iota(step: Step) -> Value:
    """Of a length that is known when the graph runs; others are constants."""
    graph, axis = step.graph, step.eqn.params["dimension"]
    count = graph.once("Squeeze", [graph.shape((step.shape[axis],))])
    counted = graph.once("Range", [graph.constant(0, t.I64), count, graph.constant(1, t.I64)])
    rank = len(step.shape)
    others = [i for i in range(rank) if i != axis]
    name = graph.once("Unsqueeze", [counted, graph.ints(others)]) if others else counted
    repeats = frozenset(i for i in others if not (is_static([step.shape[i]]) and step.shape[i] == 1))
    found = Tensor(name, step.shape, t.I64, tuple(range(rank)), repeats)
    return t.cast(graph, found, step.dtype)


def counting(n: int) -> Const:
    """0, 1, …, n - 1."""
    return Const.of(np.arange(n))
