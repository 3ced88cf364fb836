#!/usr/bin/env bash
# int8 convolutions with int32 sums, XLA on CPU: with two spatial axes and more than 16 channels on one side at least they
# take what float32's do, or less; of 16 by 16 channels several times as long as float32's, and longer than the same one of
# twice the features; along one spatial axis some twenty times as long, whatever the channels.
# Expected: time in proportion to the products, and no more than float32 takes, as for dots of int8 of any width.
# Seen: jax and jaxlib 0.12.0.1 (0.10.2 too), Python 3.12, x86-64 with AVX2.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import time

import jax
import jax.numpy as jnp
from jax import lax

SPECS = {2: ("NHWC", "HWIO", "NHWC"), 1: ("NWC", "WIO", "NWC")}


def fastest(dtype, sizes, taps, inputs, outputs):
    sums = jnp.int32 if dtype == jnp.int8 else None
    x = jnp.ones((8, *sizes, inputs), dtype)
    w = jnp.ones((*taps, inputs, outputs), dtype)

    @jax.jit
    def run(x, w):
        strides, numbers = (1,) * len(sizes), SPECS[len(sizes)]
        return lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=numbers, preferred_element_type=sums)

    run(x, w).block_until_ready()
    times = []
    for _ in range(9):
        start = time.perf_counter()
        run(x, w).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)


def ratio(name, *shape):
    coded, plain = (fastest(dtype, *shape) for dtype in (jnp.int8, jnp.float32))
    print(f"{name}: int8 {coded * 1e3:.2f} ms, float32 {plain * 1e3:.2f} ms, {coded / plain:.2f} times as long")
    return coded, coded / plain


narrow, slower = ratio("32x32, 3x3, 16 to 16 channels", (32, 32), (3, 3), 16, 16)
double, _ = ratio("32x32, 3x3, 16 to 32 channels", (32, 32), (3, 3), 16, 32)
_, wide = ratio("32x32, 3x3, 64 to 64 channels", (32, 32), (3, 3), 64, 64)
_, line = ratio("1024, 9 taps, 64 to 64 channels", (1024,), (9,), 64, 64)
assert wide < 1.5, "wide int8 convolutions are slower than float32's now"
assert slower > 2 and narrow > 2 * double, "16 channels are fast now"
assert line > 5, "one spatial axis is fast now"
PY
