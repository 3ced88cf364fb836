"""Gradients on rounded codes: right in expectation, near in value, and a network learns by them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.activations import Act, Backward, Dynamic, quantize_function
from jaxcomp.trace.program import trace
from tests.activations.digits import Net, learned
from tests.activations.platforms import PLATFORMS, run_as_on
from tests.marks import quick
from tests.trace.models import normal

ACT = Act(8, symmetric=True, range=Dynamic())
KEY = jax.random.key(0)
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def dot(p, x):
    return x @ p["w"]


def conv(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, p["w"], (2, 1), [(1, 1), (2, 0)], (1, 2), (1, 1), numbers, 1)


def grouped(p, x):
    return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", (1, 1), (2, 2), ("NHWC", "HWIO", "NHWC"), 4)


def batched(p, x):
    return jnp.einsum("bqd,bkd->bqk", x, jnp.sin(x)) * p["w"]


CASES = {
    "dot": (dot, normal(1, 16, 6), normal(2, 5, 16)),
    "conv": (conv, normal(1, 3, 3, 4, 6), normal(2, 2, 6, 5, 4)),
    "grouped conv": (grouped, normal(1, 3, 3, 2, 8), normal(2, 2, 6, 5, 8)),
    "two activations": (batched, normal(1, 1, 1, 1), normal(2, 2, 5, 8)),
}


def gradient(fn, spec):
    """Gradients of a quantized loss in parameters and input."""
    q = quantize_function(fn, {".*": ACT}, backward=spec)

    def loss(p, x, key):
        y = q(p, None, key, x) if spec else q(p, None, x)
        return jnp.sum(jnp.sin(jnp.arange(y.size).reshape(y.shape)) * y)

    return jax.grad(loss, argnums=(0, 1))


@pytest.mark.parametrize("name", quick(CASES, "dot", "grouped conv"))
@pytest.mark.parametrize("stochastic", quick([True, False], True))
def test_gradients_are_near_those_that_are_not_rounded(name, stochastic):
    fn, w, x = CASES[name]
    exact = gradient(fn, None)({"w": w}, x, None)
    run = jax.jit(gradient(fn, Backward(8, stochastic)), compiler_options=FAST)
    rounded = run({"w": w}, x, KEY if stochastic else None)
    pairs = zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True)
    errors = [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs]
    assert max(errors) < 0.03
    assert max(errors) > 1e-3  # it does round; a weight that enters no product keeps its exact gradient


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dot", "conv"])
def test_the_expectation_is_the_gradient(name):
    """Over n keys the mean errs by sigma / sqrt(n); rounding to nearest errs by far more, so this test can fail."""
    fn, w, x = CASES[name]
    exact = gradient(fn, None)({"w": w}, x, None)
    n, few = 1500, Backward(3)
    keys = jax.random.split(KEY, n)
    draws = jax.jit(jax.vmap(lambda key: gradient(fn, few)({"w": w}, x, key)))(keys)
    nearest = gradient(fn, Backward(3, stochastic=False))({"w": w}, x, None)
    for a, b, c in zip(*map(jax.tree.leaves, (draws, exact, nearest)), strict=True):
        spread = np.maximum(np.std(a, axis=0), 1e-4 * np.abs(b).max()) / np.sqrt(n)
        z = (np.mean(a, axis=0) - b) / spread
        assert np.abs(z).max() < 5
        assert np.abs((c - b) / spread).max() > 10
        assert 0.7 < np.sqrt(np.mean(z**2)) < 1.3


def products(fn, p, x):
    """How many products of the gradient's program sum int8 codes in int32, and how many multiply floats."""
    q = quantize_function(fn, {".*": ACT}, backward=Backward())
    ops = trace(jax.grad(lambda p, x: q(p, None, KEY, x).sum(), argnums=(0, 1)), p, x).flow.ops
    found = [op.eqn for op in ops if op.name in {"dot_general", "conv_general_dilated"}]
    kinds = [(str(e.invars[0].aval.dtype), str(e.outvars[0].aval.dtype)) for e in found]
    return kinds.count(("int8", "int32")), kinds.count(("float32", "float32"))


