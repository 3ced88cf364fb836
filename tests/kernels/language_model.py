"""A small language model that keeps its keys and values in a cache which it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxcomp as jc


def rotary(x: jax.Array, start: jax.Array) -> jax.Array:
    """``(batch, tokens, heads, width)`` turned by its positions, the first of which is ``start``."""
    count, width = x.shape[1], x.shape[-1]
    position = jnp.atleast_1d(start)[:, None] + jnp.arange(count)
    angle = position[:, :, None, None] / 100 ** (jnp.arange(width // 2) / (width // 2))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], -1)


class Layer(nn.Module):
    """Attention with fewer heads of keys than of queries, and a gated feed-forward."""

    dim: int
    heads: int
    shared: int

    @nn.compact
    def __call__(self, x: jax.Array, cache: Any, start: jax.Array) -> tuple[jax.Array, Any]:
        def dense(features: int, name: str) -> Callable[[jax.Array], jax.Array]:
            return nn.Dense(features, use_bias=False, name=name)

        width = self.dim // self.heads
        apart = lambda y, heads: y.reshape(*y.shape[:2], heads, width)  # noqa: E731
        y = nn.RMSNorm(name="norm1")(x)
        q = rotary(apart(dense(self.dim, "query")(y), self.heads), start)
        k = rotary(apart(dense(self.shared * width, "key")(y), self.shared), start)
        v = apart(dense(self.shared * width, "value")(y), self.shared)
        cache = cache.append(k, v, start)
        x = x + dense(self.dim, "out")(cache.attend(q, start).reshape(x.shape))
        y = nn.RMSNorm(name="norm2")(x)
        hidden = nn.silu(dense(4 * self.dim, "gate")(y)) * dense(4 * self.dim, "up")(y)
        return x + dense(self.dim, "down")(hidden), cache


class LanguageModel(nn.Module):
    """``(tokens, caches, start) -> (logits, caches)``, a cache a layer."""

    vocabulary: int
    dim: int
    layers: int
    heads: int
    shared: int

    @nn.compact
    def __call__(self, tokens: jax.Array, caches: tuple[Any, ...], start: jax.Array) -> tuple[jax.Array, Any]:
        x = nn.Embed(self.vocabulary, self.dim, name="embed")(tokens)
        after = []
        for i, cache in enumerate(caches):
            x, cache = Layer(self.dim, self.heads, self.shared, name=f"layer{i}")(x, cache, start)
            after.append(cache)
        x = nn.RMSNorm(name="norm")(x)
        return nn.Dense(self.vocabulary, use_bias=False, name="head")(x), tuple(after)

    @property
    def width(self) -> int:
        """Of a head."""
        return self.dim // self.heads

    def caches(self, batch: int, capacity: int, **grids: Any) -> tuple[Any, ...]:
        """Empty caches of codes, arrays of their own for each layer: a donated one cannot be two."""
        shape = (batch, capacity, self.shared, self.width)
        return tuple(jc.kernels.kv_cache(shape, **grids) for _ in range(self.layers))


def four_bits(params: Any, group: int) -> Any:
    """Kernels in 4 bits with groups along what they sum over, the embedding in 8 with a scale a row; packed."""
    compress = jc.by_path(
        {
            ".*/embedding": jc.quantize(jc.Int(8), per=jc.Channels(0)),
            ".*/kernel": jc.quantize(jc.Int(4), per=jc.Groups(group, axis=0)),
            ".*": jc.core.identity(),
        }
    )
    return jc.pack(compress.apply(compress.init(params), params))
