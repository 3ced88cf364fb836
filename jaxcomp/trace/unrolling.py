"""Loops over stacked layers written out, so that each layer is a part of the program that can be run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcomp.core.types import Params, PyTree, Shape
from jaxcomp.trace import nested, walk
from jaxcomp.trace.evaluator import evaluate
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.primitives import CUSTOM_RULE
from jaxcomp.trace.program import Program, shape_like, trace
from jaxcomp.trace.walk import Fn, Location


class Slices:
    """What stands in a tree for a leaf whose layers are apart: one array for each index of its first axis.

    Args:
      layers: arrays, or their shapes, in order.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        self.layers = tuple(layers)

    @property
    def shape(self) -> Shape:
        """That of the leaf."""
        return (len(self.layers), *self.layers[0].shape)

    def dense(self) -> jax.Array:
        """The leaf."""
        return jnp.stack(self.layers)

    def __repr__(self) -> str:
        return f"Slices({len(self.layers)} of {self.shape[1:]})"


def _with_keys(s: Slices) -> tuple[list[tuple[jax.tree_util.SequenceKey, Any]], None]:
    return [(jax.tree_util.SequenceKey(i), x) for i, x in enumerate(s.layers)], None


jax.tree_util.register_pytree_with_keys(Slices, _with_keys, lambda _, layers: Slices(layers))


def stacks(fn: Fn) -> Callable[..., dict[str, int]]:
    """``stacks(params, *args)``: the leaves that scans take a slice of a step, by path, and how many slices they have.

    Args:
      fn: a pure function whose first argument is the parameter tree.

    >>> fn = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0] @ p["head"]
    >>> stacks(fn)({"layers": jnp.ones((3, 2, 2)), "head": jnp.ones((2, 1))}, jnp.ones((1, 2)))
    {'layers': 3}
    """

    def found(params: Params, *args: PyTree) -> dict[str, int]:
        program = trace(fn, params, *args)
        loops = _loops(program, program.param_paths).values()
        return {path: nested.scan_parts(eqn).length for eqn, paths in loops for path in paths if path is not None}

    return found


def unrolled(fn: Fn) -> Fn:
    """``fn`` of a tree some of whose stacked leaves are :class:`Slices`: the scans over these are written out.

    Where such a leaf is read otherwise it is stacked.

    Args:
      fn: a pure function whose first argument is the parameter tree.

    >>> fn = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]
    >>> layers = [jnp.eye(2), 2 * jnp.eye(2)]
    >>> jaxpr = jax.make_jaxpr(unrolled(fn))({"layers": Slices(layers)}, jnp.ones((1, 2)))
    >>> [e.primitive.name for e in jaxpr.jaxpr.eqns]
    ['dot_general', 'tanh', 'dot_general', 'tanh']
    """

    @wraps(fn)
    def written_out(tree: Params, *args: PyTree) -> PyTree:
        program = trace(fn, jax.tree.map(_whole, tree, is_leaf=_is_slices), *args)
        values = program.flatten(tree, *args)
        apart = [str(i) if _is_slices(value) else None for i, value in enumerate(values)]
        claims = {at: Claim(partial(_in_turn, eqn)) for at, (eqn, _) in _loops(program, apart).items()}
        return evaluate(program, claims, values, to_array=_array).out

    return written_out


def _is_slices(x: object) -> bool:
    return isinstance(x, Slices)


def _whole(x: Any) -> Any:
    if not _is_slices(x):
        return x
    one = shape_like(x.layers[0])
    return jax.ShapeDtypeStruct(x.shape, one.dtype)


def _loops(
    program: Program, names: Sequence[str | None]
) -> dict[Location, tuple[core.JaxprEqn, tuple[str | None, ...]]]:
    """The scans that step over inputs as they are, and the name of each that they step over; None of all else.

    Args:
      program: where they are.
      names: of its inputs, the first ones.
    """
    found: dict[Location, tuple[core.JaxprEqn, tuple[str | None, ...]]] = {}

    def equation(eqn: core.JaxprEqn, at: Location, values: list[str | None]) -> list[str | None]:
        if eqn.primitive.name == "scan":
            parts = nested.scan_parts(eqn)
            over = tuple(values[parts.consts + parts.carry :])
            if any(name is not None for name in over):
                found[at] = eqn, over
        elif eqn.primitive.name not in CUSTOM_RULE and (body := nested.call_body(eqn)) is not None:
            return walk.run(body, values, equation, constant=_nameless, at=(*at, "call"))
        return [None] * len(eqn.outvars)

    inputs = [*names, *[None] * (len(program.jaxpr.jaxpr.invars) - len(names))]
    walk.run(program.jaxpr, inputs, equation, constant=_nameless)
    return found


def _nameless(value: jax.Array) -> None:
    return None


def _in_turn(eqn: core.JaxprEqn, *values: Any) -> list[jax.Array]:
    """The results of a scan, one step after the other."""
    parts = nested.scan_parts(eqn)
    split = parts.consts + parts.carry
    consts, carry = ([_array(x) for x in some] for some in (values[: parts.consts], values[parts.consts : split]))
    made: dict[int, Sequence[jax.Array]] = {}
    steps = range(parts.length)
    for i in reversed(steps) if parts.reverse else steps:
        slices = [x.layers[i] if _is_slices(x) else x[i] for x in values[split:]]
        results = jax.core.eval_jaxpr(parts.body.jaxpr, parts.body.consts, *consts, *carry, *slices)
        carry, made[i] = list(results[: parts.carry]), results[parts.carry :]
    return [*carry, *(jnp.stack(ys) for ys in zip(*(made[i] for i in steps), strict=True))]


def _array(x: Any) -> jax.Array:
    return x.dense() if _is_slices(x) else x
