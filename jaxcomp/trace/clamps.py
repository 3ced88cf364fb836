"""Equations that keep a value between two numbers, and do nothing else: ReLU, ReLU6, clips."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jax.extend import core

from jaxcomp.trace import nested
from jaxcomp.trace.nested import Closed
from jaxcomp.trace.primitives import CUSTOM_RULE, JIT

Ends = tuple[float, float]
"""The lowest and the highest number; of a constant twice the same."""
OPEN: Ends = -math.inf, math.inf
"""Of a value that is not clamped."""


def clamp_of(eqn: core.JaxprEqn, index: int) -> Ends | None:
    """Between which numbers an equation keeps its operand ``index``, if that is all that it does.

    >>> import jax, jax.numpy as jnp
    >>> clamp_of(jax.make_jaxpr(jax.nn.relu6)(jnp.ones(3)).eqns[0], 0)
    (0.0, 6.0)
    """
    operands = [OPEN if i == index else _constant(v) for i, v in enumerate(eqn.invars)]
    given = [ends for ends in operands if ends is not None]
    return _ends(eqn, given) if len(given) == len(operands) else None


def both(first: Ends, then: Ends) -> Ends:
    """Of one clamp behind another.

    >>> both((0.0, 6.0), (-1.0, 4.0))
    (0.0, 4.0)
    """
    low, high = then
    return min(max(first[0], low), high), min(max(first[1], low), high)


def _constant(v: core.Var | core.Literal) -> Ends | None:
    """Of a number that stands in the program, which is no NaN."""
    if not isinstance(v, core.Literal) or np.ndim(v.val) or math.isnan(number := float(v.val)):
        return None
    return number, number


def _ends(eqn: core.JaxprEqn, operands: Sequence[Ends]) -> Ends | None:
    """What an equation makes of the ends of its operands, one of which may be a value; None if it is no clamp."""
    name, values = eqn.primitive.name, [low != high for low, high in operands]
    if name in JIT | CUSTOM_RULE:
        body = nested.call_body(eqn)
        return None if body is None else _inside(body, operands)
    if sum(values) > 1:
        return None
    match name:
        case "max":
            return max(operands[0][0], operands[1][0]), max(operands[0][1], operands[1][1])
        case "min":
            return min(operands[0][0], operands[1][0]), min(operands[0][1], operands[1][1])
        case "clamp" if values[1]:
            return both(operands[1], (operands[0][0], operands[2][0]))
        case "convert_element_type" | "broadcast_in_dim" if not values[0]:
            return operands[0]
    return None


def _inside(body: Closed, operands: Sequence[Ends]) -> Ends | None:
    """The same of a program of such equations."""
    known = dict(zip(body.jaxpr.invars, operands, strict=True))

    def read(v: core.Var | core.Literal) -> Ends | None:
        return _constant(v) if isinstance(v, core.Literal) else known.get(v)

    for eqn in body.jaxpr.eqns:
        given = [ends for ends in map(read, eqn.invars) if ends is not None]
        found = _ends(eqn, given) if len(given) == len(eqn.invars) and len(eqn.outvars) == 1 else None
        if found is None:
            return None
        known[eqn.outvars[0]] = found
    return read(body.jaxpr.outvars[0]) if len(body.jaxpr.outvars) == 1 else None
