"""Activations that a rule quantizes: QuantizeLinear and DequantizeLinear before the products that they enter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from jaxcomp.activations.fake import Entry, encode
from jaxcomp.activations.planning import Planned
from jaxcomp.activations.specs import Act
from jaxcomp.export.errors import ExportError
from jaxcomp.export.onnx.dynamic import dynamic_dot
from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.registry import RULES, Step
from jaxcomp.export.onnx.values import Tensor, Value
from jaxcomp.trace.ranges import Range

PER_TENSOR = Act().per


@dataclass(frozen=True)
class Site:
    """Writes the product of one site, its activations on their grids.

    Attributes:
      planned: what is asked of it.
      ranges: those given, by name.
    """

    planned: Planned
    ranges: Mapping[str, Range]

    def __call__(self, step: Step) -> Value:
        """The product's result, by the primitive's rule."""
        act, site = self.planned.act, self.planned.site
        if step.name == "dot_general" and isinstance(act, Act) and not act.needs_range and not _is_dynamic(act):
            found = dynamic_dot(step, act, tuple(operand.roles for operand in site.operands))
            if found is not None:
                return found
        values = list(step.values)
        for i in self.planned.site.activations:
            values[i] = self.entered(step, i)
        written = RULES[step.name](replace(step, values=values))
        return written[0] if isinstance(written, Sequence) else written

    def entered(self, step: Step, i: int) -> Value:
        """An operand rounded to its grid."""
        act, site, value = self.planned.act, self.planned.site, step.graph.array(step.values[i])
        if not isinstance(act, Act):
            raise ExportError(f"to_onnx: {site.path!r} asks for {act}, and no runtime runs that; ask for an Act.")
        if not isinstance(value, Tensor):
            return value
        name = self.planned.ranges.get(i)
        if name is None:
            if not _is_dynamic(act):
                step.refuse(f"{site.path!r} asks for {act}", "take Act(8, range=Dynamic()), or ranges from calibrate")
            return dynamic(step.graph, value)
        given = Range(*(jnp.asarray(np.asarray(end)[step.layers]) for end in self.ranges[name]))
        return on_grid(step.graph, value, *grid_of(act, given), act.bits)


def _is_dynamic(act: Act) -> bool:
    """Whether DynamicQuantizeLinear is what a rule asks for."""
    return not act.symmetric and act.bits == 8 and act.per == PER_TENSOR


def grid_of(act: Act, given: Range) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of unsigned codes, those that the integer function computes with."""
    found = encode(jnp.zeros((1,), jnp.float32), act, Entry(("output",), given))
    scale = np.asarray(found.scale, np.float32).reshape(())
    zero = 2 ** (act.bits - 1) if found.zero is None else int(np.asarray(found.zero).reshape(()))
    return scale, np.asarray(zero, np.uint8)


def on_grid(graph: Graph, value: Tensor, scale: np.ndarray, zero: np.ndarray, bits: int = 8) -> Tensor:
    """A value quantized and dequantized where it lies."""
    name = value.name
    if bits < 8:
        ends = [(np.float32(code) - np.float32(zero)) * scale for code in (0, 2**bits - 1)]
        name = graph.once("Clip", [name, *(graph.constant(end, np.dtype(np.float32)) for end in ends)])
    grid = [graph.constant(scale), graph.constant(zero)]
    codes = graph.once("QuantizeLinear", [name, *grid])
    return replace(value, name=graph.once("DequantizeLinear", [codes, *grid]))


def dynamic(graph: Graph, value: Tensor) -> Tensor:
    """A value quantized and dequantized by its own range."""
    codes, scale, zero = graph.run("DynamicQuantizeLinear", [value.name], count=3)
    return replace(value, name=graph.once("DequantizeLinear", [codes, scale, zero]))
