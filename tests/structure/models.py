"""Small networks of many kinds, each with the channel groups that a reader finds in it by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

IMAGE = (2, 8, 8, 3)


class Case(NamedTuple):
    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    groups: list[tuple[int, str]]  # units, and the slices as "path:axis" or "path:axis*width", in any order


def filled(shapes: Any, seed: int = 0) -> Any:
    """Random parameters of the given shapes; variances and scales are positive."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    rng = np.random.default_rng(seed)

    def value(path: Any, s: Any) -> Any:
        if not jnp.issubdtype(s.dtype, jnp.floating):
            return jnp.zeros(s.shape, s.dtype)
        w = 0.3 * rng.normal(size=s.shape)
        positive = any(name in str(path[-1]) + str(path[-2:]) for name in ("var", "scale"))
        return jnp.asarray(np.abs(w) + 0.5 if positive else w, s.dtype)

    return jax.tree.unflatten(tree, [value(p, s) for p, s in leaves])


def normal(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def linen(module: nn.Module, *args: Any, fn: Callable[..., Any] | None = None) -> tuple[Any, Any, tuple[Any, ...]]:
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return fn or module.apply, filled(shapes), args


def norm_slices(path: str) -> str:
    return " ".join(
        [*(f"batch_stats/{path}/{s}:0" for s in ("mean", "var")), *(f"params/{path}/{s}:0" for s in ("scale", "bias"))]
    )


class ResNet(nn.Module):
    train: bool = False
    blocks: int = 2

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=not self.train)
        x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        for _ in range(self.blocks):
            y = nn.relu(norm()(nn.Conv(6, (3, 3), use_bias=False)(x)))
            x = nn.relu(x + norm()(nn.Conv(8, (3, 3), use_bias=False)(y)))
        return nn.Dense(5)(nn.max_pool(x, (2, 2), (2, 2)).mean((1, 2)))


def resnet(train: bool) -> Case:
    module = ResNet(train)
    fn = partial(module.apply, mutable=["batch_stats"]) if train else None
    inner = [
        (6, f"params/Conv_{i}/kernel:3 params/Conv_{i + 1}/kernel:2 {norm_slices(f'BatchNorm_{i}')}") for i in (1, 3)
    ]
    stream = "params/Conv_0/kernel:3 params/Conv_1/kernel:2 params/Conv_2/kernel:3 params/Conv_3/kernel:2 "
    stream += "params/Conv_4/kernel:3 params/Dense_0/kernel:0 " + " ".join(
        norm_slices(f"BatchNorm_{i}") for i in (0, 2, 4)
    )
    return Case(*linen(module, normal(*IMAGE), fn=fn), [*inner, (8, stream)])


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        features = [nn.Conv(4, (3, 3))(x)]
        for _ in range(2):
            features.append(nn.Conv(3, (3, 3))(nn.relu(jnp.concatenate(features, -1))))
        return nn.Dense(2)(jnp.concatenate(features, -1).mean((1, 2)))


def densenet() -> Case:
    names = ("Conv_0/kernel:3", "Conv_0/bias:0", "Conv_1/kernel:2", "Conv_2/kernel:2", "Dense_0/kernel:0")
    groups = [
        (4, " ".join(f"params/{n}" for n in names)),
        (3, "params/Conv_1/kernel:3 params/Conv_1/bias:0 params/Conv_2/kernel:2 params/Dense_0/kernel:0"),
        (3, "params/Conv_2/kernel:3 params/Conv_2/bias:0 params/Dense_0/kernel:0"),
    ]
    return Case(*linen(DenseNet(), normal(*IMAGE)), groups)


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        skip = nn.relu(nn.Conv(4, (3, 3))(x))
        down = nn.relu(nn.Conv(6, (3, 3), strides=(2, 2))(skip))
        up = nn.ConvTranspose(5, (2, 2), strides=(2, 2))(down)
        return nn.Conv(1, (1, 1))(jnp.concatenate([up, skip], -1))


def unet() -> Case:
    groups = [
        (4, "params/Conv_0/kernel:3 params/Conv_0/bias:0 params/Conv_1/kernel:2 params/Conv_2/kernel:2"),
        (6, "params/Conv_1/kernel:3 params/Conv_1/bias:0 params/ConvTranspose_0/kernel:2"),
        (5, "params/ConvTranspose_0/kernel:3 params/ConvTranspose_0/bias:0 params/Conv_2/kernel:2"),
    ]
    return Case(*linen(UNet(), normal(*IMAGE)), groups)


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu6(nn.Conv(6, (1, 1))(x))
        x = nn.relu6(nn.Conv(12, (3, 3), feature_group_count=6)(x))
        return nn.Conv(4, (1, 1))(x)


