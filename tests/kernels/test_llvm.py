"""Code of our own on a CPU: numpy's products over odd shapes, on threads, in each kind of program."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxcomp as jc
from jaxcomp.kernels import llvm_calls, weight_only
from jaxcomp.kernels.forms import Product, form_of, forms_of
from jaxcomp.kernels.llvm_products import refusal
from jaxcomp.kernels.llvm_tiles import FEATURES, PANEL
from jaxcomp.quantization import NF4
from tests.kernels.weights import Case, activations, weight_of
from tests.marks import quick

pytest.importorskip("llvmlite")

run = jax.jit(partial(weight_only, form="llvm"))
CASES = {
    "one row": Case(1, 64, 256, 4, 128),
    "one row of bytes": Case(1, 33, 200, 8),
    "two, ragged features and length, zero points": Case(2, 70, 300, 4, 128, zero=True),
    "a panel and one more": Case(PANEL + 1, 33, 200, 8),
    "bytes in groups, zero points": Case(2 * PANEL, 41, 384, 8, 128, zero=True),
    "groups longer than blocks": Case(3, 40, 600, 4, 256, zero=True),
    "blocks longer than groups": Case(5, 48, 512, 4, 64, block=256),
    "groups across blocks": Case(3, 40, 500, 4, 96, zero=True),
    "more chunks than threads": Case(1, FEATURES * 40 + 3, 128, 4, 64),
    "one feature": Case(6, 1, 64, 8),
    "2 bits": Case(7, 40, 384, 2, 96, zero=True),
    "3 bits": Case(3, 40, 700, 3),
    "5 bits": Case(4, 40, 384, 5, 128, zero=True),
    "6 bits": Case(2, 40, 500, 6, 128),
    "7 bits": Case(9, 20, 300, 7),
    "shorter than a block": Case(3, 20, 50, 4),
    "shorter than a vector": Case(3, 20, 9, 8),
}
NAMES = (
    "one row",
    "one row of bytes",
    "two, ragged features and length, zero points",
    "a panel and one more",
    "3 bits",
)


@pytest.mark.parametrize("name", quick(CASES, *NAMES))
def test_it_is_exact_where_sums_are(name) -> None:
    w, dense = weight_of(CASES[name])
    x = activations(CASES[name], jnp.float32, whole=True)
    assert run(x, w).tolist() == (np.asarray(x, np.float64) @ dense.T).tolist()


@pytest.mark.parametrize("rows", [1, PANEL])
@pytest.mark.parametrize("dtype", quick(["float32", "bfloat16", "float16"], "bfloat16"))
def test_it_rounds_its_sums_alone(rows, dtype) -> None:
    case = Case(rows, 20, 4096, 4, 32, zero=True)
    w, dense = weight_of(case)
    x = activations(case, dtype)
    got = jax.jit(partial(weight_only, form="llvm", dtype=jnp.dtype("float32")))(x, w)
    assert run(x, w).dtype == dtype
    exact = np.asarray(x, np.float64)
    bound = case.length * 2.0**-24 * (np.abs(exact) @ (np.abs(dense) + 16 * 8).T)  # codes are shifted after the sums
    assert (np.abs(np.asarray(got, np.float64) - exact @ dense.T) <= bound).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("odd", [np.inf, np.nan])
def test_what_is_not_finite_stays_in_its_row(bits, odd) -> None:
    case = Case(PANEL + 1, 5, 64, bits)
    w, _ = weight_of(case)
    x = activations(case, jnp.float32).at[2, 3].set(odd)
    got = np.asarray(run(x, w))
    assert not np.isfinite(got[2]).any()
    assert np.isfinite(np.delete(got, 2, 0)).all()


def test_threads_that_call_at_once_get_their_own_products() -> None:
    case = Case(1, FEATURES * 30 + 1, 512, 4, 64)
    w, dense = weight_of(case)
    xs = [activations(case, jnp.float32, whole=True, seed=i) for i in range(8)]
    wanted = [(np.asarray(x, np.float64) @ dense.T).tolist() for x in xs]

    def often(i: int) -> bool:
        return all(run(xs[i], w).tolist() == wanted[i] for _ in range(40))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(often, range(8)))


def test_gradients_maps_and_loops_hold_it() -> None:
    case = Case(1, 20, 256, 4, 64)
    w, dense = weight_of(case)
    x = activations(case, jnp.float32, whole=True)
    assert jax.grad(lambda x: run(x, w).sum())(x).tolist() == dense.sum(0, keepdims=True).tolist()
    more = jnp.stack([x, 2 * x, x])
    assert jax.vmap(run, (0, None))(more, w).tolist() == (np.asarray(more, np.float64) @ dense.T).tolist()
    square, matrix = weight_of(Case(1, 64, 64, 8))
    small = replace(square, scale=square.scale / 64)

    def steps(x, w):
        return jax.lax.scan(lambda x, _: (jnp.round(run(x, w)), None), x, length=3)[0]

    wanted = np.ones((1, 64))
    for _ in range(3):
        wanted = np.round(wanted @ matrix.T / 64)
    assert jax.jit(steps)(jnp.ones((1, 64)), small).tolist() == wanted.tolist()


def test_a_program_that_is_kept_does_not_call_it() -> None:
    case = Case(1, 20, 256, 4, 128)
    w, _ = weight_of(case)
    x = activations(case, jnp.float32)
    assert "jaxcomp_weight_only" in jax.jit(weight_only).lower(x, w).as_text()
    assert "jaxcomp_weight_only" not in export.export(jax.jit(weight_only))(x, w).mlir_module()
    p = Product(1, jnp.dtype(jnp.float32), w)
    assert form_of("cpu", p) == "llvm"
    assert form_of("cpu", p._replace(kept=True)) == form_of("cpu", p._replace(parted=True)) == "sums"


def test_without_the_package_the_plain_forms_run(monkeypatch) -> None:
    case = Case(1, 20, 256, 4, 128)
    w, dense = weight_of(case)
    monkeypatch.setattr(llvm_calls, "PACKAGE", "llvmlite_that_is_not_there")
    assert forms_of(1, jnp.dtype(jnp.float32), w) == "sums on cpu and rocm, triton on cuda, mosaic on tpu"
    assert forms_of(9, jnp.dtype(jnp.float32), w) == "chunks on cpu, triton on cuda, whole on rocm, mosaic on tpu"
    x = activations(case, jnp.float32, whole=True)
    assert jax.jit(lambda x, w: weight_only(x, w))(x, w).tolist() == (np.asarray(x, np.float64) @ dense.T).tolist()
    with pytest.raises(ValueError, match=r"'llvm' does not run on cpu here: .* is not installed: pip install 'jaxcomp"):
        jax.jit(partial(weight_only, form="llvm"))(x, w)


def test_what_it_cannot_read_it_names() -> None:
    w, _ = weight_of(Case(1, 16, 80, 3, 20))
    assert "only 4 neighbours share bytes and scales (3 bits, blocks of 128, groups of 20)" in refusal(w)
    assert "NF4 codes name levels" in refusal(replace(w, grid=NF4()))
    assert "a stack of shape (1, 16, 80)" in refusal(jax.tree.map(lambda v: v[None], w))
    assert "the scale is float64" in refusal(replace(w, scale=jax.ShapeDtypeStruct((16, 4), jnp.float64)))
    assert form_of("cpu", Product(PANEL, jnp.dtype(jnp.float32), w)) == "chunks"
    assert form_of("cpu", Product(100, jnp.dtype(jnp.float32), weight_of(CASES["one row"])[0])) == "chunks"


@pytest.mark.parametrize("rows", [1, 5])
def test_experts_are_multiplied_in_turn(rows) -> None:
    def experts(p, x):
        return jnp.einsum("ebd,edh->ebh", x, p["w"])

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 64, 16)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(3, rows, 64)), jnp.float32)
    tree = jc.pack(jc.quantize(jc.Int(4), per=jc.Groups(32, 1)).apply((), params))
    ready = jc.prepare(tree, experts, x)
    run = jax.jit(lambda tree, x: jc.quantize_function(experts, {})(tree, None, x))
    assert "jaxcomp_" in run.lower(ready, x).as_text()
    assert "jaxcomp_" not in run.trace(ready, x).lower(lowering_platforms=("tpu",)).as_text()
    np.testing.assert_allclose(run(ready, x), experts(jc.materialize(tree), x), rtol=1e-5, atol=1e-4)
    report = jc.coverage(experts, {})(ready, x)
    assert report.rows[0].form == "llvm on cpu, whole on cuda, rocm and tpu"
    many = jnp.ones((3, 100, 64))
    np.testing.assert_allclose(run(ready, many), experts(jc.materialize(tree), many), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("symmetric", [True, False])
def test_experts_of_rounded_activations_are_multiplied_in_turn(rows, symmetric) -> None:
    def experts(p, x):
        return jnp.einsum("ebd,edh->ebh", x, p["w"])

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 64, 16)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(3, rows, 64)), jnp.float32)
    tree = jc.pack(jc.quantize(jc.Int(4), per=jc.Groups(32, 1)).apply((), params))
    ready, rules = jc.prepare(tree, experts, x), {".*": jc.Act(8, symmetric=symmetric, range=jc.activations.Dynamic())}
    run = jax.jit(lambda tree, x: jc.quantize_function(experts, rules, integer=True)(tree, None, x))
    assert "jaxcomp_integers" in run.lower(ready, x).as_text()
    np.testing.assert_allclose(run(ready, x), run(tree, x), rtol=1e-5, atol=1e-4)
    assert jc.coverage(experts, rules, integer=True)(ready, x).rows[0].form.startswith("integers on cpu, ")
