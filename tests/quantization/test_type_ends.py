"""Ranges and values where types end: counts beyond float32's, weights near the largest number, mostly zeros."""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.quantization import MSE, NF4, APoT, Fixed, Levels, Log, MeanAbs, Percentile, PoT, learned
from jaxcomp.quantization.adaround import adaround, harden
from jaxcomp.quantization.level_grids import E2M1, E4M3
from jaxcomp.quantization.numerics.ranges import beyond, mean_range
from tests.marks import quick

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
GRIDS = {
    "sign": jc.Int(1),
    "int2": jc.Int(2),
    "int8": jc.Int(8),
    "narrow2": jc.Int(2, narrow=True),
    "bit": jc.Int(1, symmetric=False),
    "asymmetric2": jc.Int(2, symmetric=False),
    "asymmetric8": jc.Int(8, symmetric=False),
    "log": Log(8),
    "nf4": NF4(),
    "pot": PoT(3),
    "apot": APoT(4),
    "e4m3": E4M3,
    "large": Levels((-1e30, 0.0, 1e30)),
    "small": Levels((-1e-30, 0.0, 1e-30)),
    "mx": jc.recipes.mx(E2M1, 4),
    "mxint8": jc.recipes.mx(jc.Int(8), 4),
    "nvfp4": jc.recipes.nvfp4(),
}
RULES = {"default": None, "mse": MSE(steps=9), "percentile": Percentile(60.0)}
FRACTIONS = np.array([[1.0, -0.9, 0.76], [-1.0, 1.0, -1.0], [0.5, 0.3, -0.76], [-0.34, -0.6, 0.2]] * 4)


def made(grid, rule, w: jax.Array):
    t = grid if isinstance(grid, jc.Transform) else jc.quantize(grid, scale=rule)
    return t.apply((), {"kernel": w})["kernel"]


@pytest.mark.parametrize("rule", quick(RULES, "default", "mse"))
@pytest.mark.parametrize("dtype", quick(DTYPES, "float16"))
@pytest.mark.parametrize("name", quick(GRIDS, "sign", "int2", "int8", "asymmetric2", "nf4", "log", "mxint8"))
def test_fault_6_finite_weights_stay_finite(name, dtype, rule) -> None:
    """And as near to the weights as in the middle of the type's range, in packed form and in jit too."""
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    errors = []
    for size in (largest, 0.76 * largest, 1.0):
        w = jnp.asarray((FRACTIONS * size).astype(DTYPES[dtype]))
        leaf = made(GRIDS[name], RULES[rule], w)
        dense = np.asarray(leaf.materialize(), np.float64)
        assert np.isfinite(dense).all()
        assert np.asarray(jc.pack(leaf).materialize()).tobytes() == np.asarray(leaf.materialize()).tobytes()
        both = jax.jit(lambda w: made(GRIDS[name], RULES[rule], w).materialize())(w)
        assert name == "log" or np.asarray(both).tobytes() == np.asarray(leaf.materialize()).tobytes()
        errors.append(np.sqrt(np.mean((dense / size - FRACTIONS) ** 2)))
    # The logarithm's own grid depends on the unit, and so does a table whose scale would leave float32.
    if name not in ("log", "large", "small"):
        assert max(errors[:2]) <= errors[2] + 0.005


@pytest.mark.parametrize("dtype", DTYPES)
def test_fault_6_learned_and_soft_rounded_weights_stay_finite(dtype) -> None:
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    params = {"kernel": jnp.asarray((FRACTIONS * largest).astype(DTYPES[dtype]))}
    trees = [learned(params, jc.Int(2), scale=MSE(steps=9)), learned(params, jc.Int(1)), adaround(params, jc.Int(2))]
    for tree in (*trees, harden(trees[-1])):
        assert np.isfinite(np.asarray(jc.materialize(tree)["kernel"], np.float64)).all()
    g = jax.grad(lambda p: jnp.sum(jc.materialize(p)["kernel"].astype(jnp.float32) / largest))(trees[1])
    assert all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(g))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", quick(GRIDS, "sign", "int8", "mx"))
def test_fault_6_what_is_not_finite_is_not_made_finite(name, bad) -> None:
    w = np.array(FRACTIONS, np.float32)
    w[1, 1] = bad
    for rule in (None, Percentile(60.0)):
        with np.errstate(invalid="ignore"):
            dense = np.asarray(made(GRIDS[name], rule, jnp.asarray(w)).materialize())
        assert not np.isfinite(dense[1, 1])


