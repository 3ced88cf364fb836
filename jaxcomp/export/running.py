"""Exported programs run where they are meant to: a file becomes a function of arrays, for checks and for timing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from jaxcomp.core.types import PyTree
from jaxcomp.export import litert_model
from jaxcomp.export.errors import ExportError
from jaxcomp.export.packages import package

Target = Literal["onnx", "stablehlo", "litert"]
"""What programs are exported to."""
SUFFIXES: dict[Target, str] = {"onnx": ".onnx", "stablehlo": ".stablehlo", "litert": ".tflite"}
"""The ends of their files' names."""
PACKAGES: dict[Target, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxruntime"),
    "stablehlo": (),
    "litert": ("litert_converter", "ai_edge_quantizer", "ai_edge_litert"),
}
"""What writes and runs them."""
Run = Callable[..., list[np.ndarray]]
"""From a program's arguments to the leaves of its result."""


def ready(target: Target) -> None:
    """The packages that write and run a target are there.

    Raises:
      ExportError: one is not; the message says how it is installed.
    """
    for name in PACKAGES[target]:
        if find_spec(name) is None:
            how = 'pip install "jaxcomp[export]"' if target == "onnx" else litert_model.INSTALL
            raise ExportError(f"{target}: the package {name} is not installed; {how}.")


def opened(path: str | os.PathLike[str], target: Target) -> Run:
    """The program in a file, run by onnxruntime, JAX or LiteRT's interpreter, on one thread where that can be said.

    Raises:
      ExportError: the runtime is not installed.
    """
    return {"onnx": _onnx, "stablehlo": _stablehlo, "litert": _litert}[target](Path(path))


def _onnx(path: Path) -> Run:
    runtime = package("onnxruntime", "an ONNX file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    # Or products with weights alone in codes round their activations to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def run(*args: PyTree) -> list[np.ndarray]:
        return list(session.run(None, dict(zip(names, _arrays(args), strict=True))))

    return run


def _stablehlo(path: Path) -> Run:
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    call = jax.jit(program.call)
    return lambda *args: _arrays(call(*args))


def _litert(path: Path) -> Run:
    started = litert_model.interpreter(path.read_bytes())

    def run(*args: PyTree) -> list[np.ndarray]:
        litert_model.given(started, _arrays(args))
        started.invoke()
        return litert_model.results(started)

    return run


def _arrays(tree: PyTree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def apart(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> tuple[float, float]:
    """The largest difference of two lists of results, as a part of the largest number wanted, and their cosine.

    >>> apart([np.array([1.0, 1.5])], [np.array([1.0, 2.0])])
    (0.25, 0.99...)
    """
    a, b = (np.concatenate([np.ravel(x).astype(np.float64) for x in arrays]) for arrays in (found, wanted))
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.abs(a - b).max(initial=0) / (np.abs(b).max(initial=0) or 1)), float(a @ b) / size if size else 1.0
