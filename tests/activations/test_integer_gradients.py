"""Training on integers: the gradient is the fake mode's, and what waits for it are codes of a byte."""

from __future__ import annotations

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.activations import LSQ, PACT, Act, Backward, Dynamic, quantize_function, ranges_of
from jaxcomp.activations.demands import NotOnIntegers
from jaxcomp.core import Groups
from jaxcomp.trace.calibrate import calibrate
from jaxcomp.trace.program import trace
from tests.activations.digits import Net, learned
from tests.activations.test_backward import CASES as PRODUCTS
from tests.marks import quick
from tests.trace.models import normal


def attention(p, x):
    q, k = jnp.split(x @ p["w"], 2, axis=-1)
    return jnp.einsum("bqd,bkd->bqk", q, k)


def tied(p, x):
    """The table looks words up and scores them."""
    rows = p["w"][jnp.clip(jnp.abs(x[:, 0] * 4), 0, 7).astype(jnp.int32)]
    return (x + jnp.tanh(rows)) @ p["w"].T


def layers(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


CASES = {
    **{name: PRODUCTS[name] for name in ("dot", "conv", "grouped conv")},
    "attention": (attention, normal(1, 8, 16), normal(2, 2, 5, 8)),
    "tied table": (tied, normal(1, 8, 16), normal(2, 5, 16)),
    "scanned layers": (layers, 0.3 * normal(1, 3, 16, 16), normal(2, 5, 16)),
}
ACTS = {
    "static": Act(8),
    "symmetric": Act(4, symmetric=True),
    "groups": Act(8, symmetric=True, range=Dynamic(), per=Groups(8)),
    "LSQ": Act(4, range=LSQ()),
    "PACT": Act(4, range=PACT()),
}


def weights_of(bits, p, symmetric=True, prune=False):
    quantize = jc.quantize(jc.Int(bits, symmetric=symmetric), per=jc.Channels(-1), where=jc.core.everything)
    t = jc.chain(jc.prune(0.5, where=jc.core.everything), quantize) if prune else quantize
    state = t.init(p)
    return lambda p: t.apply(state, p)


def gradients(fn, act, weights, integer, x, ranges, backward=None):
    """The result, and the gradients of a loss of it in parameters, ranges and input."""
    q = quantize_function(fn, {".*": act}, integer=integer, backward=backward)
    key = () if backward is None else (None,)

    def loss(p, ranges, x):
        y = q(weights(p), ranges if act.needs_range else None, *key, x)
        return jnp.sum(jnp.sin(1.0 + jnp.arange(float(y.size)).reshape(y.shape)) * y), y

    def run(p):
        (_, y), found = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(p, ranges, x)
        return y, found

    return run


def close(found, wanted, rtol=1e-4):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * (float(jnp.abs(b).max()) + 1e-6))


def narrowed(fn, p, x):
    """Ranges that clip some values."""
    found = ranges_of(calibrate(fn)(p, x))
    return jax.tree.map(lambda end: 0.6 * end, found)


PAIRS = [(name, act) for name in CASES for act in ACTS if act != "groups" or name in ("dot", "attention")]


@pytest.mark.parametrize("case", quick(PAIRS, ("conv", "static"), ("attention", "static"), ("dot", "LSQ")))
def test_gradients_equal_those_of_the_fake_mode(case):
    name, kind = case
    fn, w, x = CASES[name]
    p, act = {"w": w}, ACTS[kind]
    ranges, weights = narrowed(fn, p, x), weights_of(4, p)
    # The table's scales lie on what its second product sums over.
    said = pytest.warns(NotOnIntegers, match="16 scales") if name == "tied table" else nullcontext()
    with said:
        real = jax.jit(gradients(fn, act, weights, True, x, ranges))(p)
    fake = jax.jit(gradients(fn, act, weights, False, x, ranges))(p)
    close(real, fake)
    assert all(np.any(g != 0) for g in jax.tree.leaves(real[1][0]))
    learns = kind in ("LSQ", "PACT")
    assert any(np.any(g != 0) for g in jax.tree.leaves([r.high for r in real[1][1].values()])) == learns


