"""Affine chains: what follows a dot or convolution and only scales and shifts each of its output channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax.extend import core

from jaxcomp.core.roles import BATCH, OUTPUT
from jaxcomp.trace import nested
from jaxcomp.trace.flow import Op
from jaxcomp.trace.nested import Closed
from jaxcomp.trace.primitives import AFFINE, ELEMENTWISE, RELAID, REMAT
from jaxcomp.trace.program import Program
from jaxcomp.trace.provenance import MOVES
from jaxcomp.trace.sites import Site, sites_of
from jaxcomp.trace.tags import Origin
from jaxcomp.trace.walk import Location, aval_of, shape_of


@dataclass(frozen=True)
class Step:
    """One equation of a chain: operand ``index`` is the chain's value; ``moves`` it only, or computes on it."""

    op: Op
    index: int
    moves: bool


@dataclass(frozen=True)
class Chain:
    """A product and the affine equations after it.

    Attributes:
      site: the product; its weight is a whole leaf.
      op: the product's equation.
      channels: pairs of (axis of the product's result, axis of the weight operand), in the order of the former.
      steps: the equations after it, in order; the last one computes.
      axes: where the channels lie in the last step's result.
    """

    site: Site
    op: Op
    channels: tuple[tuple[int, int], ...]
    steps: tuple[Step, ...]
    axes: tuple[int, ...]

    @property
    def params(self) -> frozenset[str]:
        """The leaves that the chain's coefficients are made of."""
        return frozenset().union(*(tag.params for step in self.steps for tag in step.op.tags))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one coefficient, all layers together."""
        return (*self.site.layer_steps, *(self.site.out_shape[y] for y, _ in self.channels))


def find_chains(program: Program) -> tuple[Chain, ...]:
    """The affine chains of a program whose jits are inlined; a layer's bias alone is no chain."""
    levels: dict[Location, _Level] = {}
    ops = {op.location: op for op in program.flow.ops}
    for op in program.flow.ops:
        levels.setdefault(op.location[:-1], _Level(program, ops, op.location[:-1])).add(op)
    found = []
    for site in sites_of(program):
        op = ops[site.location]
        if _foldable(site, op):
            chain = _follow(site, op, levels[site.location[:-1]])
            if chain is not None:
                found.append(chain)
    return tuple(found)


def _foldable(site: Site, op: Op) -> bool:
    """The product runs at every step, and its weight is a whole leaf with one slice for each layer around."""
    if site.kind == "embed" or len(site.activations) != 1 or op.eqn.params.get("batch_group_count", 1) != 1:
        return False
    if not set(op.inside) <= {"scan", *REMAT} or site.weight is None:
        return False
    origin = op.tags[site.weight].origin
    if origin is None or not (origin.whole and origin.exact):
        return False
    split = sum(map(len, origin.axes)) != len({a for axes in origin.axes for a in axes})
    return not split and tuple(origin.shape[a] for a in origin.stacked) == site.layer_steps


class _Level:
    """The equations of one jaxpr: who makes and who uses each value."""

    def __init__(self, program: Program, ops: dict[Location, Op], at: Location) -> None:
        self.users: dict[core.Var, list[Op]] = {}
        self.makers: dict[core.Var, Op] = {}
        part = _part(program, ops, at)
        results = part.jaxpr.outvars if part is not None else ()
        self.outputs = {v for v in results if not isinstance(v, core.Literal)}

    def add(self, op: Op) -> None:
        for v in op.eqn.invars:
            if not isinstance(v, core.Literal):
                self.users.setdefault(v, []).append(op)
        self.makers |= dict.fromkeys(op.eqn.outvars, op)

    def varying(self, v: core.Var | core.Literal) -> set[int]:
        """Axes along which a value may change."""
        if isinstance(v, core.Literal):
            return set()
        wide = {i for i, size in enumerate(shape_of(v)) if size != 1}
        op = self.makers.get(v)
        if op is not None and op.name == "broadcast_in_dim":
            inner = self.varying(op.eqn.invars[0])
            return wide & {op.eqn.params["broadcast_dimensions"][i] for i in inner}
        if op is not None and (op.name in ELEMENTWISE or op.name == "convert_element_type"):
            operands = [u for u in op.eqn.invars if not isinstance(u, core.Literal)]
            return wide & set().union(*(self.varying(u) for u in operands if shape_of(u)))
        return wide


