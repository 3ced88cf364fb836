"""Dots: operands laid as the operator wants them, weights in codes behind a DequantizeLinear."""

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
    """``MatMul`` of (batch, rows, summed) by (batch, summed, columns), or of any rank by a matrix.

    A weight stands on the right, where runtimes have their products of codes, also where the function has it on the
    left (``w @ x`` under ``vmap``, all of Equinox): the result then lies with its axes turned.
    """
    values = [v if isinstance(v, Coded) else step.graph.array(v) for v in step.values]
    operands = list(zip(_alike(step, values), sides_of(step), strict=True))
    turned = isinstance(values[0], Coded | Const) and not isinstance(values[1], Coded | Const)
    (a, left_side), (b, right_side) = reversed(operands) if turned else operands
    shape = tuple(a.shape[i] for i in left_side.batch)
    rows, columns = (tuple(v.shape[i] for i in side.free) for v, side in ((a, left_side), (b, right_side)))
    if not left_side.batch and len(left_side.summed) == 1 and len(rows) > 0:
        left = step.graph.plain(a, order=(*left_side.free, *left_side.summed))
        made: Dims = (*rows, _size(columns))
    else:
        left = matrix(step.graph, a, left_side, (left_side.free, left_side.summed))
        made = (*shape, _size(rows), _size(columns))
    right = matrix(step.graph, b, right_side, (right_side.summed, right_side.free))
    whole = a.dtype in BYTES and b.dtype in BYTES
    name = (
        _whole_product(step.graph, left, a.dtype, right, b.dtype)
        if whole
        else step.graph.run("MatMul", [left, right])[0]
    )
    held = (*shape, *rows, *columns)
    if made != held:
        name = reshape(step.graph, name, held)
    own = [range(len(shape) + len(columns), len(held)), range(len(shape), len(shape) + len(columns))]
    order = (*range(len(shape)), *own[0], *own[1]) if turned else tuple(range(len(held)))
    made_of = t.F32 if isinstance(a, Coded) else a.dtype
    return _typed(step, Tensor(name, step.shape, t.I32 if whole else made_of, order))


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


def _size(dims: Sequence[object]) -> Any:
    return math.prod(cast(Sequence[int], dims))
