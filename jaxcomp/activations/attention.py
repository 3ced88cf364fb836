"""Attention, as a program has it.

A product of two activations, a function of its rows and a product of these with another activation, and nothing else
reads what is between: softmax with whatever scales, masks and biases the scores, in whatever order of axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from jax.extend import core

from jaxcomp.activations.planning import Planned
from jaxcomp.activations.regions import MOST, Region, beside_of, is_known_float, refusal
from jaxcomp.activations.specs import Act
from jaxcomp.kernels.llvm_float_attention import How, Lay
from jaxcomp.trace.flow import Op
from jaxcomp.trace.levels import Level
from jaxcomp.trace.primitives import BARRED, ELEMENTWISE, RELAID
from jaxcomp.trace.products import axes_by_use, dot_numbers
from jaxcomp.trace.rowwise import Axes, RowReading, resized, sized, varies
from jaxcomp.trace.walk import Location, shape_of


def attentions(planned: Mapping[Location, Planned], levels: Mapping[Location, Level], *, integer: bool) -> list[Region]:
    """Those of a program.

    Args:
      planned: its sites.
      levels: its equations.
      integer: whether products run on integers.
    """
    sites = {at: p for at, p in planned.items() if _may_be(p, integer=integer)}
    found = (_followed(p.op, levels[at[:-1]], sites) for at, p in sites.items())
    return [region for region in found if region is not None]


def _may_be(p: Planned, *, integer: bool) -> bool:
    """Whether it is a product of two activations, that no rule quantizes, or to integers."""
    if p.op.name != "dot_general" or p.site.weight is not None or not BARRED.isdisjoint(p.site.inside):
        return False
    return p.act is None or (integer and isinstance(p.act, Act))


def _followed(op: Op, level: Level, sites: Mapping[Location, Planned]) -> Region | None:
    """What begins with a product; None where that is no attention."""
    scores = op.eqn.outvars[0]
    if not level.known or not is_known_float(scores):
        return None
    reading, ops, last = RowReading(scores, level.constant), [op], None
    waiting = level.readers(scores)
    for _ in range(MOST):
        if not waiting:
            break
        op = waiting.pop(min(waiting))
        if op.location in sites:
            if waiting or last is not None:
                return None
            last = op
            continue
        if last is not None or not reading.read(op.eqn) or not level.outputs.isdisjoint(op.eqn.outvars):
            return None
        ops.append(op)
        waiting |= level.readers(*op.eqn.outvars)
    if waiting or last is None or reading.along is None or scores in level.outputs:
        return None
    return _whole([*ops, last], reading, level)


class _Use(NamedTuple):
    """A product's operand and result: the axes of the operand by those of the result, and the axis summed over."""

    axes: dict[int, int]
    summed: int


def _used(op: Op, side: int) -> _Use | None:
    """How a product uses an operand; None if it sums over several axes, or none."""
    ranks = [len(shape_of(v)) for v in op.eqn.invars[:2]]
    numbers = dot_numbers(op.eqn)
    shared, kept, summed = axes_by_use(numbers, side, ranks[side])
    if len(summed) != 1:
        return None
    before = len(shared) + (len(axes_by_use(numbers, 0, ranks[0])[1]) if side else 0)
    places = {**dict(enumerate(shared)), **{before + i: axis for i, axis in enumerate(kept)}}
    return _Use(places, summed[0])


