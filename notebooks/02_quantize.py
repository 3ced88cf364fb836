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
# # 2. Quantize: four bits, two, one
#
# How few bits does a weight need? Rounding a trained network costs nothing down to four bits and everything at one. If
# the network is trained *through* the rounding, it gets most of that back, and that takes one line in the loss.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jaxcomp as jc

SCALE = 1  # more: longer training and more seeds
STEPS, SEEDS = 300 * SCALE, 5 * SCALE
print(jax.devices())

# %% [markdown]
# ## A grid
#
# `jc.Int(3)` has eight levels, evenly spaced. A weight becomes a small integer, its code, and a scale that many weights
# share. The leaf that `quantize` makes holds both; `pack` gives the codes their true width.

# %%
w = {"kernel": jnp.array([[0.30, -1.00], [0.02, 0.60], [-0.75, 0.20]])}
leaf = jc.quantize(jc.Int(3)).apply((), w)["kernel"]
print("codes", leaf.codes.astype(int).tolist())
print("times", leaf.scale.tolist(), ", a scale for each column")
print("are  ", leaf.materialize().round(2).tolist())

# %% [markdown]
# ## The gradient of a staircase
#
# Rounding is flat almost everywhere: its true gradient is zero, and a network trained through it would never move. The
# *straight-through estimator* computes the staircase forwards and, backwards, passes the gradient on as if nothing had
# happened. Only where the grid has no step left, beyond its last one, is it cut. Here its ends are fixed at 1, so
# that this shows; by default they lie at each column's largest weight.

# %%
line = jnp.linspace(-1.4, 1.4, 1401)
three_bits = jc.quantize(jc.Int(3, narrow=True), per=jc.Tensor(), scale=jc.quantization.scales.Fixed(1.0))


def rounded(w):
    return jc.materialize(three_bits.apply((), {"kernel": w[:, None]}))["kernel"][:, 0]


straight_through = jax.grad(lambda w: rounded(w).sum())(line)
of_the_staircase = jax.grad(lambda w: jnp.round(3 * w).sum() / 3)(line)

figure, (top, bottom) = plt.subplots(2, figsize=(6, 5), sharex=True, height_ratios=[2, 1], layout="constrained")
top.plot(line, line, color="gray", lw=1, ls="--", label="as it is")
top.plot(line, rounded(line), lw=2, label="rounded to 3 bits")
top.set(ylabel="what the network sees")
bottom.plot(line, of_the_staircase, color="gray", lw=1, ls="--", label="of the staircase")
bottom.plot(line, straight_through, lw=2, label="straight through")
bottom.set(xlabel="weight", ylabel="gradient", yticks=[0, 1])
top.legend(loc="upper left", frameon=False)
bottom.legend(loc="center", frameon=False)

# %% [markdown]
# ## Quantization-aware training in ten lines
#
# Scikit-learn's 1,797 digits, a quarter of them held out, and an NNX network of 11,900 weights. `nnx.split` gives its
# parameters as a tree; the transform neither knows nor minds whose tree it is.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
train_x, train_y, test_x, test_y = x[450:], y[450:], x[:450], y[:450]


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 100, rngs=rngs)
        self.second = nnx.Linear(100, 50, rngs=rngs)
        self.last = nnx.Linear(50, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.second(nnx.relu(self.first(x)))))


graphdef, params = nnx.split(Net(nnx.Rngs(0)))
tx = optax.adam(3e-3)


def predict(params, x):
    return nnx.merge(graphdef, params)(x)


def train(compress, params, batches):
    state, opt = compress.init(params), tx.init(params)

    def loss(params, batch):
        seen = jc.materialize(compress.apply(state, params))  # the line that makes it quantization-aware
        return optax.softmax_cross_entropy_with_integer_labels(predict(seen, train_x[batch]), train_y[batch]).mean()

    def step(carry, batch):
        params, opt = carry
        updates, opt = tx.update(jax.grad(loss)(params, batch), opt, params)
        return (optax.apply_updates(params, updates), opt), None

    return jax.lax.scan(step, (params, opt), batches)[0][0]


# %% [markdown]
# ## After training, or while training
#
# Each network is trained in float, rounded, and then trained for as long again through the rounding. The control trains
# on in float. All seeds at once, by `vmap`. What was trained is what the file holds: loaded again, it has the same
# accuracy, to the last image.

# %%
keys = jax.random.split(jax.random.key(0), SEEDS)
batches = jax.random.randint(jax.random.key(1), (2, STEPS, 64), 0, len(train_x))
starts = jax.jit(jax.vmap(lambda key: nnx.state(Net(nnx.Rngs(key)))))(keys)


def accuracy(tree):
    return (predict(jc.materialize(tree), test_x).argmax(-1) == test_y).mean()


def before_and_after(compress, params):
    state, tuned = compress.init(params), train(compress, params, batches[1])
    once, aware = compress.apply(state, params), compress.apply(state, tuned)
    return accuracy(once), accuracy(aware), aware


floats = jax.jit(jax.vmap(lambda params: train(jc.chain(), params, batches[0])))(starts)
results = {}
for name, compress in {"float": jc.chain(), **{bits: jc.quantize(jc.Int(bits)) for bits in (4, 2, 1)}}.items():
    once, aware, tree = jax.jit(jax.vmap(lambda params, c=compress: before_and_after(c, params)))(floats)
    size = jc.save("net.safetensors", jax.tree.map(lambda a: a[0], tree))  # the first seed's
    results[name] = once, aware, size
    print(f"{name!s:5s}  rounded {once.mean():5.1%}  trained through {aware.mean():5.1%}  file {size:6,} bytes")

# %%
figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
places = np.arange(len(results))
for which, label in ((0, "rounded after training"), (1, "trained through the rounding")):
    found = 100 * np.stack([result[which] for result in results.values()])
    low, high = found.min(1), found.max(1)
    axes.errorbar(places, found.mean(1), (found.mean(1) - low, high - found.mean(1)), fmt="o-", capsize=4, label=label)
axes.set_xticks(places, [f"{name}\n{size / 1000:.1f} kB" for name, (_, _, size) in results.items()])
axes.set(xlabel="bits a weight, and what the file takes", ylabel="test accuracy (%)")
axes.legend(loc="lower left", frameon=False)

once, aware, size = results[1]
print(f"one bit a weight: {once.mean():.1%} rounded, {aware.mean():.1%} trained through it")
print(f"the file is {results['float'][2] / size:.1f} times smaller")
assert accuracy(jc.load("net.safetensors", like=params)) == aware[0]
assert aware.mean() > 0.9
assert aware.mean() > once.mean() + 0.1
