#!/usr/bin/env bash
# jax 0.12.0.1 on CPU: jax.nn.scaled_dot_general with mxfp8 makes NaN of a block of 32 zeros, outside jit.
# Expected: a block of zeros counts as zeros, as in its mxfp4 and nvfp4, and as in jit. Seen: such a block (pruned weights, a
# relu that is off, padding) makes NaN of the whole row of the result, and gradients are NaN wherever 32 of the incoming ones
# are 0. The block's scale gets the exponent code 0, whose float32 it takes to be 0.0 instead of 2**-127, and 0 / 0 is NaN,
# which E4M3 holds; E2M1 has none and hides it, and in jit a clip of XLA on CPU loses it by chance.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1" "ml_dtypes==0.6.0" "numpy==2.5.5"
JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp

x = jax.random.normal(jax.random.key(0), (1, 64, 128)).at[0, 3, :32].set(0)
w = jax.random.normal(jax.random.key(1), (1, 32, 128))
dense = jnp.einsum("bmk,bnk->bmn", x, w)
nan = {}
for mode in ("mxfp8", "mxfp4", "nvfp4"):
    configs = [jax.nn.get_scaled_dot_general_config(mode)] * 3

    def product(x, w):
        return jax.nn.scaled_dot_general(x, w, (((2,), (2,)), ((0,), (0,))), configs=configs)

    y, jitted = product(x, w), jax.jit(product)(x, w)
    silent = jax.grad(lambda x, w: jax.nn.relu(product(x, w) - 1e3).sum(), (0, 1))  # every unit is off
    of_gradients = sum(int(jnp.isnan(g).sum()) for g in silent(x[:, 4:36], w))
    nan[mode] = int(jnp.isnan(y[0, 3]).sum()), int(jnp.isnan(y).sum()), int(jnp.isnan(jitted).sum()), of_gradients
    error = float(jnp.linalg.norm(jitted - dense) / jnp.linalg.norm(dense))
    print(f"{mode}: NaN in the row of the zeros, in all, in jit, in gradients that are 0: {nan[mode]}; error in jit {error:.3f}")
assert nan == {"mxfp8": (32, 32, 0, 2 * 32 * 128), "mxfp4": (0, 0, 0, 0), "nvfp4": (0, 0, 0, 0)}
PY
