"""How transforms compose: chain, by_path, gate, once, wrap_optax; and their states under jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.core.leaves import is_compressed
from jaxcomp.pruning.transform import masked_by
from jaxcomp.sharing.vectors import share_vectors
from tests.laws import assert_same_bits

PARAMS = {
    "encoder": {"kernel": jax.random.normal(jax.random.key(0), (8, 8)), "bias": jnp.zeros(8)},
    "head": {"kernel": jax.random.normal(jax.random.key(1), (8, 4))},
}


def kinds(tree) -> dict[str, str]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_compressed)
    return {"/".join(k.key for k in p): type(x).__name__ for p, x in flat}


def test_wrap_optax_runs_with_donated_buffers() -> None:
    tx = jc.wrap_optax(optax.sgd(0.1), jc.prune(0.5))
    params = jax.tree.map(jnp.copy, PARAMS)

    def train_step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return optax.apply_updates(params, updates), state

    want, _ = train_step(PARAMS, tx.init(PARAMS))
    got, _ = jax.jit(train_step, donate_argnums=(0, 1))(params, tx.init(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


def test_given_masks_outlive_a_donated_state() -> None:
    t = masked_by({"head/kernel": PARAMS["head"]["kernel"] > 0})
    for _ in range(2):
        seen = jax.jit(t.apply, donate_argnums=0)(t.init(PARAMS), PARAMS)
        assert (jc.materialize(seen)["head"]["kernel"] >= 0).all()


OTHER = {"tail": {"kernel": jnp.ones((8, 8))}}


@pytest.mark.parametrize(
    "t",
    [
        jc.prune(0.5),
        jc.share(4),
        jc.pruning.regrow(0.5, key=jax.random.key(0)),
        share_vectors(4, size=2, key=jax.random.key(0)),
    ],
    ids=["prune", "share", "regrow", "share_vectors"],
)
def test_a_state_of_another_tree_is_named(t) -> None:
    message = r"the state has nothing for 'tail/kernel', only for '.*'; it was made for another tree: call init"
    with pytest.raises(ValueError, match=message):
        t.apply(t.init(PARAMS), OTHER)


@pytest.mark.parametrize(
    ("structure", "shape"),
    [(jc.pruning.Element(), r"\(8, 4\)"), (jc.pruning.Block((2, 2)), r"\(4, 2\)")],
    ids=["element", "block"],
)
def test_a_mask_of_another_shape_is_named(structure, shape) -> None:
    t = jc.prune(0.5, structure=structure)
    smaller = {**PARAMS, "head": {"kernel": jnp.ones((4, 4))}}
    with pytest.raises(ValueError, match=rf"mask of 'head/kernel' has shape {shape}, which does not fit \(4, 4\)"):
        t.apply(t.init(PARAMS), smaller)


def test_a_chain_is_a_fold() -> None:
    a, b = jc.prune(0.5), jc.quantize(jc.Int(4))
    both = jc.chain(a, b)
    by_hand = b.apply(b.init(a.apply(a.init(PARAMS), PARAMS)), a.apply(a.init(PARAMS), PARAMS))
    assert_same_bits(both.apply(both.init(PARAMS), PARAMS), by_hand)
    assert jc.chain().apply((), PARAMS) is PARAMS


def test_later_transforms_see_what_earlier_ones_made_in_update_too() -> None:
    t = jc.chain(jc.prune(jc.cubic(0.5, end=2)), jc.prune(0.5))
    state = t.init(PARAMS)
    assert int(state[1]["head/kernel"].sum()) == 16
    state = t.update(state, PARAMS, step=jnp.int32(2))
    seen = t.apply(state, PARAMS)
    assert int(seen["head"]["kernel"].mask.sum()) == 8


def test_by_path_first_match_wins() -> None:
    t = jc.by_path({r"head/.*": jc.core.identity(), r".*kernel": jc.quantize(jc.Int(4)), r".*": jc.core.identity()})
    seen = t.apply(t.init(PARAMS), PARAMS)
    assert kinds(seen) == {"encoder/bias": "ArrayImpl", "encoder/kernel": "Quantized", "head/kernel": "ArrayImpl"}
    assert seen["head"]["kernel"] is PARAMS["head"]["kernel"]


def test_by_path_refuses_a_rule_that_nothing_is_left_for() -> None:
    t = jc.by_path({r".*kernel": jc.quantize(), r"head/kernel": jc.prune(0.5)})
    with pytest.raises(
        ValueError, match=r"by_path: rule 'head/kernel' matches nothing that an earlier rule did not take"
    ):
        t.init(PARAMS)


def test_by_path_inside_a_chain_and_a_predicate() -> None:
    large = jc.by_path({(lambda path, x: getattr(x, "size", 0) > 40): jc.quantize(jc.Int(2))})
    t = jc.chain(jc.prune(0.25), large)
    seen = t.apply(t.init(PARAMS), PARAMS)
    assert isinstance(seen["encoder"]["kernel"].values, jc.quantization.Quantized)
    assert isinstance(seen["head"]["kernel"].values, jax.Array)


def test_statistics_reach_through_by_path_gate_and_chain() -> None:
    inner = jc.by_path({r".*": jc.gate(jc.prune(0.5, score=jc.pruning.sensitivity), jc.every(1))})
    t = jc.chain(jc.core.identity(), inner)
    grads = jax.tree.map(lambda x: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape), PARAMS)
    state = t.update(t.init(PARAMS), PARAMS, step=jnp.int32(0), grads=grads)
    mask = t.apply(state, PARAMS)["head"]["kernel"].mask
    assert (np.asarray(mask).reshape(-1) == (np.arange(32) >= 16)).all()


def test_a_gate_sleeps_then_works_when_due_only() -> None:
    t = jc.gate(jc.prune(jc.cubic(0.8, end=10)), jc.every(5, start=5, stop=11))
    params = {"kernel": jnp.arange(1.0, 101.0).reshape(10, 10)}

    @jax.jit
    def step(state, i):
        state = t.update(state, params, step=i)
        return state, jnp.sum(jc.materialize(t.apply(state, params))["kernel"] == 0)

    state, zeros = t.init(params), []
    for i in range(17):
        state, n = step(state, jnp.int32(i))
        zeros.append(int(n))
    assert zeros == [0] * 5 + [70] * 5 + [80] * 7


def test_what_is_gated_can_be_packed_before_and_after() -> None:
    t = jc.gate(jc.quantize(jc.Int(4)), jc.every(1, start=3))
    state = t.init(PARAMS)
    assert kinds(jc.pack(t.apply(state, PARAMS)))["head/kernel"] == "ArrayImpl"
    state = t.update(state, PARAMS, step=jnp.int32(3))
    assert kinds(jc.pack(t.apply(state, PARAMS)))["head/kernel"] == "Quantized"
    with pytest.raises(TypeError, match="a gated leaf cannot be packed inside jit"):
        jax.jit(lambda s: jc.pack(t.apply(s, PARAMS)))(state)


def test_a_gate_wants_a_boolean() -> None:
    with pytest.raises(ValueError, match=r"gate: due\(step\) must be a scalar boolean, got"):
        jc.gate(jc.core.identity(), lambda step: step + 1).init(PARAMS)
    with pytest.raises(ValueError, match="every: the period must be an integer of at least 1, got 0"):
        jc.every(0)


def test_once_keeps_what_the_first_update_found() -> None:
    t = jc.once(jc.prune(0.5, score=jc.pruning.sensitivity))
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    state = t.init(PARAMS)
    first = t.update(state, PARAMS, step=jnp.int32(0), grads=jax.tree.map(jnp.abs, PARAMS))
    assert not (first.inner["head/kernel"] == state.inner["head/kernel"]).all()
    assert_same_bits(t.update(first, PARAMS, step=jnp.int32(1), grads=ones), first)
    jitted = jax.jit(lambda s: t.update(s, PARAMS, step=jnp.int32(1), grads=ones))(first)
    assert_same_bits(jitted, first)


def test_a_training_step_with_all_of_it_compiles_once_and_learns() -> None:
    t = jc.chain(jc.gate(jc.prune(jc.cubic(0.7, end=20), scope=jc.Global()), jc.every(4)), jc.quantize(jc.Int(4)))
    x = jax.random.normal(jax.random.key(2), (64, 8))
    y = x @ jax.random.normal(jax.random.key(3), (8, 4))
    traces = []

    def loss(params, state):
        p = jc.materialize(t.apply(state, params))
        return jnp.mean((x @ p["encoder"]["kernel"] @ p["head"]["kernel"] - y) ** 2)

    @jax.jit
    def step(params, state, i):
        traces.append(1)
        value, grads = jax.value_and_grad(loss)(params, state)
        params = jax.tree.map(lambda p, g: p - 0.02 * g, params, grads)
        return params, t.update(state, params, step=i, grads=grads), value

    params, state, values = PARAMS, t.init(PARAMS), []
    for i in range(60):
        params, state, value = step(params, state, jnp.int32(i))
        values.append(float(value))
    assert len(traces) == 1
    assert values[-1] < 0.5 * values[0]
    zeros, total = 0, 0
    for leaf in (t.apply(state, params)["encoder"]["kernel"], t.apply(state, params)["head"]["kernel"]):
        zeros, total = zeros + int((~leaf.mask).sum()), total + leaf.mask.size
    assert zeros == round(0.7 * total)


@jax.numpy_dtype_promotion("standard")
def test_wrap_optax_with_identity_is_the_optimizer() -> None:
    plain, wrapped = optax.adamw(1e-2), jc.wrap_optax(optax.adamw(1e-2), jc.core.identity())
    a = b = PARAMS
    sa, sb = plain.init(a), wrapped.init(b)
    for i in range(3):
        grads = jax.tree.map(lambda x, i=i: jnp.sin(x + i), a)
        ua, sa = plain.update(grads, sa, a)
        ub, sb = wrapped.update(grads, sb, b)
        a, b = optax.apply_updates(a, ua), optax.apply_updates(b, ub)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), a, b)
