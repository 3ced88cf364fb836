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
# # 1. Prune: from scratch to gradual
#
# How many weights does a network need? We prune one by hand, then with a transform, then while it trains, and see how
# far each way gets before the accuracy goes.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxcomp as jc

SCALE = 1  # more: longer training and more seeds
STEPS, SEEDS = 300 * SCALE, 3 * SCALE
print(jax.devices())

# %% [markdown]
# ## Data and a network
#
# Scikit-learn's 1,797 digits of 8 by 8 pixels, a quarter of them held out, and two hidden layers: 11,900 weights.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
train_x, train_y, test_x, test_y = x[450:], y[450:], x[:450], y[:450]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(100)(x))
        x = nn.relu(nn.Dense(50)(x))
        return nn.Dense(10)(x)


net = Net()


@jax.jit
def accuracy(params):
    return (net.apply({"params": params}, test_x).argmax(-1) == test_y).mean()


# %% [markdown]
# ## One training loop
#
# Everything below is this loop with another transform. `apply` says what the forward pass sees, so it stands in the
# loss; `update` finds the masks again, so it stands after the optimizer.

# %%
tx = optax.adam(3e-3)


def start(key):
    params = net.init(key, train_x[:1])["params"]
    return params, jax.random.randint(key, (STEPS, 64), 0, len(train_x))


def train(compress, params, batches):
    def loss(params, state, x, y):
        logits = net.apply({"params": jc.materialize(compress.apply(state, params))}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, i):
        params, opt, state = carry
        batch = batches[i]
        grads = jax.grad(loss)(params, state, train_x[batch], train_y[batch])
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        return (params, opt, compress.update(state, params, step=i, grads=grads)), None

    carry = params, tx.init(params), compress.init(params)
    (params, _, state), _ = jax.lax.scan(step, carry, jnp.arange(STEPS))
    return params, compress.apply(state, params)


params, _ = jax.jit(lambda key: train(jc.chain(), *start(key)))(jax.random.key(0, impl="rbg"))
print(f"dense: {accuracy(params):.1%} of the test digits")

# %% [markdown]
# ## By hand
#
# Magnitude pruning is three lines of numpy: of each matrix, set to zero what is smallest.

# %%
kernel = np.asarray(params["Dense_0"]["kernel"])
threshold = np.quantile(np.abs(kernel), 0.9)
by_hand = np.where(np.abs(kernel) > threshold, kernel, 0)

# %% [markdown]
# ## As a transform
#
# `jc.prune(0.9)` does it to every matrix of the tree. What comes out keeps the mask beside the values; `materialize`
# makes plain arrays of it again.

# %%
compress = jc.prune(0.9)
state = compress.init(params)
masked = compress.apply(state, params)
assert (jc.materialize(masked)["Dense_0"]["kernel"] == by_hand).all()
print(f"90% cut from the trained network: {accuracy(jc.materialize(masked)):.1%}")

# %% [markdown]
# ## When
#
# *When* to prune is a schedule, any function of the step. Each way gets the same number of steps:
#
# - **at the end**: train, then cut;
# - **halfway**: train for half the steps, cut, and let the rest heal what was cut;
# - **gradually**: a little every ten steps, along the cubic curve of Zhu and Gupta, until two thirds of the way;
# - **halfway, by lot**: as halfway, but what goes is drawn at random, to see what choosing is worth.
#
# *What* to prune is a score, here a function of the weights. Sparsity, schedule and score may be traced values, so one
# compiled program trains all ways at all sparsities from all seeds.

# %%
steps = jnp.arange(STEPS)
ramps = {
    "at the end": steps >= STEPS - 1,
    "halfway": steps >= STEPS // 2,
    "gradually": jax.vmap(jc.cubic(1 - 1e-6, end=2 * STEPS // 3))(steps),
    "halfway, by lot": steps >= STEPS // 2,
}
sparsities = jnp.array([0.5, 0.8, 0.9, 0.95, 0.98])
starts = jax.jit(jax.vmap(start))(jax.random.split(jax.random.key(1, impl="rbg"), SEEDS))


def result(ramp, by_lot, sparsity, start):
    def score(w):
        return jnp.where(by_lot, jax.random.uniform(jax.random.key(2), w.shape), jnp.abs(w))

    compress = jc.gate(jc.prune(lambda i: sparsity * ramp[i], score=score), jc.every(10, start=9))
    _, masked = train(compress, *start)
    return accuracy(jc.materialize(masked)), masked["Dense_0"]["kernel"].mask


all_results = result
for axes in ((None, None, None, 0), (None, None, 0, None), (0, 0, None, None)):
    all_results = jax.vmap(all_results, axes)
by_lot = jnp.array(["lot" in way for way in ramps])
results, masks = jax.jit(all_results)(jnp.stack([jnp.float32(r) for r in ramps.values()]), by_lot, sparsities, starts)
print(f"{'pruned':16s}", "  ".join(f"{s:5.0%}" for s in sparsities))
for way, found in zip(ramps, results, strict=True):
    print(f"{way:16s}", "  ".join(f"{a:5.1%}" for a in found.mean(1)))

# %% [markdown]
# ## What is left
#
# Left, the accuracy of each way against the share of weights kept, with the range over the seeds. Right, the first
# layer of a network pruned gradually: each of the digits' 64 pixels has a weight to each of 100 units, and the picture
# counts those that stayed. Nobody told the transform where digits are drawn.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1.7, 1], layout="constrained")
kept = 100 * (1 - np.asarray(sparsities))
for way, found in zip(ramps, results, strict=True):
    (line,) = left.plot(kept, 100 * found.mean(1), "o-", label=way)
    left.fill_between(kept, 100 * found.min(1), 100 * found.max(1), color=line.get_color(), alpha=0.2, lw=0)
left.axhline(100 * accuracy(params), color="gray", ls="--", lw=1, label="dense")
left.set(xscale="log", xlabel="weights kept (%)", ylabel="test accuracy (%)", ylim=(0, 102))
left.set_xticks(kept, [f"{k:.0f}" for k in kept])
left.minorticks_off()
left.invert_xaxis()
left.legend(loc="lower left", frameon=False)
shown, gradually = list(sparsities).index(0.9), list(ramps).index("gradually")
picture = right.imshow(masks[gradually, shown, 0].sum(1).reshape(8, 8), cmap="viridis")
right.set(title="weights kept of each pixel's 100, when 90% go", xticks=[], yticks=[])
figure.colorbar(picture, ax=right, shrink=0.8)

at_90 = dict(zip(ramps, results[:, shown].mean(1), strict=True))
print(f"with a tenth of the weights: {at_90['gradually']:.1%}; all: {accuracy(params):.1%}")
assert at_90["gradually"] > 0.9
assert at_90["gradually"] > at_90["at the end"]