def _whole(ops: list[Op], reading: RowReading, level: Level) -> Region | None:
    """What these equations are, the first and the last of which are products."""
    first, last = ops[0].eqn, ops[-1].eqn
    operands = [v for eqn in (first, last) for v in eqn.invars if _is_float(v)]
    uses = [use for op in (ops[0], ops[-1]) for side in (0, 1) if (use := _used(op, side)) is not None]
    sides = [side for side, v in enumerate(operands[2:]) if reading.has(v)]
    (scores,), keys = first.outvars, reading.along
    if len(operands) < 4 or len(uses) < 4 or len(sides) != 1 or keys is None or not is_known_float(last.outvars[0]):
        return None
    side = sides[0]
    weights, values = operands[2 + side], operands[3 - side]
    along, shape, made, used = reading.axes(weights), shape_of(scores), uses[2 + side], uses[3 - side]
    of_keys = [i for i in (0, 1) if keys in uses[i].axes]
    if along[made.summed] != keys or _kept(along) != _kept(reading.axes(scores)) or len(of_keys) != 1:
        return None
    places = {place: along[axis] for place, axis in made.axes.items()}  # of the result, axes of the scores
    features = [i for i, axis in used.axes.items() if i not in places and shape_of(values)[axis] != 1]
    of_values: dict[Any, int] = {places[i]: axis for i, axis in used.axes.items() if i in places} | {keys: used.summed}
    of_result = {axis: place for place, axis in places.items()}
    k, q = of_keys[0], 1 - of_keys[0]
    shared = {keys, *uses[k].axes, *of_values}
    queries = [i for i, n in enumerate(shape) if n != 1 and i not in shared]
    function, beside = reading.of(weights), beside_of(reading, level)
    varying = varies(function, beside, keys)
    if len(features) != 1 or not queries or not varying[-1]:
        return None
    how = How(
        sizes=shape,
        keys=keys,
        queries=max(queries, key=lambda i: shape[i]),
        q=_laid(uses[q].axes, uses[q].summed, shape, _order(operands[q], level)),
        k=_laid(uses[k].axes, uses[k].summed, shape, _order(operands[k], level)),
        v=_laid(of_values, used.axes[features[0]], shape, _order(values, level)),
        result=_laid(of_result, features[0], shape, _wanted_order(last.outvars[0], level)),
        function=function,
        varying=tuple(varying),
        beside=tuple(one.axes for one in beside),
    )
    given = operands[q], operands[k], values, *(one.value for one in beside)
    return None if refusal(how, given) else Region(tuple(ops), given, how, sides=(q, k, 1 - side))


def _is_float(v: core.Var | core.Literal) -> TypeGuard[core.Var]:
    return isinstance(v, core.Var) and is_known_float(v)


def _kept(axes: Axes) -> set[int]:
    return {axis for axis in axes if axis is not None}


def _order(v: core.Var, level: Level) -> list[int]:
    """The axes of a value, the slowest first, as those lie of what it was transposed from."""
    places, rank = sized(shape_of(v)), len(shape_of(v))
    while (op := level.makers.get(v)) is not None:
        operand = op.eqn.invars[0] if op.name in RELAID else _alike(op, v)
        if not isinstance(operand, core.Var):
            break
        before = _before(op, places, operand) if op.name in RELAID else places
        if before is None:
            break
        places, v = before, operand
    return _by_place(places, rank)


def _wanted_order(v: core.Var, level: Level) -> list[int]:
    """The axes of a value, the slowest first, as those lie of what it is transposed to."""
    places, rank = sized(shape_of(v)), len(shape_of(v))
    while (op := level.only_user(v)) is not None and op.name in RELAID:
        result = op.eqn.outvars[0]
        if op.name == "transpose":
            places = tuple(places[int(i)] for i in op.eqn.params["permutation"])
        else:
            after = resized(places, shape_of(v), shape_of(result))
            if after is None:
                break
            places = after
        v = result
    return _by_place(places, rank)


def _before(op: Op, places: Axes, operand: core.Var) -> Axes | None:
    """Those of an operand, of what was made of it."""
    if op.name == "transpose":
        permutation = [int(i) for i in op.eqn.params["permutation"]]
        return tuple(places[permutation.index(i)] for i in range(len(places)))
    return resized(places, shape_of(op.eqn.outvars[0]), shape_of(operand))


def _by_place(places: Axes, rank: int) -> list[int]:
    """All axes in the order of these; those of size 1 first."""
    found = [i for i in places if i is not None]
    return [*(i for i in range(rank) if i not in found), *found]


def _alike(op: Op, v: core.Var) -> core.Var | None:
    """The operand of an operation on each number, if it is the only one of the shape."""
    if op.name not in ELEMENTWISE:
        return None
    found = [u for u in op.eqn.invars if isinstance(u, core.Var) and shape_of(u) == shape_of(v)]
    return found[0] if len(found) == 1 else None


def _laid(axes: Mapping[Any, int], width: int, scores: Sequence[int], order: Sequence[int]) -> Lay:
    """Features last."""
    found = tuple(axes.get(i) if n != 1 else None for i, n in enumerate(scores))
    return Lay(found, width, (*(axis for axis in order if axis != width), width))
