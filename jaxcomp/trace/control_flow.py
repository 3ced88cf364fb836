"""Rebuilding equations that hold programs, through the same JAX functions that made them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.extend import core

from jaxcomp.trace import nested
from jaxcomp.trace.flow import Location

if TYPE_CHECKING:
    from jaxcomp.trace.interpreter import Evaluator, Outcome, Sides


def reopen(run: Evaluator, eqn: core.JaxprEqn, at: Location, values: list[Any], sides: Sides) -> Outcome:
    """The results and emissions of an equation whose inner jaxprs are evaluated anew."""
    rule = _RULES.get(eqn.primitive.name, _call)
    return rule(run, eqn, at, values, sides)


def _call(run: Evaluator, eqn: core.JaxprEqn, at: Location, values: list[Any], sides: Sides) -> Outcome:
    """closed_call, custom_jvp and custom_vjp: what is inside, in place."""
    body = nested.call_body(eqn)
    assert body is not None
    return run.jaxpr(body, (*at, "call"), values, sides)


def _jit(run: Evaluator, eqn: core.JaxprEqn, at: Location, values: list[Any], sides: Sides) -> Outcome:
    """jit: what is inside, in place, under its name; its shardings become constraints."""
    with jax.named_scope(f"jit({eqn.params['name']})"):
        values = [_constrained(v, s) for v, s in zip(values, eqn.params["in_shardings"], strict=True)]
        results, aux = _call(run, eqn, at, values, sides)
        return [_constrained(r, s) for r, s in zip(results, eqn.params["out_shardings"], strict=True)], aux


def _constrained(value: Any, sharding: Any) -> Any:
    if isinstance(sharding, jax.sharding.Sharding) and isinstance(value, jax.Array):
        return jax.lax.with_sharding_constraint(value, sharding)
    return value


def _remat(run: Evaluator, eqn: core.JaxprEqn, at: Location, values: list[Any], sides: Sides) -> Outcome:
    body = nested.closed(eqn.params["jaxpr"])
    keys = _below(sides, at)

    def inner(inner_values: list[Any], inner_sides: list[Any]) -> Outcome:
        return run.jaxpr(body, (*at, "call"), inner_values, dict(zip(keys, inner_sides, strict=True)))

    again = jax.checkpoint(inner, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    return again(values, [sides[key] for key in keys])


def _scan(run: Evaluator, eqn: core.JaxprEqn, at: Location, values: list[Any], sides: Sides) -> Outcome:
    """scan: layer scans slice side inputs and stack emissions; others carry the merged emissions along."""
    parts = nested.scan_parts(eqn)
    split = parts.consts + parts.carry
    consts, xs = values[: parts.consts], [_sliceable(run, v, parts.length) for v in values[split:]]
    init = [run.array(v) for v in values[parts.consts : split]]
    layers = at in run.layer_scans
    stepped = _below(sides, at) if layers else []

    def step(carry: list[Any], x: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any], dict[str, Any]]:
        slices, own = x
        inner_sides = {**sides, **dict(zip(stepped, own, strict=True))}
        results, aux = run.jaxpr(parts.body, (*at, "body"), [*consts, *carry, *slices], inner_sides)
        arrays = [run.array(r) for r in results]
        return _typed_as(carry, arrays[: parts.carry]), arrays[parts.carry :], aux

    scanned = (xs, [sides[key] for key in stepped])
    zero: dict[str, Any] = {}
    if not layers and run.may_emit(at):
        first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), scanned)
        zero = _zeros(run, jax.eval_shape(step, init, first)[2])

    def body(state: tuple[list[Any], dict[str, Any]], x: Any) -> tuple[Any, Any]:
        carry, ys, aux = step(state[0], x)
        return ((carry, {}), (ys, aux)) if layers else ((carry, _added(run, state[1], aux)), (ys, {}))

    (carry, total), (ys, stacked) = jax.lax.scan(
        body, (init, zero), scanned, length=parts.length, reverse=parts.reverse, unroll=parts.unroll
    )
    return [*carry, *ys], {**total, **stacked}


def _while(run: Evaluator, eqn: core.JaxprEqn, at: Location, values: list[Any], sides: Sides) -> Outcome:
    parts = nested.while_parts(eqn)
    split = parts.cond_consts + parts.body_consts
    cond_consts, body_consts = values[: parts.cond_consts], values[parts.cond_consts : split]
    init = [run.array(v) for v in values[split:]]

    def proceed(state: tuple[list[Any], dict[str, Any]]) -> Any:
        (more,), aux = run.jaxpr(parts.cond, (*at, "cond"), [*cond_consts, *state[0]], sides)
        if aux:
            raise ValueError(
                f"evaluate: {sorted(aux)} emitted in the condition of a while loop, out of which nothing can come; "
                "decline equations whose op.inside names 'while_cond'."
            )
        return more

    def step(carry: list[Any]) -> Outcome:
        results, aux = run.jaxpr(parts.body, (*at, "body"), [*body_consts, *carry], sides)
        return _typed_as(carry, [run.array(r) for r in results]), aux

    def body(state: tuple[list[Any], dict[str, Any]]) -> tuple[list[Any], dict[str, Any]]:
        carry, aux = step(state[0])
        return carry, _added(run, state[1], aux)

    zero = _zeros(run, jax.eval_shape(step, init)[1]) if run.may_emit(at) else {}
    return jax.lax.while_loop(proceed, body, (init, zero))


def _cond(run: Evaluator, eqn: core.JaxprEqn, at: Location, values: list[Any], sides: Sides) -> Outcome:
    choice, *operands = values
    results_like = [v.aval for v in eqn.outvars]

    def branch(i: int, jaxpr: nested.Closed) -> Callable[[], Outcome]:
        def taken() -> Outcome:
            results, aux = run.jaxpr(jaxpr, (*at, f"branch{i}"), operands, sides)
            return _typed_as(results_like, [run.array(r) for r in results]), aux

        return taken

    takes = [branch(i, jaxpr) for i, jaxpr in enumerate(nested.branches(eqn))]
    shapes: dict[str, Any] = {}
    if run.may_emit(at):
        for take in takes:
            shapes |= jax.eval_shape(take)[1]

    def padded(take: Callable[[], Outcome]) -> Callable[[], Outcome]:
        def taken() -> Outcome:
            results, aux = take()
            missing = {name: shape for name, shape in shapes.items() if name not in aux}
            return results, _added(run, _zeros(run, missing), aux)

        return taken

    return jax.lax.switch(choice, [padded(take) for take in takes])


def _added(run: Evaluator, total: dict[str, Any], aux: dict[str, Any]) -> dict[str, Any]:
    """Emissions of one step joined to those before; an error where nobody said how."""
    if aux:
        run.require_monoid()
    return run.merged(total, aux)


def _zeros(run: Evaluator, shapes: dict[str, Any]) -> dict[str, Any]:
    """The neutral emission of each name."""
    return {name: run.require_monoid().zero(shape) for name, shape in shapes.items()}


def _below(sides: Sides, at: Location) -> list[Location]:
    """The side inputs that equations inside the one at ``at`` use."""
    return [key for key in sides if len(key) > len(at) and key[: len(at)] == at]


def _sliceable(run: Evaluator, value: Any, length: int) -> Any:
    """``value`` if every leaf of it has the scan's length in front, else the array that it stands for."""
    leaves = jax.tree.leaves(value)
    fits = all(getattr(leaf, "shape", ())[:1] == (length,) for leaf in leaves)
    return value if leaves and fits else run.array(value)


def _typed_as(likes: list[Any], values: list[Any]) -> list[Any]:
    """Values in the types that a loop or a branch must keep."""
    return [
        v if v.dtype == like.dtype else jax.lax.convert_element_type(v, like.dtype)
        for v, like in zip(values, likes, strict=True)
    ]


Rule = Callable[["Evaluator", core.JaxprEqn, Location, list[Any], "Sides"], "Outcome"]
_RULES: dict[str, Rule] = {
    "jit": _jit,
    "pjit": _jit,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
