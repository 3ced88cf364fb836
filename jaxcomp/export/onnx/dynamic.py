"""Dots of activations whose scales are found when the graph runs: one for each token, or of a narrower grid.

The codes are those of ``quantize_function``: its own encoding is written into the graph. Then
``Σ (a - za) sa (b - zb) sb == sa sb (Σ a b - za Σ b - zb Σ a + n za zb)``, all sums in int32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np

from jaxcomp.activations.fake import Entry, encode
from jaxcomp.activations.specs import Act
from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.registry import Step
from jaxcomp.export.onnx.rules.contractions import Side, matrix, sides_of
from jaxcomp.export.onnx.rules.layout import reshape
from jaxcomp.export.onnx.values import Coded, Tensor, Value, is_static
from jaxcomp.export.onnx.weights import HostCodes


class Operand(NamedTuple):
    """An operand as a matrix of codes.

    Attributes:
      codes: the name of 8-bit codes, (batch, rows, summed) of the left and (batch, summed, columns) of the right.
      zero: the name of the zero point that MatMulInteger takes off itself.
      own: the name of int32 zero points of each row or column, laid as the scale, or None.
      scale: the name of scales in the result's axes.
    """

    codes: str
    zero: str
    own: str | None
    scale: str


def dynamic_dot(step: Step, act: Act, roles: tuple[tuple[str, ...], ...]) -> Value | None:
    """The dot on codes; None where a weight has a scale along what is summed over, or none at all."""
    operands = []
    for i, side in enumerate(sides_of(step)):
        value = step.values[i]
        value = value if isinstance(value, Coded) else step.graph.array(value)
        if isinstance(value, Coded):
            made = _weight(step, HostCodes.of(value), side, i)
        else:
            made = _activation(step, value, side, (act, roles[i], i)) if isinstance(value, Tensor) else None
        if made is None:
            return None
        operands.append(made)
    return _product(step, operands[0], operands[1])


def encoded(step: Step, value: Tensor, act: Act, roles: tuple[str, ...]) -> list[Value]:
    """Numbers, scale and zero point of an activation, as the quantized function has them."""
    like = jax.ShapeDtypeStruct(value.shape, value.dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        jaxpr = jax.make_jaxpr(lambda x: [v for v in encode(x, act, Entry(roles)) if v is not None])(like)
    return step.run(step.graph, jaxpr, [value], (*step.at, "encode"), step.layers)


def _activation(step: Step, value: Tensor, side: Side, how: tuple[Act, tuple[str, ...], int]) -> Operand:
    graph, (act, roles, right) = step.graph, how
    numbers, scale, *zeros = encoded(step, value, act, roles)
    laid = _ordered(side, right)
    each = any(side.free) or any(side.batch)
    shared = all(is_static([n]) and n == 1 for n in scale.shape)
    kind = t.U8
    if not zeros and right:
        codes, zero, own, kind = numbers, graph.constant(0, np.int8), None, np.dtype(np.int8)
    elif not zeros:
        codes, zero, own = _plus(graph, numbers, t.number(128, t.F32)), graph.constant(128, t.U8), None
    else:
        codes = graph.elementwise("Add", [numbers, zeros[0]], t.F32)
        zero, own = graph.constant(0, t.U8), None
        if shared:
            zero = graph.once("Cast", [graph.once("Reshape", [graph.plain(zeros[0]), graph.ints([])])], to=t.U8)
        else:
            own = _in_result(step, graph.elementwise("Cast", [zeros[0]], t.I32, to=t.I32), side, right)
    assert each or shared or own is None
    name = matrix(graph, graph.elementwise("Cast", [codes], kind, to=kind), side, laid)
    return Operand(name, zero, own, _in_result(step, scale, side, right))


def _plus(graph: Graph, value: Value, number: Value) -> Tensor:
    return graph.elementwise("Add", [value, number], t.F32)


def _ordered(side: Side, right: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (side.summed, side.free) if right else (side.free, side.summed)


def _in_result(step: Step, value: Value, side: Side, right: int) -> str:
    """What an operand has for each row or column, as (batch, rows, 1) or (batch, 1, columns)."""
    graph, order = step.graph, (*side.batch, *side.free, *side.summed)
    name = graph.compact(value, order=order)
    shape = [value.shape[i] for i in order]
    lead, rows = shape[: len(side.batch)], shape[len(side.batch) : len(order) - len(side.summed)]
    count = math.prod(rows)
    return reshape(graph, name, (*lead, *((1, count) if right else (count, 1))))


def _weight(step: Step, held: HostCodes, side: Side, right: int) -> Operand | None:
    """A weight in codes of one scale for each row or column at most."""
    first, second = _ordered(side, right)
    laid = held.laid((*side.batch, *first, *second), [*[1] * len(side.batch), len(first), len(second)])
    summed = laid.codes.ndim - 2 if right else laid.codes.ndim - 1
    if laid.scale.shape[summed] != 1 or laid.codes.dtype.kind not in "iu":
        return None
    graph = step.graph
    zero = np.zeros(laid.scale.shape, np.int32) if laid.zero is None else laid.zero.astype(np.int32)
    kind = np.dtype(np.int8) if right else t.U8
    shift = 0 if right else 128
    own = graph.constant(zero, t.I32) if zero.any() else None
    codes = (laid.codes.astype(np.int32) + shift).astype(kind)
    scale = np.asarray(laid.scale, np.float32)
    return Operand(graph.constant(codes), graph.constant(shift, kind), own, graph.constant(scale))


def _product(step: Step, a: Operand, b: Operand) -> Tensor:
    graph = step.graph
    sums = _whole(graph, a, b)
    if a.own is not None or b.own is not None:
        sums = _corrected(step, sums, a, b)
    floats = graph.once("Cast", [sums], to=t.F32)
    name = graph.once("Mul", [floats, graph.once("Mul", [a.scale, b.scale])])
    name = reshape(graph, name, step.shape)
    result = graph.tensor(name, step.shape, t.F32)
    return t.narrowed(graph, result, step.dtype)


def _whole(graph: Graph, a: Operand, b: Operand) -> str:
    return graph.once("MatMulInteger", [a.codes, b.codes, a.zero, b.zero])


def _corrected(step: Step, sums: str, a: Operand, b: Operand) -> str:
    """The sums without what zero points of rows and columns add to them."""
    graph, (left, right) = step.graph, sides_of(step)
    n = math.prod(step.of(0).shape[i] for i in left.summed)
    assert len(left.summed) == len(right.summed)
    ones = Operand(graph.constant(np.ones((1, n), np.uint8)), graph.constant(0, t.U8), None, "")
    if a.own is not None:
        columns = _whole(graph, ones, b)
        sums = graph.once("Sub", [sums, graph.once("Mul", [a.own, columns])])
    if b.own is not None:
        upright = ones._replace(codes=graph.constant(np.ones((n, 1), np.int8)), zero=graph.constant(0, np.int8))
        rows = _whole(graph, a, upright)
        sums = graph.once("Sub", [sums, graph.once("Mul", [rows, b.own])])
    if a.own is not None and b.own is not None:
        both = graph.once("Mul", [a.own, b.own])
        sums = graph.once("Add", [sums, graph.once("Mul", [both, graph.constant(n, t.I32)])])
    return sums
