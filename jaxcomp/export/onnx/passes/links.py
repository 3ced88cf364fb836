"""Who makes and who reads each tensor of a graph; and how a graph is rebuilt node by node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxcomp.export.onnx.graph import Graph, Node


def used(graph: Graph) -> Iterator[str]:
    """Every name that a graph reads, also inside its loops and branches, and gives out; once for each use."""
    for node in graph.nodes:
        yield from filter(None, node.inputs)
        for part in parts(node):
            yield from used(part)
    yield from (tensor.name for tensor in graph.outputs)


def parts(node: Node) -> list[Graph]:
    """The graphs that a loop or a branch runs."""
    return [value for value in node.attributes.values() if isinstance(value, Graph)]


def everywhere(graph: Graph) -> Iterator[Graph]:
    """The graph and all that stand inside it, innermost first."""
    for node in graph.nodes:
        for part in parts(node):
            yield from everywhere(part)
    yield graph


MOVES = ("Expand", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that move elements, of codes as of floats."""


class Coming(NamedTuple):
    """How a tensor comes out of codes.

    Attributes:
      dequantizer: of one scale.
      moves: what moves the elements then, in order.
    """

    dequantizer: Node
    moves: tuple[Node, ...]

    def moved(self, graph: Graph) -> str:
        """The codes, moved so."""
        name = self.dequantizer.inputs[0]
        for move in self.moves:
            name = graph.once(move.op, [name, *move.inputs[1:]], **move.attributes)
        return name


@dataclass(frozen=True)
class Links:
    """A graph's makers and readers, as it is now.

    Attributes:
      graph: the graph.
      maker: the node that makes a tensor.
      readers: the nodes that read it, once for each time.
      outside: names that are read by inner graphs or given out.
    """

    graph: Graph
    maker: dict[str, Node] = field(default_factory=dict)
    readers: dict[str, list[Node]] = field(default_factory=dict)
    outside: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, graph: Graph) -> Links:
        """Reads the graph."""
        links = cls(graph)
        for node in graph.nodes:
            links.maker.update(dict.fromkeys(node.outputs, node))
            for name in filter(None, node.inputs):
                links.readers.setdefault(name, []).append(node)
            for part in parts(node):
                links.outside.update(used(part))
        links.outside.update(tensor.name for tensor in graph.outputs)
        return links

    def only_reader(self, name: str) -> Node | None:
        """The one node that reads a tensor, if nothing else does."""
        found = self.readers.get(name, [])
        return found[0] if len(found) == 1 and name not in self.outside else None

    def made_by(self, name: str, *ops: str) -> Node | None:
        """The node that makes a tensor if it is such an operator."""
        node = self.maker.get(name)
        return node if node is not None and node.op in ops else None

    def constant(self, name: str) -> np.ndarray | None:
        """A tensor's value if it is a constant."""
        return self.graph.root.constants.get(name)

    def codes(self, name: str) -> Coming | None:
        """How a tensor comes out of an activation's codes, if it does."""
        moves: list[Node] = []
        while (move := self.made_by(name, *MOVES)) is not None:
            moves.insert(0, move)
            name = move.inputs[0]
        made = self.made_by(name, "DequantizeLinear")
        quantizers = ("QuantizeLinear", "DynamicQuantizeLinear")
        if made is None or self.made_by(made.inputs[0], *quantizers) is None:
            return None
        return Coming(made, tuple(moves))

    def weight_codes(self, name: str) -> Node | None:
        """The DequantizeLinear that a weight in codes comes out of."""
        made = self.made_by(name, "DequantizeLinear")
        return made if made is not None and all(self.constant(i) is not None for i in made.inputs) else None


def rebuild(graph: Graph, each: Callable[[Node], bool]) -> None:
    """Goes through the nodes in order; ``each`` may add nodes to the graph, and says whether the old one goes."""
    old, graph.nodes = graph.nodes, []
    for node in old:
        if not each(node):
            graph.nodes.append(node)


def sweep(graph: Graph) -> None:
    """Takes out nodes that nothing reads, then constants."""
    for part in everywhere(graph):
        alive = {tensor.name for tensor in part.outputs}
        kept = []
        for node in reversed(part.nodes):
            if alive.isdisjoint(node.outputs):
                continue
            kept.append(node)
            alive.update(node.inputs)
            for inner in parts(node):
                alive.update(used(inner))
        part.nodes = kept[::-1]
    read = set(used(graph))
    graph.constants = {name: array for name, array in graph.constants.items() if name in read}
