"""Layers that are alike as one loop: the same results, each layer its own leaves, and a program that does not grow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.trace import rolled

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def block(p, x, scale):
    """Two blocks a layer: of a residual stream, with a norm of its own."""
    n = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["norm"][None, None]
    q, k, v = (n @ p[name] for name in "qkv")
    x = x + (jax.nn.softmax(scale * q @ k.swapaxes(-1, -2), -1) @ v) @ p["out"]
    return x + jax.nn.gelu(x @ p["up"]) @ p["down"]


def layer(d=8):
    made = {name: normal(d, d) / 3 for name in ("q", "k", "v", "out")}
    return {**made, "norm": 1 + normal(d) / 9, "up": normal(d, 2 * d) / 3, "down": normal(2 * d, d) / 3}


def deep(p, x, scale):
    x = jnp.tanh(x @ p["stem"] + p["bias"][None, None])
    for i in range(len(p) - 4):
        x = block(p[f"layer_{i}"], x, scale)
    return {"logits": (x * p["norm"][None, None]) @ p["head"], "all": x}


def params(layers):
    ends = {"stem": normal(4, 8), "bias": normal(8), "norm": normal(8), "head": normal(8, 3)}
    return {**ends, **{f"layer_{i}": layer() for i in range(layers)}}


X, SCALE = normal(2, 5, 4), jnp.float32(0.4)


def close(a, b, part=1e-4):
    """To a part of the largest number of each leaf."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=part * float(abs(y).max())), a, b)


def test_a_transformer_is_one_loop_with_the_same_results_and_gradients():
    p = params(12)
    found = rolled(deep)(p, X, SCALE)
    tree = found.roll(p)
    assert sorted(tree) == ["bias", "head", "layer_0-11", "norm", "stem"]
    assert tree["layer_0-11"]["up"].shape == (12, 8, 16)
    assert "\n  12 x 'layer_0-11/" in repr(found)
    jax.tree.map(np.testing.assert_array_equal, found.unroll(tree), p)
    close(jax.jit(found.fn)(tree, X, SCALE), deep(p, X, SCALE))
    close(found.fn(tree, X[:1, :3], SCALE), deep(p, X[:1, :3], SCALE))  # other shapes

    def loss(fn):
        return jax.grad(lambda p: jnp.sum(fn(p, X, SCALE)["logits"] ** 2))

    close(found.unroll(loss(found.fn)(tree)), loss(deep)(p), 1e-3)


def test_the_program_is_as_long_as_that_of_one_layer():
    def length(layers):
        p = jax.eval_shape(lambda: params(layers))
        found = rolled(deep)(p, X, SCALE)
        tree = jax.eval_shape(found.roll, p)
        return len(
            jax.jit(jax.grad(lambda p: jnp.sum(found.fn(p, X, SCALE)["all"]))).lower(tree).as_text().splitlines()
        )

    assert length(3) == length(20)


def test_what_is_compressed_has_scales_and_ranges_of_each_layer():
    p = params(4)
    found = rolled(deep)(p, X, SCALE)
    tree = found.roll(p)
    results = []
    for fn, weights in ((deep, p), (found.fn, tree)):
        t = jc.quantize(jc.Int(8), roles=jc.roles(fn)(weights, X, SCALE))
        ranges = jc.activations.ranges_of(jc.calibrate(fn)(weights, X, SCALE))
        q = jc.quantize_function(fn, {r".*": jc.Act(8)})
        results.append(q(t.apply((), weights), ranges, X, SCALE))
    close(*results)
    assert t.apply((), tree)["layer_0-3"]["up"].scale.shape == (4, 1, 16)
    assert ranges["layer_0-3/up"].low.shape == (4,)


def test_leaves_that_all_layers_share_are_no_stack_and_others_stay():
    shared = {"w": normal(6, 6) / 3, "b": normal(5, 6), "odd": normal(6, 6)}

    def fn(p, x):
        for i in range(4):
            x = x + jnp.tanh(x @ p["w"] + p["b"][i][None])
        x = x + jnp.tanh(x @ p["odd"]) * 2
        return x @ p["w"]

    found = rolled(fn)(shared, X[0] @ normal(4, 6))
    tree = found.roll(shared)
    assert sorted(tree) == ["b", "odd", "w"]
    x = normal(3, 6)
    close(found.fn(tree, x), fn(shared, x))
    jax.tree.map(np.testing.assert_array_equal, found.unroll(tree), shared)


def test_stages_of_a_residual_network_are_runs_of_their_own():
    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def net(p, x):
        for stage in p:
            x = conv(x, stage["first"])
            for kernels in stage["blocks"]:
                x = x + conv(jax.nn.relu(conv(x, kernels[0])), kernels[1])
        return x.mean((1, 2))

    kernel = lambda a, b: normal(3, 3, a, b) / 5  # noqa: E731
    p = [
        {"first": kernel(a, b), "blocks": [(kernel(b, b), kernel(b, b)) for _ in range(3)]} for a, b in ((3, 4), (4, 6))
    ]
    x = normal(2, 6, 6, 3)
    found = rolled(net)(p, x)
    tree = found.roll(p)
    assert tree["0"]["blocks"]["0-2"]["1"].shape == (3, 3, 3, 4, 4)
    assert tree["1"]["blocks"]["0-2"]["0"].shape == (3, 3, 3, 6, 6)
    close(found.fn(tree, x), net(p, x))


def test_the_period_that_reaches_farthest_is_taken():
    """Two equal blocks and another, three times: no run of the two."""

    def net(p, x):
        for name in sorted(p):
            x = x + (jnp.sin if name.endswith("c") else jnp.tanh)(x @ p[name])
        return x

    p = {f"{i}_{part}": normal(4, 4) for i in range(4) for part in "abc"}
    found = rolled(net)(p, normal(2, 4))
    stacks = {path: w.shape for path, w in found.roll(p).items() if w.ndim == 3}
    assert stacks == {"0_b-2_b": (3, 4, 4), "0_c-2_c": (3, 4, 4), "1_a-3_a": (3, 4, 4)}
    assert "  1 x no leaf\n  3 x '0_b-2_b', '0_c-2_c', '1_a-3_a'\n" in repr(found)


def test_nothing_that_repeats_is_nothing_stacked():
    p = {"a": normal(3, 4), "b": normal(4, 2)}
    found = rolled(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"])(p, normal(2, 3))
    assert {k: v.shape for k, v in found.roll(p).items()} == {"a": (3, 4), "b": (4, 2)}


def test_what_is_compressed_is_not_rolled():
    p = params(3)
    found = rolled(deep)(p, X, SCALE)
    quantized = jc.quantize(jc.Int(8)).apply((), p)
    with pytest.raises(TypeError, match=r"rolled: 'head' is compressed \(Quantized int8\); roll the arrays, then"):
        found.roll(quantized)
    tree = jc.quantize(jc.Int(8), roles=jc.roles(found.fn)(found.roll(p), X, SCALE)).apply((), found.roll(p))
    with pytest.raises(TypeError, match=r"rolled: 'head' is compressed \(Quantized int8\); materialize the tree"):
        found.unroll(tree)
    close(found.unroll(jc.materialize(tree)), jc.materialize(quantized))
    close(found.fn(tree, X, SCALE), found.fn(jc.materialize(tree), X, SCALE))
