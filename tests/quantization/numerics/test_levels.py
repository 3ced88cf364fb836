"""Rounding to levels: minifloats against ml_dtypes, tables against a numpy search; codes and back; at random."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.quantization.level_grids import E2M1, E4M3, Levels
from jaxcomp.quantization.microscaling import E8M0
from jaxcomp.quantization.numerics.levels import exponent_of, power_of_two
from jaxcomp.quantization.numerics.rounding import round_with
from tests.marks import quick
from tests.quantization.test_level_grids import FORMATS, all_codes

TABLES = {
    "nf4": jc.quantization.NF4(),
    "pot5": jc.quantization.PoT(5),
    "apot4": jc.quantization.APoT(4),
    "apot8": jc.quantization.APoT(8),
    "sign": Levels((-1.0, 1.0)),
}
GRIDS = {**FORMATS, **TABLES}
rounds = jax.jit(lambda x, grid: grid.nearest(x), static_argnums=1)
codes_of = jax.jit(lambda x, grid: grid.stored(x)[0], static_argnums=1)
values_of = jax.jit(lambda x, grid, dtype: grid.loaded(x, dtype), static_argnums=(1, 2))
values = hnp.arrays(np.float32, 64, elements=st.floats(-100, 100, width=32) | st.floats(-0.125, 0.125, width=32))


def interesting(grid) -> np.ndarray:
    """All levels, all midpoints, their neighbours, values beyond both ends."""
    levels = np.array(grid.levels, np.float32)
    middles = ((levels[1:].astype(np.float64) + levels[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(middles, np.float32(s * np.inf)) for s in (1, -1)]
    return np.concatenate([levels, middles, *near, levels * 3, np.linspace(*levels[[0, -1]], 999, dtype=np.float32)])


@pytest.mark.parametrize("name", FORMATS)
def test_a_minifloat_rounds_as_ml_dtypes_does(name) -> None:
    grid, dtype = FORMATS[name], getattr(ml_dtypes, name)
    x = interesting(grid)
    want = np.clip(x, -grid.top, grid.top).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(rounds(x, grid), want + 0.0)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_of_a_minifloat_are_its_bit_patterns(name) -> None:
    grid, dtype = FORMATS[name], getattr(ml_dtypes, name)
    levels = np.array(grid.levels, np.float32)
    codes = np.asarray(codes_of(levels, grid))
    assert codes.tolist() == levels.astype(dtype).view(np.uint8).tolist()
    every = all_codes(name)
    finite = np.flatnonzero(np.isfinite(every))
    got = np.asarray(values_of(finite.astype(np.uint8), grid, jnp.dtype("float32")))
    np.testing.assert_array_equal(got, every[finite])


@pytest.mark.parametrize("name", TABLES)
def test_a_table_rounds_to_the_nearest_level_and_ties_towards_zero(name) -> None:
    grid = TABLES[name]
    x, levels = interesting(grid), np.array(grid.levels, np.float32)
    got = np.asarray(rounds(x, grid))
    assert np.isin(got, levels).all()
    distance = np.abs(x[:, None].astype(np.float64) - levels)
    assert (np.abs(got.astype(np.float64) - x) <= distance.min(1) * (1 + 1e-6) + 2.0**-19 * np.abs(x)).all()
    tied = np.sort(distance, 1)
    tied = tied[:, 0] == tied[:, 1]
    assert name in ("nf4", "apot4", "apot8") or tied.any()
    if name != "sign":
        nearest = np.where(distance == distance.min(1, keepdims=True), np.abs(levels), np.inf).min(1)
        np.testing.assert_array_equal(np.abs(got)[tied], nearest[tied])
    else:
        assert (got[x == 0] == 1).all()


@pytest.mark.parametrize("name", quick(GRIDS, "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "nf4", "sign", "apot4"))
@given(x=values)
def test_levels_come_back_from_their_codes(name, x) -> None:
    grid = GRIDS[name]
    levels = rounds(x, grid)
    codes = codes_of(levels, grid)
    assert int(codes.max()) < 2**grid.bits
    back = np.asarray(values_of(codes, grid, jnp.dtype("float32")))
    assert back.tobytes() == np.asarray(levels).tobytes()
    np.testing.assert_array_equal(rounds(levels, grid), levels)


@pytest.mark.parametrize("name", quick(GRIDS, "float8_e4m3fn", "float4_e2m1fn", "nf4", "apot4"))
def test_levels_are_the_same_in_and_out_of_jit(name) -> None:
    x = jnp.asarray(interesting(GRIDS[name]))
    eager, jitted = np.asarray(GRIDS[name].nearest(x)), np.asarray(rounds(x, GRIDS[name]))
    assert eager.tobytes() == jitted.tobytes()


def test_powers_of_two_against_ml_dtypes() -> None:
    e = np.arange(-126, 128)
    powers = power_of_two(jnp.asarray(e, jnp.int32), jnp.dtype("float32"))
    np.testing.assert_array_equal(powers, np.ldexp(np.float32(1), e))
    assert exponent_of(powers).tolist() == e.tolist()
    codes = E8M0().stored(powers)[0]
    assert np.asarray(codes).tolist() == np.asarray(powers).astype(ml_dtypes.float8_e8m0fnu).view(np.uint8).tolist()
    np.testing.assert_array_equal(E8M0().loaded(codes, jnp.dtype("float32")), powers)


@pytest.mark.parametrize(
    "grid",
    quick(
        [E4M3, E2M1, jc.quantization.NF4(), jc.quantization.APoT(8), Levels((-1.0, 1.0))], E2M1, jc.quantization.NF4()
    ),
    ids=str,
)
def test_stochastic_rounding_is_unbiased_and_keeps_levels(grid) -> None:
    x = jnp.linspace(1.2 * grid.levels[0], 1.2 * grid.levels[-1], 41, dtype=jnp.float32)
    n = 4000
    noise = jax.random.uniform(jax.random.key(0), (n, x.size))
    drawn = np.asarray(jax.jit(lambda x, u: grid.nearest(x, noise=u))(jnp.broadcast_to(x, noise.shape), noise))
    levels = np.array(grid.levels, np.float32)
    assert np.isin(drawn, levels).all()
    inside = np.clip(np.asarray(x), levels[0], levels[-1])
    # Five standard deviations of a mean of n draws from the two neighbours.
    above = levels[np.clip(np.searchsorted(levels, inside, side="right"), 1, len(levels) - 1)]
    below = levels[np.clip(np.searchsorted(levels, inside, side="right"), 1, len(levels) - 1) - 1]
    bound = 5 * np.sqrt((above - inside) * (inside - below) / n) + 1e-5 * np.abs(levels).max()
    assert (np.abs(drawn.mean(0, dtype=np.float64) - inside) <= bound).all()
    top = jnp.full((64, len(levels)), 1 - 2.0**-24) * 1
    kept = grid.nearest(jnp.broadcast_to(jnp.asarray(levels), top.shape), noise=top)
    np.testing.assert_array_equal(kept, jnp.broadcast_to(jnp.asarray(levels), top.shape))


def test_stochastic_integers_are_unbiased_and_stay() -> None:
    x = jnp.linspace(-9, 9, 37, dtype=jnp.float32)
    noise = jax.random.uniform(jax.random.key(1), (4000, 37))
    drawn = np.asarray(round_with(jnp.broadcast_to(x, noise.shape), -8, 7, noise=noise))
    mean, inside = drawn.mean(0, dtype=np.float64), np.clip(np.asarray(x), -8, 7)
    assert (np.abs(mean - inside) <= 5 * 0.5 / np.sqrt(4000)).all()
    whole = jnp.arange(-8.0, 8.0)
    np.testing.assert_array_equal(round_with(whole, -8, 7, noise=jnp.full(16, 1 - 2.0**-24)), whole)


@pytest.mark.parametrize("grid", [E2M1, jc.quantization.NF4()], ids=str)
def test_the_gradient_is_cut_beyond_the_end_cells_or_nowhere(grid) -> None:
    edge = grid.top + (grid.top - grid.levels[-2]) / 2
    x = jnp.array([0.0, 0.3, grid.top, edge, 1.01 * edge, -3 * edge], jnp.float32)
    cut = jax.grad(lambda x: grid.nearest(x).sum())(x)
    assert cut.tolist() == [1, 1, 1, 1, 0, 0]
    assert jax.grad(lambda x: grid.nearest(x, clipped=False).sum())(x).tolist() == [1] * 6
    assert jax.grad(lambda x: round_with(x, -1, 1, clipped=False).sum())(x).tolist() == [1] * 6
