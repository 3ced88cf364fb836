"""Prepared trees: the same bits, products on packed bytes in every kind of program, files; errors name sites."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic, coverage, quantize_function
from jaxcomp.kernels import Prepared
from tests.kernels.test_weight_only import sizes
from tests.marks import quick

pytestmark = pytest.mark.usefixtures("jax_defaults")
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def dense(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"].T


def heads(p, x):
    q = jnp.einsum("btd,dhk->bthk", x, p["q"])
    return jnp.einsum("bthk,hkd->btd", q, p["out"])


def experts(p, x):
    return jnp.einsum("ebd,edf->ebf", x, p["w"])


def weight_first(p, x):
    return jnp.einsum("dn,bd->nb", p["w"], x)


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.clip(x @ w, -1, 1), None), x, p["w"])[0]


def relaid(p, x):
    return x @ p["w"].reshape(24, 16).astype(jnp.float32).T


def rematted(p, x):
    return jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p["up"], x)


PROGRAMS = {
    dense: ({"up": (40, 24), "down": (7, 24)}, (3, 40)),
    heads: ({"q": (16, 4, 8), "out": (4, 8, 16)}, (2, 1, 16)),
    experts: ({"w": (3, 16, 5)}, (3, 2, 16)),
    weight_first: ({"w": (16, 5)}, (1, 16)),
    scanned: ({"w": (3, 16, 16)}, (1, 16)),
    relaid: ({"w": (24, 4, 4)}, (2, 16)),
    rematted: ({"up": (33, 5)}, (1, 33)),
}
GRIDS = {"Int4": jc.Int(4), "Int8a": jc.Int(8, symmetric=False), "NF4": jc.quantization.NF4()}


def quantized(fn, shapes, x, grid=jc.Int(4)):  # noqa: B008 - frozen
    params = {name: normal(*shape) for name, shape in shapes.items()}
    compress = jc.quantize(grid, per=jc.Channels(), roles=jc.roles(fn)(params, x))
    return compress.apply(compress.init(params), params)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), jc.materialize(a), jc.materialize(b)))


@pytest.mark.parametrize("fn", quick(PROGRAMS, dense, heads, scanned), ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("grid", quick(GRIDS, "Int4"))
def test_a_prepared_tree_is_the_tree(fn, grid) -> None:
    shapes, of_x = PROGRAMS[fn]
    x = normal(*of_x)
    tree = quantized(fn, shapes, x, GRIDS[grid])
    ready = jc.prepare(tree, fn, x)
    assert all(isinstance(leaf, Prepared) for leaf in ready.values())
    assert same(ready, tree)
    assert same(jc.prepare(jc.pack(tree), fn, x), tree)
    assert jc.pack(ready)["w" if "w" in ready else "up" if "up" in ready else "q"].codes.dtype in ("uint8", "int8")
    run = jax.jit(lambda tree, x: quantize_function(fn, {})(tree, None, x))
    np.testing.assert_allclose(run(ready, x), fn(jc.materialize(tree), x), rtol=2e-5, atol=2e-4)  # of sums up to 50
    report = coverage(fn, {})(ready, x)
    assert [row.done for row in report.rows] == ["weight-only"] * len(report.rows)
    assert all(row.form for row in report.rows)


@pytest.mark.parametrize("fn", [scanned, pytest.param(heads, marks=pytest.mark.slow)], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("integer", [False, True])
def test_rounded_activations_meet_the_same_codes(fn, integer) -> None:
    shapes, of_x = PROGRAMS[fn]
    x = normal(*of_x)
    tree = jc.pack(quantized(fn, shapes, x, jc.Int(8, symmetric=False)))
    rules = {".*": Act(8, range=Dynamic())}
    q = quantize_function(fn, rules, integer=integer, strict=integer)
    got, wanted = q(jc.prepare(tree, fn, x), None, x), q(tree, None, x)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=0 if integer else 1e-5)


def test_masks_and_groups() -> None:
    params, x = {"w": normal(64, 6)}, normal(1, 64)

    def fn(p, x):
        return x @ p["w"]

    roles = jc.roles(fn)(params, x)
    for grid in (jc.Int(4), jc.Int(4, symmetric=False), jc.quantization.NF4()):
        compress = jc.chain(jc.prune(0.5), jc.quantize(grid, per=jc.Groups(32), roles=roles))
        tree = compress.apply(compress.init(params), params)
        ready = jc.prepare(tree, fn, x)
        assert isinstance(ready["w"], Prepared)
        assert same(ready, tree)
        got = quantize_function(fn, {})(ready, None, x)
        np.testing.assert_allclose(got, fn(jc.materialize(tree), x), rtol=1e-5, atol=1e-5)


def test_a_shared_weight_runs_packed_where_it_lies_right() -> None:
    def tied(p, tokens):
        return jnp.tanh(p["table"][tokens]) @ p["table"].T

    params, tokens = {"table": normal(12, 16)}, jnp.array([3, 5])
    tree = jc.quantize(jc.Int(8), per=jc.Tensor()).apply((), params)
    ready = jc.prepare(tree, tied, tokens)
    for integer in (False, True):
        got = quantize_function(tied, {}, integer=integer)(ready, None, tokens)
        np.testing.assert_allclose(got, tied(jc.materialize(tree), tokens), rtol=1e-5, atol=1e-5)


def test_both_ways_of_one_weight() -> None:
    def there_and_back(p, x):
        return (x @ p["w"]) @ p["w"].T

    params, x = {"w": normal(16, 16)}, normal(1, 16)
    tree = jc.quantize(jc.Int(8)).apply((), params)
    ready = jc.prepare(tree, there_and_back, x)
    got = quantize_function(there_and_back, {})(ready, None, x)
    np.testing.assert_allclose(got, there_and_back(jc.materialize(tree), x), rtol=1e-5, atol=1e-5)
    report = coverage(there_and_back, {})(ready, x)
    assert [row.done for row in report.rows] == ["weight-only", "exact"]


def test_no_dense_weight_in_a_scan_of_layers() -> None:
    x = normal(1, 256)
    tree = quantized(scanned, {"w": (3, 256, 256)}, x)
    ready = jc.prepare(tree, scanned, x)
    program = jax.jit(lambda tree, x: quantize_function(scanned, {})(tree, None, x)).lower(ready, x).compile()
    assert not [n for kind, n in sizes(program.as_text()) if kind[0] == "f" and n >= 256 * 256]


def test_gradient_of_the_input() -> None:
    shapes, of_x = PROGRAMS[dense]
    x = normal(*of_x)
    tree = quantized(dense, shapes, x)
    ready = jc.prepare(tree, dense, x)
    got = jax.grad(lambda x: (quantize_function(dense, {})(ready, None, x) ** 2).sum())(x)
    wanted = jax.grad(lambda x: (dense(jc.materialize(tree), x) ** 2).sum())(x)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=4e-6 * float(abs(wanted).max()))


def test_files_hold_prepared_trees(tmp_path) -> None:
    shapes, of_x = PROGRAMS[dense]
    x = normal(*of_x)
    ready = jc.prepare(quantized(dense, shapes, x, jc.Int(4, symmetric=False)), dense, x)
    jc.save(tmp_path / "ready.safetensors", ready)
    again = jc.load(tmp_path / "ready.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure(ready)
    run = quantize_function(dense, {})
    assert (run(again, None, x) == run(ready, None, x)).all()


def test_what_cannot_be_prepared_says_why() -> None:
    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    params, x = {"w": normal(16, 8), "v": normal(8, 8)}, normal(1, 16)
    with pytest.raises(ValueError, match=r"no leaf of this tree can be laid out \(it has no compressed leaf\)"):
        jc.prepare(params, fn, x)
    only = jc.quantize(jc.Int(8), where="v").apply((), params)
    assert isinstance(jc.prepare(only, fn, x)["v"], Prepared)
    signs = jc.quantize(jc.Int(1)).apply((), params)
    with pytest.raises(ValueError, match="'w': a weight on Int"):
        jc.prepare(signs, fn, x)
    ready = jc.prepare(jc.quantize(jc.Int(8)).apply((), params), fn, x)

    def other(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"].T

    with pytest.raises(ValueError, match=r"'v' was prepared for the site 'v', .* the site 'v' of this function sums"):
        quantize_function(other, {})(ready, None, x)
    with pytest.raises(ValueError, match="prepare: 'v' was prepared for the site 'v'"):
        jc.prepare(ready, other, x)
