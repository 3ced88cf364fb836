"""Division, remainders and bits: where integers do otherwise than ONNX, or processors trap."""

from __future__ import annotations

from typing import cast as as_type

import numpy as np

from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.values import Const, Tensor, Value

BITS = {
    "and": ("And", "BitwiseAnd"),
    "or": ("Or", "BitwiseOr"),
    "xor": ("Xor", "BitwiseXor"),
    "not": ("Not", "BitwiseNot"),
}


@rule(*BITS)
def _bits(step: Step) -> Tensor:
    return step.elementwise(BITS[step.name][step.dtype != np.bool_])


def _without(graph: Graph, y: Value, bad: int, instead: int) -> Value:
    """Divisors without a number that processors trap on."""
    if isinstance(y, Const) and not (y.array == bad).any():
        return y
    number = t.number(bad, np.dtype(y.dtype))
    return t.where(graph, t.compared(graph, "Equal", [y, number]), t.number(instead, np.dtype(y.dtype)), y)


def quotient(graph: Graph, x: Value, y: Value) -> Tensor:
    """Of integers, towards 0; -1 (every bit) by 0, as JAX has it."""
    dtype = np.dtype(x.dtype)
    wide = dtype if dtype.kind == "u" else t.I64  # the lowest number by -1
    safe = _without(graph, y, 0, 1)
    if dtype == t.I64:
        safe = _without(graph, safe, -1, 1)
    result = graph.elementwise("Div", [t.cast(graph, x, wide), t.cast(graph, safe, wide)], wide)
    result = t.narrowed(graph, result, dtype)
    if dtype == t.I64 and not (isinstance(y, Const) and not (y.array == -1).any()):
        minus = t.compared(graph, "Equal", [y, t.number(-1, dtype)])
        result = t.where(graph, minus, t.typed(graph, "Neg", [x], dtype), result)
    if isinstance(y, Const) and not (y.array == 0).any():
        return result
    every = Const.of(np.asarray(-1, np.int64).astype(dtype))
    return t.where(graph, t.compared(graph, "Equal", [y, t.number(0, dtype)]), every, result)


@rule("div")
def _div(step: Step) -> Tensor:
    if step.dtype.kind in "iu":
        return quotient(step.graph, *map(step.graph.array, step.values))
    return t.typed(step.graph, "Div", step.values, step.dtype)


@rule("rem")
def _rem(step: Step) -> Tensor:
    """What the quotient towards 0 leaves: it has the sign of the first."""
    if step.dtype.kind not in "iu":
        return t.typed(step.graph, "Mod", step.values, step.dtype, fmod=1)
    graph, (x, y) = step.graph, map(step.graph.array, step.values)
    whole = t.typed(graph, "Mul", [quotient(graph, x, y), y], step.dtype)
    return t.typed(graph, "Sub", [x, whole], step.dtype)


@rule("shift_left", "shift_right_logical")
def _shift(step: Step) -> Tensor:
    """On the bits as an unsigned number; by the width or more gives 0."""
    graph, (x, by) = step.graph, map(step.graph.array, step.values)
    width = step.dtype.itemsize * 8
    bits = np.dtype(f"uint{max(width, 32)}")
    unsigned = np.dtype(f"uint{width}")
    x, by = (t.cast(graph, t.cast(graph, v, unsigned), bits) for v in (x, by))
    way = "LEFT" if step.name == "shift_left" else "RIGHT"
    moved: Value = graph.elementwise("BitShift", [x, by], bits, direction=way)
    if not (isinstance(by, Const) and (by.array < width).all()):
        fits = t.compared(graph, "Less", [by, t.number(width, bits)])
        moved = t.where(graph, fits, t.cast(graph, moved, t.I64), t.number(0, t.I64))
    return t.narrowed(graph, as_type(Tensor, t.cast(graph, moved, unsigned)), step.dtype)


@rule("shift_right_arithmetic")
def _shift_signed(step: Step) -> Tensor:
    """A quotient by a power of 2 towards minus infinity; by the width or more leaves the sign alone."""
    graph, (x, by) = step.graph, map(step.graph.array, step.values)
    width = step.dtype.itemsize * 8
    wide = t.cast(graph, t.cast(graph, x, np.dtype(f"int{width}")), t.I64)
    outside = t.number(width - 1, t.I64)
    steps = t.cast(graph, t.cast(graph, by, np.dtype(f"uint{width}")), t.I64)
    steps = t.typed(graph, "Min", [steps, outside], t.I64)
    one = t.number(1, np.uint64)
    power = graph.elementwise("BitShift", [one, t.cast(graph, steps, np.uint64)], np.dtype(np.uint64), direction="LEFT")
    divisor = t.cast(graph, power, t.I64)
    rest = t.typed(graph, "Mod", [wide, divisor], t.I64)
    quotient_of = t.typed(graph, "Div", [t.typed(graph, "Sub", [wide, rest], t.I64), divisor], t.I64)
    return t.narrowed(graph, quotient_of, step.dtype)
