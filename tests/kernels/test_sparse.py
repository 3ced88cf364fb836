"""Sparse weights: the same bits, numpy's products over odd shapes, and what prepares them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxcomp as jc
from jaxcomp.activations import coverage, quantize_function
from jaxcomp.activations.specs import Act, Dynamic
from jaxcomp.kernels import PreparedSparse, SparseWeight, llvm_calls, weight_only
from jaxcomp.kernels.forms import Product, form_of, forms_of
from jaxcomp.kernels.llvm_sparse import FEATURES
from jaxcomp.kernels.sparse import SHORT, sparse_parts
from jaxcomp.quantization import Int
from tests.marks import quick

pytest.importorskip("llvmlite")


def weight(features: int, length: int, *, kept: float = 0.2, coded: bool = False, dtype: str = "float32"):
    """A sparse weight and its dense matrix in float64: small integers, so that sums are exact."""
    rng = np.random.default_rng(features + length)
    numbers = np.where(rng.random((features, length)) < kept, rng.integers(-8, 9, (features, length)), 0)
    scale = 2.0 ** rng.integers(-3, 3, (features, 1)) if coded else np.ones((1, 1))
    dense = numbers * scale
    parts = [jnp.asarray(v) for v in sparse_parts(dense, numbers.astype(np.int8 if coded else dtype))]
    scales = jnp.asarray(scale, jnp.float32) if coded else None
    return SparseWeight(*parts, scales, Int(8) if coded else None, length, jnp.dtype(dtype)), dense


SHAPES = {
    "one row": (1, 33, 200),
    "one feature": (5, 1, 64),
    "few rows": (3, 20, 100),
    "a panel of 8": (8, 41, 64),
    "a panel of 16": (11, FEATURES * 3, 64),
    "a panel of 32": (32, 40, 50),
    "panels that are not full": (75, 37, 64),
    "more chunks than threads": (40, FEATURES * 40 + 3, 32),
    "one column": (4, 20, 1),
    "longer than short positions": (2, 3, SHORT + 40),
}


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("name", quick(SHAPES, "one row", "few rows", "panels that are not full", "one column"))
def test_it_is_exact_where_sums_are(name, coded) -> None:
    rows, features, length = SHAPES[name]
    w, dense = weight(features, length, coded=coded)
    assert w.index.dtype == (jnp.uint16 if length <= SHORT else jnp.int32)
    x = np.random.default_rng(1).integers(-3, 4, (rows, length)).astype(np.float32)
    wanted = (x.astype(np.float64) @ dense.T).tolist()
    for form in (None, "llvm", "whole"):
        assert jax.jit(partial(weight_only, form=form))(jnp.asarray(x), w).tolist() == wanted
    assert np.asarray(w.dense(), np.float64).tolist() == dense.tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_of_weights_and_activations(dtype) -> None:
    w, dense = weight(20, 60, dtype=dtype)
    x = jnp.asarray(np.random.default_rng(1).integers(-3, 4, (3, 60)), dtype)
    got = weight_only(x, w, form="llvm")
    assert got.dtype == dtype
    assert got.tolist() == jnp.asarray(np.asarray(x, np.float64) @ dense.T, dtype).tolist()


def test_features_of_zeros_and_weights_of_zeros() -> None:
    w, dense = weight(40, 16, kept=0.02)
    assert (np.diff(w.starts) == 0).any()
    x = jnp.ones((2, 16))
    assert weight_only(x, w, form="llvm").tolist() == [dense.sum(1).tolist()] * 2
    nothing, _ = weight(4, 16, kept=0.0)
    assert weight_only(x, nothing).tolist() == np.zeros((2, 4)).tolist()
    with pytest.raises(ValueError, match="'llvm' does not run on cpu here: no number of the weight is kept; 'whole'"):
        weight_only(x, nothing, form="llvm")
    assert weight_only(jnp.ones((0, 16)), w).shape == (0, 40)


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_not_finite_stays_in_its_row(rows) -> None:
    w, _ = weight(5, 64, kept=1.0)
    x = jnp.ones((rows, 64)).at[0, 3].set(np.nan)
    got = np.asarray(weight_only(x, w, form="llvm"))
    assert np.isnan(got[0]).sum() == np.count_nonzero(np.asarray(w.dense())[:, 3])
    assert np.isfinite(got[1:]).all()


def test_gradients_and_maps() -> None:
    w, dense = weight(20, 64)
    x = jnp.asarray(np.random.default_rng(1).integers(-3, 4, (2, 64)), jnp.float32)
    assert jax.grad(lambda x: weight_only(x, w).sum())(x).tolist() == [dense.sum(0).tolist()] * 2
    more = jnp.stack([x, 2 * x])
    assert jax.vmap(weight_only, (0, None))(more, w).tolist() == (np.asarray(more, np.float64) @ dense.T).tolist()


def test_forms_of_sparse_weights() -> None:
    w, _ = weight(20, 64)
    p = Product(9, jnp.dtype(jnp.float32), w, device="some")
    assert forms_of(9, jnp.dtype(jnp.float32), w) == "llvm on cpu, whole on cuda, rocm and tpu"
    assert form_of("cpu", p._replace(kept=True)) == form_of("cpu", p._replace(parted=True)) == "whole"
    for backend, form in (("cpu", "sums"), ("cpu", "chunks"), ("cuda", "triton"), ("tpu", "mosaic")):
        with pytest.raises(
            ValueError, match=r"it is for packed matrices, and the weight is sparse; '(llvm|whole)' runs"
        ):
            form_of(backend, p._replace(rows=1), form)
    x = jnp.ones((3, 64))
    assert "jaxcomp_sparse" in jax.jit(weight_only).lower(x, w).as_text()
    assert "jaxcomp_sparse" not in export.export(jax.jit(weight_only))(x, w).mlir_module()


# Prepared


def dense(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"].T


def heads(p, x):
    q = jnp.einsum("bld,dhk->blhk", x, p["q"])
    return jnp.einsum("blhk,hkd->bld", q, p["out"])


PROGRAMS = {
    dense: ({"up": (40, 24), "down": (7, 24)}, (3, 40)),
    heads: ({"q": (16, 4, 8), "out": (4, 8, 16)}, (2, 1, 16)),
}
GRIDS = {"floats": None, "Int8": jc.Int(8), "Int4": jc.Int(4), "asymmetric": jc.Int(8, symmetric=False)}


def pruned(fn, grid):
    shapes, of_x = PROGRAMS[fn]
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=of_x), jnp.float32)
    roles = jc.roles(fn)(params, x)
    steps = [jc.prune(0.9)] + ([] if grid is None else [jc.quantize(grid, roles=roles)])
    compress = jc.chain(*steps)
    return jc.pack(compress.apply(compress.init(params), params)), x


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("fn", PROGRAMS, ids=lambda fn: fn.__name__)
def test_a_prepared_tree_is_the_tree(fn, grid, tmp_path) -> None:
    tree, x = pruned(fn, GRIDS[grid])
    ready = jc.prepare(tree, fn, x, sparse=0.8)
    assert all(isinstance(leaf, PreparedSparse) for leaf in ready.values())
    codes = {leaf.kept.dtype.name for leaf in ready.values()}
    assert codes == ({"int8"} if grid in ("Int8", "Int4") else {"float32"})
    for name, leaf in jc.materialize(ready).items():
        assert leaf.tobytes() == jc.materialize(tree)[name].tobytes()
    assert jc.prepare(ready, fn, x)["q" if "q" in ready else "up"] is ready["q" if "q" in ready else "up"]
    run = jax.jit(lambda tree, x: quantize_function(fn, {})(tree, None, x))
    np.testing.assert_allclose(run(ready, x), fn(jc.materialize(tree), x), rtol=2e-5, atol=2e-5)
    report = coverage(fn, {})(ready, x)
    assert [(row.done, row.form.split(" ")[0]) for row in report.rows] == [("weight-only", "llvm")] * 2
    jc.save(tmp_path / "ready.safetensors", ready)
    again = jc.load(tmp_path / "ready.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure(ready)
    assert (run(again, x) == run(ready, x)).all()


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("grid", ["floats", "Int8"])
def test_rounded_activations_meet_the_same_weight(grid, integer) -> None:
    tree, x = pruned(dense, GRIDS[grid])
    rules = {".*": Act(8, range=Dynamic())}
    q = quantize_function(dense, rules, integer=integer)
    got, wanted = q(jc.prepare(tree, dense, x, sparse=0.8), None, x), q(tree, None, x)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def test_less_sparse_leaves_are_packed_and_said() -> None:
    tree, x = pruned(dense, jc.Int(4))
    both = jc.prepare({**tree, "down": pruned(dense, None)[0]["down"]}, dense, x, sparse=0.8)
    assert {type(leaf).__name__ for leaf in both.values()} == {"PreparedSparse"}
    assert not any(isinstance(leaf, PreparedSparse) for leaf in jc.prepare(tree, dense, x, sparse=0.99).values())
    floats, _ = pruned(dense, None)
    with pytest.raises(
        ValueError, match=r"'down': 89.9% of it is zero, 99.0% are wanted; it is floats under a mask, not codes"
    ):
        jc.prepare(floats, dense, x, sparse=0.99)
    with pytest.raises(ValueError, match="zero is not known inside jit; prepare outside"):
        jax.jit(lambda tree: jc.prepare(tree, dense, x, sparse=0.8))(floats)


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


@pytest.mark.parametrize("grid", [None, jc.Int(8)], ids=["floats", "Int8"])
def test_layers_that_are_stacked_are_padded_to_the_fullest(grid) -> None:
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 16, 16)), jnp.float32).at[1].multiply(9.0)}
    x = jnp.ones((2, 16))
    steps = [jc.prune(0.9, scope=jc.Global())] + (
        [jc.quantize(grid, roles=jc.roles(scanned)(params, x))] if grid else []
    )
    compress = jc.chain(*steps)
    tree = jc.pack(compress.apply(compress.init(params), params))
    ready = jc.prepare(tree, scanned, x, sparse=0.8)
    leaf = ready["w"]
    assert isinstance(leaf, PreparedSparse)
    assert leaf.kept.shape == (3, int(leaf.starts[1, -1]))
    assert leaf.starts[0, -1] < leaf.starts[1, -1]
    assert leaf.materialize().tobytes() == jc.materialize(tree)["w"].tobytes()
    run = jax.jit(lambda tree, x: quantize_function(scanned, {})(tree, None, x))
    assert "jaxcomp_sparse" in run.lower(ready, x).as_text()
    np.testing.assert_allclose(run(ready, x), scanned(jc.materialize(tree), x), rtol=2e-5, atol=2e-5)


def experts(p, x):
    return jnp.einsum("ebd,edh->ebh", jnp.einsum("bd,edh->ebh", x, p["in"]), p["out"])


@pytest.mark.parametrize("grid", [None, jc.Int(8)], ids=["floats", "Int8"])
def test_experts_are_multiplied_in_turn(grid) -> None:
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(3, 16, 16)), jnp.float32) for name in ("in", "out")}
    x = jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)
    steps = [jc.prune(0.9, scope=jc.Global())] + (
        [jc.quantize(grid, roles=jc.roles(experts)(params, x))] if grid else []
    )
    compress = jc.chain(*steps)
    tree = jc.pack(compress.apply(compress.init(params), params))
    ready = jc.prepare(tree, experts, x, sparse=0.8)
    assert all(isinstance(leaf, PreparedSparse) for leaf in ready.values())
    run = jax.jit(lambda tree, x: quantize_function(experts, {})(tree, None, x))
    assert "jaxcomp_sparse" in run.lower(ready, x).as_text()
    np.testing.assert_allclose(run(ready, x), experts(jc.materialize(tree), x), rtol=2e-5, atol=2e-5)
    own, ours = (
        jax.grad(lambda x, f=f: (f(x) ** 2).sum())(x)
        for f in (partial(experts, jc.materialize(tree)), partial(run, ready))
    )
    np.testing.assert_allclose(ours, own, rtol=1e-4, atol=1e-4)
    elsewhere = run.trace(ready, x).lower(lowering_platforms=("tpu",)).as_text()
    assert "jaxcomp_sparse" not in elsewhere


def test_what_is_asked_in_vain_says_what_to_do(monkeypatch) -> None:
    tree, x = pruned(dense, None)
    for part in (0, 1.5, -1):
        with pytest.raises(ValueError, match=r"prepare: sparse must be a part of a leaf, in \(0, 1\]"):
            jc.prepare(tree, dense, x, sparse=part)
    ready = jc.prepare(tree, dense, x, sparse=0.8)

    def turned(p, x):
        return jnp.tanh(x @ p["up"])[:, :7] @ p["down"]

    with pytest.raises(ValueError, match="'down' was prepared for the site"):
        quantize_function(turned, {})(ready, None, x)
    monkeypatch.setattr(llvm_calls, "PACKAGE", "llvmlite_that_is_not_there")
    with pytest.raises(ValueError, match=r"sparse=0.8 is for products .* pip install 'jaxcomp\[cpu\]'"):
        jc.prepare(tree, dense, x, sparse=0.8)
    np.testing.assert_allclose(
        quantize_function(dense, {})(ready, None, x), dense(jc.materialize(tree), x), rtol=2e-5, atol=2e-5
    )
