"""``capture``: a function that also gives values from inside its program, by module, product or named scope."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import NamedTuple

import jax
from jax.extend import core

from jaxcomp.core.leaves import materialize
from jaxcomp.core.paths import Where, describe, matches, meant, some_paths
from jaxcomp.core.types import Params, PyTree
from jaxcomp.trace import nested
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Watch
from jaxcomp.trace.primitives import CUSTOM_RULE, SEALED
from jaxcomp.trace.program import Program, shapes_of, trace
from jaxcomp.trace.sites import sites_of
from jaxcomp.trace.walk import Fn, Location, Value, aval_of

OWNER = "capture"
_EINSUM = "->"
"""In a scope that ``jnp.einsum`` opens: its product has a name already."""
Wanted = Where | Sequence[str]
"""A rule over names, or names each of which must be there."""


class Captured(NamedTuple):
    """What a function gave, and what was seen inside it, by name."""

    out: PyTree
    values: dict[str, jax.Array]


class Point(NamedTuple):
    """A value of a program: the operand or the result at ``place`` of an equation; ``why`` it cannot be taken out."""

    op: Op
    place: int
    is_input: bool
    why: str

    @property
    def shape(self) -> jax.ShapeDtypeStruct:
        """Of what is captured: the layers of the scans around stand in front."""
        variables = self.op.eqn.invars if self.is_input else self.op.eqn.outvars
        aval = aval_of(variables[self.place])
        return jax.ShapeDtypeStruct((*self.op.layer_steps, *aval.shape), aval.dtype)


def capture(fn: Fn, where: Wanted = r".*") -> Callable[..., Captured]:
    """``captured(params, *args)``: what ``fn`` gives, and named values from inside it; no model is edited.

    Names: a scope, which is a linen module's path ("Net/block_0") or a ``jax.named_scope``, is what comes out of it
    (":0", ":1", … where that is several values); a product's path as in :func:`jaxcomp.sites` with ":in" is what
    enters it beside its weight (":in0" and ":in1" between activations) and with ":out" what it gives, before a bias.
    What is reached again has "#1", "#2", … behind its path. NNX and plain functions have products, and the scopes
    that they open themselves. :func:`points` lists all names. A scope that is the whole program is none of them.

    In a scan over stacked layers a value has the layers in front. Captured values have gradients like any others.

    Args:
      fn: a pure function ``fn(params, *args, **kwargs)``; compressed leaves are materialized for it.
      where: which names, as a rule, or a list of names.

    Raises (the captured function):
      ValueError: a rule that matches no name, a name that there is not, or one that no value comes out of: in a loop
        that is not over layers, in one of several branches, in a custom gradient rule, in a shard_map.

    >>> import jax.numpy as jnp
    >>> f = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    >>> out, values = capture(f, "b:in")({"a": jnp.eye(2), "b": jnp.ones((2, 1))}, jnp.array([[3.0, -1.0]]))
    >>> out, values
    (Array([[3.]], dtype=float32), {'b:in': Array([[3., 0.]], dtype=float32)})
    """

    @wraps(fn)
    def captured(params: Params, *args: PyTree, **kwargs: PyTree) -> Captured:
        program = trace(fn, shapes_of(params), *args, **kwargs)
        chosen = _chosen(found_in(program), where)
        values = program.flatten(materialize(params), *args, **kwargs)
        result = evaluate(program, {}, values, watch=_watched(chosen))
        return Captured(result.out, {name: result.aux[name] for name in chosen})

    return captured


def points(fn: Fn, where: Where = r".*") -> Callable[..., dict[str, jax.ShapeDtypeStruct]]:
    """The shapes of all that :func:`capture` can give, by name, in the order of the program; nothing is computed.

    Args:
      fn: a pure function ``fn(params, *args, **kwargs)``.
      where: which names.

    >>> import jax.numpy as jnp
    >>> for name, shape in points(lambda p, x: x @ p["a"])({"a": jnp.eye(2)}, jnp.ones((3, 2))).items():
    ...     print(name, shape.shape)
    a:in (3, 2)
    a:out (3, 2)
    """

    @wraps(fn)
    def listed(params: Params, *args: PyTree, **kwargs: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
        found = found_in(trace(fn, shapes_of(params), *args, **kwargs))
        return {name: p.shape for name, p in found.items() if not p.why and matches(where, name, p.shape)}

    return listed


def found_in(program: Program) -> dict[str, Point]:
    """Every named value of a program, also those that cannot be taken out of it."""
    ops = {op.location: op for op in program.flow.ops}
    found = [*_of_products(program, ops), *_of_scopes(program, ops)]
    order = {at: i for i, at in enumerate(ops)}
    return dict(sorted(found, key=lambda named: (order[named[1].op.location], not named[1].is_input)))


def _of_products(program: Program, ops: Mapping[Location, Op]) -> Iterator[tuple[str, Point]]:
    for site in sites_of(program):
        op = ops[site.location]
        several = len(site.activations) > 1
        for i in site.activations:
            yield f"{site.path}:in{i if several else ''}", Point(op, i, True, _why(op))
        yield f"{site.path}:out", Point(op, 0, False, _why(op))


def _of_scopes(program: Program, ops: Mapping[Location, Op]) -> Iterator[tuple[str, Point]]:
    """What comes out of each scope: what is read outside of its equations, or else what the program gives of it."""
    groups: dict[Location, list[Op]] = {}
    for op in ops.values():
        groups.setdefault(op.location[:-1], []).append(op)
    found: list[tuple[str, list[Point]]] = []
    for at, group in groups.items():
        given = _results(program, ops, at)
        for scope, first, end in _runs(group, ops[at[:-1]].scope if at else ""):
            whole = not at and end - first == len(group)  # its values are the function's own results
            points = [] if whole else _coming_out(group, first, end, given)
            found += [(scope, points)] if points else []
    order, times = {at: i for i, at in enumerate(ops)}, Counter[str]()
    for scope, out in sorted(found, key=lambda one: order[one[1][0].op.location]):
        name = f"{scope}#{times[scope]}" if times[scope] else scope
        times[scope] += 1
        yield from ((name if len(out) == 1 else f"{name}:{i}", point) for i, point in enumerate(out))


def _results(program: Program, ops: Mapping[Location, Op], at: Location) -> Sequence[object]:
    """The variables that the jaxpr at a place gives."""
    if not at:
        return program.jaxpr.jaxpr.outvars
    eqn, part = ops[at[:-1]].eqn, str(at[-1])
    match eqn.primitive.name:
        case "scan":
            return nested.scan_parts(eqn).body.jaxpr.outvars
        case "while":
            parts = nested.while_parts(eqn)
            return (parts.cond if part == "cond" else parts.body).jaxpr.outvars
        case "cond":
            return nested.branches(eqn)[int(part.removeprefix("branch"))].jaxpr.outvars
    body = nested.call_body(eqn)
    return () if body is None else body.jaxpr.outvars


def _runs(group: Sequence[Op], around: str) -> Iterator[tuple[str, int, int]]:
    """``(scope, first, end)`` of each unbroken run of equations in a scope below the one around their jaxpr."""
    depth = len(around.split("/")) if around else 0
    began: dict[str, int] = {}
    for i, op in enumerate([*group, None]):
        parts = op.scope.split("/") if op is not None and op.scope else []
        inside = {"/".join(parts[:n]) for n in range(depth + 1, len(parts) + 1) if _EINSUM not in parts[n - 1]}
        for scope in [s for s in began if s not in inside]:
            yield scope, began.pop(scope), i
        for scope in inside:
            began.setdefault(scope, i)


def _coming_out(group: Sequence[Op], first: int, end: int, given: Sequence[object]) -> list[Point]:
    read = {v for op in (*group[:first], *group[end:]) for v in op.eqn.invars if not isinstance(v, core.Literal)}
    made = [(op, k, v) for op in group[first:end] for k, v in enumerate(op.eqn.outvars)]
    own = [(op, k) for op, k, v in made if v in read] or [(op, k) for op, k, v in made if v in given]
    return [Point(op, k, False, _why(op)) for op, k in own]


def _why(op: Op) -> str:
    """Why no value comes out of an equation's place; nothing where it does."""
    if not SEALED.isdisjoint(op.inside):
        return "stands in a shard_map, which is not rewritten"
    if not CUSTOM_RULE.isdisjoint(op.inside):
        return "stands in a custom gradient rule, which is not opened"
    if not {"cond", "while", "while_cond"}.isdisjoint(op.inside):
        return "stands in a while loop or a branch, which may not run"
    return "" if all(loop.layers for loop in op.loops) else "stands in a loop that is not over layers"


