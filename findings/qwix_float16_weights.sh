#!/usr/bin/env bash
# qwix 0.1.8 (jax 0.12.0.1): float16 weights of usual size quantized to int8 are all 0.
# Expected: codes as for bfloat16 and float32. Seen: weights of deviation 0.05 have a scale near 0.0013; a scale below
# the square root of float16's smallest normal number (0.0078) is taken for that of a block of zeros and becomes 1, and
# all codes 0. No warning. int4, whose scale is larger, is right; scale_dtype=float32 is too.
# And an unsigned type under the default calibration makes every negative weight 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "qwix==0.1.8" "jax==0.12.0.1" "jaxlib==0.12.0.1" "flax==0.12.12" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import qwix

weights = jax.random.normal(jax.random.key(0), (64, 8)) * 0.05
kept = {}
for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
    for qtype in (jnp.int8, jnp.int4):
        leaf = qwix.quantize(weights.astype(dtype), qtype, channelwise_axes=[1])
        kept[dtype.__name__, qtype.__name__] = int((leaf.qvalue != 0).sum())
        print(f"{dtype.__name__} -> {qtype.__name__}: largest scale {float(leaf.scale.max()):.4g}, "
              f"{kept[dtype.__name__, qtype.__name__]} of 512 codes are not 0")
wide = qwix.quantize(weights.astype(jnp.float16), jnp.int8, channelwise_axes=[1], scale_dtype=jnp.float32)
print("float16 -> int8 with scale_dtype=float32:", int((wide.qvalue != 0).sum()), "codes are not 0")
unsigned = qwix.dequantize(qwix.quantize(weights, jnp.uint4, channelwise_axes=[1]))
print("float32 -> uint4:", int((unsigned < 0).sum()), "negative weights of", int((weights < 0).sum()), "are left")
assert kept["float16", "int8"] == int((wide.qvalue != 0).sum()) == 0
assert min(v for k, v in kept.items() if k != ("float16", "int8")) > 400
assert int((unsigned < 0).sum()) == 0
PY
