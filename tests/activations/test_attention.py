"""Attention in floats in one pass: numpy's in every style that users write it, and in every kind of program."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax, nn

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, between, coverage
from jaxcomp.activations.between import ONE_PASS
from tests.activations.attention import (
    KERNELS,
    PARAMS,
    SEEN,
    STYLES,
    UNSEEN,
    WIDE,
    X,
    by_einsum,
    by_flax,
    by_matmul,
    causal,
    exact,
    grouped,
    ids,
    in_calls,
    joined,
    made,
    masked,
    near,
    prepared,
    ran,
    run_of,
)
from tests.marks import quick

pytest.importorskip("llvmlite")
pytestmark = pytest.mark.usefixtures("jax_defaults")


@pytest.fixture
def without(monkeypatch):
    """The same programs as they are, from when it is called."""
    return lambda: monkeypatch.setattr(between, "attentions", lambda *_, **how: [])


@pytest.mark.parametrize("fn", quick(STYLES, by_einsum, by_matmul, causal, grouped, by_flax, in_calls), **ids)
def test_it_is_numpys(fn) -> None:
    args, options = STYLES[fn]
    tree, weights = prepared(fn, X, *args)
    got, calls = ran(run_of(fn), tree, None, X, *args)
    assert calls == 1
    near(got, exact(weights, X, **options))


ACTS = {"static": Act(8), "dynamic": Act(8, range=Dynamic())}


def on_integers(fn, act):
    """What runs, on which arguments, and what it gives in floats."""
    args, options = STYLES[fn]
    tree, weights = prepared(fn, X, *args)
    ranges = jc.activations.ranges_of(jax.jit(jc.calibrate(fn))(PARAMS, X, *args)) if act.needs_range else None
    return run_of(fn, {KERNELS: act}), (tree, ranges, X, *args), exact(weights, X, **options)


@pytest.mark.parametrize("name", quick(ACTS, "static"))
@pytest.mark.parametrize("fn", quick([by_einsum, masked, grouped], masked), **ids)
def test_kernels_on_integers(fn, name) -> None:
    run, given, wanted = on_integers(fn, ACTS[name])
    got, calls = ran(run, *given)
    assert calls == 1
    near(got, wanted, 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("fn", [by_einsum, masked, grouped], **ids)
def test_kernels_on_integers_give_the_same_but_for_ties(fn, name, without) -> None:
    """The output's kernel rounds what it is given: now and then to a neighbour."""
    run, given, _ = on_integers(fn, ACTS[name])
    got, _ = ran(run, *given)
    without()
    wanted, calls = ran(run_of(fn, {KERNELS: ACTS[name]}), *given)
    assert calls == 0
    assert np.abs(got - wanted).mean() < 1e-4
    near(got, wanted, 0.01)


def layers(p, x):
    return lax.scan(lambda x, p: (x + by_einsum(p, x), None), x, p)[0]


def test_layers_of_a_scan() -> None:
    params = {n: jnp.stack([w, 0.5 * w, -w]) for n, w in PARAMS.items()}
    tree, weights = prepared(layers, X, params=params)
    got, calls = ran(run_of(layers), tree, None, X)
    assert calls == 1
    wanted = np.asarray(X, np.float64)
    for i in range(3):
        wanted = wanted + exact({n: w[i] for n, w in weights.items()}, wanted)
    near(got, wanted, 1e-4)


def test_maps() -> None:
    tree, weights = prepared(by_einsum, X)
    both = jnp.stack([X, -2 * X])
    got, calls = ran(jax.vmap(run_of(by_einsum), (None, None, 0)), tree, None, both)
    assert calls == 0
    for one, x in zip(got, both, strict=True):
        near(one, exact(weights, x))


def test_outside_jit() -> None:
    tree, weights = prepared(by_einsum, X)
    near(run_of(by_einsum)(tree, None, X), exact(weights, X))


