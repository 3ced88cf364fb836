"""Networks of full size, of which only shapes are made."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcomp.core.types import Params


class Bottleneck(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=True)
        conv = partial(nn.Conv, use_bias=False)
        y = nn.relu(norm()(conv(self.width, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.width, (3, 3), strides=self.stride)(y)))
        y = norm()(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.width, (1, 1), strides=self.stride)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(64, (7, 7), strides=2, use_bias=False)(x)
        x = nn.max_pool(nn.relu(nn.BatchNorm(use_running_average=True)(x)), (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for i in range(blocks):
                x = Bottleneck(64 * 2**stage, 2 if stage and not i else 1)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


class Decoder(nn.Module):
    layers: int = 22
    width: int = 2048

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(32000, self.width)
        x = embed(tokens)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(32, use_bias=False)(nn.RMSNorm()(x), mask=mask)
            h = nn.RMSNorm()(x)
            gated = nn.silu(nn.Dense(5632, use_bias=False)(h)) * nn.Dense(5632, use_bias=False)(h)
            x = x + nn.Dense(self.width, use_bias=False)(gated)
        return embed.attend(nn.RMSNorm()(x))


def resnet_50() -> tuple[Params, jax.ShapeDtypeStruct]:
    """Variables and one image of 224x224."""
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return jax.eval_shape(ResNet50().init, jax.random.key(0), image), image


def decoder(layers: int = 22, width: int = 2048) -> tuple[Params, jax.ShapeDtypeStruct]:
    """Variables, 1.1e9 of them by default, and one sequence of 2,048 tokens."""
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    return jax.eval_shape(Decoder(layers, width).init, jax.random.key(0), tokens), tokens
