"""Operators that move elements: most of them move the view of a tensor, and write nothing."""

from __future__ import annotations

from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.values import Const, Dims, Tensor, Value, is_static


@rule("transpose")
def _transpose(step: Step) -> Value:
    """Only how the tensor lies is said anew."""
    value, order = step.graph.array(step.values[0]), step.eqn.params["permutation"]
    assert isinstance(value, Tensor)
    new = {old: i for i, old in enumerate(order)}
    lies = tuple(new[axis] for axis in value.order)
    return Tensor(value.name, step.shape, step.dtype, lies, frozenset(new[i] for i in value.repeats))


@rule("broadcast_in_dim")
def _broadcast(step: Step) -> Value:
    """New axes have length 1 in the graph, and so have those that are stretched, until somebody needs them long."""
    graph, value = step.graph, step.graph.array(step.values[0])
    at = step.eqn.params["broadcast_dimensions"]
    if isinstance(value, Const) or not value.shape:  # dimensions that are known later
        return _scalar(step, value)
    held = set(range(len(step.shape))) - set(at)
    name = graph.compact(value)
    if held:
        name = graph.once("Unsqueeze", [name, graph.ints(sorted(held))])
    stretched = {i for i, old in zip(at, value.shape, strict=True) if is_static([old]) and old == 1}
    stretched |= {at[i] for i in value.repeats} | held
    ones = {i for i in stretched if is_static([step.shape[i]]) and step.shape[i] == 1}
    return Tensor(name, step.shape, step.dtype, tuple(range(len(step.shape))), frozenset(stretched - ones))


def _scalar(step: Step, value: Const | Tensor) -> Value:
    graph = step.graph
    name = graph.compact(value)
    rank = len(step.shape)
    name = graph.once("Reshape", [name, graph.ints([1] * rank)]) if rank else name
    every = frozenset(i for i, n in enumerate(step.shape) if not (is_static([n]) and n == 1))
    return Tensor(name, step.shape, step.dtype, tuple(range(rank)), every)


@rule("reshape")
def _reshape(step: Step) -> Value:
    if step.eqn.params.get("dimensions") is not None:
        step.refuse("it permutes while it reshapes", "transpose first")
    return reshaped(step.graph, step.values[0], step.shape)


@rule("squeeze")
def _squeeze(step: Step) -> Value:
    """Axes go out of the view where they are; the others stay in their places."""
    value, gone = step.graph.array(step.values[0]), set(step.eqn.params["dimensions"])
    assert isinstance(value, Tensor)
    kept = [i for i in range(len(value.shape)) if i not in gone]
    new = {old: i for i, old in enumerate(kept)}
    axes = [k for k, axis in enumerate(value.order) if axis in gone]
    name = step.graph.once("Squeeze", [value.name, step.graph.ints(axes)])
    lies = tuple(new[axis] for axis in value.order if axis not in gone)
    return Tensor(name, step.shape, step.dtype, lies, frozenset(new[i] for i in value.repeats))


@rule("expand_dims")
def _expand_dims(step: Step) -> Value:
    return reshaped(step.graph, step.values[0], step.shape)


def reshaped(graph: Graph, value: Value, shape: Dims) -> Value:
    """A value in another shape, its elements in C order."""
    dtype = value.dtype
    if tuple(value.shape) == tuple(shape):
        return value
    return graph.tensor(reshape(graph, graph.plain(value), shape), shape, dtype)


def reshape(graph: Graph, name: str, shape: Dims) -> str:
    """A tensor in another shape; of one dimension that is not known now the runtime finds the size."""
    later = [i for i, n in enumerate(shape) if not is_static([n])]
    if len(later) == 1 and 0 not in shape:
        sizes = graph.ints([-1 if i in later else n for i, n in enumerate(shape)])
        return graph.once("Reshape", [name, sizes])
    return graph.once("Reshape", [name, graph.shape(tuple(shape))], allowzero=1)
