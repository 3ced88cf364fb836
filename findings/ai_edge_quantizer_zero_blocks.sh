#!/usr/bin/env bash
# ai-edge-quantizer 0.10.0 with ai-edge-litert 2.3.0: pruned weights quantized in blocks make files that LiteRT refuses.
# Expected: blocks of 32 weights that are all zero (nine weights of ten pruned, or whole rows) are zeros in the file, as
# they are with a scale a channel; every recipe of the package makes a file that its runtime loads.
# Seen: dynamic_wi4b32 and dynamic_wi4b64 write the scale 0 for a block of zeros, without a word, and the interpreter does
# not load the file: RuntimeError "unsupported scale value (0.000000) ... in XNNPACK delegate". So it is with rotated
# channels (dynamic_wi4c_hr) where a whole output is zero, and with weights of 1e-9 in blocks, whose scale float16 rounds to
# 0. dynamic_wi4 and dynamic_wi8, a scale a channel, load. Files of dynamic_wi2b32 are not loaded whatever the weights.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "ai-edge-quantizer==0.10.0" "ai-edge-litert==2.3.0" "jax==0.12.0.1" "jaxlib==0.12.0.1" \
  "ml_dtypes==0.6.0" "numpy==2.5.5"
"$work/venv/bin/pip" install -q --no-deps "litert-converter==0.5.0"
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" -W ignore - 2> "$work/log" <<'PY' || { tail -5 "$work/log"; exit 1; }
import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import Quantizer, recipe
from litert_converter import converter_api_ext as api
from litert_converter.mlir import ir, passmanager
from litert_converter.mlir.dialects import stablehlo

rng = np.random.default_rng(0)
x, weights = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 64), (64, 32)))
pruned = np.where(rng.random(weights.shape) < 0.9, np.float32(0), weights)
no_output = np.where(np.arange(32) == 3, np.float32(0), weights)


def model(w):
    program = jax.export.export(jax.jit(lambda x: x @ jnp.asarray(w)), platforms=["cpu"])(x)
    context = ir.Context()
    api.prepare_mlir_context(context)
    with context:
        module = stablehlo.deserialize_portable_artifact(context, program.mlir_module_serialized)
        api.set_signature(module.operation, "serving_default", ["args_0"], ["output_0"])
        api.run_convert_to_tfl_passes(module, passmanager.PassManager("builtin.module"), api.ConvertToTFLConfig())
        return bytes(api.export_flatbuffer_to_bytes(module.operation))


def outcome(w, name):
    with open("float.tflite", "wb") as f:
        f.write(model(w))
    with contextlib.redirect_stdout(io.StringIO()):
        quantizer = Quantizer("float.tflite")
        quantizer.load_quantization_recipe(getattr(recipe, name)())
        data = bytes(quantizer.quantize().quantized_model)
    try:
        run = Interpreter(model_content=data)
        run.allocate_tensors()
        run.set_tensor(run.get_input_details()[0]["index"], x)
        run.invoke()
    except RuntimeError as e:
        return "scale 0" if "unsupported scale value (0.000000)" in str(e) else "refused"
    found = run.get_tensor(run.get_output_details()[0]["index"])
    return "runs" if np.abs(found - x @ w).max() < 0.5 * np.abs(x @ w).max() else "wrong"


wanted = {
    ("weights", "dynamic_wi4b32_afp32"): "runs",
    ("pruned", "dynamic_wi4b32_afp32"): "scale 0",
    ("1e-9", "dynamic_wi4b32_afp32"): "scale 0",
    ("pruned", "dynamic_wi4_afp32"): "runs",
    ("pruned", "dynamic_wi8_afp32"): "runs",
    ("an output of zeros", "dynamic_wi4b64_afp32"): "scale 0",
    ("an output of zeros", "dynamic_wi4c_hr_afp32"): "scale 0",
    ("an output of zeros", "dynamic_wi4_afp32"): "runs",
    ("weights", "dynamic_wi2b32_afp32"): "refused",
}
of = {"weights": weights, "pruned": pruned, "1e-9": weights * np.float32(1e-9), "an output of zeros": no_output}
for (what, name), want in wanted.items():
    seen = outcome(of[what], name)
    print(f"ai-edge-quantizer 0.10.0, {what}, {name}: {seen}")
    assert seen == want, (what, name, seen)
PY
