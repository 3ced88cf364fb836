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
# # 9. Many devices: one step, three layouts
#
# A large network does not fit on one device, so its arrays are laid out over many. Does compression have to know? It
# does not: a transform is a pure function of arrays, and the mask of a weight lies where the weight lies. We train
# one network on eight devices in three layouts, with the same code, and look at who holds what.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)  # before any array is made: eight virtual devices, also on a laptop

import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import jaxcomp as jc

SCALE = 1  # more: a wider network, trained for longer
WIDTH, STEPS, SPARSITY = 256 * SCALE, 200 * SCALE, 0.8
devices = (jax.devices() if len(jax.devices()) >= 8 else jax.devices("cpu"))[:8]  # a TPU's own eight, where there are
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,), devices=devices)

# %% [markdown]
# ## A network, and what is done to it
#
# Two matrices on scikit-learn's digits. The sparsity grows to 80% over both together (the threshold is one number for
# the whole network, wherever its parts lie), and what is left is rounded to four bits.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = np.float32(images[order] / 16), labels[order].astype(np.int32)
train_x, train_y, test_x, test_y = x[397:], y[397:], x[:397], y[:397]
rng = np.random.default_rng(0)
start = {
    "up": {"kernel": rng.normal(scale=0.17, size=(64, WIDTH)), "bias": np.zeros(WIDTH)},
    "down": {"kernel": rng.normal(scale=0.1, size=(WIDTH, 10)), "bias": np.zeros(10)},
}
start = jax.tree.map(np.float32, start)


def net(params, x):
    x = jax.nn.gelu(x @ params["up"]["kernel"] + params["up"]["bias"])
    return x @ params["down"]["kernel"] + params["down"]["bias"]


tx = optax.adam(2e-3)
sparser = jc.gate(jc.prune(jc.cubic(SPARSITY, end=STEPS * 3 // 4), scope=jc.Global()), jc.every(10))
compress = jc.chain(sparser, jc.quantize(jc.Int(4)))

# %% [markdown]
# ## Three layouts
#
# - **data**: each device has all parameters, and an eighth of each batch;
# - **fsdp**: each has an eighth of the batch *and* an eighth of the rows of every matrix, fetched when they are
#   needed;
# - **tensor**: each has an eighth of the hidden units, columns of the first matrix and rows of the second, and all of
#   the batch.
#
# A layout is a table from parameters to axes of the mesh, and nothing else in this notebook depends on it.

# %%
whole, rows, columns = P(), P("d", None), P(None, "d")
layouts = {
    "data": ({"up": {"kernel": whole, "bias": whole}, "down": {"kernel": whole, "bias": whole}}, P("d")),
    "fsdp": ({"up": {"kernel": rows, "bias": P("d")}, "down": {"kernel": rows, "bias": whole}}, P("d")),
    "tensor": ({"up": {"kernel": columns, "bias": P("d")}, "down": {"kernel": rows, "bias": whole}}, whole),
}


def laid(tree, specs):
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)


# %% [markdown]
# ## One step
#
# There is no sharding in it, and no collective. Masks, codes, scales and the optimizer's moments follow their
# parameter.


# %%
@jax.jit
def begin(params):
    return tx.init(params), compress.init(params)


@jax.jit
def train_step(params, opt, state, step, x, y):
    def loss(params):
        logits = net(jc.materialize(compress.apply(state, params)), x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt = tx.update(grads, opt, params)
    params = optax.apply_updates(params, updates)
    return params, opt, compress.update(state, params, step=step, grads=grads), value


def train(params, place):
    (opt, state), rng, losses = begin(params), np.random.default_rng(1), []
    for step in range(STEPS):
        batch = rng.integers(len(train_x), size=128)
        params, opt, state, value = train_step(
            params, opt, state, np.int32(step), place(train_x[batch]), place(train_y[batch])
        )
        losses.append(float(value))
    return jax.jit(compress.apply)(state, params), (params, opt, state), losses


def accuracy(seen):
    return float((net(jax.device_get(jc.materialize(seen)), test_x).argmax(-1) == test_y).mean())


def held(tree):
    """Bytes that the first device holds of a tree."""
    shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == devices[0])


# %%
runs = {"one device": train(jax.device_put(start, devices[0]), lambda batch: jax.device_put(batch, devices[0]))}
for name, (specs, of_batch) in layouts.items():
    place = NamedSharding(mesh, of_batch)
    runs[name] = train(laid(start, specs), lambda batch, place=place: jax.device_put(batch, place))
for name, (seen, everything, losses) in runs.items():
    kilobytes = held(everything) / 1000
    print(
        f"{name:11s}  loss {losses[-1]:.5f}   accuracy {accuracy(seen):.1%}   {kilobytes:4.0f} kB on the first device"
    )
    assert abs(losses[-1] - runs["one device"][2][-1]) < 0.03
    assert accuracy(seen) > 0.9

# %% [markdown]
# The losses differ in late digits, if at all: eight devices add up a sum in another order, and training carries that
# on. (With ReLU in the place of GELU it carries it further: four-bit weights times pixels often sum to exactly zero,
# and then the order decides on which side of the kink one is.) What compression does with the *same* weights does not
# differ at all, not in a bit: masks, codes and scales of eight devices are those of one.

# %%
trained = jax.device_get(runs["one device"][1][0])


@jax.jit
def once(params):
    both = jc.chain(jc.prune(SPARSITY, scope=jc.Global()), jc.quantize(jc.Int(4)))
    return both.apply(both.init(params), params)


alone = jax.device_get(once(jax.device_put(trained, devices[0])))
for name, (specs, _) in layouts.items():
    many = jax.device_get(once(laid(trained, specs)))
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(many), strict=True))
    print(f"{name:7s} {len(jax.tree.leaves(many))} arrays of masks, codes, scales and floats: the same bits")

# %% [markdown]
# ## Who holds what
#
# The first matrix after training, 64 pixels by 256 hidden units: a dot is a weight that was kept, in the color of the
# device that holds it. Under `data` every device holds all of it. Right, what one device has to hold: parameters,
# moments and masks.

# %%
figure = plt.figure(figsize=(12, 5), layout="constrained")
grid = figure.subplot_mosaic([[name, "bytes"] for name in layouts], width_ratios=[2, 1])
palette = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, 8))[:, :3]
for name in layouts:
    mask = runs[name][0]["up"]["kernel"].mask
    owners = np.zeros(mask.shape, int)
    for shard in mask.addressable_shards:
        owners[shard.index] = devices.index(shard.device)
    ink = np.full((8, 3), 0.25) if mask.sharding.is_fully_replicated else palette
    grid[name].imshow(np.where(np.asarray(mask)[..., None], ink[owners], 1.0), aspect="auto", interpolation="nearest")
    grid[name].set(title=name, xticks=[], yticks=[], ylabel="pixels")
grid["tensor"].set(xlabel="hidden units")
sizes = {name: held(everything) / 1000 for name, (_, everything, _) in runs.items()}
bars = grid["bytes"].barh(list(sizes), list(sizes.values()), color=["gray", "dimgray", "tab:blue", "tab:blue"])
grid["bytes"].bar_label(bars, fmt="%.0f kB", padding=3)
grid["bytes"].set(title="held by one device", xticks=[], xlim=(0, 1.25 * max(sizes.values())))
grid["bytes"].invert_yaxis()
for side in ("top", "right", "bottom"):
    grid["bytes"].spines[side].set_visible(False)
assert sizes["fsdp"] < sizes["data"] / 6
