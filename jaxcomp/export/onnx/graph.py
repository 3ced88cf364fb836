"""The graph under construction: nodes in order, constants, and how a value comes to lie as an operator wants it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxcomp.core.types import DType
from jaxcomp.export.onnx.sizes import Sizes
from jaxcomp.export.onnx.values import Coded, Const, Dims, Tensor, Value, is_one, is_static, repeats_of

Attribute = "int | float | str | np.dtype | np.ndarray | Sequence[int] | Sequence[float] | Graph"
"""An attribute of a node; a dtype says an element type, a graph what a loop or a branch runs."""


@dataclass
class Node:
    """One operator: ``outputs = op(*inputs, **attributes)``; an absent input is ""."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Attribute]
    scope: str = ""


@dataclass
class Graph:
    """A graph that grows.

    Attributes:
      nodes: in an order in which they can run.
      constants: arrays by name.
      inputs, outputs: the graph's own.
      outer: the graph around, whose tensors this one may read.
      scope, source: where the program is, for the names of nodes, and for errors.
      ranks: of tensors that equations gave, by name.
    """

    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    outer: Graph | None = None
    scope: str = ""
    source: str = ""
    ranks: dict[str, int] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=Sizes)
    _made: dict[tuple[object, ...], str] = field(default_factory=dict)
    _taken: dict[str, int] = field(default_factory=dict)

    def fresh(self, stem: str) -> str:
        """A name that nothing has."""
        if self.outer is not None:
            return self.outer.fresh(stem)
        count = self._taken[stem] = self._taken.get(stem, -1) + 1
        return stem if not count else f"{stem}_{count}"

    @property
    def root(self) -> Graph:
        """The outermost graph around, which holds the constants."""
        return self if self.outer is None else self.outer.root

    def inner(self) -> Graph:
        """A graph for a loop or a branch, which may read this one's tensors."""
        return Graph(outer=self, scope=self.scope, source=self.source, sizes=self.sizes)

    # Nodes

    def run(self, op: str, inputs: Sequence[str], *, count: int = 1, **attributes: Attribute) -> list[str]:
        """Adds a node; gives the names of its ``count`` results."""
        outputs = [self.fresh(op.lower()) for _ in range(count)]
        self.nodes.append(Node(op, list(inputs), outputs, attributes, self.scope))
        return outputs

    def once(self, op: str, inputs: Sequence[str], **attributes: Attribute) -> str:
        """The result of a node that is added the first time that it is asked for."""
        key = (op, *inputs, *((k, _hashable(v)) for k, v in sorted(attributes.items())))
        graph: Graph | None = self
        while graph is not None:
            if key in graph._made:
                return graph._made[key]
            graph = graph.outer
        (name,) = self.run(op, inputs, **attributes)
        self._made[key] = name
        return name

    def node(self, op: str, inputs: Sequence[str], shape: Dims, dtype: DType, **attributes: Attribute) -> Tensor:
        """Adds a node whose one result lies in the order of its axes."""
        (name,) = self.run(op, inputs, **attributes)
        return self.tensor(name, shape, dtype)

    @staticmethod
    def tensor(name: str, shape: Dims, dtype: DType) -> Tensor:
        """The graph's tensor of that name, which lies in the order of its axes."""
        return Tensor(name, tuple(shape), np.dtype(dtype), tuple(range(len(shape))))

    # Constants

    def constant(self, array: np.ndarray | np.generic | Sequence[int] | float, dtype: DType | None = None) -> str:
        """The name of a constant; those that are alike are one."""
        array = np.asarray(array, dtype)
        flat, root = np.ascontiguousarray(array).reshape(-1), self.root
        key = ("constant", array.dtype, array.shape, hashlib.blake2b(flat.view(np.uint8)).digest())
        if key not in root._made:
            name = root._made[key] = root.fresh("constant")
            root.constants[name] = flat.reshape(array.shape)
        return root._made[key]

    def ints(self, numbers: Sequence[int]) -> str:
        """A constant vector of int64, as shapes, axes and pads are given."""
        return self.constant(np.asarray(numbers, np.int64))

    def shape(self, dims: Dims) -> str:
        """A vector of int64 that holds a shape, also one that is known when the graph runs alone."""
        if is_static(dims):
            return self.ints(dims)
        parts = [self.ints([n]) if is_static([n]) else self.sizes.vector(self, n) for n in dims]
        return self.once("Concat", parts, axis=0)

    # Values as operators want them

    def array(self, value: Value) -> Const | Tensor:
        """A weight in codes as the array that it stands for."""
        return value.dense() if isinstance(value, Coded) else value

    def plain(self, value: Value, *, order: Sequence[int] | None = None) -> str:
        """The name of a value that lies in the order of its axes, or in ``order``, every element of it there."""
        value = self.array(value)
        order = tuple(range(len(value.shape))) if order is None else tuple(order)
        repeats = repeats_of(value)
        name = self.compact(value, order=order)
        if not repeats:
            return name
        return self.once("Expand", [name, self.shape(tuple(value.shape[i] for i in order))])

    def compact(self, value: Value, *, order: Sequence[int] | None = None) -> str:
        """As :meth:`plain`, axes that repeat one element having length 1."""
        value = self.array(value)
        order = tuple(range(len(value.shape))) if order is None else tuple(order)
        if isinstance(value, Const):
            return self.constant(np.transpose(value.array, order))
        if value.order == order:
            return value.name
        return self.once("Transpose", [value.name], perm=[value.order.index(i) for i in order])

    def operand(self, value: Value, order: Sequence[int]) -> str:
        """A value for an operator that broadcasts: compact, a constant without leading axes of length 1."""
        value = self.array(value)
        if not value.shape:
            return self.compact(value)
        if isinstance(value, Const):
            array = np.transpose(value.array, order)
            lead = next((i for i, n in enumerate(array.shape) if n != 1), array.ndim)
            return self.constant(array.reshape(array.shape[lead:]))
        return self.compact(value, order=order)

    def elementwise(self, op: str, values: Sequence[Value], dtype: DType, **attributes: Attribute) -> Tensor:
        """The result of an operator that broadcasts, which lies as the first operand does that is no constant."""
        arrays = [self.array(v) for v in values]
        ranked = [v for v in arrays if v.shape] or arrays
        shape = broadcast(v.shape for v in ranked)
        every = frozenset(range(len(shape)))
        tensors = [v for v in ranked if isinstance(v, Tensor)]
        lead = max(tensors, key=lambda v: (len(every - v.repeats), not v.plain), default=None)
        order = tuple(range(len(shape))) if lead is None else lead.order
        ones = {i for i, n in enumerate(shape) if is_one(n)}
        short = [repeats_of(v) | {i for i, n in enumerate(v.shape) if is_one(n)} for v in ranked]
        repeats = every.intersection(*short) - ones
        (name,) = self.run(op, [self.operand(v, order) for v in arrays], **attributes)
        return Tensor(name, shape, np.dtype(dtype), order, repeats)

    def cast(self, value: Value, dtype: DType) -> Tensor:
        """The value in another type, by ONNX's rules."""
        return self.elementwise("Cast", [value], dtype, to=np.dtype(dtype))


def broadcast(shapes: Iterable[Dims]) -> Dims:
    """The shape of what an operator makes of operands of one rank: an axis of length 1 goes with any other."""
    return tuple(next((n for n in axis if not is_one(n)), 1) for axis in zip(*shapes, strict=True))


def _hashable(value: Attribute) -> object:
    return tuple(value) if isinstance(value, list | tuple) else value
