"""Numbers onto grids of integers: numpy's operations in the same order, bit for bit, and NaN where there is one."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp.kernels import llvm_rounding
from jaxcomp.kernels.llvm_rounding import PIECE, Ends, llvm_codes, refusal
from jaxcomp.quantization.numerics.rounding import hair
from tests.marks import quick

pytest.importorskip("llvmlite")
ENDS = {"asymmetric": Ends(0, 255, 128), "symmetric": Ends(-128, 127, 0), "4 bits": Ends(0, 15, 0)}


def by_numpy(x, grid, ends):
    """In float32, each operation rounded."""
    zero, less, reciprocal = np.broadcast_to(grid, (3, *grid.shape[1:]))
    low, high = (np.float32(end) - zero for end in (ends.low, ends.high))
    steps = np.clip(x * less * reciprocal, low, high) * np.float32(hair(jnp.dtype(jnp.float32)))
    return np.rint(steps) + zero - np.float32(ends.shift)


def grid_for(shape, ends, seed=0):
    rng = np.random.default_rng(seed)
    zero = np.zeros(shape) if ends.low else rng.integers(ends.low, ends.high + 1, shape)
    return np.stack([zero, np.ones(shape), 1 / rng.uniform(0.01, 0.1, shape)]).astype(np.float32)


CASES = {
    "one grid": ((3, 7, 11), (1, 1, 1), (1, 1, 1)),
    "a grid a row": ((5, 33), (5, 1), (5, 1)),
    "a grid, NaN by row": ((4, 3, 40), (1, 1, 1), (4, 3, 1)),
    "grids of heads, NaN by row": ((4, 3, 40), (1, 3, 1), (4, 1, 1)),
    "the fewest": ((2, 8), (2, 1), (1, 1)),
    "more than a thread takes": ((2, PIECE + 37), (1, 1), (2, 1)),
    "many short rows": ((5000, 9), (5000, 1), (5000, 1)),
    "no rows apart": ((65,), (1,), (1,)),
}


@pytest.mark.parametrize("ends", quick(ENDS, "asymmetric", "symmetric"))
@pytest.mark.parametrize("name", CASES)
def test_it_is_numpys_rounding(name, ends) -> None:
    shape, grids, rows = CASES[name]
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    x.reshape(-1)[::17] = np.inf
    grid = grid_for(grids, ENDS[ends])
    assert refusal(shape, grids, rows) is None
    codes, lost = jax.jit(partial(llvm_codes, rows=rows, ends=ENDS[ends]))(x, grid)
    assert codes.dtype == jnp.int8
    np.testing.assert_array_equal(codes, by_numpy(x, grid, ENDS[ends]))
    assert lost.shape == rows
    assert not lost.any()


@pytest.mark.parametrize("name", CASES)
def test_nan_is_told_where_it_is(name) -> None:
    shape, grids, rows = CASES[name]
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    at = tuple(n - 1 for n in shape)
    x[at] = np.nan
    grid = grid_for(grids, ENDS["asymmetric"])
    codes, lost = llvm_codes(jnp.asarray(x), jnp.asarray(grid), rows, ENDS["asymmetric"])
    wanted = np.zeros(rows)
    wanted[tuple(n - 1 for n in rows)] = np.nan
    np.testing.assert_array_equal(lost, wanted)
    there = ~np.isnan(x)
    np.testing.assert_array_equal(np.asarray(codes)[there], by_numpy(x, grid, ENDS["asymmetric"])[there])


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(8, 300), st.booleans(), st.sampled_from(list(ENDS)), st.integers(0, 9))
def test_any_sizes(rows, columns, apart, ends, seed) -> None:
    grids = (rows, 1) if apart else (1, 1)
    x = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    grid = grid_for(grids, ENDS[ends], seed)
    codes, lost = llvm_codes(jnp.asarray(x), jnp.asarray(grid), (rows, 1), ENDS[ends])
    np.testing.assert_array_equal(codes, by_numpy(x, grid, ENDS[ends]))
    assert lost.tolist() == [[0.0]] * rows


@pytest.mark.parametrize("zero", [0, 3, 128])
def test_halves_go_to_even_numbers_before_the_zero_point_is_added(zero) -> None:
    fine = np.float32(hair(jnp.dtype(jnp.float32)))
    x = np.float32(np.arange(-3, 125) + 0.5) / fine
    x = np.concatenate([np.nextafter(x, np.float32(end)) for end in (-np.inf, np.inf)] + [x])
    assert ((x * fine) % 1 == 0.5).any()
    grid = np.array([zero, 1, 1], np.float32).reshape(3, 1)
    codes, _ = llvm_codes(jnp.asarray(x), jnp.asarray(grid), (1,), ENDS["asymmetric"])
    np.testing.assert_array_equal(codes, by_numpy(x, grid, ENDS["asymmetric"]))


def test_what_it_does_not_take(monkeypatch) -> None:
    assert "blocks cut an axis" in (refusal((4, 16), (4, 2), (4, 1)) or "")
    assert "only 1 numbers lie side by side" in (refusal((4, 16), (1, 16), (1, 1)) or "")
    monkeypatch.setattr(llvm_rounding, "missing", lambda: "it is gone")
    assert refusal((4, 16), (1, 1), (1, 1)) == "it is gone"
