# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 13. Compress to a budget
#
# How many bits for which layer, and how many zeros? `jc.search.compress` measures what each layer loses by each of its
# options, and then decides exactly. We train a small network, ask for files 8 to 32 times smaller, and lay the results
# beside recipes that treat all layers alike.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxcomp as jc
from jaxcomp.search import Quality, compress, kl, menu

SCALE = 1  # more: longer training
STEPS = 150 * SCALE
print(jax.devices())

# %% [markdown]
# ## A network
#
# Scikit-learn's digits, a quarter of them held out.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = (images[order] / 16).astype(np.float32), labels[order]
train_x, train_y, test_x, test_y = x[450:], y[450:], x[:450], y[:450]
SHAPES = {"first": (64, 256), "second": (256, 256), "head": (256, 10)}


def network(p, x):
    for name in ("first", "second"):
        x = jax.nn.relu(x @ p[name] + p[f"{name}_bias"])
    return x @ p["head"]


keys = jax.random.split(jax.random.key(0, impl="rbg"), 3)
start = {n: jax.nn.initializers.he_normal()(k, s) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}
start |= {f"{name}_bias": jnp.zeros(256) for name in ("first", "second")}
tx = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))


@jax.jit
def train(p, batches):
    def loss(p, batch):
        logits = network(p, jnp.asarray(train_x)[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(train_y)[batch]).mean()

    def step(carry, batch):
        p, opt = carry
        updates, opt = tx.update(jax.grad(loss)(p, batch), opt, p)
        return (optax.apply_updates(p, updates), opt), None

    return jax.lax.scan(step, (p, tx.init(p)), batches)[0][0]


params = train(start, np.random.default_rng(1).integers(0, len(train_x), (STEPS, 64)))


def accuracy(run):
    return float((np.asarray(run(test_x)).argmax(-1) == test_y).mean())


print(f"float: {accuracy(lambda x: network(params, x)):.1%}, {jc.artifact.file_size(params):,} bytes")

# %% [markdown]
# ## One call
#
# Data are a few batches without labels, from the training split. The budget is a file so many times smaller; the
# quality is ours, and is judged on the test split.

# %%
data = [train_x[i : i + 100] for i in range(0, 800, 100)]
options = menu(bits=(8, 4, 3, 2), sparsities=(0.0, 0.5, 0.8))
quality = Quality(accuracy, drop=0.02)
done = compress(network, params, data, budget=8, quality=quality, options=options, measure=kl)
done

# %% [markdown]
# What was decided, by layer. `done.plan.save` writes it as JSON, to be edited and given back as `plan=`.

# %%
done.plan

# %% [markdown]
# ## The frontier
#
# The plans that lose least at their size, and recipes by hand: the same for every layer.

# %%
tried = [done] + [compress(network, params, data, budget=b, options=options, measure=kl, rounds=0) for b in (11, 14)]
ours = [(one.costs["bytes"], accuracy(lambda x, one=one: one.fn(one.params, x))) for one in tried]
roles = jc.roles(network)(params, test_x[:1])
recipes = {
    "int8": jc.quantize(jc.Int(8), roles=roles),
    "int4": jc.quantize(jc.Int(4), roles=roles),
    "int3": jc.quantize(jc.Int(3), roles=roles),
    "80% zeros, int8": jc.chain(jc.prune(0.8, scope=jc.Global(), roles=roles), jc.quantize(jc.Int(8), roles=roles)),
}
hand = {}
for name, recipe in recipes.items():
    leaves = recipe.apply(recipe.init(params), params)
    score = accuracy(lambda x, leaves=leaves: network(jc.materialize(leaves), x))
    hand[name] = jc.artifact.file_size(leaves), score

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.plot(*zip(*sorted(ours), strict=True), "o-", label="compress")
for name, (size, score) in hand.items():
    axes.plot(size, score, "s", label=name)
axes.set(xscale="log", xlabel="bytes of the file", ylabel="accuracy")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)

assert done.ratio >= 8
assert done.score > done.score_before - 0.02
