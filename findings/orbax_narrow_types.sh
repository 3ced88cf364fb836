#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 (tensorstore 0.1.86): of jax's narrow types some are saved and their unsigned twins are not.
# Expected: a tree that has uint4 codes is saved as one that has int4 codes is; the zero point of an asymmetric grid makes
# codes unsigned.
# Seen: int4, int2, float4_e2m1fn, float8_e4m3fn, float8_e3m4 and float8_e5m2 come back bit by bit; uint4, uint2 and
# float8_e4m3 (the one with infinities) are a ValueError when the tree is saved ("Unsupported data type"), after which
# nothing of the tree is there. As uint8 such codes are saved.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "orbax-checkpoint==0.12.8" "tensorstore==0.1.86" "jax==0.12.0.1" "jaxlib==0.12.0.1" \
  "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - "$work" 2> "$work/log" <<'PY' || { tail -5 "$work/log"; exit 1; }
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

folder = Path(sys.argv[1])
seen = {}
for name in ("int4", "int2", "float4_e2m1fn", "float8_e4m3fn", "float8_e3m4", "float8_e5m2", "uint4", "uint2", "float8_e4m3"):
    codes = jnp.array([[1, 0, 1], [0, 1, 1]], jnp.float32).astype(name)
    checkpointer = ocp.StandardCheckpointer()
    try:
        checkpointer.save(folder / name, {"codes": codes, "scale": jnp.ones(3)})
        checkpointer.wait_until_finished()
        back = checkpointer.restore(folder / name)["codes"]
        assert back.dtype == codes.dtype
        assert np.array_equal(np.asarray(back), np.asarray(codes))
        seen[name] = "saved"
    except ValueError as e:
        seen[name] = "Unsupported data type" if "Unsupported data type" in str(e) else str(e)
        assert not (folder / name).exists()
    print(f"orbax-checkpoint {ocp.__version__}, {name}: {seen[name]}")
refused = {name for name, what in seen.items() if what == "Unsupported data type"}
assert refused == {"uint4", "uint2", "float8_e4m3"}
assert set(seen.values()) == {"saved", "Unsupported data type"}
PY
