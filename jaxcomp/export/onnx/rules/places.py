"""Where the windows of gathers and scatters begin, which is known when the graph runs alone.

For GatherND or ScatterND: for each window its place along every axis that is indexed, the windows' own steps added.
Places are clipped, or what lies outside is filled or dropped, as the equation says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import lax

from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.registry import Step
from jaxcomp.export.onnx.values import Const, Dims, Tensor, is_static

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


def clipped(graph: Graph, places: Const | Tensor, most: Any) -> Const | Tensor:
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


def within(graph: Graph, places: Const | Tensor, most: Any) -> tuple[Tensor, Const | Tensor]:
    """Which places lie within, and the places with others at 0."""
    low = graph.elementwise("GreaterOrEqual", [places, t.number(0, t.I64)], t.BOOL)
    high = graph.elementwise("LessOrEqual", [places, _most(graph, most, places.shape)], t.BOOL)
    inside = graph.elementwise("And", [low, high], t.BOOL)
    return inside, t.where(graph, inside, places, t.number(0, t.I64))


def vector(graph: Graph, number: Const | Tensor) -> str:
    """A number as a vector of one, as operators want the ends of a slice."""
    return graph.once("Reshape", [graph.compact(number), graph.ints([1])])


def windows(step: Step, mapped: Sequence[int], shared: Sequence[tuple[int, int]], sizes: Sequence[int]) -> Windows:
    """The windows of a gather or scatter, places along shared axes written out."""
    graph = step.graph
    places = t.cast(graph, graph.array(step.values[1]), t.I64)
    return Windows(places.shape[:-1], tuple(mapped), tuple(shared), tuple(sizes), places)


def indices(step: Step, w: Windows) -> tuple[str, Tensor | None, list[int]]:
    """For GatherND: places (*batch, *window steps, axes), which windows lie within, and the axes that steps count."""
    graph, operand = step.graph, step.of(0).shape
    if not is_static(operand) or not is_static(w.batch):
        step.refuse("its places go along a dimension that is known later", "give the dimension as a number")
    limits = np.array([operand[i] - w.sizes[i] for i in w.indexed], np.int64)
    inside = None
    starts: Const | Tensor = w.starts
    if step.eqn.params["mode"] == FILL:
        flags, starts = within(graph, starts, limits)
        every = graph.elementwise("Cast", [flags], t.U8, to=t.U8)
        last = len(w.batch)
        inside = graph.node("ReduceMin", [graph.plain(every), graph.ints([last])], w.batch, t.U8, keepdims=0)
        inside = graph.elementwise("Cast", [inside], t.BOOL, to=t.BOOL)
    else:
        starts = clipped(graph, starts, limits)
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
