"""Functions of one number in LLVM code, for vectors of float32: the operations of a program, and what these need.

Elementary functions are within a few units in the last place of float32, but for the tails of two: ``erfc`` is within
some units of 1, so what GELU gives of numbers far below 0 is 0, and the logistic function within 1e-5 of its own there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING, NamedTuple

from jaxcomp.kernels.llvm_calls import digest
from jaxcomp.kernels.llvm_code import Types, intrinsic
from jaxcomp.kernels.llvm_numbers import constant, exponential, fma
from jaxcomp.quantization.numerics.rounding import WHOLE
from jaxcomp.trace.pointwise import Pointwise, Step

if TYPE_CHECKING:
    from llvmlite import ir


WIDE = 16
"""Numbers of a vector that only processors with AVX-512 have, which divide no faster than half as many at a time."""


def name_of(function: Pointwise) -> str:
    """What code that holds a function is named by.

    >>> name_of(())
    ''
    """
    return "_" + digest(function) if function else ""


def pointwise(b: ir.IRBuilder, function: Pointwise, x: ir.Value) -> ir.Value:
    """A function of each number of a vector."""
    known = [x]
    for step in function:
        known.append(stepped(b, step, x.type, [known[i] for i in step.operands]))
    return known[-1]


def stepped(b: ir.IRBuilder, step: Step, kind: ir.Type, given: Sequence[ir.Value]) -> ir.Value:
    """One operation on vectors of this kind."""
    if step.name == "constant":
        return constant(kind, step.number)
    if step.name == "integer_pow":
        return _power(b, given[0], int(step.number))
    return _OPERATIONS[step.name](b, *given)


def _binary(name: str, b: ir.IRBuilder, *given: ir.Value) -> ir.Value:
    return getattr(b, name)(*given)


def _compared(sign: str, b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return (b.fcmp_unordered if sign == "!=" else b.fcmp_ordered)(sign, x, y)


def _extreme(sign: str, b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """NaN of either; of a constant it is not asked, and processors have an instruction for it."""
    from llvmlite import ir

    if isinstance(x, ir.Constant):
        x, y = y, x
    if isinstance(y, ir.Constant):
        return b.select(b.fcmp_ordered(sign, y, x), y, x)
    found = b.select(b.fcmp_unordered(sign, x, y), x, y)
    return b.select(b.fcmp_unordered("uno", y, y), y, found)


def _clamp(b: ir.IRBuilder, low: ir.Value, x: ir.Value, high: ir.Value) -> ir.Value:
    return _extreme("<", b, _extreme(">", b, x, low), high)


def _select(b: ir.IRBuilder, which: ir.Value, first: ir.Value, second: ir.Value) -> ir.Value:
    """The second where it is true, as XLA has it."""
    return b.select(which, second, first)


def _power(b: ir.IRBuilder, x: ir.Value, exponent: int) -> ir.Value:
    """By squares."""
    found = None
    while exponent:
        if exponent & 1:
            found = x if found is None else b.fmul(found, x)
        exponent >>= 1
        x = b.fmul(x, x) if exponent else x
    assert found is not None
    return found


def _unary(name: str, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return intrinsic(b, f"llvm.{name}.v{x.type.count}f32", x.type, x)


_size = partial(_unary, "fabs")


def _rsqrt(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return b.fdiv(constant(x.type, 1.0), _unary("sqrt", b, x))


def _polynomial(b: ir.IRBuilder, x: ir.Value, terms: Sequence[float]) -> ir.Value:
    """The highest power first."""
    first, *rest = (constant(x.type, term) for term in terms)
    return reduce(lambda y, term: fma(b, y, x, term), rest, first)


def _exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Above 0 the square of the reciprocal of half as much below: it is infinite where e^x is."""
    above = b.fcmp_ordered(">", x, x.type(None))
    part = exponential(b, b.select(above, b.fmul(x, constant(x.type, -0.5)), x))
    root = b.fdiv(constant(x.type, 1.0), part)
    return b.select(above, b.fmul(root, root), part)


_EXPM1 = tuple(1 / math.factorial(n) for n in range(9, 0, -1))


