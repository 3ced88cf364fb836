"""Functions of neural networks that ONNX has an operator for: one node, not many that runtimes run one after another.

What a function looks like in a graph is found by writing it as any program is written; a graph that has the same nodes
on one tensor has the function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn

from jaxcomp.export.onnx.emitter import Emitter
from jaxcomp.export.onnx.graph import Graph, Node
from jaxcomp.export.onnx.passes.links import Links, everywhere
from jaxcomp.export.onnx.values import Tensor

ANY = float(np.float32(0.7310586))
"""Stands for any number in a function: an attribute of the operator."""
LENGTH = 977
"""Stands for how long the axis is that a function goes along."""
AXIS = -1
"""Stands for which one that is."""
TURNED = frozenset({"Add", "Max", "Min", "Mul"})
"""Operators whose two operands may change places."""


def _shares(x: jax.Array) -> jax.Array:
    return x / x.sum(-1, keepdims=True)


def _fast_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """As flax has it: the variance is the mean of squares less the square of the mean."""
    mean, squares = x.mean(-1), jnp.square(x).mean(-1)
    var = jnp.maximum(0.0, squares - jnp.square(mean))
    return (x - mean[:, None]) * (jax.lax.rsqrt(var[:, None] + ANY) * scale) + bias


def _centred(x: jax.Array) -> jax.Array:
    return x - x.mean(-1, keepdims=True)


def _norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    var = jnp.square(_centred(x)).mean(-1, keepdims=True)
    return _centred(x) * jax.lax.rsqrt(var + ANY) * scale + bias


def _var_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return _centred(x) * jax.lax.rsqrt(x.var(-1, keepdims=True) + ANY) * scale + bias


def _root_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return _centred(x) / jnp.sqrt(x.var(-1, keepdims=True) + ANY) * scale + bias


class Known(NamedTuple):
    """An operator of ONNX.

    Attributes:
      op, attributes: it.
      forms: programs that are it; one that goes along an axis gives the operator its ``axis``.
      any: the attribute that :data:`ANY` stands for.
      parameters: how many constants a form takes behind the array, as long as its axis.
    """

    op: str
    attributes: dict[str, float | str]
    forms: tuple[Callable[..., jax.Array], ...]
    any: str = "alpha"
    parameters: int = 0


KNOWN = (
    Known(
        "Gelu",
        {"approximate": "none"},
        (
            lambda x: nn.gelu(x, approximate=False),
            lambda x: 0.5 * x * (1 + jax.lax.erf(x / np.sqrt(2).astype(np.float32))),
            lambda x: x * 0.5 * (1 + jax.lax.erf(x / np.sqrt(2).astype(np.float32))),
        ),
    ),
    Known("Gelu", {"approximate": "tanh"}, (nn.gelu,)),
    Known(
        "HardSwish",
        {},
        (nn.hard_swish, lambda x: x * nn.relu6(x + 3) / 6, lambda x: x * jnp.clip(x + 3, 0, 6) / 6),
    ),
    Known(
        "HardSigmoid",
        {"alpha": 1 / 6, "beta": 0.5},
        (nn.hard_sigmoid, lambda x: jnp.clip(x + 3, 0, 6) / 6, lambda x: nn.relu6(x + 3) * np.float32(1 / 6)),
    ),
    Known("Mish", {}, (nn.mish,)),
    Known("Softplus", {}, (nn.softplus,)),
    Known("Selu", {"alpha": 1.6732632423543772, "gamma": 1.0507009873554805}, (nn.selu,)),
    Known("Elu", {}, (lambda x: nn.elu(x, ANY), lambda x: jnp.where(x > 0, x, ANY * jnp.expm1(x)))),
    Known("Celu", {}, (lambda x: nn.celu(x, ANY),)),
    Known(
        "LeakyRelu",
        {},
        (
            lambda x: nn.leaky_relu(x, ANY),
            lambda x: jnp.where(x > 0, x, ANY * x),
            lambda x: jnp.where(x > 0, x, x * ANY),
        ),
    ),
    Known("Softsign", {}, (nn.soft_sign,)),
    Known("LogSoftmax", {}, (nn.log_softmax,)),
    Known("Softmax", {}, (nn.softmax, lambda x: _shares(jnp.exp(x - x.max(-1, keepdims=True))))),
    Known("LayerNormalization", {}, (_fast_norm, _norm, _var_norm, _root_norm), any="epsilon", parameters=2),
)
"""Functions that another has inside stand behind it."""


class _Form(NamedTuple):
    """A function as a graph: what goes in, what makes each other tensor, the constants, and the last node."""

    given: tuple[str, ...]
    maker: dict[str, Node]
    constants: dict[str, np.ndarray]
    last: Node


@cache
def _forms() -> tuple[tuple[Known, _Form], ...]:
    return tuple((known, _written(fn, known.parameters)) for known in KNOWN for fn in known.forms)


def _written(fn: Callable[..., jax.Array], parameters: int) -> _Form:
    graph, shapes = Graph(), [(2, LENGTH), *[(1, LENGTH)] * parameters]
    given = [graph.tensor(f"given_{i}", shape, np.dtype(np.float32)) for i, shape in enumerate(shapes)]
    jaxpr = jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    (y,) = Emitter({}, {}).jaxpr(graph, jaxpr, given, ())
    assert isinstance(y, Tensor)
    maker = Links.of(graph).maker
    return _Form(tuple(x.name for x in given), maker, graph.constants, maker[y.name])


def name_functions(graph: Graph) -> None:
    """Puts the operators for functions of float32 in the places of the last of their nodes."""
    for part in everywhere(graph):
        links = Links.of(part)
        for known, form in _forms():
            for node in (node for node in part.nodes if node.op == form.last.op):
                found = _Found(links, form)
                if found.node(form.last, node) and found.fits(part.ranks, node):
                    names = {ANY: known.any, AXIS: "axis"}
                    read = {names[k]: number for k, number in found.numbers.items() if k in names}
                    node.op, node.inputs, node.attributes = known.op, found.inputs(), {**known.attributes, **read}


@dataclass
class _Found:
    """What a form's tensors are in a graph, as far as it was compared."""

    links: Links
    form: _Form
    bound: dict[str, str] = field(default_factory=dict)
    numbers: dict[float, float] = field(default_factory=dict)

    def fits(self, ranks: Mapping[str, int], node: Node) -> bool:
        """Whether an axis that the function goes along is the last, and the parameters are constants as long as it.

        Of another axis onnxruntime moves it there first, and takes longer than node by node.
        """
        parameters = [self.links.constant(self.bound[name]) for name in self.form.given[1:]]
        if any(v is None or v.shape != (self.numbers[LENGTH],) for v in parameters):
            return False
        return AXIS not in self.numbers or self.numbers[AXIS] == ranks.get(node.outputs[0], 0) - 1

    def inputs(self) -> list[str]:
        """The operator's."""
        return [self.bound[name] for name in self.form.given]

    def node(self, wanted: Node, node: Node) -> bool:
        """Whether a node does what the form's does, and so do those that make its operands."""
        if (wanted.op, wanted.attributes, len(wanted.inputs)) != (node.op, node.attributes, len(node.inputs)):
            return False
        before = dict(self.bound), dict(self.numbers)
        orders = [node.inputs, node.inputs[::-1]] if node.op in TURNED else [node.inputs]
        for names in orders:
            if all(map(self.tensor, wanted.inputs, names)):
                return True
            self.bound, self.numbers = dict(before[0]), dict(before[1])
        return False

    def tensor(self, wanted: str, name: str) -> bool:
        """Whether a tensor is the form's."""
        if wanted in self.form.constants:
            return self._number(self.form.constants[wanted], self.links.constant(name))
        if wanted not in self.bound and wanted not in self.form.given:
            made = self.links.maker.get(name)
            if made is None or not self.node(self.form.maker[wanted], made):
                return False
        return self.bound.setdefault(wanted, name) == name

    def _number(self, wanted: np.ndarray, found: np.ndarray | None) -> bool:
        if found is None or found.dtype != wanted.dtype or found.size != 1:
            return False
        number = found.item()
        if wanted.dtype == np.int64:
            return self.numbers.setdefault(AXIS, number) == number
        if wanted.item() in (ANY, LENGTH):
            return self.numbers.setdefault(wanted.item(), number) == number
        return np.array_equal(wanted.reshape(()), found.reshape(()), equal_nan=wanted.dtype.kind == "f")
