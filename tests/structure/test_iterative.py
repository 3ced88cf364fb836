from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomp.pruning import taylor
from jaxcomp.structure import (
    channel_groups,
    composed,
    fraction_per_round,
    measured_seconds,
    plan,
    prune_in_rounds,
    shrink,
    unit_score,
)
from tests.structure.models import ResNet, normal, plain, resnet, stack


def net(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w1"]) @ p["w2"]) @ p["w3"]


PARAMS = plain({"w1": (3, 32), "w2": (32, 16), "w3": (16, 2)})
X = normal(64, 3)


def halves(groups, params, fn):
    return plan(groups, params, sparsity=0.5)


@pytest.mark.parametrize(
    "case", [resnet(train=False), pytest.param(stack(), marks=pytest.mark.slow)], ids=["resnet", "stack"]
)
def test_two_plans_as_one(case):
    first = halves(channel_groups(case.fn)(case.params, *case.args), case.params, case.fn)
    small = first.take(case.params)
    second = halves(channel_groups(shrink(case.fn, first))(small, *case.args), small, None)
    both = composed(first, second)
    jax.tree.map(np.testing.assert_array_equal, both.take(case.params), second.take(small))
    assert both.widths == second.widths
    assert both.parameters == second.parameters
    got = jax.jit(shrink(case.fn, both))(second.take(small), *case.args)
    want = jax.jit(shrink(shrink(case.fn, first), second))(second.take(small), *case.args)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), got, want)


def test_plans_that_do_not_follow_each_other():
    first = halves(channel_groups(net)(PARAMS, X), PARAMS, net)
    with pytest.raises(ValueError, match="composed: the second plan must be over the tree that the first leaves"):
        composed(first, first)


@jax.numpy_dtype_promotion("standard")  # optax's own code mixes types
def test_rounds_with_fine_tuning_keep_the_optimizer():
    target = jnp.sin(3 * X[:, :2])
    tx = optax.adam(1e-2)

    def loss(fn, p):
        return jnp.mean((fn(p, X) - target) ** 2)

    def tuned(fn, p, state, steps=120):
        @jax.jit
        def run(p, state):
            def step(carry, _):
                p, state = carry
                updates, state = tx.update(jax.grad(partial(loss, fn))(p), state, p)
                return (optax.apply_updates(p, updates), state), None

            return jax.lax.scan(step, (p, state), length=steps)[0]

        return run(p, state)

    def choose(groups, p, fn):
        score = unit_score(taylor, grads=jax.grad(partial(loss, fn))(p))
        return plan(groups, p, sparsity=fraction_per_round(0.75, 2), score=score)

    params, state = tuned(net, PARAMS, tx.init(PARAMS))
    seen = []

    def watched(made, p, state):
        fn = shrink(net, made)
        seen.append((float(loss(fn, p)), int(state[0].count)))
        moments = jax.tree.map(jnp.shape, state[0].mu)
        assert moments == jax.tree.map(jnp.shape, p)
        assert float(jnp.abs(state[0].nu["w2"]).max()) > 0
        return tuned(fn, p, state)

    done = prune_in_rounds(net, params, X, rounds=[choose, choose], tune=watched, state=state)
    assert done.plan.counts == [8, 4]
    assert done.plan.widths == {k: v.shape for k, v in done.params.items()}
    assert [count for _, count in seen] == [120, 240]  # the optimizer goes on, it does not begin anew
    after = float(loss(done.fn, done.params))
    assert after < 0.1 * seen[0][0]  # recovered from the first removal, and after the second
    assert after < 0.3 * seen[1][0]


@pytest.mark.slow
def test_train_mode_between_rounds_moves_batch_statistics():
    case = resnet(train=False)
    tx = optax.sgd(1e-2, momentum=0.9)
    full = partial(ResNet(train=True).apply, mutable=["batch_stats"])

    def tune(made, variables, state):
        def loss(params):
            y, new = shrink(full, made)({**variables, "params": params}, *case.args)
            return jnp.mean(y**2), new["batch_stats"]

        grads, batch_stats = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
        updates, state = tx.update(grads, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), "batch_stats": batch_stats}, state

    done = prune_in_rounds(
        case.fn,
        case.params,
        *case.args,
        rounds=[halves, halves],
        tune=tune,
        state=tx.init(case.params["params"]),
        trained=lambda variables: variables["params"],
    )
    assert jax.tree.map(jnp.shape, done.state[0].trace) == jax.tree.map(jnp.shape, done.params["params"])
    means = done.params["batch_stats"]["BatchNorm_0"]["mean"]
    before = done.plan.take(case.params)["batch_stats"]["BatchNorm_0"]["mean"]
    assert means.shape == (2,)
    assert float(jnp.abs(means - before).max()) > 1e-3
    assert jnp.isfinite(done.fn(done.params, *case.args)).all()


def test_no_round_and_no_sparsity():
    with pytest.raises(ValueError, match="rounds is empty"):
        prune_in_rounds(net, PARAMS, X, rounds=[], tune=lambda made, p, s: (p, s))
    with pytest.raises(ValueError, match=r"sparsity in \[0, 1\) and at least one round, got 1.0, 2"):
        fraction_per_round(1.0, 2)


@pytest.mark.slow
def test_a_budget_of_measured_seconds():
    params, x = plain({"w1": (64, 2048), "w2": (2048, 1024), "w3": (1024, 8)}), normal(256, 64)
    groups = channel_groups(net)(params, x)
    seconds = measured_seconds(net, params, x)
    whole = seconds(plan(groups, params, sparsity=0.0))
    calls = []

    def measure(tried):
        calls.append(seconds(tried))
        return calls[-1]

    made = plan(groups, params, latency=(measure, 0.5 * whole), round_to=128)
    assert 0 < made.macs < 0.9 * groups.macs()
    assert min(calls) <= 0.5 * whole
