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
# # 11. Programs that run elsewhere
#
# Bytes in a Python process are worth little to a phone or a server. We train a small network, compress it in four ways,
# write each for ONNX, and run the files in onnxruntime, which knows nothing of JAX: how large they are, how long one
# image takes on one thread, and whether they say what JAX says. The same function goes to StableHLO at the end.

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import optax
from sklearn.datasets import load_digits

import jaxcomp as jc

SCALE = 1  # more: longer training, more runs of each file
STEPS, RUNS = 150 * SCALE, 200 * SCALE
print(jax.devices())

# %% [markdown]
# ## A network
#
# Scikit-learn's digits, a quarter of them held out; two convolutions and two dense layers.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x, y = (images[order].reshape(-1, 8, 8, 1) / 16).astype(np.float32), labels[order]
train_x, train_y, test_x, test_y = x[450:], y[450:], x[:450], y[:450]
SHAPES = {"first": (3, 3, 1, 32), "second": (3, 3, 32, 64), "wide": (1024, 512), "head": (512, 10)}


def network(p, x):
    for name, stride in (("first", 1), ("second", 2)):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, p[name], (stride, stride), "SAME", dimension_numbers=numbers)
        x = jax.nn.relu(x + p[f"{name}_bias"])
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ p["wide"] + p["wide_bias"])
    return x @ p["head"]


def start(key):
    keys = jax.random.split(key, len(SHAPES))
    weights = jax.nn.initializers.he_normal()
    p = {name: weights(key, shape) for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)}
    return p | {f"{name}_bias": jnp.zeros(SHAPES[name][-1]) for name in ("first", "second", "wide")}


tx = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))


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


batches = np.random.default_rng(1).integers(0, len(train_x), (STEPS, 64))
params = train(start(jax.random.key(0, impl="rbg")), batches)
in_float = np.asarray(jax.jit(network)(params, test_x))
print(f"float: {(in_float.argmax(-1) == test_y).mean():.1%}")

# %% [markdown]
# ## Four trees
#
# The tree says what the weights are. With rules, and ranges that a few batches were seen to have, activations are
# integers too.

# %%
roles = jc.roles(network)(params, test_x[:1])
int8 = jc.pack(jc.quantize(jc.Int(8), roles=roles).apply((), params))
int4 = jc.pack(jc.quantize(jc.Int(4), per=jc.Groups(32, 0), where="wide").apply((), params))
seen = [train_x[i : i + 50] for i in range(0, 200, 50)]
rules = {".*": jc.Act(8)}
ranges = jc.activations.ranges_of(jc.trace.calibrate_over(network)(params, seen))

# %% [markdown]
# ## Four files
#
# `to_onnx` takes the function, the tree, and the shapes of the arguments; a dimension with a name is free.

# %%
images = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 8, 8, 1"), jnp.float32)
integers = {"rules": rules, "ranges": ranges, "samples": seen}
made = {
    "float32": (params, {}),
    "8-bit weights": (int8, {}),
    "4-bit dense layer": (int4, {}),
    "8-bit, activations too": (int8, integers),
}
sizes = {}
for i, (name, (tree, options)) in enumerate(made.items()):
    sizes[name] = jc.export.to_onnx(f"{i}.onnx", network, tree, images, **options)
    print(f"{name:24s} {sizes[name]:9,} bytes")

# %% [markdown]
# ## Run them
#
# One thread, one image at a time. What JAX says is `quantize_function` with the same tree, rules and ranges.

# %%
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
times, alike = {}, {}
for i, (name, (tree, given)) in enumerate(made.items()):
    session = onnxruntime.InferenceSession(f"{i}.onnx", options)
    (logits,) = session.run(None, {"input": test_x})
    asked = given.get("rules", {})
    in_jax = jax.jit(jc.quantize_function(network, asked, integer=bool(asked)))(tree, given.get("ranges"), test_x)
    alike[name] = float((logits.argmax(-1) == np.asarray(in_jax).argmax(-1)).mean())
    taken = []
    for image in np.resize(test_x, (RUNS, 1, 8, 8, 1)):
        began = time.perf_counter()
        session.run(None, {"input": image})
        taken.append(time.perf_counter() - began)
    times[name] = 1e6 * float(np.median(taken))
    accuracy = (logits.argmax(-1) == test_y).mean()
    print(f"{name:24s} {accuracy:.1%}, as JAX {alike[name]:.1%}, {times[name]:5.0f} µs an image")

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
kilobytes = {name: size / 1000 for name, size in sizes.items()}
for axis, values, label in zip(axes, (kilobytes, times), ("kB of the file", "µs an image, one thread"), strict=True):
    bars = axis.barh(list(values), list(values.values()), color=[f"C{i}" for i in range(4)])
    axis.bar_label(bars, [f"{v:,.0f}" for v in values.values()], padding=3)
    axis.set(xlabel=label)
    axis.margins(x=0.2)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].invert_yaxis()

# %% [markdown]
# ## For JAX without jaxcomp
#
# A StableHLO file holds the packed weights and what unpacks them. `jax.export.deserialize` reads it, on any of the
# platforms that it was written for; neither jaxcomp nor the code of `network` is needed there.

# %%
size = jc.export.to_stablehlo("network.stablehlo", network, int8, images)
with open("network.stablehlo", "rb") as f:
    program = jax.export.deserialize(bytearray(f.read()))
again = np.asarray(program.call(test_x))
print(f"{size:,} bytes for {', '.join(program.platforms)}; takes {program.in_avals[0]}")

assert size == os.path.getsize("network.stablehlo") < 1.1 * jc.nbytes(int8)
assert np.abs(again - network(jc.materialize(int8), test_x)).max() < 1e-3
assert sizes["8-bit, activations too"] < 0.3 * sizes["float32"]
assert sizes["4-bit dense layer"] < 0.3 * sizes["float32"]
assert min(alike.values()) > 0.99
