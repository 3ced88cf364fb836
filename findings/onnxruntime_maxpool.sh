#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU): MaxPool loses a NaN that stands before a number in its window, and keeps one that stands after;
# and of a window that holds minus infinity alone it gives the least float32, in some shapes minus infinity.
# Expected: NaN wherever the window holds one, as of Max (and of JAX's reduce_window); minus infinity. Seen: [NaN, 1, 2, NaN]
# in windows of two gives [1, 2, NaN]; windows of [2, 2] give -3.4028235e+38 where those of [1, 2] give -inf.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "onnxruntime==1.32.0" "onnx==1.23.2" "numpy==2.5.5"
"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper


def pooled(x, kernel):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", x.shape), ("y", None))]
    pool = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=kernel)
    graph = helper.make_graph([pool], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0].ravel()


seen = pooled(np.array([[[[np.nan, 1, 2, np.nan]]]], np.float32), [1, 2])
print("NaN, 1, 2, NaN in windows of two:", seen)
assert seen[:2].tolist() == [1, 2]
assert np.isnan(seen[2])
nothing = np.full((1, 1, 2, 2), -np.inf, np.float32)
largest = [float(pooled(nothing, kernel)[0]) for kernel in ([1, 2], [2, 2])]
print("minus infinity alone, in windows of [1, 2] and of [2, 2]:", *largest)
assert largest == [-np.inf, np.finfo(np.float32).min]
PY
