"""The one walk over a jaxpr: what each variable is while its equations are gone through in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import jax
from jax.extend import core

from jaxcomp.core import meshes
from jaxcomp.core.types import PyTree, Shape
from jaxcomp.trace.nested import Closed

Fn = Callable[..., PyTree]
"""A pure function ``fn(params, *args, **kwargs)``."""
Location = tuple[int | str, ...]
"""Where an equation stands: its index, and for each jaxpr around it the outer equation's index and the part's name."""
Value = object
"""What stands for a variable while a program runs: an array, another registered pytree, or None if it is absent."""
V = TypeVar("V")
Equation = Callable[[core.JaxprEqn, Location, list[V]], Sequence[V]]
"""From an equation, its place and what its operands are to what its results are."""


def run(
    jaxpr: Closed,
    values: Sequence[V],
    equation: Equation[V],
    *,
    constant: Callable[[jax.Array], V],
    at: Location = (),
    free: bool = False,
) -> list[V]:
    """What the results of ``jaxpr`` are when its inputs are ``values``.

    Equations that hold jaxprs are ``equation``'s own business: it calls ``run`` on what ``nested`` finds in them.

    Args:
      jaxpr: with its constants.
      values: what each input is: an array, a tag, a label, ….
      equation: what an equation's results are.
      constant: what a literal, or a constant of the jaxpr, is.
      at: where the jaxpr stands.
      free: forget each variable after its last use, so that arrays are freed outside jit.

    >>> jaxpr = jax.make_jaxpr(lambda x, y: (x + 1.0) * y)(1.0, 2.0)
    >>> def depth(eqn, location, inputs):
    ...     print(*location, eqn.primitive.name, inputs)
    ...     return [1 + max(inputs)]
    >>> run(jaxpr, [0, 5], depth, constant=lambda value: 0)
    0 add [0, 0]
    1 mul [1, 5]
    [6]
    """
    body = jaxpr.jaxpr
    known: dict[core.Var, V] = dict(zip(body.constvars, map(constant, jaxpr.consts), strict=True))
    known.update(zip(body.invars, values, strict=True))
    last = _last_uses(body) if free else {}

    def read(v: core.Var | core.Literal) -> V:
        return constant(v.val) if isinstance(v, core.Literal) else known[v]

    for i, eqn in enumerate(body.eqns):
        results = equation(eqn, (*at, i), [read(v) for v in eqn.invars])
        known.update(zip(eqn.outvars, results, strict=True))
        for gone in last.get(i, ()):
            del known[gone]
    return [read(v) for v in body.outvars]


def _last_uses(jaxpr: core.Jaxpr) -> dict[int, list[core.Var]]:
    """Which variables are read for the last time by each equation."""
    kept = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, core.Literal)}
    uses: dict[int, list[core.Var]] = {}
    for v, i in last.items():
        if v not in kept:
            uses.setdefault(i, []).append(v)
    return uses


def aval_of(v: core.Var | core.Literal) -> jax.core.ShapedArray:
    """The shape and type of a variable that is an array, as all are but tokens and references."""
    return cast(jax.core.ShapedArray, v.aval)


def shape_of(v: core.Var | core.Literal) -> Shape:
    """The shape of any variable; of one that is no array, ()."""
    return tuple(getattr(v.aval, "shape", ()))


def shapes_of(variables: Sequence[core.Var | core.Literal]) -> list[jax.ShapeDtypeStruct]:
    """The shapes and types of variables, as ``jax.eval_shape`` and ``jax.make_jaxpr`` take them."""
    return [meshes.shape_of(aval_of(v)) for v in variables]
