#!/usr/bin/env bash
# ml_dtypes 0.6.0 (numpy 2.5.5): numpy's mean and sum of bfloat16 and int4 arrays are added up in that type, hence wrong.
# Expected: as of float16, whose mean numpy takes in float32, and of int8, whose sum is an int64 and whose mean a float64. Seen:
# the mean of |w| over 262,144 normal bfloat16 weights is 0.0044 and not 0.80, for a bfloat16 sum stops growing at 256 times
# what is added; the sum of 1000 int4 codes is taken modulo 16 and their mean is an int4; the square of uint4 is an int8, so
# that 13 * 13 is -87. No warning. jnp.mean and jnp.sum of the bfloat16 array are right. So: astype(np.float32), np.int32 first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax.numpy as jnp
import ml_dtypes
import numpy as np

draw = np.random.default_rng(0)
w = np.abs(draw.normal(size=(64, 4096)))
means = {np.dtype(d).name: float(w.astype(d).mean()) for d in (np.float32, np.float16, ml_dtypes.bfloat16)}
print("mean of |w|:", {k: round(v, 4) for k, v in means.items()})
half = w.astype(ml_dtypes.bfloat16)
print("of the bfloat16 array by jnp.mean, by rows:", float(jnp.mean(half)), half.mean(1)[:3], np.asarray(jnp.mean(half, 1))[:3])
ones = np.ones(1000, ml_dtypes.bfloat16)
print("sum of 1000 ones:", ones.sum(), "; norm of 4000 ones:", np.sqrt(np.square(ones.repeat(4)).sum()))

codes = draw.integers(-8, 8, 1000)
sums = {t: codes.astype(t).sum() for t in (np.int8, ml_dtypes.int4)}
mean = codes.astype(ml_dtypes.int4).mean()
print("sum of 1000 codes:", {np.dtype(t).name: int(s) for t, s in sums.items()}, "; int4 mean:", mean, mean.dtype, "of", codes.mean())
square = np.square(np.arange(16).astype(ml_dtypes.uint4))
print("squares of uint4 0..15:", square.dtype, square.tolist())

assert abs(means["float16"] - means["float32"]) < 1e-3 and means["bfloat16"] < 0.01 < 0.79 < means["float32"]
assert abs(float(jnp.mean(half)) - means["float32"]) < 1e-2 and float(ones.sum()) == 256
assert sums[np.int8] == codes.sum() and int(sums[ml_dtypes.int4]) == (codes.sum() + 8) % 16 - 8 != codes.sum()
assert mean.dtype == ml_dtypes.int4 and square.dtype == np.int8 and square[13] == -87
PY
