#!/usr/bin/env bash
# jax 0.12.0.1 on CPU (0.10.2 too): in a loop over tokens, int8 weights are made dense in front of the loop.
# Expected: a step that multiplies int8 codes and sums, which alone needs no temporary at all, needs none in a scan
# either, and reads a byte a weight in each step. Seen: the conversion does not depend on the step, so XLA moves it out:
# the loop holds, and reads in each step, the float32 weight, four times the bytes. A barrier around the codes moves out
# with them; one that ties the codes to the step's activations keeps them packed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
from jax import lax

N = 1024
codes, tokens = jnp.ones((N, N), jnp.int8), jnp.ones((16, N))


def product(x, codes):
    return (codes.astype(jnp.float32) * x).sum(-1) / N


FORMS = {
    "as it is": product,
    "a barrier around the codes": lambda x, codes: product(x, lax.optimization_barrier(codes)),
    "a barrier around codes and activations": lambda x, codes: product(*lax.optimization_barrier((x, codes))),
}


def temporaries(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def loop(step):
    return lambda tokens, codes: lax.scan(lambda x, new: (step(x + new, codes), None), tokens[0], tokens)[0]


alone = temporaries(product, tokens[0], codes)
seen = {name: temporaries(loop(step), tokens, codes) for name, step in FORMS.items()}
print(f"temporaries in bytes: one step {alone}; in a scan", ", ".join(f"{name} {n:,}" for name, n in seen.items()))
dense = 4 * N * N
assert alone < 1 << 16
assert [n >= dense for n in seen.values()] == [True, True, False], seen
PY
