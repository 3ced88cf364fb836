from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp.pruning import lamp, redundancy, sensitivity, taylor
from jaxcomp.structure import (
    batch_norm_scale,
    channel_groups,
    fpgm,
    group_fisher,
    group_lasso,
    group_penalty,
    growing_strengths,
    l1,
    l2,
    plan,
    unit_norms,
    unit_score,
)
from tests.structure.models import normal, plain, resnet, stack


def net(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w1"]) @ p["w2"]) @ p["w3"]


PARAMS = plain({"w1": (3, 32), "w2": (32, 16), "w3": (16, 2)})
X = normal(4, 3)
GROUPS = channel_groups(net)(PARAMS, X)  # 32 units of a and b, 16 of b and c
A, B, C = (np.asarray(PARAMS[k], np.float64) for k in ("w1", "w2", "w3"))


def loss(p):
    return jnp.sum(net(p, X) ** 2)


def test_scores_are_what_they_say():
    grads = jax.grad(loss)(PARAMS)
    ga, gb = (np.asarray(grads[k], np.float64) for k in ("w1", "w2"))
    first = {name: s(GROUPS, PARAMS)[0] for name, s in {
        "l1": l1(), "mean": l1(reduce="mean"), "l2": l2(), "sensitivity": unit_score(sensitivity, grads=grads),
        "taylor": unit_score(taylor, grads=grads),
        "only w1": l1(where="w1"),
    }.items()}  # fmt: skip
    np.testing.assert_allclose(first["l1"], abs(A).sum(0) + abs(B).sum(1), rtol=1e-5)
    np.testing.assert_allclose(first["mean"], first["l1"] / 2)
    np.testing.assert_allclose(first["only w1"], abs(A).sum(0), rtol=1e-5)
    np.testing.assert_allclose(first["l2"], np.sqrt((A**2).sum(0) + (B**2).sum(1)), rtol=1e-5)
    np.testing.assert_allclose(first["sensitivity"], abs(ga).sum(0) + abs(gb).sum(1), rtol=1e-4)
    np.testing.assert_allclose(first["taylor"], abs(ga * A).sum(0) + abs(gb * B).sum(1), rtol=1e-4)


def test_fisher_squares_a_unit_of_each_example():
    grads = jax.vmap(jax.grad(lambda p, x: jnp.sum(net(p, x[None]) ** 2)), (None, 0))(PARAMS, X)
    ga, gb = (np.asarray(grads[k], np.float64) for k in ("w1", "w2"))
    want = np.mean([((ga[n] * A).sum(0) + (gb[n] * B).sum(1)) ** 2 for n in range(4)], axis=0)
    np.testing.assert_allclose(group_fisher(grads)(GROUPS, PARAMS)[0], want, rtol=1e-4)


def test_fpgm_sums_distances():
    units = np.concatenate([A.T, B], 1)
    want = [sum(np.linalg.norm(u - v) for v in units) for u in units]
    np.testing.assert_allclose(fpgm()(GROUPS, PARAMS)[0], want, rtol=1e-5)


def test_batch_norm_scale():
    case = resnet(train=False)
    groups = channel_groups(case.fn)(case.params, *case.args)
    scores = batch_norm_scale(r".*/scale")(groups, case.params)
    scale = case.params["params"]["BatchNorm_1"]["scale"]
    np.testing.assert_allclose(scores[[g.units for g in groups].index(6)], scale, rtol=1e-6)
    with pytest.raises(ValueError, match=r"batch_norm_scale: the rule 'gamma' matches no parameter"):
        batch_norm_scale("gamma")(groups, case.params)


def test_scores_of_a_stack_are_per_layer():
    case = stack()
    groups = channel_groups(case.fn)(case.params, *case.args)
    i = next(i for i, g in enumerate(groups) if g.units == 12)
    layers = case.params["params"]["layers"]
    up, down = (np.asarray(layers[n]["kernel"], np.float64) for n in ("Dense_0", "Dense_1"))
    np.testing.assert_allclose(l1()(groups, case.params)[i], abs(up).sum(1) + abs(down).sum(2), rtol=1e-5)
    rows = np.concatenate([up.swapaxes(1, 2), down], -1)[1]
    want = [sum(np.linalg.norm(u - v) for v in rows) for u in rows]
    np.testing.assert_allclose(fpgm()(groups, case.params)[i][1], want, rtol=1e-5)
    np.testing.assert_allclose(
        unit_norms(groups, case.params)[i], np.square(up).sum(1) + np.square(down).sum(2), rtol=1e-5
    )


def test_uniform_keeps_the_best_of_each_group():
    half = plan(GROUPS, PARAMS, sparsity=0.5)
    assert half.counts == [16, 8]
    score = l2()(GROUPS, PARAMS)[0]
    assert score[half.kept[0]].min() > np.delete(score, half.kept[0]).max()
    assert half.widths == {"w1": (3, 16), "w2": (16, 8), "w3": (8, 2)}
    assert "16 of 32" in repr(half)


def test_global_compares_groups():
    scores = (np.arange(32.0) + 100, np.arange(16.0) + 1)
    half = plan(GROUPS, PARAMS, sparsity=0.25, score=lambda groups, params: scores, scope="global")
    ranked = np.concatenate([scores[0] / scores[0].mean(), scores[1] / scores[1].mean()])
    bar = np.sort(ranked)[12]
    assert half.counts == [int((ranked[:32] >= bar).sum()), int((ranked[32:] >= bar).sum())]
    assert sum(half.counts) == 36


def test_rounding_minimum_and_exclusion():
    assert plan(GROUPS, PARAMS, sparsity=0.6, round_to=8).counts == [16, 8]
    assert plan(GROUPS, PARAMS, sparsity=0.99, min_channels=3).counts == [3, 3]
    assert plan(GROUPS, PARAMS, sparsity=0.99, min_channels=3, round_to=8).counts == [8, 8]
    assert plan(GROUPS, PARAMS, sparsity=0.5, exclude="w1").counts == [32, 8]
    assert plan(GROUPS, PARAMS, sparsity=0.9, round_to=lambda g: 16 if g.units == 32 else 1).counts == [16, 2]


@settings(max_examples=8, deadline=None)
@given(
    fraction=st.floats(0.1, 1.0),
    scope=st.sampled_from(["uniform", "global"]),
    by=st.sampled_from(["parameters", "macs"]),
)
def test_budgets_are_met_with_little_to_spare(fraction, scope, by):
    full = GROUPS.parameters() if by == "parameters" else GROUPS.macs()
    made = plan(GROUPS, PARAMS, scope=scope, **{by: fraction * full})
    got = made.parameters if by == "parameters" else made.macs
    assert got <= fraction * full
    assert got >= fraction * full - 0.12 * full
    assert made.parameters == sum(w.size for w in jax.tree.leaves(made.take(PARAMS)))


def test_latency_budget_calls_the_measure_a_dozen_times():
    calls = []

    def measure(p):
        calls.append(p)
        return p.macs / 1e3

    made = plan(GROUPS, PARAMS, latency=(measure, 0.5 * GROUPS.macs() / 1e3), scope="global")
    assert made.macs <= 0.5 * GROUPS.macs()
    assert len(calls) <= 14


def test_bad_targets():
    with pytest.raises(ValueError, match=r"exactly one of sparsity.*got none"):
        plan(GROUPS, PARAMS)
    with pytest.raises(ValueError, match=r"got \['sparsity', 'macs'\]"):
        plan(GROUPS, PARAMS, sparsity=0.5, macs=3)
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\), got 50"):
        plan(GROUPS, PARAMS, sparsity=50)
    with pytest.raises(ValueError, match="min_channels must be at least 1, got 0"):
        plan(GROUPS, PARAMS, sparsity=0.5, min_channels=0)
    with pytest.raises(ValueError, match="scope must be"):
        plan(GROUPS, PARAMS, sparsity=0.5, scope="local")
    with pytest.raises(ValueError, match="exclude='nothing' matches no parameter"):
        plan(GROUPS, PARAMS, sparsity=0.5, exclude="nothing")
    least = 3 * 4 + 4 * 4 + 4 * 2
    with pytest.raises(ValueError, match=f"cannot be met: the smallest reachable is {least}"):
        plan(GROUPS, PARAMS, parameters=10, min_channels=4)
    with pytest.raises(ValueError, match=r"grads must have an entry of shape \(3, 32\) for 'w1', found none"):
        plan(GROUPS, PARAMS, sparsity=0.5, score=unit_score(taylor, grads={}))
    with pytest.raises(ValueError, match=r"must have shape \(32,\) and no NaN"):
        plan(GROUPS, PARAMS, sparsity=0.5, score=lambda *_: (np.full(32, np.nan), np.ones(16)))
    with pytest.raises(ValueError, match=r"score: 'w[123]' must have shape .*no such leaf"):
        plan(GROUPS, {}, sparsity=0.5)

    def plain_sum(p, x):
        return x @ p["w1"]

    with pytest.raises(ValueError, match="no channel can be removed"):
        plan(channel_groups(plain_sum)(PARAMS, X), PARAMS, sparsity=0.5)
    with pytest.raises(ValueError, match="reduce must be"):
        l1(reduce="max")
    with pytest.raises(ValueError, match="unit_score: 'taylor' needs grads, got none; it comes from jax"):
        unit_score(taylor)
    for of_units in (redundancy, lamp()):
        with pytest.raises(ValueError, match="scores or compares whole units itself"):
            unit_score(of_units)


