"""Windows that slide: pooling."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.graph import Attribute
from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.rules.convolutions import Pads, cropped, on_edges
from jaxcomp.export.onnx.rules.layout import reshape
from jaxcomp.export.onnx.values import Tensor, Value

MOST = 3
"""Axes over which runtimes pool."""


class Window(NamedTuple):
    """A window over the last axes of an image in NCHW.

    Attributes:
      order: the value's axes as they lie in the image: at most two, then those that the window goes over.
      lacking: how many axes of length 1 the image has before them.
      attributes: of the operator, without padding.
      pads: of each axis.
    """

    order: tuple[int, ...]
    lacking: int
    attributes: dict[str, Attribute]
    pads: Pads


@rule("reduce_window_max")
def _max(step: Step) -> Value:
    return _pooled(step, "MaxPool", step.graph.array(step.values[0]), -np.inf)


@rule("reduce_window_min")
def _min(step: Step) -> Value:
    least = _pooled(step, "MaxPool", step.graph.elementwise("Neg", step.values, step.dtype), -np.inf)
    return step.graph.elementwise("Neg", [least], step.dtype)


@rule("reduce_window_sum")
def _sum(step: Step) -> Value:
    """The mean of a window, zeros around it counted, times its size."""
    mean = _pooled(step, "AveragePool", step.graph.array(step.values[0]), 0.0, count_include_pad=1)
    size = math.prod(step.eqn.params["window_dimensions"])
    return step.graph.elementwise("Mul", [mean, t.number(size, step.dtype)], step.dtype)


def _pooled(step: Step, op: str, value: Value, outside: float, **attributes: Attribute) -> Tensor:
    """A pooling operator; ``outside`` is what the padding holds."""
    if np.dtype(step.dtype) not in (t.F32, t.BFLOAT16, np.dtype(np.float16)):
        step.refuse(f"no runtime pools {step.dtype}", "cast to float32 before")
    graph, window = step.graph, _window(step)
    image, pads = graph.plain(t.cast(graph, value, t.F32), order=window.order), window.pads
    if window.lacking:
        held = tuple(value.shape[i] for i in window.order)
        image = reshape(graph, image, (*[1] * window.lacking, *held))
    if min(end for pair in pads for end in pair) < 0:
        image, pads = cropped(graph, image, pads)
    sizes = [step.eqn.params["window_dimensions"][i] for i in window.order[2 - window.lacking :]]
    far = any(max(pair) >= n for pair, n in zip(pads, sizes, strict=True))
    if far:
        edges = on_edges([(0, 0), (0, 0), *pads])
        image = graph.once("Pad", [image, graph.ints(edges), graph.constant(outside, t.F32)])
        pads = [(0, 0)] * len(pads)
    (name,) = graph.run(op, [image], pads=on_edges(pads), **window.attributes, **attributes)
    if far and outside:  # onnxruntime's largest of nothing but minus infinity is the least number
        least = graph.once("LessOrEqual", [name, graph.constant(np.finfo(np.float32).min, t.F32)])
        name = graph.once("Where", [least, graph.constant(outside, t.F32), name])
    if window.lacking:
        name = reshape(graph, name, tuple(step.shape[i] for i in window.order))
    made = Tensor(name, step.shape, t.F32, window.order)
    return made if made.dtype == step.dtype else graph.cast(made, step.dtype)


def _window(step: Step) -> Window:
    """The window with axes that it leaves alone first."""
    p, rank = step.eqn.params, len(step.shape)
    if set(p["base_dilation"]) - {1}:
        step.refuse("there are holes between the elements that it goes over", "pad with lax.pad before")
    sizes, strides = p["window_dimensions"], p["window_strides"]
    still = [i for i in range(rank) if sizes[i] == strides[i] == 1 and tuple(p["padding"][i]) == (0, 0)]
    first = tuple(still[: min(2, max(rank - 1, 0))])
    over = tuple(i for i in range(rank) if i not in first)
    if len(over) > MOST:
        step.refuse(f"it goes over {len(over)} axes", f"pool over at most {MOST}, one after the other")
    attributes: dict[str, Attribute] = {
        "kernel_shape": [sizes[i] for i in over],
        "strides": [strides[i] for i in over],
        "dilations": [p["window_dilation"][i] for i in over],
    }
    return Window((*first, *over), 2 - len(first), attributes, [tuple(p["padding"][i]) for i in over])
