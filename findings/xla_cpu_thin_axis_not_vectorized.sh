#!/usr/bin/env bash
# jax 0.12.0.1 on CPU: elementwise work on arrays whose last axis has 16 to 33 elements is not vectorized.
# Expected: what is done to each element (clip, relu6, the mask of a fake quantizer) takes as long for an array of
# 65536 x 32 as for one of 32768 x 64, and compiles as fast: thin channels are common (widths 16 and 32).
# Seen (AVX2): 2.5 to 3 times as long an element for a clip, 5 times for a comparison with both ends of a range, and the
# clip takes six times as long to compile; a reshape to one axis inside jit changes nothing. With one more multiplication
# in it an axis of 32 is vectorized again. LLVM unrolls the short loop before it vectorizes: with
# XLA_FLAGS=--xla_backend_extra_options=xla_cpu_disable_loop_unrolling both are as fast as the wide array's.
# compiler_options of jax.jit refuse that flag ("not a valid message value"), so that it holds for a process.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
cat > "$work/thin.py" <<'PY'
import sys
import time

import jax
import jax.numpy as jnp

THIN, WIDE = (65536, 32), (32768, 64)
WORK = {"clip": lambda x: jnp.clip(x, -1, 1), "mask": lambda x: (x > -1) & (x < 1)}


def compiled(fn, shape):
    began = time.process_time()
    done = jax.jit(fn).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    return done, time.process_time() - began


def seconds(run, x):
    took = []
    for _ in range(60):
        began = time.perf_counter()
        run(x).block_until_ready()
        took.append(time.perf_counter() - began)
    return min(took)


compiled(jnp.sin, WIDE)
for name, fn in WORK.items():
    (thin, long), (wide, short) = compiled(fn, THIN), compiled(fn, WIDE)
    slower = seconds(thin, jnp.ones(THIN)) / seconds(wide, jnp.ones(WIDE))
    print(f"jax {jax.__version__}, {name}: the thin one takes {slower:.1f}x, its compilation {long / short:.1f}x")
    assert (slower > 1.7) == (sys.argv[1] == "unrolled"), slower
PY
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" "$work/thin.py" unrolled
XLA_FLAGS=--xla_backend_extra_options=xla_cpu_disable_loop_unrolling "$work/venv/bin/python" "$work/thin.py" whole
