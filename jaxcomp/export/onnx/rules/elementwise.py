"""Operators whose result at an index depends on the operands at that index."""

from __future__ import annotations

import math
from typing import cast as as_type

import numpy as np
from jax import lax

from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.values import Const, Tensor, Value

PLAIN = {
    "abs": "Abs", "acos": "Acos", "acosh": "Acosh", "add": "Add", "add_any": "Add", "asin": "Asin", "asinh": "Asinh",
    "atan": "Atan", "atanh": "Atanh", "ceil": "Ceil", "cos": "Cos", "cosh": "Cosh", "erf": "Erf", "exp": "Exp",
    "floor": "Floor", "log": "Log", "logistic": "Sigmoid", "mul": "Mul", "sign": "Sign", "sin": "Sin", "sinh": "Sinh",
    "sqrt": "Sqrt", "sub": "Sub", "tan": "Tan", "tanh": "Tanh",
}  # fmt: skip
"""Primitives that are one operator."""
COMPARED = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}


@rule(*PLAIN)
def _plain(step: Step) -> Tensor:
    op, dtype = PLAIN[step.name], step.dtype
    if t.kernel_type(op, dtype) is None:
        step.refuse(f"no runtime has {op} in {dtype}", "compute it in float32")
    return t.typed(step.graph, op, step.values, dtype)


@rule(*COMPARED)
def _compared(step: Step) -> Tensor:
    return t.compared(step.graph, COMPARED[step.name], step.values)


@rule("eq_to", "le_to", "lt_to")
def _total(step: Step) -> Tensor:
    """The order of sorts: NaN is equal to itself, and behind all."""
    graph, (x, y) = step.graph, step.values
    found = t.compared(graph, COMPARED[step.name.removesuffix("_to")], [x, y])
    if np.dtype(x.dtype).kind != "f":
        return found
    lost = [graph.elementwise("IsNaN", [v], t.BOOL) for v in (x, y)]
    first = {"le_to": [], "eq_to": lost[:1], "lt_to": [graph.elementwise("Not", lost[:1], t.BOOL)]}[step.name]
    behind = step.elementwise("And", *first, lost[1]) if first else lost[1]
    return step.elementwise("Or", found, behind)


@rule("ne")
def _ne(step: Step) -> Tensor:
    """NaN is not equal to itself."""
    return step.elementwise("Not", t.compared(step.graph, "Equal", step.values))


@rule("max", "min")
def _extreme(step: Step) -> Tensor:
    """A maximum with 0 is a Relu, which runtimes fuse; all keep NaN."""
    if step.dtype == np.bool_:
        return step.elementwise("Or" if step.name == "max" else "And")
    for zero, other in (step.values, step.values[::-1]):
        if step.name == "max" and is_zero(zero) and isinstance(other, Tensor) and step.dtype.kind == "f":
            return step.elementwise("Relu", other)
    return t.typed(step.graph, "Max" if step.name == "max" else "Min", step.values, step.dtype)


def is_zero(value: Value) -> bool:
    """Whether a value is the constant 0."""
    return isinstance(value, Const) and not value.array.any()


@rule("clamp")
def _clamp(step: Step) -> Tensor:
    low, x, high = map(step.graph.array, step.values)
    if isinstance(low, Const) and isinstance(high, Const) and not low.shape and not high.shape:
        return t.typed(step.graph, "Clip", [x, low, high], step.dtype)
    raised = t.typed(step.graph, "Max", [x, low], step.dtype)
    return t.typed(step.graph, "Min", [raised, high], step.dtype)


@rule("select_n")
def _select(step: Step) -> Value:
    which, *cases = map(step.graph.array, step.values)
    if which.dtype == np.bool_:
        return t.where(step.graph, which, cases[1], cases[0]) if len(cases) == 2 else cases[0]
    result: Value = cases[-1]
    for i, case in reversed(list(enumerate(cases[:-1]))):
        below = t.compared(step.graph, "LessOrEqual", [which, t.number(i, which.dtype)])
        result = t.where(step.graph, below, case, result)
    return result


@rule("neg")
def _neg(step: Step) -> Tensor:
    if step.dtype.kind == "u":
        return t.typed(step.graph, "Sub", [t.number(0, step.dtype), *step.values], step.dtype)
    return t.typed(step.graph, "Neg", step.values, step.dtype)


@rule("square")
def _square(step: Step) -> Tensor:
    return t.typed(step.graph, "Mul", [step.values[0], step.values[0]], step.dtype)


@rule("rsqrt")
def _rsqrt(step: Step) -> Tensor:
    root = t.typed(step.graph, "Sqrt", step.values, step.dtype)
    return t.typed(step.graph, "Reciprocal", [root], step.dtype)


