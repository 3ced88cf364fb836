"""Leaf after leaf in the program's order, each by what the compressed leaves before it give it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.ptq import sequentially
from jaxcomp.trace import row_moments, row_moments_over

RNG = np.random.default_rng(2)


def normal(*shape):
    return jnp.array(RNG.normal(size=shape), jnp.float32)


PARAMS = {
    "in": normal(4, 6),
    "layers": {"key": normal(3, 6, 6), "query": normal(3, 6, 6), "up": normal(3, 6, 6)},
    "out": normal(6, 2),
}
BATCHES = [normal(5, 4), (normal(3, 4),)]


def net(p, x):
    def layer(h, w):
        return jnp.tanh((h @ w["key"]) * (h @ w["query"])) @ w["up"], None

    return lax.scan(layer, x @ p["in"], p["layers"])[0] @ p["out"]


def test_each_leaf_sees_the_rows_that_the_ones_before_it_now_give():
    calls = []

    def halved(leaves, moments):
        calls.append({path: (np.asarray(m.second), float(m.count)) for path, m in moments.items()})
        return {path: leaf / 2 for path, leaf in leaves.items()}

    made = sequentially(net, halved)(PARAMS, BATCHES)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b / 2).all()), made, PARAMS))
    together, up = ["layers/key", "layers/query"], ["layers/up"]
    assert [sorted(c) for c in calls] == [["in"], *[together, up] * 3, ["out"]]

    x = np.concatenate([np.asarray(BATCHES[0]), np.asarray(BATCHES[1][0])]).astype(np.float64)
    half = jax.tree.map(lambda w: np.asarray(w, np.float64) / 2, PARAMS)
    wanted = [x]
    h = x @ half["in"]
    for i in range(3):
        key, query, last = (half["layers"][name][i] for name in ("key", "query", "up"))
        wanted += [h, inner := np.tanh((h @ key) * (h @ query))]
        h = inner @ last
    for call, rows in zip(calls, [*wanted, h], strict=True):
        for second, count in call.values():
            np.testing.assert_allclose(second, rows.T @ rows, rtol=1e-4, atol=1e-5)
            assert count == 8


def test_a_leaf_that_is_not_chosen_stays_and_no_batch_is_said():
    made = sequentially(net, lambda leaves, moments: {p: 0 * w for p, w in leaves.items()}, where="out")(
        PARAMS, BATCHES
    )
    assert made["in"] is PARAMS["in"]
    assert not made["out"].any()
    with pytest.raises(ValueError, match="sequentially: there is no batch"):
        sequentially(net, lambda leaves, moments: leaves)(PARAMS, iter(()))
    with pytest.raises(TypeError, match=r"got quantize\(Int\(4\)\); write lambda leaves, moments: gptq"):
        sequentially(net, jc.quantize(jc.Int(4)))
    with pytest.raises(TypeError, match=r"wants batches, got one array of shape .*; write \[x\] if it is one batch"):
        sequentially(net, lambda leaves, moments: leaves)(PARAMS, BATCHES[0])
    with pytest.raises(TypeError, match=r"row_moments_over: wants batches, got dict; write \[batch\]"):
        row_moments_over(net)(PARAMS, {"x": BATCHES[0]})
    assert set(row_moments(net)(PARAMS, BATCHES[0])) == {"in", "layers/key", "layers/query", "layers/up", "out"}
