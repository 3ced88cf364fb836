"""Products by a weight in codes alone, so that onnxruntime multiplies by the codes and not by floats made anew."""

from __future__ import annotations

import numpy as np

from jaxcomp.export.onnx.graph import Graph, Node
from jaxcomp.export.onnx.passes.links import Links


def spell_out_relus(graph: Graph) -> None:
    """``max(x, 0)`` instead of a Relu behind such a product.

    onnxruntime takes a Relu into a product of floats before it looks for codes, where another product comes next, and
    then dequantizes the weight in every run: tens of times slower than the float file.
    """
    links = Links.of(graph)
    for node in graph.nodes:
        if node.op == "Relu" and _of_codes(links, links.maker.get(node.inputs[0])):
            node.op, node.inputs = "Max", [*node.inputs, graph.constant(0, np.dtype(np.float32))]


def _of_codes(links: Links, node: Node | None) -> bool:
    """Whether a node is such a product, or adds a bias to one."""
    if node is not None and node.op == "Add":
        return any(_of_codes(links, links.made_by(name, "MatMul")) for name in node.inputs)
    return node is not None and node.op == "MatMul" and links.weight_codes(node.inputs[1]) is not None
