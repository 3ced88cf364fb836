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
# # 8. A language model in four bits
#
# A small transformer learns to write Python's reference manual, letter by letter. Then its weights go from 32 bits to
# 4 without another step of training. What does that cost in perplexity, and what is gained in bytes and in tokens a
# second?

# %%
import statistics
import time
from pydoc_data.topics import topics

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxcomp as jc
from jaxcomp.kernels import kv_cache

SCALE = 1  # more: a wider network, trained for longer
DIM, LAYERS, HEADS = 96 * SCALE, 2, 4
CONTEXT, BATCH, STEPS = 64, 16, 250 * SCALE

# %% [markdown]
# ## A text that is here already
#
# Every Python brings the text of its language reference along, for `help()`: half a million letters. The last tenth
# is held out.

# %%
text = "\n\n".join(topics[name] for name in sorted(topics))
letters = sorted(set(text))
number_of = {letter: number for number, letter in enumerate(letters)}
data = np.array([number_of[letter] for letter in text], np.int32)
train_data, test_data = np.split(data, [len(data) * 9 // 10])
rng = np.random.default_rng(0)


def windows(data, count):
    starts = rng.integers(len(data) - CONTEXT, size=(count, BATCH, 1))
    return jnp.asarray(data[starts + np.arange(CONTEXT + 1)])


print(f"{len(text):,} letters, {len(letters)} different ones")

# %% [markdown]
# ## A transformer
#
# Plain linen, with rotary positions. In training a block attends to the whole window; in generation it is given a
# cache of keys and values, and gives it back with the new ones.


# %%
def rotary(x, start):
    position = start + jnp.arange(x.shape[1])[:, None, None]
    angle = position / 1000 ** jnp.linspace(0, 1, x.shape[-1] // 2)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], -1)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, cache, start):
        y = nn.RMSNorm(name="norm1")(x)
        q, k, v = (
            nn.Dense(DIM, use_bias=False, name=name)(y).reshape(*y.shape[:2], HEADS, -1)
            for name in ("query", "key", "value")
        )
        q, k = rotary(q, start), rotary(k, start)
        if cache is None:
            seen = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        else:
            cache = cache.append(k, v, start)
            seen = cache.attend(q, start)
        x = x + nn.Dense(DIM, use_bias=False, name="out")(seen.reshape(x.shape))
        hidden = nn.gelu(nn.Dense(4 * DIM, use_bias=False, name="up")(nn.RMSNorm(name="norm2")(x)))
        return x + nn.Dense(DIM, use_bias=False, name="down")(hidden), cache


class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, tokens, caches=(None,) * LAYERS, start=0):
        x, after = nn.Embed(len(letters), DIM, name="embed")(tokens), []
        for i, cache in enumerate(caches):
            x, cache = Block(name=f"block{i}")(x, cache, start)
            after.append(cache)
        return nn.Dense(len(letters), use_bias=False, name="head")(nn.RMSNorm(name="norm")(x)), tuple(after)


model = LanguageModel()
params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), jnp.zeros((1, 8), jnp.int32))["params"]
print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")

# %% [markdown]
# ## Training, in float or under any transform


# %%
def loss(params, window):
    logits, _ = model.apply({"params": params}, window[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()


def fit(params, compress, steps, rate):
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps), b2=0.98)
    state = compress.init(params)  # weight-only quantization has nothing to update

    def step(carry, window):
        params, opt = carry
        value, grads = jax.value_and_grad(lambda p: loss(jc.materialize(compress.apply(state, p)), window))(params)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    run = jax.jit(lambda params, batches: jax.lax.scan(step, (params, tx.init(params)), batches))
    (params, _), losses = run(params, windows(train_data, steps))
    return params, losses


held_out = windows(test_data, 10)
perplexity = jax.jit(lambda params: jnp.exp(jax.lax.map(lambda window: loss(params, window), held_out).mean()))
params, losses = fit(params, jc.chain(), STEPS, 8e-3)
print(f"perplexity on held-out text: {perplexity(params):.2f}; {len(letters)} would be guessing")

# %% [markdown]
# ## Weights alone, in few bits
#
# What is stored and read are the weights, so they alone are quantized: the blocks' kernels in few bits with a scale
# for each group of 32 inputs, the embedding and the last layer in 8, the norms not at all.


# %%
def weight_only(bits):
    return jc.by_path(
        {
            "block.*/kernel": jc.quantize(jc.Int(bits), per=jc.Groups(32)),
            "(embed|head)/.*": jc.quantize(jc.Int(8)),
            ".*": jc.core.identity(),
        }
    )


def quantized(params, bits):
    compress = weight_only(bits)
    return jc.pack(compress.apply(compress.init(params), params))


