"""The k smallest against a stable argsort; both ways of selecting; exact fractions."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcomp.core.bits import order_keys
from jaxcomp.pruning.masks import thresholds
from jaxcomp.pruning.masks.thresholds import fraction_of, smallest
from tests.marks import quick

select = jax.jit(lambda x, e, k: smallest([order_keys(x)], [e], k)[0])
radix = jax.jit(lambda x, e, k: thresholds._kth_by_radix([order_keys(x)], [e], k))
bisection = jax.jit(lambda x, e, k: thresholds._kth_by_bisection([order_keys(x)], [e], k))


@given(seed=st.integers(0, 2**31), k=st.integers(0, 1500), few=st.booleans(), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_exactly_k_with_ties_by_index(seed, k, few, share) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 4, 1500).astype(np.float32) if few else rng.normal(size=1500).astype(np.float32)
    eligible = rng.random(1500) < share
    index = np.flatnonzero(eligible)
    k = min(k, index.size)
    want = np.zeros(1500, bool)
    want[index[np.argsort(x[index], kind="stable")[:k]]] = True
    assert (np.asarray(select(x, eligible, jnp.uint32(k))) == want).all()
    if k:
        kth = np.sort(x[index])[k - 1]
        rank = k - int((x[index] < kth).sum())  # among its equals
        for way in (radix, bisection):
            assert [int(v) for v in way(x, eligible, jnp.uint32(k))] == [int(order_keys(jnp.asarray(kth))), rank]


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("some", quick([False, True], True))
def test_large_arrays_take_the_other_way(few, some) -> None:
    sizes, k = (300_001, 1000, 1 << 18), 123_456
    rng = np.random.default_rng(0)
    x = rng.normal(size=sum(sizes)).astype(np.float32)
    x = np.round(x) if few else x
    eligible = rng.random(x.size) < (0.7 if some else 2)
    index = np.flatnonzero(eligible)
    want = np.zeros(x.size, bool)
    want[index[np.argsort(x[index], kind="stable")[:k]]] = True

    @jax.jit
    def got(parts, among):
        return smallest([order_keys(p) for p in parts], among if some else [None] * 3, jnp.uint32(k))

    ends = np.cumsum(sizes)[:-1]
    assert (np.concatenate(got(np.split(x, ends), np.split(eligible, ends))) == want).all()


@pytest.mark.parametrize("wanted", [0, 1, 20_000, 10**9])
def test_the_last_tie_is_found_either_way(wanted) -> None:
    rng = np.random.default_rng(0)
    keys, eligible = rng.integers(0, 4, (3, 17_001)).astype(np.uint32), rng.random((3, 17_001)) < 0.7
    ties = np.flatnonzero((keys == 2) & eligible)
    want = (min(wanted, ties.size), keys.size if wanted > ties.size else 0 if wanted == 0 else ties[wanted - 1] + 1)
    for way in (thresholds._last_tie_by_scan, thresholds._last_tie_by_chunk):
        found = way(jnp.asarray(keys), jnp.asarray(eligible), jnp.uint32(2), jnp.uint32(wanted))
        assert tuple(map(int, found)) == want


def test_keys_order_like_numbers() -> None:
    x = np.array([-np.inf, -3.4e38, -1.0, -1e-38, -0.0, 0.0, 1e-38, 1.0, 3.4e38, np.inf, np.nan], np.float32)
    keys = np.asarray(order_keys(jnp.asarray(x))).astype(np.int64)
    assert (np.diff(keys) >= 0).all()
    assert keys[4] == keys[5]
    assert (np.diff(np.delete(keys, [3, 4, 6])) > 0).all()


def test_nan_of_either_sign_is_last() -> None:
    x = jnp.array([jnp.nan, -jnp.nan, jnp.inf])
    assert smallest([order_keys(x)], [None], jnp.uint32(1))[0].tolist() == [False, False, True]


@given(total=st.integers(0, 2**31 - 1), numerator=st.integers(0, 2**6))
def test_fractions_are_exact_and_half_goes_to_even(total, numerator) -> None:
    fraction = numerator / 2**6
    want = round(Fraction(numerator, 2**6) * total)
    assert int(fraction_of(jnp.uint32(total), fraction)) == want
    assert int(fraction_of(jnp.uint32(total), jnp.float32(fraction))) == want


@given(total=st.integers(1, 100_000_000), percent=st.integers(0, 99))
def test_percentages_are_what_one_expects(total, percent) -> None:
    assert int(fraction_of(jnp.uint32(total), percent / 100)) == round(Fraction(percent, 100) * total)
