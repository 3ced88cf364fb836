"""Functions of rows, as programs apply them along one axis of a value: softmax with its masks, and what users write.

They are read off the equations, whatever calls these stand in: operations on each number, sums and extremes of a row,
and other values that meet the rows, broadcast where they lack an axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from jaxcomp.core.types import Shape
from jaxcomp.trace import nested
from jaxcomp.trace.pointwise import Pointwise, Reading, Step
from jaxcomp.trace.primitives import UNCHANGED
from jaxcomp.trace.walk import aval_of, shape_of

Axes = tuple[int | None, ...]
"""For each axis of one value the axis of another that it is, or None where there is none; none of size 1 is."""
REDUCTIONS = frozenset({"reduce_max", "reduce_min", "reduce_sum"})
"""Steps that give one number for a row."""


class Beside(NamedTuple):
    """Another value that meets the rows: the step ``"operand"`` whose number is its place in a list of them.

    Attributes:
      value: it.
      axes: for each axis of the rows' value its own axis, or None where it has the same number along it.
    """

    value: core.Var
    axes: Axes


class _At(NamedTuple):
    """What a step gives, and which axes of the rows' value it has."""

    step: int
    axes: Axes


class _Aside(NamedTuple):
    """A value that does not depend on the rows, as far as it is moved and broadcast; and which of its axes it has."""

    value: core.Var
    axes: Axes


_Known = _At | _Aside | float
"""The last: a constant, of truth values 0 or 1."""
_OF_CONSTANTS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "div": np.divide,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "sub": np.subtract,
}
"""What programs count with constants, as the degrees of freedom of a variance."""


class RowReading(Reading):
    """Reads equations, one after the other, that are functions of the rows of one value.

    >>> import jax, jax.numpy as jnp
    >>> eqns = jax.make_jaxpr(lambda x: x - x.max(-1, keepdims=True))(jnp.ones((2, 3))).eqns
    >>> reading = RowReading(eqns[0].invars[0])
    >>> all(map(reading.read, eqns)), [step.name for step in reading.of(eqns[-1].outvars[0])], reading.along
    (True, ['reduce_max', 'sub'], 1)

    Args:
      number: the value.
      constant: gives the constant that a value of the program is, if it is one.

    Attributes:
      along: the axis that rows lie along, once a step has reduced it.
      beside: the other values.
    """

    def __init__(self, number: core.Var, constant: Callable[[core.Var], float | None] = lambda _: None) -> None:
        super().__init__(number, constant)
        self._values: dict[core.Var, _Known] = {number: _At(0, sized(self._shape))}
        self.along: int | None = None
        self.beside: list[Beside] = []

    def of(self, v: core.Var) -> Pointwise:
        """The function that gives a value that was read; its steps may be reductions and operands."""
        found = self._values[v]
        assert isinstance(found, _At)
        return tuple(self._places)[: found.step]

    def has(self, v: core.Var) -> bool:
        """Whether a value was read, or is the rows'."""
        return v in self._values

    def axes(self, v: core.Var) -> Axes:
        """For each axis of a value that was read that of the rows' value."""
        found = self._values[v]
        assert isinstance(found, _At)
        return found.axes

    def is_whole(self, v: core.Var) -> bool:
        """Whether a value that was read has the shape of the rows' value and lies as it does."""
        return shape_of(v) == self._shape and self.axes(v) == sized(self._shape)

    def read(self, eqn: core.JaxprEqn) -> bool:
        """Whether the equation is such a function; it is then known."""
        found = self._given(eqn, [self._outer(v) for v in eqn.invars])
        if found is None or not all(isinstance(value, _At) for value in found):
            return False
        self._values |= zip(eqn.outvars, found, strict=True)
        return True

    def _outer(self, v: core.Var | core.Literal) -> _Known | None:
        """An operand of an equation that stands where the rows' value does."""
        if isinstance(v, core.Literal):
            return _literal(v)
        if v in self._values:
            return self._values[v]
        number = self._constant(v)
        return _Aside(v, sized(shape_of(v))) if number is None else number

    def _given(self, eqn: core.JaxprEqn, operands: Sequence[_Known | None]) -> list[_Known] | None:
        known = [value for value in operands if value is not None]
        if len(known) < len(operands):
            return None
        body = nested.call_body(eqn)
        if body is not None:
            return None if body.consts else self._within(body.jaxpr, known)
        found = self._one(eqn, known)
        return None if found is None else [found]

    def _within(self, jaxpr: core.Jaxpr, operands: Sequence[_Known]) -> list[_Known] | None:
        known = dict(zip(jaxpr.invars, operands, strict=True))

        def value(v: core.Var | core.Literal) -> _Known | None:
            return _literal(v) if isinstance(v, core.Literal) else known.get(v)

        for eqn in jaxpr.eqns:
            found = self._given(eqn, [value(v) for v in eqn.invars])
            if found is None:
                return None
            known |= zip(eqn.outvars, found, strict=True)
        results = [value(v) for v in jaxpr.outvars]
        return [v for v in results if v is not None] if None not in results else None

    def _one(self, eqn: core.JaxprEqn, operands: list[_Known]) -> _Known | None:
        if not operands or len(eqn.outvars) != 1:
            return None
        name, first, shape = eqn.primitive.name, operands[0], shape_of(eqn.outvars[0])
        if name in UNCHANGED or (name == "convert_element_type" and _same_type(eqn)):
            return first
        if isinstance(first, float):
            if name in ("broadcast_in_dim", "convert_element_type"):
                return first
        elif name in _MOVES:
            axes = _MOVES[name](eqn, first.axes)
            return None if axes is None else self._spread(first, axes, shape)
        if name in REDUCTIONS:
            return self._reduced(eqn, first)
        if name == "select_n" and isinstance(first, float):
            return operands[1 + int(first)]
        numbers = [np.float32(value) for value in operands if isinstance(value, float)]
        if len(numbers) == len(operands):
            return float(_OF_CONSTANTS[name](*numbers)) if name in _OF_CONSTANTS else None
        return self._numbers(eqn, operands)

    def _spread(self, value: _At | _Aside, axes: Axes, shape: tuple[int, ...]) -> _Known | None:
        """The same value with other axes."""
        if isinstance(value, _Aside):
            return _Aside(value.value, axes)
        found = self._along_rows(axes, shape)
        return None if found is None else _At(value.step, found)

    def _along_rows(self, axes: Axes, shape: tuple[int, ...]) -> Axes | None:
        """The axes of a value of this shape: a row's number that is broadcast stands along the row."""
        new = [i for i, n in enumerate(shape) if n != 1 and axes[i] is None]
        if not new:
            return axes
        if len(new) > 1 or self.along is None or self.along in axes or shape[new[0]] != self._shape[self.along]:
            return None
        return tuple(self.along if i == new[0] else axis for i, axis in enumerate(axes))

    def _reduced(self, eqn: core.JaxprEqn, value: _Known) -> _At | None:
        if not isinstance(value, _At) or aval_of(eqn.outvars[0]).dtype != np.float32:
            return None
        gone = {int(i) for i in eqn.params["axes"]}
        (along, *others) = [value.axes[i] for i in gone if value.axes[i] is not None] or [None]
        if along is None or others or self.along not in (None, along):
            return None
        self.along = along
        step = self._place(Step(eqn.primitive.name, (value.step,)))
        return _At(step, tuple(axis for i, axis in enumerate(value.axes) if i not in gone))

    def _numbers(self, eqn: core.JaxprEqn, operands: list[_Known]) -> _At | None:
        """An operation on each number; an operand of size 1 along an axis is broadcast."""
        shape = shape_of(eqn.outvars[0])
        axes = [value.axes for value in operands if isinstance(value, _At)]
        each = [{here[i] for here in axes} - {None} for i in range(len(shape))]
        if not axes or any(len(found) > 1 for found in each):
            return None
        here = self._along_rows(tuple(next(iter(found), None) for found in each), shape)
        if here is None:
            return None
        given = [self._place_of(v, here, shape_of(u)) for v, u in zip(operands, eqn.invars, strict=True)]
        known = [i for i in given if i is not None]
        step = self._step(eqn, known) if len(known) == len(given) else None
        return None if step is None else _At(step, here)

    def _place_of(self, value: _Known, here: Axes, shape: tuple[int, ...]) -> int | None:
        if isinstance(value, _At):
            return value.step
        if isinstance(value, float):
            return None if math.isnan(value) else self._place(Step("constant", number=value))
        if aval_of(value.value).dtype not in (np.float32, np.bool_) or (shape and len(shape) != len(here)):
            return None
        own = dict(zip(here, value.axes, strict=True)) if shape else {}
        found = Beside(value.value, tuple(own.get(i) for i in range(len(self._shape))))
        if found not in self.beside:
            self.beside.append(found)
        return self._place(Step("operand", number=self.beside.index(found)))


