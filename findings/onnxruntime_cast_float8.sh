#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU): Cast to float8 without saturation is wrong just above the largest number.
# Expected: what ONNX's table of casts says, its reference evaluator (onnx 1.23.2), ml_dtypes and JAX do: beyond E5M2's range
# infinity, beyond E4M3FN's NaN. Seen (saturate=0): E5M2 gives NaN from 61,440 to 65,535 and infinity from 65,536 on; E4M3FN
# gives 448 from 480 up to 496, and NaN on both sides of that. With saturate=1, the default, both are right. And a Cast to INT4 rounds
# (halves away from 0) and then wraps, where Cast to INT8 and the reference evaluator cut towards 0: 7.5 becomes -8.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "onnxruntime==1.32.0" "onnx==1.23.2" "ml_dtypes==0.6.0" "numpy==2.5.5"
"$work/venv/bin/python" -W ignore - <<'PY'
import ml_dtypes
import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator


def cast(kind: str, x: np.ndarray, **attributes: int) -> tuple[np.ndarray, np.ndarray]:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in "xy"]
    there = helper.make_node("Cast", ["x"], ["q"], to=getattr(TensorProto, kind), **attributes)
    back = helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT)
    graph = helper.make_graph([there, back], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0], ReferenceEvaluator(model).run(None, {"x": x})[0]


wide = np.float32([57344, 61439, 61440, 62000, 65535, 65536, 70000])
e5m2, reference = cast("FLOAT8E5M2", wide, saturate=0)
print("float32:", wide.tolist(), "\nE5M2:   ", e5m2.tolist(), "\nonnx:   ", reference.tolist())
assert np.array_equal(reference, wide.astype(ml_dtypes.float8_e5m2).astype(np.float32))
assert np.isnan(e5m2[2:5]).all() and np.isinf(e5m2[5:]).all() and (e5m2[:2] == 57344).all()

near = np.float32([448, 464, 465, 479, 480, 495, 496])
e4m3, reference = cast("FLOAT8E4M3FN", near, saturate=0)
print("float32:", near.tolist(), "\nE4M3FN: ", e4m3.tolist(), "\nonnx:   ", reference.tolist())
assert np.array_equal(reference, near.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), equal_nan=True)
assert (e4m3[[0, 1, 4, 5]] == 448).all() and np.isnan(e4m3[[2, 3, 6]]).all()
for kind, x, most in (("FLOAT8E5M2", wide, 57344), ("FLOAT8E4M3FN", near, 448)):
    assert (cast(kind, x, saturate=1)[0] == most).all()

parts = np.float32([0.5, 1.5, 2.5, 6.9, 7.5, -0.5, -8.5])
int4, reference = cast("INT4", parts)
print("float32:", parts.tolist(), "\nINT4:   ", int4.tolist(), "\nonnx:   ", reference.tolist())
assert np.array_equal(reference, np.trunc(parts)) and np.array_equal(cast("INT8", parts)[0], np.trunc(parts))
assert int4.tolist() == [1, 2, 3, 7, -8, -1, 7]
PY
