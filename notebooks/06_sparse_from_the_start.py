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
# # 6. Sparse from the start: connections that move
#
# Pruning starts with a network that is dense. Can one train with one weight in a hundred from the first step to the
# last, without ever holding the others? Yes, if the few connections may move: RigL drops the weakest and grows others
# where the gradient is largest. We watch it find out where on a page digits are written.

# %%
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxcomp as jc
from jaxcomp.core.optimizers import dense_value_and_grad, reset_regrown

SCALE = 1  # more: longer training and more seeds
STEPS, SEEDS, PERIOD = 800 * SCALE, 3 * SCALE, 20
SPARSITY = 0.99

# %% [markdown]
# ## Data and a network
#
# Scikit-learn's 1,797 digits of 8 by 8 pixels, 450 of them held out. The network is plain JAX this time. Its two
# hidden layers have 32,800 weights, of which 328 are to be active; the last layer is small and stays dense.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
train_x, train_y, test_x, test_y = x[450:], y[450:], x[:450], y[:450]
WIDTHS = (64, 200, 100, 10)
HIDDEN = "layer[01]/kernel"


def make_params(rng):
    kernels = [rng.normal(scale=(2 / a) ** 0.5, size=(a, b)) for a, b in itertools.pairwise(WIDTHS)]
    tree = {f"layer{i}": {"kernel": w, "bias": np.zeros(w.shape[1])} for i, w in enumerate(kernels)}
    return jax.tree.map(np.float32, tree)


def net(params, x):
    for i in range(3):
        x = x @ params[f"layer{i}"]["kernel"] + params[f"layer{i}"]["bias"]
        x = x if i == 2 else jax.nn.relu(x)
    return x


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(net(params, x), y).mean()


def accuracy(params):
    return (net(params, test_x).argmax(-1) == test_y).mean()


# %% [markdown]
# ## Four ways
#
# - **dense**: nothing is masked, for comparison;
# - **static**: masks drawn at random at the start, which never move;
# - **SET**: every 20 steps the weakest 30% of the active weights give way to as many others, drawn at random;
# - **RigL**: the same, but they give way to those of the largest gradient.
#
# Which connections move, when, and to where is all a transform says. The three sparse ones hold the same number of
# weights.

# %%
ways = {
    "dense": lambda key: jc.chain(),
    "static": lambda key: jc.core.when(jc.pruning.regrow({HIDDEN: SPARSITY}, key=key), jc.core.never),
    "SET": lambda key: jc.pruning.sparse_evolution(
        {HIDDEN: SPARSITY}, key=key, period=PERIOD, stop=STEPS * 3 // 4, fraction=0.3
    ),
    "RigL": lambda key: jc.pruning.rigl({HIDDEN: SPARSITY}, key=key, period=PERIOD, stop=STEPS * 3 // 4, fraction=0.3),
}

# %% [markdown]
# ## One training loop
#
# Two lines are new. `dense_value_and_grad` gives, from one backward pass, the gradient that trains the active weights
# and the one of all weights, by which RigL grows. `reset_regrown` starts what was grown at zero, and makes the
# optimizer forget what it knew of it. All ways and seeds train in one program.


# %%
def train(way, key, params, batches):
    compress, tx = ways[way](key), optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))
    gradients = dense_value_and_grad(compress, loss)

    def step(carry, now):
        i, batch = now
        params, opt, state = carry
        _, grads, dense = gradients(state, params, train_x[batch], train_y[batch])
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        moved = compress.update(state, params, step=i + 1, grads=dense)
        params, opt = reset_regrown(state, moved, params, opt)
        return (params, opt, moved), None

    def seen(carry):
        params, _, state = carry
        return compress.apply(state, params)

    def period(carry, now):
        carry, _ = jax.lax.scan(step, carry, now)
        return carry, accuracy(jc.materialize(seen(carry)))

    start = params, tx.init(params), compress.init(params)
    end, curve = jax.lax.scan(period, start, (jnp.arange(STEPS).reshape(-1, PERIOD), batches))
    return curve, seen(start), seen(end)


rng = np.random.default_rng(1)
trees = jax.tree.map(lambda *seeds: jnp.stack(seeds), *[make_params(rng) for _ in range(SEEDS)])
batches = jnp.asarray(rng.integers(len(train_x), size=(SEEDS, STEPS // PERIOD, PERIOD, 100)))
keys = jax.random.split(jax.random.key(1), SEEDS)
all_ways = jax.jit(lambda *each: jax.lax.map(lambda one: {way: train(way, *one) for way in ways}, each))
found = all_ways(keys, trees, batches)
results = {way: found[way] for way in ways}
for way, (curve, _, _) in results.items():
    print(f"{way:7s} {curve[:, -1].mean():.1%}   seeds", *(f"{a:.1%}" for a in curve[:, -1]))

# %% [markdown]
# ## Where the connections went
#
# Left, the accuracy on the test digits while each way trains, with the range over the seeds. Right, how many
# connections each of the 64 pixels has to the first layer under RigL: at the first step, drawn at random, and at the
# last. Digits are written in the middle columns; the outer ones are blank in nearly every image, and what was drawn
# there by lot has left.

# %%
figure, (left, first, last) = plt.subplots(1, 3, figsize=(12, 4), width_ratios=[1.8, 1, 1], layout="constrained")
steps = np.arange(PERIOD, STEPS + 1, PERIOD)
colors = {"dense": "gray", "static": "tab:orange", "SET": "tab:blue", "RigL": "tab:green"}
for way, (curve, _, _) in results.items():
    label = f"{way}, {curve[:, -1].mean():.1%}"
    left.plot(steps, 100 * curve.mean(0), "--" if way == "dense" else "-", color=colors[way], label=label)
    left.fill_between(steps, 100 * curve.min(0), 100 * curve.max(0), color=colors[way], alpha=0.15, lw=0)
left.set(
    xlabel="step", ylabel="test accuracy (%)", ylim=(0, 101), title=f"{SPARSITY:.0%} of two layers' weights are zero"
)
left.legend(loc="lower right", frameon=False)
_, before, after = results["RigL"]
counts = [tree["layer0"]["kernel"].mask.sum(-1).mean(0).reshape(8, 8) for tree in (before, after)]
top = max(float(c.max()) for c in counts)
for axes, count, title in zip((first, last), counts, ("first step", "last step"), strict=True):
    picture = axes.imshow(count, cmap="viridis", vmin=0, vmax=top)
    axes.set(title=f"connections a pixel, {title}", xticks=[], yticks=[])
figure.colorbar(picture, ax=last, shrink=0.8)

# %%
final = {way: float(curve[:, -1].mean()) for way, (curve, _, _) in results.items()}
blank = (train_x.max(0) < 0.5).reshape(8, 8)
active = {
    int(tree["layer0"]["kernel"].mask[0].sum() + tree["layer1"]["kernel"].mask[0].sum()) for tree in (before, after)
}
print(f"active weights of the hidden layers, first and last step: {active}")
print(
    f"a pixel that is nearly always blank: {counts[0][blank].mean():.1f} -> {counts[1][blank].mean():.1f} connections"
)
print(f"RigL {final['RigL']:.1%}, masks that never move {final['static']:.1%}, dense {final['dense']:.1%}")
assert final["RigL"] > final["static"]
assert len(active) == 1

# %% [markdown]
# Masked weights are multiplied as zeros here: what this saves on a CPU or GPU is not time but the file, and what a
# federated client sends. `python -m train.sparse` makes the comparison on Fashion-MNIST, 20 epochs and three seeds.
