"""Activations in float8 against ml_dtypes; products of float8 codes against the fake ones; what coverage says."""

from __future__ import annotations

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.activations import Dynamic, Float8, NotOnIntegers, Static, coverage, quantize_function, ranges_of
from jaxcomp.core import Groups, Tokens
from jaxcomp.trace.calibrate import calibrate
from jaxcomp.trace.program import trace
from tests.activations.platforms import run_as_on
from tests.activations.test_quantize_function import dot, quantized
from tests.trace.models import normal

TYPES = {4: ml_dtypes.float8_e4m3fn, 5: ml_dtypes.float8_e5m2}


def by_hand(x, exponent, end):
    top = float(ml_dtypes.finfo(TYPES[exponent]).max)
    scale = np.float32(end) * np.float32(1 / top)
    return np.clip(x * (1 / scale), -top, top).astype(TYPES[exponent]).astype(np.float32) * scale


@pytest.mark.parametrize("exponent", [4, 5])
def test_values_are_those_of_ml_dtypes(exponent):
    x = np.asarray(normal(1, 6, 64) * 10.0 ** normal(2, 6, 64))
    for per, end in (
        (Float8(exponent), np.abs(x).max()),
        (Float8(exponent, per=Tokens()), np.abs(x).max(1)[:, None]),
    ):
        q = quantize_function(dot, {"w": per})
        for run in (q, jax.jit(q)):
            np.testing.assert_array_equal(run({"w": jnp.eye(64)}, None, jnp.asarray(x)), by_hand(x, exponent, end))


def test_static_ranges_clip_and_cut_the_gradient():
    x, p = normal(1, 5, 8), {"w": normal(2, 8, 3)}
    ranges = ranges_of(calibrate(dot)(p, x / 2))
    end = np.abs(x).max() / 2
    q = jax.jit(quantize_function(dot, {"w": Float8(range=Static())}))
    np.testing.assert_allclose(q(p, ranges, x), by_hand(np.asarray(x), 4, end) @ p["w"], rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda x: q(p, ranges, x).sum())(x)
    np.testing.assert_allclose(grads, np.where(np.abs(x) <= end, p["w"].sum(1), 0), rtol=1e-6)
    assert (np.abs(x) > end).any()


def conv(p, x):
    return lax.conv_general_dilated(
        x, p["w"].astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def attend(p, x):
    return jnp.einsum("bqd,bkd->bqk", x @ p["w"].astype(x.dtype), jnp.sin(x))


@pytest.mark.parametrize(("fn", "w", "x"), [(conv, (3, 3, 4, 6), (2, 5, 6, 4)), (attend, (8, 8), (2, 5, 8))])
def test_real_products_equal_fake_ones(fn, w, x, monkeypatch):
    run_as_on("cpu", monkeypatch)
    p, x, rules = {"w": normal(1, *w).astype("float8_e4m3fn")}, normal(2, *x), {".*": Float8(4)}
    fake, real = (jax.jit(quantize_function(fn, rules, integer=i))(p, None, x) for i in (False, True))
    np.testing.assert_allclose(real, fake, rtol=1e-5, atol=1e-5 * float(jnp.abs(fake).max()))
    rows = coverage(fn, rules, integer=True)(p, x).rows
    assert {row.done for row in rows} == {"float8"}
    ops = trace(lambda p, x: quantize_function(fn, rules, integer=True)(p, None, x), p, x).flow.ops
    factors = [[str(v.aval.dtype) for v in op.eqn.invars] for op in ops if "general" in op.name]
    assert factors == [["float8_e4m3fn"] * 2] * len(rows)
    assert all("on CPU, float8 is widened" in row.why for row in rows)  # on whichever machine one asks


def test_groups_have_scales_of_their_own():
    x = normal(1, 3, 32) * jnp.repeat(jnp.asarray([0.01, 100.0]), 16)[None]
    p, rules = {"w": normal(2, 32, 4).astype("float8_e4m3fn")}, {"w": Float8(per=Groups(16))}

    def fn(p, x):
        return x @ p["w"].astype(x.dtype)

    fake, real = (quantize_function(fn, rules, integer=i)(p, None, x) for i in (False, True))
    np.testing.assert_allclose(real, fake, rtol=1e-5, atol=1e-4)


def test_weights_of_other_kinds_run_fake_and_say_why():
    x, rules = normal(1, 3, 16), {"w": Float8()}
    for tree, why in (
        (quantized(normal(2, 16, 6), jc.Int(8)), "one operand is integers, the other float8"),
        ({"w": normal(2, 16, 6)}, "the weight is not quantized"),
    ):
        fake = quantize_function(dot, rules)(tree, None, x)
        with pytest.warns(NotOnIntegers, match=why) if "float8" in why else nullcontext():
            real = quantize_function(dot, rules, integer=True)(tree, None, x)
        np.testing.assert_allclose(real, fake, atol=1e-5)
        (row,) = coverage(dot, rules, integer=True)(tree, x).rows
        assert (row.done, row.activations, row.why) == ("fake", "float8_e4m3, Dynamic", why)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Float8(3), ValueError, "Float8: exponent must be 4 (e4m3) or 5 (e5m2), got 3."),
        (lambda: Float8(range=4), TypeError, "Float8: range must be Static() or Dynamic(), got 4."),
        (lambda: Float8(per=4), TypeError, "Float8: per must be one of Tensor(), Tokens(), Groups(size), got 4."),
        (lambda: Float8(range=Static(), per=Tokens()), ValueError, "Float8: per=Tokens() needs range=Dynamic()"),
    ],
)
def test_bad_specs(make, error, says):
    with pytest.raises(error) as raised:
        make()
    assert says in str(raised.value)
    assert Float8(range=Dynamic()) == Float8()
