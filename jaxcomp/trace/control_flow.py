"""Equations that hold programs, built again through the same JAX functions that made them.

``rebuilt`` does so for any runner of what is inside; ``reopen`` does for an evaluation, whose emissions and side inputs
travel as one more value beside the equation's own: carried by a loop, sliced by a scan, returned by a branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import jax
from jax import lax
from jax.extend import core

from jaxcomp.core.types import DType, PyTree
from jaxcomp.trace import nested
from jaxcomp.trace.interpreter import Aux, Evaluator, Opened, Outcome, Sides
from jaxcomp.trace.nested import Closed, Scan, While
from jaxcomp.trace.primitives import JIT, REMAT
from jaxcomp.trace.walk import Location, Value

V = TypeVar("V")
Runner = Callable[[Closed, str, list[V]], list[V]]
"""Runs an inner jaxpr, or what stands for it, on values: called with it, its part's name and one value an input."""


def rebuilt(eqn: core.JaxprEqn, values: Sequence[V], run: Runner[V]) -> list[V]:
    """The results of a scan, while, cond, remat or call whose inner jaxprs ``run`` runs.

    Args:
      eqn: the equation.
      values: its operands, pytrees of arrays where arrays stood.
      run: gets each inner jaxpr with the name of its part ("body", "cond", "branch0", …, "call") and its inputs. What a
        loop carries must come back in the types that it went in with, what branches return in the same types.
    """
    match eqn.primitive.name:
        case "scan":
            return scan(nested.scan_parts(eqn), values, run)
        case "while":
            return while_loop(nested.while_parts(eqn), values, run)
        case "cond":
            return cond(nested.branches(eqn), values, run)
    body = nested.call_body(eqn)
    assert body is not None, eqn.primitive.name
    if eqn.primitive.name in REMAT:
        return remat(eqn, body, values, run)
    return run(body, "call", list(values))


def scan(parts: Scan, values: Sequence[V], run: Runner[V]) -> list[V]:
    """``lax.scan`` of ``run``; ``parts`` say how many of the values are constants, and how many are carried."""
    split = parts.consts + parts.carry
    consts, init, xs = values[: parts.consts], values[parts.consts : split], values[split:]

    def step(carry: list[V], slices: list[V]) -> tuple[list[V], list[V]]:
        results = run(parts.body, "body", [*consts, *carry, *slices])
        return results[: parts.carry], results[parts.carry :]

    carry, ys = lax.scan(
        step, list(init), list(xs), length=parts.length, reverse=parts.reverse, unroll=parts.unroll
    )  # fmt: skip
    return [*carry, *ys]


def while_loop(parts: While, values: Sequence[V], run: Runner[V]) -> list[V]:
    """``lax.while_loop`` of ``run``; what is not a constant of the condition or the body is carried."""
    split = parts.cond_consts + parts.body_consts
    cond_consts, body_consts = values[: parts.cond_consts], values[parts.cond_consts : split]
    return lax.while_loop(
        lambda carry: run(parts.cond, "cond", [*cond_consts, *carry])[0],
        lambda carry: run(parts.body, "body", [*body_consts, *carry]),
        list(values[split:]),
    )


def cond(branches: Sequence[Closed], values: Sequence[V], run: Runner[V]) -> list[V]:
    """``lax.switch`` of ``run``; the first value chooses."""
    choice, *operands = values

    def taken(i: int, branch: Closed) -> Callable[[], list[V]]:
        return lambda: run(branch, f"branch{i}", operands)

    return lax.switch(cast(jax.Array, choice), [taken(i, branch) for i, branch in enumerate(branches)])


def remat(eqn: core.JaxprEqn, body: Closed, values: Sequence[V], run: Runner[V]) -> list[V]:
    """``jax.checkpoint`` of ``run``."""
    p = eqn.params
    again = jax.checkpoint(lambda *xs: run(body, "call", [*xs]), prevent_cse=p["prevent_cse"], policy=p["policy"])
    return again(*values)


