"""Layers of attention as users write them, and all of it by numpy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn

import jaxcomp as jc
from jaxcomp.activations import quantize_function

special = pytest.importorskip("scipy.special")

HEADS, WIDE, TOKENS = 4, 32, 7
KERNELS = "[qkvo]"
RNG = np.random.default_rng(0)
PARAMS = {n: jnp.asarray(RNG.normal(0, WIDE**-0.5, (WIDE, WIDE)), jnp.float32) for n in "qkvo"}
X = jnp.asarray(RNG.normal(size=(2, TOKENS, WIDE)), jnp.float32)
SEEN = jnp.asarray(RNG.random((2, TOKENS)) < 0.7).at[:, 0].set(True)
BIAS = jnp.asarray(RNG.normal(size=(HEADS, TOKENS, TOKENS)), jnp.float32)
KEPT = jnp.asarray(RNG.random((2, HEADS, TOKENS, TOKENS)) < 0.8)
CAUSAL = np.tril(np.ones((TOKENS, TOKENS), bool))


def made(p, x):
    """Queries, keys and values of heads."""
    return (jnp.reshape(x @ p[n], (*x.shape[:2], HEADS, -1)) for n in "qkv")


def joined(p, y):
    return jnp.reshape(y, (*y.shape[:2], -1)) @ p["o"]


def by_einsum(p, x, of=nn.softmax):
    q, k, v = made(p, x)
    weights = of(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(8.0))
    return joined(p, jnp.einsum("bhqk,bkhd->bqhd", weights, v))


def by_matmul(p, x):
    q, k, v = (jnp.transpose(y, (0, 2, 1, 3)) for y in made(p, x))
    return joined(p, jnp.transpose(nn.softmax((q * 8**-0.5) @ jnp.swapaxes(k, -1, -2)) @ v, (0, 2, 1, 3)))


def causal(p, x):
    return joined(p, nn.dot_product_attention(*made(p, x), is_causal=True))


def masked(p, x, seen):
    return joined(p, nn.dot_product_attention(*made(p, x), mask=seen[:, None, None]))


def grouped(p, x, seen):
    q, k, v = made(p, x)
    return joined(p, nn.dot_product_attention(q, k[:, :, :2], v[:, :, :2], mask=seen[:, None, None]))


def by_flax(p, x, seen):
    linen = pytest.importorskip("flax.linen")
    return joined(p, linen.dot_product_attention(*made(p, x), mask=seen[:, None, None]))


def biased(p, x, bias):
    return by_einsum(p, x, lambda s: nn.softmax(s + bias))


def dropped(p, x, kept):
    return by_einsum(p, x, lambda s: jnp.where(kept, nn.softmax(s) / 0.8, 0.0))


def by_hand(p, x, seen):
    def of(s):
        e = jnp.exp(jnp.where(seen[:, None, None], s, -1e9))
        return e / e.sum(-1, keepdims=True)

    return by_einsum(p, x, of)


def one_head(p, x):
    q, k, v = (x @ p[n] for n in "qkv")
    return nn.softmax(q @ jnp.swapaxes(k, -1, -2) / jnp.sqrt(8.0)) @ v @ p["o"]


def in_calls(p, x):
    return jax.jit(jax.checkpoint(by_einsum))(p, x)


def exact(p, x, *, hidden=None, bias=0.0, heads=HEADS, groups=None, kept=None):
    """All of it in float64."""
    x = np.asarray(x, np.float64)
    q, k, v = ((x @ np.asarray(p[n], np.float64)).reshape(*x.shape[:2], heads, -1) for n in "qkv")
    if groups is not None:
        k, v = (np.repeat(y[:, :, :groups], heads // groups, 2) for y in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8) + bias
    weights = special.softmax(scores if hidden is None else np.where(hidden, -np.inf, scores), -1)
    weights = weights if kept is None else np.where(kept, weights / 0.8, 0)
    return np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ np.asarray(p["o"], np.float64)


UNSEEN = ~np.asarray(SEEN)[:, None, None]
STYLES = {
    by_einsum: ((), {}),
    by_matmul: ((), {}),
    causal: ((), {"hidden": ~CAUSAL}),
    masked: ((SEEN,), {"hidden": UNSEEN}),
    grouped: ((SEEN,), {"hidden": UNSEEN, "groups": 2}),
    by_flax: ((SEEN,), {"hidden": UNSEEN}),
    biased: ((BIAS,), {"bias": np.asarray(BIAS, np.float64)}),
    dropped: ((KEPT,), {"kept": np.asarray(KEPT)}),
    by_hand: ((SEEN,), {"hidden": UNSEEN}),
    one_head: ((), {"heads": 1}),
    in_calls: ((), {}),
}
ids = {"ids": lambda case: getattr(case, "__name__", str(case))}


def prepared(fn, *args, params=PARAMS):
    """Its tree, and the weights that this holds."""
    tree = jc.quantize(jc.Int(8), where=KERNELS, roles=jc.roles(fn)(params, *args)).apply((), params)
    return jc.prepare(jc.pack(tree), fn, *args), jc.materialize(tree)


def run_of(fn, rules=None):
    q = quantize_function(fn, rules or {}, integer=bool(rules))
    return lambda tree, ranges, *args: q(tree, ranges, *args)


def ran(run, *given) -> tuple[np.ndarray, int]:
    """What it gives, and how often attention is called in one piece."""
    compiled = jax.jit(run).lower(*given).compile()
    count = compiled.as_text().count('custom_call_target="jaxcomp_floats')
    return jax.tree.map(np.asarray, compiled(*given)), count


def is_called(run, *given) -> bool:
    return "jaxcomp_floats" in jax.jit(run).lower(*given).as_text()


def near(got, wanted, atol=2e-5) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=atol)
