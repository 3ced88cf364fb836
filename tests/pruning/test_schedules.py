"""Schedules against hand tables of their published formulas and due steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jaxcomp as jc
from jaxcomp.pruning.schedules import alternating, constant, iterative, polynomial


def pruned(t: jc.Transform, params, steps: int) -> list[int]:
    """How many weights are zero after each update."""
    state, counts = t.init(params), []
    update = jax.jit(lambda s, i: t.update(s, params, step=i))
    for i in range(steps):
        state = update(state, jnp.int32(i))
        counts.append(int((jc.materialize(t.apply(state, params))["kernel"] == 0).sum()))
    return counts


PARAMS = {"kernel": jnp.arange(1.0, 101.0).reshape(10, 10)}


@pytest.mark.parametrize(("initial", "final", "power"), [(0.0, 0.8, 3), (0.2, 0.9, 3), (0.5, 0.5, 1), (0.1, 0.6, 2)])
def test_polynomial_decay_numbers_and_due_steps(initial, final, power) -> None:
    plan = polynomial(final, initial=initial, begin=20, end=80, power=power, every=7)
    for step in range(120):
        p = min(1.0, max(0.0, (step - 20) / 60))
        assert float(plan(step)) == pytest.approx(final + (initial - final) * (1 - p) ** power, abs=1e-6)
        assert bool(plan.due(step)) == (20 <= step <= 80 and (step - 20) % 7 == 0)


def test_constant_sparsity_due_steps() -> None:
    plan = constant(0.3, begin=5, end=9, every=2)
    assert [s for s in range(20) if plan.due(s)] == [5, 7, 9]
    assert float(plan(7)) == pytest.approx(0.3)
    assert [s for s in range(20) if constant(0.3, begin=5, every=6).due(s)] == [5, 11, 17]


def test_a_gated_plan_prunes_at_due_steps_only_and_keeps_the_last() -> None:
    plan = polynomial(0.8, begin=2, end=6, power=1, every=2)
    assert pruned(plan.gate(jc.prune(plan)), PARAMS, 10) == [0, 0, 0, 0, 40, 40, 80, 80, 80, 80]


def test_iterative_prunes_a_fraction_of_the_survivors() -> None:
    plan = iterative(0.5, rounds=3, every=2, begin=1)
    assert pruned(plan.gate(jc.prune(plan, regrow=False)), PARAMS, 8) == [0, 50, 50, 75, 75, 88, 88, 88]


def test_alternating_phases() -> None:
    plan = alternating(0.9, dense=2, sparse=2, begin=1, end=8)
    assert pruned(plan.gate(jc.prune(plan)), PARAMS, 12) == [0, 0, 0, 90, 90, 0, 0, 90, 90, 90, 90, 90]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: polynomial(1.0, begin=0, end=1), r"polynomial: sparsity must be a number in \[0, 1\), got 1.0"),
        (lambda: polynomial(0.5, begin=3, end=3), r"polynomial: end must be after begin, got begin=3, end=3"),
        (lambda: polynomial(0.5, begin=0, end=3, power=0), r"polynomial: power must be positive, got 0"),
        (lambda: polynomial(0.5, begin=0, end=3, every=0), r"polynomial: wants a period of at least 1"),
        (lambda: constant(0.5, begin=-1), r"constant: wants a period of at least 1 and a beginning at 0 or later"),
        (lambda: iterative(0.0, rounds=2, every=1), r"iterative: wants a rate above 0 and at least one round"),
        (lambda: alternating(0.5, dense=0, sparse=1), r"alternating: phases take at least one step, got dense=0"),
    ],
)
def test_schedules_are_checked_where_written(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