def _expm1(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    near = b.fcmp_ordered("<", _size(b, x), constant(x.type, 0.5))
    return b.select(near, b.fmul(x, _polynomial(b, x, _EXPM1)), b.fsub(_exp(b, x), constant(x.type, 1.0)))


def _reciprocal(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Of numbers from 1 to 2^127: a step of Newton's from the processor's first guess, where it divides slowly."""
    one = constant(x.type, 1.0)
    if x.type.count != WIDE:
        return b.fdiv(one, x)
    name, ints = "llvm.x86.avx512.rcp14.ps.512", Types().i16
    guess = intrinsic(b, name, x.type, x, x.type(None), ints(-1))
    return fma(b, guess, fma(b, b.fneg(x), guess, one), guess)


_POWER = (0.00134004331, 0.00967603807, 0.0555032721, 0.240221073, 0.693147207, 1.00000008)
"""Of 2, from -1/2 to 1/2: fitted to 1e-7."""


def _power_of_2(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """From -126 to 126."""
    from llvmlite import ir

    magic = constant(x.type, WHOLE)
    shifted = b.fadd(x, magic)
    whole = b.fsub(shifted, magic)
    y = _polynomial(b, b.fsub(x, whole), _POWER)
    if x.type.count == WIDE:
        i16, i32, name = Types().i16, Types().i32, "llvm.x86.avx512.mask.scalef.ps.512"
        return intrinsic(b, name, x.type, y, whole, x.type(None), i16(-1), i32(_CURRENT))
    ints = ir.VectorType(Types().i32, x.type.count)
    return b.bitcast(b.add(b.bitcast(y, ints), b.shl(b.bitcast(shifted, ints), constant(ints, 23))), x.type)


_CURRENT = 4
"""The rounding that is set, as instructions name it."""


def _logistic(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    low, high, one = (constant(x.type, n) for n in (-126.0, 126.0, 1.0))
    exponent = _clamp(b, low, b.fmul(x, constant(x.type, -math.log2(math.e))), high)
    return _reciprocal(b, b.fadd(one, _power_of_2(b, exponent)))


_LOG = tuple(2 / n for n in (9, 7, 5, 3, 1))
"""Of the logarithm of (1 + s) / (1 - s) over s, in s^2."""


def _log1p(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """From 0 on: the logarithm of 1 + x as float32 has it, and what that rounding lost."""
    from llvmlite import ir

    ints, one = ir.VectorType(ir.IntType(32), x.type.count), constant(x.type, 1.0)
    u = b.fadd(one, x)
    lost = b.fdiv(b.fsub(x, b.fsub(u, one)), u)
    least = constant(ints, 0x3F3504F3)  # the bits of the root of a half: from there on one power of 2
    whole = b.ashr(b.sub(b.bitcast(u, ints), least), constant(ints, 23))
    mantissa = b.bitcast(b.sub(b.bitcast(u, ints), b.shl(whole, constant(ints, 23))), x.type)
    s = b.fdiv(b.fsub(mantissa, one), b.fadd(mantissa, one))
    log = b.fmul(s, _polynomial(b, b.fmul(s, s), _LOG))
    y = b.fadd(fma(b, b.sitofp(whole, x.type), constant(x.type, math.log(2)), log), lost)
    return b.select(b.fcmp_ordered("==", x, constant(x.type, math.inf)), x, y)


class _Odd(NamedTuple):
    """An odd function that rises up to an end, and is there 1 in float32: x times a quotient of polynomials in x^2."""

    end: float
    above: tuple[float, ...]
    below: tuple[float, ...]

    def of(self, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
        x = _clamp(b, constant(x.type, -self.end), x, constant(x.type, self.end))
        square, first = b.fmul(x, x), self.below[-1]
        above, below = (_polynomial(b, square, [term / first for term in terms]) for terms in (self.above, self.below))
        return b.fmul(b.fmul(x, above), _reciprocal(b, below))


# The coefficients are those of Eigen (``generic_fast_erf_float``, ``ptanh``), which XLA has, too.
_ERF = _Odd(
    4.0,
    (
        *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
        *(-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
    ),
    (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02),
)
_TANH = _Odd(
    7.90531110763549805,
    (
        *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08),
        *(1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
    ),
    (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03),
)


def _erfc(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return b.fsub(constant(x.type, 1.0), _ERF.of(b, x))


_OPERATIONS: dict[str, Callable[..., ir.Value]] = {
    **{name: partial(_binary, f"f{name}") for name in ("add", "sub", "mul", "div", "neg")},
    **{name: partial(_binary, f"{name}_") for name in ("and", "or", "not")},
    **{
        name: partial(_compared, sign)
        for name, sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items()
    },
    "max": partial(_extreme, ">"),
    "min": partial(_extreme, "<"),
    "clamp": _clamp,
    "select_n": _select,
    "abs": _size,
    "round": partial(_unary, "roundeven"),
    "rsqrt": _rsqrt,
    "sqrt": partial(_unary, "sqrt"),
    "exp": _exp,
    "expm1": _expm1,
    "logistic": _logistic,
    "tanh": _TANH.of,
    "log1p": _log1p,
    "erf": _ERF.of,
    "erfc": _erfc,
}
