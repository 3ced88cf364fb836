#!/usr/bin/env bash
# A cache of keys and values in float32 on a CPU, donated to a jitted step of one token: appended in place it needs no
# temporaries, and attention that reads it in the layout (batch, heads, width, tokens) needs next to none. Both in one step
# take temporaries of one and a half times the cache: XLA copies it whole, for each token. In (batch, tokens, heads, width)
# and (batch, heads, tokens, width) a half or all of it is copied to be read, and 1.0 and 1.5 times in the whole step.
# Expected: what is appended in place is read in place.
# Seen: jax and jaxlib 0.12.0.1 and 0.10.2, Python 3.12, x86-64.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp

SIZES = {"b": 1, "t": 4096, "h": 4, "d": 64}
CACHE = 2 * 4
for n in SIZES.values():
    CACHE *= n


def put(k, v, new, i, axis):
    return tuple(jax.lax.dynamic_update_slice_in_dim(x, new, i, axis) for x in (k, v))


def read(k, v, q, i, order):
    scores = jnp.einsum(f"bqhd,{order}->bhqt", q, k)
    weights = jax.nn.softmax(jnp.where(jnp.arange(SIZES["t"]) <= i, scores, -jnp.inf), -1)
    return jnp.einsum(f"bhqt,{order}->bqhd", weights, v)


def temporaries(fn, args, donated=()):
    made = jax.jit(fn, donate_argnums=donated).lower(*args).compile()
    return made.memory_analysis().temp_size_in_bytes / CACHE


def seen(order):
    shape = lambda **other: jax.ShapeDtypeStruct([{**SIZES, **other}[c] for c in order], jnp.float32)
    axis, old, new = order.index("t"), shape(), shape(t=1)
    q, i = jax.ShapeDtypeStruct((1, 1, SIZES["h"], SIZES["d"]), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)

    def step(k, v, new, q, i):
        k, v = put(k, v, new, i, axis)
        return read(k, v, q, i, order), k, v

    appended = temporaries(lambda k, v, new, i: put(k, v, new, i, axis), (old, old, new, i), (0, 1))
    alone = temporaries(lambda k, v, q, i: read(k, v, q, i, order), (old, old, q, i))
    both = temporaries(step, (old, old, new, q, i), (0, 1))
    print(f"{order}: temporaries over the cache: appended {appended:.2f}, read {alone:.2f}, both {both:.2f}")
    return appended, alone, both


found = {order: seen(order) for order in ("bthd", "bhtd", "bhdt")}
assert all(appended == 0 for appended, _, _ in found.values()), "appending needs temporaries now"
assert found["bhdt"][1] < 0.1, "reading in this layout needs temporaries now"
assert min(both for _, _, both in found.values()) >= 1, "the cache is no longer copied"
PY
