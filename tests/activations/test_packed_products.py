"""Rounded activations beside prepared weights: the product of the plain leaf, from the bytes as they lie."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, coverage, quantize_function, ranges_of
from jaxcomp.core.layouts import Tokens
from tests.marks import quick


def right(p, x):
    return x @ p["w"]


def left(p, x):
    return (p["w"].T @ x.T).T


PROGRAMS = [right, left]
GRIDS = {
    "int8": (jc.Int(8), {}),
    "int8, groups": (jc.Int(8), {"per": jc.Groups(64)}),
    "int4": (jc.Int(4), {}),
    "int4, groups": (jc.Int(4), {"per": jc.Groups(64)}),
    "int4, groups, asymmetric": (jc.Int(4, symmetric=False), {"per": jc.Groups(64)}),
    "int3, groups": (jc.Int(3), {"per": jc.Groups(32)}),
}
ACTS = {
    "dynamic": Act(8, symmetric=True, range=Dynamic()),
    "dynamic, asymmetric": Act(8, range=Dynamic()),
    "a token": Act(8, symmetric=True, range=Dynamic(), per=Tokens()),
    "static": Act(8),
    "4 bits": Act(4, symmetric=True, range=Dynamic()),
}


def drawn(fn, grid, rows):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(256, 24)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(rows, 256)), jnp.float32)
    kind, given = GRIDS[grid]
    if "per" not in given:
        given = {"roles": jc.roles(fn)(params, x)}
    return jc.pack(jc.quantize(kind, **given).apply((), params)), x


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("act", quick(ACTS, "dynamic, asymmetric", "static"))
@pytest.mark.parametrize("grid", quick(GRIDS, "int8", "int4", "int4, groups, asymmetric"))
@pytest.mark.parametrize("fn", PROGRAMS, ids=lambda fn: fn.__name__)
def test_the_product_is_that_of_the_plain_leaf(fn, grid, act, rows) -> None:
    tree, x = drawn(fn, grid, rows)
    rules = {".*": ACTS[act]}
    ranges = ranges_of(jc.calibrate(fn)(jc.materialize(tree), x)) if act == "static" else None
    ready = jc.prepare(tree, fn, x)
    q = jax.jit(quantize_function(fn, rules, integer=True))
    got, wanted = (np.asarray(q(t, ranges, x), np.float64) for t in (ready, tree))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    report = coverage(fn, rules, integer=True)(ready, x)
    assert [row.done for row in report.rows] == ["integer"]
    assert report.rows[0].form.startswith("integers on cpu, ")


@pytest.mark.parametrize("fn", [right, left], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("grid", ["int8", "int4, groups"])
def test_gradients_are_those_of_the_plain_leaf(fn, grid) -> None:
    tree, x = drawn(fn, grid, 3)
    q = quantize_function(fn, {".*": ACTS["dynamic"]}, integer=True)
    got, wanted = (jax.grad(lambda x, t=t: (q(t, None, x) ** 2).sum())(x) for t in (jc.prepare(tree, fn, x), tree))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_row_that_holds_nan_is_nan_and_no_other() -> None:
    tree, x = drawn(right, "int4, groups", 3)
    q = jax.jit(quantize_function(right, {".*": ACTS["a token"]}, integer=True))
    got = np.asarray(q(jc.prepare(tree, right, x), None, x.at[1, 7].set(np.nan)))
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[[0, 2]]).all()


def turned(p, x):
    return x @ p["w"].T


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("fn", [right, turned], ids=lambda fn: fn.__name__)
def test_no_weight_of_int32_is_made(fn, rows, prepared) -> None:
    """XLA on CPU widens an int8 weight whole for a product of one row, and for one that the program turns first."""
    params = {"w": jax.random.normal(jax.random.key(0), (1024, 1024))}
    x = jax.random.normal(jax.random.key(1), (rows, 1024))
    tree = jc.pack(jc.quantize(jc.Int(8), roles=jc.roles(fn)(params, x)).apply((), params))
    ready = jc.prepare(tree, fn, x) if prepared else tree
    run = jax.jit(quantize_function(fn, {".*": ACTS["dynamic"]}, integer=True)).lower(ready, None, x).compile()
    assert run.memory_analysis().temp_size_in_bytes < 1 << 19
    fake = jax.jit(quantize_function(fn, {".*": ACTS["dynamic"]}))(tree, None, x)
    np.testing.assert_allclose(run(ready, None, x), fake, rtol=0, atol=1e-5 * float(jnp.abs(fake).max()))


def test_no_weight_in_groups_is_unpacked() -> None:
    params, x = {"w": jax.random.normal(jax.random.key(0), (1024, 1024))}, jnp.ones((1, 1024))
    tree = jc.prepare(jc.quantize(jc.Int(4), per=jc.Groups(128)).apply((), params), right, x)
    run = jax.jit(quantize_function(right, {".*": ACTS["dynamic"]}, integer=True)).lower(tree, None, x).compile()
    assert run.memory_analysis().temp_size_in_bytes < 1 << 17


def test_one_row_on_either_side_and_many_axes() -> None:
    def both(p, x):
        return jnp.einsum("hd,dk->hk", x, p["w"]) + jnp.einsum("dk,hd->hk", p["w"], x)

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(64, 24)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(1, 64)), jnp.float32)
    tree = jc.pack(jc.quantize(jc.Int(8), per=jc.Tensor()).apply((), params))
    rules = {".*": Act(8, range=Dynamic())}
    got = jax.jit(quantize_function(both, rules, integer=True))(tree, None, x)
    fake = jax.jit(quantize_function(both, rules))(tree, None, x)
    np.testing.assert_allclose(got, fake, rtol=1e-5, atol=1e-5)
