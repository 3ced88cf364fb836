"""Weights in codes, so that onnxruntime multiplies by the codes and not by floats made anew, and files stay small."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jaxcomp.export.onnx.graph import Graph, Node
from jaxcomp.export.onnx.passes.links import Links, rebuild

INT4 = np.dtype(ml_dtypes.int4)


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


def narrow_kernels(graph: Graph) -> None:
    """Codes of convolutions that four bits hold are held in four, and widened when the file is loaded.

    onnxruntime convolves codes of a byte alone, and casts a constant before it looks for them.
    """
    links = Links.of(graph)

    def each(node: Node) -> bool:
        codes = links.constant(node.inputs[0]) if node.op == "DequantizeLinear" else None
        reader = links.only_reader(node.outputs[0])
        if codes is not None and reader is not None and reader.op == "Conv" and _fits(codes):
            (node.inputs[0],) = graph.run("Cast", [graph.constant(codes.astype(INT4))], to=codes.dtype)
        return False

    rebuild(graph, each)


def _fits(codes: np.ndarray) -> bool:
    return codes.dtype == np.int8 and codes.size > 0 and int(codes.min()) >= -8 and int(codes.max()) <= 7
