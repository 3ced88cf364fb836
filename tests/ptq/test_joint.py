"""Pruning and rounding at once lose no more than one after the other: on correlated inputs, and in a real network."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp import NM, Channels, Groups, Int
from jaxcomp.ptq import gptq, sparsegpt
from jaxcomp.trace import row_moments_over
from jaxcomp.trace.rows import Moments
from tests.marks import quick

KEPT = (0.5, 0.75, 0.9, NM(2, 4))
LAYOUTS = (Channels(), Groups(64))
MOST = 1.002
"""Of 90% as good as nothing is left to be made good for."""


def loss(tree, w, h):
    """What a weight in place of ``w`` loses on the moments, as a share of all."""
    w, h = np.asarray(w, np.float64), np.asarray(h, np.float64)
    error = np.asarray(jc.materialize(tree)["kernel"], np.float64) - w
    return np.sum(error * (h @ error)) / np.sum(w * (h @ w))


def over_sequential(w, h, keep, per):
    """The joint loss over that of SparseGPT and then GPTQ under its mask."""
    params = {"kernel": jnp.asarray(w)}
    moments = {"kernel": Moments(jnp.asarray(h), jnp.zeros(len(h)), jnp.float32(4 * len(h)), (), (0,))}
    joint = sparsegpt(params, moments, keep, grid=Int(4), per=per)
    after = gptq(sparsegpt(params, moments, keep), moments, Int(4), per=per)
    kept = [float(jnp.mean(tree["kernel"].mask)) for tree in (joint, after)]
    assert kept[0] == pytest.approx(kept[1], abs=0.01)
    return loss(joint, w, h) / loss(after, w, h)


@pytest.mark.parametrize("keep", quick(KEPT, 0.9))
@pytest.mark.parametrize("per", quick(LAYOUTS, Channels()), ids=repr)
@pytest.mark.parametrize("seed", quick(range(3), 0))
def test_on_correlated_inputs(seed, per, keep):
    rng, n = np.random.default_rng(seed), 128
    x = rng.normal(size=(8 * n, n)) @ (rng.normal(size=(n, n)) * np.exp(-np.arange(n) / 24)[:, None])
    w = np.float32(rng.normal(size=(n, 48)))
    assert over_sequential(w, np.float32(x.T @ x), keep, per) <= MOST


@pytest.mark.slow
@pytest.mark.skipif("JAXCOMP_MINILM" not in os.environ, reason="JAXCOMP_MINILM names no folder of MiniLM")
def test_in_a_sentence_encoder():
    from tests.benchmarks.sentences import batches, network

    with jax.numpy_rank_promotion("allow"):
        net = network()
        four = r"layers/(0/query|3/query|5/output|3/up)/kernel"
        moments = row_moments_over(net.states, four)(net.params, batches(8))
    for path, seen in moments.items():
        _, layer, name, _ = path.split("/")
        w, h = net.params["layers"][layer][name]["kernel"], seen.second
        for keep in KEPT:
            for per in LAYOUTS:
                ratio = over_sequential(w, h, keep, per)
                print(f"{path} {keep} {per}: {ratio:.4f}")
                assert ratio <= MOST, (path, keep, per, ratio)
