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
# # 7. Write your own score, grid and transform
#
# Your idea is a function or a small class, and it composes with everything that is here: it runs in jit, is chained,
# saved and loaded. Three ideas from papers, none of which the library has, on networks that are trained already and
# are not trained again: a score that knows which weights the others can replace, a grid that is fitted to the
# weights, and a transform that mends the biases. What does each add?

# %%
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxcomp as jc

SCALE = 1  # more: more networks, trained for longer
STEPS, NETWORKS, BITS = 400 * SCALE, 4 * SCALE, 3

# %% [markdown]
# ## Networks to compress
#
# Four small ones on scikit-learn's digits, from different random weights, trained at once by `vmap`. The results
# below are means over them; a quarter of the images is held out.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
train_x, train_y, test_x, test_y = x[450:], y[450:], x[:450], y[:450]
rng = np.random.default_rng(0)
kernels = [rng.normal(scale=(2 / a) ** 0.5, size=(NETWORKS, a, b)) for a, b in ((64, 100), (100, 50), (50, 10))]
start = {f"layer{i}": {"kernel": w, "bias": np.zeros((NETWORKS, w.shape[-1]))} for i, w in enumerate(kernels)}
start = jax.tree.map(jnp.float32, start)


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def net(params, x):
    x = jax.nn.relu(dense(params["layer0"], x))
    x = jax.nn.relu(dense(params["layer1"], x))
    return dense(params["layer2"], x)


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(net(params, x), y).mean()


def train(params, batches):
    tx = optax.adam(3e-3)

    def step(carry, batch):
        params, opt = carry
        updates, opt = tx.update(jax.grad(loss)(params, train_x[batch], train_y[batch]), opt, params)
        return (optax.apply_updates(params, updates), opt), None

    return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]


def accuracy(params):
    return (net(params, test_x).argmax(-1) == test_y).mean()


batches = jnp.asarray(rng.integers(len(train_x), size=(NETWORKS, STEPS, 100)))
networks = jax.jit(jax.vmap(train))(start, batches)
float_accuracy = jax.jit(jax.vmap(accuracy))(networks)
print("float32:", *(f"{a:.1%}" for a in float_accuracy))

# %% [markdown]
# ## A score
#
# A score says which weights matter; the lowest are pruned. Magnitude asks how large a weight is. The *optimal brain
# surgeon* asks how much the layer's output changes if this weight goes and the others of its output make up for it:
# $w_i^2 / [H^{-1}]_{ii}$, with $H$ the second moments of the inputs. A pixel that is always blank, or that its
# neighbours say already, costs nothing.
#
# A score that needs more than the weights names it. Here it is `curvature`, which `update` is then given; the moments
# are read off the program by `input_moments`.

# %%
surgeon = jc.pruning.Score(
    "surgeon", lambda w, curvature: w**2 * curvature, needs=("curvature",), maker="curvature_of(params)"
)


def curvature_of(params):
    found = {}
    for path, moments in jc.trace.input_moments(net)(params, train_x).items():
        hessian = moments + 0.01 * jnp.trace(moments) / len(moments) * jnp.eye(len(moments))
        found[path] = 1 / jnp.diag(jnp.linalg.inv(hessian))[:, None]
    return found


# %% [markdown]
# ## A grid
#
# A grid says which values there are. An integer grid spaces them evenly; weights are not spread evenly. A table is
# one frozen class with its levels, here fitted to the networks' own weights by Lloyd's algorithm: each level moves to
# the mean of the weights that are nearest to it, and one of them stays at zero, for what is pruned.


# %%
@dataclass(frozen=True)
class Fitted(jc.quantization.LevelGrid):
    """Levels between -1 and 1, times a scale for each output."""

    values: tuple[float, ...]

    @property
    def levels(self):
        return self.values