def _chosen(found: Mapping[str, Point], wanted: Wanted) -> dict[str, Point]:
    rules = [wanted] if isinstance(wanted, str) or callable(wanted) else list(wanted)
    chosen: dict[str, Point] = {}
    for rule in rules:
        of_rule = {name: p for name, p in found.items() if matches(rule, name, p.shape)}
        open_ = {name: p for name, p in of_rule.items() if not p.why}
        if not open_:
            raise _nothing(found, rule, of_rule)
        chosen |= {rule: open_[rule]} if isinstance(rule, str) and rule in open_ else open_
    return chosen


def _nothing(found: Mapping[str, Point], rule: Where, barred: Mapping[str, Point]) -> ValueError:
    for name, point in barred.items():
        return ValueError(f"{OWNER}: {name!r} {point.why}; capture what enters or leaves it.")
    return ValueError(
        f"{OWNER}: {describe(rule)} matches no value of the program; there are"
        f" {some_paths(name for name, p in found.items() if not p.why) or 'none'}{meant(rule, found)};"
        " points(fn)(params, *args) lists them."
    )


def _watched(chosen: Mapping[str, Point]) -> dict[Location, Watch]:
    by_place: dict[Location, dict[str, Point]] = {}
    for name, point in chosen.items():
        by_place.setdefault(point.op.location, {})[name] = point
    return {at: _seen(wanted) for at, wanted in by_place.items()}


def _seen(wanted: Mapping[str, Point]) -> Watch:
    def watch(values: Sequence[Value], results: Sequence[Value]) -> dict[str, PyTree]:
        return {name: (values if p.is_input else results)[p.place] for name, p in wanted.items()}

    return watch
