"""``to_onnx``: a function of compressed parameters as an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from jaxcomp.activations.codes import Codes, codes_of
from jaxcomp.activations.planning import Rules, assigned, checked_ranges
from jaxcomp.core.leaves import dense, is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.core.types import Leaf, Params, PyTree
from jaxcomp.export.onnx.activations import Site
from jaxcomp.export.onnx.emitter import Emitter
from jaxcomp.export.onnx.graph import Graph, Node
from jaxcomp.export.onnx.model import model_of, write
from jaxcomp.export.onnx.rules import MODULES
from jaxcomp.export.onnx.values import Coded, Const, Value, is_static
from jaxcomp.trace.program import Program, shapes_of, trace
from jaxcomp.trace.ranges import Range

assert MODULES, "the modules of rules register them when they are imported"


def to_onnx(
    path: str | os.PathLike[str],
    fn: Callable[..., PyTree],
    params: Params,
    *args: PyTree,
    rules: Rules | None = None,
    ranges: Mapping[str, Range] | None = None,
) -> int:
    """Writes ``fn(params, *args)`` as an ONNX file with the parameters in it; gives its bytes."""
    program = trace(fn, shapes_of(params), *args)
    planned = assigned(program, rules or {})
    given = checked_ranges(planned, ranges)
    sites = {p.site.location: Site(p, given) for p in planned if p.act is not None}
    graph = Graph()
    emitter = Emitter({op.location: op for op in program.flow.ops}, sites)
    values = [*_parameters(program, params), *_inputs(graph, program)]
    results = emitter.jaxpr(graph, program.jaxpr, values, ())
    _outputs(graph, results)
    return write(path, model_of(graph, getattr(fn, "__name__", "main")))


def _parameters(program: Program, params: Params) -> list[Value]:
    named, _ = leaves_with_paths(params, is_leaf=is_compressed)
    found = dict(named)
    return [_parameter(found[path]) for path in program.param_paths]


def _parameter(leaf: Leaf) -> Value:
    codes = codes_of(leaf) if is_compressed(leaf) else None
    if isinstance(codes, Codes):
        return Coded(codes)
    return Const.of(dense(leaf))


def _inputs(graph: Graph, program: Program) -> list[Value]:
    avals = program.jaxpr.in_avals[len(program.param_paths) :]
    for i, aval in enumerate(avals):
        tensor = graph.tensor(graph.fresh(f"input_{i}" if len(avals) > 1 else "input"), tuple(aval.shape), aval.dtype)
        graph.inputs.append(tensor)
        for axis, n in enumerate(aval.shape):
            if not is_static([n]):
                graph.sizes.read.setdefault(str(n), (tensor.name, axis))
    return list(graph.inputs)


def _outputs(graph: Graph, results: Sequence[Value]) -> None:
    for i, value in enumerate(results):
        name = graph.fresh(f"output_{i}" if len(results) > 1 else "output")
        graph.nodes.append(Node("Identity", [graph.plain(value)], [name], {}))
        graph.outputs.append(graph.tensor(name, value.shape, value.dtype))
