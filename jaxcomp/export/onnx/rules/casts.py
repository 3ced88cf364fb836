"""Casts, as JAX has them: floats to integers towards 0, clipped at the ends, NaN to 0."""

from __future__ import annotations

from typing import cast as as_type

import ml_dtypes
import numpy as np

from jaxcomp.core.types import DType
from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.registry import Step, rule
from jaxcomp.export.onnx.values import Const, Tensor, Value

FLOAT8 = frozenset(
    np.dtype(getattr(ml_dtypes, f"float8_{name}")) for name in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")
)
FLOATS = frozenset(map(np.dtype, ("float16", "float32", "float64"))) | {t.BFLOAT16}
INTEGERS = t.NUMBERS - FLOATS


@rule("convert_element_type")
def _convert(step: Step) -> Value:
    x, old, new = step.graph.array(step.values[0]), np.dtype(step.values[0].dtype), step.dtype
    if old == new:
        return x
    if {old, new} - FLOATS - INTEGERS - FLOAT8 - {t.BOOL}:
        step.refuse(f"a cast from {old} to {new} has no operator", "cast to float32 or int8 instead")
    if new in FLOAT8:
        return step.graph.elementwise("Cast", [_beyond(step.graph, x, new)], new, to=new, saturate=0)
    if old in FLOATS and new in INTEGERS:
        return _whole(step.graph, x, new)
    return t.cast(step.graph, x, new)


_E4M3FN, _E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)


def _beyond(graph: Graph, x: Value, new: DType) -> Value:
    """What a float8 has no number for, as JAX has it: onnxruntime 1.32 has NaN for infinity there, 448 for NaN."""
    if new not in (_E4M3FN, _E5M2):
        return x
    wide = t.F64 if np.dtype(x.dtype) == t.F64 else t.F32
    x = t.cast(graph, x, wide)
    size = graph.elementwise("Abs", [x], wide)
    if new == _E5M2:
        over = graph.elementwise("GreaterOrEqual", [size, t.number(61440, wide)], t.BOOL)
        return t.where(graph, over, graph.elementwise("Mul", [x, t.number(np.inf, wide)], wide), x)
    over = graph.elementwise("Greater", [size, t.number(464, wide)], t.BOOL)
    return t.where(graph, over, t.number(np.nan, wide), x)


def _whole(graph: Graph, x: Value, new: DType) -> Tensor:
    """A float as an integer; through float64 where float32 does not have the ends."""
    wide = t.F32 if new.itemsize <= 2 and np.dtype(x.dtype) != t.F64 else t.F64
    x = as_type(Tensor, t.cast(graph, x, wide))
    ends = np.iinfo(new)
    known = graph.elementwise("IsNaN", [x], t.BOOL)
    x = t.where(graph, known, t.number(0, wide), x)
    low, high = float(ends.min), float(ends.max)
    if new.itemsize < 8:
        clipped = graph.elementwise("Clip", [x, t.number(low, wide), t.number(high, wide)], wide)
        return _by_signed(graph, clipped, new)
    below = np.nextafter(high, 0.0)  # high itself is no integer of the type
    clipped = graph.elementwise("Clip", [x, t.number(low, wide), t.number(below, wide)], wide)
    over = graph.elementwise("Greater", [x, t.number(below, wide)], t.BOOL)
    most = Const.of(np.asarray(ends.max, new))
    if new == t.I64:
        return t.where(graph, over, most, graph.cast(clipped, new))
    return t.narrowed(
        graph, t.where(graph, over, t.cast(graph, most, t.I64), graph.cast(graph.cast(clipped, new), t.I64)), new
    )


def _by_signed(graph: Graph, x: Tensor, new: DType) -> Tensor:
    """Through int32 or int64, which every runtime casts floats to alike."""
    middle = t.I32 if new.itemsize < 4 or new == t.I32 else t.I64
    return t.narrowed(graph, graph.cast(x, middle), new)


