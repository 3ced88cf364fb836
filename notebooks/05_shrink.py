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
# # 5. Shrink a network for real
#
# A mask makes no network faster. Removing channels does: the arrays get smaller, and every product with them. Which
# channels must go together, through a residual sum and batch norm, is read off the program. We take three quarters of
# the multiply-adds out of a convolutional network, and what is left is the same class at smaller widths.

# %%
import time
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxcomp as jc
from jaxcomp.structure import check_shrink

SCALE = 1  # more: longer training
STEPS = 200 * SCALE
print(jax.devices())

# %% [markdown]
# ## A network with a residual block
#
# Scikit-learn's 1,797 digits, a quarter of them held out.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = jnp.asarray(images[order].reshape(-1, 8, 8, 1) / 16, jnp.float32), jnp.asarray(labels[order])
train_x, train_y, test_x, test_y = x[450:], y[450:], x[:450], y[:450]


class Net(nn.Module):
    widths: tuple[int, int, int]

    @nn.compact
    def __call__(self, x, train=False):
        def conv(x, width, stride=1):
            return nn.BatchNorm(not train, momentum=0.9)(nn.Conv(width, (3, 3), stride, use_bias=False)(x))

        outer, inner, last = self.widths
        x = nn.relu(conv(x, outer))
        x = nn.relu(x + conv(nn.relu(conv(x, inner)), outer))
        x = nn.relu(conv(x, last, stride=2))
        return nn.Dense(10)(x.reshape(len(x), -1))


tx = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))


@partial(jax.jit, static_argnums=0)
def step(net, params, stats, opt, batch):
    def loss(params):
        variables = {"params": params, "batch_stats": stats}
        logits, new = net.apply(variables, train_x[batch], train=True, mutable="batch_stats")
        return optax.softmax_cross_entropy_with_integer_labels(logits, train_y[batch]).mean(), new["batch_stats"]

    grads, stats = jax.grad(loss, has_aux=True)(params)
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), stats, opt


def train(net, variables):
    params, stats = variables["params"], variables["batch_stats"]
    opt = tx.init(params)
    for batch in np.random.default_rng(1).integers(len(train_x), size=(STEPS, 64)):
        params, stats, opt = step(net, params, stats, opt, batch)
    return {"params": params, "batch_stats": stats}


def start(net):
    return jax.jit(net.init)(jax.random.key(0, impl="rbg"), train_x[:1])  # such keys compile sooner


def accuracy(fn, variables):
    return (jax.jit(fn)(variables, test_x).argmax(-1) == test_y).mean()


large = Net((16, 24, 32))
variables = train(large, start(large))
whole = accuracy(large.apply, variables)
print(f"whole: {whole:.1%}")

# %% [markdown]
# ## What goes together
#
# `channel_groups` finds three groups. The first has channels of two convolutions, for their results are added: the
# residual sum ties channel 7 of one to channel 7 of the other, and to all that batch norm and the next layers have of
# it.

# %%
groups = jc.channel_groups(large.apply)(variables, test_x)
print(groups)

# %% [markdown]
# ## Choose and remove
#
# A `plan` takes what matters least until a target is met, here a quarter of the multiply-adds. `take` cuts the arrays,
# batch statistics too, and `shrink` makes the function over them.

# %%
plan = jc.plan(groups, variables, macs=0.25 * groups.macs(), scope="global", round_to=4)
print(plan)
cut, fn = plan.take(variables), jc.shrink(large.apply, plan)
print(f"the largest difference from the masked network is {check_shrink(large.apply, plan, variables, test_x):.0e}")

# %% [markdown]
# ## Tune what is left
#
# The smaller network is the same class at the widths of its arrays, so it trains as the large one did. To see what the
# large one's weights are worth, the same small network is also trained from scratch, for as many steps as both took.

# %%
widths = tuple(cut["params"][name]["kernel"].shape[-1] for name in ("Conv_0", "Conv_1", "Conv_3"))
small = Net(widths)
assert jnp.allclose(small.apply(cut, test_x), fn(cut, test_x), atol=1e-4)
tuned, scratch = train(small, cut), train(small, train(small, start(small)))
accuracies = {
    "whole": whole,
    "cut": accuracy(small.apply, cut),
    "cut and tuned": accuracy(small.apply, tuned),
    "from scratch": accuracy(small.apply, scratch),
}
print(", ".join(f"{name} {found:.1%}" for name, found in accuracies.items()))


# %%
def milliseconds(net, variables):
    """The median time of the test digits, here."""
    run, times = jax.jit(net.apply), []
    for _ in range(21):
        before = time.perf_counter()
        run(variables, test_x).block_until_ready()
        times.append(1000 * (time.perf_counter() - before))
    return np.median(times)


measured = {
    "multiply-adds": [jc.cost(net.apply)(v, test_x).macs / 450 for net, v in ((large, variables), (small, tuned))],
    "bytes of the file": [jc.save("net.safetensors", v) for v in (variables, tuned)],
    "milliseconds": [milliseconds(net, v) for net, v in ((large, variables), (small, tuned))],
}
for name, (before, after) in measured.items():
    print(f"{name:18s} {before:12,.1f} -> {after:10,.1f}   {before / after:.1f} times less")

# %% [markdown]
# ## Before and after
#
# Left, the channels of each convolution. Right, what that makes of work, file and time on this machine, and of the
# accuracy.

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
convolutions = [f"Conv_{i}" for i in range(4)]
for tree, color, label in ((variables, "lightgray", "before"), (tuned, "C0", "after")):
    channels = [tree["params"][name]["kernel"].shape[-1] for name in convolutions]
    bars = left.barh(convolutions, channels, color=color, label=label, height=0.7)
    left.bar_label(bars, padding=3)
left.invert_yaxis()
left.set(xlabel="channels", xlim=(0, 36))
left.legend(frameon=False)
bars = middle.barh(list(measured), [100 * after / before for before, after in measured.values()], height=0.6)
middle.bar_label(bars, fmt="%.0f%%", padding=3)
middle.set(xlabel="% of the whole network's", xlim=(0, 110))
middle.invert_yaxis()
bars = right.barh(
    list(accuracies), [100 * a for a in accuracies.values()], color=["lightgray", "C3", "C0", "C1"], height=0.6
)
right.bar_label(bars, fmt="%.1f%%", padding=3)
right.set(xlabel="test accuracy (%)", xlim=(0, 120), xticks=[0, 50, 100])
right.invert_yaxis()

assert accuracies["cut and tuned"] > whole - 0.04
assert measured["multiply-adds"][0] > 3.5 * measured["multiply-adds"][1]
