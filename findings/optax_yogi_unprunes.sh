#!/usr/bin/env bash
# optax 0.2.8 (jax 0.12.0.1): yogi moves weights whose gradient has always been 0, so pruned weights come back.
# Expected: zero gradients leave a weight where it is, as with the other moment methods, where weights are pruned once, their
# gradients masked, and training goes on. Seen: the first moment does not start at 0 but at initial_accumulator_value, 1e-6, as
# the second does; each pruned weight drifts by about -1e-5 in ten steps at a rate of 0.01, and of half the weights that were 0
# none is. Multiply by the mask after the update too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "optax==0.2.8" "jax==0.12.0.1" "jaxlib==0.12.0.1" "numpy==2.5.5"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import optax

mask_key, weight_key, *keys = jax.random.split(jax.random.key(0), 12)
mask = jax.random.uniform(mask_key, (64, 64)) < 0.5
start = jnp.where(mask, jax.random.normal(weight_key, mask.shape), 0)
back = {}
for name in "adabelief adam adamw adan amsgrad lion nadam novograd radam rmsprop sgd yogi".split():
    optimizer = getattr(optax, name)(0.01)

    @jax.jit
    def step(w, state, key):
        gradient = jnp.where(mask, jax.random.normal(key, w.shape), 0)
        updates, state = optimizer.update(gradient, state, w)
        return optax.apply_updates(w, updates), state

    w, state = start, optimizer.init(start)
    for key in keys:
        w, state = step(w, state, key)
    back[name] = int((w[~mask] != 0).sum())
    if back[name]:
        print(f"{name}: {back[name]} of {int((~mask).sum())} pruned weights are not 0 any more but {w[~mask].max():.3g}")
print("none of them:", [name for name, n in back.items() if not n])
assert {name for name, n in back.items() if n} == {"yogi"} and back["yogi"] == int((~mask).sum())
PY
