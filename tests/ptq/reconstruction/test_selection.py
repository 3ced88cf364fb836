"""Scores of units by what a least-squares fit leaves: against fits in numpy, and the lasso's own conditions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.ptq.reconstruction import lasso, removal_error
from jaxcomp.ptq.reconstruction.selection import Consumer, _gram, _proximal
from jaxcomp.structure import channel_groups, plan
from jaxcomp.structure.scores import l2
from jaxcomp.trace.rows import row_moments

rng = np.random.default_rng(0)


def heads(p, x):
    h = jnp.einsum("nd,dhk->nhk", x, p["value"])
    return jnp.tanh(h.reshape(len(x), -1)) @ p["out"]


PARAMS = {
    "value": rng.normal(size=(5, 4, 2)).astype(np.float32),
    "out": rng.normal(size=(8, 3)).astype(np.float32),
}
X = rng.normal(size=(64, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def found():
    return channel_groups(heads)(PARAMS, X), row_moments(heads)(PARAMS, X)


def test_a_removal_costs_what_a_fit_without_it_leaves(found) -> None:
    groups, moments = found
    scores = removal_error(moments, damping=1e-9)(groups, PARAMS)
    with pytest.raises(ValueError, match="score: the moments are of 'params/up', and the parameters are"):
        removal_error({"params/up": next(iter(moments.values()))})(groups, PARAMS)
    at = next(i for i, g in enumerate(groups) if any(s.path == "out" and s.axis == 0 for s in g.slices))
    units, unit_of = groups[at].units, next(s.unit_of for s in groups[at].slices if s.path == "out")
    rows = np.tanh(np.einsum("nd,dhk->nhk", X.astype(np.float64), PARAMS["value"].astype(np.float64)).reshape(64, -1))
    y = rows @ PARAMS["out"].astype(np.float64)

    def left(kept):
        x = rows[:, np.isin(unit_of, kept)]
        return np.square(y - x @ np.linalg.lstsq(x, y, rcond=None)[0]).sum() if len(kept) else np.square(y).sum()

    kept, wanted = list(range(units)), np.zeros(units)
    while kept:
        costs = [left([k for k in kept if k != u]) for u in kept]
        u = kept[int(np.argmin(costs))]
        wanted[u] = min(costs)
        kept.remove(u)
    np.testing.assert_allclose(scores[at], wanted, rtol=1e-3, atol=1e-3)
    half = plan(groups, PARAMS, sparsity=0.5, score=removal_error(moments))
    assert half.counts[at] == units // 2


def test_the_lasso_meets_its_conditions_and_ranks_by_entry(found) -> None:
    groups, moments = found
    second, w = np.asarray(moments["out"].second, np.float64), PARAMS["out"].astype(np.float64)
    gram = _gram(Consumer(w, second, np.arange(8) // 2), 4)
    parts = [np.asarray(w[2 * u : 2 * u + 2]) for u in range(4)]
    blocks = second.reshape(4, 2, 4, 2)
    plain = [[np.sum(blocks[u, :, v] * (parts[u] @ parts[v].T)) for v in range(4)] for u in range(4)]
    np.testing.assert_allclose(gram, plain, rtol=1e-9)
    target, penalty = gram.sum(1), 0.2 * np.abs(gram.sum(1)).max()
    beta = _proximal(gram, target, (penalty, float(np.linalg.eigvalsh(gram)[-1]), 5000), np.zeros(4))
    slope = target - gram @ beta
    np.testing.assert_allclose(slope[beta != 0], penalty * np.sign(beta[beta != 0]), rtol=1e-5)
    assert (np.abs(slope) <= penalty * (1 + 1e-6)).all()
    at = next(i for i, g in enumerate(groups) if any(s.path == "out" and s.axis == 0 for s in g.slices))
    scores = lasso(moments)(groups, PARAMS)[at]
    if groups[at].units == 4:
        assert scores.argmax() == np.abs(target).argmax()
    assert (scores >= 0).all()


def test_stacked_layers_keep_their_own_and_groups_without_consumers_are_scored_by_size() -> None:
    def stacked(p, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w["up"]) @ w["down"], None), x, p)[0]

    p = {"up": rng.normal(size=(2, 5, 4)).astype(np.float32), "down": rng.normal(size=(2, 4, 5)).astype(np.float32)}
    p["down"][0, 1] = p["down"][1, 3] = 0
    groups = channel_groups(stacked)(p, X)
    moments = row_moments(stacked)(p, X)
    (scores,) = removal_error(moments)(groups, p)
    assert scores.shape == (2, 4)
    assert scores.argmin(1).tolist() == [1, 3]
    np.testing.assert_array_equal(lasso({})(groups, p)[0], l2()(groups, p)[0])
