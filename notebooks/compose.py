# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Composing transforms
#
# A `Transform` is three pure functions of a parameter tree: `init`, `update`, `apply`. `chain` folds them from left to
# right. What `apply` makes is what the forward pass sees, what the gradient goes through, and what the file holds.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxcomp as jc

key = jax.random.key(0)
params = {"dense": {"kernel": jax.random.normal(key, (64, 64)), "bias": jnp.zeros(64)}}

# %% [markdown]
# Prune half, then quantize what is left to four bits. The leaf keeps both facts, and packs to them.

# %%
compress = jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4)))
state = compress.init(params)
seen = compress.apply(state, params)
print(type(seen["dense"]["kernel"]).__name__, "of", type(seen["dense"]["kernel"].values).__name__)
print("bytes dense", jc.nbytes(params), "packed", jc.nbytes(jc.pack(seen)))

# %% [markdown]
# Grids side by side: the uniform one, and the logarithmic one, which is fine near zero.

# %%
w = {"kernel": jnp.linspace(-4, 4, 801)[:, None]}
figure, axes = plt.subplots(figsize=(6, 4))
for grid in (jc.Int(4), jc.Log(4)):
    axes.plot(w["kernel"][:, 0], jc.materialize(jc.quantize(grid).apply((), w))["kernel"][:, 0], label=str(grid)[:18])
axes.set_xlabel("weight")
axes.set_ylabel("what the network sees")
axes.legend()

# %% [markdown]
# In a training step: `materialize(compress.apply(state, params))` in the loss, `compress.update` after the optimizer.
# Here the sparsity grows over the first hundred steps.

# %%
target = jax.random.normal(jax.random.key(1), (64, 64)) * (jax.random.uniform(jax.random.key(2), (64, 64)) < 0.2)
x = jax.random.normal(jax.random.key(3), (512, 64))
compress = jc.chain(jc.gate(jc.prune(jc.cubic(0.8, end=100)), jc.every(10)), jc.quantize(jc.Int(4)))
tx = optax.adam(3e-2)


def loss(params, state):
    seen = jc.materialize(compress.apply(state, params))["dense"]
    return jnp.mean((x @ seen["kernel"] + seen["bias"][None] - x @ target) ** 2)


@jax.jit
def step(params, opt, state, i):
    value, grads = jax.value_and_grad(loss)(params, state)
    updates, opt = tx.update(grads, opt, params)
    params = optax.apply_updates(params, updates)
    return params, opt, compress.update(state, params, step=i, grads=grads), value


opt, state, values = tx.init(params), compress.init(params), []
for i in range(300):
    params, opt, state, value = step(params, opt, state, jnp.int32(i))
    values.append(float(value))
zeros = float((jc.materialize(compress.apply(state, params))["dense"]["kernel"] == 0).mean())
print(f"loss {values[0]:.2f} -> {values[-1]:.3f}, zeros {zeros:.0%}")
assert values[-1] < 0.2 * values[0]
assert zeros >= 0.8

# %%
plt.figure(figsize=(6, 3))
plt.semilogy(np.asarray(values))
plt.xlabel("step")
plt.ylabel("loss")
