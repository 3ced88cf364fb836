"""Scans over stacked leaves written out give what the scans give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcomp.trace.unrolling import Slices, stacks, unrolled
from tests.trace.models import normal

X = normal(0, 2, 4)


def layer(h, w):
    h = jax.checkpoint(lambda h, w: jnp.tanh(h @ w["kernel"] + w["bias"][None]))(h, w)
    return h, h.sum(-1)


def plain(p, x):
    return lax.scan(layer, x @ p["in"], p["layers"])


def backwards(p, x):
    return jax.jit(lambda p, x: lax.scan(layer, x, p["layers"], reverse=True))(p, x)


def beside_others(p, x):
    """Layers that also step over what is no leaf, and a stack that is read outside."""
    step = lambda h, s: (layer(h, s[0])[0] * s[1], None)  # noqa: E731
    return lax.scan(step, x, (p["layers"], jnp.arange(1.0, 4.0)))[0], p["layers"]["bias"].mean(0)


def nested(p, x):
    inner = lambda h, w: (lax.scan(lambda h, v: (jnp.tanh(h @ v), None), h, w)[0], None)  # noqa: E731
    return lax.scan(inner, x, p["pairs"])[0]


PARAMS = {
    "in": normal(1, 4, 4),
    "layers": {"kernel": normal(2, 3, 4, 4), "bias": normal(3, 3, 4)},
    "pairs": normal(4, 2, 2, 4, 4),
}
LAYERS = {"layers/kernel": 3, "layers/bias": 3}
CASES = {
    "plain": (plain, LAYERS),
    "backwards": (backwards, LAYERS),
    "beside others": (beside_others, LAYERS),
    "nested": (nested, {"pairs": 2}),
}


def apart(tree, names):
    pick = lambda path, x: Slices(x) if jax.tree_util.keystr(path, simple=True, separator="/") in names else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(pick, tree)


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_out_gives_the_same(name):
    fn, wanted = CASES[name]
    assert stacks(fn)(PARAMS, X) == wanted
    for names in (wanted, [*wanted][:1]):  # all of them, or one that goes beside stacked ones
        tree = apart(PARAMS, names)
        got = jax.jit(unrolled(fn))(tree, X)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, fn(PARAMS, X))
        jaxpr = jax.make_jaxpr(unrolled(fn))(tree, X).jaxpr
        assert [e.primitive.name for e in jaxpr.eqns].count("scan") == (2 if name == "nested" else 0)


def test_what_a_scan_does_not_step_over_as_it_is_stays():
    fn = lambda p, x: lax.scan(layer, x, jax.tree.map(lambda w: 2 * w, p["layers"]))  # noqa: E731
    assert stacks(fn)(PARAMS, X) == {}
    got = unrolled(fn)(apart(PARAMS, LAYERS), X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, fn(PARAMS, X))


def test_slices_say_what_they_are():
    slices = Slices(PARAMS["layers"]["bias"])
    assert (repr(slices), slices.shape) == ("Slices(3 of (4,))", (3, 4))
    np.testing.assert_array_equal(slices.dense(), PARAMS["layers"]["bias"])
