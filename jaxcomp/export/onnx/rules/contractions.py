"""Dots and convolutions: operands laid as the operator wants them, weights in codes behind a DequantizeLinear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from jaxcomp.core.types import DType
from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.rules.layout import reshape
from jaxcomp.export.onnx.values import Coded, Const, Dims, Tensor, Value, is_static
from jaxcomp.export.onnx.weights import HostCodes, dequantized


class Side(NamedTuple):
    """The axes of one operand of a dot: shared with the other, its own, and summed over."""

    batch: tuple[int, ...]
    free: tuple[int, ...]
    summed: tuple[int, ...]


def sides_of(step: Step) -> tuple[Side, Side]:
    """What a dot does with the axes of its operands."""
    (lhs, rhs), (lhs_batch, rhs_batch) = step.eqn.params["dimension_numbers"]

    def side(i: int, summed: Sequence[int], batch: Sequence[int]) -> Side:
        free = (axis for axis in range(len(step.of(i).shape)) if axis not in (*batch, *summed))
        return Side(tuple(batch), tuple(free), tuple(summed))

    return side(0, lhs, lhs_batch), side(1, rhs, rhs_batch)


@rule("dot_general")
def _dot(step: Step) -> Value:
    """``MatMul`` of (batch, rows, summed) by (batch, summed, columns), or of any rank by a matrix."""
    values = [v if isinstance(v, Coded) else step.graph.array(v) for v in step.values]
    sides = sides_of(step)
    a, b = _alike(step, values)
    shape = tuple(a.shape[i] for i in sides[0].batch)
    rows, columns = (tuple(v.shape[i] for i in side.free) for v, side in zip((a, b), sides, strict=True))
    if not sides[0].batch and len(sides[0].summed) == 1 and len(rows) > 0:
        left = step.graph.plain(a, order=(*sides[0].free, *sides[0].summed))
        made: Dims = (*rows, _size(columns))
    else:
        left = matrix(step.graph, a, sides[0], (sides[0].free, sides[0].summed))
        made = (*shape, _size(rows), _size(columns))
    right = matrix(step.graph, b, sides[1], (sides[1].summed, sides[1].free))
    whole = a.dtype in BYTES and b.dtype in BYTES
    name = (
        _whole_product(step.graph, left, a.dtype, right, b.dtype)
        if whole
        else step.graph.run("MatMul", [left, right])[0]
    )
    if made != step.shape:
        name = reshape(step.graph, name, step.shape)
    made_of = t.F32 if isinstance(a, Coded) else a.dtype
    return _typed(step, step.graph.tensor(name, step.shape, t.I32 if whole else made_of))


def _whole_product(graph: Graph, left: str, of_left: DType, right: str, of_right: DType) -> str:
    """``MatMulInteger`` into int32, the left one unsigned: of int8 by int8 onnxruntime is several times slower."""
    if of_left == np.int8:
        left = graph.once("BitwiseXor", [graph.once("Cast", [left], to=t.U8), graph.constant(128, t.U8)])
    zeros = [graph.constant(128 * int(of_left == np.int8), t.U8), graph.constant(0, of_right)]
    return graph.run("MatMulInteger", [left, right, *zeros])[0]


BYTES = frozenset(map(np.dtype, ("int8", "uint8")))


def _alike(step: Step, values: Sequence[Value]) -> list[Value]:
    """Operands in a type in which runtimes multiply, that of the result or wider; a weight in codes becomes float32."""
    dtype = step.dtype
    if dtype == t.I32 and all(v.dtype in BYTES and not isinstance(v, Coded) for v in values):
        return list(values)
    coded = any(isinstance(v, Coded) for v in values)
    wide = t.F32 if coded else t.kernel_type("MatMul", dtype)
    if wide is None:
        step.refuse(f"no runtime multiplies {dtype}", "cast to float32 or int32 first")
    return [v if isinstance(v, Coded) else t.cast(step.graph, v, wide) for v in values]


def _wide(step: Step, value: Value) -> Value:
    """An operand in a type that runtimes multiply, if the equation asks for another type than the operand's."""
    if isinstance(value, Coded) or (value.dtype.kind not in "iub" and value.dtype.itemsize >= 2):
        return value
    return step.graph.cast(value, step.dtype) if isinstance(value, Tensor) else _as(value, step.dtype)


def _as(value: Const, dtype: np.dtype) -> Const:
    return Const(value.array.astype(dtype), value.shape)


def _typed(step: Step, result: Tensor) -> Tensor:
    return result if result.dtype == step.dtype else step.graph.cast(result, step.dtype)


