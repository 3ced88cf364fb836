"""Bits to round by: uniform, alike in no two places, under no two keys; and the same wherever they are made."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.noise import bits

KEY = jax.random.key(3)


def uniform(key, *shape):
    return np.asarray(bits(key, shape)).astype(np.float64) / 2**32


def z(x, axis=None):
    """By how many standard deviations means of uniform numbers are off."""
    n = x.size if axis is None else x.shape[axis]
    return (x.mean(axis) - 0.5) * np.sqrt(12 * n)


def test_bits_are_uniform_and_near_ones_are_not_tied():
    x = uniform(KEY, 300, 1000)
    assert abs(z(x)) < 4
    counts = np.bincount((x * 256).astype(int).ravel(), minlength=256)
    assert 150 < ((counts - x.size / 256) ** 2 / (x.size / 256)).sum() < 370  # chi-square of 255 degrees
    low = np.asarray(bits(KEY, (300, 1000))) & 1
    assert abs(low.mean() - 0.5) < 4 * 0.5 / np.sqrt(low.size)
    for lag in (1, 2, 3, 16, 1000, 1001):
        flat = x.ravel()
        assert abs(np.corrcoef(flat[:-lag], flat[lag:])[0, 1]) < 4.5 / np.sqrt(flat.size)
    for axis in (0, 1):
        assert 0.85 < z(x, axis).std() < 1.15


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_each_key_has_noise_of_its_own(impl):
    key = jax.random.key(3, impl=impl)
    keys = [
        key,
        jax.random.key(4, impl=impl),
        *jax.random.split(key),
        jax.random.fold_in(key, 7),
    ]  # its first is the second of a split
    noises = [uniform(k, 100_000) for k in keys]
    ties = np.corrcoef(noises) - np.eye(len(keys))
    assert np.abs(ties).max() < 4.5 / np.sqrt(100_000)
    shifted = [np.corrcoef(noises[0][d:], noises[1][: noises[1].size - d])[0, 1] for d in (1, 2, 7)]
    assert np.abs(shifted).max() < 4.5 / np.sqrt(90_000)


def test_an_element_is_fair_over_keys():
    keys = jax.random.split(KEY, 4000)
    x = np.asarray(jax.vmap(lambda key: bits(key, (8, 8)))(keys)).astype(np.float64) / 2**32
    assert 0.7 < z(x, 0).std() < 1.3
    np.testing.assert_array_equal(np.asarray(bits(keys[5], (8, 8))) / 2**32, x[5])


def test_shapes_without_elements_or_axes():
    assert bits(KEY, ()).shape == ()
    assert bits(KEY, (0, 3)).dtype == jnp.uint32
