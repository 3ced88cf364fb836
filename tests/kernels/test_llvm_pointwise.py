"""Functions of one number in LLVM code beside numpy and scipy in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcomp.kernels.llvm_calls import Work, call, features
from jaxcomp.kernels.llvm_code import Types, counted, element
from jaxcomp.kernels.llvm_pointwise import WIDE, name_of, pointwise
from jaxcomp.trace.pointwise import Pointwise
from tests.trace.pointwise import read
from tests.trace.test_pointwise import ACTIVATIONS

pytest.importorskip("llvmlite")
special = pytest.importorskip("scipy.special")


@pytest.fixture(params=[8, WIDE])
def lanes(request) -> int:
    """Numbers of a vector."""
    if request.param == WIDE and "avx512f" not in features():
        pytest.skip("the processor has no AVX-512")
    return request.param


def _rows(function, lanes, b, operands, first, last) -> None:
    from llvmlite import ir

    x, y = operands
    kind = ir.VectorType(Types().f32, lanes)
    with counted(b, first, last) as row:
        at = b.mul(row, x.columns)
        value = pointwise(b, function, b.load(element(b, x, at, Types().f32), typ=kind, align=4))
        b.store(value, element(b, y, at, Types().f32), align=4)


def by_llvm(function: Pointwise, lanes: int, x: np.ndarray) -> np.ndarray:
    """Of each number."""
    rows = jnp.asarray(np.resize(x, (-(-x.size // lanes), lanes)), jnp.float32)
    work = Work(f"test_pointwise_{lanes}{name_of(function)}", partial(_rows, function, lanes), 4, by=0)
    y = jax.jit(lambda rows: call(work, jax.ShapeDtypeStruct(rows.shape, jnp.float32), rows))(rows)
    return np.asarray(y).reshape(-1)[: x.size]


EXACT = {
    jnp.exp: np.exp,
    jnp.expm1: np.expm1,
    jax.nn.sigmoid: special.expit,
    jnp.tanh: np.tanh,
    lax.erf: special.erf,
}
SIZES = np.geomspace(1e-6, 80, 4001, dtype=np.float32)


@pytest.mark.parametrize("fn", EXACT, ids=lambda fn: fn.__name__)
def test_elementary_functions(lanes, fn) -> None:
    x = np.concatenate([-SIZES, [0.0], SIZES]).astype(np.float32)
    got, exact = by_llvm(read(fn), lanes, x), EXACT[fn](x.astype(np.float64))
    seen = np.abs(exact) > 1e-36  # below, 0
    np.testing.assert_allclose(got[seen], exact[seen], rtol=1e-5 if fn is jax.nn.sigmoid else 2e-6)
    assert np.abs(got[~seen]).max(initial=0) < 1e-35


def test_the_tail_of_a_bell(lanes) -> None:
    x = np.linspace(-9, 9, 4001, dtype=np.float32)
    np.testing.assert_allclose(
        by_llvm(read(lax.erfc), lanes, x), special.erfc(x.astype(np.float64)), rtol=2e-7, atol=5e-7
    )


def test_logarithms_and_roots(lanes) -> None:
    x = np.concatenate([[0.0], SIZES, np.geomspace(80, 3e38, 101)]).astype(np.float32)
    np.testing.assert_allclose(by_llvm(read(jnp.log1p), lanes, x), np.log1p(x.astype(np.float64)), rtol=5e-7)
    np.testing.assert_allclose(by_llvm(read(jnp.sqrt), lanes, x), np.sqrt(x), rtol=1e-7)


@pytest.mark.parametrize(
    ("fn", "x", "exact"),
    [
        (jnp.exp, [-np.inf, -200, 88.5, 89, np.inf], [0, 0, np.exp(88.5), np.inf, np.inf]),
        (jnp.expm1, [-np.inf, np.inf], [-1, np.inf]),
        (jax.nn.sigmoid, [-np.inf, -200, 200, np.inf], [0, 0, 1, 1]),
        (jnp.tanh, [-np.inf, -200, 200, np.inf], [-1, -1, 1, 1]),
        (lax.erfc, [-np.inf, -200, 200, np.inf], [2, 2, 0, 0]),
        (jnp.log1p, [np.inf], [np.inf]),
    ],
)
def test_ends(lanes, fn, x, exact) -> None:
    np.testing.assert_allclose(by_llvm(read(fn), lanes, np.array(x, np.float32)), exact, rtol=3e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(lanes, name) -> None:
    x = np.linspace(-20, 20, 4001, dtype=np.float32)
    got, exact = by_llvm(read(ACTIVATIONS[name]), lanes, x), np.asarray(ACTIVATIONS[name](jnp.asarray(x)))
    np.testing.assert_allclose(got, exact, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("name", ["relu", "hard swish", "leaky relu", "clip", "tanh", "silu"])
def test_nan_stays(lanes, name) -> None:
    """As in XLA, which keeps it through a maximum."""
    assert np.isnan(by_llvm(read(ACTIVATIONS[name]), lanes, np.full(8, np.nan, np.float32))).all()