@rule("integer_pow")
def _integer_pow(step: Step) -> Value:
    """The chain of squares that JAX multiplies too."""
    y = as_type(int, step.eqn.params["y"])
    rest, square = abs(y), step.graph.array(step.values[0])
    result: Value | None = None
    while rest:
        if rest & 1:
            result = square if result is None else t.typed(step.graph, "Mul", [result, square], step.dtype)
        rest >>= 1
        if rest:
            square = t.typed(step.graph, "Mul", [square, square], step.dtype)
    if result is None:
        return Const(np.ones([1] * len(step.shape), step.dtype), step.shape)
    return t.typed(step.graph, "Div", [t.number(1, step.dtype), result], step.dtype) if y < 0 else result


@rule("pow")
def _pow(step: Step) -> Tensor:
    x, y = step.values
    return t.typed(step.graph, "Pow", [x, t.cast(step.graph, y, step.dtype)], step.dtype)


@rule("exp2")
def _exp2(step: Step) -> Tensor:
    return t.typed(step.graph, "Pow", [t.number(2, step.dtype), *step.values], step.dtype)


@rule("erfc")
def _erfc(step: Step) -> Tensor:
    """``1 - erf(x)``: right to 1e-7 of 1, not of the result where that is small."""
    found = t.typed(step.graph, "Erf", step.values, step.dtype)
    return t.typed(step.graph, "Sub", [t.number(1, step.dtype), found], step.dtype)


@rule("expm1")
def _expm1(step: Step) -> Tensor:
    """Exact near 0: ``(u - 1) x / log(u)`` with ``u = exp(x)``, where u is neither 1, 0 nor infinite (Kahan)."""
    one, x = t.number(1, step.dtype), step.values[0]
    op = _Ops(step)
    u = op("Exp", x)
    less = op("Sub", u, one)
    near = op("Mul", less, op("Div", x, op("Log", u)))
    usual = step.graph.elementwise("Less", [op("Abs", x), t.number(0.5, step.dtype)], t.BOOL)
    result = t.where(step.graph, usual, near, less)
    return t.where(step.graph, t.compared(step.graph, "Equal", [u, one]), x, result)


@rule("log1p")
def _log1p(step: Step) -> Tensor:
    """Exact near 0: ``log(u) x / (u - 1)`` with ``u = 1 + x``, where u is not 1 (Kahan)."""
    one, x = t.number(1, step.dtype), step.values[0]
    op = _Ops(step)
    u = op("Add", x, one)
    log = op("Log", u)
    near = op("Mul", log, op("Div", x, op("Sub", u, one)))
    usual = step.graph.elementwise("Less", [op("Abs", x), t.number(0.5, step.dtype)], t.BOOL)
    result = t.where(step.graph, usual, near, log)
    return t.where(step.graph, t.compared(step.graph, "Equal", [u, one]), x, result)


class _Ops:
    """Operators in the type of a step's result."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def __call__(self, op: str, *values: Value) -> Tensor:
        return t.typed(self.step.graph, op, values, self.step.dtype)


@rule("cbrt")
def _cbrt(step: Step) -> Tensor:
    op = _Ops(step)
    x = step.values[0]
    return op("Mul", op("Sign", x), op("Pow", op("Abs", x), t.number(1 / 3, step.dtype)))


@rule("atan2")
def _atan2(step: Step) -> Tensor:
    """By the arc tangent of the quotient, half a turn added where x is negative; of finite numbers."""
    op, (y, x) = _Ops(step), step.values
    zero, half = t.number(0, step.dtype), t.number(math.pi / 2, step.dtype)
    below = t.compared(step.graph, "Less", [y, zero])
    turn = t.where(step.graph, below, t.number(-math.pi, step.dtype), t.number(math.pi, step.dtype))
    angle = op("Atan", op("Div", y, x))
    angle = t.where(step.graph, t.compared(step.graph, "Less", [x, zero]), op("Add", angle, turn), angle)
    return t.where(step.graph, t.compared(step.graph, "Equal", [x, zero]), op("Mul", op("Sign", y), half), angle)


@rule("round")
def _round(step: Step) -> Tensor:
    """Halves to even as ONNX has them, or away from zero."""
    if step.eqn.params["rounding_method"] == lax.RoundingMethod.TO_NEAREST_EVEN:
        return t.typed(step.graph, "Round", step.values, step.dtype)
    op, x = _Ops(step), step.values[0]
    size = op("Abs", x)
    whole = op("Floor", size)
    up = t.compared(step.graph, "GreaterOrEqual", [op("Sub", size, whole), t.number(0.5, step.dtype)])
    return op("Mul", op("Sign", x), op("Add", whole, t.cast(step.graph, up, step.dtype)))


@rule("is_finite")
def _is_finite(step: Step) -> Tensor:
    x = t.cast(step.graph, step.values[0], t.kernel_type("Abs", np.dtype(step.values[0].dtype)) or t.F32)
    lost = [step.graph.elementwise(op, [x], t.BOOL) for op in ("IsNaN", "IsInf")]
    return step.elementwise("Not", step.elementwise("Or", *lost))
