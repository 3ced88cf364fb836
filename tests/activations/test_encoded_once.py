"""Sites that take the same value alike round it once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, Float8, quantize_function
from jaxcomp.trace.program import trace
from jaxcomp.trace.ranges import Range
from tests.trace.models import normal

W = {name: 0.3 * normal(i, 16, 16) for i, name in enumerate("qkv")}
X = normal(9, 5, 16)
DYNAMIC = Act(8, symmetric=True, range=Dynamic())


def attention(p, x):
    q, k, v = (x @ p[name] for name in "qkv")
    return jax.nn.softmax(q @ k.T) @ v


def packed(params):
    t = jc.quantize(jc.Int(8), per=jc.Channels(-1))
    return jc.pack(t.apply(t.init(params), params))


def rounds(q, *args):
    return sum(op.name == "round" for op in trace(q, packed(W), *args).flow.ops)


def of(act):
    rules = {"[qkv]": act}
    return quantize_function(attention, rules, integer=True)


def test_q_k_and_v_share_one_quantizer():
    assert rounds(lambda p, x: of(DYNAMIC)(p, None, x), X) == 1
    assert rounds(lambda p, x: of(Act(8, range=Dynamic()))(p, None, x), X) == 2  # the zero point is rounded, too
    q = quantize_function(attention, {"q": DYNAMIC, "[kv]": Act(4, symmetric=True, range=Dynamic())}, integer=True)
    assert rounds(lambda p, x: q(p, None, x), X) == 2


@pytest.mark.parametrize(("high", "times"), [({}, 1), ({"k": 2.5}, 2)])
def test_ranges_that_are_known_to_be_equal_are_one(high, times):
    ranges = {name: Range(jnp.float32(-2), jnp.float32(high.get(name, 2))) for name in "qkv"}
    symmetric = of(Act(8, symmetric=True))
    assert rounds(lambda p, x: symmetric(p, ranges, x), X) == times
    assert rounds(lambda p, x, r: symmetric(p, r, x), X, ranges) == 3  # arguments may differ
    one = ranges["q"]
    assert rounds(lambda p, x, r: symmetric(p, dict.fromkeys("qkv", r), x), X, one) == 1


def test_the_result_and_its_gradient_are_those_of_each_on_its_own():
    q, tree = of(DYNAMIC), packed(W)
    separate = quantize_function(lambda p, xs: attention_of(p, *xs), {"[qkv]": DYNAMIC}, integer=True)
    np.testing.assert_array_equal(q(tree, None, X), separate(tree, None, [X, X * 1, X * 1]))
    shared = jax.grad(lambda x: jnp.sum(jnp.sin(q(tree, None, x))))(X)
    each = jax.grad(lambda x: jnp.sum(jnp.sin(separate(tree, None, [x, x * 1, x * 1]))))(X)
    np.testing.assert_allclose(shared, each, rtol=1e-5, atol=1e-6)


def attention_of(p, a, b, c):
    q, k, v = (x @ p[name] for x, name in zip((a, b, c), "qkv", strict=True))
    return jax.nn.softmax(q @ k.T) @ v


@pytest.mark.parametrize("act", [DYNAMIC, Float8()], ids=["int8", "float8"])
def test_values_of_loops_and_branches_stay_in_their_place(act):
    tree = packed(W) if act is DYNAMIC else {n: w.astype("float8_e4m3fn") for n, w in W.items()}

    def fn(p, x):
        ws = {n: w.astype(x.dtype) for n, w in p.items()}
        first = x @ ws["q"]  # of the value outside, as in both branches and in the loop
        branch = lax.cond(x.sum() > 0, lambda: x @ ws["k"] + x @ ws["k"], lambda: x @ ws["v"])
        looped = lax.fori_loop(0, 2, lambda i, h: h + x @ ws["q"], x)
        again = jax.checkpoint(lambda x: jnp.tanh(x @ ws["v"]))(x)
        return first + branch + looped + again

    q = quantize_function(fn, {".*": act}, integer=True)
    run = jax.jit(lambda x: q(tree, None, x))
    fake = quantize_function(fn, {".*": act})(tree, None, X)
    np.testing.assert_allclose(run(X), fake, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(jax.vmap(lambda x: q(tree, None, x[None])[0])(X).shape, X.shape)
