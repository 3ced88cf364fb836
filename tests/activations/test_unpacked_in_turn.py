"""Packed leaves are unpacked one after the other: what a program takes beside its arguments is about one layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, quantize_function
from tests.marks import quick

LAYERS, WIDTH = 6, 256
DENSE = 4 * WIDTH * WIDTH
ORDERED = jax.__version_info__ >= (0, 11)  # XLA of before puts the products of a chain in no order
RULES = {".*": Act(8, range=Dynamic())}
MODES = {"weight-only": ({}, False), "fake": (RULES, False), "integer": (RULES, True)}


def leaf(rng, *shape):
    """Int4 by groups of 128, of random bytes; of which numpy says what they are."""
    data = rng.integers(0, 256, np.prod(shape) // 2, np.uint8)
    scale = rng.uniform(0.005, 0.01, (*shape[:-2], shape[-2] // 128, shape[-1])).astype(np.float32)
    codes = jc.core.Packed(jnp.asarray(data), 4, -8, shape)
    dense = (np.stack([data & 15, data >> 4], -1).reshape(shape).astype(np.float32) - 8) * np.repeat(scale, 128, -2)
    return jc.quantization.Quantized(codes, jnp.asarray(scale), None, jc.Int(4), np.dtype(np.float32)), dense


def chain(p, x):
    for w in p:
        x = jnp.tanh(x @ w)
    return x


def turned(p, x):
    """Weights that are laid out anew on their way."""
    for w in p:
        x = jnp.tanh(x @ w.reshape(WIDTH, 2, -1).swapaxes(1, 2).reshape(WIDTH, WIDTH))
    return x


def scan(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0]


def model(fn):
    rng = np.random.default_rng(0)
    if fn is scan:
        return leaf(rng, LAYERS, WIDTH, WIDTH)
    leaves, dense = zip(*(leaf(rng, WIDTH, WIDTH) for _ in range(LAYERS)), strict=True)
    return list(leaves), list(dense)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fn", quick([chain, scan, turned], chain, scan))
def test_one_layer_at_a_time_is_dense(fn, mode):
    p, dense = model(fn)
    x = np.random.default_rng(1).normal(size=(8, WIDTH))
    x = jnp.asarray(x, jnp.float32)
    rules, integer = MODES[mode]
    q = quantize_function(fn, rules, integer=integer)
    run = jax.jit(lambda p, x: q(p, None, x)).lower(p, x).compile()
    want = quantize_function(fn, rules)(jax.tree.map(jnp.asarray, dense), None, x)
    np.testing.assert_allclose(run(p, x), want, atol=2e-2 if rules else 1e-5)
    assert np.abs(want).max() > 0.1
    taken = run.memory_analysis().temp_size_in_bytes
    if fn is scan or (ORDERED and fn is chain):
        assert taken < 1.6 * DENSE
    elif ORDERED and fn is turned:
        assert taken < 2.6 * DENSE  # before and after


def test_a_leaf_that_several_products_read_is_unpacked_once():
    """In a loop over tokens, or for tied weights, it would be unpacked again and again."""
    p, _ = leaf(np.random.default_rng(0), WIDTH, WIDTH)
    twice = quantize_function(lambda p, x: (x @ p) @ p, {})
    steps = quantize_function(lambda p, x: lax.fori_loop(0, 3, lambda i, x: x @ p, x), {})
    for q in (twice, steps):
        text = jax.jit(lambda p, x, q=q: q(p, None, x)).lower(p, np.ones((8, WIDTH), np.float32)).as_text()
        assert "optimization_barrier" not in text


@pytest.mark.parametrize("rules", [{}, RULES])
def test_gradients_and_vmap_go_through(rules):
    p, dense = model(chain)
    x = np.random.default_rng(1).normal(size=(3, 8, WIDTH)).astype(np.float32)
    q = quantize_function(chain, rules)

    def loss(p, x):
        return jnp.sum(jax.vmap(lambda row: q(p, None, row))(x) ** 2)

    found, want = (jax.jit(jax.grad(loss, 1))(tree, x) for tree in (p, dense))
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4)


def test_only_programs_for_the_cpu_wait():
    p, _ = model(chain)
    q = quantize_function(chain, {})
    x = np.ones((8, WIDTH), np.float32)
    for platform, there in (("cpu", True), ("cuda", False)):
        exported = jax.export.export(jax.jit(lambda x: q(p, None, x)), platforms=[platform])(x)
        assert ("optimization_barrier" in exported.mlir_module()) == there
