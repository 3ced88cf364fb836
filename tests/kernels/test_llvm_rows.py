"""Functions of rows in LLVM code, beside NumPy in double precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from jaxcomp.kernels import llvm_rows as rows
from jaxcomp.trace.rowwise import RowReading, varies

pytest.importorskip("llvmlite")


def read(fn, x, *beside) -> tuple[rows.How, list]:
    """What a program of an array makes of its rows, and the values that meet them in its order."""
    jaxpr = jax.make_jaxpr(jax.jit(fn))(x, *beside).jaxpr
    (number, *others), (eqn,) = jaxpr.invars, jaxpr.eqns
    reading = RowReading(number)
    assert reading.read(eqn)
    function, met = reading.of(jaxpr.outvars[0]), reading.beside
    how = rows.How(x.shape, function, tuple(varies(function, met, x.ndim - 1)), tuple(one.axes for one in met))
    return how, [beside[others.index(one.value)] for one in met]


def made(fn, x, *beside):
    with jax.numpy_rank_promotion("allow"):
        how, met = read(fn, x, *beside)
    return jax.jit(lambda x, *met: rows.llvm_rows(how, x, *met))(x, *met)


def layer_norm(x, bias, more, scale, shift):
    x = x + bias + more
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + shift


def by_numpy(x, bias, more, scale, shift):
    x = np.float64(x) + bias + more
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + shift


@settings(max_examples=5)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=2), st.integers(8, 70), st.integers(0, 99))
def test_a_layer_norm_of_a_sum(lead, length, seed) -> None:
    rng = np.random.default_rng(seed)
    x, more = (rng.normal(size=(*lead, length)).astype(np.float32) for _ in range(2))
    bias, scale, shift = (rng.normal(size=length).astype(np.float32) for _ in range(3))
    np.testing.assert_allclose(
        made(layer_norm, x, bias, more, scale, shift), by_numpy(x, bias, more, scale, shift), rtol=2e-4, atol=2e-5
    )


def test_more_rows_than_a_thread_takes_and_an_odd_number_of_them() -> None:
    x = np.random.default_rng(0).normal(size=(3 * rows.ROWS + 1, 40)).astype(np.float32)
    np.testing.assert_allclose(made(jax.nn.softmax, x), special.softmax(np.float64(x), -1), rtol=1e-5)


@pytest.mark.parametrize(
    "axes", [(1, 1, 1, 24), (2, 1, 1, 1), (1, 3, 1, 24), (1, 3, 4, 24), (2, 1, 4, 24), (2, 3, 4, 24), (2, 3, 4, 1)]
)
def test_what_meets_the_rows_lacks_axes(axes) -> None:
    rng = np.random.default_rng(1)
    x, y, keep = rng.normal(size=(2, 3, 4, 24)), rng.normal(size=axes), rng.random(axes) < 0.7
    x, y = x.astype(np.float32), y.astype(np.float32)
    got = made(lambda x, y, keep: jax.nn.sigmoid(jnp.where(keep, x, -4.0) * y), x, y, keep)
    np.testing.assert_allclose(got, special.expit(np.where(keep, x, -4.0) * np.float64(y)), rtol=2e-5, atol=1e-7)


def test_numbers_that_are_none_stay_in_their_row() -> None:
    x = np.ones((4, 20), np.float32)
    x[1, 3], x[2, 5] = np.nan, np.inf
    got, expected = np.asarray(made(jax.nn.softmax, x)), jax.nn.softmax(x)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    np.testing.assert_allclose(got[[0, 3]], 1 / 20, rtol=1e-6)


@pytest.mark.parametrize("wide", [False, True])
def test_values_that_live_over_several_passes(monkeypatch, wide) -> None:
    """The row given is read in the last pass, too, and is not written to."""
    if wide and "avx512f" not in rows.features():
        pytest.skip("the processor has no AVX-512")
    monkeypatch.setattr(rows, "features", lambda: frozenset({"avx512f"} if wide else ()))

    def fn(x):
        e = jnp.exp(x - x.max(-1, keepdims=True))
        y = e / e.sum(-1, keepdims=True) - x
        return x * y + e * jnp.square(y).sum(-1, keepdims=True)

    x = np.random.default_rng(2).normal(size=(5, 37)).astype(np.float32)
    kept = x.copy()
    e = np.exp(np.float64(x) - x.max(-1, keepdims=True))
    y = e / e.sum(-1, keepdims=True) - x
    np.testing.assert_allclose(made(fn, x), x * y + e * (y**2).sum(-1, keepdims=True), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize("count", [1, rows.ROWS, 2 * rows.ROWS + 3])
def test_numbers_of_the_rows_beside_the_result(count) -> None:
    def fn(x):
        low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        return (x - low) / (high - low), high

    x = np.random.default_rng(3).normal(size=(count, 3, 21)).astype(np.float32)
    how, _ = read(lambda x: fn(x)[0], x)
    names = [step.name for step in how.function]
    numbers = [1 + names.index(name) for name in ("reduce_max", "reduce_min")]
    got, found = jax.jit(lambda x: rows.llvm_row_numbers(how, numbers, x))(x)
    np.testing.assert_allclose(got, fn(x)[0], rtol=1e-6)
    np.testing.assert_array_equal(found, np.stack([x.max(-1), x.min(-1)], -1))


def test_why_there_is_none() -> None:
    how, _ = read(jax.nn.softmax, jnp.ones((2, 4)))
    assert "rows are of 8 numbers and more, and have 4" in str(rows.refusal(how))
    assert rows.refusal(how._replace(shape=(2, 16))) is None
    assert "there are no rows" in str(rows.refusal(how._replace(shape=(0, 16))))
