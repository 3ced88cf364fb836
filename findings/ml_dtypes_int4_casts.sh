#!/usr/bin/env bash
# ml_dtypes 0.6.0 beside jax 0.10.2 (CPU): a float beyond int4's range becomes another number in numpy than in jax.
# Expected: one rule for one type, the two packages being one project's. Seen: numpy's cast through ml_dtypes wraps
# (8.0 -> -8, 100.0 -> 4, inf -> 0), jax's saturates (7, 7, 7), in jit too; yet an int32 wraps in both (8 -> -8). And a
# NaN cast to float4_e2m1fn, which has no NaN, is -0.0 in both, without a warning.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.10.2" "jaxlib==0.10.2" "ml_dtypes==0.6.0" "numpy==2.4.6"
JAX_PLATFORMS=cpu "$work/venv/bin/python" -W ignore - <<'PY'
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

floats = np.array([-9, 8, 100, np.inf], np.float32)
ints = np.array([-9, 8, 100], np.int32)
by_numpy = floats.astype(ml_dtypes.int4).tolist()
by_jax = jnp.asarray(floats).astype(jnp.int4).tolist()
in_jit = jax.jit(lambda x: x.astype(jnp.int4))(floats).tolist()
ints_by_numpy, ints_by_jax = ints.astype(ml_dtypes.int4).tolist(), jnp.asarray(ints).astype(jnp.int4).tolist()
nan = np.array([np.nan], np.float32)
lost = [nan.astype(ml_dtypes.float4_e2m1fn), np.asarray(jnp.asarray(nan).astype(jnp.float4_e2m1fn))]
print(f"float32 {floats.tolist()} -> int4: numpy {by_numpy}, jax {by_jax}")
print(f"int32 {ints.tolist()} -> int4: numpy {ints_by_numpy}, jax {ints_by_jax}")
print(f"NaN -> float4_e2m1fn: numpy {lost[0][0]}, jax {lost[1][0]}")
assert by_numpy == [7, -8, 4, 0]
assert by_jax == in_jit == [-8, 7, 7, 7]
assert ints_by_numpy == ints_by_jax == [7, -8, 4]
assert all(float(x[0]) == 0 and np.signbit(x.astype(np.float32))[0] for x in lost)
PY
