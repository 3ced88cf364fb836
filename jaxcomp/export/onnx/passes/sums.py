"""Sums of quantized products, as at the end of a residual block, on codes.

A sum runs on codes where both its operands and its result are quantized. The result is where a product reads it; an
operand that is a product's result gets a grid of its own, from the range that is seen of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxcomp.export.onnx.graph import Graph, Node
from jaxcomp.export.onnx.passes.links import Links, rebuild

Ends = tuple[float, float]
Observe = Callable[[Sequence[str]], Mapping[str, Ends]]
"""The smallest and the largest element of tensors of the graph, by name, over what is expected to come."""


def quantize_sums(graph: Graph, observe: Observe) -> None:
    """Puts QuantizeLinear and DequantizeLinear around the sums."""
    links = Links.of(graph)
    wanted, shared = _plan(links)
    grids = {name: tuple(_quantizers(links, name)[0].inputs[1:]) for name in shared}
    for name, ends in observe(wanted).items() if wanted else ():
        grids[name] = tuple(map(graph.constant, grid(*ends)))
    _insert(graph, grids)


def float_sums(graph: Graph) -> list[str]:
    """Where sums would run on codes if there were samples, by the scopes of the program."""
    links = Links.of(graph)
    wanted, _ = _plan(links)
    return list(dict.fromkeys(links.maker[name].scope for name in wanted))


def _plan(links: Links) -> tuple[list[str], list[str]]:
    """What gets a grid of its own, and what is quantized anyway so that a sum may read the codes."""
    wanted: dict[str, None] = {}
    shared: dict[str, None] = {}
    coming: set[str] = set()
    for node in links.graph.nodes:
        if node.op != "Add" or any(links.constant(name) is not None for name in node.inputs):
            continue
        ready = [n in coming or bool(links.codes(n)) or _is_quantized(links, n) for n in node.inputs]
        made = [n for r, n in zip(ready, node.inputs, strict=True) if not r]
        if not all(_is_product(links, name) for name in made):
            continue
        wanted.update(dict.fromkeys(made))
        end = _behind(links, node)
        coming.add(end)
        if not _is_quantized(links, end) and end not in links.outside:
            wanted[end] = None
        shared.update(dict.fromkeys(name for name in (*node.inputs, end) if _is_quantized(links, name)))
    return list(wanted), list(shared)


def _behind(links: Links, node: Node) -> str:
    """A node's result, or that of the Relu that alone reads it."""
    reader = links.only_reader(node.outputs[0])
    return reader.outputs[0] if reader is not None and reader.op == "Relu" else node.outputs[0]


def _quantizers(links: Links, name: str) -> list[Node]:
    return [r for r in links.readers.get(name, []) if r.op == "QuantizeLinear"]


def _is_quantized(links: Links, name: str) -> bool:
    """Whether a tensor is read on one grid."""
    return len(_quantizers(links, name)) == 1


def _is_product(links: Links, name: str) -> bool:
    """Whether a tensor is the result of a convolution of codes."""
    made = links.made_by(name, "Conv")
    return made is not None and links.codes(made.inputs[0]) is not None


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
