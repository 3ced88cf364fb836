"""The walk over a jaxpr, and equations with jaxprs inside rebuilt around any runner."""

from __future__ import annotations

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from jaxcomp.trace import nested, walk
from jaxcomp.trace.control_flow import rebuilt
from tests.marks import quick
from tests.trace.models import CASES, normal


def interpreted(jaxpr, part, values):
    """Runs a jaxpr by the walk alone, its loops and calls rebuilt around itself."""

    def equation(eqn, location, operands):
        return rebuilt(eqn, operands, interpreted) if nested.is_open(eqn) else nested.bind(eqn, operands)

    return walk.run(jaxpr, values, equation, constant=lambda value: value)


@pytest.mark.parametrize("name", ["stacked_scan", "recurrent", "while_and_fori", "branching", "rematerialized"])
def test_rebuilt_equations_compute_the_same_under_jit_and_vmap(name: str) -> None:
    fn, p, x = CASES[name]()
    leaves, tree = jax.tree.flatten((p, x))
    jaxpr = jax.make_jaxpr(lambda *xs: jax.tree.leaves(fn(*jax.tree.unflatten(tree, xs))))(*leaves)

    def again(*values):
        return interpreted(jaxpr, "", list(values))

    for got, want in zip(jax.jit(again)(*leaves), core.jaxpr_as_fun(jaxpr)(*leaves), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    kept = [e.primitive.name for e in jaxpr.jaxpr.eqns if e.primitive.name in {"scan", "while", "cond", "remat2"}]
    names = [e.primitive.name for e in jax.make_jaxpr(again)(*leaves).jaxpr.eqns]
    assert [n for n in names if n in kept] == kept
    batched = [jnp.stack([leaf, leaf]) for leaf in leaves]
    for got, want in zip(jax.vmap(again)(*batched), core.jaxpr_as_fun(jaxpr)(*leaves), strict=True):
        np.testing.assert_allclose(got[1], want, rtol=1e-5)


def test_places_literals_and_constants() -> None:
    table = jnp.arange(3.0)
    jaxpr = jax.make_jaxpr(lambda x: (x + table) * 2.0)(jnp.ones(3))
    seen = []

    def equation(eqn, location, operands):
        seen.append((location, eqn.primitive.name, operands))
        return [eqn.primitive.name]

    results = walk.run(jaxpr, ["x"], equation, constant=lambda value: np.shape(value), at=(7, "body"))
    assert results == ["mul"]
    assert seen == [((7, "body", 0), "add", ["x", (3,)]), ((7, "body", 1), "mul", ["add", ()])]


def test_results_that_are_inputs_or_literals() -> None:
    jaxpr = jax.make_jaxpr(lambda x: (x, 1.0))(2.0)
    assert walk.run(jaxpr, ["x"], lambda *_: [], constant=float) == ["x", 1.0]


class Thing:
    pass


@pytest.mark.parametrize("free", quick([True, False], True))
def test_variables_are_forgotten_after_their_last_use_where_wanted(free: bool) -> None:
    jaxpr = jax.make_jaxpr(lambda x: jnp.sin(jnp.cos(jnp.tanh(x))))(1.0)
    alive, made = [], []

    def equation(eqn, location, operands):
        del operands
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))
        thing = Thing()
        made.append(weakref.ref(thing))
        return [thing]

    walk.run(jaxpr, [Thing()], equation, constant=lambda _: Thing(), free=free)
    assert alive[-1] <= 1 if free else alive[-1] == 2


def test_shapes_of_variables() -> None:
    jaxpr = jax.make_jaxpr(lambda x: x @ x.T)(normal(1, 2, 3))
    assert walk.shapes_of(jaxpr.jaxpr.invars) == [jax.ShapeDtypeStruct((2, 3), jnp.float32)]
    assert [walk.shape_of(v) for v in jaxpr.jaxpr.outvars] == [(2, 2)]
