"""Scans over stacked leaves written out give what the scans give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.ptq import Training, reconstruct
from jaxcomp.quantization import Quantized
from jaxcomp.quantization.adaround import adaround
from jaxcomp.trace.unrolling import Slices, stacks, unrolled, written_out
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
        got = jax.jit(written_out(fn))(tree, X)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, fn(PARAMS, X))
        jaxpr = jax.make_jaxpr(written_out(fn))(tree, X).jaxpr
        assert [e.primitive.name for e in jaxpr.eqns].count("scan") == (2 if name == "nested" else 0)


def test_what_a_scan_does_not_step_over_as_it_is_stays():
    fn = lambda p, x: lax.scan(layer, x, jax.tree.map(lambda w: 2 * w, p["layers"]))  # noqa: E731
    assert stacks(fn)(PARAMS, X) == {}
    got = written_out(fn)(apart(PARAMS, LAYERS), X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, fn(PARAMS, X))


def test_slices_say_what_they_are():
    slices = Slices(PARAMS["layers"]["bias"])
    assert (repr(slices), slices.shape) == ("Slices(3 of (4,))", (3, 4))
    np.testing.assert_array_equal(slices.dense(), PARAMS["layers"]["bias"])


def test_a_tree_goes_there_and_back():
    found = unrolled(plain)(PARAMS, X)
    assert repr(found) == "<Unrolled 3 x layers/bias, 3 x layers/kernel>"
    tree = found.unroll(PARAMS)
    paths = [path for path, _ in leaves_with_paths(tree)[0]]
    assert paths == ["in", *(f"layers/{name}/{i}" for name in ("bias", "kernel") for i in range(3)), "pairs"]
    jax.tree.map(np.testing.assert_array_equal, found.roll(tree), PARAMS)
    for got, want in zip(found.fn(tree, X), plain(PARAMS, X), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_layers_are_compressed_one_by_one_and_rolled():
    found = unrolled(plain)(PARAMS, X)
    quantize = jc.quantize(jc.Int(4), where=r"layers/kernel/\d", per=jc.Channels(-1))
    apart = quantize.apply((), found.unroll(PARAMS))
    whole = found.roll(apart)
    assert isinstance(whole["layers"]["kernel"], Quantized)
    assert whole["layers"]["kernel"].scale.shape == (3, 1, 4)
    jax.tree.map(np.testing.assert_array_equal, jc.materialize(whole), found.roll(jc.materialize(apart)))
    jax.tree.map(np.testing.assert_array_equal, found.roll(found.unroll(whole)), whole)
    with pytest.raises(TypeError, match=r"unrolled: 'layers/kernel' is compressed .* do not part; unroll the arrays"):
        found.unroll(jc.pack(whole))
    other = jc.quantize(jc.Int(8), where="layers/kernel/1").apply((), found.unroll(PARAMS))
    with pytest.raises(TypeError, match=r"layers of 'layers/kernel' are compressed in different ways; compress all"):
        found.roll(other)


def test_layers_of_a_scan_are_reconstructed_one_by_one():
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["kernel"])[0]  # noqa: E731
    params = {"kernel": PARAMS["layers"]["kernel"]}
    found = unrolled(fn)(params, X)
    tree = found.unroll(params)
    soft = adaround(tree, jc.Int(2), where=r"kernel/\d", per=jc.Channels(-1))
    done = reconstruct(found.fn, tree, soft, batches=[normal(9, 64, 4)], training=Training(steps=20))
    assert [block.name for block in done.blocks] == [f"'kernel/{i}'" for i in range(3)]
    assert all(block.after <= block.before for block in done.blocks)
    assert found.roll(done.params)["kernel"].shape == (3, 4, 4)
