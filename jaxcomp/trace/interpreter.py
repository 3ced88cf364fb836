"""The interpreter: runs a jaxpr again, with claimed equations done otherwise and emissions gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcomp.core import meshes
from jaxcomp.core.types import PyTree
from jaxcomp.trace import layouts, nested, walk
from jaxcomp.trace.flow import Op
from jaxcomp.trace.primitives import CALLS, CUSTOM_RULE, PIECES
from jaxcomp.trace.program import Program
from jaxcomp.trace.walk import Location, Value

Aux = dict[str, PyTree]
"""Emissions by name."""


@dataclass(frozen=True)
class Claim:
    """How one equation is done otherwise.

    Attributes:
      run: ``run(*values)``, or ``run(side, *values)`` where ``side`` is given, to the list of results or ``Emitted``.
      side: a pytree of arrays handed to ``run``, sliced by the layer scans around.
    """

    run: Callable[..., Sequence[Value] | Emitted]
    side: PyTree = None


class Emitted(NamedTuple):
    """The results of a claimed equation, and named values to be gathered beside them."""

    results: Sequence[Value]
    aux: Mapping[str, PyTree]


class Monoid(NamedTuple):
    """How emissions of one name combine: ``merge`` is associative and ``zero(shapes)`` its neutral element.

    ``zero`` gets a tree of ``jax.ShapeDtypeStruct`` and gives arrays of these shapes and types.
    """

    zero: Callable[[PyTree], PyTree]
    merge: Callable[[PyTree, PyTree], PyTree]


def zeros(shapes: PyTree) -> PyTree:
    """Arrays of zeros of the shapes and types of a tree of ``jax.ShapeDtypeStruct``."""
    return jax.tree.map(meshes.zeros, shapes)


class Result(NamedTuple):
    """What an evaluation gives: the function's result, and what claims emitted, by name."""

    out: PyTree
    aux: Aux


Watch = Callable[[Sequence[Value], Sequence[Value]], Mapping[str, PyTree]]
"""From an equation's operands and its results to values that are emitted beside them; nothing is done otherwise."""
Handler = Callable[[Op], Claim | None]
"""Looks at an equation and claims it, or does not."""
Sides = Mapping[Location, PyTree]
Outcome = tuple[list[Value], Aux]


class Opened(NamedTuple):
    """An equation whose inner jaxprs are evaluated anew: where it stands, its operands, and the side inputs."""

    eqn: core.JaxprEqn
    at: Location
    values: list[Value]
    sides: Sides


Reopen = Callable[["Evaluator", Opened], Outcome]
"""Runs an equation whose inner jaxprs are evaluated anew; see ``control_flow.reopen``."""
INLINED = (CALLS - CUSTOM_RULE - PIECES) | {"scan"}


class Evaluator:
    """What one run of a program needs to know; ``reopen`` calls back into ``jaxpr``."""

    def __init__(
        self,
        program: Program,
        claims: Mapping[Location, Claim],
        reopen: Reopen,
        *,
        collect: Monoid | None,
        to_array: Callable[[Value], jax.Array] | None,
        inline: bool,
        watch: Mapping[Location, Watch],
    ) -> None:
        self.claims = claims
        self.watch = watch
        self.reopen = reopen
        self.inlined = INLINED if inline else frozenset()
        self.layer_scans = {loop.location for op in program.flow.ops for loop in op.loops if loop.layers}
        self.collect = collect
        self.to_array = to_array
        self.around = {at[:i] for at in (*claims, *watch) for i in range(1, len(at))}
        self.met: set[Location] = set()

    def jaxpr(self, jaxpr: nested.Closed, at: Location, values: Sequence[Value], sides: Sides) -> Outcome:
        """The results and emissions of a jaxpr that stands at ``at``."""
        aux: Aux = {}

        def equation(eqn: core.JaxprEqn, here: Location, operands: list[Value]) -> list[Value]:
            nonlocal aux
            results, emitted = self.equation(eqn, here, operands, sides)
            aux = self.merged(aux, emitted)
            return results

        return walk.run(jaxpr, values, equation, constant=_itself, at=at, free=True), aux

    def equation(self, eqn: core.JaxprEqn, at: Location, values: list[Value], sides: Sides) -> Outcome:
        """One equation, and what is seen of it."""
        results, aux = self.done(eqn, at, values, sides)
        if at in self.watch:
            self.met.add(at)
            aux = self.merged(aux, self.watch[at](values, results))
        return results, aux

    def done(self, eqn: core.JaxprEqn, at: Location, values: list[Value], sides: Sides) -> Outcome:
        """One equation: claimed, opened, or re-bound."""
        if at in self.claims:
            self.met.add(at)
            with jax.named_scope(str(eqn.source_info.name_stack)):
                return self.claimed(eqn, self.claims[at], values, sides.get(at))
        if self.opens(eqn, at, values):
            with jax.named_scope(str(eqn.source_info.name_stack)):
                return self.reopen(self, Opened(eqn, at, layouts.as_traced(eqn.invars, values), sides))
        if any(v is None for v in values):
            return [None] * len(eqn.outvars), {}
        return [*nested.bind(eqn, [self.array(v) for v in values])], {}

    def opens(self, eqn: core.JaxprEqn, at: Location, values: list[Value]) -> bool:
        """Whether the jaxprs inside an unclaimed equation are evaluated one equation at a time."""
        if not nested.is_open(eqn):
            return False
        inside = at in self.around or eqn.primitive.name in self.inlined
        return inside or not all(map(_as_traced, eqn.invars, values))

    def claimed(self, eqn: core.JaxprEqn, claim: Claim, values: list[Value], side: PyTree) -> Outcome:
        """A claim's own results."""

        def run(*given: Value) -> Outcome:
            outcome = claim.run(*given)
            results, aux = outcome if isinstance(outcome, Emitted) else (outcome, {})
            if not isinstance(results, Sequence) or len(results) != len(eqn.outvars):
                raise ValueError(
                    f"a claim on {eqn.primitive.name!r} must return a list of {len(eqn.outvars)} results, got"
                    f" {results!r}."
                )
            return list(results), dict(aux)

        return layouts.placed(eqn, run, *values) if claim.side is None else layouts.placed(eqn, run, side, *values)

    def array(self, value: Value) -> jax.Array | None:
        """``value`` as an array that any equation takes; an absent one stays absent."""
        if value is None or _is_array(value):
            return value
        if self.to_array is None:
            raise TypeError(
                f"evaluate: an equation that no one claims meets a {type(value).__name__}, which is no array; "
                "claim the equation, or give to_array."
            )
        return self.to_array(value)

    def merged(self, a: Aux, b: Mapping[str, PyTree]) -> Aux:
        """Two sets of emissions as one."""
        both = {k: self.require_monoid().merge(a[k], b[k]) for k in a if k in b}  # not a set: alike each time
        return {**a, **b, **both}

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


def _itself(value: Value) -> Value:
    return value


def _is_array(value: Value) -> TypeGuard[jax.Array]:
    """Whether an equation takes ``value`` as it is: an array of JAX or NumPy, or a number."""
    return isinstance(value, jax.Array | int | float | complex) or (
        hasattr(value, "dtype") and hasattr(value, "__array__")
    )


def _as_traced(v: core.Var | core.Literal, value: Value) -> bool:
    """Whether a value has the shape and type that its variable was traced with."""
    aval = walk.aval_of(v)
    if not hasattr(aval, "shape"):
        return True
    return _is_array(value) and jnp.shape(value) == aval.shape and jax.typeof(value).dtype == aval.dtype
