"""Learned weight quantizers (LSQ) in training, on integers: results and gradients are those of the fake mode."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.activations import LSQ, Act, coverage, quantize_function
from jaxcomp.quantization import learned
from jaxcomp.trace.program import trace
from jaxcomp.trace.ranges import Range
from tests.marks import quick
from tests.trace.models import normal

W, X = normal(1, 16, 6), normal(2, 5, 16)
RANGES = {"w": Range(jnp.float32(-1.5), jnp.float32(2))}
LEAVES = {
    "LSQ": learned({"w": W}, jc.Int(4)),
    "LSQ+": learned({"w": W}, jc.Int(8, symmetric=False), offset=True),
    "sign": learned({"w": W}, jc.Int(1)),
    "masked": learned({"w": jc.core.Masked(W, jnp.abs(W) > 0.5)}, jc.Int(4)),
    "masked, the gradient passes": learned({"w": jc.core.Masked(W, jnp.abs(W) > 0.5, straight=True)}, jc.Int(4)),
}


def fn(p, x):
    return x @ p["w"]


@pytest.mark.parametrize("name", quick(LEAVES, "LSQ", "masked, the gradient passes"))
@pytest.mark.parametrize("act", [Act(8, range=LSQ())], ids=["asymmetric"])
def test_integers_learn_what_fake_values_do(name, act):
    tree = LEAVES[name]

    def loss(tree, ranges, x, integer):
        y = quantize_function(fn, {"w": act}, integer=integer, strict=integer)(tree, ranges, x)
        return jnp.sum(jnp.sin(y)), y

    def run(integer):
        slope = jax.grad(lambda *args: loss(*args, integer), argnums=(0, 1, 2), has_aux=True, allow_int=True)
        return jax.jit(slope)(tree, RANGES, X)

    (real, y), (fake, y_fake) = run(True), run(False)
    np.testing.assert_allclose(y, y_fake, rtol=1e-5, atol=1e-5)
    found = jax.tree_util.tree_leaves_with_path(real[0])
    for (path, a), b in zip(found, jax.tree.leaves(fake[0]), strict=True):
        if a.dtype == jnp.float32:
            assert np.any(b != 0), path
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()) + 1e-6)
    for a, b in zip(jax.tree.leaves(real[1:]), jax.tree.leaves(fake[1:]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_products_are_of_int8_and_the_shipped_leaf_gives_the_same():
    tree, rules = LEAVES["LSQ"], {"w": Act(8)}
    q = quantize_function(fn, rules, integer=True)
    kinds = [
        str(op.eqn.invars[0].aval.dtype)
        for op in trace(lambda t, x: q(t, RANGES, x), tree, X).flow.ops
        if op.name == "dot_general"
    ]
    assert kinds == ["int8"]
    assert coverage(fn, rules, integer=True)(tree, X).rows[0].done == "integer"
    np.testing.assert_array_equal(q(tree, RANGES, X), q(jc.pack(tree), RANGES, X))


def test_a_table_says_why_it_is_none():
    tree = learned({"w": W}, jc.quantization.APoT(4))
    row = coverage(fn, {"w": Act(8)}, integer=True)(tree, X).rows[0]
    assert (row.done, row.why) == ("fake", "APoT codes are not proportional to the weight")