def test_both_products_run_on_integers(monkeypatch):
    run_as_on("tpu", monkeypatch)
    found = {name: products(fn, {"w": w}, x) for name, (fn, w, x) in CASES.items()}
    # The kernel's gradient of a grouped convolution groups the batch.
    assert found == {"dot": (2, 1), "conv": (2, 1), "grouped conv": (1, 2), "two activations": (2, 1)}
    run_as_on("cpu", monkeypatch)
    assert products(conv, {"w": CASES["conv"][1]}, CASES["conv"][2]) == (0, 3)


@pytest.mark.parametrize("name", quick(["conv", "grouped conv"], "conv"))
def test_integer_convolutions_equal_those_in_float(name, monkeypatch):
    fn, w, x = CASES[name]
    found = []
    for platform in PLATFORMS:
        run_as_on(platform, monkeypatch)
        found.append(gradient(fn, Backward())({"w": w}, x, KEY))
    for a, b, c in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_forward_is_the_same_and_off_means_nothing():
    fn, w, x = CASES["conv"]
    plain, rounded = (quantize_function(fn, {".*": ACT}, backward=b) for b in (None, Backward()))
    np.testing.assert_array_equal(rounded({"w": w}, None, KEY, x), plain({"w": w}, None, x))
    off = quantize_function(fn, {".*": None}, backward=Backward())
    names = [op.name for op in trace(jax.grad(lambda p, x: off(p, None, KEY, x).sum()), {"w": w}, x).flow.ops]
    assert not {"random_bits", "floor", "custom_vjp_call"} & set(names)


@pytest.mark.slow
def test_layers_of_a_scan_have_keys_of_their_own():
    def fn(p, x):
        return lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0]

    p, x = {"w": jnp.stack([normal(3, 8, 8)] * 2)}, normal(4, 4, 8)
    rounding(fn, p, x)

    def shared(p, x):  # not over stacked layers: its steps share one key
        return lax.fori_loop(0, 2, lambda _, h: h @ p["w"], x)

    rounding(shared, {"w": p["w"][0]}, x)


def rounding(fn, p, x):
    """The gradient through two equal products is unbiased only if their noise differs."""
    exact = gradient(fn, None)(p, x, None)[1]
    draws = jax.jit(jax.vmap(lambda key: gradient(fn, Backward(3))(p, x, key)[1]))(jax.random.split(KEY, 1500))
    z = (np.mean(draws, axis=0) - exact) / (np.std(draws, axis=0) / np.sqrt(1500))
    assert np.abs(z).max() < 5


def test_numbers_that_are_none_are_not_hidden():
    fn, w, x = CASES["dot"]
    for bad in (jnp.nan, jnp.inf):
        grads = gradient(lambda p, x, bad=bad: fn(p, x) * bad, Backward())({"w": w}, x, KEY)
        assert not any(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    zero = gradient(lambda p, x: fn(p, x) * 0.0, Backward())({"w": w}, x, KEY)
    assert not any(np.any(g) for g in jax.tree.leaves(zero))


def test_bfloat16_keeps_its_type():
    fn, w, x = CASES["dot"]
    grads = gradient(lambda p, x: fn(p, x).astype("float32"), Backward())(
        {"w": w.astype("bfloat16")}, x.astype("bfloat16"), KEY
    )
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
def test_a_network_trains_on_digits():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        compress = jc.quantize(jc.Int(8))
        q = quantize_function(Net().apply, {".*": ACT}, backward=Backward())
        params, _, images, labels = learned(lambda p, _, key, x: q(compress.apply((), p), None, key, x))
        right = jnp.argmax(q(params, None, KEY, images), -1) == labels
    assert right.mean() > 0.85


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: Backward(1), ValueError, "Backward: bits must be an integer in 2..8, got 1."),
        (lambda: q_of(Backward())({"w": 1}, None), TypeError, "the key must be jax.random.key(...), got nothing."),
        (lambda: q_of(Backward())({"w": 1}, None, jnp.ones((2, 16))), TypeError, "call q(params, ranges, key, *args)"),
        (lambda: q_of(Backward(8, False))({"w": 1}, None, KEY), TypeError, "must be None, for nothing is stochastic"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error) as raised:
        call()
    assert says in str(raised.value)


def q_of(spec):
    return quantize_function(dot, {".*": ACT}, backward=spec)
