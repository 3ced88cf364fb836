#!/usr/bin/env bash
# gguf 0.19.0: one NaN among the weights of an MXFP4 block makes all 32 of them 0, silently.
# Expected: NaN, as OCP's MX has a scale for it (E8M0 0xFF), and as the package's other formats give it. Seen: Q8_0 and
# Q4_0 give 32 NaN for the block, MXFP4 gives 32 zeros; an infinity does the same. A diverged layer looks pruned.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "gguf==0.19.0" "numpy==2.4.6"
"$work/venv/bin/python" -W ignore - <<'PY'
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

weights = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
weights[0, 3] = np.nan
seen = {}
for kind in (Type.Q8_0, Type.Q4_0, Type.MXFP4):
    back = quants.dequantize(quants.quantize(weights, kind), kind)[0]
    seen[kind.name] = (int(np.isnan(back[:32]).sum()), int((back[:32] == 0).sum()), bool(np.isfinite(back[32:]).all()))
    print(f"gguf 0.19.0 {kind.name}: of the block's 32 weights {seen[kind.name][0]} are NaN, {seen[kind.name][1]} are 0")
assert seen == {"Q8_0": (32, 0, True), "Q4_0": (32, 0, True), "MXFP4": (0, 32, True)}
PY