trees = {"float32": params} | {f"int{bits}": quantized(params, bits) for bits in (8, 4, 3, 2)}
found = {name: (jc.nbytes(tree) / 1000, float(perplexity(jc.materialize(tree)))) for name, tree in trees.items()}

# %% [markdown]
# Two bits are too few for rounding alone. A fifth as many steps of training under the same transform, the gradient
# going straight through the rounding, give back most of what was lost.

# %%
tuned, _ = fit(params, weight_only(2), STEPS // 5, 1e-3)
trees["int2, trained"] = quantized(tuned, 2)
found["int2, trained"] = found["int2"][0], float(perplexity(jc.materialize(trees["int2, trained"])))
for name, (size, value) in found.items():
    print(f"{name:14s} {size:7.0f} kB   perplexity {value:.2f}")

# %% [markdown]
# ## Perplexity by bytes
#
# The lower left is where one wants to be. Eight and four bits are on the float network's line; below, training pays.

# %%
figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
sizes, values = np.array([found[name] for name in ("float32", "int8", "int4", "int3", "int2")]).T
axes.plot(sizes, values, "o-", color="tab:blue", label="rounded after training")
axes.plot(
    *found["int2, trained"], "D", color="tab:green", ms=8, label=f"2 bits, {STEPS // 5} more steps under rounding"
)
axes.axhline(values[0], color="gray", ls=":", lw=1)
for name, size, value in zip(("float32", "int8", "int4", "int3", "int2"), sizes, values, strict=True):
    axes.annotate(f"{name}, {value:.2f}", (size, value), (5, 7), textcoords="offset points")
axes.annotate(
    f"{found['int2, trained'][1]:.2f}", found["int2, trained"], (-8, -4), textcoords="offset points", ha="right"
)
axes.set(
    xscale="log", xlabel="weights (kB)", ylabel="perplexity on held-out text", title="A language model in few bits"
)
ticks = [100, 200, 400, 800]
axes.set_xticks([t * SCALE**2 for t in ticks], [f"{t * SCALE**2:,}" for t in ticks])
axes.minorticks_off()
axes.set_xlim(sizes.min() / 1.35, sizes.max() * 1.6)
axes.margins(y=0.15)
axes.legend(frameon=False)
assert found["int4"][1] < 1.05 * found["float32"][1]
assert found["int4"][0] < found["float32"][0] / 5
assert found["int2, trained"][1] < found["int2"][1]

# %% [markdown]
# ## Tokens a second
#
# `prepare` lays the packed codes out once, as the products of this function read them. `quantize_function` with no
# rules leaves activations in float and runs each product on the leaf that it finds; the cache of keys and values
# holds int8 codes. The same function runs the float network.

# %%
TOKENS = 200


def decode(params, tokens, caches, start):
    return model.apply({"params": params}, tokens, caches, start)


def empty_caches():
    shape = (1, TOKENS + 32, HEADS, DIM // HEADS)
    return tuple(kv_cache(shape, keys=jc.Int(8)) for _ in range(LAYERS))


run = jc.quantize_function(decode, {})
prompt = jnp.array([[number_of[letter] for letter in "The statement "]])


@jax.jit
def generate(params, key):
    logits, caches = run(params, None, prompt, empty_caches(), 0)

    def step(carry, now):
        logits, caches = carry
        i, key = now
        token = jax.random.categorical(key, logits[0, -1] / 0.6)
        return run(params, None, token[None, None], caches, i), token

    carry = logits[:, -1:], caches
    steps = prompt.shape[1] + jnp.arange(TOKENS), jax.random.split(key, TOKENS)
    return jax.lax.scan(step, carry, steps)[1]


token = jnp.zeros((1, 1), jnp.int32)
served = {"float32": params, "int4": jc.prepare(trees["int4"], decode, token, empty_caches(), 0)}
seconds = {name: [] for name in served}
for attempt in range(8):
    for name, tree in served.items():
        began = time.perf_counter()
        written = jax.block_until_ready(generate(tree, jax.random.key(1, impl="rbg")))
        seconds[name] += [time.perf_counter() - began] * (attempt > 0)  # the first one compiles
for name, tree in served.items():
    rate = TOKENS / statistics.median(seconds[name])
    print(f"{name:8s} {rate:6.0f} tokens/s   {jc.nbytes(tree) / 1000:6.0f} kB of weights read for each")
print("\nThe statement", "".join(letters[i] for i in np.asarray(written)))

# %% [markdown]
# What a token costs depends on the machine. Weights of this size stay in a core's cache, where reading less gains
# nothing and unpacking costs something; the fewer bytes pay where weights are large and memory is what one waits for.
# `docs/hardware.md` says which backend runs which form and what was measured there; `print(jc.coverage(decode,
# {})(served["int4"], token, empty_caches(), 0))` says it of this network.
