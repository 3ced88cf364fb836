"""Fault 15: factors follow every way of taking a slice of a leaf, and cost what they should."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, coverage, factored
from tests.trace.models import normal

ROWS, SIZE, RANK = 3, 8, 2
PAIRS = {
    "unpacked": lambda w: tuple(w),
    "indexed": lambda w: (w[0], w[1]),
    "from the end": lambda w: (w[-2], w[-1]),
    "sliced": lambda w: (w[:1].reshape(SIZE, SIZE), w[1:].squeeze(0)),
    "indexed by a tracer": lambda w: (w[jnp.int32(0)], w[jnp.int32(1)]),
    "sliced dynamically": lambda w: tuple(lax.dynamic_index_in_dim(w, i, keepdims=False) for i in range(2)),
    "unstacked": lambda w: tuple(jnp.unstack(w)),
    "split": lambda w: tuple(part[0] for part in jnp.split(w, 2)),
    "taken": lambda w: (jnp.take(w, 0, axis=0), jnp.take(w, jnp.int32(1), axis=0)),
    "reversed": lambda w: tuple(w[::-1][i] for i in (1, 0)),
    "moved": lambda w: tuple(w.swapaxes(1, 2)[i].T for i in range(2)),
}
LOOPS = {
    "scanned": lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0],
    "looped": lambda p, x: lax.fori_loop(0, 2, lambda i, h: h @ p["w"][i], x),
}


def pair(name):
    def fn(p, x):
        first, second = PAIRS[name](p["w"])
        return x @ first @ second

    return fn


@pytest.mark.parametrize("fn", [*map(pair, PAIRS), *LOOPS.values()], ids=[*PAIRS, *LOOPS])
def test_fault_15_a_slice_of_stacked_factors_costs_thin_products(fn):
    p, x = {"w": normal(1, 2, SIZE, SIZE)}, normal(2, ROWS, SIZE)
    factors = jc.factorize(p, RANK, method=jc.factorization.SVD(stacked=1))
    u, v = (np.asarray(f, np.float64) for f in factors["w"].factors)
    wanted = np.asarray(x, np.float64) @ u[0] @ v[0] @ u[1] @ v[1]
    np.testing.assert_allclose(factored(fn)(factors, x), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert jc.cost(fn)(p, x).macs == 2 * ROWS * SIZE * SIZE
    assert jc.cost(factored(fn))(factors, x).macs == 2 * ROWS * RANK * (SIZE + SIZE)
    assert {row.done for row in coverage(fn, {})(factors, x).rows} == {"factored"}


@pytest.mark.parametrize("name", sorted(PAIRS.keys() - {"taken"}))
def test_fault_15_slices_of_codes_stay_codes(name):
    fn, p, x = pair(name), {"w": normal(1, 2, SIZE, SIZE)}, normal(2, ROWS, SIZE)
    codes = jc.quantize(jc.Int(8), per=jc.Channels((0, 2))).apply((), p)
    rows = coverage(fn, {".*": Act(8, range=Dynamic())}, integer=True)(codes, x).rows
    assert [row.done for row in rows] == ["integer", "integer"]


@pytest.mark.parametrize(
    ("fn", "macs"),
    [
        (lambda w, x: x @ w[:, :4], RANK * (8 + 4)),
        (lambda w, x: x[:, :4] @ w[2:6], RANK * (4 + 12)),
        (lambda w, x: sum(x @ part for part in jnp.split(w, 3, axis=1)), 3 * RANK * (8 + 4)),
        (lambda w, x: x @ w[:, ::-1], RANK * (8 + 12)),
        (lambda w, x: x @ w[::2, ::3].T.T if False else x[:, ::2] @ w[::2, ::3], RANK * (4 + 4)),
        (lambda w, x: x @ lax.dynamic_slice(w, (0, x.shape[0]), (8, 6)), RANK * (8 + 6)),
        (lambda w, x: x @ w.reshape(8, 3, 4)[:, 1], RANK * (8 + 4)),
        (lambda w, x: sum(x @ part for part in jnp.unstack(w.reshape(8, 3, 4), axis=1)), 3 * RANK * (8 + 4)),
        (lambda w, x: x[:, :4] @ w.reshape(2, 4, 12)[1], RANK * (4 + 12)),
        (lambda w, x: x @ w.T[2:5].T, RANK * (8 + 3)),
    ],
)
def test_fault_15_parts_of_a_matrix_are_parts_of_its_factors(fn, macs):
    p, x = {"w": normal(1, 8, 12)}, normal(2, ROWS, 8)
    factors = jc.factorize(p, RANK)
    run = lambda p, x: fn(p["w"], x)  # noqa: E731
    wanted = run(jc.materialize(factors), x)
    np.testing.assert_allclose(factored(run)(factors, x), wanted, rtol=1e-4, atol=1e-5)
    assert jc.cost(factored(run))(factors, x).macs == ROWS * macs


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: x @ jnp.stack([w[i] for i in range(8)]),  # rows one by one are no matrix
        lambda w, x: x @ jnp.tile(w, (1, 2)),
        lambda w, x: x @ w.reshape(4, 24)[:, :12].repeat(2, 0),
    ],
)
def test_fault_15_what_factors_cannot_follow_is_right(fn):
    p, x = {"w": normal(1, 8, 12)}, normal(2, ROWS, 8)
    factors = jc.factorize(p, RANK)
    run = lambda p, x: fn(p["w"], x)  # noqa: E731
    np.testing.assert_allclose(factored(run)(factors, x), run(jc.materialize(factors), x), rtol=1e-4, atol=1e-5)


def test_fault_15_kernels_in_stacked_factors():
    def fn(p, x):
        for w in p["w"]:
            x = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x

    p, x = {"w": normal(1, 2, 3, 3, 4, 4)}, normal(2, 1, 5, 5, 4)
    factors = jc.factorize(p, (2, 2), method=jc.factorization.Tucker2(stacked=1))
    wanted = fn(jc.materialize(factors), x)
    np.testing.assert_allclose(factored(fn)(factors, x), wanted, rtol=1e-4, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_fault_15_macs_are_those_that_xla_counts():
    fn = pair("unpacked")
    p, x = {"w": normal(1, 2, SIZE, SIZE)}, normal(2, ROWS, SIZE)
    flops = jax.jit(fn).lower(p, x).compile().cost_analysis()["flops"]
    assert jc.cost(fn)(p, x).flops == flops
