"""Functions of one number, as programs apply them to each element of a value: ReLU, GELU, SiLU, and what users write.

They are read off the equations, whatever calls these stand in; constants may meet the number, and no other value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax import lax
from jax.extend import core

from jaxcomp.trace import nested
from jaxcomp.trace.primitives import UNCHANGED, named
from jaxcomp.trace.walk import aval_of, shape_of

Ends = tuple[float, float]
"""The lowest and the highest that a number may be."""


class Step(NamedTuple):
    """One operation.

    Attributes:
      name: of the primitive, or ``"constant"``.
      operands: which values it takes: 0 is the number, ``i`` what step ``i - 1`` gives.
      number: a constant's, or the exponent of ``integer_pow``.
    """

    name: str
    operands: tuple[int, ...] = ()
    number: float = 0.0


Pointwise = tuple[Step, ...]
"""A function: the value of its last step, or without any the number as it is."""

TRUTH = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not"})
"""Steps that give a truth value; the last three take such."""
STEPS = TRUTH | named(
    """abs add clamp div erf erfc exp expm1 integer_pow log1p logistic max min mul neg round rsqrt select_n sqrt square
    sub tanh"""
)


CONSTANT_STILL = frozenset({"broadcast_in_dim", "convert_element_type"})
"""What they give of a constant is that constant."""


class Reading:
    """Reads equations, one after the other, that are functions of one value.

    >>> import jax, jax.numpy as jnp
    >>> eqn = jax.make_jaxpr(jax.nn.relu)(jnp.ones(3)).eqns[0]
    >>> reading = Reading(eqn.invars[0])
    >>> reading.read(eqn)
    True
    >>> reading.of(eqn.outvars[0])
    (Step(name='constant', operands=(), number=0.0), Step(name='max', operands=(0, 1), number=0.0))

    Args:
      number: the value.
      constant: gives the constant that a value of the program is, if it is one.
    """

    def __init__(self, number: core.Var, constant: Callable[[core.Var], float | None] = lambda _: None) -> None:
        self._known: dict[core.Var, int] = {number: 0}
        self._shape, self._constant = shape_of(number), constant
        self._places: dict[Step, int] = {}

    def of(self, v: core.Var) -> Pointwise:
        """The function that gives a value that was read."""
        return tuple(self._places)[: self._known[v]]

    def has(self, v: core.Var) -> bool:
        """Whether a value was read, or is the number."""
        return v in self._known

    def read(self, eqn: core.JaxprEqn) -> bool:
        """Whether the equation is such a function; it is then known."""
        found = self._results(eqn, [self._operand(v, self._known) for v in eqn.invars])
        if found is None or any(shape_of(v) != self._shape for v in eqn.outvars):
            return False
        self._known |= zip(eqn.outvars, found, strict=True)
        return True

    def _operand(self, v: core.Var | core.Literal, known: dict[core.Var, int]) -> int | None:
        if isinstance(v, core.Literal):
            value = constant_of(v)
        elif v in known:
            return known[v]
        else:
            value = self._constant(v)
        return None if value is None else self._place(Step("constant", number=value))

    def _place(self, step: Step) -> int:
        return self._places.setdefault(step, len(self._places) + 1)

    def _results(self, eqn: core.JaxprEqn, operands: Sequence[int | None]) -> list[int] | None:
        given = [i for i in operands if i is not None]
        if len(given) < len(operands):
            return None
        body = nested.call_body(eqn)
        if body is not None:
            return None if body.consts else self._inside(body.jaxpr, given)
        step = self._step(eqn, given)
        return None if step is None else [step]

    def _inside(self, jaxpr: core.Jaxpr, operands: Sequence[int]) -> list[int] | None:
        known = dict(zip(jaxpr.invars, operands, strict=True))
        for eqn in jaxpr.eqns:
            found = self._results(eqn, [self._operand(v, known) for v in eqn.invars])
            if found is None:
                return None
            known |= zip(eqn.outvars, found, strict=True)
        results = [self._operand(v, known) for v in jaxpr.outvars]
        return [i for i in results if i is not None] if None not in results else None

    def _step(self, eqn: core.JaxprEqn, operands: list[int]) -> int | None:
        name, (result, *others) = eqn.primitive.name, eqn.outvars
        if name in UNCHANGED:
            return operands[0]
        if name in CONSTANT_STILL:
            return operands[0] if self._constant_at(operands[0]) is not None else None
        if name not in STEPS or others or aval_of(result).dtype != (np.bool_ if name in TRUTH else np.float32):
            return None
        if name in ("integer_pow", "square"):
            exponent = eqn.params.get("y", 2)
            return self._place(Step("integer_pow", tuple(operands), exponent)) if exponent > 0 else None
        if name == "round" and eqn.params["rounding_method"] != lax.RoundingMethod.TO_NEAREST_EVEN:
            return None
        if name == "div" and (divisor := self._constant_at(operands[1])):  # as XLA has it
            with np.errstate(over="ignore"):
                by = self._place(Step("constant", number=float(1 / np.float32(divisor))))
            return self._place(Step("mul", (operands[0], by)))
        return self._place(Step(name, tuple(operands)))

    def _constant_at(self, index: int) -> float | None:
        step = tuple(self._places)[index - 1] if index else None
        return step.number if step is not None and step.name == "constant" else None


def constant_of(v: core.Literal) -> float | None:
    """The number that stands in a program, if it is one and no NaN."""
    if np.ndim(v.val) or np.asarray(v.val).dtype == bool or math.isnan(number := float(v.val)):
        return None
    return number


LEAST, MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def gives_numbers(function: Pointwise, of: Ends = (-MOST, MOST)) -> bool:
    """Whether it gives a number, which may be infinite, of all between these: never NaN, as far as can be told.

    >>> gives_numbers((Step("logistic", (0,)), Step("mul", (0, 1))))
    True
    >>> gives_numbers((Step("exp", (0,)), Step("mul", (0, 1)), Step("sub", (2, 1))))
    False
    """
    known = [of]
    for step in function:
        found = _ends(step, [known[i] for i in step.operands])
        if found is None:
            return False
        low, high = map(_in_float32, found)
        known.append((low, high))
    return True


def _in_float32(end: float) -> float:
    if abs(end) > MOST:
        return math.copysign(math.inf, end)
    return end if abs(end) >= LEAST else 0.0


def _ends(step: Step, given: Sequence[Ends]) -> Ends | None:
    """Between which numbers it is; None where it may be none."""
    if step.name == "constant":
        return step.number, step.number
    if step.name in TRUTH:
        return 0.0, 1.0
    if step.name in _MONOTONE:
        (low, high), least = given[0], _FROM.get(step.name, -math.inf)
        if low < least:
            return None
        ends = (_MONOTONE[step.name](low), _MONOTONE[step.name](high))
        return min(ends), max(ends)
    return _OTHERS[step.name](step, given)


def _exp(x: float) -> float:
    return math.exp(min(x, 200.0)) if x > -800 else 0.0


_MONOTONE: dict[str, Callable[[float], float]] = {
    "exp": _exp,
    "expm1": lambda x: _exp(x) - 1,
    "log1p": math.log1p,
    "logistic": lambda x: 1 / (1 + _exp(-x)),
    "tanh": math.tanh,
    "erf": math.erf,
    "erfc": math.erfc,
    "round": lambda x: x if math.isinf(x) else float(round(x)),
    "rsqrt": lambda x: x**-0.5 if x > 0 else math.inf,
    "sqrt": math.sqrt,
    "neg": lambda x: -x,
}
_FROM = {"log1p": 0.0, "rsqrt": 0.0, "sqrt": 0.0}
"""Below it they may give no number."""


def _sum(a: Ends, b: Ends) -> Ends | None:
    if any(one[0] == -math.inf and other[1] == math.inf for one, other in ((a, b), (b, a))):
        return None
    return a[0] + b[0], a[1] + b[1]


def _product(a: Ends, b: Ends) -> Ends | None:
    for one, other in ((a, b), (b, a)):
        if one[0] <= 0 <= one[1] and math.inf in (abs(other[0]), abs(other[1])):
            return None
    found = [x * y for x in a for y in b]
    return min(found), max(found)


def _quotient(a: Ends, b: Ends) -> Ends | None:
    if b[0] <= 0 <= b[1] or (math.inf in map(abs, a) and math.inf in map(abs, b)):
        return None
    found = [x / y for x in a for y in b]
    return min(found), max(found)


def _power(step: Step, given: Sequence[Ends]) -> Ends | None:
    """Odd powers keep the order, even ones are from 0 on."""
    (low, high), y = given[0], int(step.number)
    sizes = [math.copysign(min(abs(end), 1e60) ** min(y, 5), end) for end in (low, high)]
    if y % 2:
        return sizes[0], sizes[1]
    return (0.0 if low <= 0 <= high else min(map(abs, sizes))), max(map(abs, sizes))


def _any_of(given: Sequence[Ends]) -> Ends:
    return min(low for low, _ in given), max(high for _, high in given)


def _absolute(ends: Ends) -> Ends:
    low, high = sorted(map(abs, ends))
    return (0.0 if ends[0] <= 0 <= ends[1] else low), high


_OTHERS: dict[str, Callable[[Step, Sequence[Ends]], Ends | None]] = {
    "abs": lambda _, v: _absolute(v[0]),
    "add": lambda _, v: _sum(*v),
    "sub": lambda _, v: _sum(v[0], (-v[1][1], -v[1][0])),
    "mul": lambda _, v: _product(*v),
    "div": lambda _, v: _quotient(*v),
    "max": lambda _, v: (max(v[0][0], v[1][0]), max(v[0][1], v[1][1])),
    "min": lambda _, v: (min(v[0][0], v[1][0]), min(v[0][1], v[1][1])),
    "clamp": lambda _, v: (min(max(v[0][0], v[1][0]), v[2][0]), min(max(v[0][1], v[1][1]), v[2][1])),
    "integer_pow": _power,
    "select_n": lambda _, v: _any_of(v[1:]),
}
