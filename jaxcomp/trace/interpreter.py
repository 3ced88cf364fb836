"""The interpreter: runs a jaxpr again, with claimed equations done otherwise and emissions gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcomp.trace import control_flow, nested
from jaxcomp.trace.flow import Location, Op
from jaxcomp.trace.program import Program


@dataclass(frozen=True)
class Claim:
    """How one equation is done otherwise.

    Attributes:
      run: ``run(*values)``, or ``run(side, *values)`` where ``side`` is given, to the list of results or ``Emitted``.
      side: a pytree of arrays handed to ``run``, sliced by the layer scans around.
    """

    run: Callable[..., Any]
    side: Any = None


class Emitted(NamedTuple):
    """The results of a claimed equation, and named values to be gathered beside them."""

    results: Sequence[Any]
    aux: Mapping[str, Any]


class Monoid(NamedTuple):
    """How emissions of one name combine: ``merge`` is associative and ``zero(shapes)`` its neutral element.

    ``zero`` gets a tree of ``jax.ShapeDtypeStruct`` and gives arrays of these shapes and types.
    """

    zero: Callable[[Any], Any]
    merge: Callable[[Any, Any], Any]


class Result(NamedTuple):
    """What an evaluation gives: the function's result, and what claims emitted, by name."""

    out: Any
    aux: dict[str, Any]


Handler = Callable[[Op], Claim | None]
"""Looks at an equation and claims it, or does not."""


_INLINED = frozenset({"jit", "pjit", "closed_call", "core_call", "scan", "remat2", "checkpoint"})


Sides = Mapping[Location, Any]


Outcome = tuple[list[Any], dict[str, Any]]


class Evaluator:
    """The walk behind ``evaluate``; the rules in ``control_flow`` call back into ``jaxpr``."""

    def __init__(
        self,
        program: Program,
        claims: Mapping[Location, Claim],
        collect: Monoid | None,
        to_array: Callable[[Any], Any] | None,
        inlined: frozenset[str],
    ) -> None:
        self.claims = claims
        self.inlined = inlined
        self.layer_scans = {loop.location for op in program.flow.ops for loop in op.loops if loop.layers}
        self.collect = collect
        self.to_array = to_array
        self.around = {at[:i] for at in claims for i in range(1, len(at))}
        self.met: set[Location] = set()

    def jaxpr(self, jaxpr: nested.Closed, at: Location, values: Sequence[Any], sides: Sides) -> Outcome:
        """The results and emissions of a jaxpr that stands at ``at``."""
        env: dict[core.Var, Any] = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        env |= dict(zip(jaxpr.jaxpr.invars, values, strict=True))
        last = _last_uses(jaxpr)

        def read(v: Any) -> Any:
            return v.val if isinstance(v, core.Literal) else env[v]

        aux: dict[str, Any] = {}
        for i, eqn in enumerate(jaxpr.jaxpr.eqns):
            results, emitted = self.equation(eqn, (*at, i), [read(v) for v in eqn.invars], sides)
            env |= dict(zip(eqn.outvars, results, strict=True))
            aux = self.merged(aux, emitted)
            for v in last.get(i, ()):
                del env[v]
        return [read(v) for v in jaxpr.jaxpr.outvars], aux

    def equation(self, eqn: core.JaxprEqn, at: Location, values: list[Any], sides: Sides) -> Outcome:
        """One equation: claimed, opened, or re-bound."""
        if at in self.claims:
            self.met.add(at)
            with jax.named_scope(str(eqn.source_info.name_stack)):
                return self.claimed(eqn, self.claims[at], values, sides.get(at))
        if self.opens(eqn, at, values):
            with jax.named_scope(str(eqn.source_info.name_stack)):
                return control_flow.reopen(self, eqn, at, values, sides)
        if any(v is None for v in values):
            return [None] * len(eqn.outvars), {}
        return nested.bind(eqn, [self.array(v) for v in values]), {}

    def opens(self, eqn: core.JaxprEqn, at: Location, values: list[Any]) -> bool:
        """Whether the jaxprs inside an unclaimed equation are evaluated one equation at a time."""
        if not nested.is_open(eqn):
            return False
        inside = at in self.around or eqn.primitive.name in self.inlined
        return inside or not all(map(_as_traced, eqn.invars, values))

    def claimed(self, eqn: core.JaxprEqn, claim: Claim, values: list[Any], side: Any) -> Outcome:
        """A claim's own results."""
        outcome = claim.run(*values) if claim.side is None else claim.run(side, *values)
        results, aux = outcome if isinstance(outcome, Emitted) else (outcome, {})
        if not isinstance(results, Sequence) or len(results) != len(eqn.outvars):
            raise ValueError(
                f"a claim on {eqn.primitive.name!r} must return a list of {len(eqn.outvars)} results, got {results!r}."
            )
        return list(results), dict(aux)

    def array(self, value: Any) -> Any:
        """``value`` as an array that any equation takes; an absent one stays absent."""
        if value is None or _is_array(value):
            return value
        if self.to_array is None:
            raise TypeError(
                f"evaluate: an equation that no one claims meets a {type(value).__name__}, which is no array; "
                "claim the equation, or give to_array."
            )
        return self.to_array(value)

    def merged(self, a: dict[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
        """Two sets of emissions as one."""
        both = a.keys() & b.keys()
        return {**a, **b, **{k: self.require_monoid().merge(a[k], b[k]) for k in both}}

    def may_emit(self, at: Location) -> bool:
        """Whether a claim inside the equation at ``at`` could emit."""
        return self.collect is not None and at in self.around

    def require_monoid(self) -> Monoid:
        """How emissions combine; an error where the caller did not say."""
        if self.collect is None:
            raise ValueError(
                "evaluate: emissions out of a loop or a cond are merged; give collect=Monoid(zero, merge)."
            )
        return self.collect


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | int | float | complex) or (
        hasattr(value, "dtype") and hasattr(value, "__array__")
    )


def _as_traced(v: Any, value: Any) -> bool:
    """Whether a value has the shape and type that its variable was traced with."""
    aval = v.aval
    if not hasattr(aval, "shape"):
        return True
    return _is_array(value) and jnp.shape(value) == aval.shape and jax.typeof(value).dtype == aval.dtype


def _last_uses(jaxpr: nested.Closed) -> dict[int, list[core.Var]]:
    """Which variables are read for the last time by each equation."""
    kept = {v for v in jaxpr.jaxpr.outvars if not isinstance(v, core.Literal)}
    last = {v: i for i, eqn in enumerate(jaxpr.jaxpr.eqns) for v in eqn.invars if not isinstance(v, core.Literal)}
    uses: dict[int, list[core.Var]] = {}
    for v, i in last.items():
        if v not in kept:
            uses.setdefault(i, []).append(v)
    return uses
