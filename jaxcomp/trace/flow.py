"""One walk over a program: every equation, where it is, in which loops, and what its operands are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import jax
from jax.extend import core

from jaxcomp.trace import nested, walk
from jaxcomp.trace.provenance import out_tags
from jaxcomp.trace.tags import ACTIVATION, CONSTANT, Origin, Tag, joined
from jaxcomp.trace.walk import Location, Value


@dataclass(frozen=True)
class Loop:
    """A loop around an equation.

    Attributes:
      location: the ``scan`` or ``while`` equation, or the ``shard_map`` that runs it on each of several devices.
      length: its number of steps, or of devices; None where it is not known before the run.
      layers: it is a scan over stacked parameters, one layer a step.
    """

    location: Location
    length: int | None
    layers: bool


@dataclass(frozen=True, eq=False)
class Op:
    """An equation in its place.

    Attributes:
      eqn: the JAX equation: ``eqn.primitive.name``, ``eqn.params``, ``eqn.invars[i].aval``.
      location: unique in the program; the key of a claim.
      tags: where each operand comes from.
      scope: the enclosing ``jax.named_scope`` names (Flax's module names), "/"-joined.
      loops: the loops around it, outermost first.
      inside: names of the primitives around it, outermost first ("jit", "shard_map", "while_cond", …).
      rest: values of its last operands, where they are given already.
    """

    eqn: core.JaxprEqn
    location: Location
    tags: tuple[Tag, ...]
    scope: str
    loops: tuple[Loop, ...]
    inside: tuple[str, ...]
    rest: tuple[Value, ...] = ()

    @property
    def name(self) -> str:
        """The primitive's name."""
        return str(self.eqn.primitive.name)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The operands' shapes, as traced."""
        return tuple(map(walk.shape_of, self.eqn.invars))

    @property
    def opaque(self) -> bool:
        """Whether it does heavy work that nothing here reads."""
        return nested.is_opaque(self.eqn)

    @property
    def layer_steps(self) -> tuple[int, ...]:
        """Lengths of the scans over stacked parameters around it: the leading axes of its side input and emissions."""
        return tuple(loop.length for loop in self.loops if loop.layers and loop.length is not None)

    @property
    def steps(self) -> int:
        """How often it runs, on all devices of a ``shard_map`` together; a ``while`` of unknown length counts once."""
        product = 1
        for loop in self.loops:
            product *= 1 if loop.length is None else loop.length
        return product

    def bind(self, *values: Value, **params: object) -> list[jax.Array]:
        """Runs this equation on ``values``, with some of its parameters replaced; gives the list of its results."""
        return nested.bind(self.eqn, (*values, *self.rest), params)

    def given(self, *rest: Value) -> Self:
        """The same equation with its last operands given: ``bind`` takes those before them.

        So a product has two operands, also one that is told the sizes of its groups.
        """
        return replace(self, rest=rest)


@dataclass(frozen=True)
class Flow:
    """The equations of a program in order, and the tags of its results."""

    ops: tuple[Op, ...]
    out_tags: tuple[Tag, ...]


def flow(jaxpr: core.ClosedJaxpr, param_paths: Sequence[str]) -> Flow:
    """Walks a program: every equation, also those inside jit, remat, scan, while, cond and custom rules.

    ``param_paths`` name the first inputs of ``jaxpr``; the others are arguments.

    >>> import jax, jax.numpy as jnp
    >>> jaxpr = jax.make_jaxpr(lambda w, x: jax.jit(jnp.dot)(x, w.T))(jnp.ones((4, 3)), jnp.ones((2, 3)))
    >>> for op in flow(jaxpr, ["w"]).ops:
    ...     print(op.location, op.name, [t.origin and (t.origin.path, t.origin.axes) for t in op.tags])
    (0,) transpose [('w', ((0,), (1,)))]
    (1,) jit [None, ('w', ((1,), (0,)))]
    (1, 'call', 0) dot_general [None, ('w', ((1,), (0,)))]
    """
    tags = [leaf_tag(path, aval) for path, aval in zip(param_paths, jaxpr.in_avals, strict=False)]
    tags += [ACTIVATION] * (len(jaxpr.in_avals) - len(tags))
    ops: list[Op] = []
    results = _run(jaxpr, tags, _Place((), "", (), ()), ops.append)
    return Flow(tuple(ops), tuple(results))


def leaf_tag(path: str, aval: jax.core.ShapedArray) -> Tag:
    """The tag of a parameter leaf itself."""
    axes = tuple((i,) for i in range(len(aval.shape)))
    return Tag(params=frozenset({path}), origin=Origin(path, tuple(aval.shape), str(aval.dtype), axes))


@dataclass(frozen=True)
class _Place:
    location: Location
    scope: str
    loops: tuple[Loop, ...]
    inside: tuple[str, ...]

    def into(self, op: Op, part: str, *, name: str = "", loop: Loop | None = None) -> _Place:
        loops = (*self.loops, loop) if loop else self.loops
        return _Place((*op.location, part), op.scope, loops, (*self.inside, name or op.name))


Visit = Callable[[Op], None]


def _ignore(op: Op) -> None:
    """Visits nothing: for the passes that look for a loop's fixed point."""


def _run(jaxpr: nested.Closed, tags: Sequence[Tag], place: _Place, visit: Visit) -> list[Tag]:
    """The tags of a jaxpr's results; every equation in it, and in those inside it, is visited."""

    def equation(eqn: core.JaxprEqn, location: Location, operands: list[Tag]) -> list[Tag]:
        scope = "/".join(s for s in (place.scope, str(eqn.source_info.name_stack)) if s)
        op = Op(eqn, location, tuple(operands), scope, place.loops, place.inside)
        visit(op)
        return _results(op, place, visit)

    return walk.run(jaxpr, tags, equation, constant=lambda _: CONSTANT, at=place.location)


def _results(op: Op, place: _Place, visit: Visit) -> list[Tag]:
    match op.name:
        case "scan":
            return _scan(op, place, visit)
        case "while":
            return _while(op, place, visit)
        case "cond":
            return _cond(op, place, visit)
        case "shard_map":
            return _shard_map(op, place, visit)
    body = nested.call_body(op.eqn)
    if body is not None:
        return _run(body, op.tags, place.into(op, "call"), visit)
    return out_tags(op.eqn, op.tags)


def _scan(op: Op, place: _Place, visit: Visit) -> list[Tag]:
    parts = nested.scan_parts(op.eqn)
    split = parts.consts + parts.carry
    consts, carry, xs = op.tags[: parts.consts], list(op.tags[parts.consts : split]), op.tags[split:]
    loop = Loop(op.location, parts.length, any(t.is_weight for t in xs))
    inner = place.into(op, "body", loop=loop)
    steps = [_one_step(t) for t in xs]

    def body(carried: list[Tag], seen: Visit) -> list[Tag]:
        return _run(parts.body, [*consts, *carried, *steps], inner, seen)

    carry = _fixed_point(lambda c: body(c, _ignore)[: parts.carry], carry)
    results = body(carry, visit)
    return [*carry, *(replace(t, origin=None) for t in results[parts.carry :])]


def _while(op: Op, place: _Place, visit: Visit) -> list[Tag]:
    parts = nested.while_parts(op.eqn)
    split = parts.cond_consts + parts.body_consts
    cond_consts, body_consts = op.tags[: parts.cond_consts], op.tags[parts.cond_consts : split]
    loop = Loop(op.location, None, False)
    body_at = place.into(op, "body", loop=loop)
    cond_at = place.into(op, "cond", name="while_cond", loop=loop)

    def body(carried: list[Tag]) -> list[Tag]:
        return _run(parts.body, [*body_consts, *carried], body_at, _ignore)

    carry = _fixed_point(body, list(op.tags[split:]))
    (proceed,) = _run(parts.cond, [*cond_consts, *carry], cond_at, visit)
    _run(parts.body, [*body_consts, *carry], body_at, visit)
    before, after = parts.body.jaxpr.invars[parts.body_consts :], parts.body.jaxpr.outvars
    kept = [a is b for a, b in zip(before, after, strict=True)]
    return [t if same or not proceed.args else ACTIVATION for t, same in zip(carry, kept, strict=True)]


def _cond(op: Op, place: _Place, visit: Visit) -> list[Tag]:
    choice, *operands = op.tags
    results = [
        _run(branch, operands, place.into(op, f"branch{i}"), visit) for i, branch in enumerate(nested.branches(op.eqn))
    ]
    merged = results[0]
    for other in results[1:]:
        merged = [joined(a, b) for a, b in zip(merged, other, strict=True)]
    return [joined(t, replace(t, args=True)) if choice.args else t for t in merged]


def _shard_map(op: Op, place: _Place, visit: Visit) -> list[Tag]:
    """What each device does: read, with the shapes of its shards, and never rewritten."""
    p = op.eqn.params
    body = nested.closed(p["jaxpr"])
    devices = math.prod(p["mesh"].shape[axis] for axis in p["newly_manual_axes"])
    shards = [
        t if t.origin is None or walk.shape_of(whole) == walk.shape_of(part) else replace(t, origin=t.origin.sliced())
        for t, whole, part in zip(op.tags, op.eqn.invars, body.jaxpr.invars, strict=True)
    ]
    results = _run(body, shards, place.into(op, "shard", loop=Loop(op.location, devices, False)), visit)
    return [replace(t, origin=None) for t in results]


def _one_step(tag: Tag) -> Tag:
    """The tag of one step's slice of a scanned value."""
    return tag if tag.origin is None else replace(tag, origin=tag.origin.one_of(0))


def _fixed_point(step: Callable[[list[Tag]], list[Tag]], carry: list[Tag]) -> list[Tag]:
    """The tags that a loop's carry has at every step."""
    while True:
        after = [joined(a, b) for a, b in zip(carry, step(carry), strict=True)]
        if after == carry:
            return carry
        carry = after
