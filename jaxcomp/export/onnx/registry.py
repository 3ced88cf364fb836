"""Rules: what each primitive is in operators of ONNX; and the step that a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import jax
import numpy as np
from jax.extend import core

from jaxcomp.core.types import DType
from jaxcomp.export.errors import ExportError
from jaxcomp.export.onnx.graph import Attribute, Graph
from jaxcomp.export.onnx.values import Dims, Tensor, Value
from jaxcomp.trace.nested import Closed
from jaxcomp.trace.walk import Location, aval_of


class Run(Protocol):
    """Writes an inner jaxpr."""

    def __call__(
        self, graph: Graph, jaxpr: Closed, values: Sequence[Value], at: Location, layers: tuple[int, ...] = ()
    ) -> list[Value]:
        """What its results are.

        Args:
          graph: where its nodes go.
          jaxpr, values: the jaxpr, and what its inputs are.
          at: where it stands: the equation's place, and the part's name ("body", "cond", "branch0").
          layers: which step of each unrolled scan around, for what has an entry for each.
        """


@dataclass(frozen=True, eq=False)
class Step:
    """One equation to be written.

    Attributes:
      graph: where its nodes go.
      eqn: the equation.
      at: where it stands.
      values: its operands.
      run: writes what it holds, if it holds programs.
      layers: which step of each unrolled scan around.
    """

    graph: Graph
    eqn: core.JaxprEqn
    at: Location
    values: list[Value]
    run: Run
    layers: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The primitive's name."""
        return str(self.eqn.primitive.name)

    @property
    def out(self) -> jax.core.ShapedArray:
        """Shape and type of the first result."""
        return aval_of(self.eqn.outvars[0])

    @property
    def shape(self) -> Dims:
        """Shape of the first result."""
        return tuple(self.out.shape)

    @property
    def dtype(self) -> DType:
        """Type of the first result."""
        return np.dtype(self.out.dtype)

    def of(self, i: int) -> jax.core.ShapedArray:
        """Shape and type of operand ``i``."""
        return aval_of(self.eqn.invars[i])

    def node(self, op: str, inputs: Sequence[str], **attributes: Attribute) -> Tensor:
        """A node whose one result is the step's first, in the order of its axes."""
        return self.graph.node(op, inputs, self.shape, self.dtype, **attributes)

    def elementwise(self, op: str, *values: Value, **attributes: Attribute) -> Tensor:
        """The step's result by an operator that broadcasts."""
        return self.graph.elementwise(op, values or self.values, self.dtype, **attributes)

    def refuse(self, why: str, mend: str) -> NoReturn:
        """Raises the error that names this equation."""
        raise ExportError(f"to_onnx: {self.name!r} at {self.graph.source}: {why}; {mend}.")


Rule = Callable[[Step], Value | Sequence[Value]]
"""Writes one equation; gives its result, or the list of them."""
RULES: dict[str, Rule] = {}
"""The rule of each known primitive. Operands that are all known now never come here: the equation is run instead."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of the primitives called ``names``."""

    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, f))
        return f

    return register
