"""What scales and shifts the channels of a product goes into its weight and, of a convolution, its bias.

Batch norm in inference mode, a scale, a bias: ``(conv(x, w) + b) a + c == conv(x, w a) + (b a + c)``. A weight in codes
keeps its codes; its scale is multiplied. Runtimes quantize a bias only where it is the convolution's third input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np

from jaxcomp.export.onnx.graph import Attribute, Graph, Node
from jaxcomp.export.onnx.passes.links import Links, rebuild

CHANNELS = {"Conv": 0, "MatMul": 1}
"""Operators that multiply by a weight, and the weight's axis of the result's channels."""


class Change(NamedTuple):
    """What a result's channels are multiplied by, then added; None is nothing."""

    times: np.ndarray | None
    plus: np.ndarray | None


def fold_affine(graph: Graph) -> None:
    """Folds until nothing more goes in."""
    links = Links.of(graph)
    gone: list[Node] = []

    def each(node: Node) -> bool:
        if any(node is g for g in gone):
            return True
        while (change := _next(links, node)) is not None:
            reader = links.only_reader(node.outputs[0])
            assert reader is not None
            _apply(links, node, change)
            node.outputs = reader.outputs
            gone.append(reader)
        return False

    rebuild(graph, each)


def _next(links: Links, node: Node) -> Change | None:
    """What is done to a product's channels next, if it can go in."""
    reader = links.only_reader(node.outputs[0])
    if node.op not in CHANNELS or reader is None or reader.op not in _STEPS:
        return None
    first = reader.inputs[0] == node.outputs[0]
    other = links.constant(reader.inputs[1 if first else 0])
    if other is None or other.dtype != np.float32:
        return None
    spatial = len(cast(list[int], node.attributes["kernel_shape"])) if node.op == "Conv" else 0
    if any(n != 1 for i, n in enumerate(other.shape[::-1]) if i != spatial):
        return None
    change = _STEPS[reader.op](other.reshape(-1), first)
    if change is None or (change.plus is not None and node.op != "Conv"):
        return None
    return change if _fits(links, node, change, other.size) else None


def _fits(links: Links, node: Node, change: Change, size: int) -> bool:
    """Whether the weight is a constant, or codes, whose channels have their own scales or can get them."""
    made = links.weight_codes(node.inputs[1])
    weight = links.constant(node.inputs[1] if made is None else made.inputs[0])
    if weight is None or (node.op == "MatMul" and weight.ndim != 2) or (made is None and weight.dtype != np.float32):
        return False
    if size not in (1, weight.shape[CHANNELS[node.op]]):  # the operator repeats a product of one channel
        return False
    if made is None or change.times is None:
        return True
    scale, axis = links.constant(made.inputs[1]), CHANNELS[node.op]
    assert scale is not None
    whole = scale.ndim == 1 and made.attributes["axis"] == axis
    return scale.ndim == 0 or whole or (scale.ndim > 1 and scale.shape[axis] == weight.shape[axis])


def _sub(c: np.ndarray, first: bool) -> Change:
    return Change(None, -c) if first else Change(-np.ones_like(c), c)


_STEPS: dict[str, Callable[[np.ndarray, bool], Change | None]] = {
    "Add": lambda c, first: Change(None, c),
    "Sub": _sub,
    "Mul": lambda c, first: Change(c, None),
    "Div": lambda c, first: Change(np.float32(1) / c, None) if first else None,
}


def _apply(links: Links, node: Node, change: Change) -> None:
    """Changes weight and bias."""
    graph = links.graph
    made = links.weight_codes(node.inputs[1])
    weight = links.constant(node.inputs[1] if made is None else made.inputs[0])
    assert weight is not None
    old = links.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    features = weight.shape[CHANNELS[node.op]]
    bias = np.zeros(features, np.float32) if old is None else old
    if change.times is not None:
        node.inputs[1] = _scaled(links, made, weight, change.times, CHANNELS[node.op])
        bias = bias * change.times
    if change.plus is not None:
        bias = bias + change.plus
    if change.plus is not None or old is not None:
        node.inputs[2:] = [graph.constant(bias)]


def _scaled(links: Links, made: Node | None, weight: np.ndarray, times: np.ndarray, axis: int) -> str:
    """The name of a weight whose channels are multiplied."""
    graph = links.graph

    def along(rank: int) -> np.ndarray:
        return times.reshape([-1 if i == axis else 1 for i in range(rank)])

    if made is None:
        return graph.constant(weight * along(weight.ndim))
    scale, zero = links.constant(made.inputs[1]), links.constant(made.inputs[2])
    assert scale is not None
    assert zero is not None
    attributes: dict[str, Attribute] = dict(made.attributes)
    if scale.ndim == 0 and times.size > 1:
        scale, zero = np.repeat(scale, times.size), np.repeat(zero, times.size)
        attributes = {"axis": axis}
    scale = scale * (times if scale.ndim < 2 else along(scale.ndim))
    names = [made.inputs[0], graph.constant(scale.reshape(zero.shape)), graph.constant(zero)]
    name = graph.once("DequantizeLinear", names, **attributes)
    if graph.nodes and graph.nodes[-1].outputs == [name]:
        links.maker[name] = graph.nodes[-1]
    return name
