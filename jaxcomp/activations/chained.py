"""Values made of the sums of a convolution alone that become codes again: what is known of them on their way.

Between the convolution and the product that rounds them stand a bias and clamps at most, and nothing else reads them. A
backend may then make the codes right where it has the sums, and nobody asks for the floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcomp.activations.coded_convolutions import Convolved
from jaxcomp.activations.planning import Planned
from jaxcomp.activations.specs import Act, Static
from jaxcomp.trace.clamps import Ends, both, clamp_of
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.levels import Level, levels_of
from jaxcomp.trace.primitives import BARRED
from jaxcomp.trace.program import Program
from jaxcomp.trace.walk import Location, Value, shape_of


@partial(jax.tree_util.register_dataclass, data_fields=["sums", "bias"], meta_fields=["clamp"])
@dataclass(frozen=True)
class Chained:
    """A value that is ``clip(sums * scale + bias, *clamp)``.

    Attributes:
      sums: of the convolution, and their scale.
      bias: one a feature, or None.
      clamp: the lowest and the highest number, static.
    """

    sums: Convolved
    bias: jax.Array | None
    clamp: Ends


class Made:
    """What is known of the values of one call, by the values themselves."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[jax.Array, Chained]] = {}  # what is kept keeps its id

    def put(self, value: jax.Array, chained: Chained) -> None:
        """Learns how a value is made; one that is there already is not made again."""
        if isinstance(value, jax.core.Tracer) and value.dtype == jnp.float32:
            self._known[id(value)] = value, chained

    def of(self, value: jax.Array) -> Chained | None:
        """How it is made, if that is known."""
        found = self._known.get(id(value))
        return None if found is None else found[1]


class _Step(NamedTuple):
    """An equation: which operand the value is; the axis of its features, of one that adds a bias; or its clamp."""

    op: Op
    side: int
    axis: int
    clamp: Ends | None


class Links(NamedTuple):
    """The convolutions where chains begin, and the equations between."""

    starts: frozenset[Location]
    steps: Mapping[Location, _Step]


def links_of(program: Program, planned: Iterable[Planned]) -> Links:
    """The chains of a program: a convolution and a product, both of activations of ranges that are given."""
    by_place = {p.site.location: p for p in planned if _is_static(p) and BARRED.isdisjoint(p.site.inside)}
    starts: set[Location] = set()
    steps: dict[Location, _Step] = {}
    if any(p.site.kind == "conv" for p in by_place.values()):
        levels = levels_of(program)
        for at, p in by_place.items():
            if p.site.kind != "conv" or p.site.weight != 1:
                continue
            found = _followed(p.op, levels[at[:-1]], by_place)
            if found is not None:
                starts.add(at)
                steps |= {step.op.location: step for step in found}
    return Links(frozenset(starts), steps)


def _is_static(p: Planned) -> bool:
    return isinstance(p.act, Act) and isinstance(p.act.range, Static)


def _followed(op: Op, level: Level, sites: Mapping[Location, Planned]) -> list[_Step] | None:
    """The equations between a convolution and the product that rounds what it gives; None where that is another way."""
    axis, value = op.eqn.params["dimension_numbers"].out_spec[1], op.eqn.outvars[0]
    steps: list[_Step] = []
    while (user := level.only_user(value)) is not None:
        index = next(i for i, v in enumerate(user.eqn.invars) if v is value)
        if (reader := sites.get(user.location)) is not None:
            return steps if index in reader.site.activations else None
        clamp = clamp_of(user.eqn, index)
        if clamp is None and (steps or not _adds_bias(user, index, axis, level)):
            return None
        steps.append(_Step(user, index, axis, clamp))
        value = user.eqn.outvars[0]
    return None


def _adds_bias(op: Op, index: int, axis: int, level: Level) -> bool:
    """Whether an equation adds one number a feature to the value."""
    if op.name != "add" or shape_of(op.eqn.outvars[0]) != shape_of(op.eqn.invars[index]):
        return False
    other = op.eqn.invars[1 - index]
    return len(shape_of(other)) == len(shape_of(op.eqn.invars[index])) and level.varying(other) <= {axis}


def claims_of(links: Links, made: Made, to_array: Callable[[Value], jax.Array]) -> dict[Location, Claim]:
    """Claims on the equations between, which are done as ever; and what they give is known."""

    def run(step: _Step, *values: Value) -> list[jax.Array]:
        arrays = [to_array(v) for v in values]
        (y,) = step.op.bind(*arrays)
        before = made.of(arrays[step.side])
        if before is not None and step.clamp is None:
            made.put(y, replace(before, bias=_by_feature(arrays[1 - step.side], step.axis)))
        elif before is not None and step.clamp is not None:
            made.put(y, replace(before, clamp=both(before.clamp, step.clamp)))
        return [y]

    return {at: Claim(partial(run, step)) for at, step in links.steps.items()}


def _by_feature(bias: jax.Array, axis: int) -> jax.Array:
    first = tuple(slice(None) if i == axis else 0 for i in range(bias.ndim))
    return bias[first]
