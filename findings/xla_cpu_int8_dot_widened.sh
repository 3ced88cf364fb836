#!/usr/bin/env bash
# An int8 dot with int32 sums, XLA on CPU: two rows by a matrix of 2048^2 need nothing beside operands and result and run in
# the fast int8 kernel; of one row, and of a matrix that lies transposed and is turned by the program, XLA first makes an
# int32 array of the whole matrix (four bytes an element), and one row then takes longer than two.
# Expected: the same kernel for one row, and a transposition that is folded into the dot as it is for float32.
# Seen: jax and jaxlib 0.12.0.1, Python 3.12, x86-64.
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

N = 2048


def rows_first(x, w):
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def turned(x, w):
    return rows_first(x, w.T)


def seen(name, fn, rows):
    x = jnp.ones((rows, N), jnp.int8)
    w = jax.random.randint(jax.random.key(0), (N, N), -127, 128, jnp.int8)
    run = jax.jit(fn).lower(x, w).compile()
    run(x, w).block_until_ready()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        run(x, w).block_until_ready()
        times.append(time.perf_counter() - start)
    megabytes = run.memory_analysis().temp_size_in_bytes / 1e6
    print(f"{name}: {min(times) * 1e3:.2f} ms, {megabytes:.2f} MB of temporaries; the matrix has {N * N / 1e6:.2f} MB")
    return min(times), megabytes


one, two, both = seen("one row", rows_first, 1), seen("two rows", rows_first, 2), seen("two rows, turned", turned, 2)
whole = 4 * N * N / 1e6
assert two[1] < 0.1, "two rows need temporaries now"
assert one[1] >= whole and one[0] > two[0], "one row is no longer widened"
assert both[1] >= whole, "a transposed matrix is no longer widened"
PY
