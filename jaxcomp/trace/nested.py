"""Equations that hold programs, read alike on every JAX release."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple, Protocol, cast

import jax
from jax.extend import core

from jaxcomp.trace import layouts
from jaxcomp.trace.primitives import CALLS, CONTROL, EXPANDS, HEAVY, SEALED, UNREAD

Closed = core.ClosedJaxpr
"""A jaxpr with its constants."""


class Scan(NamedTuple):
    """The parts of a scan: ``operands == consts + carry + xs`` and ``results == carry + ys``."""

    body: Closed
    consts: int
    carry: int
    length: int
    reverse: bool
    unroll: int | bool


class Expands(Protocol):
    """A primitive that says what it is in terms of others."""

    in_tree: jax.tree_util.PyTreeDef

    def expand(self, *operands: object) -> object:
        """The same results, by other primitives."""


class While(NamedTuple):
    """The parts of a while loop: ``operands == cond_consts + body_consts + carry``."""

    cond: Closed
    body: Closed
    cond_consts: int
    body_consts: int


def closed(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> Closed:
    """``jaxpr`` with its constants; an open one (as remat holds) has none."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def call_body(eqn: core.JaxprEqn) -> Closed | None:
    """The jaxpr that an equation runs once: of jit, remat, custom rules, calls, expansions; None for any other."""
    if eqn.primitive.name in EXPANDS:
        return _expansion(eqn.params["_prim"], tuple(v.aval for v in eqn.invars))
    if eqn.primitive.name not in CALLS:
        return None
    return next((closed(eqn.params[key]) for key in ("jaxpr", "call_jaxpr") if key in eqn.params), None)


@cache
def _expansion(primitive: Expands, avals: tuple[jax.core.AbstractValue, ...]) -> Closed | None:
    """What a primitive that is a program of others expands to, as ``jnp.searchsorted`` on JAX 0.12; None if it cannot.

    ``avals`` belong to the key: primitives of one kind are equal whatever their shapes.
    """
    if not all(hasattr(aval, "shape") and hasattr(aval, "dtype") for aval in avals):
        return None

    def expanded(*operands: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(primitive.expand(*primitive.in_tree.unflatten(operands)))

    try:
        return jax.make_jaxpr(expanded)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))  # type: ignore[attr-defined]
    except NotImplementedError:
        return None


def scan_parts(eqn: core.JaxprEqn) -> Scan:
    """The parts of a ``scan`` equation."""
    p = eqn.params
    if "num_carry" in p:
        consts, carry = p["num_consts"], p["num_carry"]
    else:  # JAX 0.11 and newer keep the three groups of operands as a tree.
        consts, carry = (len(group) for group in p["ft_in"].unpack()[:2])
    return Scan(closed(p["jaxpr"]), consts, carry, p["length"], p["reverse"], p["unroll"])


def while_parts(eqn: core.JaxprEqn) -> While:
    """The parts of a ``while`` equation."""
    p = eqn.params
    return While(closed(p["cond_jaxpr"]), closed(p["body_jaxpr"]), p["cond_nconsts"], p["body_nconsts"])


def branches(eqn: core.JaxprEqn) -> tuple[Closed, ...]:
    """The branches of a ``cond`` equation; its first operand chooses."""
    return tuple(closed(b) for b in eqn.params["branches"])


def inner_jaxprs(eqn: core.JaxprEqn) -> list[Closed]:
    """Every jaxpr among an equation's parameters, whatever the equation is."""
    return [closed(v) for v in _flat(eqn.params.values()) if isinstance(v, core.ClosedJaxpr | core.Jaxpr)]


def _flat(values: Iterable[object]) -> Iterable[object]:
    for v in values:
        if isinstance(v, tuple | list):
            yield from _flat(v)
        else:
            yield v


def is_open(eqn: core.JaxprEqn) -> bool:
    """Whether the evaluator can look into this equation."""
    return eqn.primitive.name in CONTROL or call_body(eqn) is not None


def is_opaque(eqn: core.JaxprEqn) -> bool:
    """Whether an equation does heavy work that nothing here reads, such as a Pallas call."""
    if eqn.primitive.name in UNREAD:
        return True
    return not is_open(eqn) and eqn.primitive.name not in SEALED and any(map(_holds_heavy_work, inner_jaxprs(eqn)))


def _holds_heavy_work(jaxpr: Closed) -> bool:
    return any(e.primitive.name in HEAVY or any(map(_holds_heavy_work, inner_jaxprs(e))) for e in jaxpr.jaxpr.eqns)


def bind(eqn: core.JaxprEqn, values: Sequence[object], params: Mapping[str, object] | None = None) -> list[jax.Array]:
    """Runs one equation on ``values`` (one for each operand, literals too); gives the list of its results.

    ``params`` replaces some of the equation's parameters. Goes through a one-equation jaxpr, which hides
    how each release binds a primitive and keeps the equation's name stack and source line.
    """
    return layouts.bound(eqn, values, params or {}, _bind)


def _bind(eqn: core.JaxprEqn, values: Sequence[object]) -> list[jax.Array]:
    operands = [core.Var(v.aval) for v in eqn.invars]
    changed = eqn.replace(invars=[*operands])
    kept = [i for i, v in enumerate(eqn.outvars) if not isinstance(v, core.DropVar)]
    debug = core.DebugInfo("jaxcomp", eqn.primitive.name, ("",) * len(operands), ("",) * len(kept))
    one = core.Jaxpr((), operands, [eqn.outvars[i] for i in kept], [changed], eqn.effects, debug)
    results: list[jax.Array | None] = [None] * len(eqn.outvars)
    for i, result in zip(kept, jax.core.eval_jaxpr(one, (), *values), strict=True):
        results[i] = result
    return cast(list[jax.Array], results)  # None stands where no one reads a result
