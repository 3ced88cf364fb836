#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU): DequantizeLinear -> MatMul -> Add -> Relu becomes MatMulNBits and Relu, but not where a float
# MatMul comes next. Expected: the same fusion. Seen: the Relu is fused into FusedGemm, which takes floats, so the whole
# weight is dequantized in each run: tens of times slower than float32. Max(x, 0) in the Relu's place is fused.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "onnxruntime==1.32.0" "onnx==1.23.2" "numpy==2.5.5"
"$work/venv/bin/python" -W ignore - "$work" <<'PY'
import sys
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

N, BLOCK, folder = 1024, 32, sys.argv[1]
rng = np.random.default_rng(0)


def built(last):
    constants = [
        helper.make_tensor("q", TensorProto.INT4, [N, N], rng.integers(-8, 8, N * N)),
        numpy_helper.from_array(rng.random((N // BLOCK, N), np.float32) / 100, "s"),
        numpy_helper.from_array(rng.random(N, np.float32), "b"),
        numpy_helper.from_array(np.float32(0), "zero"),
        numpy_helper.from_array(rng.random((N, 8), np.float32), "head"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=BLOCK),
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["a"]),
        helper.make_node(last, ["a", "zero"][: 1 + (last == "Max")], ["r"]),
        helper.make_node("MatMul", ["r", "head"], ["y"]),
    ]
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, k])] for n, k in (("x", N), ("y", 8))]
    graph = helper.make_graph(nodes, "g", *ends, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


seen = {}
for last in ("Relu", "Max"):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.optimized_model_filepath = 1, f"{folder}/{last}.onnx"
    session = onnxruntime.InferenceSession(built(last).SerializeToString(), options)
    x = np.ones((1, N), np.float32)
    began = time.perf_counter()
    for _ in range(50):
        session.run(None, {"x": x})
    seen[last] = [n.op_type for n in onnx.load(f"{folder}/{last}.onnx").graph.node]
    print(f"{last}: {seen[last]}, {(time.perf_counter() - began) / 50 * 1e6:.0f} us")
assert "MatMulNBits" in seen["Max"] and "MatMulNBits" not in seen["Relu"]
PY
