#!/usr/bin/env bash
# jax 0.12.0.1 on CPU (0.10.2 too): a right shift of uint4 is arithmetic, and int4's population count counts eight bits.
# Expected: as of uint8: zeros come in from the left; at most four bits of four are set. Seen: uint4 10 >> 1 is 13, not 5;
# every value from 8 up is wrong, in jit and out of it (uint2 too); population_count of int4 -2 is 7, not 3, of -1 even -8. No
# warning. The element is kept in a sign-extended byte. So codes are unpacked from uint8 words, never shifted in their own type.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp

codes = jnp.arange(16)


def shifted(dtype):
    shift = lambda x: x >> jnp.ones((), dtype)
    eager, jitted = (f(codes.astype(dtype)).astype(jnp.int32).tolist() for f in (shift, jax.jit(shift)))
    assert eager == jitted
    return eager


ones = jax.lax.population_count(jnp.arange(-8, 8).astype(jnp.int4)).astype(jnp.int32).tolist()
print("jax 0.12.0.1, 0..15 >> 1 as uint8:", shifted(jnp.uint8))
print("as uint4:                         ", shifted(jnp.uint4))
print("population count of int4 -8..7:   ", ones)
assert shifted(jnp.uint8) == [i >> 1 for i in range(16)]
assert shifted(jnp.uint4) == [i >> 1 if i < 8 else (i >> 1) + 8 for i in range(16)]
counted = [bin(256 + i).count("1") for i in range(-8, 0)]
assert ones[:8] == [*counted[:-1], -8] and ones[8:] == [bin(i).count("1") for i in range(8)]
PY
