"""One evaluator for every reading of a program: run a jaxpr again, with some equations done otherwise.

How to write a handler. A handler is a function from an equation in its place, an :class:`~jaxcomp.trace.flow.Op`,
to ``None`` ("not mine") or to a :class:`Claim`. It sees no values: it decides from the primitive's name, shapes,
parameters, the operands' tags and the loops around. The claim's ``run`` later gets the operands' values and returns
the list of results. ``op.bind(*values, **params)`` runs the original equation, on other values or with other
parameters. So "halve what every matrix product yields" is::

    def halve_dots(op):
        if op.name != "dot_general":
            return None
        return Claim(lambda *values: [y / 2 for y in op.bind(*values)])

    halved = rewrite(fn, halve_dots)          # halved(params, *args), for jit, grad, vmap, …

Three more things a handler may need:

* A value *into* an equation: ``Claim(run, side=tree)`` calls ``run(side, *values)``. Inside scans over stacked
  layers, each leaf of ``side`` has leading axes ``op.layer_steps``, and each step sees its own slice; every other
  loop sees the same value at every step.
* A value *out of* an equation: return ``Emitted(results, {"name": tree})`` in place of the results.
  ``evaluate(..., collect=Monoid(zero, merge))`` gathers them in ``Result.aux``: a layer scan stacks them (leading axes
  ``op.layer_steps``); other loops, the branches of a cond, and equal names are merged, ``zero`` standing for what did
  not run.
* Values that are no arrays (a quantized weight): pass them at the leaf's place, to ``evaluate`` with a program traced
  for arrays. A claimed equation gets them as they are; an equation that no one claims, and a loop's carry, get
  ``to_array(value)``. They must be registered pytrees; a scan slices their leaves when all have its length in front.
  ``None`` stands for a value that is absent; what an unclaimed equation would compute from it is absent too.

A claim that stands on an equation with a jaxpr inside (scan, jit, …) replaces all of it, and claims inside are
not consulted. Equations with a jaxpr inside are opened only where a claim lies inside, or where their operands have
other shapes than were traced (a shrunken network); otherwise they are re-bound whole, so that a custom gradient rule
stays. An opened ``custom_jvp`` or ``custom_vjp`` is differentiated as what is inside it: a handler that must not lose
the rule declines where ``op.inside`` names one. An opened remat is a remat, an opened scan a scan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcomp.paths import some_paths
from jaxcomp.trace import control_flow, nested
from jaxcomp.trace.flow import Location, Op
from jaxcomp.trace.program import Program, trace


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


def claims_of(program: Program, handler: Handler) -> dict[Location, Claim]:
    """The claims that ``handler`` makes on the equations of ``program``."""
    return {op.location: claim for op in program.flow.ops if (claim := handler(op)) is not None}


def rewrite(fn: Callable[..., Any], handler: Handler) -> Callable[..., Any]:
    """``fn`` with the equations that ``handler`` claims done otherwise.

    Args:
      fn: a pure function ``fn(params, *args, **kwargs)``.
      handler: see this module's head.

    >>> def no_relu(op):
    ...     return Claim(lambda x: [x]) if op.name == "custom_jvp_call" else None
    >>> f = lambda p, x: jax.nn.relu(p["w"] * x)
    >>> float(rewrite(f, no_relu)({"w": jnp.float32(-2)}, jnp.float32(3)))
    -6.0
    """

    @wraps(fn)
    def rewritten(params: Any, *args: Any, **kwargs: Any) -> Any:
        program = trace(fn, params, *args, **kwargs)
        return evaluate(program, claims_of(program, handler), program.flatten(params, *args, **kwargs)).out

    return rewritten


def evaluate(
    program: Program,
    claims: Mapping[Location, Claim],
    values: Sequence[Any],
    *,
    collect: Monoid | None = None,
    to_array: Callable[[Any], Any] | None = None,
    inline: bool = False,
) -> Result:
    """Runs ``program`` on ``values`` with some equations done otherwise.

    Args:
      program: from ``trace``.
      claims: by location; see ``claims_of``.
      values: one for each input of the jaxpr, ``program.flatten(params, *args)``.
      collect: how emissions are merged; without it an emission inside a loop that is no layer scan, inside a
        cond, or of a name that was emitted already, is an error.
      to_array: turns a value that is no array into one, for equations that no one claims.
      inline: open every jit, also where nothing inside changes, so that what it holds stands beside its neighbours.

    Raises:
      ValueError: a claim stands at no equation, emissions cannot be merged, or a claim gives a wrong number of results.
      TypeError: an unclaimed equation meets a value that is no array, and ``to_array`` is not given.
    """
    run = Evaluator(program, claims, collect, to_array, _INLINED if inline else frozenset())
    results, aux = run.jaxpr(program.jaxpr, (), values, {at: c.side for at, c in claims.items() if c.side is not None})
    unused = [at for at in claims if at not in run.met]
    if unused:
        raise ValueError(
            f"evaluate: claims at {some_paths(map(str, unused))} stand at no equation that was reached; "
            "make them from the flow of this very program, and none inside another claim's equation."
        )
    return Result(program.unflatten([run.array(r) for r in results]), aux)


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
