#!/usr/bin/env bash
# jax 0.12.0.1 on CPU: arrays of int4, uint4, int2 cannot be summed, and what does not raise wraps in four bits.
# Expected: sums as of int8, in int32; a product of int4 by int4 with int32 sums, which preferred_element_type asks for.
# Seen: jnp.sum and jnp.prod raise ValueError "Invalid integer data type 'V'", though jnp.mean works (int2: in int2, so that
# the mean of 1, -2, 1 is 0); with dtype=int32 the sum is right; jnp.cumsum, jnp.dot and jax.ops.segment_sum stay in int4
# and wrap without a word, as int8's do; lax.dot with preferred_element_type=int32 is a JaxRuntimeError of the compiler
# ("does not support custom element sizes"). Codes are to be cast to int8 or int32 before anything is summed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp


def outcome(fn):
    try:
        found = fn()
    except Exception as e:  # what is raised is what is seen
        return type(e).__name__
    return str(found.dtype), float(found.astype(jnp.float32))


codes = jnp.array([7, 7, 7, -8, 5], jnp.int4)
square = jnp.ones((8, 8), jnp.int4)
two_bits = jnp.array([1, -2, 1], jnp.int2)
seen = {
    "sum": outcome(lambda: jnp.sum(codes)),
    "prod": outcome(lambda: jnp.prod(codes)),
    "mean": outcome(lambda: jnp.mean(codes)),
    "sum, dtype=int32": outcome(lambda: jnp.sum(codes, dtype=jnp.int32)),
    "cumsum": outcome(lambda: jnp.cumsum(codes)[1]),
    "dot": outcome(lambda: jnp.dot(codes, codes)),
    "dot to int32": outcome(lambda: jax.lax.dot(square, square, preferred_element_type=jnp.int32)[0, 0]),
    "sum of int8": outcome(lambda: jnp.sum(codes.astype(jnp.int8))),
    "mean of int2": outcome(lambda: jnp.mean(two_bits)),
}
for name, what in seen.items():
    print(f"jax {jax.__version__}, {name}: {what}")
assert seen["sum"] == seen["prod"] == "ValueError"
assert seen["mean"][0] == "float32"
assert seen["sum, dtype=int32"] == seen["sum of int8"] == ("int32", 18.0)
assert seen["cumsum"] == ("int4", -2.0)
assert seen["dot"] == ("int4", -4.0)
assert seen["dot to int32"] == "JaxRuntimeError"
assert seen["mean of int2"] == ("int2", 0.0)
PY
