#!/usr/bin/env bash
# jax 0.12.0.1 (0.10.2 too): random numbers drawn in bfloat16 are 128 different ones, of float8_e4m3fn 8, of float16 1024.
# Expected: numbers of that type as a float32 draw rounded to it has them: thousands of different ones, unbiased. Seen:
# uniform is a multiple of 1/128, 0 among them, so its mean is low by 1/256, and normal is made of the same 128: mean -0.012,
# none beyond 2.9 in size, where float32 has 4.6. So stochastic rounding of bfloat16 to whole steps by such noise never takes up
# what is below 1/128 of a step, a Bernoulli draw of probability 0.001 comes out 0.0077 (of 0.999: always), and a layer of
# Flax with param_dtype=bfloat16 starts with at most 128 different weights, which a table of 128 entries holds without
# loss: no measure of what compression does to trained weights. Draw in float32, then cast.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "flax==0.12.12" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

key, shape = jax.random.key(0), (1 << 20,)
different, low = {}, {}
for dtype in (jnp.float32, jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn):
    u, n = (np.asarray(draw(key, shape, dtype)).astype(np.float64) for draw in (jax.random.uniform, jax.random.normal))
    different[dtype.__name__], low[dtype.__name__] = len(np.unique(n)), n.mean()
    print(f"{dtype.__name__}: {len(np.unique(u))} and {len(np.unique(n))} different, means {u.mean():.4f} and {n.mean():.4f}, "
          f"largest normal {n.max():.2f}")
cast = len(np.unique(np.asarray(jax.random.normal(key, shape).astype(jnp.bfloat16)).astype(np.float32)))
print("float32 normal cast to bfloat16:", cast, "different")


def taken_up(share: float, dtype) -> float:
    x = jnp.full(shape, share, dtype)
    return float(jnp.floor(x + jax.random.uniform(key, shape, dtype)).astype(jnp.float32).mean())


rounded = {d.__name__: [taken_up(share, d) for share in (1 / 256, 1 / 4)] for d in (jnp.float32, jnp.bfloat16)}
print("taken up of 1/256 and of 1/4:", rounded)
odds = [float(jax.random.bernoulli(key, jnp.bfloat16(p), shape).mean()) for p in (0.001, 0.999)]
print("bernoulli of bfloat16 0.001 and 0.999:", odds)
kernel = nnx.Linear(512, 512, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)).kernel[...]
print("nnx.Linear(512, 512, param_dtype=bfloat16):", len(np.unique(np.asarray(kernel, np.float32))), "different weights")
assert different["float32"] > 900_000 and cast > 2000
assert [different[d] for d in ("float16", "bfloat16", "float8_e4m3fn")] == [1024, 128, 8]
assert abs(low["float32"]) < 2e-3 and low["bfloat16"] < -0.01
assert rounded["bfloat16"][0] == 0 < 0.003 < rounded["float32"][0] and abs(rounded["bfloat16"][1] - 0.25) < 0.01
assert odds[0] > 0.007 and odds[1] == 1
assert len(np.unique(np.asarray(kernel, np.float32))) <= 128
PY