def reopen(run: Evaluator, opened: Opened) -> Outcome:
    """The results and emissions of an equation whose inner jaxprs are evaluated anew."""
    name = opened.eqn.primitive.name
    rule = _RULES.get(name, _jit if name in JIT else _remat if name in REMAT else _call)
    return rule(run, opened)


def _call(run: Evaluator, opened: Opened) -> Outcome:
    """closed_call, custom_jvp and custom_vjp: what is inside, in place."""
    body = nested.call_body(opened.eqn)
    assert body is not None
    return run.jaxpr(body, (*opened.at, "call"), opened.values, opened.sides)


def _jit(run: Evaluator, opened: Opened) -> Outcome:
    """jit: what is inside, in place, under its name; its shardings become constraints."""
    p = opened.eqn.params
    with jax.named_scope(f"jit({p['name']})"):
        values = [_constrained(v, s) for v, s in zip(opened.values, p["in_shardings"], strict=True)]
        results, aux = _call(run, opened._replace(values=values))
        return [_constrained(r, s) for r, s in zip(results, p["out_shardings"], strict=True)], aux


def _constrained(value: Value, sharding: object) -> Value:
    if isinstance(sharding, jax.sharding.Sharding) and isinstance(value, jax.Array):
        return lax.with_sharding_constraint(value, sharding)
    return value


def _remat(run: Evaluator, opened: Opened) -> Outcome:
    """remat: side inputs go in, and emissions come out, as one more value."""
    eqn, at, values, sides = opened
    keys = _below(sides, at)

    def inner(body: Closed, part: str, inputs: list[Value]) -> list[Value]:
        *own, given = inputs
        results, aux = run.jaxpr(body, (*at, part), own, dict(zip(keys, cast(list[PyTree], given), strict=True)))
        return [*results, aux]

    *results, aux = rebuilt(eqn, [*values, [sides[key] for key in keys]], inner)
    return results, cast(Aux, aux)


def _scan(run: Evaluator, opened: Opened) -> Outcome:
    """scan: layer scans slice side inputs and stack emissions; others carry the merged emissions along."""
    eqn, at, values, sides = opened
    parts = nested.scan_parts(eqn)
    split = parts.consts + parts.carry
    consts, xs = values[: parts.consts], [_sliceable(run, v, parts.length) for v in values[split:]]
    init = [run.array(v) for v in values[parts.consts : split]]
    layers = at in run.layer_scans
    stepped = _below(sides, at) if layers else []
    owned = [sides[key] for key in stepped]

    def step(carry: Sequence[Value], slices: Sequence[Value], own: list[PyTree]) -> Outcome:
        inner_sides = {**sides, **dict(zip(stepped, own, strict=True))}
        results, aux = run.jaxpr(parts.body, (*at, "body"), [*consts, *carry, *slices], inner_sides)
        arrays = [run.array(r) for r in results]
        return [*_typed_as(_dtypes(carry), arrays[: parts.carry]), *arrays[parts.carry :]], aux

    def body(_: Closed, part: str, inputs: list[Value]) -> list[Value]:
        carry, total = inputs[parts.consts : split], cast(Aux, inputs[split])
        results, aux = step(carry, inputs[split + 1 : -1], cast(list[PyTree], inputs[-1]))
        kept, ys = results[: parts.carry], results[parts.carry :]
        return [*kept, {}, *ys, aux] if layers else [*kept, _added(run, total, aux), *ys, {}]

    zero: Aux = {}
    if not layers and run.may_emit(at):
        first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (xs, owned))
        zero = _zeros(run, jax.eval_shape(step, init, *first)[1])
    results = scan(parts._replace(carry=parts.carry + 1), [*consts, *init, zero, *xs, owned], body)
    total, stacked = cast(Aux, results.pop(parts.carry)), cast(Aux, results.pop())
    return results, {**total, **stacked}


