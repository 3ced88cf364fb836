"""k-means against exhaustive search, against float64, and on what breaks careless sums."""

from __future__ import annotations

from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcomp.sharing.kmeans import inits, points
from jaxcomp.sharing.kmeans.fit import fit, member_means, nearest, refit
from jaxcomp.sharing.kmeans.lloyd import lloyd
from jaxcomp.sharing.kmeans.optimal import optimal_table
from jaxcomp.sharing.kmeans.vectors import fit_vectors, nearest_vectors
from tests.marks import quick

DETERMINISTIC = [inits.linear, inits.density, inits.quantile, inits.near_optimal, inits.optimal]
RANDOM = [inits.random, inits.plus_plus]
INITS = quick(DETERMINISTIC + RANDOM, inits.near_optimal, inits.plus_plus)
values = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1.5, 2.0**127, -(2.0**-130)])


def inertia(x, table) -> float:
    x, table = np.asarray(x, np.float64).reshape(-1, 1), np.unique(np.asarray(table, np.float64))
    return float((np.abs(x - table) ** 2).min(1).sum())


def best_of_all(x: np.ndarray, clusters: int) -> float:
    """The least inertia of any cut of the sorted values into runs."""
    x = np.sort(x)
    cuts = (np.split(x, c) for c in combinations(range(1, x.size), clusters - 1))
    return min(sum(((run - run.mean()) ** 2).sum() for run in runs) for runs in cuts)


@given(x=hnp.arrays(np.float64, st.integers(2, 9), elements=st.integers(-20, 20)), k=st.integers(2, 5))
def test_the_dynamic_program_is_optimal(x, k) -> None:
    table = optimal_table(np.sort(x), np.ones(x.size), k)
    assert table.size == k
    assert (np.diff(table) >= 0).all()
    assert inertia(x, table) == pytest.approx(best_of_all(x, min(k, x.size)), abs=1e-9)


def test_weights_count_in_the_dynamic_program() -> None:
    x = np.repeat([0.0, 1.0, 4.0, 9.0, 11.0], [5, 1, 2, 7, 3])
    v, n = np.unique(x, return_counts=True)
    np.testing.assert_allclose(optimal_table(v, n.astype(float), 3), optimal_table(x, np.ones(x.size), 3))


def test_the_dynamic_program_agrees_with_kmeans1d() -> None:
    kmeans1d = pytest.importorskip("kmeans1d")
    x = np.random.default_rng(0).normal(size=500)
    np.testing.assert_allclose(optimal_table(np.sort(x), np.ones(500), 7), kmeans1d.cluster(x, 7).centroids, rtol=1e-9)


@pytest.mark.parametrize("init", INITS, ids=lambda i: i.name)
def test_a_table_is_sorted_and_its_entries_are_means_of_their_members(init) -> None:
    x = jax.random.normal(jax.random.key(1), (999,))
    key = jax.random.key(2) if init.random else None
    table = fit(x, None, clusters=8, init=init, key=key)
    assert (jnp.diff(table) >= 0).all()
    codes = np.asarray(nearest(x, table))
    for k in set(codes):
        assert float(table[k]) == pytest.approx(np.asarray(x, np.float64)[codes == k].mean(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("k", [2, 16, 40])
def test_nearest_is_nearest(k) -> None:
    x = jax.random.normal(jax.random.key(0), (500,))
    table = jnp.sort(jax.random.normal(jax.random.key(1), (k,)))
    distance = np.abs(np.asarray(x, np.float64)[:, None] - np.asarray(table, np.float64))
    codes = np.asarray(nearest(x, table))
    assert (distance[np.arange(500), codes] <= distance.min(1) + 1e-7).all()


SPREADS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "student": lambda rng, n: rng.standard_t(3, size=n),
    "few values": lambda rng, n: rng.integers(0, 40, n) ** 1.5,
    "bimodal": lambda rng, n: np.where(rng.random(n) < 0.5, rng.normal(-1, 0.1, n), rng.normal(2, 0.5, n)),
}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("k", "over"), [(16, 1.001), pytest.param(100, 1.003, marks=pytest.mark.slow)])
def test_near_optimal_is_near_the_optimum(spread, k, over) -> None:
    x = jnp.asarray(SPREADS[spread](np.random.default_rng(0), 1 << 13), jnp.float32)
    values, counts = np.unique(np.asarray(x, np.float64), return_counts=True)
    best = inertia(x, optimal_table(values, counts.astype(float), k))
    assert inertia(x, fit(x, None, clusters=k)) <= best * over + 1e-20
    if k == 16:
        assert inertia(x, fit(x, None, clusters=k, init=inits.optimal)) <= best * 1.0001


