#!/usr/bin/env bash
# jax 0.12.0.1 on CPU (0.10.2 too): jnp.max and jnp.min lose NaN in float32 arrays of 4,096 numbers and more.
# Expected: NaN, as numpy.max gives and as jnp.max gives of 4,095 numbers. Seen: from 4,096 on the largest of the others,
# in jit and out of it, for whole arrays and along an axis; jnp.min alike; float64 too, not bfloat16 and float16. jnp.sum
# keeps it. So "the range is finite, hence the batch is" does not hold: a check for NaN must be a sum or isnan.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

seen = {}
for n in (4095, 4096):
    x = np.ones(n, np.float32)
    x[n // 2] = np.nan
    largest, smallest, in_jit, total = jnp.max(x), jnp.min(x), jax.jit(jnp.max)(x), jnp.sum(jnp.asarray(x))
    seen[n] = [bool(np.isnan(v)) for v in (np.max(x), largest, smallest, in_jit, total)]
    print(f"{n} float32 with one NaN: is numpy.max NaN {seen[n][0]}, jnp.max {seen[n][1]}, jnp.min {seen[n][2]}, "
          f"jit(jnp.max) {seen[n][3]}, jnp.sum {seen[n][4]}")
rows = np.ones((64, 64), np.float32)
rows[32, 32] = np.nan
by_row = int(np.isnan(jnp.max(rows, axis=1)).sum())
narrow = bool(jnp.isnan(jnp.max(jnp.asarray(x, jnp.bfloat16))))
print(f"64 rows of 64, one with NaN: {by_row} rows have a maximum that is NaN; bfloat16, 4096: {narrow}")
assert seen == {4095: [True] * 5, 4096: [True, False, False, False, True]} and by_row == 0 and narrow
PY
