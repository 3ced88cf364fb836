"""Zero points, padding and gradients against sums written out; ranges, rules and bad input."""

from __future__ import annotations

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.activations import (
    LSQ,
    PACT,
    Act,
    Dynamic,
    Float8,
    NotOnIntegers,
    coverage,
    quantize_function,
    ranges_of,
)
from jaxcomp.core import Buckets, Channels, Groups, Tiles, Tokens
from jaxcomp.trace.calibrate import activation_name, calibrate
from jaxcomp.trace.ranges import Range
from jaxcomp.trace.sites import sites
from tests.marks import quick

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def quantized(w, grid, per=jc.Channels(-1)):  # noqa: B008 - frozen
    t = jc.quantize(grid, per=per, where=jc.core.everything)
    return jc.pack(t.apply(t.init({"w": w}), {"w": w}))


def compiled(fn, rules, **kwargs):
    return jax.jit(quantize_function(fn, rules, **kwargs))


def dot(p, x):
    return x @ p["w"]


def scaled(low, high):
    return Range(jnp.float32(low), jnp.float32(high))


def codes(x, low, high, bits):
    """Asymmetric codes, scale and zero point, in float64."""
    top = 2**bits - 1
    scale = (max(high, 0) - min(low, 0)) / top
    zero = np.clip(np.round(-min(low, 0) / scale), 0, top)
    return np.clip(np.round(np.asarray(x, np.float64) / scale) + zero, 0, top), scale, zero


@pytest.mark.parametrize("grid", [jc.Int(8), jc.Int(8, symmetric=False), jc.Int(4), jc.Int(2, symmetric=False)])
@pytest.mark.parametrize("bits", quick([8, 4], 8))
def test_dot_is_the_sum_over_centered_codes(grid, bits):
    x, tree = normal(5, 16) + 1, quantized(normal(16, 6), grid)
    q = compiled(dot, {"w": Act(bits)}, integer=True)
    c, scale, zero = codes(x, -1.0, 3.0, bits)
    wanted = (c - zero) @ np.asarray(tree["w"].materialize(), np.float64) * scale
    np.testing.assert_allclose(q(tree, {"w": scaled(-1, 3)}, x), wanted, rtol=1e-5, atol=1e-5)
    assert coverage(dot, {"w": Act(bits)}, integer=True)(tree, x).rows[0].done == "integer"


