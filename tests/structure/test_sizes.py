"""How long the analysis of full-size networks takes, on shapes alone."""

from __future__ import annotations

import time
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcomp.structure import channel_groups


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


def test_resnet_50_takes_less_than_five_seconds():
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(ResNet50().init, jax.random.key(0), image)
    start = time.perf_counter()
    groups = channel_groups(ResNet50().apply)(shapes, image)
    took = time.perf_counter() - start
    assert took < 5, took
    assert sorted(g.units for g in groups) == sorted([64] * 7 + [128] * 8 + [256] * 13 + [512] * 7 + [1024, 2048])
    assert groups.parameters() == 25_557_032 + 2 * 26_560  # with the batch statistics
    assert 4.0e9 < groups.macs() < 4.2e9


def test_transformer_of_a_billion_takes_less_than_thirty_seconds():
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    shapes = jax.eval_shape(Decoder().init, jax.random.key(0), tokens)
    start = time.perf_counter()
    groups = channel_groups(Decoder().apply)(shapes, tokens)
    took = time.perf_counter() - start
    assert took < 30, took
    assert groups.parameters() > 1.1e9
    assert sorted({g.units for g in groups}) == [32, 64, 5632]
    assert len(groups) == 22 * 4
