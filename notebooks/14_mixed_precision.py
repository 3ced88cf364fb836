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
# # 14. Mixed precision by Hessian
#
# Which layers can bear two bits, and which want six? The curvature of the loss tells, without a label: a layer whose
# weights the loss bends along is rounded finely. We train a small network, estimate the trace of each layer's block,
# and choose widths under the bytes that one width for all layers would take.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxcomp as jc
from jaxcomp.search import GaussNewton, allocate, choosing, eigenvalues, kl, omega, sensitivity, traces, units_of

SCALE = 1  # more: longer training
STEPS = 150 * SCALE
print(jax.devices())

# %% [markdown]
# ## A network
#
# Scikit-learn's digits, a quarter of them held out, and a network whose layers differ much in size.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = (images[order] / 16).astype(np.float32), labels[order]
train_x, train_y, test_x, test_y = x[450:], y[450:], x[:450], y[:450]
SHAPES = {"layer_0": (64, 128), "layer_1": (128, 256), "layer_2": (256, 64), "layer_3": (64, 32), "layer_4": (32, 10)}


def network(p, x):
    for name in list(SHAPES)[:-1]:
        x = jax.nn.relu(x @ p[name] + p[f"{name}_bias"])
    return x @ p["layer_4"]


keys = jax.random.split(jax.random.key(0, impl="rbg"), len(SHAPES))
start = {n: jax.nn.initializers.he_normal()(k, s) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}
start |= {f"{name}_bias": jnp.zeros(shape[1]) for name, shape in list(SHAPES.items())[:-1]}
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
logits = jax.jit(network)


def accuracy(p):
    return float((np.asarray(logits(jc.materialize(p), test_x)).argmax(-1) == test_y).mean())


print(f"float: {accuracy(params):.1%}, {jc.artifact.file_size(params):,} bytes")

# %% [markdown]
# ## Curvature
#
# Against its own predictions the loss needs no labels, and its Gauss-Newton matrix is the Fisher information. Traces
# come with their standard errors, eigenvalues with bounds: Hutchinson's vectors of random signs go through all layers
# at once, Lanczos' through the layers behind the one that is asked for.

# %%
data = [train_x[i : i + 100] for i in range(0, 400, 100)]


def against_itself(logits, x):
    wanted = jax.nn.softmax(jax.lax.stop_gradient(logits))
    return -jnp.mean(jnp.sum(wanted * jax.nn.log_softmax(logits), -1))


curved = GaussNewton(network, against_itself)
curvature = traces(curved, params, data, key=jax.random.key(1), rtol=0.1)
curvature

# %%
largest = eigenvalues(curved, params, data, key=jax.random.key(2), rtol=0.05)
largest

# %% [markdown]
# The largest eigenvalue says how the layer minds its worst direction, the trace how it minds all of them: rounding goes
# in no direction in particular, which is why HAWQ-V2 took the mean of the trace, and not the eigenvalue as HAWQ did.
#
# ## What each width loses
#
# `omega` is `trace / parameters · ‖Q(W) − W‖²`, half of which is the loss's growth by curvature; `sensitivity` runs the
# network with one layer rounded and measures the divergence of its outputs.

# %%
WIDTHS = (1, 2, 3, 4, 5, 6, 8)
roles = jc.roles(network)(params, test_x[:1])
options = {f"int{b}": jc.quantize(jc.Int(b), roles=roles) for b in WIDTHS}
table = units_of(params, options)
told = omega(params, table, curvature)
measured = sensitivity(network, params, table, data, measures=(kl,)).table("kl")

figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for name in SHAPES:
    by_trace = [option.loss / 2 for option in told[name].options]
    by_loss = [max(option.loss, 1e-7) for option in measured[name].options]
    axes.plot(by_trace, by_loss, "o-", markersize=4, label=name)
axes.plot([1e-5, 1], [1e-5, 1], color="0.7", linewidth=1, zorder=0)
axes.set(xscale="log", yscale="log", xlabel="Ω / 2, told by curvature", ylabel="divergence, measured")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)

# %% [markdown]
# Near the lower left they agree, where a quadratic is the loss; at one and two bits it is no more than a direction.
#
# ## Widths under a budget
#
# The file of one width for all says how many bytes there are. `allocate` finds the best choice within them, exactly.

# %%
price = choosing(network, params, test_x[:1]).priced


def made(choice):
    transform = jc.by_path({name: options[label] for name, label in choice.items() if name in SHAPES})
    return jc.pack(transform.apply(transform.init(params), params))


def fitting(priced, size):  # a file's header is not a sum over layers: the budget gives a little
    limit = size
    while True:
        plan = allocate(priced, {"bytes": limit})
        excess = jc.artifact.file_size(made(plan.choice)) - size
        if excess <= 0:
            return plan
        limit -= excess


results = {"one width": [], "by trace": [], "by measured loss": []}
plans = {}
for bits in (2, 3, 4):
    same = made(dict.fromkeys(SHAPES, f"int{bits}"))
    size = jc.artifact.file_size(same)
    results["one width"].append((size, same))
    for name, losses in (("by trace", told), ("by measured loss", measured)):
        plans[name, bits] = fitting(price(losses), size)
        mixed = made(plans[name, bits].choice)
        results[name].append((jc.artifact.file_size(mixed), mixed))

plans["by trace", 2]


# %%
def divergence(p):
    was, now = (jax.nn.log_softmax(logits(q, test_x)) for q in (params, jc.materialize(p)))
    return float(jnp.mean(jnp.sum(jnp.exp(was) * (was - now), -1)))


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for name, files in results.items():
    left.plot([size for size, _ in files], [divergence(p) for _, p in files], "o-", label=name)
left.set(yscale="log", xlabel="bytes of the file", ylabel="divergence from float, held-out images")
left.legend(frameon=False)
for i, bits in enumerate((2, 3, 4)):
    widths = [int(plans["by trace", bits].choice[name].removeprefix("int")) for name in SHAPES]
    right.bar(np.arange(len(SHAPES)) + 0.27 * (i - 1), widths, 0.25, label=f"as many bytes as int{bits}")
right.set(xlabel="layer", ylabel="bits, by trace", xticks=range(len(SHAPES)))
right.legend(frameon=False)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)

for i, bits in enumerate((2, 3, 4)):
    row = {name: (divergence(files[i][1]), accuracy(files[i][1])) for name, files in results.items()}
    print(f"as int{bits}:", ", ".join(f"{name} {far:.3f} ({score:.1%})" for name, (far, score) in row.items()))
    assert row["by trace"][0] < row["one width"][0]
    assert row["by measured loss"][0] < row["one width"][0]
