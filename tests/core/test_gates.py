"""``when``: a transform that is applied always and updated at due steps only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.core.gates import never, when
from jaxcomp.core.optimizers import MaskState, reset_regrown
from tests.laws import assert_same_bits

PARAMS = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}


def test_it_is_applied_always_and_updated_when_due() -> None:
    t = jc.prune(jc.cubic(0.8, end=10))
    rare = when(t, jc.every(4, start=4))
    state = kept = rare.init(PARAMS)
    assert_same_bits(state, t.init(PARAMS))
    update = jax.jit(lambda s, i: rare.update(s, PARAMS, step=i))
    for step in range(11):
        if step in (4, 8):
            kept = t.update(kept, PARAMS, step=jnp.int32(step))
        eager, state = rare.update(state, PARAMS, step=step), update(state, jnp.int32(step))
        assert_same_bits(eager, kept)
        assert_same_bits(state, kept)
        assert_same_bits(rare.apply(state, PARAMS), t.apply(kept, PARAMS))


def test_outside_jit_and_when_never_due_no_update_runs() -> None:
    def no_update(*_, **__):
        raise AssertionError("was run")

    t = jc.prune(0.5)._replace(update=no_update)
    rare, none = when(t, jc.every(10)), when(t, never)
    state = t.init(PARAMS)
    assert rare.update(state, PARAMS, step=3) is state
    assert none.update(state, PARAMS, step=0) is state
    jitted = jax.jit(lambda s: none.update(s, PARAMS, step=jnp.int32(0)))(state)
    assert_same_bits(jitted, state)
    with pytest.raises(AssertionError, match="was run"):
        rare.update(state, PARAMS, step=10)


def test_due_must_be_a_boolean() -> None:
    with pytest.raises(ValueError, match=r"when: due\(step\) must be a scalar boolean, got .*; see every\(\)"):
        when(jc.prune(0.5), lambda step: step).init(PARAMS)


def test_what_it_grows_is_found_and_reset() -> None:
    t = when(jc.pruning.regrow(0.5, key=jax.random.key(1), fraction=1.0), jc.every(1))
    old = t.init(PARAMS)
    new = t.update(old, PARAMS, step=0)
    assert isinstance(new, MaskState)
    grown = np.asarray(new.masks["kernel"] & ~old.masks["kernel"])
    params, _ = reset_regrown(old, new, PARAMS, ())
    np.testing.assert_array_equal(params["kernel"] == 0, grown)
    assert grown.any()
    tx = jc.wrap_optax(optax.sgd(0.1), t)
    state = tx.init(PARAMS)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), state, PARAMS)
    back = np.asarray(state.transform.masks["kernel"] & ~old.masks["kernel"])
    np.testing.assert_array_equal(state.latent["kernel"] == 0, back)


def test_compressing_what_a_gate_may_have_compressed_says_when() -> None:
    late = jc.chain(jc.gate(jc.prune(0.5), jc.every(4)), jc.quantize(jc.Int(8)), jc.prune(0.5))
    with pytest.raises(ValueError, match=r"earlier in this chain; put .* before"):
        late.init(PARAMS)
    shared = jc.chain(jc.gate(jc.share(4), jc.every(4)), jc.quantize(jc.Int(8)))
    with pytest.raises(ValueError, match=r"made by gate .*, or say core.when for gate: it applies at every step"):
        shared.apply(shared.init(PARAMS), PARAMS)
    rare = jc.chain(when(jc.share(4), jc.every(4)), jc.quantize(jc.Int(8)))
    assert repr(rare.apply(rare.init(PARAMS), PARAMS)["kernel"]).startswith("<Codebook of 4 Quantized int8")