def test_outliers_get_entries_of_their_own() -> None:
    x = jnp.concatenate([jax.random.normal(jax.random.key(0), ((1 << 13) - 2,)), jnp.array([1e6, -1e3])])
    table = fit(x, None, clusters=16)
    best = optimal_table(np.sort(np.asarray(x, np.float64)), np.ones(x.size), 16)
    assert float(table[-1]) == 1e6
    assert float(table[0]) == -1e3
    assert inertia(x, table) <= inertia(x, best) * 1.001


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_the_histogram_is_as_good_as_the_sort(masked, monkeypatch) -> None:
    x = jnp.concatenate([jax.random.normal(jax.random.key(0), (70_000,)), jnp.array([1e4, 1.0, 1.0])])
    counted = jnp.arange(x.size) % 3 > 0 if masked else None
    by_cells = points.counted_points([x], [counted], x.size)
    by_sort = points._sorted(x, counted)
    kept = np.asarray(x if counted is None else x[counted], np.float64)
    assert int(by_cells.total) == int(by_sort.total) == kept.size
    assert (jnp.diff(by_cells.values) >= 0).all()
    assert float(by_cells.sums[1]) == pytest.approx(kept.sum(), rel=1e-4, abs=1e-2)
    start = jnp.linspace(-3, 3, 16)
    tables = [lloyd(p, start, 50) for p in (by_cells, by_sort)]
    assert inertia(kept, tables[0]) == pytest.approx(inertia(kept, tables[1]), rel=1e-3)


_MANY = 70_001
LARGE = {
    "normal": lambda rng: rng.normal(size=_MANY),
    "heavy tails": lambda rng: rng.standard_t(1.5, size=_MANY),
    "zeros and few": lambda rng: rng.integers(-3, 4, _MANY) * (rng.random(_MANY) < 0.3),
    "one value": lambda rng: np.full(_MANY, 2.5),
    "one half-word": lambda rng: 1 + rng.random(_MANY) * 2.0**-9,
    "nothing counted": lambda rng: np.ones(_MANY),
}
_by_sort = jax.jit(points._by_sort)
_by_count = jax.jit(partial(points.counted_points, size=_MANY))


@pytest.mark.parametrize("name", LARGE)
def test_large_arrays_are_counted_alike_sorted_or_not_and_in_parts(name) -> None:
    """The ways for CPU, for accelerators and for meshes give the same bits."""
    rng, cut = np.random.default_rng(0), _MANY // 3
    x = jnp.asarray(LARGE[name](rng), jnp.float32)
    counted = jnp.asarray(rng.random(x.size) < (0.4 if name != "nothing counted" else 0))
    one = _by_count([x], [counted])
    parts = _by_count([x[:cut, None], x[cut:]], [counted[:cut, None], counted[cut:]])
    for other in (_by_sort(x, counted), parts):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert int(one.total) == int(counted.sum())
    np.testing.assert_array_equal(_by_sort(x, None).before, _by_count([x], [None]).before)


def test_sums_lose_nothing_to_what_lies_before_them() -> None:
    x = jnp.concatenate([jnp.full((1000,), -1e7), jnp.linspace(1e-3, 2e-3, 1000)])
    p = points.points_of(x)
    sums = points.run_sums(p, jnp.array([1000]), jnp.array([2000]))
    assert float(sums[0]) == pytest.approx(1.5, rel=1e-6)
    assert float(points.at_rank(p, jnp.array([999]))[0]) == -1e7


@given(x=hnp.arrays(np.float32, (6,), elements=values), masked=st.booleans())
def test_few_values_are_kept_exactly_and_nothing_is_ever_not_finite(x, masked) -> None:
    tiny = np.abs(x) < float(np.finfo(np.float32).tiny) * max(2 * float(np.abs(x).max()), 1)  # read as zero
    x = np.where(tiny, 0, x).astype(np.float32)
    counted = np.arange(6) % 2 == 0 if masked else np.ones(6, bool)
    table = np.asarray(fit(jnp.asarray(x), jnp.asarray(counted), clusters=8))
    assert np.isfinite(table).all()
    assert set(table) == set((x + 0.0)[counted])
    assert np.isfinite(np.asarray(fit(jnp.asarray(x), jnp.asarray(counted), clusters=2))).all()


