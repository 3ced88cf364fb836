"""What updates of narrow types, spoilt updates, many messages and none do to what is remembered and averaged."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomp import federated as fed
from tests.laws import assert_same_bits
from tests.marks import quick

KEY = jax.random.key(1)
COMPRESSORS = {
    "topk": fed.topk(0.05),
    "sign": fed.sign(),
    "rotated": fed.rotate(fed.uniform(3), block=16),
    "randomk": fed.randomk(0.2, unbiased=False),
    "powersgd": fed.powersgd(1, key=KEY),
    "rules": fed.by_path({"kernel": fed.powersgd(1, key=KEY), "bias": fed.topk(0.5)}),
}


def update_of(seed: int, dtype: str = "float32") -> dict:
    a, b = jax.random.split(jax.random.key(seed))
    return {"kernel": jax.random.normal(a, (12, 10), dtype), "bias": jax.random.normal(b, (10,), dtype)}


def spoilt(update: dict, by: float = np.nan) -> dict:
    return {**update, "bias": update["bias"].at[3].set(by)}


@pytest.mark.parametrize("name", quick(COMPRESSORS, "topk", "powersgd"))
@pytest.mark.parametrize("dtype", quick(["bfloat16", "float16"], "bfloat16"))
def test_fault_7_feedback_of_narrow_updates_loses_nothing(name, dtype) -> None:
    """Sent and remembered add up to the updates within float32's rounding; and what is sent keeps its narrow type."""
    t = fed.error_feedback(COMPRESSORS[name])
    step = jax.jit(lambda s, u, k: t.encode(s, u, key=k, shared=k))
    state = t.init(update_of(0, dtype))
    sent, total, size = np.zeros((12, 10)), np.zeros((12, 10)), 0.0
    for i in range(40):
        update = jax.tree.map(lambda x: x * jnp.asarray(1e-2 if i else 1, x.dtype), update_of(i, dtype))  # noqa: B023
        message, state = step(state, update, jax.random.key(i))
        decoded = t.decode(message)["kernel"]
        assert decoded.dtype == dtype
        sent, total = sent + np.asarray(decoded, np.float64), total + np.asarray(update["kernel"], np.float64)
        size = max(size, np.abs(np.asarray(decoded, np.float64)).max(), np.abs(total).max())
    assert state.memory["kernel"].dtype == jnp.float32
    off = np.abs(sent + np.asarray(state.memory["kernel"], np.float64) - total).max()
    assert off <= 2 * 40 * size * 2.0**-24


@pytest.mark.parametrize("name", quick(COMPRESSORS, "topk", "powersgd", "rules"))
@pytest.mark.parametrize("by", quick([np.nan, np.inf], np.nan))
def test_fault_7_a_spoilt_update_is_seen_and_not_remembered(name, by) -> None:
    t = fed.error_feedback(COMPRESSORS[name])
    step = jax.jit(lambda s, u, k: t.encode(s, u, key=k, shared=k))
    _, state = step(t.init(update_of(0)), update_of(0), KEY)
    message, after = step(state, spoilt(update_of(1), by), KEY)
    assert_same_bits(after, state)
    assert all(np.isnan(x).any() for x in jax.tree.leaves(t.decode(message)))
    with pytest.raises(ValueError, match=r"error_feedback: 'bias' has 1 values that are not finite"):
        t.encode(state, spoilt(update_of(1), by), key=KEY, shared=KEY)


def test_fault_7_a_spoilt_update_leaves_powersgd_its_factor() -> None:
    t = COMPRESSORS["powersgd"]
    step = jax.jit(lambda s, u: t.encode(s, u))
    _, state = step(t.init(update_of(0)), update_of(0))
    bad = {**update_of(1), "kernel": update_of(1)["kernel"].at[0, 0].set(np.nan)}
    assert_same_bits(step(state, bad)[1], state)


@jax.numpy_dtype_promotion("standard")  # optax's own code mixes types
@pytest.mark.parametrize("axis", [None, "clients"])
def test_fault_7_in_a_chain_skipped_steps_change_nothing(axis) -> None:
    """On all devices, also those whose own gradients were finite; extra arguments of optax pass."""
    tx = optax.chain(
        fed.compress_updates(fed.error_feedback(fed.topk(0.25)), key=KEY, axis_name=axis),
        optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 9),
    )
    rounds = [update_of(0)] * 2, [update_of(1), spoilt(update_of(2))]
    good, bad = (jax.tree.map(lambda *x: jnp.stack(x), *updates) for updates in rounds)
    one = lambda u, s: tx.update(u, s, update_of(0), value=1.0)  # noqa: E731
    step = jax.jit(jax.vmap(one, axis_name="clients") if axis else lambda u, s: one(jax.tree.map(lambda x: x[1], u), s))
    state = tx.init(update_of(0))
    state = jax.tree.map(lambda x: jnp.stack([x, x]), state) if axis else state
    _, state = step(good, state)
    updates, after = step(bad, state)
    assert_same_bits(after[0].inner, state[0].inner)
    assert_same_bits(after[1].inner_state, state[1].inner_state)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(updates))


def test_fault_7_joined_lists_are_added_in_float32() -> None:
    """256 messages that name one place: bfloat16 sums stop where a part is below half an ulp."""
    update = {"w": jnp.zeros(4096, jnp.bfloat16).at[7].set(1.0)}
    message, _ = fed.topk(count=1).encode((), update)
    mean = fed.combine([message] * 300)
    assert isinstance(mean["w"], fed.Sparse)
    value = np.asarray(mean["w"].values[0], np.float64) * 300
    assert float(fed.decode(mean)["w"][7]) == pytest.approx(value, rel=2.0**-8)


def test_fault_7_no_message_and_too_many_are_refused() -> None:
    t = fed.uniform(8, limit=1.0)
    message, _ = t.encode((), {"w": jnp.ones(3)}, key=KEY)
    with pytest.raises(ValueError, match=r"combine: no messages are stacked \(an axis of length 0\)"):
        fed.combine_stacked(jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), message))
    with pytest.raises(ValueError, match=r"combine: the codes of 5000000 messages of 8 bits sum to more than"):
        jax.eval_shape(
            fed.combine_stacked, jax.tree.map(lambda x: jax.ShapeDtypeStruct((5_000_000, *x.shape), x.dtype), message)
        )
