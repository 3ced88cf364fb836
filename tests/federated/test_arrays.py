"""Rotations, draws, stochastic codes and wide streams against scipy and numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard as scipy_hadamard

from jaxcomp.federated import arrays

SEED = jnp.uint32(7)


@pytest.mark.parametrize("n", [1, 2, 64, 256, 1024])
def test_hadamard_is_scipys(n) -> None:
    x = np.random.default_rng(n).normal(size=(3, n)).astype(np.float32)
    want = x.astype(np.float64) @ scipy_hadamard(n) / np.sqrt(n)
    assert np.allclose(arrays.hadamard(jnp.asarray(x)), want, atol=1e-5)


def test_hadamard_is_its_own_inverse_at_a_length_of_three_factors() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 2**15))
    assert np.allclose(arrays.hadamard(arrays.hadamard(x)), x, atol=1e-5)


def test_hadamard_refuses_other_lengths() -> None:
    with pytest.raises(ValueError, match="power of two, got 6"):
        arrays.hadamard(jnp.zeros((1, 6)))


@pytest.mark.parametrize(("size", "block", "padded"), [(100, None, 128), (100, 16, 112), (5, 64, 8), (1, None, 1)])
def test_a_rotation_keeps_lengths_and_turns_back(size, block, padded) -> None:
    x = jax.random.normal(jax.random.key(1), (size,))
    length = arrays.rotation_block(size, block)
    y = arrays.rotated(x, SEED, length)
    assert y.size == padded
    assert np.allclose(jnp.linalg.norm(y), jnp.linalg.norm(x), rtol=1e-5)
    assert np.allclose(arrays.unrotated(y, SEED, length, size), x, atol=1e-5)


def test_a_rotation_spreads_an_outlier() -> None:
    x = jnp.zeros(1024).at[3].set(32.0)
    assert np.allclose(jnp.abs(arrays.rotated(x, SEED, 1024)), 1.0)


@given(bits=st.sampled_from([1, 5, 12, 17, 32]), count=st.sampled_from([1, 16]), seed=st.integers(0, 2**31))
def test_wide_integers_come_back_and_waste_no_byte(bits, count, seed) -> None:
    x = np.random.default_rng(seed).integers(0, 2**bits, count, dtype=np.uint64).astype(np.uint32)
    data = arrays.pack_wide(jnp.asarray(x), bits)
    assert data.size == -(-count * bits // 8)
    assert arrays.unpack_wide(data, bits, count).tolist() == x.tolist()


def test_a_wide_stream_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="3 integers of 12 bits take 5 bytes, got 4"):
        arrays.unpack_wide(jnp.zeros(4, jnp.uint8), 12, 3)


@given(seed=st.integers(0, 2**31), count=st.sampled_from([1, 5, 40]))
def test_the_largest_are_those_of_a_stable_sort(seed, count) -> None:
    x = np.random.default_rng(seed).integers(-5, 6, 40).astype(np.float32)  # many ties
    want = np.sort(np.argsort(-np.abs(x), kind="stable")[:count])
    assert np.asarray(arrays.largest(jnp.asarray(x), count)).tolist() == want.tolist()


def test_drawn_places_differ_and_are_all_equally_likely() -> None:
    places = np.asarray(jax.vmap(lambda s: arrays.drawn(s, 10, 4))(jnp.arange(4000, dtype=jnp.uint32)))
    assert all(len(set(row)) == 4 for row in places.tolist())
    counts = np.bincount(places.reshape(-1), minlength=10)
    # Binomial(4000, 0.4): a standard deviation is 31.
    assert np.abs(counts - 1600).max() < 5 * 31


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_stochastic_codes_are_unbiased_and_next_to_the_value(bits) -> None:
    x = jnp.array([-1.0, -0.71, -0.1, 0.0, 0.333, 0.9, 1.0])
    half = arrays.half_step_of(jnp.float32(1), bits)
    keys = jax.random.split(jax.random.key(bits), 4000)
    codes = np.asarray(jax.vmap(lambda k: arrays.stochastic_codes(x, half, bits, k))(keys)).astype(np.float64)
    values = (2 * codes - (2**bits - 1)) * float(half)
    assert np.abs(values - np.asarray(x)).max() <= 2 * float(half) * (1 + 1e-5)
    # A rounding to two neighbours 2h apart has a standard deviation of at most h.
    assert np.abs(values.mean(0) - np.asarray(x)).max() < 5 * float(half) / np.sqrt(4000)
    assert (values[:, [0, -1]] == values[0, [0, -1]]).all()  # the ends are levels


def test_a_range_of_zero_gives_zeros() -> None:
    half = arrays.half_step_of(jnp.float32(0), 4)
    codes = arrays.stochastic_codes(jnp.zeros(5), half, 4, jax.random.key(0))
    assert float(half) == 0
    assert codes.max() < 16


def test_orthonormal_columns_span_the_same_space() -> None:
    m = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    q = np.asarray(arrays.orthonormal(jnp.asarray(m)))
    assert np.allclose(q.T @ q, np.eye(3), atol=1e-5)
    assert np.allclose(q @ (q.T @ m), m, atol=1e-5)