def test_penalty_is_decay_of_each_unit():
    strengths = (jnp.arange(32.0), jnp.zeros(16))
    grads = jax.jit(jax.grad(lambda p: group_penalty(GROUPS, p, strengths)))(PARAMS)
    np.testing.assert_allclose(grads["w1"], A * np.arange(32.0), rtol=1e-5)
    np.testing.assert_allclose(grads["w2"], B * np.arange(32.0)[:, None], rtol=1e-5)
    np.testing.assert_allclose(grads["w3"], 0 * C)


def test_lasso_and_growing_strengths():
    norms = [np.sqrt((A**2).sum(0) + (B**2).sum(1)), np.sqrt((B**2).sum(0) + (C**2).sum(1))]
    np.testing.assert_allclose(
        jax.jit(lambda p: group_lasso(GROUPS, p, 2.0))(PARAMS), 2 * sum(n.sum() for n in norms), rtol=1e-5
    )
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    assert all(
        bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(jax.jit(jax.grad(lambda p: group_lasso(GROUPS, p)))(zero))
    )
    grown = jax.jit(lambda p: growing_strengths(GROUPS, p, base=1.0, alpha=4.0))(PARAMS)[0]
    assert float(grown.max()) == pytest.approx(16.0)
    assert float(grown.min()) == pytest.approx(1.0)
    assert int(grown.argmax()) == int(norms[0].argmin())
    with pytest.raises(ValueError, match=r"unit_norms: 'w1' must have shape"):
        unit_norms(GROUPS, {"w1": jnp.ones(3)})


def test_training_with_the_penalty_makes_units_that_can_go():
    def objective(p):
        return loss(p) * 0.01 + group_penalty(GROUPS, p, growing_strengths(GROUPS, p, base=0.05, alpha=6.0))

    p = PARAMS
    step = jax.jit(lambda p: jax.tree.map(lambda w, g: w - 0.1 * g, p, jax.grad(objective)(p)))
    for _ in range(150):
        p = step(p)
    size = np.sqrt(np.asarray(unit_norms(GROUPS, p)[0]))
    assert (size < 1e-2 * size.max()).sum() >= 8


def test_a_matrix_called_b_counts() -> None:
    """``matrices`` alone would not know it from a bias of stacked layers; the groups do."""
    params = {"a": jnp.array([[1.0, 2.0, 3.0]]), "b": jnp.array([[9.0], [1.0], [1.0]])}
    groups = channel_groups(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"])(params, jnp.ones((1, 1)))
    kept = plan(groups, params, sparsity=1 / 3).take(params)
    assert kept["a"].tolist() == [[1.0, 3.0]]  # norms (1, 9), (2, 1), (3, 1): the second goes
