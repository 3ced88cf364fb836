"""NaN, infinities, ends of types and batches of nothing: visible in fake and integer mode alike, or finite in both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.activations import LSQ, PACT, Act, Dynamic, Float8, PoorRange, Static, quantize_function, ranges_of
from jaxcomp.activations.encoded import small_integers
from jaxcomp.activations.fake import Entry, fake_quantize
from jaxcomp.core import Groups, Tokens
from jaxcomp.trace.calibrate import observe
from jaxcomp.trace.ranges import Range, percentile
from tests.marks import quick
from tests.trace.models import normal

ACTS = {
    "static": Act(8),
    "symmetric": Act(4, symmetric=True),
    "LSQ": Act(8, range=LSQ()),
    "PACT": Act(8, range=PACT()),
    "dynamic": Act(8, range=Dynamic()),
    "tokens": Act(8, symmetric=True, range=Dynamic(), per=Tokens()),
    "groups": Act(8, range=Dynamic(), per=Groups(8)),
    "float8": Float8(range=Static()),
    "float8 tokens": Float8(5, per=Tokens()),
}
W, X = normal(0, 16, 6), normal(1, 4, 16)


def dot(p, x):
    return x @ p["w"].astype(x.dtype)


def run(act, x, ranges=(-3.0, 3.0), *, integer):
    tree = (
        {"w": W.astype("float8_e4m3fn")}
        if isinstance(act, Float8)
        else jc.pack(jc.quantize(jc.Int(8)).apply((), {"w": W}))
    )
    given = {"w": Range(*map(jnp.float32, ranges))} if act.needs_range else None
    return np.asarray(jax.jit(quantize_function(dot, {"w": act}, integer=integer))(tree, given, x), np.float32)


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("integer", [False, True], ids=["fake", "integer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fault_6_rows_that_are_nan_in_float_are_nan(name, integer, dtype):
    x = X.astype(dtype).at[1, 3].set(jnp.nan)
    exact, y = np.asarray(x @ W.astype(dtype), np.float32), run(ACTS[name], x, integer=integer)
    assert np.isnan(y[np.isnan(exact).any(1)]).all()
    if name != "dynamic":  # whose one scale is that of all rows
        assert np.isfinite(y[[0, 2, 3]]).all()


@pytest.mark.parametrize("name", quick(["static", "symmetric", "LSQ", "PACT", "float8"], "LSQ", "float8"))
@pytest.mark.parametrize("integer", [False, True], ids=["fake", "integer"])
def test_fault_6_an_end_that_is_nan_or_infinite_shows_and_an_infinity_saturates(name, integer):
    for ranges in ((jnp.nan, 3.0), (-3.0, jnp.nan), (-3.0, jnp.inf)):
        assert not np.isfinite(run(ACTS[name], X, ranges, integer=integer)).any()
    far, end = (run(ACTS[name], X.at[1, 3].set(v), integer=integer) for v in (jnp.inf, 1e6))
    np.testing.assert_allclose(far, end, rtol=1e-6)


@pytest.mark.parametrize("integer", [False, True], ids=["fake", "integer"])
def test_fault_6_convolutions_show_nan_where_float_does(integer):
    def conv(p, x):
        return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, w = normal(2, 2, 6, 6, 4).at[1, 0, 0, 2].set(jnp.nan), normal(3, 3, 3, 4, 8)
    tree = jc.pack(jc.quantize(jc.Int(8), per=jc.Channels(-1)).apply((), {"w": w}))
    y = quantize_function(conv, {"w": Act(8)}, integer=integer)(tree, {"w": Range(jnp.float32(-3), jnp.float32(3))}, x)
    assert np.isnan(np.asarray(y)[np.isnan(conv({"w": w}, x))]).all()
    assert np.isfinite(np.asarray(y[0])).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [2, 8])
def test_fault_6_finite_values_stay_finite_near_a_types_end(dtype, bits):
    most = float(jnp.finfo(dtype).max)
    x = (jnp.array([[1.0, -1.0, 0.5, -0.7, 0.0, 0.99, -0.99, 0.1]]) * most).astype(dtype)
    for low, high in ((-1, 1), (-0.01, 1), (-1, 0), (-0.76, 0.76)):
        for act in (Act(bits), Act(bits, symmetric=True), Act(bits, range=LSQ()), Float8(range=Static())):
            given = Range(jnp.float32(low * most), jnp.float32(high * most))
            assert jnp.isfinite(fake_quantize(x, act, Entry(("batch", "contracted"), given)).value).all()


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("integer", [False, True], ids=["fake", "integer"])
def test_a_batch_without_examples_gives_one(name, integer):
    assert run(ACTS[name], jnp.zeros((0, 16)), integer=integer).shape == (0, 6)


def test_small_integers_are_those_of_a_cast():
    numbers = jnp.arange(-128, 128, dtype=jnp.float32)
    assert (small_integers(numbers, jnp.zeros(1)) == numbers.astype(jnp.int8)).all()
    assert (small_integers(numbers + 128, jnp.full(1, -128.0)) == numbers.astype(jnp.int8)).all()


def test_fault_5_ranges_that_stand_for_nothing_warn_by_name():
    few = jnp.concatenate([jnp.full(5000, 1e-12), jnp.ones(3)])
    with pytest.warns(PoorRange, match=r"most of the sum of squares from 'w' \(100%\)"):
        ranges_of({"w": observe(few)}, percentile(99.9))
    with pytest.warns(PoorRange, match="nothing but zeros was seen of 'w'"):
        ranges_of({"w": observe(jnp.zeros(4))})
    sparse = jnp.zeros(5000).at[:3].set(2.0)
    assert ranges_of({"w": observe(sparse)}, percentile(99.9))["w"].high == 2
    with pytest.raises(ValueError, match="batches have NaN there"):
        ranges_of({"w": observe(jnp.array([jnp.nan]))})
