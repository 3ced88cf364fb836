"""Attention in floats in code of our own beside numpy in float64: sizes, orders of axes, and what meets the scores."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp.kernels import llvm_calls, llvm_float_attention
from jaxcomp.kernels.llvm_float_attention import llvm_mixed, refusal
from jaxcomp.kernels.llvm_float_laid import QUERIES
from tests.kernels.float_attention import Case
from tests.marks import quick

pytest.importorskip("llvmlite")

GROUPED = {"scores": "bngqk", "q": "bqngd", "k": "bknd", "v": "bkne", "result": "bqnge"}
GROUPS = {"n": 2, "g": 3}
CASES = {
    "as einsum has it": Case(),
    "one key": Case({"k": 1}),
    "three keys": Case({"k": 3}),
    "keys of whole vectors": Case({"k": 32}),
    "keys of many vectors": Case({"k": 70}),
    "keys of more vectors than a panel has": Case({"k": 65, "d": 8, "e": 8}),
    "four queries": Case({"q": 4}),
    "six queries": Case({"q": 6}),
    "eight queries": Case({"q": 8}),
    "two blocks": Case({"q": QUERIES + 5, "b": 1, "k": 9, "h": 2}),
    "two whole blocks": Case({"q": 2 * QUERIES, "b": 1, "k": 5, "h": 1}, function="both", beside=("qk", "q")),
    "narrow": Case({"d": 8, "e": 8}),
    "24 numbers": Case({"d": 24, "e": 24}),
    "40 numbers": Case({"d": 40, "e": 40}),
    "64 numbers": Case({"d": 64, "e": 64}),
    "wider values": Case({"d": 16, "e": 40}),
    "narrower values": Case({"d": 40, "e": 8}),
    "very wide values": Case({"d": 8, "e": 144}),
    "heads first": Case(q="bhqd", k="bhkd", v="bhke", result="bhqe"),
    "heads first, but not in memory": Case(
        q="bhqd", k="bhkd", v="bhke", result="bhqe", memory={"q": "bqhd", "k": "bkhd", "v": "kbhe", "result": "qbhe"}
    ),
    "keys transposed": Case(q="bhqd", k="bhdk", v="bhke", result="bheq"),
    "queries last in memory": Case(memory={"q": "bhdq"}),
    "scores with keys first": Case(scores="kqhb", function="both", beside=("bk", "hqk")),
    "scores with keys within": Case(scores="qbkh", function="both", beside=("kb", "kq")),
    "scores with queries first": Case(scores="qhbk", function="hidden", beside=("bk",)),
    "one head": Case({"h": 1}),
    "one of all": Case({"h": 1, "b": 1}, function="hidden", beside=("bk",)),
    "no batch": Case(scores="qk", q="qd", k="kd", v="ke", result="qe"),
    "keys of all heads": Case(k="bkd", v="bke"),
    "keys of all sequences": Case(k="khd", v="kbhe"),
    "queries of all sequences": Case(q="qhd", scores="hbqk"),
    "grouped queries": Case(GROUPS, **GROUPED),
    "grouped queries, masked": Case(GROUPS, **GROUPED, function="both", beside=("bk", "ngqk")),
    "heads as queries": Case({"q": 2, "h": 9}, k="bkd", v="bke", queries="h", function="both", beside=("bk", "hk")),
    "a mask of keys": Case(function="hidden", beside=("bk",)),
    "a mask of queries and keys": Case(function="hidden", beside=("qk",)),
    "a mask of all": Case(function="hidden", beside=("kqhb",)),
    "a mask of queries": Case(function="hidden", beside=("bq",)),
    "one truth": Case(function="hidden", beside=("",)),
    "a bias of all": Case(function="moved", beside=("bhqk",)),
    "a bias of heads": Case(function="moved", beside=("h",)),
    "a bias of queries and keys": Case(function="moved", beside=("kq",)),
    "one bias": Case(function="moved", beside=("",)),
    "a mask and a bias": Case(function="both", beside=("bqk", "hk")),
}
NAMES = (
    "as einsum has it",
    "one key",
    "keys of many vectors",
    "two blocks",
    "two whole blocks",
    "wider values",
    "heads first, but not in memory",
    "scores with keys first",
    "grouped queries, masked",
    "heads as queries",
    "a mask of keys",
    "a bias of all",
)


@pytest.mark.parametrize("name", quick(CASES, *NAMES))
def test_it_is_numpys(name) -> None:
    CASES[name].check()


@pytest.mark.parametrize("name", quick(CASES, "as einsum has it", "grouped queries, masked", "24 numbers"))
def test_it_is_numpys_on_narrower_vectors(name, monkeypatch) -> None:
    monkeypatch.setattr(llvm_float_attention, "features", lambda: frozenset({"avx2"}))
    CASES[name].check()


LETTERS = st.permutations("bhqk").map("".join)


WIDTHS = st.sampled_from([8, 16, 24, 40, 64])


def orders(letters: str) -> st.SearchStrategy[str]:
    return st.permutations(letters).map("".join)


some = st.lists(st.sampled_from("bhqk"), unique=True).map("".join)
any_case = st.builds(
    Case,
    st.fixed_dictionaries(
        {
            "k": st.integers(1, 70),
            "q": st.integers(4, 9),
            "b": st.integers(1, 2),
            "h": st.integers(1, 3),
            "d": WIDTHS,
            "e": WIDTHS,
        }
    ),
    scores=orders("bhqk"),
    q=orders("bhqd"),
    k=orders("bhkd"),
    v=orders("bhke"),
    result=orders("bhqe"),
    beside=st.tuples(some.map(lambda axes: axes if "k" in axes else f"{axes}k"), some),
    function=st.just("both"),
    memory=st.just({}),
    queries=st.just("q"),
)


@settings(max_examples=6)
@given(any_case, st.integers(0, 9))
def test_any_shapes_and_orders(case, seed) -> None:
    case.check(seed)


@pytest.mark.slow
@settings(max_examples=100)
@given(any_case, st.integers(0, 9))
def test_many_shapes_and_orders(case, seed) -> None:
    case.check(seed)


QUERY, KEY = np.arange(150)[:, None], np.arange(200)[None]
MASKS = {
    "causal": KEY <= QUERY,
    "a window": (KEY <= QUERY) & (QUERY < KEY + 20),
    "the first keys": KEY + 0 * QUERY < 70,
    "the last keys": KEY + 0 * QUERY >= 192,
    "the last key": KEY + 0 * QUERY == 199,
    "every 60th key": (KEY + QUERY) % 60 == 0,
    "none for some queries": (KEY <= QUERY) & (QUERY % 50 > 10),
    "none": KEY < 0 * QUERY,
}
HIDDEN = {"hidden": True, "hidden where true": False, "hidden where not": False}


def hiding(function: str = "hidden", k: int = 200) -> Case:
    return Case({"q": 150, "k": k, "b": 1, "h": 2, "e": 24}, function=function, beside=("qk",))


@pytest.fixture(params=[False, True])
def wide(monkeypatch, request) -> None:
    """On vectors that all processors have, and on those of AVX-512."""
    if request.param and "avx512f" not in llvm_calls.features():
        pytest.skip("the processor has no AVX-512")
    monkeypatch.setattr(llvm_float_attention, "features", lambda: frozenset({"avx512f"} if request.param else ()))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("mask", quick(MASKS, "causal", "a window", "none for some queries"))
@pytest.mark.parametrize("function", quick(HIDDEN, "hidden"))
@pytest.mark.parametrize("k", quick([200, 192, 64, 65, 40], 200))
def test_what_a_mask_hides_from_many_queries(k, function, mask) -> None:
    case = hiding(function, k)
    q, *others, _ = case.drawn()
    truth = MASKS[mask][:, :k] == HIDDEN[function]
    got = case.run(q, *others, truth)
    np.testing.assert_allclose(got, case.exact(q, *others, truth), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("mask", quick(MASKS, "none for some queries"))
def test_queries_that_see_nothing_of_many_keys(mask) -> None:
    """By minus infinity they become NaN, as in numpy."""
    case = hiding("both")._replace(beside=("qk", "h"))
    q, k, v, *_ = case.drawn()
    bias = np.zeros(2, np.float32)
    with np.errstate(invalid="ignore"):
        exact = case.exact(q, k, v, MASKS[mask], bias)
    assert np.isnan(exact).all((0, 2, 3)).tolist() == (~MASKS[mask].any(1)).tolist()
    np.testing.assert_allclose(case.run(q, k, v, MASKS[mask], bias), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [-1e9, -np.inf])
@pytest.mark.parametrize("mask", quick(MASKS, "causal"))
def test_what_a_number_hides_from_many_queries(mask, shift) -> None:
    case = hiding("moved")
    q, *others, _ = case.drawn()
    beside = np.where(MASKS[mask], 0, shift).astype(np.float32)
    beside[:, 7] = 0.0  # of scores that are all hidden so, float32 knows nothing
    np.testing.assert_allclose(case.run(q, *others, beside), case.exact(q, *others, beside), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("wide")
def test_hidden_keys_are_not_multiplied_and_their_values_are_where_numpy_has_them() -> None:
    case = hiding()
    q, k, v, _ = case.drawn()
    mask = MASKS["causal"]
    k[0, 199, 0], v[0, 198, 1, 3], v[0, 70, 0, 5] = np.nan, np.nan, np.inf
    with np.errstate(invalid="ignore"):
        exact = case.exact(q, k, v, mask)
    assert np.isnan(exact).sum() == 150 + 70
    assert np.isposinf(exact).sum() == 80
    np.testing.assert_allclose(case.run(q, k, v, mask), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 30.0, 300.0])
def test_scores_of_any_size(size) -> None:
    case = CASES["as einsum has it"]
    q, *others = case.drawn(3)
    got, exact = case.run(size * q, *others), case.exact(size * q, *others)
    np.testing.assert_allclose(got, exact, rtol=0, atol=(1 + size) * 1e-5)


def test_what_is_no_number_is_where_numpy_has_it() -> None:
    case = Case(function="both", beside=("bqk", "h"))
    q, k, v, mask, bias = case.drawn()
    mask[0, 3], bias[:] = False, 0.0  # a row that sees nothing
    q[0, 5, 1, 2], k[1, 18, 0, 3] = np.nan, np.nan  # a query; the last key of a head
    v[1, 4, 2, 7], mask[1] = np.nan, True
    q[0, 6, 2], k[0, 4, 2, 0] = 1.0, np.inf
    got = case.run(q, k, v, mask, bias)
    with np.errstate(invalid="ignore"):
        exact = case.exact(q, k, v, mask, bias)
    assert np.isnan(exact[0, 3]).all()
    assert np.isnan(exact[0, 5, 1]).all()
    assert np.isnan(exact[1, :, 0]).all()
    assert np.isnan(exact[1, :, 2, 7]).all()
    assert np.isfinite(exact[1, :, 1]).all()
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5)


def test_what_is_hidden_by_a_large_number_is_the_mean() -> None:
    case = CASES["a mask of keys"]
    q, k, v, mask = case.drawn()
    mask[1] = False
    got = case.run(q, k, v, mask)
    np.testing.assert_allclose(got[1], np.broadcast_to(v[1].mean(0), got[1].shape), rtol=0, atol=1e-5)
    np.testing.assert_allclose(got, case.exact(q, k, v, mask), rtol=0, atol=1e-5)


def test_it_is_called_at_once_for_the_same_code() -> None:
    case = Case({"q": 5, "k": 11})
    given, run = case.drawn(), partial(llvm_mixed, case.how())
    text = jax.jit(run).lower(*given).compile().as_text()
    assert text.count('custom_call_target="jaxcomp_floats_') == 1
    kept = len(llvm_calls._KEPT)
    jax.jit(lambda *given: 2 * run(*given)).lower(*given)
    assert len(llvm_calls._KEPT) == kept


def test_what_it_cannot_run_it_names(monkeypatch) -> None:
    def why(sizes=None, widths=(16, 16)) -> str | None:
        return refusal(Case(sizes or {}).how(), widths)

    assert why() is None
    assert "it pays for 4 queries, and there are 3" in why({"q": 3})
    assert "whole vectors of 8, and have 12 and 16 numbers" in why(widths=(12, 16))
    assert "whole vectors of 8, and have 16 and 20 numbers" in why(widths=(16, 20))
    assert "there is nothing to attend to" in why({"k": 0})
    assert "there is nothing to attend to" in why({"b": 0})
    assert "there is nothing to attend to" in why(widths=(0, 16))
    (batch,) = jax.export.symbolic_shape("batch")
    assert "or it is any number" in why({"b": batch})
    monkeypatch.setattr(llvm_calls, "PACKAGE", "llvmlite_that_is_not_there")
    assert "is not installed" in why()
