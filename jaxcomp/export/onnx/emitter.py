"""The interpreter: walks the traced program, runs what is known now, and has rules write what is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util

from jaxcomp.activations.codes import LAYOUT, moved
from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.registry import RULES, Step
from jaxcomp.export.onnx.values import Coded, Const, Dims, Tensor, Value, is_static
from jaxcomp.trace import nested, walk
from jaxcomp.trace.flow import Op
from jaxcomp.trace.nested import Closed
from jaxcomp.trace.primitives import CONTROL, ELEMENTWISE, PASSES, SEALED, UNCHANGED
from jaxcomp.trace.walk import Location

Sited = Callable[[Step], Value | None]
"""Writes the product of a site; None leaves it to the primitive's rule."""
TAKE_CODES = frozenset({"dot_general", "conv_general_dilated", "gather"}) | CONTROL
"""Primitives whose rules are given a weight in codes as it is."""


@dataclass(frozen=True)
class Emitter:
    """What writing one program needs.

    Attributes:
      ops: the program's equations by location.
      sites: who writes the product at a location instead of its rule.
    """

    ops: Mapping[Location, Op]
    sites: Mapping[Location, Sited]

    def jaxpr(
        self, graph: Graph, jaxpr: Closed, values: Sequence[Value], at: Location, layers: tuple[int, ...] = ()
    ) -> list[Value]:
        """Writes a jaxpr; gives what its results are."""
        return walk.run(jaxpr, values, partial(self.equation, graph, layers), constant=Const.of, at=at)

    def equation(
        self, graph: Graph, layers: tuple[int, ...], eqn: core.JaxprEqn, at: Location, values: list[Value]
    ) -> Sequence[Value]:
        """Writes one equation, or runs it."""
        results = self._written(graph, layers, eqn, at, values)
        graph.ranks |= {v.name: len(v.shape) for v in results if isinstance(v, Tensor)}
        return results

    def _written(
        self, graph: Graph, layers: tuple[int, ...], eqn: core.JaxprEqn, at: Location, values: list[Value]
    ) -> Sequence[Value]:
        name = str(eqn.primitive.name)
        graph.source = source_info_util.summarize(eqn.source_info) or graph.source
        body = nested.call_body(eqn)
        if body is not None:
            return self.jaxpr(graph, body, values, (*at, "call"), layers)
        if name in UNCHANGED or name in PASSES:
            return values
        found = known(eqn, values)
        if found is not None:
            return found
        if isinstance(values[0], Coded) and name in LAYOUT and not any(isinstance(v, Tensor) for v in values):
            return self._moved(eqn, at, values)
        if name not in TAKE_CODES:
            values = [graph.array(v) for v in values]
            found = known(eqn, values)
            if found is not None:
                return found
        graph.scope = scope_of(self.ops[at]) if at in self.ops else graph.scope
        step = Step(graph, eqn, at, values, self.jaxpr, layers)
        if at in self.sites:
            written = self.sites[at](step)
            if written is not None:
                return [written]
        return self._by_rule(step)

    def _by_rule(self, step: Step) -> Sequence[Value]:
        rule = RULES.get(step.name)
        if rule is None:
            what = "nothing can look into it" if step.name in SEALED else "no rule says what it is in ONNX"
            step.refuse(
                what,
                "write this part of the function with other operations, leave it out of the export, or register a rule"
                f" with jaxcomp.export.onnx.registry.rule({step.name!r})",
            )
        written = rule(step)
        return [written] if isinstance(written, Const | Coded | Tensor) else written

    def _moved(self, eqn: core.JaxprEqn, at: Location, values: list[Value]) -> Sequence[Value]:
        """The results of a layout operation on codes."""
        rest = [jnp.asarray(v.full()) for v in values[1:] if isinstance(v, Const)]
        assert isinstance(values[0], Coded)
        results = moved(self.ops[at], values[0].codes, *rest)
        return [Const.of(r) if isinstance(r, jax.Array) else Coded(r) for r in results]


def scope_of(op: Op) -> str:
    """Where an equation stands, for people: a function that was evaluated anew has its scopes twice."""
    parts = op.scope.split("/")
    half = len(parts) // 2
    return "/".join(parts[:half] if parts[:half] == parts[half:] else parts)


def known(eqn: core.JaxprEqn, values: Sequence[Value]) -> list[Value] | None:
    """The results of an equation whose operands are known now, by running it; None of any other."""
    consts = [v for v in values if isinstance(v, Const)]
    if len(consts) < len(values):
        return None
    name = str(eqn.primitive.name)
    outs = [walk.aval_of(v) for v in eqn.outvars]
    if name == "broadcast_in_dim" and values:
        return [_broadcast(eqn, consts[0])]
    if name in ELEMENTWISE or name == "convert_element_type":
        return [_elementwise(eqn, consts, tuple(outs[0].shape))]
    shapes = [*(a.shape for a in outs), *(c.shape for c in consts), _numbers(eqn)]
    if not all(map(is_static, shapes)):
        return None
    results = nested.bind(eqn, [jnp.asarray(c.full()) for c in consts])
    return [Const.of(np.zeros((), bool) if r is None else r) for r in results]


def _numbers(eqn: core.JaxprEqn) -> list[object]:
    """What stands as a shape among an equation's parameters."""
    return [n for k in ("shape", "new_sizes", "slice_sizes", "limit_indices") for n in eqn.params.get(k) or ()]


def _broadcast(eqn: core.JaxprEqn, value: Const) -> Const:
    """A constant with new axes; axes that repeat one element stay of length 1."""
    shape = [1] * len(eqn.params["shape"])
    for i, at in enumerate(eqn.params["broadcast_dimensions"]):
        shape[at] = value.array.shape[i]
    return Const(value.array.reshape(shape), tuple(eqn.params["shape"]))


def _elementwise(eqn: core.JaxprEqn, values: Sequence[Const], shape: Dims) -> Const:
    """An elementwise equation on compact arrays, run on what they hold."""
    held = np.broadcast_shapes(*(v.array.shape for v in values))
    arrays = [jnp.asarray(np.broadcast_to(v.array, held) if v.shape else v.array) for v in values]
    result = eqn.primitive.bind(*arrays, **eqn.params)
    return Const(np.asarray(result), shape)