def by_hand(x, w, stride, pad, hole, spacing, groups):
    """A convolution over NHWC in float64, zeros around it and in its holes."""
    n, h, wide, c = x.shape
    full = np.zeros((n, (h - 1) * hole + 1 + 2 * pad, (wide - 1) * hole + 1 + 2 * pad, c))
    full[:, pad : full.shape[1] - pad : hole, pad : full.shape[2] - pad : hole] = x
    k, per, features = w.shape[0], w.shape[2], w.shape[3]
    size = [(s - (k - 1) * spacing - 1) // stride + 1 for s in full.shape[1:3]]
    out = np.zeros((n, *size, features))
    for o in range(features):
        first = o // (features // groups) * per
        for i in range(k):
            for j in range(k):
                rows = full[:, i * spacing :: stride][:, : size[0], j * spacing :: stride][:, :, : size[1]]
                out[..., o] += rows[..., first : first + per] @ w[i, j, :, o]
    return out


@pytest.mark.parametrize(
    ("stride", "pad", "hole", "spacing", "groups"),
    [pytest.param(1, 1, 1, 1, 1, marks=pytest.mark.slow), (2, 2, 1, 2, 2), (1, 2, 2, 1, 1), (1, 1, 1, 1, 4)],
    ids=["padded", "strided, dilated, grouped", "transposed", "depthwise"],
)
def test_conv_pads_with_the_zero_point(stride, pad, hole, spacing, groups):
    x, tree = normal(2, 5, 6, 4) + 1, quantized(normal(3, 3, 4 // groups, 4), jc.Int(4))

    def conv(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (stride, stride), [(pad, pad)] * 2, (hole, hole), (spacing, spacing),
            ("NHWC", "HWIO", "NHWC"), groups,
        )  # fmt: skip

    c, scale, zero = codes(x, -1.0, 4.0, 8)
    w = np.asarray(tree["w"].materialize(), np.float64)
    wanted = by_hand((c - zero) * scale, w, stride, pad, hole, spacing, groups)
    for integer in (True, False):
        q = compiled(conv, {"w": Act(8)}, integer=integer)
        np.testing.assert_allclose(q(tree, {"w": scaled(-1, 4)}, x), wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("symmetric", quick([True, False], False))
@pytest.mark.parametrize("per", [Tokens(), Groups(8)])
def test_tokens_and_groups_have_scales_of_their_own(per, symmetric):
    x = normal(3, 4, 32) * jnp.asarray([0.1, 1.0, 10.0], jnp.float32)[:, None, None]
    tree = quantized(normal(32, 6), jc.Int(4), jc.Groups(16))
    rules = {"w": Act(8, symmetric=symmetric, range=Dynamic(), per=per)}
    fake = compiled(dot, rules)(tree, None, x)
    real = compiled(dot, rules, integer=True)(tree, None, x)
    exact = x @ tree["w"].materialize()
    np.testing.assert_allclose(real, fake, rtol=1e-5, atol=1e-5 * float(jnp.abs(fake).max()))
    error = jnp.abs(fake - exact).max((1, 2)) / jnp.abs(exact).max((1, 2))
    assert (error < 0.02).all()
    assert coverage(dot, rules, integer=True)(tree, x).rows[0].done == "integer"


def test_both_sides_of_an_attention_product_are_codes():
    def attend(p, q, k):
        return jnp.einsum("bqhd,bkhd->bhqk", q, k) * p["s"]

    q, k, p = normal(2, 3, 2, 8) + 1, normal(2, 5, 2, 8) - 1, {"s": jnp.ones((1, 1, 1, 1))}
    (site,) = sites(attend)(p, q, k)
    ends = [(-1, 3), (-3, 1)] if 3 in site.operands[0].shape else [(-3, 1), (-1, 3)]
    ranges = {activation_name(site, i): scaled(*ends[i]) for i in (0, 1)}
    real = compiled(attend, {".*": Act(8)}, integer=True)(p, ranges, q, k)
    a, b = ((c - z) * s for c, s, z in (codes(q, -1, 3, 8), codes(k, -3, 1, 8)))
    np.testing.assert_allclose(real, np.einsum("bqhd,bkhd->bhqk", a, b), rtol=1e-4, atol=1e-4)


def reference_gradients(x, w, low, high, bits):
    """By hand: straight through within the cells of the codes, nothing outside."""
    c, scale, zero = codes(x, low, high, bits)
    v = np.asarray(x, np.float64) / scale + zero
    inside = (v >= -0.5) & (v <= 2**bits - 0.5)
    upstream = np.cos((c - zero) * scale @ w)
    back = upstream @ w.T
    step = np.where(inside, np.round(v) - v, c - zero)
    return back * inside, ((c - zero) * scale).T @ upstream, (back * step).sum(), (back * (v > 2**bits - 0.5)).sum()


def test_gradients_are_straight_through_in_values_and_weights():
    x, p, ranges = normal(5, 8), {"w": normal(8, 3)}, {"w": scaled(-1, 1.5)}
    q = compiled(dot, {"w": Act(4)})
    gx, gp, gr = jax.grad(lambda x, p, r: jnp.sin(q(p, r, x)).sum(), argnums=(0, 1, 2))(x, p, ranges)
    wanted = reference_gradients(x, np.asarray(p["w"], np.float64), -1, 1.5, 4)
    np.testing.assert_allclose(gx, wanted[0], atol=1e-5)
    np.testing.assert_allclose(gp["w"], wanted[1], atol=1e-5)
    assert gr["w"] == Range(0, 0)


def test_learned_step_has_the_gradient_of_lsq():
    x, p, ranges = normal(6, 8), {"w": normal(8, 3)}, {"w": scaled(0.0, 1.5)}
    q = compiled(dot, {"w": Act(4, range=LSQ())})
    grads = jax.grad(lambda r: jnp.sin(q(p, r, x)).sum())(ranges)["w"]
    _, _, step, _ = reference_gradients(x, np.asarray(p["w"], np.float64), 0.0, 1.5, 4)
    factor = 1 / np.sqrt(x.size * 15)
    # high moves the step by 1/15 of it; with low at 0 the zero point is 0 and has no part in it.
    np.testing.assert_allclose(grads.high, step / 15 * factor, rtol=1e-4)
    assert grads.low != 0


def test_pact_learns_its_clip_alone():
    x, p, ranges = normal(6, 8), {"w": normal(8, 3)}, {"w": scaled(-7.0, 0.8)}
    q = compiled(dot, {"w": Act(4, range=PACT())})
    grads = jax.grad(lambda r: jnp.sin(q(p, r, x)).sum())(ranges)["w"]
    w = np.asarray(p["w"], np.float64)
    c, scale, _ = codes(x, 0.0, 0.8, 4)
    back = np.cos(c * scale @ w) @ w.T
    np.testing.assert_allclose(grads.high, (back * (np.asarray(x) >= 0.8)).sum(), rtol=1e-4)
    assert grads.low == 0
    np.testing.assert_allclose(q(p, ranges, x), c * scale @ w, atol=1e-5)


def test_learned_range_finds_the_data():
    x, p = normal(64, 8), {"w": jnp.eye(8)}
    q = compiled(dot, {"w": Act(4, symmetric=True, range=LSQ())})

    @jax.jit
    def step(r):
        loss, g = jax.value_and_grad(lambda r: jnp.mean((q(p, r, x) - x) ** 2))(r)
        return loss, jax.tree.map(lambda a, b: a - 0.1 * jnp.sign(b), r, g)

    ranges = {"w": scaled(-9, 9)}
    first, _ = step(ranges)
    for _ in range(70):
        loss, ranges = step(ranges)
    assert loss < first / 5
    assert 1.5 < ranges["w"].high < 4


def test_composes_with_jit_grad_vmap_and_remat():
    x, p, ranges = normal(4, 3, 8), {"w": normal(8, 3)}, {"w": scaled(-2, 2)}
    q = compiled(jax.checkpoint(dot), {"w": Act(4)})
    each = jnp.stack([q(p, ranges, row) for row in x])
    np.testing.assert_allclose(jax.jit(jax.vmap(q, (None, None, 0)))(p, ranges, x), each, atol=1e-6)
    grads = jax.vmap(jax.grad(lambda p, row: q(p, ranges, row).sum()), (None, 0))(p, x)["w"]
    np.testing.assert_allclose(grads.sum(0), jax.grad(lambda p: q(p, ranges, x).sum())(p)["w"], atol=1e-4)


def test_layers_of_a_scan_have_ranges_of_their_own():
    def fn(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    p, x = {"w": normal(3, 8, 8)}, normal(4, 8) * 5
    ranges = ranges_of(calibrate(fn)(p, x))
    assert ranges["w"].high.shape == (3,)
    tree = quantized(p["w"], jc.Int(4))  # one scale for all layers
    fake = compiled(fn, {"w": Act(8)})(tree, ranges, x)
    real = compiled(fn, {"w": Act(8)}, integer=True)(tree, ranges, x)
    np.testing.assert_allclose(real, fake, atol=1e-5)
    assert coverage(fn, {"w": Act(8)}, integer=True)(tree, x).rows[0].done == "integer"
    one = compiled(fn, {"w": Act(8)})(tree, {"w": scaled(-9, 9)}, x)
    assert one.shape == fake.shape


def test_lookup_takes_rows_of_codes():
    def fn(p, tokens):
        return p["w"][tokens] @ p["w"].T

    tree = quantized(normal(7, 8), jc.Int(4), jc.Channels(0))
    tokens = jnp.array([[0, 6], [3, 3]])
    rules = {".*": Act(8, range=Dynamic())}
    real = compiled(fn, rules, integer=True)(tree, None, tokens)
    fake = compiled(fn, rules)(tree, None, tokens)
    np.testing.assert_allclose(real, fake, atol=1e-5)
    report = coverage(fn, rules, integer=True)(tree, tokens)
    assert [row.done for row in report.rows] == ["lookup", "integer"]
    assert not report.left


def test_masked_codes_stay_zero():
    w = normal(16, 6)
    compress = jc.chain(jc.prune(0.5), jc.quantize(jc.Int(8, symmetric=False)))
    tree = jc.pack(compress.apply(compress.init({"w": w}), {"w": w}))
    x, rules = normal(3, 16), {"w": Act(8, range=Dynamic())}
    real = compiled(dot, rules, integer=True)(tree, None, x)
    np.testing.assert_allclose(real, compiled(dot, rules)(tree, None, x), atol=1e-5)
    assert coverage(dot, rules, integer=True)(tree, x).rows[0].weight == "Masked Quantized int8 asymmetric"


def test_no_rule_leaves_activations_alone_and_weights_as_the_tree_has_them():
    tree, x = quantized(normal(16, 6), jc.Int(4)), normal(3, 16)
    for integer in (True, False):
        y = compiled(dot, {"w": None}, integer=integer)(tree, None, x)
        np.testing.assert_allclose(y, x @ tree["w"].materialize(), atol=1e-6)


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({"w": jnp.ones((16, 6))}, "the weight is not quantized"),
        (quantized(jnp.ones((16, 6)), jc.Int(4), jc.Channels(0)), "the contracted axis of 16 has 16 scales"),
        (quantized(jnp.ones((16, 6)), jc.Log(4)), "Companded codes are not proportional"),
    ],
)
def test_what_integers_cannot_do_is_done_in_float_and_explained(tree, why):
    x, rules = normal(3, 16), {"w": Act(8, range=Dynamic())}
    asked = pytest.warns(NotOnIntegers, match=why) if jc.core.is_compressed(tree["w"]) else nullcontext()
    with asked:
        real = compiled(dot, rules, integer=True)(tree, None, x)
    np.testing.assert_array_equal(real, compiled(dot, rules)(tree, None, x))
    (row,) = coverage(dot, rules, integer=True)(tree, x).left
    assert row.done == "fake"
    assert why in row.why


@jax.custom_vjp
def guarded(x, w):
    return x @ w


guarded.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


def test_a_custom_rule_is_left_exact_and_listed():
    def fn(p, x):
        return guarded(x, p["w"])

    p, x = {"w": normal(4, 3)}, normal(2, 4)
    report = coverage(fn, {".*": Act(8)})(p, x)
    assert "custom_vjp_call" in report.left[0].why
    assert report.rows[0].done == "exact"
    assert "custom_vjp_call" in str(report)
    np.testing.assert_array_equal(compiled(fn, {".*": Act(8)})(p, {}, x), fn(p, x))


def test_coverage_makes_no_arrays_and_keeps_static_arguments():
    def fn(p, x, train):
        return x @ p["w"] if train else x

    shapes = {"w": jax.ShapeDtypeStruct((2**15, 2**15), "float32")}, jax.ShapeDtypeStruct((1, 2**15), "float32")
    assert coverage(fn, {"w": Act(8)})(*shapes, train=True).rows[0].done == "fake"


@pytest.mark.parametrize(
    ("rules", "ranges", "error", "says"),
    [
        ({"nope": Act(8)}, {}, ValueError, "'nope' matches nothing that an earlier rule did not take; the sites are"),
        ({".*": Act(8), "w": None}, {}, ValueError, "rule 'w' matches nothing"),
        ({"w": 8}, {}, TypeError, "rule 'w' must ask for an Act, a Float8 or None, got 8"),
        ({"w": Act(8)}, None, ValueError, "calibration never run for 'w'; call"),
        ({"w": Act(8)}, {"v": scaled(0, 1)}, ValueError, "name 'v', which this function does not have; it has 'w'"),
        ({"w": Act(8)}, {"w": (0.0, 1.0)}, TypeError, "ranges['w'] must be a Range(low, high), got tuple"),
        ({"w": Act(8)}, {"w": Range(jnp.zeros(3), jnp.ones(3))}, ValueError, "ends of shape (3,), wanted () or ()"),
        ({"w": Act(8, range=Dynamic(), per=Groups(5))}, None, ValueError, "'w' has 16 elements along its contracted"),
    ],
)  # fmt: skip
def test_bad_input(rules, ranges, error, says):
    with pytest.raises(error) as raised:
        quantize_function(dot, rules)({"w": jnp.ones((16, 6))}, ranges, jnp.ones((2, 16)))
    assert says in str(raised.value)


def test_statistics_are_not_ranges():
    p, x = {"w": jnp.ones((16, 6))}, jnp.ones((2, 16))
    stats = calibrate(dot)(p, x)
    with pytest.raises(TypeError, match=r"are statistics; turn them into ranges with ranges_of"):
        quantize_function(dot, {"w": Act(8)})(p, stats, x)
    with pytest.raises(TypeError, match="ranges_of: 'w' must be Stats"):
        ranges_of({"w": 3})
    with pytest.raises(ValueError, match="the calibration batches are infinite there"):
        ranges_of(calibrate(dot)(p, x * jnp.inf))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Act(9), ValueError, "Act: bits must be an integer in 2..8, got 9."),
        (lambda: Act(range="static"), TypeError, "Act: range must be Static"),
        (lambda: Act(per=8), TypeError, "Act: per must be one of Tensor(), Tokens(), Groups(size), got 8."),
        (lambda: Act(per=Channels()), TypeError, "Act: per must be one of Tensor(), Tokens(), Groups(size), got Chan"),
        (lambda: Act(per=Tiles((8, 8))), TypeError, "Act: per must be one of Tensor(), Tokens(), Groups(size), got"),
        (lambda: Float8(per=Buckets(8)), TypeError, "Float8: per must be one of Tensor(), Tokens(), Groups(size)"),
        (lambda: Act(range=Dynamic(), per=Groups(8, 0)), ValueError, "axis that its site sums over; take Groups(8)."),
        (lambda: Act(per=Tokens()), ValueError, "needs range=Dynamic"),
        (lambda: Act(symmetric=True, range=PACT()), ValueError, "PACT's range begins at 0"),
        (lambda: quantize_function(dot, {}, strict=True), ValueError, "strict=True asks that sites run on integers"),
    ],
)
def test_bad_specs(make, error, says):
    with pytest.raises(error) as raised:
        make()
    assert says in str(raised.value)
