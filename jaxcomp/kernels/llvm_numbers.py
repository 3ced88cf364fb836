"""Numbers in vectors, in LLVM code: codes cut out of bytes, minifloats by their bits, the exponential function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp

from jaxcomp.kernels.llvm_code import intrinsic
from jaxcomp.kernels.runs import Run
from jaxcomp.quantization.numerics.levels import Minifloat
from jaxcomp.quantization.numerics.rounding import WHOLE, hair

if TYPE_CHECKING:
    from llvmlite import ir


def constant(kind: ir.Type, value: float) -> ir.Value:
    """A number in all places of a vector of this kind."""
    from llvmlite import ir

    return ir.Constant(kind, [value] * kind.count)


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """``x * y + z`` of floats or vectors of them: one operation where the processor has it, else two."""
    kind = f"v{x.type.count}f32" if hasattr(x.type, "count") else "f32"
    return intrinsic(b, f"llvm.fmuladd.{kind}", x.type, x, y, z)


def dot(b: ir.IRBuilder, total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """Sums in 32 bits, each and the products of four bytes from 0 on and four about 0, all vectors of int32."""
    return intrinsic(b, f"llvm.x86.avx512.vpdpbusd.{32 * total.type.count}", total.type, total, x, y)


def code_of(b: ir.IRBuilder, run: Run, bits: int, load: Callable[[int], ir.Value]) -> ir.Value:
    """The codes of a run, from 0 on; ``load(offset)`` gives the vector of bytes from there on."""
    code = None
    for part in run.parts:
        field = load(part.offset)
        if bits < 8:
            shift, mask, place = (constant(field.type, n) for n in (part.shift, 2**part.width - 1, part.place))
            field = b.shl(b.and_(b.lshr(field, shift), mask), place)
        code = field if code is None else b.or_(code, field)
    return code


def on_grid(
    b: ir.IRBuilder, x: ir.Value, factors: Sequence[ir.Value], ends: tuple[ir.Value, ir.Value], whole: ir.Value
) -> ir.Value:
    """The codes of floats, in bytes: times the factors, between two ends, rounded, and more by what ``whole`` says.

    All are vectors; NaN gives any code.
    """
    from llvmlite import ir

    n = x.type.count
    for factor in factors:
        x = b.fmul(x, factor)
    for sign, end in zip((">", "<"), ends, strict=True):
        x = b.select(b.fcmp_ordered(sign, end, x), end, x)
    x = b.fmul(x, constant(x.type, hair(jnp.dtype(jnp.float32))))
    x = intrinsic(b, f"llvm.roundeven.v{n}f32", x.type, x)
    bits = b.bitcast(b.fadd(x, whole), ir.VectorType(ir.IntType(32), n))
    return b.trunc(bits, ir.VectorType(ir.IntType(8), n))


def minifloats(b: ir.IRBuilder, code: ir.Value, kind: Minifloat, floats: ir.Type) -> ir.Value:
    """What bit patterns, int32, stand for; those without a leading one are integers times a power of two."""
    bits, mantissa, bias = kind
    ints = code.type
    size = b.and_(code, constant(ints, 2 ** (bits - 1) - 1))
    normal = b.add(b.shl(size, constant(ints, 23 - mantissa)), constant(ints, (127 - bias) << 23))
    small = b.fmul(b.sitofp(size, floats), constant(floats, 2.0 ** (1 - bias - mantissa)))
    value = b.select(b.icmp_signed("<", size, constant(ints, 2**mantissa)), b.bitcast(small, ints), normal)
    sign = b.shl(b.lshr(code, constant(ints, bits - 1)), constant(ints, 31))
    return b.bitcast(b.or_(value, sign), floats)


_LN2 = (0.693359375, -2.12194440e-4)
"""The logarithm of 2 in two parts, the first exact times small integers."""
_TAYLOR = tuple(1 / math.factorial(n) for n in range(7, -1, -1))
"""Of the exponential function, for numbers up to half that logarithm."""


def exponential(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x of float32 up to 0, to 2 units in the last place; 0 below -87, NaN of NaN."""
    from llvmlite import ir

    floats, ints = x.type, ir.VectorType(ir.IntType(32), x.type.count)
    least, whole = constant(floats, -87.0), constant(floats, WHOLE)
    low = b.fcmp_ordered("<", x, least)
    x = b.select(low, least, x)
    shifted = b.fadd(b.fmul(x, constant(floats, math.log2(math.e))), whole)
    n, rest = b.fsub(shifted, whole), x
    for part in _LN2:
        rest = fma(b, n, constant(floats, -part), rest)
    y = constant(floats, _TAYLOR[0])
    for term in _TAYLOR[1:]:
        y = fma(b, y, rest, constant(floats, term))
    power = b.add(b.shl(b.bitcast(shifted, ints), constant(ints, 23)), constant(ints, 127 << 23))
    return b.select(low, floats(None), b.fmul(y, b.bitcast(power, floats)))
