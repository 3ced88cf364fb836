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
# # 10. Federated: the same network for a thirtieth of the upload
#
# Twenty phones train one network without showing anybody their data. What they send is how their copy of the network
# changed, every round, over the slow side of their link. How small can that message be, when each phone has seen two
# of the ten digits only?

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from jaxcomp import federated as fed

SCALE = 1  # more: more rounds
CLIENTS, ROUNDS, LOCAL_STEPS, BATCH = 20, 40 * SCALE, 8, 16

# %% [markdown]
# ## Data, dealt out unfairly
#
# Scikit-learn's digits, 397 held out. Client c gets images of two digits and no others, which is what makes federated
# learning hard: each one pulls the network towards its own two answers.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
train_x, train_y, test_x, test_y = x[397:], y[397:], x[:397], y[:397]
digit = np.asarray(train_y)
shards = [np.flatnonzero((digit == c % 10) | (digit == (c + 3) % 10))[c // 10 :: 2] for c in range(CLIENTS)]
print("client 4 has", len(shards[4]), "images, of the digits", np.unique(digit[shards[4]]))

# %% [markdown]
# ## What a client does
#
# It takes the server's parameters, makes a few steps of SGD on its own images, and returns the difference. `vmap`
# runs all of them at once here.

# %%
rng = np.random.default_rng(0)
start = {
    "up": {"kernel": rng.normal(scale=0.17, size=(64, 128)), "bias": np.zeros(128)},
    "down": {"kernel": rng.normal(scale=0.1, size=(128, 10)), "bias": np.zeros(10)},
}
start = jax.tree.map(jnp.float32, start)


def net(params, x):
    x = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"])
    return x @ params["down"]["kernel"] + params["down"]["bias"]


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(net(params, x), y).mean()


def client(params, batches):
    def step(now, batch):
        grads = jax.grad(loss)(now, train_x[batch], train_y[batch])
        return jax.tree.map(lambda p, g: p - 0.2 * g, now, grads), None

    after, _ = jax.lax.scan(step, params, batches)
    return jax.tree.map(jnp.subtract, after, params)


clients = jax.jit(jax.vmap(client, (None, 0)))
accuracy = jax.jit(lambda params: (net(params, test_x).argmax(-1) == test_y).mean())

# %% [markdown]
# ## What a message is
#
# A compressor's `encode` makes of an update the same tree with a small leaf for each array, and `to_bytes` writes it
# out: no estimate, but the bytes that would go over the wire. Here the largest 2% of each array, and their places.

# %%
compressor = fed.topk(0.02)
batches = np.stack([rng.choice(shard, (LOCAL_STEPS, BATCH)) for shard in shards])
update = jax.tree.map(lambda change: change[0], clients(start, jnp.asarray(batches)))
message, _ = compressor.encode(compressor.init(update), update)
data = fed.to_bytes(message)
received = compressor.decode(fed.from_bytes(data, like=message))
assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), received, compressor.decode(message)))
print(f"{len(data):,} bytes in the place of {4 * sum(a.size for a in jax.tree.leaves(update)):,}")

# %% [markdown]
# ## Ways to send it
#
# - **float32**: as it is;
# - **rotated 2-bit**: a random rotation spreads out what sticks out, then two bits an element, rounded at random;
# - **rotated sign**: one bit an element and one scale (DRIVE);
# - **top 2%**: the largest elements and their places;
# - **top 2% + feedback**: the same, but a client remembers what it did not send and adds it to its next update.
#
# They compose like transforms do. `combine` averages messages without unpacking them where the algebra allows:
# rotated codes are averaged in the rotated space and turned back once.

# %%
ways = {
    "float32": fed.dense(),
    "rotated 2-bit": fed.rotate(fed.uniform(2), block=1024),
    "rotated sign": fed.rotate(fed.sign(unbiased=True), block=1024),
    "top 2%": fed.topk(0.02),
    "top 2% + feedback": fed.error_feedback(fed.topk(0.02)),
}


def federate(compressor):
    def one_round(params, memory, updates, key):
        own = jax.random.split(jax.random.fold_in(key, 1), CLIENTS)  # each client's randomness, and the round's for all
        encode = jax.vmap(lambda state, update, k: compressor.encode(state, update, key=k, shared=key))
        messages, memory = encode(memory, updates, own)
        mean = compressor.decode(fed.combine_stacked(messages))
        return jax.tree.map(jnp.add, params, mean), memory, jax.tree.map(lambda a: a[0], messages)

    one_round, rng = jax.jit(one_round), np.random.default_rng(1)
    params, memory = start, jax.tree.map(lambda m: jnp.stack([m] * CLIENTS), compressor.init(start))
    sent, curve = 0, []
    for number in range(ROUNDS):
        batches = np.stack([rng.choice(shard, (LOCAL_STEPS, BATCH)) for shard in shards])
        updates = clients(params, jnp.asarray(batches))
        params, memory, message = one_round(params, memory, updates, jax.random.key(number))
        sent += CLIENTS * len(fed.to_bytes(message))
        curve.append((sent / 1e6, 100 * float(accuracy(params))))
    return np.array(curve)


curves = {way: federate(compressor) for way, compressor in ways.items()}
for way, curve in curves.items():
    print(f"{way:18s} {curve[-1, 0]:6.2f} MB sent   {curve[-10:, 1].mean():.1f}% in the last ten rounds")

# %% [markdown]
# ## Accuracy by what it cost to send
#
# The same rounds each, over a logarithmic axis of megabytes. What lies further left is cheaper. The dotted line
# is where float32 ends.

# %%
figure, axes = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
for way, curve in curves.items():
    axes.plot(*curve.T, label=f"{way}: {curve[-1, 0]:.2g} MB, {curve[-10:, 1].mean():.1f}%")
axes.axhline(curves["float32"][-10:, 1].mean(), color="gray", ls=":", lw=1)
axes.set(xscale="log", xlabel="sent by all clients together (MB)", ylabel="test accuracy (%)", ylim=(0, 100))
axes.set_xticks([0.03, 0.1, 0.3, 1, 3, 10, 30], ["0.03", "0.1", "0.3", "1", "3", "10", "30"])
axes.set_title(f"{CLIENTS} clients of two digits each, {ROUNDS} rounds")
axes.legend(loc="lower right", frameon=False, title="sent, accuracy at the end")

# %%
float32, small, top, memory = (curves[way] for way in ("float32", "rotated sign", "top 2%", "top 2% + feedback"))
saved = float32[-1, 0] / small[-1, 0]
print(f"rotated signs: {saved:.0f} times fewer bytes, {small[-10:, 1].mean() - float32[-10:, 1].mean():+.1f} points")
assert saved > 25
assert small[-10:, 1].mean() > float32[-10:, 1].mean() - 3
assert memory[:20, 1].mean() > top[:20, 1].mean()  # what is remembered arrives later, but it arrives

# %% [markdown]
# A test image is a quarter of a point, so differences below one or two points say nothing here. What the server sends
# back is not compressed in this simulation. `python -m train.federated` makes a longer table on Fashion-MNIST, with
# fifty clients of which ten take part in a round.
