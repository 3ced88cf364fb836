"""Where k-means starts, against other toolkits' published rules in numpy; PocketFlow's bucketed quantization."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.core.layouts import Buckets
from jaxcomp.sharing.kmeans import inits
from jaxcomp.sharing.kmeans.points import points_of

X = np.random.default_rng(0).normal(size=1000).astype(np.float32)
POINTS = points_of(jnp.asarray(X))


@pytest.mark.parametrize("k", [2, 7, 32])
def test_linear_is_tfmots(k) -> None:
    np.testing.assert_allclose(inits.linear.fn(POINTS, k, None), np.linspace(X.min(), X.max(), k), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [2, 7, 32])
def test_density_inverts_the_distribution_at_tfmots_levels(k) -> None:
    """They are even, from 0.01 to 1; tests/test_tfmot_figures.py compares with TFMOT's own numbers."""
    levels = np.linspace(0.01, 1, k)
    got = np.asarray(inits.density.fn(POINTS, k, None))
    exact = np.sort(X)[np.minimum((levels * X.size + 1e-3).astype(int), X.size - 1)]
    np.testing.assert_array_equal(got, exact)


@pytest.mark.parametrize("init", [inits.random, inits.plus_plus], ids=lambda i: i.name)
def test_draws_follow_their_distribution(init) -> None:
    """TFMOT's RANDOM is uniform over the range; k-means++ draws weights, in proportion to their squared distances."""
    keys = jax.random.split(jax.random.key(0), 400)
    x = np.array([-1.0, 0.0, 3.0], np.float32)
    points = points_of(jnp.asarray(x))
    tables = np.asarray(jax.vmap(lambda key: init.fn(points, 2, key))(keys))
    if init is inits.random:
        assert ((tables >= -1) & (tables <= 3)).all()
        means = -1 + 4 * np.array([1, 2]) / 3  # of the lesser and the greater of two uniform numbers
        np.testing.assert_allclose(tables.mean(0), means, atol=4 * 4 * np.sqrt(1 / 18 / 400))
        return
    odds = {}
    for first in x:
        square = (x - first) ** 2
        for second, p in zip(x, square / square.sum() / 3, strict=True):
            pair = (min(first, second), max(first, second))
            odds[pair] = odds.get(pair, 0) + p
    for pair, p in odds.items():
        share = (tables == np.array(pair)).all(1).mean()
        assert abs(share - p) <= 4 * np.sqrt(p * (1 - p) / 400)


@pytest.mark.parametrize("k", [4, 16])
def test_bucketed_quantiles_are_pocketflows(k) -> None:
    """PocketFlow cuts a tensor into buckets; a table starts at its bucket's percentiles 100 i / (k + 1), by rank."""
    size = 48
    w = X[:240].reshape(12, 20)
    t = jc.share(k, init=inits.quantile, per=Buckets(size), iterations=0)
    params = {"kernel": jnp.asarray(w)}
    got = np.asarray(jc.materialize(t.apply(t.init(params), params))["kernel"])
    want = []
    for bucket in w.reshape(-1, size):
        table = np.percentile(bucket, 100 * np.arange(1, k + 1) / (k + 1), method="nearest")
        want.append(table[np.abs(bucket[:, None] - table).argmin(1)])
    np.testing.assert_array_equal(got, np.reshape(want, w.shape))
