"""Operators whose result at an index depends on the operands at that index."""

from __future__ import annotations

import numpy as np

from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.values import Const, Tensor, Value

PLAIN = {
    "abs": "Abs",
    "acos": "Acos",
    "acosh": "Acosh",
    "add": "Add",
    "add_any": "Add",
    "asin": "Asin",
    "asinh": "Asinh",
    "atan": "Atan",
    "atanh": "Atanh",
    "ceil": "Ceil",
    "cos": "Cos",
    "cosh": "Cosh",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "log": "Log",
    "logistic": "Sigmoid",
    "mul": "Mul",
    "neg": "Neg",
    "sign": "Sign",
    "sin": "Sin",
    "sinh": "Sinh",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tan": "Tan",
    "tanh": "Tanh",
}
"""Primitives that are one operator."""


def _plain(step: Step) -> Tensor:
    return step.elementwise(PLAIN[step.name])


rule(*PLAIN)(_plain)


@rule("max")
def _max(step: Step) -> Tensor:
    """A maximum with 0 is a Relu, which runtimes fuse; both keep NaN."""
    for zero, other in (step.values, step.values[::-1]):
        if is_zero(zero) and isinstance(other, Tensor) and np.issubdtype(step.dtype, np.floating):
            return step.elementwise("Relu", other)
    return step.elementwise("Max")


@rule("min")
def _min(step: Step) -> Tensor:
    return step.elementwise("Min")


@rule("div")
def _div(step: Step) -> Tensor:
    return step.elementwise("Div")


@rule("rsqrt")
def _rsqrt(step: Step) -> Tensor:
    root = step.elementwise("Sqrt")
    return step.elementwise("Reciprocal", root)


@rule("convert_element_type")
def _convert(step: Step) -> Tensor:
    return step.graph.cast(step.values[0], step.dtype)


def is_zero(value: Value) -> bool:
    """Whether a value is the constant 0."""
    return isinstance(value, Const) and not value.array.any()
