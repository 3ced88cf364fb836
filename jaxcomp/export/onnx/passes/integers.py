"""Matrix products of codes, as products of integers and one rescale.

``Σ (a - za) sa (b - zb) sb == sa sb Σ (a - za) (b - zb)``, the sum in int32: what ``quantize_function`` computes with
``integer=True``, bit for bit, and as fast as what onnxruntime makes of a MatMul between DequantizeLinear and
QuantizeLinear; of one with a bias and without a QuantizeLinear behind it makes a product of floats. ConvInteger has no
fast kernel there: convolutions stay between DequantizeLinear and QuantizeLinear.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxcomp.export.onnx.graph import Graph, Node
from jaxcomp.export.onnx.passes.links import Coming, Links, rebuild


def to_integers(graph: Graph) -> None:
    """Rewrites the products."""
    links = Links.of(graph)

    def each(node: Node) -> bool:
        if node.op != "MatMul":
            return False
        left, right = (_operand(links, name) for name in node.inputs)
        if left is None or right is None or left.weight is not None:
            return False
        return _rewritten(links, node, left, right)

    rebuild(graph, each)


class _Operand(NamedTuple):
    """An operand in codes: where they come from, or the weight's DequantizeLinear; its scale and zero point."""

    coming: Coming | None
    weight: Node | None
    scale: str
    zero: str


def _operand(links: Links, name: str) -> _Operand | None:
    coming, weight = links.codes(name), links.weight_codes(name)
    made = coming.dequantizer if coming is not None else weight
    return None if made is None else _Operand(coming, weight, made.inputs[1], made.inputs[2])


def _rewritten(links: Links, node: Node, left: _Operand, right: _Operand) -> bool:
    graph, scale = links.graph, links.constant(right.scale)
    assert left.coming is not None
    if right.weight is not None:
        codes, zero = links.constant(right.weight.inputs[0]), links.constant(right.zero)
        assert codes is not None
        assert scale is not None
        assert zero is not None
        by_column = scale.ndim == 1 and right.weight.attributes.get("axis") == codes.ndim - 1
        alike = not zero.size or (zero == zero.reshape(-1)[0]).all()
        if scale.ndim and not (by_column and (codes.ndim == 2 or alike)):
            return False
        zero = zero.reshape(-1)[:1].reshape(()) if alike and zero.size else zero
        pair = [graph.constant(_wide(codes)), graph.constant(_wide(zero))]
    else:
        assert right.coming is not None
        pair = [right.coming.moved(graph), right.zero]
    (sums,) = graph.run("MatMulInteger", [left.coming.moved(graph), pair[0], left.zero, pair[1]])
    _rescaled(links, node, sums, (left.scale, right.scale))
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
