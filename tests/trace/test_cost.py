"""Costs by hand, and against XLA's own analysis."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxcomp.trace.cost import H100, TPU_V5E, Cost, Device, cost
from tests.trace.models import KEY, Block, normal


class Valid(nn.Module):
    """Convolutions without padding, whose every tap is real."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), padding="VALID", use_bias=False)(x)
        x = nn.Conv(16, (3, 3), strides=2, padding="VALID", use_bias=False)(x)
        x = nn.Conv(16, (3, 3), feature_group_count=4, padding="VALID", use_bias=False)(x)
        return nn.Dense(10, use_bias=False)(x.reshape(x.shape[0], -1))


def xla_flops(fn, *args) -> float:
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_agrees_with_xla_on_convolutions_and_dots():
    x = normal(0, 2, 12, 12, 3)
    variables = jax.eval_shape(Valid().init, KEY, x)
    assert cost(Valid().apply)(variables, x).flops == pytest.approx(xla_flops(Valid().apply, variables, x), rel=1e-3)


def test_agrees_with_xla_on_a_transformer_block():
    x = normal(0, 2, 64, 64)
    variables = jax.eval_shape(Block().init, KEY, x)

    def fn(v, x):
        return Block().apply(v, x)[0]

    ours, xla = cost(fn)(variables, x).flops, xla_flops(fn, variables, x)
    assert ours <= xla  # XLA also counts softmax, layer norm and biases
    assert ours == pytest.approx(xla, rel=0.15)


def test_agrees_with_xla_on_products_in_a_scan():
    def step(p, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0]

    def unrolled(p, x):
        return step(p, x) if p["w"].shape[0] == 0 else x @ p["w"][0] @ p["w"][1] @ p["w"][2]

    p, x = {"w": normal(0, 3, 16, 16)}, normal(1, 8, 16)
    assert cost(step)(p, x).flops == xla_flops(unrolled, p, x) == 2 * 3 * 8 * 16 * 16


def test_bits_and_bytes_by_hand():
    def fn(p, x):
        return p["table"][x] @ p["w"]

    p = {"table": jnp.zeros((100, 8)), "w": jnp.zeros((8, 16))}
    x = jnp.zeros(2, jnp.int32)
    plain = cost(fn)(p, x)
    assert (plain.macs, plain.bops) == (2 * 8 * 16, 2 * 8 * 16 * 32 * 32)
    assert plain.bytes == (16 * 4 + 16 * 4) + 4 * (2 * 8 + 8 * 16 + 2 * 16)
    mixed = cost(fn, bits=lambda site: (2, 8) if site.path == "w" else (None, None))(p, x)
    assert mixed.bops == 2 * 8 * 16 * 16
    assert mixed.bytes == 128 + 16 + 8 * 16 / 4 + 4 * 2 * 16
    with pytest.raises(ValueError, match="widths of 'table' must be positive"):
        cost(fn, bits=(0, 8))(p, x)


def test_products_of_activations_have_the_width_of_activations():
    qk = cost(lambda p, x: (x * p) @ x.T, bits=(2, 8))(jnp.ones(4), jnp.ones((3, 4)))
    assert qk.bops == 3 * 3 * 4 * 64


def test_roofline_is_the_longer_of_computing_and_moving():
    p, x = {"w": jax.ShapeDtypeStruct((4096, 4096), "bfloat16")}, jax.ShapeDtypeStruct((1, 4096), "bfloat16")
    decode = cost(lambda p, x: x @ p["w"])
    assert decode(p, x).seconds(H100) == pytest.approx(2 * (4096**2 + 2 * 4096) / 3.35e12)
    assert cost(lambda p, x: x @ p["w"], bits=(4, 16))(p, x).seconds(H100) < 0.26 * decode(p, x).seconds(H100)
    many = jax.ShapeDtypeStruct((4096, 4096), "bfloat16")
    assert decode(p, many).seconds(TPU_V5E) == pytest.approx(2 * 4096**3 / 197e12)
    assert Cost(()).seconds(H100) == 0
    with pytest.raises(ValueError, match="must be positive"):
        Device("none", {}, 1.0)
