"""Operators in types that runtimes have kernels for: narrower ones are computed wider, and wrap or round afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from jaxcomp.core.types import DType
from jaxcomp.export.onnx.graph import Attribute, Graph
from jaxcomp.export.onnx.values import Const, Tensor, Value

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
F32, F64, I32, I64, BOOL, U8 = map(np.dtype, ("float32", "float64", "int32", "int64", "bool", "uint8"))


def _types(names: str) -> frozenset[DType]:
    return frozenset(map(np.dtype, names.split()))


NUMBERS = _types("float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64")
_MOST = _types("float16 float32 float64 int8 int32 int64 uint8 uint32 uint64")
_SUMS = _types("float16 float32 float64 int32 int64")
_EXTREMES = _types("float16 float32 float64 int8 int32 int64 uint8 bool")
_SINGLE = _types("float16 float32")
_FLOATS = _types("float16 float32 float64")
_EVERY = NUMBERS | {BFLOAT16, BOOL}
KERNELS: dict[str, frozenset[DType]] = {
    **dict.fromkeys(("Max", "Min", "Clip"), _MOST),
    **dict.fromkeys(("ReduceProd", "ReduceMean", "CumSum", "Pow"), _SUMS),
    "ReduceSum": _SUMS - {I32},  # it saturates
    **dict.fromkeys(("ReduceMax", "ReduceMin"), _EXTREMES),
    **dict.fromkeys(("ArgMax", "ArgMin"), _EXTREMES - {BOOL}),
    **dict.fromkeys(("Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "Erf", "Gelu"), _SINGLE),
    **dict.fromkeys(("Softmax", "LayerNormalization"), _FLOATS),
    "Where": _types("float16 float32 float64 int8 int32 int64 uint8 uint32"),
    "Neg": NUMBERS - _types("uint8 uint16 uint32 uint64"),
    "TopK": NUMBERS - _types("uint16 uint32 uint64"),
    "MatMul": _types("float16 float32 float64 int32 int64 uint32 uint64"),
    "Equal": NUMBERS | {BOOL},
    "Pad": _MOST | {BOOL},
    "Expand": NUMBERS | {BOOL},
    **dict.fromkeys(("Gather", "GatherElements", "GatherND", "ScatterND", "Slice", "Concat", "Reshape"), _EVERY),
}
"""Types in which onnxruntime 1.32 has an operator on a CPU, as tried; of those not named here ``NUMBERS``."""
WIDER = {
    BFLOAT16: (F32,),
    np.dtype(np.float16): (F32,),
    BOOL: (U8, I32),
    np.dtype(np.int8): (I32,),
    np.dtype(np.uint8): (I32,),
    np.dtype(np.int16): (I32,),
    np.dtype(np.uint16): (I32, I64),
    np.dtype(np.uint32): (I64,),
    np.dtype(np.uint64): (I64,),
    I32: (I64,),
}
"""Types that hold every number of a type, or the same bits modulo its width."""


def kernel_type(op: str, dtype: DType) -> DType | None:
    """The type in which an operator is run for one; None where no kernel is as wide."""
    dtype, known = np.dtype(dtype), KERNELS.get(op, NUMBERS)
    return next((t for t in (dtype, *WIDER.get(dtype, ())) if t in known), None)


def typed(graph: Graph, op: str, values: Sequence[Value], dtype: DType, **attributes: Attribute) -> Tensor:
    """An operator that broadcasts, its operands and result of one type; each runs in a type with a kernel."""
    wide = kernel_type(op, dtype) or np.dtype(dtype)
    result = graph.elementwise(op, [cast(graph, v, wide) for v in values], wide, **attributes)
    return narrowed(graph, result, dtype)


def compared(graph: Graph, op: str, values: Sequence[Value]) -> Tensor:
    """An operator of two of a type that gives truth."""
    wide = kernel_type(op, np.dtype(values[0].dtype)) or np.dtype(values[0].dtype)
    return graph.elementwise(op, [cast(graph, v, wide) for v in values], BOOL)


def where(graph: Graph, which: Value, yes: Value, no: Value) -> Tensor:
    """``yes`` where ``which`` holds, else ``no``."""
    dtype = np.dtype(yes.dtype)
    wide = kernel_type("Where", dtype) or dtype
    result = graph.elementwise("Where", [which, cast(graph, yes, wide), cast(graph, no, wide)], wide)
    return narrowed(graph, result, dtype)


def cast(graph: Graph, value: Value, dtype: DType) -> Const | Tensor:
    """A value in a type as wide, or of as many bits."""
    value, dtype = graph.array(value), np.dtype(dtype)
    if value.dtype == dtype:
        return value
    return Const(value.array.astype(dtype), value.shape) if isinstance(value, Const) else graph.cast(value, dtype)


def narrowed(graph: Graph, value: Tensor, dtype: DType) -> Tensor:
    """A result in the type that was asked for, of its lowest bits."""
    return value if value.dtype == np.dtype(dtype) else graph.cast(value, dtype)


def number(value: float, dtype: DType) -> Const:
    """A scalar."""
    return Const.of(np.asarray(value, dtype))
