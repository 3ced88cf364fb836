"""Fault 14: whole Equinox modules (functions, None, numbers, strings, static fields) through every verb."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.activations import Act, Dynamic
from tests.marks import quick
from tests.test_laws import TRANSFORMS
from tests.trace.models import KEY, normal

structure, trace = jc.structure, jc.trace


class Module(eqx.Module):
    """Leaves of every kind."""

    first: eqx.nn.Linear
    last: eqx.nn.Linear
    drop: eqx.nn.Dropout
    activation: Callable
    name: str
    count: int
    factor: float
    on: bool
    nothing: None
    table: np.ndarray
    number: np.float32
    mixed: list
    word: str = eqx.field(static=True)

    def __call__(self, x):
        """Both layers on rows."""
        hidden = jax.vmap(lambda v: self.drop(self.activation(self.first(v))) if self.on else v)(x)
        return jax.vmap(self.last)(hidden) * self.factor


MODULE = Module(
    eqx.nn.Linear(16, 32, key=KEY),
    eqx.nn.Linear(32, 8, key=KEY),
    eqx.nn.Dropout(0.1, inference=True),
    jax.nn.gelu,
    "name",
    3,
    0.5,
    True,
    None,
    np.arange(3),
    np.float32(2),
    [1, "a", jnp.ones(3), len],
    "static",
)
X = normal(1, 5, 16)


def fn(module, x):
    return module(x)


GRADS = jax.tree.map(lambda a: jnp.cos(a) if eqx.is_inexact_array(a) else None, MODULE)
# Their rules name leaves of another tree.
ELSEWHERE = {"tucker", "cp", "by_path"}


@pytest.mark.parametrize(
    "name",
    quick(
        sorted(TRANSFORMS.keys() - ELSEWHERE),
        *("prune", "int4", "low_rank", "stochastic", "gate_then_quantize", "once", "rigl", "prune_movement", "mx"),
    ),
)
def test_fault_14_every_transform_takes_a_module(name):
    """Traced, not run: what fails on functions does so while it is traced."""
    transform = TRANSFORMS[name]

    def run(module):
        state = transform.init(module)
        state = transform.update(state, module, step=jnp.int32(1), grads=GRADS)
        seen = transform.apply(state, module)
        assert seen.activation is jax.nn.gelu
        assert (seen.name, seen.count, seen.nothing, seen.word) == ("name", 3, None, "static")
        return jc.materialize(seen)(X)

    assert eqx.filter_eval_shape(run, MODULE).shape == (5, 8)


@pytest.mark.parametrize("name", quick(["stochastic", "joint", "low_rank"], "stochastic"))
def test_fault_14_a_module_is_compressed_packed_and_run(name):
    transform = TRANSFORMS[name]
    seen = transform.apply(transform.init(MODULE), MODULE)
    packed = jc.pack(seen)
    wanted = eqx.filter_jit(fn)(jc.materialize(seen), X)
    np.testing.assert_array_equal(eqx.filter_jit(fn)(jc.materialize(packed), X), wanted)
    assert jc.nbytes(packed) < jc.nbytes(MODULE)
    jc.core.zeros_counted(seen)
    np.testing.assert_allclose(jc.activations.factored(fn)(packed, X), wanted, rtol=1e-4, atol=1e-5)
    rules = {".*": Act(8, range=Dynamic())}
    y = jc.quantize_function(fn, rules)(packed, None, X)
    assert float(jnp.abs(y - wanted).max()) < 0.05 * float(jnp.abs(wanted).max())
    assert len(jc.coverage(fn, rules)(packed, X).rows) == 2


def test_fault_14_a_module_shrinks():
    groups = jc.channel_groups(fn)(MODULE, X)
    plan = jc.plan(groups, MODULE, sparsity=0.5)
    small = plan.take(MODULE)
    assert small.first.weight.shape == (16, 16)
    assert small.activation is jax.nn.gelu
    wanted = structure.mask(plan)(MODULE)(X)
    np.testing.assert_allclose(eqx.filter_jit(jc.shrink(fn, plan))(small, X), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(small(X), wanted, rtol=1e-4, atol=1e-5)
    assert structure.check_shrink(fn, plan, MODULE, X) < 1e-5
    assert plan.full(small).mixed[3] is len
    optimizer = optax.adam(1e-3)
    arrays = eqx.filter(MODULE, eqx.is_inexact_array)
    assert plan.take_like(optimizer.init(arrays), arrays)[0].mu.first.weight.shape == (16, 16)
    structure.group_lasso(groups, MODULE)


def test_fault_14_every_reading_takes_a_module():
    assert [site.path for site in jc.sites(fn)(MODULE, X)] == ["first/weight", "last/weight"]
    assert jc.cost(fn)(MODULE, X).macs == 5 * (16 * 32 + 32 * 8)
    assert set(jc.roles(fn)(MODULE, X)) == {"first/weight", "last/weight"}
    assert set(jc.calibrate(fn)(MODULE, X)) == {"first/weight", "last/weight"}
    assert set(trace.input_norms(fn)(MODULE, X)) == {"first/weight", "last/weight"}
    folded = jc.fold_batch_norm(fn)(MODULE, X)
    np.testing.assert_allclose(folded.fn(folded.params, X), fn(MODULE, X), rtol=1e-4, atol=1e-5)
    assert trace.rewrite(fn, lambda op: None)(MODULE, X).shape == (5, 8)
    assert jc.core.weight_mask(MODULE).first.weight is True


def test_fault_14_an_optimizer_takes_the_arrays_of_a_module():
    arrays = eqx.filter(MODULE, eqx.is_inexact_array)
    tx = jc.wrap_optax(optax.sgd(0.1), jc.prune(0.5))
    updates, _ = tx.update(GRADS, tx.init(arrays), arrays)
    moved = eqx.apply_updates(MODULE, updates)
    assert float((moved.first.weight == 0).mean()) == 0.5
    assert moved.activation is jax.nn.gelu


def test_fault_14_what_wants_gradients_names_the_leaf_that_has_none():
    wants = r"'activation' is <.*gelu.*>, not an array; .* equinox.filter\(module, equinox.is_inexact_array\)"
    with pytest.raises(TypeError, match="wrap_optax: " + wants):
        jc.wrap_optax(optax.sgd(0.1), jc.prune(0.5)).init(MODULE)
    t = jc.prune(0.5)
    step = jc.core.dense_value_and_grad(t, lambda module: jnp.sum(fn(module, X)))
    with pytest.raises(TypeError, match="dense_value_and_grad: " + wants):
        step(t.init(MODULE), MODULE)