def fitted(weights, bits):
    levels = np.quantile(weights, (np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(30):
        levels[np.abs(levels).argmin()] = 0
        nearest = np.abs(weights[:, None] - levels).argmin(1)
        levels = np.array([weights[nearest == i].mean() for i in range(len(levels))])
    levels[np.abs(levels).argmin()] = 0
    return Fitted(tuple(float(v) for v in levels / np.abs(levels).max()))


shares = [np.asarray(w / jnp.abs(w).max(-2, keepdims=True)).ravel() for w in jax.tree.leaves(networks) if w.ndim == 3]
shares = np.concatenate(shares)
grid = fitted(shares, BITS)
print(grid)

# %% [markdown]
# ## A transform
#
# `init`, `update` and `apply` are all there is. This one wraps another. Whatever that does to a kernel moves the mean
# of the layer's output; so `update` runs some images through both networks, layer by layer, and keeps the differences
# of the means; `apply` adds them to the biases.


# %%
def bias_corrected(inner):
    def init(params):
        return inner.init(params), {name: jnp.zeros_like(layer["bias"]) for name, layer in params.items()}

    def update(state, params, *, step, inputs, **stats):
        inner_state = inner.update(state[0], params, step=step, **stats)
        seen, shifts = jc.materialize(inner.apply(inner_state, params)), {}
        before = after = inputs
        for name in sorted(params):
            before, after = dense(params[name], before), dense(seen[name], after)
            shifts[name] = (before - after).mean(0)
            before, after = jax.nn.relu(before), jax.nn.relu(after + shifts[name])
        return inner_state, shifts

    def apply(state, params):
        inner_state, shifts = state
        seen = inner.apply(inner_state, params)
        return {name: {**layer, "bias": layer["bias"] + shifts[name]} for name, layer in seen.items()}

    return jc.Transform(init, update, apply)


# %% [markdown]
# ## Together
#
# Each way adds one idea to the one before. They are chained like the library's own. As in notebook 1 the sparsity is
# a traced value, so one `vmap` goes over all sparsities and another over the networks.


# %%
def pruned(sparsity, score):
    return jc.prune(lambda step: sparsity, score=score, scope=jc.Global())


ways = {
    "magnitude, integers": lambda s: jc.chain(pruned(s, jc.pruning.magnitude), jc.quantize(jc.Int(BITS))),
    "my score, integers": lambda s: jc.chain(pruned(s, surgeon), jc.quantize(jc.Int(BITS))),
    "my score, my grid": lambda s: jc.chain(pruned(s, surgeon), jc.quantize(grid)),
    "my score, my grid, my transform": lambda s: bias_corrected(jc.chain(pruned(s, surgeon), jc.quantize(grid))),
}


def compressed(compress, params, curvature):
    state = compress.update(compress.init(params), params, step=0, curvature=curvature, inputs=train_x)
    return compress.apply(state, params)


def judged(way, sparsity, params, curvature):
    return accuracy(jc.materialize(compressed(ways[way](sparsity), params, curvature)))


each_network = jax.vmap(judged, (None, None, 0, 0))
each_sparsity = jax.jit(jax.vmap(each_network, (None, 0, None, None)), static_argnums=0)
sparsities = jnp.array([0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9])
curvature = jax.jit(jax.vmap(curvature_of))(networks)
results = {way: each_sparsity(way, sparsities, networks, curvature) for way in ways}
for way, found in results.items():
    print(f"{way:32s}", "  ".join(f"{a:.1%}" for a in found.mean(1)))

# %% [markdown]
# ## What each idea adds
#
# Left, the accuracy of three-bit networks against the share of weights that went, without any training after it. The
# score and the transform carry it; at three bits the grid adds a point at most; and where nearly all weights are
# gone, moving means does harm. Right, the weights, each divided by the largest of its output, with the values of both
# grids.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=[1.6, 1], layout="constrained")
for (name, found), color in zip(results.items(), ("gray", "tab:blue", "tab:orange", "tab:green"), strict=True):
    left.plot(100 * sparsities, 100 * found.mean(1), "o-", color=color, label=name)
left.axhline(100 * float_accuracy.mean(), color="gray", ls=":", lw=1)
left.set(xlabel="weights pruned (%)", ylabel="test accuracy (%)", title=f"{BITS} bits, no training", ylim=(0, 101))
left.legend(loc="lower left", frameon=False)
right.hist(shares, 80, color="lightgray", density=True)
tops = right.get_ylim()[1]
even = np.arange(-(2 ** (BITS - 1)) + 1, 2 ** (BITS - 1)) / (2 ** (BITS - 1) - 0.5)
right.vlines(even, 1.05 * tops, 1.2 * tops, color="tab:blue", lw=2, label="integers")
right.vlines(grid.levels, 1.25 * tops, 1.4 * tops, color="tab:orange", lw=2, label="my grid")
right.set(xlabel="weight, of its output's largest", yticks=[], ylim=(0, 1.75 * tops), title="the weights and the grids")
right.legend(loc="upper right", frameon=False, ncols=2)

at = int(jnp.argmin(abs(sparsities - 0.8)))
first, *_, last = (found[at].mean() for found in results.values())
print(f"80% pruned, {BITS} bits: {first:.1%} -> {last:.1%}, float32 {float_accuracy.mean():.1%}")
assert last > first + 0.05

# %% [markdown]
# ## In a file
#
# A leaf is stored by its class's name and its fields, so your grid goes into the file and comes back, as long as its
# class is there when the file is read.

# %%
one, its_curvature = jax.tree.map(lambda a: a[0], (networks, curvature))
tree = compressed(ways["my score, my grid, my transform"](0.8), one, its_curvature)
file = Path(mkdtemp()) / "mine.safetensors"
size = jc.save(file, tree)
again = jc.load(file)
assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), jc.materialize(tree), jc.materialize(again)))
print(f"{size:,} bytes in the place of {jc.nbytes(one):,}; loaded: {accuracy(jc.materialize(again)):.1%}")