def mobilenet() -> Case:
    expand = "params/Conv_0/kernel:3 params/Conv_0/bias:0 params/Conv_1/kernel:3*2 params/Conv_1/bias:0*2 "
    expand += "params/Conv_2/kernel:2*2"
    return Case(*linen(MobileNet(), normal(*IMAGE)), [(6, expand)])


class Grouped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Conv(12, (1, 1))(x))
        x = nn.gelu(nn.Conv(8, (3, 3), feature_group_count=4)(x))
        x = nn.GroupNorm(num_groups=4)(x)
        return nn.Conv(4, (1, 1))(x)


def grouped() -> Case:
    cardinal = "params/Conv_0/kernel:3*3 params/Conv_0/bias:0*3 params/Conv_1/kernel:3*2 params/Conv_1/bias:0*2 "
    cardinal += "params/GroupNorm_0/scale:0*2 params/GroupNorm_0/bias:0*2 params/Conv_2/kernel:2*2"
    return Case(*linen(Grouped(), normal(*IMAGE)), [(4, cardinal)])


class SqueezeExcite(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        gate = nn.sigmoid(nn.Dense(8)(nn.relu(nn.Dense(4)(x.mean((1, 2))))))
        return nn.Conv(2, (1, 1))(x * gate[:, None, None])


def squeeze_excite() -> Case:
    wide = "Conv_0/kernel:3 Conv_0/bias:0 Dense_1/kernel:0 Dense_0/kernel:1 Dense_0/bias:0 Conv_1/kernel:2"
    groups = [
        (8, " ".join(f"params/{n}" for n in wide.split())),
        (4, "params/Dense_1/kernel:1 params/Dense_1/bias:0 params/Dense_0/kernel:0"),
    ]
    return Case(*linen(SqueezeExcite(), normal(*IMAGE)), groups)


class Flatten(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(5)(x.reshape(len(x), -1))


def flatten() -> Case:
    groups = [(4, "params/Conv_0/kernel:3 params/Conv_0/bias:0 params/Dense_0/kernel:0*16")]
    return Case(*linen(Flatten(), normal(*IMAGE)), groups)


def attention_slices(path: str) -> list[tuple[int, str]]:
    """Heads, QK dimensions and V dimensions of a linen attention with 4 heads of 4."""
    at = f"params/{path}"
    heads = [f"{at}/{n}/kernel:1 {at}/{n}/bias:0" for n in ("query", "key", "value")]
    qk = [f"{at}/{n}/kernel:2 {at}/{n}/bias:1" for n in ("query", "key")]
    return [
        (4, " ".join([*heads, f"{at}/out/kernel:0"])),
        (4, " ".join(qk)),
        (4, f"{at}/value/kernel:2 {at}/value/bias:1 {at}/out/kernel:1"),
    ]


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (4, 4), strides=(4, 4))(x).reshape(len(x), -1, 16)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 16))
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        x = x + nn.Dense(16)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(1))


def vit() -> Case:
    hidden = (12, "params/Dense_1/kernel:1 params/Dense_1/bias:0 params/Dense_0/kernel:0")
    return Case(*linen(ViT(), normal(*IMAGE)), [hidden, *attention_slices("MultiHeadDotProductAttention_0")])


