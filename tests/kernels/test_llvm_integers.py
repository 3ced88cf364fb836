"""Products of codes by packed weights in integers: numpy's over odd shapes, in each form that has them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from jaxcomp.kernels import llvm_amx_groups, llvm_calls, llvm_integers, weight_only
from jaxcomp.kernels.forms import Product, form_of, forms_of
from jaxcomp.kernels.llvm_integers import refusal
from jaxcomp.kernels.packing import PackedWeight
from tests.kernels.weights import Case, weight_of
from tests.marks import quick

pytest.importorskip("llvmlite")

INT8, INT16 = jnp.dtype(jnp.int8), jnp.dtype(jnp.int16)
REACH = {"int8": (-128, 127), "int16": (-255, 255), "int16, 255 apart": (-255, 0), "int16, about zero": (-20, 235)}
CASES = {
    "one row": Case(1, 64, 256, 4, 128),
    "bytes": Case(5, 33, 200, 8),
    "ragged, zero points": Case(7, 70, 300, 4, 128, zero=True),
    "one scale, zero points": Case(2, 20, 700, 4, zero=True),
    "bytes in groups, zero points": Case(8, 41, 384, 8, 128, zero=True),
    "groups longer than blocks": Case(3, 40, 600, 4, 256, zero=True),
    "groups across blocks": Case(3, 40, 500, 4, 96),
    "groups of 16": Case(5, 17, 256, 4, 16, zero=True),
    "more chunks than threads": Case(1, 643, 128, 4, 64),
    "many rows": Case(70, 9, 256, 4, 64),
    "2 bits": Case(7, 40, 384, 2, 96, zero=True),
    "3 bits": Case(3, 40, 700, 3),
    "5 bits": Case(4, 40, 384, 5, 128, zero=True),
    "6 bits": Case(2, 40, 500, 6, 128),
    "7 bits": Case(9, 20, 300, 7),
    "shorter than a block": Case(3, 20, 50, 4),
    "sixteen rows": Case(16, 40, 256, 4, 128),
    "more rows than a tile has, zero points": Case(33, 70, 300, 4, 128, zero=True),
    "the same, groups across blocks": Case(50, 37, 960, 4, 192, zero=True),
    "the same, bytes": Case(49, 19, 1000, 8, 320, zero=True),
    "the same, groups in blocks": Case(70, 41, 384, 4, 64, zero=True),
}


def drawn(case: Case, dtype: str, seed: int = 1) -> tuple[jax.Array, np.ndarray]:
    """Codes of activations that reach both ends, and in float64."""
    low, high = REACH[dtype]
    x = np.random.default_rng(seed).integers(low, high + 1, (case.rows, case.length))
    x[0, :3] = low, high, low
    return jnp.asarray(x, dtype.split(",")[0]), x.astype(np.float64)


def exact(got: jax.Array, x: np.ndarray, w: PackedWeight, dense: np.ndarray) -> bool:
    """Whether sums were: scales are powers of two, and what is rounded are float32 sums over codes from 0 on."""
    wanted, codes = x @ dense.T, 2.0**w.bits * np.asarray(w.scale, np.float64).max()
    bound = 2.0**-24 * (np.abs(x) @ (np.abs(dense) + (codes if w.bits < 8 or w.zero is not None else 0)).T)
    return bool((np.abs(np.asarray(got, np.float64) - wanted) <= bound).all())


@pytest.mark.parametrize("dtype", REACH)
@pytest.mark.parametrize("name", quick(CASES, "one row", "bytes", "ragged, zero points", "groups of 16", "3 bits"))
def test_it_is_numpys_product(name, dtype) -> None:
    w, dense = weight_of(CASES[name])
    codes, x = drawn(CASES[name], dtype)
    assert exact(jax.jit(partial(weight_only, form="integers"))(codes, w), x, w, dense)


@pytest.mark.parametrize("dtype", REACH)
@pytest.mark.parametrize("name", quick(CASES, "bytes", "ragged, zero points", "the same, groups across blocks"))
def test_every_processor_gives_it(name, dtype, processor) -> None:
    w, dense = weight_of(CASES[name])
    codes, x = drawn(CASES[name], dtype)
    assert exact(llvm_integers.llvm_integer_product(codes, w), x, w, dense)


def test_which_weights_meet_rows_in_tiles(processor) -> None:
    w, _ = weight_of(CASES["sixteen rows"])
    x = jnp.ones((16, 256), jnp.int8)
    for rows, tiles in ((16, processor == "amx"), (15, False)):
        text = jax.jit(lambda x: llvm_integers.llvm_integer_product(x, w)).lower(x[:rows]).as_text()
        assert ("@jaxcomp_integers_amx" in text) is tiles
    if processor != "amx":
        return
    others = {"one row": "tiles take 16 rows", "bytes": "several scales", "groups of 16": "groups of 16 do not fill"}
    for name, why in others.items():
        w, _ = weight_of(CASES[name])
        assert why in (llvm_amx_groups.refusal(1 if name == "one row" else 16, w) or "")


@pytest.mark.parametrize("bits", quick([2, 3, 4, 5, 6, 7, 8], 4, 7, 8))
@pytest.mark.parametrize("low", [True, False])
def test_no_sum_overflows_where_all_are_at_their_ends(bits, low, processor) -> None:
    """Without dot products of bytes pairs of products are summed in 16 bits, and these as often as they hold them."""
    w, _ = weight_of(Case(4, 2, 512, bits, 512))
    w = jax.tree.map(jnp.ones_like, w)
    ends = jnp.full_like(w.codes, -1 if bits < 8 else -128) if bits == 8 else jnp.full_like(w.codes, 255)
    w = jax.tree.unflatten(jax.tree.structure(w), [ends, *jax.tree.leaves(w)[1:]])
    number = float(np.asarray(w.numbers(), np.float64)[0, 0])
    for dtype, reach in REACH.items():
        x = jnp.full((4, 512), reach[0 if low else 1], dtype.split(",")[0])
        got = llvm_integers.llvm_integer_product(x, w)
        np.testing.assert_allclose(got, np.full((4, 2), 512 * number * reach[0 if low else 1]), rtol=1e-6, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 150), st.sampled_from([2, 4, 8]), st.integers(0, 9))
def test_any_shape(rows, features, length, bits, seed) -> None:
    case = Case(rows, features, length, bits, zero=bool(seed % 2))
    w, dense = weight_of(case, seed)
    codes, x = drawn(case._replace(length=max(length, 3)), list(REACH)[seed % len(REACH)], seed)
    assert exact(weight_only(codes[:, :length], w), x[:, :length], w, dense)


@pytest.mark.parametrize("dtype", REACH)
def test_other_processors_multiply_in_16_bits(monkeypatch, dtype) -> None:
    monkeypatch.setattr(llvm_integers, "features", frozenset)
    for name in ("ragged, zero points", "bytes"):
        w, dense = weight_of(CASES[name])
        codes, x = drawn(CASES[name], dtype)
        assert exact(jax.jit(lambda x, w: llvm_integers.llvm_integer_product(x, w))(codes, w), x, w, dense)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", REACH)
def test_bytes_meet_in_xlas_product_elsewhere(dtype, rows) -> None:
    case = Case(rows, 33, 200, 8, zero=True)
    w, dense = weight_of(case)
    codes, x = drawn(case, dtype)
    got = jax.jit(partial(weight_only, form="dot"))(codes, w)
    assert exact(got, x, w, dense)
    for name in ("cuda", "tpu"):
        text = export.export(jax.jit(weight_only), platforms=[name])(codes, w).mlir_module()
        assert "xi8>, tensor<33x200xi8>) -> tensor<" in text


@pytest.mark.parametrize("form", ["sums", "chunks", "whole", "llvm"])
def test_forms_of_floats_take_codes(form) -> None:
    w, dense = weight_of(CASES["one row"])
    codes, x = drawn(CASES["one row"], "int16")
    assert exact(jax.jit(partial(weight_only, form=form))(codes, w), x, w, dense)


def test_a_program_that_is_kept_or_parted_does_not_call_it() -> None:
    w, dense = weight_of(CASES["one row"])
    codes, x = drawn(CASES["one row"], "int8")
    assert "jaxcomp_integers" in jax.jit(weight_only).lower(codes, w).as_text()
    kept = export.export(jax.jit(weight_only))(codes, w)
    assert "jaxcomp_" not in kept.mlir_module()
    assert exact(kept.call(codes, w), x, w, dense)
    p = Product(1, INT8, w)
    assert form_of("cpu", p._replace(kept=True)) == form_of("cpu", p._replace(parted=True)) == "sums"


def test_without_the_package_and_with_short_runs_floats_run(monkeypatch) -> None:
    w, _ = weight_of(Case(2, 20, 256, 4, 8))
    assert "only 8 neighbours share bytes and scales" in refusal(w)
    assert forms_of(2, INT8, w).startswith("llvm on cpu, ")
    monkeypatch.setattr(llvm_calls, "PACKAGE", "llvmlite_that_is_not_there")
    assert forms_of(2, INT8, w).startswith("chunks on cpu, ")
    byte, _ = weight_of(Case(2, 20, 256, 8))
    assert forms_of(2, INT16, byte) == "dot on cpu, cuda, rocm and tpu" or forms_of(2, INT16, byte) == "dot"


def test_maps_and_stacks_hold_it() -> None:
    w, dense = weight_of(CASES["ragged, zero points"])
    codes, x = drawn(CASES["ragged, zero points"], "int8")
    more, each = jnp.stack([codes, -codes]), np.stack([x, np.where(x == -128, -128, -x)])
    assert exact(jax.jit(jax.vmap(weight_only, (0, None)))(more, w).reshape(-1, 70), each.reshape(-1, 300), w, dense)
    both = jax.jit(jax.vmap(weight_only))(more, jax.tree.map(lambda v: jnp.stack([v, v]), w))
    assert exact(both.reshape(-1, 70), each.reshape(-1, 300), w, dense)
