"""The equations of each jaxpr of a program: who makes and who uses each value."""

from __future__ import annotations

from jax.extend import core

from jaxcomp.trace import nested
from jaxcomp.trace.flow import Op
from jaxcomp.trace.nested import Closed
from jaxcomp.trace.pointwise import CONSTANT_STILL, constant_of
from jaxcomp.trace.primitives import ELEMENTWISE
from jaxcomp.trace.program import Program
from jaxcomp.trace.walk import Location, shape_of

DEPTH = 64
"""Equations behind one another that are looked at to learn along which axes a value changes."""


def levels_of(program: Program) -> dict[Location, Level]:
    """By the location of the jaxpr, ``op.location[:-1]`` of its equations."""
    levels: dict[Location, Level] = {}
    ops = {op.location: op for op in program.flow.ops}
    for op in program.flow.ops:
        at = op.location[:-1]
        if at not in levels:
            levels[at] = Level(_part(program, ops, at))
        levels[at].add(op)
    return levels


class Level:
    """The equations of one jaxpr.

    Attributes:
      users, makers: of each value.
      known: whether its results are; not inside loops and branches that may not run.
      outputs: those values that are results.
    """

    def __init__(self, part: Closed | None) -> None:
        self.users: dict[core.Var, list[Op]] = {}
        self.makers: dict[core.Var, Op] = {}
        self.known = part is not None
        self._varying: dict[core.Var, set[int]] = {}
        results = part.jaxpr.outvars if part is not None else ()
        self.outputs = {v for v in results if not isinstance(v, core.Literal)}

    def only_user(self, v: core.Var) -> Op | None:
        """The equation that alone reads a value, once."""
        users = self.users.get(v, [])
        return users[0] if self.known and v not in self.outputs and len(users) == 1 else None

    def readers(self, *values: core.Var) -> dict[Location, Op]:
        """The equations that read any of some values, by where they stand."""
        return {op.location: op for v in values for op in self.users.get(v, ())}

    def add(self, op: Op) -> None:
        """The next equation."""
        for v in op.eqn.invars:
            if not isinstance(v, core.Literal):
                self.users.setdefault(v, []).append(op)
        self.makers |= dict.fromkeys(op.eqn.outvars, op)

    def constant(self, v: core.Var | core.Literal) -> float | None:
        """The number that a value is everywhere, if it stands in the program."""
        if isinstance(v, core.Literal):
            return constant_of(v)
        op = self.makers.get(v)
        return self.constant(op.eqn.invars[0]) if op is not None and op.name in CONSTANT_STILL else None

    def varying(self, v: core.Var | core.Literal, depth: int = 0) -> set[int]:
        """Axes along which a value may change; of values made of one another many times over, all that it has."""
        if isinstance(v, core.Literal):
            return set()
        if v not in self._varying:
            wide = {i for i, size in enumerate(shape_of(v)) if size != 1}
            op = self.makers.get(v) if depth < DEPTH else None
            self._varying[v] = wide if op is None else wide & self._left_by(op, depth + 1, wide)
        return self._varying[v]

    def _left_by(self, op: Op, depth: int, wide: set[int]) -> set[int]:
        """Those axes along which what an equation makes may change."""
        params = op.eqn.params
        if op.name == "broadcast_in_dim":
            return {params["broadcast_dimensions"][i] for i in self.varying(op.eqn.invars[0], depth)}
        if op.name == "transpose":
            inner = self.varying(op.eqn.invars[0], depth)
            return {i for i, axis in enumerate(params["permutation"]) if axis in inner}
        if op.name in ELEMENTWISE or op.name == "convert_element_type":
            operands = [u for u in op.eqn.invars if not isinstance(u, core.Literal)]
            return set().union(*(self.varying(u, depth) for u in operands if shape_of(u)))
        return wide


def _part(program: Program, ops: dict[Location, Op], at: Location) -> Closed | None:
    """The jaxpr at a location prefix; None inside loops and branches that may not run."""
    if not at:
        return program.jaxpr
    eqn = ops[at[:-1]].eqn
    return nested.scan_parts(eqn).body if eqn.primitive.name == "scan" else nested.call_body(eqn)
