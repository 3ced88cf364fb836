"""Decoding on a CPU with weights in codes: four layers of 4096^2, over the float32 products beside them.

``python -m tests.benchmarks decode``, under ``taskset -c 0`` for one core. Peak memory is counted, not sampled: the
bytes of arguments, results and temporaries in the compiled program. Beside the form that the table of forms chooses,
the best one in plain jax.numpy, as it runs without llvmlite, and the file that onnxruntime runs on one thread, which
rounds activations to int8 by itself where weights are in 4 bits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxcomp as jc
from jaxcomp.activations import Dynamic
from jaxcomp.export import to_onnx
from jaxcomp.kernels import weight_only
from jaxcomp.kernels.blocks import MANY, shape_class
from jaxcomp.kernels.weight_only import summable
from tests.benchmarks.export_onnx import session
from tests.benchmarks.gpu_cases import Call, Compiled, Ran, Setting, run_cases
from tests.benchmarks.gpu_products import DYNAMIC, GRIDS, LAYERS, layers, our_layers
from tests.benchmarks.timing import Report, Row

FLOAT, AGAIN, OTHER = "float32", "float32 again (control)", "onnxruntime"
RULES = {
    "dynamic int8 activations": DYNAMIC,
    "dynamic int8 activations, asymmetric": jc.Act(8, range=Dynamic()),
}
AIMS = {"int8": ">= 1.2", "int4 g128": ">= 1"}
MEMORY = "<= 2"


def run(*, toy: bool = False) -> Iterator[Report]:
    """The reports: one row, sixteen, and a prompt's 256 with what is prepared alone."""
    setting = Setting.lasting(3600, toy=toy)
    d = setting.pick(4096, 256)
    keys = jax.random.split(jax.random.key(1), LAYERS)
    params = {f"l{i}": jax.random.normal(k, (d, d)) / np.sqrt(d).astype(np.float32) for i, k in enumerate(keys)}
    trees = {name: jax.jit(lambda p, t=t: jc.pack(t.apply((), p)))(params) for name, t in GRIDS.items()}
    for batch in (1, 16, 256):
        yield decoded(setting, params, trees, jax.random.normal(jax.random.key(2), (batch, d)))


def decoded(setting: Setting, params: Any, trees: dict[str, Any], x: jax.Array) -> Report:
    """Each way to run the codes: multiplied out by hand, by ``quantize_function``, and that of a prepared tree."""
    makers: dict[str, Callable[[], Call]] = {name: partial(Compiled, layers, params, x) for name in (FLOAT, AGAIN)}
    aims: dict[str, str] = {}
    prompt = shape_class(len(x)) == MANY
    for grid, tree in trees.items():
        if not prompt:
            makers[f"{grid}, materialized"] = partial(Compiled, lambda p, x: layers(jc.materialize(p), x), tree, x)
            makers[f"{grid}, as packed"] = partial(our_layers, tree, x, {}, prepare=False)
            makers[f"{grid}, prepared, plain jax.numpy"] = partial(_plain, tree, x)
        makers[f"{grid}, prepared"] = partial(our_layers, tree, x, {}, prepare=True)
        for name, rule in RULES.items():
            makers[f"{grid}, prepared, {name}"] = partial(our_layers, tree, x, {".*": rule}, prepare=True)
        aims[f"{grid}, prepared"] = AIMS[grid] if len(x) == 1 else ""
        makers[f"{OTHER}, {grid}"] = partial(_in_onnxruntime, tree, x)
    ran = run_cases(makers, setting, inner=1 if prompt else 3, rounds=5 if prompt else 11)
    rows = []
    for name in makers:
        if name != FLOAT:
            rows.append(ran.speed(name, FLOAT, target=aims.get(name, ""), compared=name != AGAIN))
    ours = [name for name in makers if name not in (FLOAT, AGAIN) and not name.startswith(OTHER)]
    rows += [_memory(ran, name, aims) for name in ours]
    batch, d = x.shape
    return ran.report(f"{LAYERS} layers of {d}^2, float32, batch {batch}", rows, FLOAT)


def _plain(tree: Any, x: jax.Array) -> Call:
    """The layers of a tree that is prepared row by row, in the form without llvmlite."""
    made = jc.prepare(tree, layers, x[:1])

    def run(tree: Any, x: jax.Array) -> jax.Array:
        for name in sorted(tree):
            w = tree[name].weight
            x = weight_only(x, w, form="sums" if len(x) == 1 and summable(w) else "chunks")
        return x

    return Compiled(run, made, x)


def _in_onnxruntime(tree: Any, x: jax.Array) -> Call:
    """The layers of a packed tree as a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layers.onnx"
        to_onnx(path, layers, tree, x)
        ran = session(path)
    given = {"input": np.asarray(x)}
    return lambda: ran.run(None, given)[0]


def _memory(ran: Ran, name: str, aims: dict[str, str]) -> Row:
    """Megabytes beside the leaves that the program is given."""

    def beside(case: Compiled) -> float:
        memory = case.program.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        return (peak - sum(leaf.nbytes for leaf in jax.tree.leaves(case.args[0]))) / 1e6

    return ran.counted(name, "memory beside the leaves", beside, target=MEMORY if name in aims else "", unit="MB")
