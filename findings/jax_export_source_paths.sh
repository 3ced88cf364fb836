#!/usr/bin/env bash
# jax 0.12.0.1 (and 0.10.2): jax.export writes the paths of the source files that an operation was traced from into the
# artifact, whole, with every caller's. Expected: a program. Seen: the folder and the names of the functions of the
# machine that wrote it, and for a small program half of the bytes. The pass strip-debuginfo takes them out.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "numpy==2.5.5" flatbuffers
cat > "$work/a_private_name.py" <<'PY'
import re

import jax
import jax.numpy as jnp
from jax import export
from jax.extend.mlir import passmanager
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters.mlir import make_ir_context


def a_private_function(x):
    for _ in range(20):
        x = jnp.tanh(x) @ jnp.eye(4)
    return x


program = export.export(jax.jit(a_private_function))(jnp.ones((2, 4)))
data = bytes(program.serialize())
version = re.search(rb"StableHLO_v([\d.]+)", data)[1].decode()
with make_ir_context() as context:
    module = stablehlo.deserialize_portable_artifact(context, program.mlir_module_serialized)
    passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(module.operation)
    bare = stablehlo.serialize_portable_artifact(module, version)
found = set(re.findall(rb"[\w/.-]*a_private_name\.py", data))
print(f"jax {jax.__version__}: {len(data)} bytes hold {found}; stripped, the module has {len(bare)} of"
      f" {len(program.mlir_module_serialized)} bytes")
assert found and b"a_private_function" in data and b"a_private_name" not in bare
PY
JAX_PLATFORMS=cpu "$work/venv/bin/python" -W ignore "$work/a_private_name.py"
