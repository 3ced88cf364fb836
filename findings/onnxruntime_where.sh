#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU): Where takes some 20 times as long as an Add of the same arrays, some 10 times with a scalar.
# Expected: one pass over memory, as of Add, Max or Clip. Seen on one thread, a million float32: Add 0.5 ns a number, Where
# of three arrays 10 to 14, of two and a scalar 5 to 6; so leaky ReLU by Where takes 16 ns, LeakyRelu 0.8, and a mask of
# attention scores that is added, not chosen by, is 10 times as fast.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "onnxruntime==1.32.0" "onnx==1.23.2" "numpy==2.5.5"
"$work/venv/bin/python" - <<'PY'
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

rng, shape = np.random.default_rng(0), (64, 16384)
arrays = {"c": rng.random(shape) < 0.5, "x": rng.random(shape, np.float32), "z": rng.random(shape, np.float32)}


def session(op, *names):
    types = {"c": TensorProto.BOOL}
    ends = [helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), shape) for n in names if n in arrays]
    node = helper.make_node(op, names, ["y"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    graph = helper.make_graph([node], "g", ends, [y], [numpy_helper.from_array(np.float32(-1), "k")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return made, {n: arrays[n] for n in names if n in arrays}


def seconds(made, given):
    start = time.perf_counter()
    made.run(None, given)
    return time.perf_counter() - start


cases = {"Add": session("Add", "x", "z"), "Where": session("Where", "c", "x", "z"), "scalar": session("Where", "c", "x", "k")}
best = {name: min(seconds(*case) for _ in range(15)) for name, case in cases.items()}
for name, time_taken in best.items():
    print(f"{name}: {time_taken / arrays['x'].size * 1e9:.2f} ns a number")
assert best["Where"] > 6 * best["Add"]
assert best["scalar"] > 4 * best["Add"]
PY
