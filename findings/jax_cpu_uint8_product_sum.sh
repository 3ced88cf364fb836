#!/usr/bin/env bash
# jax 0.12.0.1 on CPU (0.10.2 too): 8-bit products and sums do not wrap where they are converted to float and summed in jit.
# Expected: uint8 arithmetic is modulo 256, as out of jit, and as in jit where the result is not summed. Seen: with 64 rows
# of 128, sum(float32(d * 16) * b) is the sum over 16 d not wrapped: off by 7e4; d * 3 and d + 200 and int8 alike, no
# warning. d << 4 is right, as are 8 rows of 2 x 64. So fields of packed bytes are cut out by shifts and masks alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

rng = np.random.default_rng(0)
d, b = rng.integers(0, 256, (64, 128)).astype(np.uint8), rng.integers(-3, 4, 128).astype(np.float32)


def summed(cut, xp):
    return lambda d, b: (cut(d).astype(xp.float32) * b[None]).sum(-1)


def off(cut, of_numpy):
    """The largest difference in jit and out of it; all sums are exact in float32."""
    want = summed(of_numpy, np)(d, b)
    f = summed(cut, jnp)
    return [float(np.abs(np.asarray(run(jnp.asarray(d), jnp.asarray(b))) - want).max()) for run in (jax.jit(f), f)]


product = off(lambda d: d * jnp.uint8(16), lambda d: d * np.uint8(16))
shift = off(lambda d: d << jnp.uint8(4), lambda d: d << np.uint8(4))
unwrapped = off(lambda d: d * jnp.uint8(16), lambda d: d.astype(np.int32) * 16)
print("jax 0.12.0.1, jit and eager, off by: d * 16", product, " d << 4", shift, " d * 16 against 16 d not wrapped", unwrapped)
assert product[0] > 1e4 and product[1] == 0
assert shift == [0, 0]
assert unwrapped[0] == 0 and unwrapped[1] > 1e4
PY
