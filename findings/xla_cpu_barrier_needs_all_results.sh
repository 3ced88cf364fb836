#!/usr/bin/env bash
# jax 0.12.0.1 on CPU: optimization_barrier((a, b)) orders nothing when only one of its results is used.
# Expected: a layer's packed weight that went through a barrier with the layer's input is unpacked after that input is
# there, whether or not the barrier's copy of the input is read; so a chain of layers holds one dense weight at a time.
# Seen: the operand whose result nobody reads is taken out of the barrier, the weights of all layers wait for nothing,
# and all are dense before the first product. With both results used it is one. jax 0.10.2 has all of them either way.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
from jax import lax

LAYERS, N = 8, 512


def dense_weights(both: bool) -> float:
    """The temporaries of the compiled chain, in float32 weights of a layer."""

    def chain(layers, x):
        for packed in layers:
            packed, after = lax.optimization_barrier((packed, x))
            w = jnp.stack([packed & 15, packed >> 4], -1).reshape(N, N).astype(jnp.float32) - 8
            x = jnp.tanh((after if both else x) @ w)
        return x

    layers = [jax.ShapeDtypeStruct((N * N // 2,), jnp.uint8)] * LAYERS
    compiled = jax.jit(chain).lower(layers, jax.ShapeDtypeStruct((1, N), jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * N * N)


one, both = dense_weights(False), dense_weights(True)
print(f"jax {jax.__version__}, {LAYERS} layers: {one:.2f} dense weights with one result used, {both:.2f} with both")
assert one > LAYERS - 1
assert both < 2
PY
