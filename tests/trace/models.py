"""Small functions of (params, x) in every style that the evaluator must read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcomp.trace.program import is_array_like

Case = tuple[Callable[..., Any], Any, jax.Array]
KEY = jax.random.key(0)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, "float32"))


def filled(tree: Any) -> Any:
    """Positive values of the right shapes, away from zeros and ones; quicker than compiling an initializer."""
    leaves, treedef = jax.tree.flatten(tree)
    values = [np.abs(np.random.default_rng(i).standard_normal(leaf.shape, "float32")) for i, leaf in enumerate(leaves)]
    sizes = [max(1, int(np.prod(leaf.shape[:-1]))) ** 0.5 for leaf in leaves]
    return jax.tree.unflatten(treedef, [jnp.asarray((v + 0.1) / n) for v, n in zip(values, sizes, strict=True)])


def variables_of(model: nn.Module, x: Any) -> Any:
    """Variables of a linen module, filled."""
    return filled(jax.eval_shape(model.init, KEY, x))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.Conv(8, (3, 3), feature_group_count=4, strides=2)(x)
        x = nn.ConvTranspose(4, (3, 3), strides=(2, 2))(x)
        return nn.Dense(3)(x.mean((1, 2)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(h)
        x = x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(16)(x)))
        return x, None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x = nn.Embed(11, 8)(x)
        return layers()(x, None)[0]


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def linen_mlp() -> Case:
    model = nn.Sequential([nn.Dense(7), nn.relu, nn.Dense(3)])
    x = normal(1, 2, 5)
    return model.apply, variables_of(model, x), x


def linen_conv() -> Case:
    x = normal(1, 2, 8, 8, 3)
    return ConvNet().apply, variables_of(ConvNet(), x), x


def linen_scan_remat() -> Case:
    tokens = jnp.arange(6).reshape(2, 3)
    return Scanned().apply, variables_of(Scanned(), tokens), tokens


def nnx_net() -> Case:
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0))))
    return lambda s, x: nnx.merge(graph, s)(x), filled(state), normal(1, 2, 6, 6, 3)


def equinox_mlp() -> Case:
    shapes, static = eqx.partition(eqx.filter_eval_shape(eqx.nn.MLP, 4, 2, 8, 2, key=KEY), is_array_like)
    return lambda m, x: jax.vmap(m)(x), eqx.combine(filled(shapes), static), normal(1, 3, 4)


def matmul() -> Case:
    p = {"a": normal(1, 4, 5), "b": [normal(2, 5, 6), normal(3, 6)]}
    return lambda p, x: jnp.matmul(x @ p["a"], p["b"][0]) + p["b"][1], p, normal(4, 3, 4)


def einsum() -> Case:
    p = {"w": normal(1, 2, 4, 5), "v": normal(2, 5, 3)}
    return lambda p, x: jnp.einsum("bi,hio,oc->bhc", x, p["w"], p["v"]), p, normal(3, 6, 4)


def stacked_scan() -> Case:
    def fn(p, x):
        return jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"]), h.sum()), x, p)

    return fn, {"w": normal(1, 3, 4, 4), "b": normal(2, 3, 4)}, normal(3, 2, 4)


def recurrent() -> Case:
    def fn(p, x):
        def cell(h, frame):
            h = jnp.tanh(frame @ p["wx"] + h @ p["wh"])
            return h, h

        return jax.lax.scan(cell, jnp.zeros(4), x, reverse=True)[1]

    return fn, {"wx": normal(1, 3, 4), "wh": normal(2, 4, 4)}, normal(3, 5, 3)


def while_and_fori() -> Case:
    def fn(p, x):
        x = jax.lax.fori_loop(0, 3, lambda i, h: jnp.sin(h @ p["w"][i]), x)
        return jax.lax.while_loop(lambda h: jnp.abs(h).max() > 0.1, lambda h: 0.4 * jnp.sin(h @ p["w"][0].T), x)

    return fn, {"w": normal(1, 3, 4, 4) / 3}, normal(2, 2, 4)


def branching() -> Case:
    def fn(p, x):
        x = jax.lax.cond(x.sum() > 0, lambda h: h @ p["a"], lambda h: h @ p["b"], x)
        return jax.lax.switch(1, [jnp.sin, lambda h: h @ p["a"], jnp.cos], x)

    return fn, {"a": normal(1, 4, 4), "b": normal(2, 4, 4)}, normal(3, 2, 4)


def rematerialized() -> Case:
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def layer(w, x):
        return jax.nn.silu(x @ w)

    return lambda p, x: layer(p["b"], layer(p["a"], x)), {"a": normal(1, 4, 4), "b": normal(2, 4, 4)}, normal(3, 2, 4)


@jax.custom_vjp
def twice_the_gradient(x):
    return x


twice_the_gradient.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))


def custom_gradient() -> Case:
    return lambda p, x: jnp.sum(twice_the_gradient(x @ p["w"])), {"w": normal(1, 4, 4)}, normal(2, 3, 4)


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: cache(f)
    for f in (
        linen_mlp, linen_conv, linen_scan_remat, nnx_net, equinox_mlp, matmul, einsum, stacked_scan, recurrent,
        while_and_fori, branching, rematerialized, custom_gradient,
    )
}  # fmt: skip
NOT_REVERSIBLE = {"while_and_fori"}
