"""``to_onnx``: a function of compressed parameters as an ONNX file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxcomp.activations.planning import Rules, assigned, checked_ranges
from jaxcomp.core.paths import some_paths
from jaxcomp.core.types import Params, PyTree
from jaxcomp.export.errors import ExportError, want_rules
from jaxcomp.export.onnx.activations import Site
from jaxcomp.export.onnx.emitter import Emitter
from jaxcomp.export.onnx.graph import Graph, Node
from jaxcomp.export.onnx.model import model_of, write
from jaxcomp.export.onnx.observe import Seen
from jaxcomp.export.onnx.parameters import opened, values_of
from jaxcomp.export.onnx.passes.affine import fold_affine
from jaxcomp.export.onnx.passes.functions import name_functions
from jaxcomp.export.onnx.passes.integers import to_integers
from jaxcomp.export.onnx.passes.links import sweep
from jaxcomp.export.onnx.passes.results import quantize_results
from jaxcomp.export.onnx.passes.weights import narrow_kernels, spell_out_relus
from jaxcomp.export.onnx.rules import MODULES
from jaxcomp.export.onnx.values import Dims, Tensor, Value, is_static
from jaxcomp.trace.program import Program, trace
from jaxcomp.trace.ranges import Range

assert MODULES, "the modules of rules register them when they are imported"

Layouts = Mapping[str, Sequence[int]]
"""How inputs and outputs lie, by name: axis ``k`` in the file is axis ``layouts[name][k]`` of the function's array."""


class FloatConvolutions(UserWarning):
    """Convolutions of codes whose results have no grid, so that the runtime runs them in float; slow, not wrong."""


def to_onnx(
    path: str | os.PathLike[str],
    fn: Callable[..., PyTree],
    params: Params,
    *args: PyTree,
    rules: Rules | None = None,
    ranges: Mapping[str, Range] | None = None,
    samples: Iterable[PyTree] | None = None,
    layouts: Layouts | None = None,
) -> int:
    """Writes ``fn(params, *args)`` as an ONNX file with the parameters in it; gives its bytes.

    Weights are written as the tree has them: ``Quantized`` leaves as codes of 4 or 8 bits behind a DequantizeLinear.
    Rules and ranges are those of :func:`~jaxcomp.quantize_function`, and the file computes what it does with
    ``integer=True``: dots in integers with one rescale, convolutions with their result rounded to the grid of who reads
    it. What scales and shifts channels (batch norm, a bias) is folded into the weight before.

    Args:
      path: of the file, which appears whole or not at all.
      fn: a pure function ``fn(params, *args)``.
      params: the parameter tree; compressed leaves stay compressed.
      args: arrays, or ``jax.ShapeDtypeStruct``; a dimension may be one of ``jax.export.symbolic_shape("batch, ...")``,
        and the file then takes any size there. The inputs are called ``input``, or ``input_0``, ``input_1``, …, and the
        outputs likewise, in the order of their leaves.
      rules: ``{where: Act(...)}`` over the paths of ``sites(fn)``.
      ranges: by activation, as ``ranges_of(calibrate(fn)(...))`` gives them.
      samples: batches as ``calibrate_over`` takes them. With them convolutions whose results no product reads at once,
        as those that a residual block adds, run on codes too: the results get the range that is seen when the written
        graph runs on the samples. Without, it warns of them (``FloatConvolutions``).
      layouts: ``{"input": (0, 3, 1, 2)}`` has an image in NHWC come in NCHW.

    Raises:
      ExportError: an equation or a leaf that ONNX does not take, or a layout of something else.
      FileError: the file cannot be written.
      TypeError, ValueError: of the rules and the ranges, as ``quantize_function`` has them.

    >>> import jax, jax.numpy as jnp, tempfile
    >>> fn = lambda p, x: jax.nn.relu(x @ p["w"])
    >>> rows = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 8"), jnp.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     to_onnx(f"{folder}/net.onnx", fn, {"w": jnp.ones((8, 4))}, rows) > 8 * 4 * 4
    True
    """
    want_rules("to_onnx", rules, ranges=ranges, samples=samples)
    written, shapes = opened(fn, params)
    program = trace(written, shapes, *args)
    planned = assigned(program, rules or {})
    given = checked_ranges(planned, ranges)
    sites = {p.site.location: Site(p, given) for p in planned if p.act is not None}
    graph = Graph()
    emitter = Emitter({op.location: op for op in program.flow.ops}, sites)
    lies = _Ends(dict(layouts or {}))
    values = [*values_of(graph, params, emitter.jaxpr), *lies.inputs(graph, program)]
    lies.outputs(graph, emitter.jaxpr(graph, program.jaxpr, values, ()))
    fold_affine(graph)
    left = quantize_results(graph, None if samples is None else Seen(graph, samples))
    to_integers(graph)
    spell_out_relus(graph)
    narrow_kernels(graph)
    name_functions(graph)
    sweep(graph)
    if left:
        warnings.warn(
            f"to_onnx: nobody quantizes the results of the convolutions at {some_paths(left)}, so onnxruntime runs them"
            " in float; give samples= (some batches), so that they get ranges.",
            FloatConvolutions,
            stacklevel=2,
        )
    return write(path, model_of(graph, getattr(fn, "__name__", "main")))


class _Ends:
    """The graph's inputs and outputs, and how they lie."""

    def __init__(self, layouts: dict[str, Sequence[int]]) -> None:
        self.layouts = layouts
        self.known: list[str] = []

    def inputs(self, graph: Graph, program: Program) -> list[Value]:
        """Makes the inputs."""
        avals = program.jaxpr.in_avals[len(program.param_paths) :]
        for i, aval in enumerate(avals):
            if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
                raise ExportError(
                    f"to_onnx: argument {i} is of {aval.dtype}, which ONNX has not; make what it is for (random keys:"
                    " the key) inside of the function, or leave that part out of the export."
                )
            name = graph.fresh(f"input_{i}" if len(avals) > 1 else "input")
            order = self.order(name, tuple(aval.shape))
            tensor = replace(graph.tensor(name, tuple(aval.shape), aval.dtype), order=order)
            graph.inputs.append(tensor)
            for axis, n in enumerate(tensor.held):
                if not is_static([n]):
                    graph.sizes.read.setdefault(str(n), (name, axis))
        return list(graph.inputs)

    def outputs(self, graph: Graph, results: Sequence[Value]) -> None:
        """Makes the outputs of the results."""
        for i, value in enumerate(results):
            name = graph.fresh(f"output_{i}" if len(results) > 1 else "output")
            order = self.order(name, value.shape)
            graph.nodes.append(Node("Identity", [graph.plain(value, order=order)], [name], {}))
            graph.outputs.append(Tensor(name, value.shape, value.dtype, order))
        foreign = set(self.layouts) - set(self.known)
        if foreign:
            raise ExportError(
                f"to_onnx: layouts name {some_paths(sorted(foreign))}; the file has {some_paths(self.known)}."
            )

    def order(self, name: str, shape: Dims) -> tuple[int, ...]:
        """How one of them lies."""
        self.known.append(name)
        order = tuple(self.layouts.get(name, range(len(shape))))
        if sorted(order) != list(range(len(shape))):
            raise ExportError(
                f"to_onnx: layouts[{name!r}] must be an order of the {len(shape)} axes of {shape}, got {order}; for"
                " NCHW out of NHWC it is (0, 3, 1, 2)."
            )
        return order