def rotary(x: jax.Array) -> jax.Array:
    t, d = x.shape[1], x.shape[-1]
    angle = jnp.arange(t)[:, None] / 100 ** (jnp.arange(d // 2) / (d // 2))
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    t = q.shape[1]
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def rms(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def gpt_fn(p: Any, tokens: jax.Array) -> jax.Array:
    """Tied embedding, fused query/key/value, rotary positions, causal mask, SwiGLU fused in one matrix."""
    x = p["embed"][tokens]
    b, t = tokens.shape
    qkv = (rms(x, p["norm1"]) @ p["qkv"]).reshape(b, t, 3, 4, 8)
    q, k, v = (qkv[:, :, i] for i in range(3))
    x = x + attend(rotary(q), rotary(k), v).reshape(b, t, 32) @ p["out"]
    gate, up = jnp.split(rms(x, p["norm2"]) @ p["up"], 2, -1)
    return (x + (jax.nn.silu(gate) * up) @ p["down"]) @ p["embed"].T


def gpt() -> Case:
    shapes = {
        "embed": (11, 16),
        "norm1": (16,),
        "norm2": (16,),
        "qkv": (16, 96),
        "out": (32, 16),
        "up": (16, 20),
        "down": (10, 16),
    }
    groups = [(4, "qkv:1*24 out:0*8"), (10, "up:1*2 down:0")]
    tokens = jnp.arange(12).reshape(2, 6) % 11
    return Case(gpt_fn, plain(shapes), (tokens,), groups)


def plain(shapes: dict[str, tuple[int, ...]]) -> Any:
    return filled({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()})


def gqa_fn(p: Any, x: jax.Array) -> jax.Array:
    """Six query heads share three heads of keys and values; the kernels name heads and head dimensions."""
    q = rotary(jnp.einsum("bte,ehd->bthd", x, p["q"]))
    k, v = (jnp.einsum("bte,ehd->bthd", x, p[n]) for n in ("k", "v"))
    k, v = (jnp.repeat(a, 2, axis=2) for a in (rotary(k), v))
    return jnp.einsum("bthd,hde->bte", attend(q, k, v), p["o"])


def gqa() -> Case:
    shapes = {"q": (10, 6, 4), "k": (10, 3, 4), "v": (10, 3, 5), "o": (6, 5, 10)}
    groups = [(3, "q:1*2 k:1 v:1 o:0*2"), (2, "q:2*2 k:2*2"), (5, "v:2 o:1")]
    return Case(gqa_fn, plain(shapes), (normal(2, 6, 10),), groups)


class Recurrent(nn.Module):
    cell: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(self.cell(6))(x)[:, -1])


def lstm() -> Case:
    gates = [f"params/OptimizedLSTMCell_0/h{g}/{s}" for g in "ifgo" for s in ("kernel:0", "kernel:1", "bias:0")]
    gates += [f"params/OptimizedLSTMCell_0/i{g}/kernel:1" for g in "ifgo"]
    module = Recurrent(nn.OptimizedLSTMCell)
    return Case(*linen(module, normal(2, 5, 4)), [(6, " ".join([*gates, "params/Dense_0/kernel:0"]))])


def gru() -> Case:
    at = "params/GRUCell_0"
    gates = [f"{at}/h{g}/kernel:{a}" for g in "rzn" for a in (0, 1)] + [f"{at}/hn/bias:0"]
    gates += [f"{at}/i{g}/{s}" for g in "rzn" for s in ("kernel:1", "bias:0")]
    return Case(*linen(Recurrent(nn.GRUCell), normal(2, 5, 4)), [(6, " ".join([*gates, "params/Dense_0/kernel:0"]))])


class ConvRecurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(2, (1, 1))(nn.RNN(nn.ConvLSTMCell(4, (3, 3)))(x)[:, -1])


def conv_lstm() -> Case:
    at = "params/ConvLSTMCell_0"
    names = ("ih/kernel:3*4", "ih/bias:0*4", "hh/kernel:2", "hh/kernel:3*4", "hh/bias:0*4")
    groups = [(4, " ".join([*(f"{at}/{n}" for n in names), "params/Conv_0/kernel:2"]))]
    return Case(*linen(ConvRecurrent(), normal(2, 3, 6, 6, 3)), groups)


def lstm_fn(p: Any, x: jax.Array) -> jax.Array:
    """One fused matrix of gates, split into chunks."""

    def step(state, xt):
        h, c = state
        i, f, g, o = jnp.split(xt @ p["w"] + h @ p["u"] + p["b"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((x.shape[1], 6))
    _, hs = lax.scan(step, (zeros, zeros), x)
    return hs @ p["out"]


def fused_lstm() -> Case:
    shapes = {"w": (3, 24), "u": (6, 24), "b": (24,), "out": (6, 2)}
    return Case(lstm_fn, plain(shapes), (normal(5, 2, 3),), [(6, "w:1*4 u:0 u:1*4 b:0*4 out:0")])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.gelu(nn.Dense(12)(nn.LayerNorm()(x)))
        x = x + nn.Dense(8)(y)
        return x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = block(name="layers")(x, None)
        return nn.Dense(2)(x)


def stack() -> Case:
    at = "params/layers/MultiHeadDotProductAttention_0"
    heads = [f"{at}/{n}/kernel:2 {at}/{n}/bias:1" for n in ("query", "key", "value")]
    qk = [f"{at}/{n}/kernel:3 {at}/{n}/bias:2" for n in ("query", "key")]
    groups = [
        (12, "params/layers/Dense_0/kernel:2 params/layers/Dense_0/bias:1 params/layers/Dense_1/kernel:1"),
        (2, " ".join([*heads, f"{at}/out/kernel:1"])),
        (4, " ".join(qk)),
        (4, f"{at}/value/kernel:3 {at}/value/bias:2 {at}/out/kernel:2"),
    ]
    return Case(*linen(Stack(), normal(2, 5, 8)), groups)


class Convs(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dense = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.dense(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def nnx_convs() -> Case:
    graph, state = nnx.split(nnx.eval_shape(lambda: Convs(nnx.Rngs(0))))

    def fn(state, x):
        module = nnx.merge(graph, state)
        return module(x), nnx.state(module)

    names = (
        "conv/kernel:3",
        "conv/bias:0",
        "norm/scale:0",
        "norm/bias:0",
        "norm/mean:0",
        "norm/var:0",
        "dense/kernel:0",
    )
    return Case(fn, filled(state), (normal(*IMAGE),), [(6, " ".join(names))])


def equinox_attention() -> Case:
    class Net(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP

        def __call__(self, x):
            return jax.vmap(self.mlp)(x + self.attention(x, x, x))

    net = eqx.filter_eval_shape(
        lambda k: Net(eqx.nn.MultiheadAttention(2, 8, key=k), eqx.nn.MLP(8, 3, 10, 1, key=k)), jax.random.key(0)
    )
    arrays, static = eqx.partition(net, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    heads = " ".join(f"attention/{n}_proj/weight:0*4" for n in ("query", "key", "value"))
    groups = [
        (2, f"{heads} attention/output_proj/weight:1*4"),
        (10, "mlp/layers/0/weight:0 mlp/layers/0/bias:0 mlp/layers/1/weight:1"),
    ]
    return Case(lambda p, x: eqx.combine(p, static)(x), filled(arrays), (normal(5, 8),), groups)


def moe_fn(p: Any, x: jax.Array) -> jax.Array:
    gates = jax.nn.softmax(x @ p["router"])
    hidden = jax.nn.relu(jnp.einsum("te,xef->txf", x, p["up"]))
    return jnp.einsum("tx,txf,xfe->te", gates, hidden, p["down"])


def moe() -> Case:
    shapes = {"router": (6, 3), "up": (3, 6, 8), "down": (3, 8, 6)}
    return Case(moe_fn, plain(shapes), (normal(7, 6),), [(8, "up:2 down:1")])


def standardized_fn(p: Any, x: jax.Array) -> jax.Array:
    """Weight-standardized convolutions: each kernel is normalized over all but its output features."""
    for name in ("a", "d"):
        w = p[name]
        w = (w - w.mean((0, 1, 2))) / (w.std((0, 1, 2)) + 1e-5)
        x = jax.nn.relu(lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
    return x.mean((1, 2)) @ p["out"]


def standardized() -> Case:
    shapes = {"a": (3, 3, 3, 6), "d": (3, 3, 6, 5), "out": (5, 2)}
    return Case(standardized_fn, plain(shapes), (normal(*IMAGE),), [(5, "d:3 out:0")])


def shuffle_fn(p: Any, x: jax.Array) -> jax.Array:
    """A channel shuffle by known indices, a zero-padded shortcut, a flip, and a while loop."""
    h = jax.nn.relu(x @ p["a"])[:, np.array([3, 1, 0, 2])]
    h = jnp.pad(h, ((0, 0), (1, 1))) + (x @ p["d"])[:, ::-1]
    h = lax.fori_loop(0, 3, lambda i, s: s + h * p["s"], h)
    return h @ p["out"]


def shuffle() -> Case:
    shapes = {"a": (3, 4), "d": (3, 6), "s": (6,), "out": (6, 2)}
    groups = [(4, "a:1 d:1 s:0 out:0"), (2, "d:1 s:0 out:0")]
    return Case(shuffle_fn, plain(shapes), (normal(5, 3),), groups)


def branch_fn(p: Any, x: jax.Array) -> jax.Array:
    """A cond, a checkpointed block, a max-gate and a dropout mask."""
    h = lax.cond(x.sum() > 0, lambda h: jnp.tanh(h @ p["a"]), lambda h: jnp.maximum(h @ p["d"], -1.0), x)
    h = jax.checkpoint(lambda h: h * jax.nn.sigmoid(h @ p["c"]))(h)
    h = h * jax.random.bernoulli(jax.random.key(3), 0.7, h.shape)
    return h @ p["out"]


def branch() -> Case:
    shapes = {"a": (3, 5), "d": (3, 5), "c": (5, 5), "out": (5, 2)}
    return Case(branch_fn, plain(shapes), (normal(4, 3),), [(5, "a:1 d:1 c:0 c:1 out:0")])


def linear_attention_fn(p: Any, x: jax.Array) -> jax.Array:
    """Feature maps that are not zero at zero: QK dimensions stay, for a masked one would still add to the sum."""
    q, k = (jax.nn.elu(x @ p[n]) + 1 for n in ("q", "k"))
    return jnp.einsum("td,sd,se->te", q, k, x @ p["v"]) @ p["o"]


def linear_attention() -> Case:
    shapes = {"q": (3, 6), "k": (3, 6), "v": (3, 5), "o": (5, 2)}
    return Case(linear_attention_fn, plain(shapes), (normal(4, 3),), [(5, "v:1 o:0")])


def routed_fn(p: Any, x: jax.Array) -> jax.Array:
    """A mixture that gathers the kernels of the two best experts."""
    weight, chosen = lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    hidden = jax.nn.relu(jnp.einsum("te,tkef->tkf", x, p["up"][chosen]))
    return jnp.einsum("tk,tkf,tkfe->te", weight, hidden, p["down"][chosen])


def routed() -> Case:
    shapes = {"router": (4, 3), "up": (3, 4, 6), "down": (3, 6, 4)}
    return Case(routed_fn, plain(shapes), (normal(5, 4),), [(6, "up:2 down:1")])


def grouped_attention_fn(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = (jnp.einsum("bte,ehd->bthd", x, p[n]) for n in "qkv")
    return jnp.einsum("bthd,hde->bte", jax.nn.dot_product_attention(q, k, v, is_causal=True), p["o"])


def grouped_attention() -> Case:
    shapes = {"q": (6, 4, 8), "k": (6, 2, 8), "v": (6, 2, 8), "o": (4, 8, 6)}
    groups = [(2, "q:1*2 k:1 v:1 o:0*2"), (8, "q:2 k:2"), (8, "v:2 o:1")]
    return Case(grouped_attention_fn, plain(shapes), (normal(2, 5, 6),), groups)


def maxout() -> Case:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        return (x @ p["a"]).reshape(len(x), 3, 2).max(-1) @ p["d"]

    return Case(fn, plain({"a": (3, 6), "d": (3, 2)}), (normal(4, 3),), [(3, "a:1*2 d:0")])


class Decoding(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(nn.MultiHeadDotProductAttention(4, qkv_features=16, decode=True)(x))


def decoding() -> Case:
    """One step of decoding with a cache of keys and values, which is state; dropout by a key that is an argument."""
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: Decoding().init({"params": key, "dropout": key}, normal(2, 5, 6)))
    heads, qk, v = attention_slices("MultiHeadDotProductAttention_0")
    cache = "cache/MultiHeadDotProductAttention_0/cached"
    groups = [
        (4, f"{heads[1]} {cache}_key:2 {cache}_value:2"),
        (4, f"{qk[1]} {cache}_key:3"),
        (4, f"{v[1]} {cache}_value:3"),
    ]

    def fn(p: Any, x: jax.Array, key: jax.Array) -> Any:
        return Decoding().apply(p, x, rngs={"dropout": key}, mutable=["cache"])

    return Case(fn, filled(shapes), (normal(2, 1, 6), key), groups)


CASES: dict[str, Callable[[], Case]] = {
    "resnet": partial(resnet, False),
    "resnet train": partial(resnet, True),
    "densenet": densenet,
    "unet": unet,
    "mobilenet": mobilenet,
    "grouped conv and norm": grouped,
    "squeeze-excite": squeeze_excite,
    "flatten": flatten,
    "vit": vit,
    "gpt, tied, fused, rotary": gpt,
    "grouped-query attention": gqa,
    "linen lstm": lstm,
    "linen gru": gru,
    "conv-lstm": conv_lstm,
    "fused lstm": fused_lstm,
    "scan of remat": stack,
    "nnx": nnx_convs,
    "equinox": equinox_attention,
    "mixture of experts": moe,
    "weight-standardized": standardized,
    "shuffle, pad, flip, loop": shuffle,
    "cond, remat, dropout": branch,
    "linear attention": linear_attention,
    "routed experts": routed,
    "jax.nn attention": grouped_attention,
    "maxout": maxout,
    "decoding with a cache": decoding,
}
