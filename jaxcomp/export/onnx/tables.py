"""Tables that are looked up: only the rows that are taken are unpacked and dequantized, in the graph as in JAX."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxcomp.core.bits import pack_bits_on_host
from jaxcomp.export.onnx import typed as t
from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.values import Coded, Tensor, Value
from jaxcomp.export.onnx.weights import HostCodes


class Rows(NamedTuple):
    """What a lookup took: a tensor of the graph, and the table's axes in the order in which they lie."""

    name: str
    order: tuple[int, ...]


def rows(graph: Graph, table: Value, axis: int, ids: str, lead: int) -> Rows:
    """``table`` at ``ids`` along an axis, which ``lead`` axes of the ids take the place of."""
    rank = len(table.shape)
    if isinstance(table, Coded):
        name = _dequantized(graph, HostCodes.of(table), axis, ids, lead)
        if table.dtype != t.F32:
            name = graph.once("Cast", [name], to=np.dtype(table.dtype))
        return Rows(name, tuple(range(rank)))
    value = graph.array(table)
    if isinstance(value, Tensor) and axis not in value.repeats and not value.repeats:
        return Rows(graph.once("Gather", [value.name, ids], axis=value.order.index(axis)), value.order)
    return Rows(graph.once("Gather", [graph.plain(value), ids], axis=axis), tuple(range(rank)))


def _dequantized(graph: Graph, held: HostCodes, axis: int, ids: str, lead: int) -> str:
    """Rows of codes, as they are stored, and of scales and zero points where rows have their own."""
    codes = _codes(graph, held.codes, axis, ids, lead)
    numbers = graph.once("Cast", [codes], to=t.F32)
    if held.zero is not None and held.zero.any():
        numbers = graph.once("Sub", [numbers, _shared(graph, held.zero, held, axis, ids, lead)])
    return graph.once("Mul", [numbers, _shared(graph, held.scale, held, axis, ids, lead)])


def _shared(graph: Graph, v: np.ndarray, held: HostCodes, axis: int, ids: str, lead: int) -> str:
    """The rows of what blocks share; what all rows share is not looked up."""
    v, shape = np.asarray(v, np.float32), held.codes.shape
    last = len(shape) - 1
    late = last != axis and v.shape[axis] != 1 and v.shape[last] not in (1, shape[last])
    for i, n in enumerate(shape):
        if v.shape[i] not in (1, n) and not (late and i == last):
            v = np.repeat(v, n // v.shape[i], i)
    if v.shape[axis] == 1:
        return graph.constant(v.reshape([*v.shape[:axis], *[1] * lead, *v.shape[axis + 1 :]]))
    name = graph.once("Gather", [graph.constant(v), ids], axis=axis)
    if not late:
        return name
    # Groups along a row are spread when it was taken: spread before, they would be a table of floats.
    name = graph.once("Unsqueeze", [name, graph.ints([-1])])
    name = graph.once("Expand", [name, graph.ints([shape[last] // v.shape[last]])])
    return graph.once("Reshape", [name, graph.ints([0] * (lead + last - 1) + [shape[last]])])


def _codes(graph: Graph, codes: np.ndarray, axis: int, ids: str, lead: int) -> str:
    """Rows of codes; of few bits they are stored several to a byte along the last axis, and unpacked when taken."""
    if codes.dtype.kind not in "iu":
        return graph.once("Gather", [graph.constant(codes), ids], axis=axis)
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    bits = next((b for b in (1, 2, 4) if high - low < 2**b), 8)
    last = codes.ndim - 1
    if bits == 8 or axis == last or codes.shape[last] % (8 // bits):
        fits = np.int8 if low >= -128 and high <= 127 else np.uint8 if low >= 0 and high <= 255 else np.int32
        return graph.once("Gather", [graph.constant(codes.astype(fits)), ids], axis=axis)
    stream = pack_bits_on_host(codes, bits, low).reshape(*codes.shape[:-1], codes.shape[last] * bits // 8)
    packed = graph.once("Gather", [graph.constant(stream), ids], axis=axis)
    apart = unpacked(graph, packed, bits, [0] * (lead + last - 1) + [codes.shape[last]])
    if not low:
        return apart
    return graph.once("Add", [graph.once("Cast", [apart], to=t.I32), graph.constant(low, t.I32)])


def unpacked(graph: Graph, packed: str, bits: int, shape: list[int]) -> str:
    """The codes of bytes that hold several along the last axis; a 0 in ``shape`` is as long as in the bytes."""
    per = 8 // bits
    apart = graph.once("Unsqueeze", [packed, graph.ints([-1])])
    shifts = graph.constant(np.arange(per, dtype=np.uint8) * np.uint8(bits))
    apart = graph.once("BitShift", [apart, shifts], direction="RIGHT")
    apart = graph.once("BitwiseAnd", [apart, graph.constant(2**bits - 1, np.dtype(np.uint8))])
    return graph.once("Reshape", [apart, graph.ints(shape)])
