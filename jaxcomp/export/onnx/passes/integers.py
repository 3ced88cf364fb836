"""Matrix products of codes, as products of integers and one rescale.

``Σ (a - za) sa (b - zb) sb == sa sb Σ (a - za) (b - zb)``, the sum in int32: what ``quantize_function`` computes with
``integer=True``, bit for bit, and as fast as what onnxruntime makes of a MatMul between DequantizeLinear and
QuantizeLinear; of one with a bias and without a QuantizeLinear behind it makes a product of floats. ConvInteger has no
fast kernel there: convolutions stay between DequantizeLinear and QuantizeLinear.
"""

from __future__ import annotations

import numpy as np

from jaxcomp.export.onnx.graph import Graph, Node
from jaxcomp.export.onnx.passes.links import Links, rebuild


def to_integers(graph: Graph) -> None:
    """Rewrites the products."""
    links = Links.of(graph)

    def each(node: Node) -> bool:
        if node.op != "MatMul":
            return False
        a = links.codes(node.inputs[0])
        b = links.codes(node.inputs[1]) or links.weight_codes(node.inputs[1])
        return a is not None and b is not None and _matmul(links, node, a, b)

    rebuild(graph, each)


def _matmul(links: Links, node: Node, a: Node, b: Node) -> bool:
    graph, codes, scale = links.graph, links.constant(b.inputs[0]), links.constant(b.inputs[1])
    zero = links.constant(b.inputs[2])
    if codes is not None:
        assert scale is not None
        assert zero is not None
        by_column = scale.ndim == 1 and b.attributes.get("axis") == codes.ndim - 1
        if scale.ndim and not (by_column and (codes.ndim == 2 or not zero.any())):
            return False
        if codes.ndim > 2 or not zero.any():
            zero = zero.reshape(-1)[0] if zero.size else np.zeros((), zero.dtype)
        pair = [graph.constant(_wide(codes)), graph.constant(_wide(zero))]
    else:
        pair = [b.inputs[0], b.inputs[2]]
    (sums,) = graph.run("MatMulInteger", [a.inputs[0], pair[0], a.inputs[2], pair[1]])
    _rescaled(links, node, sums, (a.inputs[1], b.inputs[1]))
    return True


def _wide(codes: np.ndarray) -> np.ndarray:
    """Codes in 8 bits, which is what integer products take."""
    if codes.dtype in (np.int8, np.uint8):
        return np.asarray(codes)
    return np.asarray(codes).astype(np.uint8 if codes.dtype.name.startswith("u") else np.int8)


def _rescaled(links: Links, node: Node, sums: str, scales: tuple[str, str]) -> None:
    """``sums * (sa * sb)``, under the name of the product's result."""
    graph, (sa, sb) = links.graph, map(links.constant, scales)
    (floats,) = graph.run("Cast", [sums], to=np.dtype(np.float32))
    scale = graph.once("Mul", list(scales)) if sa is None or sb is None else graph.constant(sa * sb)
    graph.run("Mul", [floats, scale])
    graph.nodes[-1].outputs = node.outputs
