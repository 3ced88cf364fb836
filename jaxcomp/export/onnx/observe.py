"""What ranges tensors of a graph have: the graph is run on samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxcomp.core.types import PyTree
from jaxcomp.export.errors import ExportError
from jaxcomp.export.onnx.graph import Graph
from jaxcomp.export.onnx.model import model_of, onnx
from jaxcomp.export.onnx.passes.results import Ends
from jaxcomp.export.packages import package


@dataclass(frozen=True)
class Seen:
    """Runs a graph on batches, each a tuple of arguments or the only one.

    Attributes:
      graph: as it is so far.
      samples: the batches.
    """

    graph: Graph
    samples: Iterable[PyTree]

    def __call__(self, names: Sequence[str]) -> dict[str, Ends]:
        """The smallest and the largest element of each tensor.

        Raises:
          ExportError: there is no batch, one does not fit, a value is not finite, or there is no onnxruntime.
        """
        ends = dict.fromkeys(names, (np.inf, -np.inf))
        for results in self.results(names):
            for name, array in zip(names, results, strict=True):
                low, high = ends[name]
                ends[name] = (min(low, float(array.min())), max(high, float(array.max())))
        wrong = [name for name, pair in ends.items() if not np.isfinite(pair).all()]
        if wrong:
            raise ExportError(
                f"to_onnx: on the samples {wrong[0]!r} is not finite, or there is no sample; give batches that the"
                " function takes, none of them empty."
            )
        return ends

    def results(self, names: Sequence[str]) -> Iterator[list[np.ndarray]]:
        """The tensors of each batch."""
        onnxruntime = package("onnxruntime", "to_onnx: samples=")
        model = model_of(self.graph, "observed")
        model.graph.output.extend(onnx().helper.make_empty_tensor_value_info(name) for name in names)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for batch in self.samples:
            leaves = jax.tree.leaves(batch)
            inputs = self.graph.inputs
            if len(leaves) != len(inputs) or any(
                np.ndim(a) != len(t.shape) for a, t in zip(leaves, inputs, strict=True)
            ):
                raise ExportError(
                    f"to_onnx: a batch of samples= has arrays of shape {[np.shape(a) for a in leaves]}, wanted"
                    f" {[t.shape for t in inputs]}: samples= is a list of batches, each an array for each input."
                )
            fed = {t.name: np.transpose(np.asarray(a, t.dtype), t.order) for t, a in zip(inputs, leaves, strict=True)}
            try:
                yield session.run(list(names), fed)
            except Exception as e:
                raise ExportError(
                    f"to_onnx: the samples do not run in the written graph: {' '.join(str(e).split())}"
                ) from e