@given(count=st.integers(1, 2**31 - 1), percent=st.decimals(51, 100, places=7) | st.decimals(51, 100, places=1))
def test_fault_5_ranks_are_exact_at_any_count(count, percent) -> None:
    want = math.floor(count * (1 - Fraction(percent) / 100))
    assert int(beyond(jnp.array([count], jnp.int32), float(percent))[0]) == want


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("zeros", [0, 50, 990, 999, 1000])
def test_fault_5_the_percentile_of_mostly_zeros_is_that_of_the_others(zeros, symmetric) -> None:
    """numpy's of what is not 0: masked or not, the same weights have the same range."""
    w = np.random.default_rng(zeros).normal(size=(1000, 2)).astype(np.float32)
    w[:zeros] = 0
    t = jc.quantize(jc.Int(8, symmetric=symmetric), scale=Percentile(97.0))
    leaf = t.apply((), {"kernel": jnp.asarray(w)})["kernel"]
    if zeros == 1000:
        assert (np.asarray(leaf.materialize()) == 0).all()
        return
    some = w[zeros:]
    if symmetric:
        want = np.percentile(np.abs(some), 97, axis=0, method="inverted_cdf") / 127.5
    else:
        top = np.percentile(some, 97, axis=0, method="inverted_cdf")
        bottom = -np.percentile(-some, 97, axis=0, method="inverted_cdf")
        want = (np.maximum(top, 0) - np.minimum(bottom, 0)) / 255
    np.testing.assert_allclose(leaf.scale[0], want, rtol=1e-6)
    masked = jc.core.Masked(jnp.asarray(w), jnp.asarray(w != 0))
    of_mask = t.apply((), {"kernel": masked})["kernel"].values
    np.testing.assert_array_equal(of_mask.scale, leaf.scale)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2**24 + 2, 2**25 + 6])
def test_fault_5_a_block_of_more_than_2_to_the_24_weights(n) -> None:
    rng = np.random.default_rng(0)
    w = rng.random(n, np.float32) + np.float32(0.5)
    mean, _ = mean_range(jnp.asarray(w), (1,), None)
    np.testing.assert_allclose(mean, w.astype(np.float64).mean(), rtol=1e-6)
    mask = np.ones(n, bool)
    mask[1::3] = False
    of_mask, _ = mean_range(jnp.asarray(np.where(mask, w, 0)), (1,), jnp.asarray(mask))
    np.testing.assert_allclose(of_mask, w[mask].astype(np.float64).mean(), rtol=1e-6)
    top, _ = Percentile(99.99).ends(jnp.asarray(w), (1,), None, symmetric=True, on_grid=lambda *_: None)
    np.testing.assert_array_equal(top, np.percentile(w, 99.99, method="inverted_cdf"))


def test_fault_5_huge_magnitudes_have_their_percentile_and_least_error() -> None:
    """Weights from 2**24 on, and near float32's end, in the same grids as their small copies."""
    w = np.random.default_rng(0).normal(size=(512, 3)).astype(np.float32)
    for rule in (Percentile(99.0), MSE(), MeanAbs()):
        t = jc.quantize(jc.Int(4), scale=rule)
        small = t.apply((), {"kernel": jnp.asarray(w)})["kernel"]
        for power in (24, 60, 125, -100):
            large = t.apply((), {"kernel": jnp.asarray(w * np.float32(2.0**power))})["kernel"]
            np.testing.assert_array_equal(large.codes, small.codes)
            np.testing.assert_array_equal(large.scale, small.scale * np.float32(2.0**power))


@pytest.mark.parametrize("factor", [3.0, 10.0, 0.1])
def test_fault_2_the_least_squared_error_has_the_same_range_in_any_unit(factor) -> None:
    w = np.random.default_rng(0).integers(-7, 8, (64, 32)).astype(np.float32)
    t = jc.quantize(jc.Int(4), scale=MSE())
    first = t.apply((), {"kernel": jnp.asarray(w)})["kernel"]
    other = t.apply((), {"kernel": jnp.asarray(w * np.float32(factor))})["kernel"]
    np.testing.assert_allclose(other.scale / first.scale, factor, rtol=1e-6)
    np.testing.assert_array_equal(other.codes, first.codes)


def test_fault_6_a_given_range_saturates() -> None:
    """A weight beyond ``Fixed`` gets the end, however large it is."""
    w = {"kernel": jnp.array([[3e38], [-1e30], [0.2]])}
    dense = jc.quantize(jc.Int(4), scale=Fixed(0.75)).apply((), w)["kernel"].materialize()
    np.testing.assert_allclose(dense.ravel(), [0.7, -0.8, 0.2], rtol=1e-6)