def _while(run: Evaluator, opened: Opened) -> Outcome:
    """while: the merged emissions are carried along; its condition emits nothing."""
    eqn, at, values, sides = opened
    parts = nested.while_parts(eqn)
    split = parts.cond_consts + parts.body_consts
    consts = values[parts.cond_consts : split]
    init = [run.array(v) for v in values[split:]]

    def step(carry: Sequence[Value]) -> Outcome:
        results, aux = run.jaxpr(parts.body, (*at, "body"), [*consts, *carry], sides)
        return _typed_as(_dtypes(carry), [run.array(r) for r in results]), aux

    def inner(jaxpr: Closed, part: str, inputs: list[Value]) -> list[Value]:
        *own, total = inputs
        if part == "body":
            results, aux = step(own[len(consts) :])
            return [*results, _added(run, cast(Aux, total), aux)]
        results, aux = run.jaxpr(jaxpr, (*at, part), own, sides)
        if aux:
            raise ValueError(
                f"evaluate: {sorted(aux)} emitted in the condition of a while loop, out of which nothing can come; "
                "decline equations whose op.inside names 'while_cond'."
            )
        return results

    zero = _zeros(run, jax.eval_shape(step, init)[1]) if run.may_emit(at) else {}
    *results, total = while_loop(parts, [*values[:split], *init, zero], inner)
    return results, cast(Aux, total)


def _cond(run: Evaluator, opened: Opened) -> Outcome:
    """cond: each branch emits what any of them does, the neutral element where it does not."""
    eqn, at, values, sides = opened
    branches = nested.branches(eqn)
    dtypes = [getattr(v.aval, "dtype", None) for v in eqn.outvars]

    def taken(branch: Closed, part: str, operands: list[Value]) -> Outcome:
        results, aux = run.jaxpr(branch, (*at, part), operands, sides)
        return _typed_as(dtypes, [run.array(r) for r in results]), aux

    shapes: Aux = {}
    if run.may_emit(at):
        for i, branch in enumerate(branches):
            shapes |= jax.eval_shape(lambda branch=branch, part=f"branch{i}": taken(branch, part, values[1:]))[1]

    def padded(branch: Closed, part: str, operands: list[Value]) -> list[Value]:
        results, aux = taken(branch, part, operands)
        missing = {name: shape for name, shape in shapes.items() if name not in aux}
        return [*results, _added(run, _zeros(run, missing), aux)]

    *results, aux = cond(branches, values, padded)
    return results, cast(Aux, aux)


def _added(run: Evaluator, total: Aux, aux: Aux) -> Aux:
    """Emissions of one step joined to those before; an error where nobody said how."""
    if aux:
        run.require_monoid()
    return run.merged(total, aux)


def _zeros(run: Evaluator, shapes: Aux) -> Aux:
    """The neutral emission of each name."""
    return {name: run.require_monoid().zero(shape) for name, shape in shapes.items()}


def _below(sides: Sides, at: Location) -> list[Location]:
    """The side inputs that equations inside the one at ``at`` use."""
    return [key for key in sides if len(key) > len(at) and key[: len(at)] == at]


def _sliceable(run: Evaluator, value: Value, length: int) -> Value:
    """``value`` if every leaf of it has the scan's length in front, else the array that it stands for."""
    leaves = jax.tree.leaves(value)
    fits = all(getattr(leaf, "shape", ())[:1] == (length,) for leaf in leaves)
    return value if leaves and fits else run.array(value)


def _dtypes(values: Sequence[Value]) -> list[DType]:
    return [cast(jax.Array, v).dtype for v in values]


def _typed_as(dtypes: Sequence[DType], values: Sequence[Value]) -> list[Value]:
    """Arrays in the types that a loop or a branch must keep."""
    arrays = cast(Sequence[jax.Array], values)
    return [v if v.dtype == t else lax.convert_element_type(v, t) for v, t in zip(arrays, dtypes, strict=True)]


_RULES = {"scan": _scan, "while": _while, "cond": _cond}
