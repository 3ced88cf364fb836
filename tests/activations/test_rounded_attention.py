"""Attention whose products run on integers, in one pass: that of the codes but for a weight here and there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax, nn

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, Float8, between, coverage
from jaxcomp.activations.between import ONE_PASS
from jaxcomp.core.layouts import Groups, Tensor, Tokens
from tests.activations.attention import (
    PARAMS,
    STYLES,
    X,
    by_einsum,
    causal,
    exact,
    grouped,
    ids,
    masked,
    prepared,
    ran,
    run_of,
)
from tests.marks import quick

pytest.importorskip("llvmlite")
pytestmark = pytest.mark.usefixtures("jax_defaults")
RULE = Act(8, range=Dynamic(), per=Tokens())
ACTS = {
    "8 bits": RULE,
    "symmetric": Act(8, symmetric=True, range=Dynamic(), per=Tokens()),
    "4 bits": Act(4, range=Dynamic(), per=Tokens()),
}
STEPS = {"8 bits": 1 / 255, "symmetric": 1 / 127, "4 bits": 1 / 15}


@pytest.fixture
def without(monkeypatch):
    """The same programs on codes, from when it is called."""

    def off():
        monkeypatch.setattr(between, "rounded_attention", lambda *_: None)
        jax.clear_caches()

    yield off
    jax.clear_caches()


def alone(q, k, v, of=nn.softmax):
    """Attention of what it is given; a product of a prepared weight stands before, which nothing rounds."""
    return jnp.einsum("bhqk,bkhd->bqhd", of(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4), v)


def of_drawn(p, q, k, v):
    return alone((q.reshape(*q.shape[:2], -1) @ p["o"]).reshape(q.shape), k, v)


def drawn():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, 40, 2, 16)), jnp.float32) for _ in range(3)]


def tree_of(*given):
    return prepared(of_drawn, *given, params={"o": PARAMS["o"]})[0]


BOTH, FIRST, SECOND = r".*dot_\d", "bqhd,.*", "bhqk,.*"
"""Paths of attention's products."""


@pytest.mark.parametrize("name", quick(ACTS, "8 bits", "4 bits"))
@pytest.mark.parametrize("fn", quick(STYLES, by_einsum, causal, grouped), **ids)
def test_it_is_that_of_the_codes(fn, name, without) -> None:
    """A weight that is nearly a half of a step may be the next one's: exponentials are approximated."""
    args, _ = STYLES[fn]
    tree, _ = prepared(fn, X, *args)
    run = run_of(fn, {".*": ACTS[name]})
    got, calls = ran(run, tree, None, X, *args)
    assert calls == 1
    without()
    wanted, calls = ran(run_of(fn, {".*": ACTS[name]}), tree, None, X, *args)
    assert calls == 0
    apart = np.abs(got - wanted)
    assert apart.max() < 4 * STEPS[name] * np.abs(wanted).max()
    assert np.median(apart) < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ACTS)
def test_operands_that_are_given_are_rounded_as_they_were(name, without) -> None:
    given = drawn()
    tree, rules = tree_of(*given), {BOTH: ACTS[name]}
    got, calls = ran(run_of(of_drawn, rules), tree, None, *given)
    assert calls == 1
    without()
    wanted, _ = ran(run_of(of_drawn, rules), tree, None, *given)
    apart = np.abs(got - wanted)
    assert apart.max() < STEPS[name]
    assert np.median(apart) < 1e-6


@pytest.mark.parametrize("fn", quick([masked, causal, by_einsum], masked), **ids)
def test_it_is_near_attention_of_numbers(fn) -> None:
    args, options = STYLES[fn]
    tree, weights = prepared(fn, X, *args)
    got, calls = ran(run_of(fn, {".*": RULE}), tree, None, X, *args)
    assert calls == 1
    wanted = exact(weights, X, **options)
    assert np.abs(got - wanted).max() < 0.03 * np.abs(wanted).max()


