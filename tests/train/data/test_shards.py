"""Shards of a federation: a partition, of few classes where wanted, gone through again where short."""

from __future__ import annotations

import numpy as np
import pytest

from train.data.shards import client_batches, dirichlet_shards, iid_shards


def test_shards_are_a_partition() -> None:
    labels = np.repeat(np.arange(10), 100)
    for shards in (iid_shards(1000, 7, seed=1), dirichlet_shards(labels, 7, alpha=0.5, seed=1)):
        assert np.sort(np.concatenate(shards)).tolist() == list(range(1000))


def test_a_small_alpha_gives_a_client_few_classes() -> None:
    labels = np.repeat(np.arange(10), 500)

    def largest_share(shards):
        return np.mean([np.bincount(labels[s]).max() / len(s) for s in shards])

    assert largest_share(iid_shards(5000, 10, seed=0)) < 0.15
    assert largest_share(dirichlet_shards(labels, 10, alpha=0.1, seed=0)) > 0.4
    assert largest_share(dirichlet_shards(labels, 10, alpha=1000.0, seed=0)) < 0.15


def test_a_short_shard_is_gone_through_again() -> None:
    got = client_batches(np.array([3, 5, 7]), 2, 4, entropy=(0, 1))
    assert got.shape == (2, 4)
    assert np.bincount(got.reshape(-1))[[3, 5, 7]].min() >= 2


def test_shards_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clients must be in 1..3, the number of examples, got 4"):
        iid_shards(3, 4, seed=0)
    with pytest.raises(ValueError, match="alpha must be positive, got 0"):
        dirichlet_shards(np.zeros(10, int), 2, alpha=0, seed=0)
    with pytest.raises(ValueError, match="some of 10 clients always get fewer than 1 examples"):
        dirichlet_shards(np.zeros(12, int), 10, alpha=0.001, seed=0)