def _literal(v: core.Literal) -> float | None:
    return float(v.val) if np.ndim(v.val) == 0 else None


def sized(shape: Shape) -> Axes:
    """The axes of a value themselves.

    >>> sized((2, 1, 3))
    (0, None, 2)
    """
    return tuple(i if n != 1 else None for i, n in enumerate(shape))


def _same_type(eqn: core.JaxprEqn) -> bool:
    return bool(aval_of(eqn.invars[0]).dtype == aval_of(eqn.outvars[0]).dtype)


def _broadcast(eqn: core.JaxprEqn, axes: Axes) -> Axes | None:
    found: list[int | None] = [None] * len(shape_of(eqn.outvars[0]))
    for axis, place in zip(axes, eqn.params["broadcast_dimensions"], strict=True):
        found[int(place)] = axis
    return tuple(found)


def resized(axes: Axes, before: Shape, after: Shape) -> Axes | None:
    """The axes of a value of another shape, where axes of size 1 come and go; None where others do.

    >>> resized((0, None, 2), (2, 1, 3), (1, 2, 3)), resized((0, None, 2), (2, 1, 3), (6,))
    ((None, 0, 2), None)
    """
    if [n for n in before if n != 1] != [n for n in after if n != 1]:
        return None
    left = iter([axis for axis, n in zip(axes, before, strict=True) if n != 1])
    return tuple(next(left) if n != 1 else None for n in after)


def _reshaped(eqn: core.JaxprEqn, axes: Axes) -> Axes | None:
    return resized(axes, shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]))


_MOVES: dict[str, Callable[[core.JaxprEqn, Axes], Axes | None]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshaped,
    "squeeze": _reshaped,
    "transpose": lambda eqn, axes: tuple(axes[int(i)] for i in eqn.params["permutation"]),
}


def varies(function: Pointwise, beside: Sequence[Beside], along: int) -> list[bool]:
    """For the number and each step whether it varies along a row.

    >>> varies((Step("reduce_sum", (0,)), Step("div", (0, 1))), (), 0)
    [True, False, True]
    """
    known = [True]
    for step in function:
        if step.name == "operand":
            known.append(beside[int(step.number)].axes[along] is not None)
        else:
            known.append(step_varies(step, known))
    return known


def step_varies(step: Step, known: Sequence[bool]) -> bool:
    """Whether what a step makes of values varies along a row, of which that is known."""
    return step.name not in REDUCTIONS and any(known[i] for i in step.operands)
