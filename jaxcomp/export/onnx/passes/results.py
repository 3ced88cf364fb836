"""Grids for the results of convolutions of codes, which onnxruntime runs on codes where their results are quantized.

In a chain the product that reads a result says its grid, also through pooling and what moves elements. Where results
are added, as at the end of a residual block, or meet an operator of floats, nobody does: they get the range that is
seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxcomp.export.onnx.graph import Graph, Node
from jaxcomp.export.onnx.passes.links import MOVES, Links, rebuild

Ends = tuple[float, float]
Observe = Callable[[Sequence[str]], Mapping[str, Ends]]
"""The smallest and the largest element of tensors of the graph, by name, over what is expected to come."""
THROUGH = (*MOVES, "Concat", "MaxPool")
"""Operators that give elements of their operands, so that these may be rounded before."""


def quantize_results(graph: Graph, observe: Observe | None) -> list[str]:
    """Puts QuantizeLinear and DequantizeLinear behind the products, and around the sums of them.

    Args:
      graph: is changed.
      observe: sees ranges; without it only what a reader rounds anyway is rounded.

    Returns:
      Which results stay in float, by the scopes of the program, or by name where it has none.
    """
    plan = _Plan.of(Links.of(graph))
    if observe is None:
        _insert(graph, plan.exact)
        return list(dict.fromkeys(plan.links.maker[name].scope or name for name in plan.wanted))
    grids = {**plan.exact, **plan.shared}
    for name, ends in observe(list(plan.wanted)).items() if plan.wanted else ():
        grids[name] = tuple(map(graph.constant, grid(*ends)))
    _insert(graph, grids)
    return []


Grid = tuple[str, ...]
"""The names of a scale and a zero point."""


@dataclass(frozen=True)
class _Plan:
    """Which tensors get grids.

    Attributes:
      links: of the graph.
      exact: those that are read on that grid alone.
      shared: those that somebody reads on that grid, and others as floats.
      wanted: those that nobody quantizes.
    """

    links: Links
    exact: dict[str, Grid] = field(default_factory=dict)
    shared: dict[str, Grid] = field(default_factory=dict)
    wanted: dict[str, None] = field(default_factory=dict)

    @classmethod
    def of(cls, links: Links) -> _Plan:
        """Goes through the products and the sums of their results."""
        plan, coded = cls(links), set[str]()
        for node in links.graph.nodes:
            if node.op == "Conv" and links.codes(node.inputs[0]) is not None:
                plan.given(_behind(links, node), coded)
            elif node.op == "Add" and not any(links.constant(name) is not None for name in node.inputs):
                read = {name: plan.read(name) for name in node.inputs}
                if all(n in coded or read[n] is not None or links.codes(n) is not None for n in node.inputs):
                    plan.shared.update({n: found for n, found in read.items() if found is not None})
                    plan.given(_behind(links, node), coded)
        return plan

    def given(self, name: str, coded: set[str]) -> None:
        """Gives a result a grid."""
        found = self.read(name)
        if found is not None:
            (self.shared if self.links.only_reader(name) is None else self.exact)[name] = found
        elif self.given_out(name):
            return
        else:
            self.wanted[name] = None
        coded.add(name)

    def given_out(self, name: str) -> bool:
        """Whether a tensor is the graph's result, moved at most: that is not rounded."""
        reader = self.links.only_reader(name)
        moved = reader is not None and reader.op in (*MOVES, "Identity") and self.given_out(reader.outputs[0])
        return moved or name in self.links.outside

    def read(self, name: str) -> Grid | None:
        """The one grid on which a tensor is read, at once or behind operators that give its elements."""
        readers = self.links.readers.get(name, [])
        grids = {tuple(r.inputs[1:]) for r in readers if r.op == "QuantizeLinear"}
        if grids or len(readers) != 1 or name in self.links.outside:
            return grids.pop() if len(grids) == 1 else None
        found = self.read(readers[0].outputs[0]) if readers[0].op in (*THROUGH, "Relu") else None
        if found is None or readers[0].op != "Relu":
            return found
        zero = self.links.constant(found[1])
        return found if zero is not None and not zero.any() else None  # then codes below 0 are 0 too


def _behind(links: Links, node: Node) -> str:
    """A node's result, or that of the Relu that alone reads it."""
    reader = links.only_reader(node.outputs[0])
    return reader.outputs[0] if reader is not None and reader.op == "Relu" else node.outputs[0]


def grid(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of unsigned codes of 8 bits that cover a range, and 0.

    >>> scale, zero = grid(-1.0, 1.55)
    >>> round(float(scale), 4), int(zero)
    (0.01, 100)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    return np.asarray(scale, np.float32), np.asarray(round(-low / float(scale)), np.uint8)


def _insert(graph: Graph, grids: Mapping[str, Sequence[str]]) -> None:
    """Has every reader of these tensors read their codes, dequantized."""
    renamed: dict[str, str] = {}
    pairs: dict[str, str] = {}

    def each(node: Node) -> bool:
        if node.op == "QuantizeLinear" and tuple(node.inputs[1:]) == tuple(grids.get(node.inputs[0], ())):
            renamed[node.outputs[0]] = pairs[node.inputs[0]]
            return True
        node.inputs = [renamed.get(name, name) for name in node.inputs]
        graph.nodes.append(node)
        for name in node.outputs:
            if name in grids:
                (pairs[name],) = graph.run("QuantizeLinear", [name, *grids[name]])
                (renamed[name],) = graph.run("DequantizeLinear", [pairs[name], *grids[name]])
        return True

    rebuild(graph, each)
