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
# # 3. Compose: prune, share, quantize and distil in one step
#
# Transforms compose like optimizers in optax: `chain` folds them from left to right, `by_path` gives each part of a
# network its own. We build a recipe stage by stage and train it in one jitted step, where the network as it was, in
# float, teaches what it becomes. Then we weigh the files.

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
STEPS, SEEDS = 300 * SCALE, 2 * SCALE
print(jax.devices())

# %% [markdown]
# ## Data and a network
#
# Scikit-learn's 1,797 digits of 8 by 8 pixels, a quarter of them held out, and two hidden layers of 300 and 100 units,
# like the network that Han et al. compressed first by pruning and sharing: 50,200 weights.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
train_x, train_y, test_x, test_y = x[450:], y[450:], x[:450], y[:450]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(300)(x))
        x = nn.relu(nn.Dense(100)(x))
        return nn.Dense(10)(x)


net, tx = Net(), optax.adam(optax.cosine_decay_schedule(5e-3, STEPS))
batches = jax.random.randint(jax.random.key(0), (STEPS, 64), 0, len(train_x))


def logits(params, x):
    return net.apply({"params": jc.materialize(params)}, x)


def accuracy(params):
    return (logits(params, test_x).argmax(-1) == test_y).mean()


# %% [markdown]
# ## One step for everything
#
# The loss sees the network as it will be shipped. After the optimizer, `update` finds masks and tables again. That is
# all: no stage knows of another, or of the loss.


# %%
def train(compress, loss, params):
    def step(carry, i):
        params, opt, state = carry
        batch = batches[i]
        grads = jax.grad(lambda p: loss(compress.apply(state, p), train_x[batch], train_y[batch]))(params)
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        return (params, opt, compress.update(state, params, step=i, grads=grads)), None

    carry = params, tx.init(params), compress.init(params)
    (params, _, state), _ = jax.lax.scan(step, carry, jnp.arange(STEPS))
    return compress.apply(state, params)


def from_labels(tree, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(tree, x), y).mean()


keys = jax.random.split(jax.random.key(1, impl="rbg"), SEEDS)
starts = jax.jit(jax.vmap(lambda key: net.init(key, train_x[:1])["params"]))(keys)
floats = jax.jit(jax.vmap(lambda params: train(jc.chain(), from_labels, params)))(starts)
print("float:", ", ".join(f"{a:.1%}" for a in jax.vmap(accuracy)(floats)))

# %% [markdown]
# ## A recipe, stage by stage
#
# - `prune`: of the two large matrices, nineteen of twenty weights go, and every 20 steps which they are is asked again;
# - `share`: those that stay take one of 7 values in each matrix, found by k-means, and zero is the eighth;
# - `quantize`: the tables of these values get 8 bits, for it sees inside what the stages before it made;
# - `by_path`: the last matrix, small and sensitive, gets 4 bits and nothing else, and the biases 8.

# %%
large, due = r"Dense_[01]/kernel", jc.every(20, start=19)
prune = jc.core.when(jc.prune(0.95, where=large), due)
share = jc.core.when(jc.share(8, preserve_zeros=True, init=jc.sharing.kmeans.inits.quantile, where=large), due)
recipe = jc.by_path(
    {
        large: jc.chain(prune, share, jc.quantize(jc.Int(8))),
        r".*/kernel": jc.quantize(jc.Int(4)),
        r".*/bias": jc.quantize(jc.Int(8), per=jc.Tensor(), where=".*"),
    }
)
stages = {"prune": prune, "prune, share": jc.chain(prune, share), "the recipe": recipe}

# %% [markdown]
# ## Taught by itself
#
# Who has a trained network and images, but no labels, lets the network teach what becomes of it: the loss asks for the
# float network's opinion of all ten digits. Beside it the same from labels, to see what they are worth. Both ways and
# all seeds train in one program.


# %%
def result(compress, params, of_teacher):
    def loss(tree, x, y):
        taught = jc.distill.soft_targets(logits(tree, x), logits(params, x))
        return of_teacher * taught + (1 - of_teacher) * from_labels(tree, x, y)

    tree = train(compress, loss, params)
    return accuracy(tree), tree


networks = jax.tree.map(lambda a: jnp.concatenate([a, a]), floats)
of_teacher = jnp.repeat(jnp.array([0.0, 1.0]), SEEDS)
found = jax.vmap(accuracy)(floats)
results = {"float": (found, found, jc.save("float.safetensors", jax.tree.map(lambda a: a[0], floats)))}
for name, compress in stages.items():
    found, trees = jax.jit(jax.vmap(lambda params, t, c=compress: result(c, params, t)))(networks, of_teacher)
    labelled, taught = found.reshape(2, SEEDS)
    tree = jax.tree.map(lambda a: a[SEEDS], trees)  # the first that was taught
    size = jc.save("net.safetensors", tree)
    results[name] = labelled, taught, size
    print(f"{name:12s} {size:6,} bytes   from labels {labelled.mean():5.1%}   taught {taught.mean():5.1%}")

# %% [markdown]
# ## What was paid for what
#
# Left, the first matrix of the float network and of the recipe's: the values that `share` left, and none of the bar
# at zero, which `prune` made. Right, the accuracy of each stage against the bytes of its file.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1, 1.4], layout="constrained")
after = np.asarray(jc.materialize(tree)["Dense_0"]["kernel"])
left.hist(np.ravel(floats["Dense_0"]["kernel"][0]), bins=61, color="lightgray", label="float")
values, counts = np.unique(after, return_counts=True)
left.vlines(values[values != 0], 0, counts[values != 0], color="C3", lw=2, label=f"{len(values)} values")
left.set(xlabel="weight", ylabel="how many", title=f"{(after == 0).mean():.0%} are zero")
left.legend(frameon=False)
sizes = np.array([size for _, _, size in results.values()])
for which, label in ((0, "from labels"), (1, "taught by the float network")):
    found = 100 * np.stack([result[which] for result in results.values()])
    spread = found.mean(1) - found.min(1), found.max(1) - found.mean(1)
    right.errorbar(sizes, found.mean(1), spread, fmt="o-", capsize=4, label=label)
for name, (_, _, size) in results.items():
    right.annotate(name, (size, 90.4), ha="center", rotation=90)
right.set(xscale="log", xlabel="bytes of the file", ylabel="test accuracy (%)", ylim=(90, 100))
right.set_xticks(sizes, [f"{size / 1000:.0f} kB" for size in sizes])
right.minorticks_off()
right.legend(loc="upper left", frameon=False)

print(f"{sizes[0] / sizes[-1]:.1f} times smaller, {results['the recipe'][1].mean():.1%} of the digits")
assert sizes[0] > 15 * sizes[-1]
assert results["the recipe"][1].mean() > 0.9
