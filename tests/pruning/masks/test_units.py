"""Scores of units against NumPy: norms of any order, blocks with both poolings and what is left at the edges."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.pruning.masks.units import alive_units, norms, over_units, unit_scores
from jaxcomp.pruning.specs import Block, Filters, Tied


@pytest.mark.parametrize("order", [1, 2, 3, 0.5, -1, 0, np.inf, -np.inf, "fro", "nuc"])
def test_norms_are_numpys(order) -> None:
    w = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    got = norms(jnp.asarray(w), (0, 2), order)
    for j in range(5):
        unit, power = w[:, j].astype(np.float64), 2 if order == "fro" else order
        vector = np.linalg.norm(unit.ravel(), 2 if power == "nuc" else power)
        want = np.linalg.norm(unit, "nuc") if order == "nuc" else vector
        assert float(got[0, j, 0]) == pytest.approx(want, rel=1e-5)


def test_scores_below_zero_lower_a_units_sum() -> None:
    x = jnp.array([[1.0, -3.0], [1.0, 1.0]])
    assert unit_scores(Filters(-1), x).tolist() == [[2.0, -2.0]]
    assert unit_scores(Filters(-1, order=np.inf), x).tolist() == [[1.0, 3.0]]


@pytest.mark.parametrize("pool", ["mean", "max"])
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(4, 6), (5, 7), (1, 1)]))
def test_blocks_are_pooled_as_by_hand(pool, seed, shape) -> None:
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    alive = np.random.default_rng(seed + 1).random(shape) < 0.3
    block = Block((2, 3), pool=pool)
    got = np.asarray(unit_scores(block, jnp.asarray(x)))
    left = np.asarray(alive_units(block, jnp.asarray(alive), shape))
    full = np.asarray(over_units(block, jnp.asarray(left), shape))
    for i, j in np.ndindex(got.shape):
        here = np.s_[2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
        assert got[i, j] == pytest.approx(x[here].mean() if pool == "mean" else x[here].max(), rel=1e-5, abs=1e-6)
        assert left[i, j] == alive[here].any()
        assert (full[here] == left[i, j]).all()
    assert full.shape == shape


def test_blocks_of_any_axes() -> None:
    x = jnp.arange(24.0).reshape(4, 3, 2)
    got = unit_scores(Block((2,), axes=(0,)), x)
    assert (np.asarray(got) == np.asarray(x).reshape(2, 2, 3, 2).mean(1)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Filters(axis="x"), r"Filters: axis must be an integer, or several, got 'x'"),
        (lambda: Filters(axis=(0, 1.5)), r"Filters: axis must be an integer"),
        (lambda: Filters(axis=()), r"Filters: axis must be an integer"),
        (lambda: Block(()), r"Block: the shape must be positive integers"),
        (lambda: Block((0, 2)), r"Block: the shape must be positive integers, got \(0, 2\)"),
        (lambda: Block((2, 2), axes=(1, 1)), r"Block: wants one distinct axis for each extent"),
        (lambda: Block((2, 2), pool="sum"), r"Block: pool must be 'mean' or 'max', got 'sum'"),
        (lambda: Filters(order="l1"), r"Filters: the order of the norm must be a number, 'fro' or 'nuc', got 'l1'"),
        (lambda: Filters(order=float("nan")), r"Filters: the order of the norm must be"),
        (lambda: Tied({}), r"Tied: wants a table of regular expression to axis"),
        (lambda: Tied({"(": 0}), r"Tied: rule '\(' is not a regular expression"),
    ],
)
def test_specs_are_checked_where_written(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_axes_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"axis -2 is out of bounds for array of dimension 1"):
        unit_scores(Block((2, 2)), jnp.ones(4))
    with pytest.raises(ValueError, match=r"repeated axis in `Block.axes`"):
        unit_scores(Block((2, 2), axes=(0, -2)), jnp.ones((4, 4)))
    with pytest.raises(ValueError, match=r"has slices with 3 dimensions, and a nuclear norm is of matrices"):
        unit_scores(Filters(-1, order="nuc"), jnp.ones((2, 2, 2, 2)))
    with pytest.raises(ValueError, match=r"wants axes that are named, as in Filters\(-1\)"):
        unit_scores(Filters(), jnp.ones((2, 2)))
