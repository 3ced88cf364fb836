"""Factors run apart equal the dense product: dots of every form, convolutions, lookups, scans; fewer operations."""

from __future__ import annotations

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, NotOnIntegers, coverage, factored, quantize_function
from jaxcomp.factorization.leaves import Depthwise, Separable, Tucker
from jaxcomp.factorization.specs import CP, SVD, Tucker2
from jaxcomp.trace import cost, sites
from tests.marks import quick

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def jax_defaults():
    """Functions as users write them."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def factors(w, rank, method=SVD()):  # noqa: B008 - frozen
    return jc.factorize({"w": w}, rank, method=method, where="w")


def check(fn, tree, *args, done="factored", atol=1e-4):
    """The thin result is the dense one, under jit too; returns the macs of both."""
    wanted = fn(jc.materialize(tree), *args)
    thin = factored(fn)
    for found in (thin(tree, *args), jax.jit(thin)(tree, *args)):
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype
        scale = float(jnp.abs(wanted.astype(jnp.float32)).max())
        np.testing.assert_allclose(
            np.asarray(found, np.float32), np.asarray(wanted, np.float32), rtol=0, atol=atol * scale
        )
    rows = [row for row in coverage(fn, {})(tree, *args).rows if row.weight.startswith(tuple("LTDS"))]
    assert [row.done for row in rows] == [done] * len(rows)
    assert all(bool(row.why) == (done == "exact") for row in rows if done in ("exact", "factored"))
    return cost(thin)(tree, *args).macs, cost(fn)(jc.materialize(tree), *args).macs


DOTS = {
    "x @ w": (lambda p, x: x @ p["w"], (3, 24), (24, 20), 1),
    "w @ x": (lambda p, x: p["w"] @ x, (20, 3), (24, 20), 1),
    "transposed": (lambda p, x: x @ p["w"].T, (5, 3, 20), (24, 20), 1),
    "heads": (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]), (3, 24), (24, 4, 5), 2),
    "out of heads": (lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["w"]), (3, 4, 6), (4, 6, 20), SVD(1, 0)),
    "reshaped": (lambda p, x: x @ p["w"].reshape(24, 20), (3, 24), (4, 6, 4, 5), SVD(2, 0)),
    "experts": (lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"]), (2, 3, 24), (2, 24, 20), SVD(stacked=1)),
    "one layer": (lambda p, x: x @ p["w"][1], (3, 24), (2, 24, 20), SVD(stacked=1)),
    "indexed": (lambda p, x: x @ lax.dynamic_index_in_dim(p["w"], 1, 0, False), (3, 24), (2, 24, 20), SVD(stacked=1)),
    "swapped": (lambda p, x: jnp.einsum("bd,fd->bf", x, p["w"]), (3, 24), (20, 24), 1),
    "cast": (lambda p, x: x @ p["w"].astype(jnp.bfloat16).astype(jnp.float32), (3, 24), (24, 20), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", quick(DOTS, "x @ w", "heads", "one layer", "cast"))
def test_a_dot_is_two_thin_dots(name):
    fn, x, w, method = DOTS[name]
    tree = factors(normal(*w), 3, method if isinstance(method, SVD) else SVD(method))
    thin, dense = check(fn, tree, normal(*x), atol=2e-2 if name == "cast" else 1e-4)
    assert thin < 0.6 * dense


THICK = {
    "trace": lambda p, x: jnp.einsum("ij,ij->", p["w"], x),
    "squared": lambda p, x: x @ (p["w"] * p["w"]),
    "flattened": lambda p, x: x.reshape(-1) @ p["w"].reshape(-1),
    "joined": lambda p, x: jnp.concatenate([p["w"], p["w"]], 0) @ x,
    "custom rule": lambda p, x: jax.nn.relu(x) @ jax.custom_jvp(lambda w: w @ w.T)(p["w"]),
}


@pytest.mark.parametrize("name", THICK)
def test_what_factors_cannot_follow_is_dense_and_listed(name):
    if name == "custom rule":

        @jax.custom_jvp
        def square(w, x):
            return x @ w

        square.defjvps(lambda t, _, w, x: x @ t, lambda t, _, w, x: t @ w)
        fn = lambda p, x: square(p["w"], x)  # noqa: E731
    else:
        fn = THICK[name]
    tree = factors(normal(12, 12), 2)
    check(fn, tree, normal(12, 12), done="exact")


CONVS = {
    "plain": {},
    "strided": {"window_strides": (2, 1)},
    "padded": {"padding": ((1, 2), (0, 3))},
    "dilated": {"rhs_dilation": (2, 3)},
    "transposed": {"lhs_dilation": (2, 1), "padding": ((2, 2), (1, 1))},
}
METHODS = {
    "svd": (SVD(1, 0), 3, jc.factorization.LowRank),
    "tucker": (Tucker2(stacked=0), (3, 4), Tucker),
    "cp": (CP(steps=5, sweeps=2, stacked=0), 4, Depthwise),
    "separable": (CP(separable=True, steps=5, sweeps=2, stacked=0), 4, Separable),
}


@pytest.mark.parametrize("conv", quick(CONVS, "plain", "transposed"))
@pytest.mark.parametrize("method", quick(METHODS, "svd", "tucker"))
def test_a_convolution_is_a_chain_of_convolutions(method, conv):
    spec, rank, kind = METHODS[method]
    options = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), **CONVS[conv]}

    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)

    tree = factors(normal(3, 2, 12, 16), rank, spec)
    assert isinstance(tree["w"], kind)
    thin, dense = check(fn, tree, normal(2, 9, 8, 12))
    assert thin < dense or conv == "transposed"


@pytest.mark.parametrize("method", quick(METHODS, "svd"))
def test_a_kernel_may_lie_in_any_order(method):
    spec, rank, _ = METHODS[method]

    def fn(p, x):
        w = jnp.transpose(p["w"], (3, 2, 0, 1))
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))

    check(fn, factors(normal(3, 2, 12, 16), rank, spec), normal(2, 12, 6, 5))


def test_a_kernel_with_output_features_in_front():
    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME")

    thin, dense = check(fn, factors(normal(16, 12, 3, 3), 3, SVD(cols=3)), normal(2, 12, 6, 5))
    assert thin < dense


def test_a_grouped_convolution_is_dense_and_listed():
    def fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=3)

    tree = factors(normal(3, 3, 4, 12), 2, SVD(1, 0))
    check(fn, tree, normal(1, 5, 5, 12), done="exact")
    assert "grouped" in coverage(fn, {})(tree, normal(1, 5, 5, 12)).rows[0].why


def test_tied_embeddings_are_looked_up_thin_and_multiplied_thin():
    def fn(p, tokens):
        return p["w"][tokens] @ p["w"].T

    tree = factors(normal(50, 24), 4)
    thin, dense = check(fn, tree, jnp.array([[1, 49], [7, 0]]))
    assert thin < dense


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_steps_through_stacked_factors(remat):
    def fn(p, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return lax.scan(jax.checkpoint(layer) if remat else layer, x, p["w"])[0]

    tree = factors(normal(3, 16, 16) / 4, 2, SVD(stacked=1))
    assert tree["w"].u.shape == (3, 16, 2)
    thin, dense = check(fn, tree, normal(4, 16))
    assert thin == dense // 4


def test_a_scan_over_rows_of_factors_is_dense_and_listed():
    def fn(p, x):
        return lax.scan(lambda c, row: (c + row @ x, None), 0.0, p["w"])[0]

    tree = factors(normal(4, 4), 4)  # every factor has four rows: sliced as a stack it would be silently wrong
    x = normal(4)
    np.testing.assert_allclose(factored(fn)(tree, x), fn(jc.materialize(tree), x), rtol=1e-4)
    assert "stacked=1" in coverage(fn, {})(tree, x).rows[0].why


def test_gradients_of_the_factors_are_those_of_the_dense_product():
    def loss(fn):
        return lambda tree, x: jnp.sum(jnp.sin(fn(tree, x)))

    fn = lambda p, x: x @ p["w"]  # noqa: E731
    tree, x = factors(normal(10, 8), 3), normal(4, 10)
    thin = jax.grad(loss(factored(fn)))(tree, x)
    thick = jax.grad(loss(lambda t, x: fn(jc.materialize(t), x)))(tree, x)
    for a, b in zip(jax.tree.leaves(thin), jax.tree.leaves(thick), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_half_precision_stays_half():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    tree = factors(normal(16, 12, dtype=jnp.bfloat16), 3)
    check(fn, tree, normal(4, 16, dtype=jnp.bfloat16), atol=3e-2)


def test_quantized_activations_enter_thin_products():
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["c"]  # noqa: E731
    params = {"a": normal(32, 32), "c": normal(32, 8)}
    t = jc.chain(jc.low_rank({"a": 4}), jc.quantize(jc.Int(8)))
    tree = jc.pack(t.apply(t.init(params), params))
    rules = {".*": Act(8, range=Dynamic())}
    x = normal(5, 32)
    wanted = quantize_function(fn, rules)(jc.materialize(tree), None, x)
    for integer in (False, True):
        with pytest.warns(NotOnIntegers, match="'a'.*: its factors run in float") if integer else nullcontext():
            found = quantize_function(fn, rules, integer=integer)(tree, None, x)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-2 * float(jnp.abs(wanted).max()))
        rows = {row.path: row for row in coverage(fn, rules, integer=integer)(tree, x).rows}
        assert rows["a"].done == "fake, factored"
        assert rows["c"].done == ("integer" if integer else "fake")
        assert ("float" in rows["a"].why) == integer


def test_sites_of_the_factored_function_name_the_factors():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    found = sites(factored(fn))(factors(normal(64, 32), 4), normal(2, 64))
    assert [(s.path, s.macs) for s in found] == [("w/u", 2 * 64 * 4), ("w/v", 2 * 4 * 32)]