def _part(program: Program, ops: dict[Location, Op], at: Location) -> Closed | None:
    """The jaxpr at a location prefix; None inside loops and branches that may not run."""
    if not at:
        return program.jaxpr
    eqn = ops[at[:-1]].eqn
    return nested.scan_parts(eqn).body if eqn.primitive.name == "scan" else nested.call_body(eqn)


def _follow(site: Site, op: Op, level: _Level) -> Chain | None:
    """Walks from the product's result along its only user, as long as that is affine by channel."""
    channels = _channels(op, site)
    value = op.eqn.outvars[0]
    steps: list[Step] = []
    ends: tuple[int, tuple[int, ...]] = (0, ())
    shape = site.out_shape
    where = Origin("", shape, site.out_dtype, tuple((i,) for i in range(len(shape))))
    while len(level.users.get(value, ())) == 1 and value not in level.outputs:
        (user,) = level.users[value]
        index = next(i for i, v in enumerate(user.eqn.invars) if v is value)
        moved = _moved(user, where)
        if moved is None and not _computes(user, index, where, {y for y, _ in channels}, level):
            break
        steps.append(Step(user, index, moved is not None))
        where, value = moved or where, user.eqn.outvars[0]
        # A split axis stands twice, and neither half has a place for each channel.
        axes = tuple(where.axes.index((y,)) if where.axes.count((y,)) == 1 else -1 for y, _ in channels)
        if moved is None and -1 not in axes:
            ends = (len(steps), axes)
    kept = tuple(steps[: ends[0]])
    if not kept or _is_bias_alone(kept):
        return None
    return Chain(site, op, channels, kept, ends[1])


def _channels(op: Op, site: Site) -> tuple[tuple[int, int], ...]:
    """Where the weight's free axes lie in the product's result."""
    p, weight = op.eqn.params, site.weight
    assert weight is not None
    if site.kind == "conv":
        return ((p["dimension_numbers"].out_spec[1], p["dimension_numbers"].rhs_spec[0]),)
    _, batch = p["dimension_numbers"]
    free = [[i for i, r in enumerate(o.roles) if r == OUTPUT] for o in site.operands]
    first = len(batch[0]) + (len(free[0]) if weight == 1 else 0)
    assert all(site.operands[weight].roles[i] == BATCH for i in batch[weight])
    return (*enumerate(batch[weight]), *enumerate(free[weight], first))


def _moved(user: Op, where: Origin) -> Origin | None:
    """Where the product's axes lie after a layout or a cast between floats; None if it is neither."""
    before, after = aval_of(user.eqn.invars[0]), aval_of(user.eqn.outvars[0])
    if user.name == "convert_element_type":
        floats = all(jnp.issubdtype(a.dtype, jnp.floating) for a in (before, after))
        return where if floats else None
    if user.name in RELAID and math.prod(before.shape) == math.prod(after.shape):
        return MOVES[user.name](user.eqn, where)
    return None


def _computes(user: Op, index: int, where: Origin, channels: set[int], level: _Level) -> bool:
    """Whether ``user`` scales or shifts the channels by what parameters alone make."""
    operands = user.eqn.invars
    if user.name not in AFFINE or (user.name == "div" and index == 1):
        return False
    if shape_of(operands[index]) != shape_of(user.eqn.outvars[0]):
        return False
    for i, v in enumerate(operands):
        if i == index:
            continue
        if v is operands[index] or user.tags[i].args:
            return False
        spread = [where.axes[axis] for axis in level.varying(v)]
        if any(len(axes) != 1 or axes[0] not in channels for axes in spread):
            return False
        if any(where.axes.count(axes) != 1 for axes in spread):
            return False
    return True


def _is_bias_alone(steps: tuple[Step, ...]) -> bool:
    """The chain is just what a layer with a bias does."""
    computing = [step for step in steps if not step.moves]
    if len(computing) != 1 or computing[0].op.name != "add":
        return False
    origin = computing[0].op.tags[1 - computing[0].index].origin
    return origin is not None and origin.exact
