"""Products of matrices of codes: numpy's sums, whichever way the second lies."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp.kernels import llvm_panels
from jaxcomp.kernels.llvm_dots import FEWEST, llvm_dot, llvm_panel_dot, refusal
from tests.kernels.test_panels import weight, window
from tests.marks import quick

pytest.importorskip("llvmlite")
runs_here = pytest.mark.skipif(bool(llvm_panels.refusal_of_codes()), reason=str(llvm_panels.refusal_of_codes()))
SIZES = {
    "odd": (2, 9, 33, 21),
    "fewer features than a panel": (1, 3, 70, 5),
    "shorter than a vector": (3, 7, 5, 17),
    "more rows than a thread takes": (2, 200, 40, 33),
    "whole panels": (1, 96, 64, 48),
}


def matrices(batch, rows, length, features, reach, *, last, ends=False):
    rng = np.random.default_rng(rows + length)
    shape = (batch, features, length) if last else (batch, length, features)
    if ends:
        return np.full((batch, rows, length), -128), np.full(shape, -reach)
    return rng.integers(-128, 128, (batch, rows, length)), rng.integers(-reach, reach, shape)


@runs_here
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("reach", [8, 16, 17, 128])
@pytest.mark.parametrize("name", quick(SIZES, "odd", "more rows than a thread takes"))
def test_it_is_numpys_product(name, reach, last, ends) -> None:
    a, b = matrices(*SIZES[name], reach, last=last, ends=ends)
    run = jax.jit(partial(llvm_dot, reach=reach, last=last))
    sums, totals = run(jnp.asarray(a, jnp.int8), jnp.asarray(b, jnp.int8))
    assert sums.dtype == totals.dtype == jnp.int32
    assert sums.tolist() == (a @ (np.swapaxes(b, 1, 2) if last else b)).tolist()
    assert totals.tolist() == b.sum(2 if last else 1).tolist()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("reach", [16, 128])
@pytest.mark.parametrize("name", quick(SIZES, "odd", "more rows than a thread takes"))
def test_every_processor_gives_the_same(name, reach, last, processor) -> None:
    a, b = matrices(*SIZES[name], reach, last=last)
    sums, totals = llvm_dot(jnp.asarray(a, jnp.int8), jnp.asarray(b, jnp.int8), reach, last=last)
    assert sums.tolist() == (a @ (np.swapaxes(b, 1, 2) if last else b)).tolist()
    assert totals.tolist() == b.sum(2 if last else 1).tolist()


@runs_here
@settings(max_examples=25)
@given(*[st.integers(1, n) for n in (3, 20, 70, 40)], st.sampled_from([8, 100]), st.booleans())
def test_any_sizes(batch, rows, length, features, reach, last) -> None:
    a, b = matrices(batch, rows, length, features, reach, last=last)
    sums, totals = llvm_dot(jnp.asarray(a, jnp.int8), jnp.asarray(b, jnp.int8), reach, last=last)
    assert sums.tolist() == (a @ (np.swapaxes(b, 1, 2) if last else b)).tolist()
    assert totals.tolist() == b.sum(2 if last else 1).tolist()


@runs_here
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows", [1, 70])
def test_by_a_weight_in_panels(rows, bits) -> None:
    w, numbers = weight(window((1,)), 21, 37, bits)
    a, _ = matrices(1, rows, 37, 21, 8, last=True)
    got = jax.jit(llvm_panel_dot)(jnp.asarray(a[0], jnp.int8), w)
    assert got.tolist() == (a[0] @ numbers.reshape(21, 37).T).tolist()


def test_what_it_does_not_take(monkeypatch) -> None:
    monkeypatch.setattr(llvm_panels, "features", lambda: frozenset({"avx2"}))
    assert refusal(1, 128, 384, 384) is None
    for few in ((1, FEWEST, 384, 384), (1, 128, 8, 384), (1, 128, 384, 8), (1, 65, 32, 32)):
        assert "they are few" in (refusal(*few) or "")
    monkeypatch.setattr(llvm_panels, "features", lambda: frozenset({"neon"}))
    assert "AVX2" in (refusal(1, 128, 384, 384) or "")