def test_nothing_counted_gives_zeros() -> None:
    assert (fit(jnp.ones(5), jnp.zeros(5, bool), clusters=4) == 0).all()


def test_refit_goes_on_and_starts_anew_where_entries_are_equal() -> None:
    x = jax.random.normal(jax.random.key(0), (1000,))
    table = fit(x, None, clusters=8)
    np.testing.assert_array_equal(refit(x, None, table), table)
    again = refit(x, None, jnp.zeros(8))
    assert len(np.unique(np.asarray(again))) == 8
    assert inertia(x, again) <= inertia(x, table) * 1.1


@pytest.mark.slow
def test_a_fit_in_double_precision_stays_there() -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(1 + 1e-10 * np.arange(8.0))
        table = fit(x, None, clusters=4)
        assert table.dtype == jnp.float64
        np.testing.assert_allclose(np.diff(np.asarray(table)), 2e-10, rtol=1e-4)


@given(n=st.sampled_from([7, 300]), seed=st.integers(0, 9))
def test_member_means(n, seed) -> None:
    rng = np.random.default_rng(seed)
    x, codes = rng.normal(size=n).astype(np.float32), rng.integers(0, 4, n).astype(np.uint8)
    counted = rng.random(n) < 0.8
    old = np.array([-1.0, 0.0, 1.0, 2.0, 9.0], np.float32)
    new = np.asarray(member_means(*map(jnp.asarray, (x, counted, codes, old))))
    for k in range(5):
        members = x[(codes == k) & counted]
        assert new[k] == pytest.approx(members.mean() if members.size else old[k], abs=1e-5)


def test_vectors_find_planted_centers() -> None:
    centers = 10 * jax.random.normal(jax.random.key(0), (12, 4))
    planted = jnp.arange(5000) % 12
    x = centers[planted] + 0.01 * jax.random.normal(jax.random.key(1), (5000, 4))
    table = fit_vectors(x, clusters=12, key=jax.random.key(2), iterations=10)
    codes = nearest_vectors(x, table)
    assert codes.dtype == jnp.uint8
    assert float(jnp.abs(table[codes.astype(jnp.int32)] - x).max()) < 0.1
    far = ((np.asarray(x)[:, None] - np.asarray(table)) ** 2).sum(-1)
    assert (far.argmin(1) == np.asarray(codes)).all()


TAILS = ("tails", 96, 16)
SMALL_TABLES = [*((spread, 192, 8) for spread in SPREADS), TAILS]


@pytest.mark.parametrize("case", quick(SMALL_TABLES, ("laplace", 192, 8), TAILS), ids=str)
def test_fault_4_tables_of_channels_are_near_the_optimum(case) -> None:
    """Many small tables at once: each within 2% of the best, on average within 0.1%."""
    spread, size, k = case
    make = SPREADS.get(spread, lambda rng, shape: rng.standard_t(2, shape))
    x = jnp.asarray(make(np.random.default_rng(1), (48, size)), jnp.float32)
    tables = jax.vmap(lambda row: fit(row, None, clusters=k))(x)
    over = []
    for row, table in zip(np.asarray(x, np.float64), tables, strict=True):
        values, counts = np.unique(row, return_counts=True)
        best = inertia(row, optimal_table(values, counts.astype(float), k))
        over.append((inertia(row, table) + 1e-9) / (best + 1e-9))
    assert max(over) < 1.02
    assert np.mean(over) < 1.001


def test_fault_4_a_few_outliers_of_many_sizes_take_no_entries_of_the_rest() -> None:
    x = np.random.default_rng(2).normal(size=1500)
    x[:5] = [1e2, -1e3, 1e4, -1e5, 1e6]
    best = optimal_table(np.sort(x.astype(np.float32).astype(np.float64)), np.ones(x.size), 16)
    x = jnp.asarray(x, jnp.float32)
    assert inertia(x, fit(x, None, clusters=16)) <= inertia(x, best) * 1.005
