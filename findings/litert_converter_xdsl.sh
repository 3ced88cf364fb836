#!/usr/bin/env bash
# litert-converter 0.5.0 pins xdsl==0.28.0, which wants typing-extensions < 4.13 and immutabledict < 4.2.2: with tyro 1.0
# (typing-extensions >= 4.13) pip finds no solution. Expected: it needs what it pins. Seen: converting a StableHLO program
# imports no xdsl; installed with --no-deps beside the newest of all, it works.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
pip="$work/venv/bin/pip"
if "$pip" install -q --dry-run "litert-converter==0.5.0" "tyro>=1.0" 2> "$work/said"; then
  echo "pip resolves it now"; exit 1
fi
grep -i "conflict" "$work/said" | head -1
"$pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "numpy==2.5.5" "tyro>=1.0" "ai-edge-litert==2.3.0"
"$pip" install -q --no-deps "litert-converter==0.5.0"
JAX_PLATFORMS=cpu "$work/venv/bin/python" -W ignore - <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from litert_converter import converter_api_ext as api
from litert_converter.mlir import ir, passmanager
from litert_converter.mlir.dialects import stablehlo

x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
program = jax.export.export(jax.jit(lambda x: jnp.tanh(x) * 2), platforms=["cpu"])(x)
context = ir.Context()
api.prepare_mlir_context(context)
with context:
    module = stablehlo.deserialize_portable_artifact(context, program.mlir_module_serialized)
    api.set_signature(module.operation, "serving_default", ["args_0"], ["output_0"])
    api.run_convert_to_tfl_passes(module, passmanager.PassManager("builtin.module"), api.ConvertToTFLConfig())
    data = api.export_flatbuffer_to_bytes(module.operation)
run = Interpreter(model_content=data)
run.allocate_tensors()
run.set_tensor(run.get_input_details()[0]["index"], x)
run.invoke()
apart = abs(run.get_tensor(run.get_output_details()[0]["index"]) - 2 * np.tanh(x)).max()
print(f"litert-converter 0.5.0 without xdsl: {len(data)} bytes, {apart:.1e} apart; xdsl imported: {'xdsl' in sys.modules}")
assert apart < 1e-5 and "xdsl" not in sys.modules
PY