def test_a_report_says_so() -> None:
    tree, _ = prepared(by_einsum, X)
    report = coverage(by_einsum, {".*": RULE}, integer=True)(tree, X)
    forms = {row.path: (row.done, row.form) for row in report.rows if "dot" in row.path}
    assert forms
    assert set(forms.values()) == {("integer", ONE_PASS)}


OTHERS = {
    "one range": Act(8, range=Dynamic(), per=Tensor()),
    "groups": Act(8, range=Dynamic(), per=Groups(8)),
    "float8": Float8(),
}


@pytest.mark.parametrize("rules", [*({BOTH: act} for act in OTHERS.values()), {FIRST: RULE}, {SECOND: RULE}])
def test_others_run_as_before(rules) -> None:
    """Of weights that have no range for each query, or where one product alone is rounded."""
    given = drawn()
    _, calls = ran(run_of(of_drawn, rules), tree_of(*given), None, *given)
    assert calls == 0


@pytest.mark.parametrize("last", [Act(8), Act(8, symmetric=True), Act(4), RULE])
def test_static_ranges(last, without) -> None:
    given = drawn()
    tree = tree_of(*given)
    ranges = jc.activations.ranges_of(jax.jit(jc.calibrate(of_drawn))(jc.materialize(tree), *given))
    run = run_of(of_drawn, {FIRST: Act(8), SECOND: last})
    needed = {name: found for name, found in ranges.items() if last.needs_range or name.startswith("bqhd,")}
    got, calls = ran(run, tree, needed, *given)
    assert calls == 1
    without()
    wanted, calls = ran(run, tree, needed, *given)
    assert calls == 0
    apart = np.abs(got - wanted)
    assert apart.max() < (1 / 15 if last.bits == 4 else 1 / 255)
    assert np.median(apart) < 1e-6


@pytest.mark.parametrize("act", [RULE, Act(8)])
def test_in_layers_of_a_scan(act, without) -> None:
    """Each layer has ranges of its own."""

    def layers(p, x):
        return lax.scan(lambda x, p: (x + by_einsum(p, x), None), x, p)[0]

    params = {name: jnp.stack([w, -2 * w, w[::-1]]) for name, w in PARAMS.items()}
    tree, dense = prepared(layers, X, params=params)
    ranges = jc.activations.ranges_of(jax.jit(jc.calibrate(layers))(dense, X)) if act.needs_range else None
    got, calls = ran(run_of(layers, {".*": act}), tree, ranges, X)
    assert calls == 1
    without()
    wanted, calls = ran(run_of(layers, {".*": act}), tree, ranges, X)
    assert calls == 0
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()


def test_mapped_differentiated_and_kept() -> None:
    tree, _ = prepared(by_einsum, X)
    run = run_of(by_einsum, {".*": RULE})
    wanted = run(tree, None, X)
    mapped = jax.vmap(lambda x: run(tree, None, x[None])[0])(X)
    compiled = jax.jit(run)(tree, None, X)
    kept = export.export(jax.jit(run))(tree, None, X)
    assert "jaxcomp_floats" not in kept.mlir_module()
    for got in (mapped, compiled, kept.call(tree, None, X)):
        assert float(jnp.abs(got - wanted).max()) < 0.02 * float(jnp.abs(wanted).max())
    gradient = jax.jit(jax.grad(lambda x: (run(tree, None, x) ** 2).sum()))(X)
    assert np.isfinite(gradient).all()


def test_what_is_no_number_stays_in_its_row(without) -> None:
    q, k, v = drawn()
    q, v = q.at[1, 3, 0, 2].set(jnp.nan), v.at[0, 5, 1, 7].set(jnp.nan)
    tree, rules = tree_of(q, k, v), {BOTH: RULE}
    got, _ = ran(run_of(of_drawn, rules), tree, None, q, k, v)
    without()
    wanted, _ = ran(run_of(of_drawn, rules), tree, None, q, k, v)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
    assert 0 < np.isnan(got).mean() < 0.5
