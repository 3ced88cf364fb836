"""The graph as ONNX's protobuf, written whole or not at all."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import numpy as np

from jaxcomp.artifact.disk import replacing, write_all
from jaxcomp.export.errors import ExportError
from jaxcomp.export.onnx.graph import Attribute, Graph, Node
from jaxcomp.export.onnx.values import Tensor, is_static
from jaxcomp.export.packages import package

OPSET, IR = 21, 10
"""Of the operators, and of the file: those that know int4 and blocks."""
MOST = 2**31 - 1
"""Bytes of a protobuf."""


def onnx() -> ModuleType:
    """The package."""
    return package("onnx", "to_onnx")


def model_of(graph: Graph, name: str) -> Any:
    """The graph as an ``onnx.ModelProto``."""
    helper = onnx().helper
    return helper.make_model(
        _graph(graph, name),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR,
        producer_name="jaxcomp",
    )


def _graph(graph: Graph, name: str) -> Any:
    nodes = [_node(node, i) for i, node in enumerate(graph.nodes)]
    constants = [_constant(array, called) for called, array in graph.constants.items()]
    ends = [[_info(t) for t in tensors] for tensors in (graph.inputs, graph.outputs)]
    return onnx().helper.make_graph(nodes, name, *ends, initializer=constants)


def _constant(array: np.ndarray, name: str) -> Any:
    return onnx().numpy_helper.from_array(array, name)


def _info(tensor: Tensor) -> Any:
    shape = [int(n) if is_static([n]) else str(n) for n in tensor.held]
    return onnx().helper.make_tensor_value_info(tensor.name, element_type(tensor.dtype), shape)


def element_type(dtype: Any) -> int:
    """ONNX's number for an element type.

    Raises:
      ExportError: it has none.
    """
    try:
        return int(onnx().helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    except (KeyError, ValueError, TypeError) as e:
        raise ExportError(f"to_onnx: ONNX has no elements of type {dtype}; cast them to another before.") from e


def _node(node: Node, index: int) -> Any:
    made = onnx().helper.make_node(node.op, node.inputs, node.outputs, name=f"{node.scope}/{node.op}_{index}")
    for key, value in node.attributes.items():
        made.attribute.append(onnx().helper.make_attribute(key, _attribute(value, key)))
    return made


def _attribute(value: Attribute, name: str) -> Any:
    if isinstance(value, Graph):
        return _graph(value, name)
    if isinstance(value, np.dtype):
        return element_type(value)
    if isinstance(value, np.ndarray):
        return _constant(value, "")
    return value


def write(path: str | os.PathLike[str], model: Any) -> int:
    """Writes the model; gives its bytes.

    Raises:
      ExportError: it is too large for one protobuf.
      FileError: it cannot be written.
    """
    if model.ByteSize() > MOST:
        raise ExportError(
            f"to_onnx: the model has {model.ByteSize():,} bytes, and one ONNX file holds at most {MOST:,}; quantize its"
            " weights to fewer bits, or export it in parts."
        )
    data = model.SerializeToString()
    with replacing(path, owner="to_onnx") as f:
        write_all(f, data)
    return len(data)
