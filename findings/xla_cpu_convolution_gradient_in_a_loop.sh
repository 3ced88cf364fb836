#!/usr/bin/env bash
# jax 0.12.0.1 on CPU: the gradient of convolutions in the weights is ten times slower inside lax.map than outside.
# Expected: two microbatches in a loop (lax.map, lax.scan), as gradients are accumulated and Hessian products are summed,
# take about as long as the two one after the other in one jit: the loop's body is the same program.
# Seen: forward they do (1.0 of it); the gradient takes 10 to 13 times as long, on two cores, without a warning. With
# jax 0.10.2 it is the same. The loop written out is not slowed; a vmap over the microbatches takes 1.7 times as long.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax


def loss(weights, x):
    for w in weights:
        x = jax.nn.relu(lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
    return jnp.mean(x**2)


def seconds(fn, *args):
    jax.block_until_ready(fn(*args))
    took = []
    for _ in range(9):
        began = time.perf_counter()
        jax.block_until_ready(fn(*args))
        took.append(time.perf_counter() - began)
    return statistics.median(took)


keys = jax.random.split(jax.random.key(0), 2)
weights = [jax.random.normal(keys[0], (3, 3, 16, 16)) * 0.1 for _ in range(4)]
microbatches = jax.random.normal(keys[1], (2, 8, 28, 28, 16))
ratios = {}
for name, fn in {"forward": loss, "gradient": jax.grad(loss)}.items():
    apart = jax.jit(lambda w, xs, fn=fn: [fn(w, x) for x in xs])
    loop = jax.jit(lambda w, xs, fn=fn: lax.map(lambda x: fn(w, x), xs))
    together = jax.jit(lambda w, xs, fn=fn: jax.vmap(lambda x: fn(w, x))(xs))
    base = seconds(apart, weights, microbatches)
    ratios[name] = seconds(loop, weights, microbatches) / base
    beside = seconds(together, weights, microbatches) / base
    print(f"jax {jax.__version__}, {name}: {base * 1e3:.1f} ms apart; in a loop {ratios[name]:.1f}x, in vmap {beside:.1f}x")
assert ratios["forward"] < 2
assert ratios["gradient"] > 4
PY
