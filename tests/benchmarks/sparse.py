"""Products with pruned weights on a CPU over the dense float32 ones beside them, by sparsity and rows or images.

``python -m tests.benchmarks sparse``, under ``taskset -c 0`` for one core; ``sparse.layers`` and ``sparse.networks``
are its halves, a dense layer and a ResNet-18. Weights are random, pruned by magnitude, and prepared with ``sparse=``:
float32, and int8 codes with a scale a feature. onnxruntime's float32 is beside the networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcomp as jc
from jaxcomp.export import to_onnx
from tests.benchmarks.export_onnx import random_net, session
from tests.benchmarks.gpu_cases import Call, Compiled, Setting, run_cases
from tests.benchmarks.timing import Report

FLOAT, AGAIN = "dense float32", "dense float32 again (control)"
SPARSITIES = (0.8, 0.9, 0.95)
ROWS = (1, 16, 256)
NETWORKS = ((64, 1), (64, 8), (16, 1))
"""Width, images."""
ONNX = "dense float32 in onnxruntime"


def product(p: Any, x: jax.Array) -> jax.Array:
    """One dense layer."""
    return x @ p["w"]


def sections(name: str, *, toy: bool = False) -> Callable[[], Iterator[Report]]:
    """What runs the layers, the networks, or both.

    Raises:
      ValueError: no such section.
    """
    parts = {"layers": layers, "networks": networks}
    if name and name not in parts:
        raise ValueError(f"sparse has no section {name!r}; there are {', '.join(parts)}")

    def run() -> Iterator[Report]:
        for part in [parts[name]] if name else parts.values():
            yield from part(Setting.lasting(3600, toy=toy))

    return run


def layers(setting: Setting) -> Iterator[Report]:
    """A report for each number of rows."""
    d = setting.pick(4096, 128)
    params = {"w": jax.random.normal(jax.random.key(0), (d, d)) / np.sqrt(d).astype(np.float32)}
    for rows in ROWS:
        x = jax.random.normal(jax.random.key(1), (rows, d))
        yield compared(setting, f"{d}^2, {rows} rows", product, params, x)


def networks(setting: Setting) -> Iterator[Report]:
    """A report for each width of a ResNet-18 and number of images; all kernels are pruned but those of batch norm."""
    for width, images in setting.pick(NETWORKS, NETWORKS[-1:]):
        apply, variables = random_net(width)
        folded = jc.fold_batch_norm(apply)(variables, np.ones((1, 28, 28, 1), np.float32))
        x = jax.random.normal(jax.random.key(1), (images, 28, 28, 1))
        with TemporaryDirectory() as folder:
            peers = {ONNX: partial(in_onnxruntime, Path(folder), folded.fn, folded.params, x)}
            title = f"ResNet-18 of width {width}, {images} images"
            yield compared(setting, title, folded.fn, folded.params, x, peers)


def compared(
    setting: Setting,
    title: str,
    fn: Callable[..., Any],
    params: Any,
    x: jax.Array,
    peers: dict[str, Callable[[], Call]] | None = None,
) -> Report:
    """All sparsities."""
    makers: dict[str, Callable[[], Call]] = {name: partial(Compiled, fn, params, x) for name in (FLOAT, AGAIN)}
    for sparsity in SPARSITIES:
        pruned = jc.prune(sparsity, roles=jc.roles(fn)(params, x))
        codes = jc.quantize(jc.Int(8), roles=jc.roles(fn)(params, x))
        for name, steps in {"float32": [pruned], "int8": [pruned, codes]}.items():
            makers[f"{sparsity:.0%} zeros, {name}"] = partial(_prepared, jc.chain(*steps), fn, params, x)
    makers |= peers or {}
    ran = run_cases(makers, setting, inner=3, rounds=11)
    rows = [ran.speed(name, FLOAT, compared=False) for name in makers if name != FLOAT]
    return ran.report(title, rows, FLOAT)


def _prepared(compress: jc.Transform, fn: Callable[..., Any], params: Any, x: jax.Array) -> Call:
    tree = jc.prepare(jc.pack(compress.apply(compress.init(params), params)), fn, x, sparse=0.5)
    return Compiled(jc.quantize_function(fn, {}, integer=True), tree, None, x)


def in_onnxruntime(folder: Path, fn: Callable[..., Any], params: Any, x: jax.Array) -> Call:
    """The float program, on one thread."""
    to_onnx(folder / "float.onnx", fn, params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    ran, given = session(folder / "float.onnx"), {"input": np.asarray(x)}
    return lambda: jnp.asarray(ran.run(None, given)[0])
