"""Dimensions that are known when the graph runs: read off its inputs, and computed from what was read."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from jaxcomp.export.errors import ExportError


class Graph(Protocol):
    """What nodes are added to."""

    def once(self, op: str, inputs: Sequence[str], **attributes: int) -> str:
        """The result of a node."""

    def ints(self, numbers: Sequence[int]) -> str:
        """A constant vector."""


@dataclass
class Sizes:
    """Where each dimension's name is read: the input, and the axis of what the graph holds."""

    read: dict[str, tuple[str, int]] = field(default_factory=dict)

    def vector(self, graph: Graph, dim: object) -> str:
        """A vector of one int64 that holds a dimension, any expression of ``jax.export.symbolic_shape``."""
        tree = ast.parse(str(dim).replace("^", "**"), mode="eval").body
        return self._of(graph, tree, str(dim))

    def _of(self, graph: Graph, tree: ast.expr, said: str) -> str:
        match tree:
            case ast.Constant(value=int(n)):
                return graph.ints([n])
            case ast.Name(id=name):
                return self._named(graph, name)
            case ast.UnaryOp(op=ast.USub(), operand=x):
                return graph.once("Neg", [self._of(graph, x, said)])
            case ast.BinOp(left=a, op=ast.Pow(), right=ast.Constant(value=int(n))):
                base = self._of(graph, a, said)
                return graph.once("Pow", [base, graph.ints([n])])
            case ast.BinOp(left=a, op=op, right=b) if type(op) in _OPS:
                return graph.once(_OPS[type(op)], [self._of(graph, a, said), self._of(graph, b, said)])
            case ast.Call(func=ast.Name(id=name), args=[a, b]) if name in _CALLS:
                return _CALLS[name](graph, self._of(graph, a, said), self._of(graph, b, said))
        raise ExportError(f"to_onnx: the dimension {said!r} cannot be computed in the graph; give it as a number.")

    def _named(self, graph: Graph, name: str) -> str:
        if name not in self.read:
            raise ExportError(
                f"to_onnx: no input has a dimension that is {name!r} alone, so the graph cannot know it; give one, or"
                " a number."
            )
        source, axis = self.read[name]
        return graph.once("Shape", [source], start=axis, end=axis + 1)


def _floordiv(graph: Graph, a: str, b: str) -> str:
    """Division towards minus infinity, as JAX means it: ONNX's goes towards 0, and dimensions may be differences."""
    rest = graph.once("Mod", [a, b])
    return graph.once("Div", [graph.once("Sub", [a, rest]), b])


_OPS = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul"}
_CALLS = {
    "floordiv": _floordiv,
    "mod": lambda graph, a, b: graph.once("Mod", [a, b]),
    "max": lambda graph, a, b: graph.once("Max", [a, b]),
    "min": lambda graph, a, b: graph.once("Min", [a, b]),
}
