"""Affine chains: what follows a dot or convolution and only scales and shifts each of its output channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend import core

from jaxcomp.core.roles import BATCH, OUTPUT
from jaxcomp.trace.flow import Op
from jaxcomp.trace.levels import Level, levels_of
from jaxcomp.trace.places import Places, relaid, whole
from jaxcomp.trace.primitives import AFFINE, RELAID, REMAT
from jaxcomp.trace.products import by_rows
from jaxcomp.trace.program import Program
from jaxcomp.trace.sites import Site, common_path, sites_of
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
      places: where the product's axes lie in the last step's result.
    """

    site: Site
    op: Op
    channels: tuple[tuple[int, int], ...]
    steps: tuple[Step, ...]
    places: Places

    @property
    def params(self) -> frozenset[str]:
        """The leaves that the chain's coefficients are made of."""
        return frozenset().union(*(tag.params for step in self.steps for tag in step.op.tags))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one coefficient, all layers together."""
        return (*self.site.layer_steps, *(self.site.out_shape[y] for y, _ in self.channels))


class Unfolded(NamedTuple):
    """What scales channels and is not folded: the ``path`` of the product, or of the leaves that scale; and ``why``."""

    path: str
    why: str


class Found(NamedTuple):
    """The chains of a program, and what of the kind is no chain."""

    chains: tuple[Chain, ...]
    left: tuple[Unfolded, ...]


class _End(NamedTuple):
    """Where the walk from a product ended: its chain, if any; the equations that it looked at; why it found none."""

    chain: Chain | None
    seen: tuple[Op, ...]
    why: str = ""


def find_chains(program: Program) -> Found:
    """The affine chains of a program whose jits are inlined; a layer's bias alone is no chain."""
    levels, ops = levels_of(program), {op.location: op for op in program.flow.ops}
    found, left = [], []
    seen: set[Location] = set()
    for site in sites_of(program):
        op = ops[site.location]
        if site.kind == "embed" or site.weight is None or len(site.activations) != 1:
            continue
        end = _follow(site, op, levels[site.location[:-1]])
        seen |= {o.location for o in end.seen}
        why = end.why if end.chain is None else _unfoldable(site, op)
        if why:
            left.append(Unfolded(site.path, why))
        elif end.chain is not None:
            found.append(end.chain)
    alone = {common_path(_scales(op)): None for op in program.flow.ops if op.location not in seen and _scales(op)}
    return Found(tuple(found), (*left, *(Unfolded(path, "no product stands right before it") for path in alone)))


def _scales(op: Op) -> tuple[str, ...]:
    """The leaves by which an equation multiplies or divides what depends on arguments."""
    if op.name not in {"mul", "div"} or op.tags[0].args == op.tags[1].args:
        return ()
    index = 1 if op.tags[0].args else 0
    return () if op.name == "div" and index == 0 else tuple(sorted(op.tags[index].params))


def _unfoldable(site: Site, op: Op) -> str:
    """Why a product with a chain cannot take it in; nothing if it runs at every step, and its weight is a leaf.

    The leaf is whole, with one slice for each layer around.
    """
    around = [name for name in op.inside if name not in {"scan", *REMAT}]
    if around:
        return f"it is inside a {around[0]}"
    if op.eqn.params.get("batch_group_count", 1) != 1:
        return "the convolution groups its batch"
    assert site.weight is not None
    origin = op.tags[site.weight].origin
    if origin is None or not origin.exact:
        return "its kernel is computed, not a leaf"
    split = sum(map(len, origin.axes)) != len({a for axes in origin.axes for a in axes})
    if not origin.whole or split or tuple(origin.shape[a] for a in origin.stacked) != site.layer_steps:
        return "its kernel is not a whole leaf, or is a leaf whose axes were split"
    return ""


def _follow(site: Site, op: Op, level: Level) -> _End:
    """Walks from the product's result along its only user, as long as that is affine by channel."""
    channels = _channels(op, site)
    value = op.eqn.outvars[0]
    steps: list[Step] = []
    seen: list[Op] = []
    end, why = 0, ""
    where = last = whole(site.out_shape)
    own = {y for y, _ in channels}
    while value not in level.outputs and (users := level.users.get(value)):
        seen += users
        user, moved = users[0], _moved(users[0], where)
        scaling = [u for u in users if _computes(u, _index(u, value), where, own, level)]
        if len(users) > 1:
            scaled = any(not _is_bias(u, _index(u, value)) for u in scaling)
            why = "what it gives is used more than once before it is scaled" if scaled else ""
            break
        if moved is None and not scaling:
            why = "what scales it varies along other axes than its channels" if _scales(user) else ""
            break
        steps.append(Step(user, _index(user, value), moved is not None))
        where, value = moved or where, user.eqn.outvars[0]
        if moved is None:
            end, last = len(steps), where
    kept = tuple(steps[:end])
    computing = [step for step in kept if not step.moves]
    if not computing or (len(computing) == 1 and _is_bias(computing[0].op, computing[0].index)):
        return _End(None, tuple(seen), why)
    return _End(Chain(site, op, channels, kept, last), tuple(seen))


def _index(user: Op, value: core.Var) -> int:
    return next(i for i, v in enumerate(user.eqn.invars) if v is value)


def _channels(op: Op, site: Site) -> tuple[tuple[int, int], ...]:
    """Where the weight's free axes lie in the product's result."""
    p, weight = op.eqn.params, site.weight
    assert weight is not None
    if site.kind == "conv":
        return ((p["dimension_numbers"].out_spec[1], p["dimension_numbers"].rhs_spec[0]),)
    if site.kind == "ragged":
        at = by_rows(op.eqn)
        return () if at is None or weight != 1 else ((1, 3 - at.right - at.group),)
    _, batch = p["dimension_numbers"]
    free = [[i for i, r in enumerate(o.roles) if r == OUTPUT] for o in site.operands]
    first = len(batch[0]) + (len(free[0]) if weight == 1 else 0)
    assert all(site.operands[weight].roles[i] == BATCH for i in batch[weight])
    return (*enumerate(batch[weight]), *enumerate(free[weight], first))


def _moved(user: Op, where: Places) -> Places | None:
    """Where the product's axes lie after a layout or a cast between floats; None if it is neither."""
    before, after = aval_of(user.eqn.invars[0]), aval_of(user.eqn.outvars[0])
    if user.name == "convert_element_type":
        floats = all(jnp.issubdtype(a.dtype, jnp.floating) for a in (before, after))
        return where if floats else None
    if user.name in RELAID and 0 < math.prod(before.shape) == math.prod(after.shape):
        return relaid(user.eqn, where)
    return None


def _computes(user: Op, index: int, where: Places, channels: set[int], level: Level) -> bool:
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
        if any(piece.axis not in channels for axis in level.varying(v) for piece in where[axis]):
            return False
    return True


def _is_bias(op: Op, index: int) -> bool:
    """Whether it is just what a layer with a bias does."""
    if op.name != "add":
        return False
    origin = op.tags[1 - index].origin
    return origin is not None and origin.exact