@pytest.mark.parametrize(("symmetric", "prune"), [(False, False), (True, True)])
def test_asymmetric_and_masked_weights_learn_too(symmetric, prune):
    fn, w, x = CASES["dot"]
    p = {"w": w}
    ranges, weights = narrowed(fn, p, x), weights_of(8, p, symmetric, prune)
    real, fake = (gradients(fn, ACTS["static"], weights, integer, x, ranges)(p) for integer in (True, False))
    close(real, fake)
    still = np.asarray(real[1][0]["w"] == 0)
    assert still.sum() == (w.size // 2 if prune else 0)


def test_scales_of_packed_codes_learn():
    fn, w, x = CASES["dot"]
    packed = jc.pack(weights_of(4, {"w": w})({"w": w}))
    ranges = narrowed(fn, {"w": w}, x)

    def loss(tree, integer):
        return jnp.sum(jnp.sin(quantize_function(fn, {".*": Act(8)}, integer=integer)(tree, ranges, x)))

    real, fake = (jax.grad(loss, allow_int=True)(packed, integer)["w"].scale for integer in (True, False))
    assert np.any(fake != 0)
    close(real, fake)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="XLA on CPU drops the barrier")
def test_what_waits_for_the_gradient_are_codes():
    p, x = {f"w{i}": 0.1 * normal(i, 64, 64) for i in range(8)}, normal(9, 2048, 64)

    def fn(p, x):
        for i in range(8):
            x = jnp.tanh(x @ p[f"w{i}"]) + 0.5
        return x

    ranges, weights = narrowed(fn, p, x), weights_of(8, p)
    runs = (jax.jit(gradients(fn, Act(8), weights, integer, x, ranges)) for integer in (True, False))
    codes, values = (run.lower(p).compile().memory_analysis().temp_size_in_bytes for run in runs)
    assert codes < values - 7 * (4 - 1) * x.size + x.size * 4


def test_both_directions_run_on_integers():
    fn, w, x = CASES["dot"]
    p = {"w": w}
    ranges, weights = narrowed(fn, p, x), weights_of(8, p)
    run = gradients(fn, Act(8), weights, True, x, ranges, Backward(8, stochastic=False))
    ops = trace(run, p).flow.ops
    dots = [op.eqn for op in ops if op.name == "dot_general"]
    kinds = {(str(eqn.invars[0].aval.dtype), str(eqn.outvars[0].aval.dtype)) for eqn in dots}
    assert kinds == {("int8", "int32")}
    y, found = run(p)
    fake_y, exact = gradients(fn, Act(8), weights, False, x, ranges)(p)
    close(y, fake_y)
    for a, b in zip(jax.tree.leaves((found[0], found[2])), jax.tree.leaves((exact[0], exact[2])), strict=True):
        error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        assert 1e-3 < error < 0.03


def test_forward_mode_is_refused():
    fn, w, x = CASES["dot"]
    tree = jc.pack(weights_of(8, {"w": w})({"w": w}))
    q = quantize_function(fn, {".*": Act(8, symmetric=True, range=Dynamic())}, integer=True)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: q(tree, None, x), (x,), (x,))


def test_composes_with_vmap_and_remat():
    fn, w, x = CASES["dot"]
    p = {"w": w}
    ranges, weights = narrowed(fn, p, x), weights_of(8, p)
    q = quantize_function(jax.checkpoint(fn), {".*": Act(8)}, integer=True)

    def loss(p, row):
        return jnp.sum(jnp.sin(q(weights(p), ranges, row[None])))

    each = jax.vmap(jax.grad(loss), (None, 0))(p, x)
    one = [jax.grad(loss)(p, row) for row in x]
    close(each, jax.tree.map(lambda *g: jnp.stack(g), *one))


@pytest.mark.slow
def test_a_network_learns_on_integers():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        compress, observe = jc.quantize(jc.Int(4)), jax.jit(calibrate(Net().apply))
        q = quantize_function(Net().apply, {".*": Act(8)}, integer=True)
        params, ranges, images, labels = learned(
            lambda p, ranges, _, x: q(compress.apply((), p), ranges, x),
            lambda p, images: ranges_of(observe(p, images)),
        )
        packed = jc.pack(compress.apply((), params))
        right = jnp.argmax(jax.jit(q)(packed, ranges, images), -1) == labels
    assert right.mean() > 0.85
