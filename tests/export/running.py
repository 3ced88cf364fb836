"""Programs run by onnxruntime, the independent oracle of what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxcomp.export import to_onnx


def session(path: Path, *, optimized: Path | None = None, **config: str) -> Any:
    """A session of one thread; ``optimized`` is where the graph goes that is really run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, *args: Any) -> list[np.ndarray]:
    """The results of a file's graph on arrays, in order."""
    ran = session(path)
    return list(ran.run(None, {i.name: np.asarray(a) for i, a in zip(ran.get_inputs(), args, strict=True)}))


def exported(folder: Path, fn: Any, params: Any, *args: Any, **how: Any) -> list[np.ndarray]:
    """Writes the function, checks the file, and runs it on the same arguments."""
    import onnx

    to_onnx(folder / "fn.onnx", fn, params, *args, **how)
    onnx.checker.check_model(folder / "fn.onnx")
    return run(folder / "fn.onnx", *args)


def operators(path: Path) -> list[str]:
    """The operators of a file's graph, in order."""
    import onnx

    return [node.op_type for node in onnx.load(path).graph.node]
