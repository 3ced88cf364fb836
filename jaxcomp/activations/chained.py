"""Values made of the sums of a product of codes alone that become codes again: what is known of them on their way.

Between the product and the next one, which rounds them, stand a bias and a function of each number at most, and nothing
else reads them. A backend may then make the codes right where it has the sums, and nobody asks for the floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxcomp.activations.coded_rows import OfRows
from jaxcomp.activations.coded_sums import CodedSums, features_of
from jaxcomp.activations.planning import Planned
from jaxcomp.activations.specs import Act, Static
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.levels import Level, levels_of
from jaxcomp.trace.pointwise import Pointwise, Reading, gives_numbers
from jaxcomp.trace.primitives import BARRED
from jaxcomp.trace.program import Program
from jaxcomp.trace.walk import Location, Value, shape_of

MOST = 64
"""Equations between two products."""


@partial(jax.tree_util.register_dataclass, data_fields=["sums", "bias"], meta_fields=["then"])
@dataclass(frozen=True)
class Chained:
    """A value that is ``then(sums * scale + bias)``.

    Attributes:
      sums: of the product, and their scale.
      bias: one a feature, or None.
      then: a function of each number, static.
    """

    sums: CodedSums
    bias: jax.Array | None
    then: Pointwise


class Link(NamedTuple):
    """What stands between a product and the next one.

    Attributes:
      start: the product.
      bias: the equation that adds a bias, if there is one.
      side: which operand of it that is.
      features: the axes that it varies along.
      then: the function behind it.
      end: the equation that makes what the next product rounds.
    """

    start: Op
    bias: Op | None
    side: int
    features: tuple[int, ...]
    then: Pointwise
    end: Op


Links = Mapping[Location, Link]
"""By where they start."""


@dataclass(frozen=True)
class Made:
    """What is known of the values of one call."""

    links: Links
    _sums: dict[Location, CodedSums | None] = field(default_factory=dict)
    _bias: dict[Location, jax.Array] = field(default_factory=dict)
    _known: dict[int, tuple[jax.Array, Chained | OfRows]] = field(default_factory=dict)  # what is kept keeps its id

    def begin(self, at: Location, sums: CodedSums | None, y: jax.Array) -> None:
        """Learns the sums of a product where a link starts, and what it gave."""
        self._sums[at] = sums
        self._bias.pop(at, None)
        self.passed(self.links[at], at, y)

    def passed(self, link: Link, at: Location, y: jax.Array, *operands: jax.Array) -> None:
        """Learns what an equation of a link gave."""
        start = link.start.location
        if link.bias is not None and at == link.bias.location:
            bias = operands[link.side]
            first = tuple(slice(None) if i in link.features else 0 for i in range(bias.ndim))
            self._bias[start] = jnp.broadcast_to(bias[first], [y.shape[i] for i in link.features]).reshape(-1)
        if at != link.end.location:
            return
        sums, found = self._sums.get(start), self._bias.get(start)
        if sums is not None and (found is None) == (link.bias is None):
            self.learn(y, Chained(sums, found, link.then))

    def learn(self, y: jax.Array, how: Chained | OfRows) -> None:
        """How a value is made."""
        if isinstance(y, jax.core.Tracer) and y.dtype == jnp.float32:
            self._known[id(y)] = y, how

    def of(self, value: jax.Array) -> Chained | OfRows | None:
        """How a value is made, if that is known."""
        found = self._known.get(id(value))
        return None if found is None else found[1]


def links_of(program: Program, planned: Iterable[Planned]) -> Links:
    """The links of a program: from one product to another, both of activations of ranges that are given."""
    by_place = {p.site.location: p for p in planned if _is_static(p) and BARRED.isdisjoint(p.site.inside)}
    levels = levels_of(program) if by_place else {}
    found = (_followed(p.op, levels[at[:-1]], by_place) for at, p in by_place.items() if _starts(p))
    return {link.start.location: link for link in found if link is not None}


def _is_static(p: Planned) -> bool:
    return isinstance(p.act, Act) and isinstance(p.act.range, Static)


def _starts(p: Planned) -> bool:
    return p.site.weight == 1 and p.op.name in ("conv_general_dilated", "dot_general")


def _followed(op: Op, level: Level, sites: Mapping[Location, Planned]) -> Link | None:
    """What stands behind a product until the next rounds it; None where that is another way."""
    value, features = op.eqn.outvars[0], features_of(op)
    bias, side, user = None, 0, level.only_user(value)
    if user is not None and user.name == "add":
        side = next(1 - i for i, v in enumerate(user.eqn.invars) if v is value)
        if _is_bias(user.eqn.invars[side], value, features, level):
            bias, value = user, user.eqn.outvars[0]
    found = _function(value, level, sites)
    if found is None:
        return None
    then, last = found
    return Link(op, bias, side, features, then, level.makers[last])


def _is_bias(v: core.Var | core.Literal, of: core.Var, features: tuple[int, ...], level: Level) -> bool:
    """Whether a value has one number a feature."""
    return len(shape_of(v)) == len(shape_of(of)) and level.varying(v) <= set(features)


def _function(value: core.Var, level: Level, sites: Mapping[Location, Planned]) -> tuple[Pointwise, core.Var] | None:
    """The function of each number that makes of a value what alone is rounded next, and that; None if none does."""
    reading = Reading(value, level.constant)
    ends: list[core.Var] = []
    waiting = level.readers(value)
    for _ in range(MOST):
        if not waiting or not level.known or value in level.outputs:
            break
        op = waiting.pop(min(waiting))
        if (reader := sites.get(op.location)) is not None:
            operands = (op.eqn.invars[i] for i in reader.site.activations)
            ends += [v for v in operands if isinstance(v, core.Var) and reading.has(v)]
            continue
        if not reading.read(op.eqn) or not level.outputs.isdisjoint(op.eqn.outvars):
            return None
        waiting |= level.readers(*op.eqn.outvars)
    if waiting or len(ends) != 1 or level.only_user(ends[0]) is None:
        return None
    then = reading.of(ends[0])
    return (then, ends[0]) if gives_numbers(then) else None


def claims_of(made: Made, to_array: Callable[[Value], jax.Array]) -> dict[Location, Claim]:
    """Claims on the equations that add a bias, or end a link: they are done as ever, and what they give is known."""

    def run(link: Link, op: Op, *values: Value) -> list[jax.Array]:
        arrays = [to_array(v) for v in values]
        (y,) = op.bind(*arrays)
        made.passed(link, op.location, y, *arrays)
        return [y]

    every = ((link, op) for link in made.links.values() for op in (link.bias, link.end))
    return {op.location: Claim(partial(run, link, op)) for link, op in every if op is not None and op != link.start}