@pytest.mark.parametrize("fn", quick([by_einsum, layers, in_calls, grouped], by_einsum), **ids)
def test_gradients(fn, without) -> None:
    args = STYLES[fn][0] if fn in STYLES else ()
    params = {n: jnp.stack([w, 0.5 * w]) for n, w in PARAMS.items()} if fn is layers else PARAMS
    tree, _ = prepared(fn, X, *args, params=params)

    def found():
        run = run_of(fn)
        return jax.jit(jax.value_and_grad(lambda x: (run(tree, None, x, *args) ** 2).sum()))(X)

    got = found()
    assert float(jnp.abs(got[1]).max()) > 0.1
    without()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, found())


@pytest.mark.parametrize("fn", quick([by_einsum, masked], by_einsum), **ids)
def test_a_token_that_is_none(fn) -> None:
    """Its sequence is none, and no other."""
    args, options = STYLES[fn]
    tree, weights = prepared(fn, X, *args)
    x = X.at[1, 3, 5].set(jnp.nan)
    got, calls = ran(run_of(fn), tree, None, x, *args)
    assert calls == 1
    assert np.isnan(got[1]).all()
    near(got[0], exact(weights, X, **options)[0])


@pytest.mark.parametrize("fill", [-jnp.inf, -1e9])
def test_a_sequence_of_which_nothing_is_seen(fill) -> None:
    def fn(p, x, seen):
        return by_einsum(p, x, lambda s: nn.softmax(jnp.where(seen[:, None, None], s, fill)))

    seen = SEEN.at[1].set(False)
    tree, weights = prepared(fn, X, seen)
    got, calls = ran(run_of(fn), tree, None, X, seen)
    assert calls == 1
    near(got[0], exact(weights, X, hidden=UNSEEN)[0])
    if fill == -1e9:
        mean = np.asarray(X[1], np.float64).mean(0) @ weights["v"] @ weights["o"]
        near(got[1], np.broadcast_to(mean, got[1].shape))
    else:
        assert np.isnan(got[1]).all()


def test_programs_that_are_kept_hold_no_code_of_ours() -> None:
    tree, weights = prepared(by_einsum, X)
    batch, length = export.symbolic_shape("b,t")
    some = jax.ShapeDtypeStruct((batch, length, WIDE), jnp.float32)
    kept = export.export(jax.jit(run_of(by_einsum)), platforms=("cpu", "tpu"))(tree, None, some)
    assert "jaxcomp_" not in kept.mlir_module()
    near(kept.call(tree, None, X), exact(weights, X))
    near(kept.call(tree, None, X[:1, :2]), exact(weights, X[:1, :2]))


def test_grouped_queries_of_any_length() -> None:
    def fn(p, x):
        q, k, v = made(p, x)
        scores = jnp.einsum("bqngd,bknd->bngqk", q.reshape(*q.shape[:2], 2, 2, -1), k[:, :, :2])
        return joined(p, jnp.einsum("bngqk,bknd->bqngd", nn.softmax(scores / jnp.sqrt(8.0)), v[:, :, :2]))

    tree, weights = prepared(fn, X)
    (length,) = export.symbolic_shape("t")
    some = jax.ShapeDtypeStruct((2, length, WIDE), jnp.float32)
    kept = export.export(jax.jit(run_of(fn)))(tree, None, some)
    near(kept.call(tree, None, X), exact(weights, X, groups=2))


def test_reports_name_the_form() -> None:
    tree, _ = prepared(by_einsum, X)
    forms = {row.path: row.form for row in coverage(by_einsum, {})(tree, X).rows}
    products = {path for path in forms if path not in "qkvo"}
    assert len(products) == 2
    assert {path for path, form in forms.items() if form == ONE_PASS == "one pass on cpu"} == products
    assert ONE_PASS in str(jc.activations.coverage(by_einsum, {})(tree, X))
    plain = {row.form for row in coverage(by_einsum, {})(PARAMS, X).rows}
    assert ONE_PASS not in plain
