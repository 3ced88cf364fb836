"""Functions of one number in LLVM code beside numpy and scipy in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcomp.kernels.llvm_calls import Work, call
from jaxcomp.kernels.llvm_code import Types, counted, element
from jaxcomp.kernels.llvm_pointwise import name_of, pointwise
from jaxcomp.trace.pointwise import Pointwise
from tests.trace.pointwise import read
from tests.trace.test_pointwise import ACTIVATIONS

pytest.importorskip("llvmlite")
special = pytest.importorskip("scipy.special")
LANES = 16


def _rows(function, b, operands, first, last) -> None:
    from llvmlite import ir

    x, y = operands
    kind = ir.VectorType(Types().f32, LANES)
    with counted(b, first, last) as row:
        at = b.mul(row, x.columns)
        value = pointwise(b, function, b.load(element(b, x, at, Types().f32), typ=kind, align=4))
        b.store(value, element(b, y, at, Types().f32), align=4)


def by_llvm(function: Pointwise, x: np.ndarray) -> np.ndarray:
    """Of each number."""
    rows = jnp.asarray(np.resize(x, (-(-x.size // LANES), LANES)), jnp.float32)
    work = Work(f"test_pointwise{name_of(function)}", partial(_rows, function), 4, by=0)
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
def test_elementary_functions(fn) -> None:
    x = np.concatenate([-SIZES, [0.0], SIZES]).astype(np.float32)
    got, exact = by_llvm(read(fn), x), EXACT[fn](x.astype(np.float64))
    seen = np.abs(exact) > 1e-36  # below, 0
    np.testing.assert_allclose(got[seen], exact[seen], rtol=1e-5 if fn is jax.nn.sigmoid else 2e-6)
    assert np.abs(got[~seen]).max(initial=0) < 1e-35


def test_the_tail_of_a_bell() -> None:
    x = np.linspace(-9, 9, 4001, dtype=np.float32)
    np.testing.assert_allclose(by_llvm(read(lax.erfc), x), special.erfc(x.astype(np.float64)), rtol=2e-7, atol=5e-7)


def test_logarithms_and_roots() -> None:
    x = np.concatenate([[0.0], SIZES, np.geomspace(80, 3e38, 101)]).astype(np.float32)
    np.testing.assert_allclose(by_llvm(read(jnp.log1p), x), np.log1p(x.astype(np.float64)), rtol=5e-7)
    np.testing.assert_allclose(by_llvm(read(jnp.sqrt), x), np.sqrt(x), rtol=1e-7)


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
def test_ends(fn, x, exact) -> None:
    np.testing.assert_allclose(by_llvm(read(fn), np.array(x, np.float32)), exact, rtol=3e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name) -> None:
    x = np.linspace(-20, 20, 4001, dtype=np.float32)
    got, exact = by_llvm(read(ACTIVATIONS[name]), x), np.asarray(ACTIVATIONS[name](jnp.asarray(x)))
    np.testing.assert_allclose(got, exact, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("name", ["relu", "hard swish", "leaky relu", "clip", "tanh", "silu"])
def test_nan_stays_or_is_cut(name) -> None:
    """As in XLA, which keeps it through a maximum."""
    assert np.isnan(by_llvm(read(ACTIVATIONS[name]), np.full(LANES, np.nan, np.float32))).all()
