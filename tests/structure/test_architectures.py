from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomp.structure import Groups, Plan, channel_groups, check_shrink, shrink
from tests.marks import quick
from tests.structure.models import CASES, Case, normal, plain


@pytest.fixture(autouse=True)
def jax_defaults():
    """Networks as users write them, under JAX's own rules of promotion."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def built(name: str) -> tuple[Case, Groups]:
    case = CASES[name]()
    return case, channel_groups(case.fn)(case.params, *case.args)


def found(groups: Groups) -> list[tuple[int, frozenset[str]]]:
    named = [
        (g.units, frozenset(f"{s.path}:{s.axis}" + (f"*{s.width}" if s.width > 1 else "") for s in g.slices))
        for g in groups
    ]
    return sorted(named, key=by_name)


def by_name(group: tuple[int, frozenset[str]]) -> tuple[int, list[str]]:
    return group[0], sorted(group[1])


def random_plan(groups: Groups, rng: np.random.Generator) -> Plan:
    def some(units: int, layers: int | None, k: int):
        rows = [np.sort(rng.choice(units, k, replace=False)) for _ in range(layers or 1)]
        return np.stack(rows) if layers else rows[0]

    return Plan(groups, tuple(some(g.units, g.layers, int(rng.integers(1, g.units))) for g in groups))


@pytest.mark.parametrize("name", CASES)
def test_finds_the_groups_a_reader_finds(name):
    case, groups = built(name)
    wanted = sorted(((n, frozenset(slices.split())) for n, slices in case.groups), key=by_name)
    assert found(groups) == wanted
    assert not groups.unknown


SHRUNKEN = ("resnet", "mobilenet", "flatten", "gpt, tied, fused, rotary", "linen lstm", "scan of remat", "nnx")


@pytest.mark.parametrize("name", quick(CASES, *SHRUNKEN))
def test_shrunken_equals_masked(name):
    case, groups = built(name)
    plan = random_plan(groups, np.random.default_rng(len(name)))
    assert check_shrink(case.fn, plan, case.params, *case.args) < 1e-4
    assert sum(x.size for x in jax.tree.leaves(plan.take(case.params))) == plan.parameters < groups.parameters()
    assert plan.macs < groups.macs()


def flops(fn, *args) -> float:
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("name", quick(["resnet", "gpt, tied, fused, rotary"], "resnet"))
def test_compiled_work_falls_as_the_plan_says(name):
    case, groups = built(name)
    plan = Plan(groups, tuple(np.arange(g.units // 2) for g in groups))
    full = flops(case.fn, case.params, *case.args)
    small = flops(shrink(case.fn, plan), plan.take(case.params), *case.args)
    assert abs(small / full - plan.macs / groups.macs()) < 0.15


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_random_plans_of_a_random_residual_net(seed):
    """Equality holds for any choice of units, in a net that splits, joins, gates and repeats channels."""
    rng = np.random.default_rng(seed)
    wide, inner = (int(n) for n in rng.integers(2, 6, 2))

    def fn(p, x):
        h = x @ p["in"]
        a, b = jnp.split(h @ p["up"], [inner], -1)
        h = h + jnp.concatenate([jnp.tanh(a), jax.nn.sigmoid(b) * b], -1) @ p["down"]
        doubled = jnp.repeat(h, 2, axis=-1).reshape(len(x), wide, 2).sum(-1)
        return (doubled * jax.nn.softplus(h @ p["gate"])) @ p["out"]

    shapes = {"in": (3, wide), "up": (wide, 2 * inner + 1), "down": (2 * inner + 1, wide), "gate": (wide, wide)}
    params, x = plain(shapes | {"out": (wide, 2)}), normal(2, 3)
    groups = channel_groups(fn)(params, x)
    assert sorted(g.units for g in groups) == sorted([wide, 2 * inner + 1])
    assert check_shrink(fn, random_plan(groups, rng), params, x) < 1e-4
