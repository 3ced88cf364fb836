"""Steps whose gradients are not finite, which loops skip: no statistic takes them in, and no mask is made of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.pruning.statistics import accumulate, fisher, movement
from tests.laws import assert_same_bits
from tests.marks import quick

PARAMS = {"kernel": jax.random.normal(jax.random.key(0), (12, 8)), "bias": jnp.zeros(8)}
METHODS = {
    "sensitivity": jc.prune(0.5, score=jc.pruning.sensitivity),
    "taylor": jc.prune(0.5, score=jc.pruning.taylor, scope=jc.Global()),
    "once": jc.once(jc.prune(0.5, score=jc.pruning.sensitivity)),
    "gate": jc.gate(jc.prune(0.5, score=jc.pruning.sensitivity), jc.every(1)),
    "movement": accumulate(jc.prune(0.5, score=jc.pruning.movement), movement),
    "fisher": accumulate(jc.gate(jc.prune(0.5, score=jc.pruning.fisher), jc.every(2)), fisher),
    "rigl": jc.pruning.rigl(0.5, key=jax.random.key(1), period=1, stop=100),
    "chain": jc.chain(jc.prune(0.25), jc.prune(0.5, score=jc.pruning.taylor)),
}


def grads(i: int, spoilt: float | None = None, leaf: str = "kernel") -> dict:
    draw = np.random.default_rng(i)
    made = {name: jnp.asarray(draw.normal(size=x.shape), x.dtype) for name, x in PARAMS.items()}
    return made if spoilt is None else {**made, leaf: made[leaf].at[..., 1].set(spoilt)}


@pytest.mark.parametrize("name", quick(METHODS, "once", "fisher", "rigl"))
@pytest.mark.parametrize(("spoilt", "leaf"), [(np.nan, "kernel"), (np.inf, "bias")])
def test_fault_7_a_skipped_step_is_no_step(name, spoilt, leaf) -> None:
    """The state after good, spoilt, good is that after good, good, bit for bit; and the spoilt step changes nothing."""
    t = METHODS[name]
    update = jax.jit(lambda state, step, g: t.update(state, PARAMS, step=step, grads=g))
    start = t.init(PARAMS)
    one = update(start, jnp.int32(2), grads(0))
    skipped = update(one, jnp.int32(4), grads(1, spoilt, leaf))
    assert_same_bits(skipped, one)
    assert_same_bits(update(skipped, jnp.int32(6), grads(2)), update(one, jnp.int32(6), grads(2)))
    assert_same_bits(t.update(one, PARAMS, step=4, grads=grads(1, spoilt, leaf)), one)


@pytest.mark.parametrize("name", quick(METHODS, "sensitivity", "once", "movement"))
def test_fault_7_a_spoilt_first_step_makes_no_chance_mask(name) -> None:
    """As loss scaling begins: then the mask is the one of the first good step."""
    t = METHODS[name]
    update = jax.jit(lambda state, step, g: t.update(state, PARAMS, step=step, grads=g))
    start = t.init(PARAMS)
    state = update(update(start, jnp.int32(2), grads(1, np.nan)), jnp.int32(4), grads(0))
    assert_same_bits(state, update(start, jnp.int32(4), grads(0)))
    dense = jc.materialize(t.apply(update(start, jnp.int32(2), grads(1, np.nan)), PARAMS))
    assert_same_bits(dense, jc.materialize(t.apply(start, PARAMS)))


@pytest.mark.parametrize("name", ["sensitivity", "once", "gate", "movement", "fisher"])
def test_fault_7_where_nothing_finite_was_seen_it_is_said(name) -> None:
    t = METHODS[name]
    said = (
        r"prune: the statistic '(grads|movement|fisher)' has \d+ values that are not finite at 'kernel', and nothing is"
    )
    with pytest.raises(ValueError, match=said + r" masked yet; give an update that is finite first"):
        t.update(t.init(PARAMS), PARAMS, step=0, grads=grads(0, np.nan))


@jax.numpy_dtype_promotion("standard")  # optax's own code mixes types
@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("name", quick(["sensitivity", "once", "movement", "rigl"], "once"))
def test_fault_7_apply_if_finite_on_either_side_of_wrap_optax(name, where) -> None:
    t, sgd = METHODS[name], optax.sgd(0.1, momentum=0.9)
    if where == "inside":
        tx = jc.wrap_optax(optax.apply_if_finite(sgd, 5), t)
    else:
        tx = optax.apply_if_finite(jc.wrap_optax(sgd, t), 5)
    step = jax.jit(lambda p, s, g: tx.update(g, s, p))

    def run(spoilt: bool):
        params, state = PARAMS, tx.init(PARAMS)
        for i in range(4):
            if spoilt and i in (0, 2):
                updates, state = step(params, state, grads(9, np.nan))
                params = optax.apply_updates(params, updates)
            updates, state = step(params, state, grads(i))
            params = optax.apply_updates(params, updates)
        inner = state.inner_state if where == "outside" else state
        return params, inner.latent, inner.transform

    clean, spoilt = run(False), run(True)
    if where == "inside" and name == "rigl":  # its share falls with the step, which counts calls
        assert int(spoilt[2].masks["kernel"].sum()) == 48
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(spoilt[:2]))
    else:
        assert_same_bits(spoilt, clean)
