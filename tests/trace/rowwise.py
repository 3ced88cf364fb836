"""Functions of rows, read off programs and done again by numpy in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxcomp.trace import nested
from jaxcomp.trace.pointwise import CONSTANT_STILL, Pointwise, constant_of
from jaxcomp.trace.rowwise import Axes, Beside, RowReading, varies


class Rows(NamedTuple):
    """A function of rows of a value.

    Attributes:
      beside: the other values, and what these are.
      axes: of the result, those of the rows' value.
    """

    function: Pointwise
    along: int
    beside: list[Beside]
    values: list[np.ndarray]
    axes: Axes
    shape: tuple[int, ...]

    @property
    def varying(self) -> tuple[bool, ...]:
        return tuple(varies(self.function, self.beside, self.along))


def read(fn, x: jax.Array, *others: jax.Array) -> Rows | None:
    """The function that a program is of the rows of its first array, if it is one."""
    closed = jax.make_jaxpr(fn)(x, *others)
    jaxpr, makers = closed.jaxpr, {v: eqn for eqn in closed.jaxpr.eqns for v in eqn.outvars}

    def constant(v: Any) -> float | None:
        if isinstance(v, core.Literal):
            return constant_of(v)
        eqn = makers.get(v)
        return constant(eqn.invars[0]) if eqn is not None and eqn.primitive.name in CONSTANT_STILL else None

    reading = RowReading(jaxpr.invars[0], constant)
    known = dict(zip((*jaxpr.invars[1:], *jaxpr.constvars), (*others, *closed.consts), strict=True))
    for eqn in jaxpr.eqns:
        operands = [v.val if isinstance(v, core.Literal) else known.get(v) for v in eqn.invars]
        if any(value is None for value in operands):
            if not reading.read(eqn):
                return None
            continue
        known |= zip(eqn.outvars, nested.bind(eqn, operands), strict=True)
    (y,) = jaxpr.outvars
    assert reading.along is not None
    values = [np.asarray(known[one.value]) for one in reading.beside]
    return Rows(reading.of(y), reading.along, reading.beside, values, reading.axes(y), y.aval.shape)


_REDUCTIONS = {"reduce_max": np.max, "reduce_min": np.min, "reduce_sum": np.sum}
_OTHERS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "max": np.maximum,
    "min": np.minimum,
    "round": np.round,
    "exp": np.exp,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "abs": np.abs,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "eq": np.equal,
    "select_n": lambda which, no, yes: np.where(which, yes, no),
}


def by_numpy(rows: Rows, x: np.ndarray) -> np.ndarray:
    """What it gives, step by step, as the program's result lies."""
    known = [np.asarray(x, np.float64)]
    for name, operands, number in rows.function:
        given = [known[i] for i in operands]
        if name == "constant":
            known.append(np.full((1,) * x.ndim, number))
        elif name == "operand":
            known.append(_over(rows.values[int(number)], rows.beside[int(number)].axes))
        elif name == "integer_pow":
            known.append(given[0] ** int(number))
        elif name in _REDUCTIONS:
            whole = np.broadcast_to(given[0], np.broadcast_shapes(given[0].shape, _row(x, rows.along)))
            known.append(_REDUCTIONS[name](whole, rows.along, keepdims=True))
        else:
            known.append(_OTHERS[name](*given))
    kept = [axis for axis in rows.axes if axis is not None]
    last = np.broadcast_to(known[-1], [n if i in kept else 1 for i, n in enumerate(x.shape)])
    return last.transpose(*kept, *(i for i in range(x.ndim) if i not in kept)).reshape(rows.shape)


def _row(x: np.ndarray, along: int) -> list[int]:
    return [n if i == along else 1 for i, n in enumerate(x.shape)]


def _over(value: np.ndarray, axes: Axes) -> np.ndarray:
    """With the axes of the rows' value."""
    kept = [axis for axis in axes if axis is not None]
    sizes = [1 if axis is None else value.shape[axis] for axis in axes]
    moved = value.transpose(*kept, *(i for i in range(value.ndim) if i not in kept)).reshape(sizes)
    return moved if moved.dtype == bool else moved.astype(np.float64)


def drawn(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def hiding(*shape: int) -> jax.Array:
    """Of each row something is seen."""
    return jnp.asarray(np.random.default_rng(shape).random(shape) < 0.6).at[..., 1].set(True)