def matrix(graph: Graph, value: Value, side: Side, two: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    """An operand as (batch axes, first, second), where ``two`` are the axes that these are joined of."""
    order = (*side.batch, *two[0], *two[1])
    groups = [*[1] * len(side.batch), *map(len, two)]
    if isinstance(value, Coded):
        return dequantized(graph, HostCodes.of(value).laid(order, groups))
    shape = (*(value.shape[i] for i in side.batch), *(_size([value.shape[i] for i in axes]) for axes in two))
    if isinstance(value, Const) and is_static(shape):
        return graph.constant(np.transpose(value.full(), order).reshape(cast(tuple[int, ...], shape)))
    name = graph.plain(value, order=order)
    return name if groups[-2:] == [1, 1] else reshape(graph, name, shape)


def _floats(graph: Graph, name: str, value: Coded) -> str:
    """What a DequantizeLinear gives, in the weight's own type."""
    return name if value.dtype == np.float32 else graph.once("Cast", [name], to=value.dtype)


def _size(dims: Sequence[object]) -> Any:
    return math.prod(cast(Sequence[int], dims))


@rule("conv_general_dilated")
def _conv(step: Step) -> Value:
    """``Conv``, the image in NCHW and the kernel in OIHW; only what lies otherwise is transposed."""
    p = step.eqn.params
    numbers = p["dimension_numbers"]
    if p["batch_group_count"] != 1:
        step.refuse("it has batch groups, as the gradient of a convolution does", "export the forward function alone")
    x, kernel = step.graph.array(step.values[0]), step.values[1]
    rank = len(numbers.lhs_spec) - 2
    pads = [list(pair) for pair in p["padding"]]
    image = step.graph.plain(_wide(step, x), order=numbers.lhs_spec)
    if set(p["lhs_dilation"]) != {1}:
        image = _with_holes(step, image, p["lhs_dilation"])
    if min(map(min, pads)) < 0:
        image, pads = _cropped(step.graph, image, pads)
    weight = _kernel(step, kernel, numbers.rhs_spec)
    (name,) = step.graph.run(
        "Conv",
        [image, weight],
        strides=list(p["window_strides"]),
        dilations=list(p["rhs_dilation"]),
        pads=[low for low, _ in pads] + [high for _, high in pads],
        group=p["feature_group_count"],
        kernel_shape=[int(kernel.shape[i]) for i in numbers.rhs_spec[2:]],
    )
    assert rank == len(pads)
    return _typed(step, Tensor(name, step.shape, _wide(step, x).dtype, tuple(numbers.out_spec)))


def _kernel(step: Step, value: Value, order: Sequence[int]) -> str:
    if isinstance(value, Coded):
        held = HostCodes.of(value).laid(order, [1] * len(order))
        return _floats(step.graph, dequantized(step.graph, held, dtype=np.dtype(np.int8)), value)
    return step.graph.plain(_wide(step, value), order=order)


def _with_holes(step: Step, image: str, holes: Sequence[int]) -> str:
    """An image in NCHW with zeros between its pixels: each axis gets one of length ``holes`` behind it, padded."""
    graph, numbers = step.graph, step.eqn.params["dimension_numbers"]
    sizes: list[Any] = [step.values[0].shape[i] for i in numbers.lhs_spec]
    for axis, hole in enumerate(holes, 2):
        if hole == 1:
            continue
        name = graph.once("Unsqueeze", [image, graph.ints([axis + 1])])
        rank = len(sizes) + 1
        name = graph.once("Pad", [name, graph.ints([0] * (rank + axis + 1) + [hole - 1] + [0] * (rank - axis - 2))])
        sizes[axis] = sizes[axis] * hole
        name = reshape(graph, name, tuple(sizes))
        sizes[axis] = sizes[axis] - hole + 1
        ends = graph.shape((sizes[axis],))
        image = graph.once("Slice", [name, graph.ints([0]), ends, graph.ints([axis])])
    return image


def _cropped(graph: Graph, image: str, pads: list[list[int]]) -> tuple[str, list[list[int]]]:
    """Negative padding cuts the image."""
    axes = list(range(2, 2 + len(pads)))
    starts = [max(-low, 0) for low, _ in pads]
    ends = [high if high < 0 else np.iinfo(np.int64).max for _, high in pads]
    name = graph.once("Slice", [image, graph.ints(starts), graph.ints(ends), graph.ints(axes)])
    return name, [[max(low, 0), max(high, 0)] for low, high in pads]
