"""Convolutions: the image in NCHW, the kernel in OIHW; only what lies otherwise is transposed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxcomp.core.types import DType
from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.graph import Attribute, Graph
from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.rules.layout import reshape
from jaxcomp.export.onnx.values import Coded, Tensor, Value
from jaxcomp.export.onnx.weights import HostCodes, dequantized

Pads = list[tuple[int, int]]
BYTES = frozenset(map(np.dtype, ("int8", "uint8")))


@rule("conv_general_dilated")
def _conv(step: Step) -> Value:
    """``Conv``, or ``ConvInteger`` of codes that the function itself multiplies."""
    p, graph = step.eqn.params, step.graph
    numbers = p["dimension_numbers"]
    if p["batch_group_count"] != 1:
        step.refuse("it has batch groups, as the gradient of a convolution does", "export the forward function alone")
    whole = step.dtype == t.I32 and all(v.dtype in BYTES and not isinstance(v, Coded) for v in step.values)
    pads: Pads = [tuple(pair) for pair in p["padding"]]
    image = graph.plain(_multiplied(step, step.values[0], whole=whole), order=numbers.lhs_spec)
    if set(p["lhs_dilation"]) != {1}:
        image = _with_holes(step, image, p["lhs_dilation"])
    if min((end for pair in pads for end in pair), default=0) < 0:
        image, pads = cropped(graph, image, pads)
    names = [image, _kernel(step, numbers.rhs_spec, whole=whole)]
    attributes: dict[str, Attribute] = {
        "strides": list(p["window_strides"]),
        "dilations": list(p["rhs_dilation"]),
        "pads": on_edges(pads),
        "group": p["feature_group_count"],
        "kernel_shape": [int(step.values[1].shape[i]) for i in numbers.rhs_spec[2:]],
    }
    (name,) = graph.run("ConvInteger" if whole else "Conv", names, **attributes)
    made = Tensor(name, step.shape, t.I32 if whole else t.F32, tuple(numbers.out_spec))
    return made if made.dtype == step.dtype else graph.cast(made, step.dtype)


def _multiplied(step: Step, value: Value, *, whole: bool) -> Value:
    """An operand in float32, the type that runtimes convolve, if that holds the equation's numbers."""
    if whole or isinstance(value, Coded):
        return value
    if np.dtype(step.dtype) not in (t.F32, t.BFLOAT16, np.dtype(np.float16)):
        step.refuse(f"no runtime convolves {value.dtype} into {step.dtype}", "cast to float32 before")
    return t.cast(step.graph, value, t.F32)


def _kernel(step: Step, order: Sequence[int], *, whole: bool) -> str:
    value = step.values[1]
    if isinstance(value, Coded):
        held = HostCodes.of(value).laid(order, [1] * len(order))
        return dequantized(step.graph, held, dtype=_byte(held))
    return step.graph.plain(_multiplied(step, value, whole=whole), order=order)


def _byte(held: HostCodes) -> DType:
    """A byte a code, for onnxruntime has convolutions of these alone; codes of floats as they are."""
    return np.dtype(np.int8) if held.codes.dtype.kind in "iu" else held.codes.dtype


def on_edges(pads: Sequence[Sequence[int]]) -> list[int]:
    """Padding as ONNX says it: all beginnings, then all ends."""
    return [low for low, _ in pads] + [high for _, high in pads]


def _with_holes(step: Step, image: str, holes: Sequence[int]) -> str:
    """An image in NCHW with zeros between its pixels: each axis gets one of length ``holes`` behind it, padded."""
    graph, numbers = step.graph, step.eqn.params["dimension_numbers"]
    sizes = [step.values[0].shape[i] for i in numbers.lhs_spec]
    for axis, hole in enumerate(holes, 2):
        if hole == 1:
            continue
        name = graph.once("Unsqueeze", [image, graph.ints([axis + 1])])
        behind = [0] * (len(sizes) - axis - 1)
        edges = [0] * (len(sizes) + 1 + axis + 1) + [hole - 1] + behind
        name = graph.once("Pad", [name, graph.ints(edges)])
        sizes[axis] = sizes[axis] * hole
        name = reshape(graph, name, tuple(sizes))
        sizes[axis] = sizes[axis] - hole + 1
        image = graph.once("Slice", [name, graph.ints([0]), graph.shape((sizes[axis],)), graph.ints([axis])])
    return image


def cropped(graph: Graph, image: str, pads: Pads) -> tuple[str, Pads]:
    """An image cut where its padding is negative, and the padding that is left."""
    axes = list(range(2, 2 + len(pads)))
    starts = [max(-low, 0) for low, _ in pads]
    ends = [high if high < 0 else np.iinfo(np.int64).max for _, high in pads]
    name = graph.once("Slice", [image, graph.ints(starts), graph.ints(ends), graph.ints(axes)])
    return name, [(max(low, 0), max(high, 0)) for low, high in pads]
