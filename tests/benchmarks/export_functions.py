"""Functions of networks in ONNX files on a CPU, one thread: as one operator over node by node.

``python -m tests.benchmarks export_functions``. Each is of two million numbers, in rows of 1,024, behind the sum of a
bias. Both files are ours; the other is written without the pass that names functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.export import to_onnx
from jaxcomp.export.onnx import export
from tests.benchmarks.export_onnx import session
from tests.benchmarks.gpu_cases import Call, Setting, run_cases
from tests.benchmarks.timing import Report

FUNCTIONS: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "GELU": lambda _, x: nn.gelu(x, approximate=False),
    "GELU by tanh": lambda _, x: nn.gelu(x),
    "hard-swish": lambda _, x: nn.hard_swish(x),
    "hard sigmoid": lambda _, x: nn.hard_sigmoid(x),
    "ELU": lambda _, x: nn.elu(x),
    "leaky ReLU": lambda _, x: nn.leaky_relu(x),
    "softplus": lambda _, x: nn.softplus(x),
    "Mish": lambda _, x: jax.nn.mish(x),
    "softmax": lambda _, x: nn.softmax(x),
    "layer norm": lambda p, x: nn.LayerNorm().apply({"params": p}, x),
}
ONE, MANY = "one operator", "node by node"


def run(*, toy: bool = False) -> Iterator[Report]:
    """A report for each function."""
    setting = Setting.lasting(1200, toy=toy)
    rng = np.random.default_rng(0)
    x = rng.normal(size=setting.pick((2048, 1024), (4, 8))).astype(np.float32)
    p = {k: jnp.asarray(rng.normal(size=x.shape[1]), jnp.float32) for k in ("bias", "scale")}
    for name, fn in FUNCTIONS.items():
        with TemporaryDirectory() as folder:
            makers = {way: partial(_in_onnxruntime, Path(folder) / f"{way}.onnx", fn, p, x) for way in (MANY, ONE)}
            ran = run_cases(makers, setting, inner=1, rounds=setting.pick(15, 2))
            yield ran.report(f"{name} in onnxruntime, speed", [ran.speed(ONE, MANY, compared=True)], MANY)


def _in_onnxruntime(file: Path, fn: Callable[[Any, jax.Array], jax.Array], p: Any, x: np.ndarray) -> Call:
    def behind_a_bias(p: Any, x: jax.Array) -> jax.Array:
        return fn(p, x + p["bias"][None])

    with mock.patch.object(export, "name_functions", export.name_functions if file.stem == ONE else lambda graph: None):
        to_onnx(file, behind_a_bias, p, x)
    ran = session(file)
    return lambda: jnp.asarray(ran.run(None, {"input": x})[0])