@rule("reduce_precision")
def _reduce_precision(step: Step) -> Value:
    """There and back through the type of that many bits."""
    bits = step.eqn.params["exponent_bits"], step.eqn.params["mantissa_bits"]
    x = step.graph.array(step.values[0])
    types = {(8, 7): t.BFLOAT16, (5, 10): np.dtype(np.float16), (8, 23): t.F32, (11, 52): t.F64}
    through = types.get(as_type(tuple[int, int], bits))
    if through is None:
        step.refuse(f"no type has {bits[0]} bits of exponent and {bits[1]} of mantissa", "round to bfloat16 or float16")
    if through.itemsize >= step.dtype.itemsize:
        return x
    return t.cast(step.graph, t.cast(step.graph, x, through), step.dtype)


@rule("bitcast_convert_type")
def _bitcast(step: Step) -> Value:
    """Bits of integers: of one width, of several narrow ones in a wide one, the lowest first, and of a wide one in
    several."""
    graph, x, old, new = step.graph, step.graph.array(step.values[0]), np.dtype(step.values[0].dtype), step.dtype
    if old in (t.I32, np.dtype(np.uint32)) and new == t.F32:
        return _float_of_bits(graph, t.cast(graph, t.cast(graph, x, np.dtype(np.uint32)), t.I64))
    if old.kind not in "iu" or new.kind not in "iu":
        step.refuse(f"no operator reads the bits of {old} as {new}", "compute with the numbers instead")
    if old.itemsize == new.itemsize:
        return t.cast(graph, x, new)
    u64 = np.dtype(np.uint64)
    narrow, wide = sorted((old, new), key=lambda d: d.itemsize)
    unsigned = np.dtype(f"uint{old.itemsize * 8}")
    bits = t.cast(graph, t.cast(graph, x, unsigned), u64)
    steps = np.arange(wide.itemsize // narrow.itemsize, dtype=np.uint64) * np.uint64(narrow.itemsize * 8)
    if old.itemsize < new.itemsize:
        apart = graph.plain(bits)
        moved = graph.once("BitShift", [apart, graph.constant(steps)], direction="LEFT")
        summed = graph.once("ReduceSum", [graph.once("Cast", [moved], to=t.I64), graph.ints([-1])], keepdims=0)
        return t.narrowed(graph, graph.tensor(summed, step.shape, t.I64), new)
    one = graph.once("Unsqueeze", [graph.plain(bits), graph.ints([-1])])
    moved = graph.once("BitShift", [one, graph.constant(steps)], direction="RIGHT")
    return t.narrowed(graph, graph.tensor(moved, step.shape, u64), new)


def _float_of_bits(graph: Graph, bits: Value) -> Tensor:
    """The float32 of 32 bits: ``(2**23 + mantissa) 2**(exponent - 150)``, in float64, which has all of them."""

    def whole(op: str, x: Value, n: int) -> Tensor:
        return graph.elementwise(op, [x, t.number(n, t.I64)], t.I64)

    def equal(x: Value, n: int) -> Tensor:
        return graph.elementwise("Equal", [x, t.number(n, t.I64)], t.BOOL)

    mantissa, upper = whole("Mod", bits, 2**23), whole("Div", bits, 2**23)
    exponent, sign = whole("Mod", upper, 256), whole("Div", upper, 256)
    subnormal = equal(exponent, 0)
    digits = t.where(graph, subnormal, mantissa, whole("Add", mantissa, 2**23))
    power = t.where(graph, subnormal, t.number(-149, t.I64), whole("Sub", exponent, 150))
    power = graph.elementwise("Pow", [t.number(2, t.F64), graph.cast(power, t.F64)], t.F64)
    size = graph.elementwise("Mul", [graph.cast(digits, t.F64), power], t.F64)
    beyond = t.where(graph, equal(mantissa, 0), t.number(np.inf, t.F64), t.number(np.nan, t.F64))
    size = t.where(graph, equal(exponent, 255), beyond, size)
    signed = t.where(graph, equal(sign, 1), graph.elementwise("Neg", [size], t.F64), size)
    return graph.cast(signed, t.F32)
