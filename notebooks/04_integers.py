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
# # 4. Activations and integer execution
#
# Small weights make a small file. For products on integers, what they multiply must be integers, too. We quantize the
# activations of a network that knows nothing of it, read aloud what runs on integers and what does not, mend it, and
# see how few bits are enough.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxcomp as jc

SCALE = 1  # more: longer training
STEPS = 500 * SCALE
print(jax.devices())

# %% [markdown]
# ## A network that is a function
#
# Scikit-learn's digits, 8 rows of 8 pixels, a quarter of them held out; each row is a token. One block of attention and
# one of two dense layers, written by hand: `out` has its outputs first, as in torch.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = jnp.asarray(images[order].reshape(-1, 8, 8) / 16, jnp.float32), jnp.asarray(labels[order])
train_x, train_y, test_x, test_y = x[450:], y[450:], x[:450], y[:450]


def start(key):
    shapes = {
        "embed": (8, 32),
        "row": (8, 32),
        "qkv": (3, 32, 4, 8),
        "up": (32, 64),
        "down": (64, 32),
        "out": (10, 256),
    }
    keys = jax.random.split(key, len(shapes))
    normal = jax.nn.initializers.normal(0.18)
    return {name: normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def hidden(p, x):
    h = x @ p["embed"] + p["row"]
    q, k, v = jnp.einsum("bti,cihd->cbthd", h, p["qkv"])
    scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / 8**0.5)
    h = h + jnp.einsum("bhts,bshd->bthd", scores, v).reshape(h.shape)
    return h, jax.nn.relu(h @ p["up"])


def network(p, x):
    h, wide = hidden(p, x)
    h = h + wide @ p["down"]
    return h.reshape(-1, 256) @ p["out"].T


# %%
tx = optax.adam(optax.cosine_decay_schedule(5e-3, STEPS))


def loss(p, batch):
    return optax.softmax_cross_entropy_with_integer_labels(network(p, train_x[batch]), train_y[batch]).mean()


@jax.jit
def train(p):
    def step(carry, batch):
        p, opt = carry
        updates, opt = tx.update(jax.grad(loss)(p, batch), opt, p)
        return (optax.apply_updates(p, updates), opt), None

    batches = jax.random.randint(jax.random.key(0), (STEPS, 64), 0, len(train_x))
    return jax.lax.scan(step, (p, tx.init(p)), batches)[0][0]


params = train(start(jax.random.key(1, impl="rbg")))  # such keys compile sooner
accuracy = jax.jit(lambda logits: (logits.argmax(-1) == test_y).mean())
in_float = accuracy(network(params, test_x))
print(f"float: {in_float:.1%}")

# %% [markdown]
# ## What multiplies
#
# `jc.sites` reads the program and finds every product: seven, two of them of activations alone.

# %%
for site in jc.sites(network)(params, test_x):
    print(f"{site.path:22s} {site.macs:12,} multiply-accumulates")

# %% [markdown]
# ## First try
#
# The *tree* says what the weights are, *rules* say what the activations are: 8 bits, at every site.

# %%
rules = {".*": jc.Act(8)}
weights = jc.quantize(jc.Int(8), per=jc.Channels(-1)).apply((), params)
print(jc.coverage(network, rules, integer=True)(weights, test_x))

# %% [markdown]
# Read aloud: all but one run on integers, the two products of attention among them. `out` is only *fake*, rounded to
# the grid but multiplied in float, and the last column says why: we said that scales lie along the last axis, and that
# is the one that the product of `out` sums over. A scale there cannot be taken out of the sum.
#
# ## The mend
#
# Nobody has to know which axis that is, for the program says so: `jc.roles` reads it off, and scales go where they can
# be taken out. It also tells weights from a table that is only added: `row` stays in float.

# %%
roles = jc.roles(network)(params, test_x)
print(roles)
weights = jc.quantize(jc.Int(8), roles=roles).apply((), params)
report = jc.coverage(network, rules, integer=True)(weights, test_x)
print(report)
assert not report.left

# %% [markdown]
# ## Ranges
#
# A grid for activations needs its ends. `calibrate` watches what enters each site over a few batches, and `ranges_of`
# makes ranges of what it saw. They are an argument like the parameters.

# %%
watch = jax.jit(jc.calibrate(network))
stats = jc.trace.merge_all(*[watch(params, batch) for batch in train_x[:1024].reshape(4, 256, 8, 8)])
ranges = jc.activations.ranges_of(stats)
fake = jax.jit(jc.quantize_function(network, rules))
real = jax.jit(jc.quantize_function(network, rules, integer=True))
packed = jc.pack(weights)
in_fake, in_integers = fake(weights, ranges, test_x), real(packed, ranges, test_x)
report = jc.coverage(network, rules, integer=True)(packed, test_x)
on_integers = [row for row in report.rows if row.done == "integer"]
print(f"float {in_float:.1%}, fake {accuracy(in_fake):.1%}, on integers {accuracy(in_integers):.1%}")
print(f"the largest difference of fake and integers: {jnp.abs(in_fake - in_integers).max():.1e}")
print(f"{len(on_integers)} of {len(report.rows)} products multiply int8")
assert jnp.allclose(in_fake, in_integers, atol=1e-3)
assert len(on_integers) == 7

# %% [markdown]
# ## How few bits
#
# With few levels, where the range ends matters more than how finely it is cut. Three choices: the extremes that were
# seen; all but one in a thousand; and the ends of least squared error on that very grid. The weights keep
# their 8 bits.

# %%
methods = {
    "extremes": lambda bits: jc.trace.ranges.min_max,
    "99.9th percentile": lambda bits: jc.trace.ranges.percentile(99.9),
    "least squared error": lambda bits: jc.trace.ranges.mse(bits),
}
widths = (8, 6, 4, 3, 2)
found, made = {name: [] for name in methods}, {}
for bits in widths:
    run = jax.jit(jc.quantize_function(network, {".*": jc.Act(bits)}))
    for name, method in methods.items():
        made[name, bits] = jc.activations.ranges_of(stats, method(bits))
        found[name].append(100 * accuracy(run(weights, made[name, bits], test_x)))
    print(f"{bits} bits: ", ", ".join(f"{name} {found[name][-1]:.1f}%" for name in methods))

# %% [markdown]
# Left, what enters `down` behind its relu, and where the ranges for 3 bits end. Right, the accuracy.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
_, wide = hidden(params, train_x[:1024])
left.hist(np.ravel(wide[wide > 0]), bins=80, color="lightgray", label=f"the {(wide > 0).mean():.0%} that are not 0")
for color, name in enumerate(methods):
    left.axvline(made[name, 3]["down"].high, color=f"C{color}", lw=2)
    right.plot(widths, found[name], "o-", color=f"C{color}", label=name)
left.set(xlabel="what enters down, and the ends of 3 bits", ylabel="how many", yscale="log")
left.legend(loc="lower left")
right.axhline(100 * in_float, color="gray", ls="--", lw=1, label="float")
right.set(xlabel="bits an activation", ylabel="test accuracy (%)", ylim=(0, 102), xticks=widths)
right.invert_xaxis()
right.legend(loc="lower left", frameon=False)

best = found["least squared error"]
print(f"8 bits cost {100 * in_float - best[0]:.1f} pp, 4 bits {100 * in_float - best[widths.index(4)]:.1f} pp")
assert best[0] > 100 * in_float - 1
assert best[widths.index(3)] > found["extremes"][widths.index(3)]
