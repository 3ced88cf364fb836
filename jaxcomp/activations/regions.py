"""Equations of a program that a CPU has one code for: what they read and give, and how they run in one piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import cast

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import ClosedJaxpr

from jaxcomp.activations.chained import Made
from jaxcomp.activations.coded_rows import OfRows
from jaxcomp.core.meshes import explicit_mesh
from jaxcomp.core.types import PyTree
from jaxcomp.kernels import llvm_float_attention, llvm_rows
from jaxcomp.kernels.lowering import call_in_one_piece
from jaxcomp.trace.flow import Op
from jaxcomp.trace.interpreter import Claim
from jaxcomp.trace.levels import Level
from jaxcomp.trace.primitives import REGION
from jaxcomp.trace.rowwise import Beside, RowReading
from jaxcomp.trace.walk import Location, Value, aval_of, shape_of

MOST = 64
"""Equations of one."""

How = llvm_float_attention.How | llvm_rows.How
Sides = Mapping[Location, PyTree]
"""What claims need beside the values, by where they stand."""


@dataclass(frozen=True)
class Region:
    """Some equations of a program, of which others read the first result of the last alone.

    Attributes:
      ops: they, in order.
      given: what the code takes of what they read beside what they make; they may read constants, and what goes
        nowhere.
      how: what they are.
      rounded: whether the result is a function of rows that nothing reads but their roundings.
      sides: of attention, which operands of their products queries, keys and values are.
      products: claims on these products, where they are done otherwise than the program has them.
      entered: gives what the code takes, of what is given and of what the claims need beside; None where that is given.
    """

    ops: tuple[Op, ...]
    given: tuple[core.Var, ...]
    how: How
    rounded: bool = False
    sides: tuple[int, int, int] | None = None
    products: Mapping[Location, Claim] = field(default_factory=dict)
    entered: Callable[[Sequence[jax.Array], Sides], list[jax.Array]] | None = None
    _values: dict[core.Var, jax.Array] = field(default_factory=dict)
    _sides: dict[Location, PyTree] = field(default_factory=dict)

    def claims(self, to_array: Callable[[Value], jax.Array], made: Made) -> dict[Location, Claim]:
        """Claims on its equations: all but the last give nothing, and it gives the result; ``made`` may learn of it."""

        def run(op: Op, *values: Value) -> list[jax.Array | None]:
            for v, value in zip(op.eqn.invars, values, strict=True):
                if v in self.read:
                    self._values[v] = to_array(value)
            results: list[jax.Array | None] = [None] * len(op.eqn.outvars)
            if op is self.ops[-1]:
                results[0] = result = self._result([self._values[v] for v in self.read])
                if self.rounded and isinstance(self.how, llvm_rows.How):
                    made.learn(result, OfRows(tuple(self._values[v] for v in self.given), self.how))
                self._values.clear()
                self._sides.clear()
            return results

        def multiplied(op: Op, side: PyTree, *values: Value) -> list[jax.Array | None]:
            self._sides[op.location] = side
            return run(op, *values)

        found = {op.location: Claim(partial(run, op)) for op in self.ops}
        for op in self.ops:
            if (claim := self.products.get(op.location)) is not None:
                found[op.location] = Claim(partial(multiplied, op), claim.side)
        return found

    @cached_property
    def read(self) -> list[core.Var]:
        """All that they read: first what is given."""
        made = {v for op in self.ops for v in op.eqn.outvars}
        operands = [v for op in self.ops for v in op.eqn.invars if isinstance(v, core.Var) and v not in made]
        return [*self.given, *(v for v in dict.fromkeys(operands) if v not in self.given)]

    def _result(self, given: Sequence[jax.Array]) -> jax.Array:
        sides = {**self._sides}
        if explicit_mesh(given) is not None:
            return self._plain(given, sides)
        own = [] if self.entered is None else self.entered(given[: len(self.given)], sides)
        beside, tree = jax.tree.flatten(sides)

        def plain(*values: jax.Array) -> list[jax.Array]:
            first, last = len(own), len(own) + len(given)
            return [self._plain(values[first:last], jax.tree.unflatten(tree, values[last:]))]

        values = *own, *given, *beside
        return _primitive.bind(*values, jaxpr=jax.make_jaxpr(plain)(*values), how=self.how)[0]

    def _plain(self, given: Sequence[jax.Array], sides: Sides) -> jax.Array:
        """As the program has it, products as these are claimed."""
        known = dict(zip(self.read, given, strict=True))
        for op in self.ops:
            operands = [v.val if isinstance(v, core.Literal) else known[v] for v in op.eqn.invars]
            claim = self.products.get(op.location)
            if claim is None:
                results = op.bind(*operands)
            else:
                results = cast(list[jax.Array], claim.run(sides[op.location], *operands))
            known |= zip(op.eqn.outvars, results, strict=True)
        return known[self.ops[-1].eqn.outvars[0]]


def is_known_float(v: core.Var) -> bool:
    """Whether a value is float32, of sizes that are known."""
    return all(isinstance(n, int) for n in shape_of(v)) and aval_of(v).dtype == jnp.float32


def beside_of(reading: RowReading, level: Level) -> list[Beside]:
    """The values that meet rows, with the axes along which they are not everywhere the same."""
    wide = {one.value: level.varying(one.value) for one in reading.beside}
    return [Beside(v, tuple(axis if axis in wide[v] else None for axis in axes)) for v, axes in reading.beside]


def refusal(how: How, given: Sequence[core.Var]) -> str | None:
    """Why there is no code for equations on the machine that is here; None if there is."""
    if isinstance(how, llvm_rows.How):
        return llvm_rows.refusal(how)
    _, k, v, *_ = map(shape_of, given)
    return llvm_float_attention.refusal(how, (k[how.k.width], v[how.v.width]))


def _for_cpu(*given: jax.Array, how: How, jaxpr: ClosedJaxpr) -> list[jax.Array]:
    met = len(how.beside)
    if isinstance(how, llvm_rows.How):
        return [llvm_rows.llvm_rows(how, *given[: 1 + met])]
    return [llvm_float_attention.llvm_mixed(how, *given[: 3 + met])]


_primitive = call_in_one_piece(REGION, _for_cpu)
