"""Error feedback, rules, sums of messages, bytes, and the optax bridge."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxcomp as jc
from jaxcomp import federated as fed
from jaxcomp.federated.wire import HEADER_BYTES
from tests.marks import quick

KEY, SHARED = jax.random.key(1), jax.random.key(2)
FED = [
    fed.topk(0.05),
    fed.sign(),
    fed.rotate(fed.uniform(3), block=16),
    fed.randomk(0.2, unbiased=False),
    fed.powersgd(1, key=KEY),
]
IDS = ["topk", "sign", "rotated", "randomk", "powersgd"]


def update_of(seed: int) -> dict:
    a, b = jax.random.split(jax.random.key(seed))
    return {"kernel": jax.random.normal(a, (12, 10)), "bias": jax.random.normal(b, (10,))}


@pytest.mark.parametrize("inner", quick(FED, FED[0], FED[-1]), ids=IDS)
def test_with_feedback_messages_and_memory_add_up_to_the_updates(inner) -> None:
    t = fed.error_feedback(inner)
    step = jax.jit(lambda s, u, k: t.encode(s, u, key=k, shared=k))
    state, said, total = t.init(update_of(0)), jnp.zeros((12, 10)), jnp.zeros((12, 10))
    for i in range(20):
        update = update_of(i)
        message, state = step(state, update, jax.random.key(i))
        said, total = said + t.decode(message)["kernel"], total + update["kernel"]
    assert np.allclose(said + state.memory["kernel"], total, atol=1e-4)


@pytest.mark.parametrize("inner", quick(FED, FED[0], FED[-1]), ids=IDS)
def test_with_feedback_a_constant_update_is_all_said_in_the_end(inner) -> None:
    """The memory stays bounded, so the mean of what was said goes to the update as 1/rounds."""
    t, update = fed.error_feedback(inner), update_of(0)

    def run(t, rounds):
        def one(carry, key):
            state, said = carry
            message, state = t.encode(state, update, key=key, shared=key)
            said = said + t.decode(message)["kernel"]
            return (state, said), said

        start = (t.init(update), jnp.zeros((12, 10)))
        _, said = jax.jit(lambda keys: jax.lax.scan(one, start, keys))(jax.random.split(jax.random.key(0), 320))
        errors = [np.asarray(said[n - 1] / n - update["kernel"]) for n in rounds]
        return [np.linalg.norm(e) / np.linalg.norm(update["kernel"]) for e in errors]

    far, near = run(t, (40, 320))
    assert near < 0.12
    assert near < far / 3


def test_feedback_memory_is_what_was_not_said_and_is_the_same_in_jit() -> None:
    t, update = fed.error_feedback(fed.sign()), update_of(4)
    message, state = t.encode(t.init(update), update)
    assert (state.memory["kernel"] == update["kernel"] - t.decode(message)["kernel"]).all()
    again, jitted = jax.jit(t.encode)(t.init(update), update)
    assert (jitted.memory["kernel"] == update["kernel"] - t.decode(again)["kernel"]).all()


def test_feedback_refuses_the_state_of_another_update() -> None:
    t = fed.error_feedback(fed.sign())
    with pytest.raises(ValueError, match=r"error_feedback: 'kernel' has shape \(12, 10\) in the update and \(3, 3\)"):
        t.encode(t.init({"kernel": jnp.ones((3, 3)), "bias": jnp.ones(10)}), update_of(0))
    p = fed.powersgd(1, key=KEY)
    with pytest.raises(ValueError, match="powersgd: the state is of another update, with 'other'"):
        p.encode(p.init({"other": jnp.ones((3, 3))}), update_of(0))


def test_leaves_draw_apart_and_alike_under_any_rule() -> None:
    """A leaf's key comes of its path: two leaves draw differently, and rules around do not change what is drawn."""
    update = {"a": jnp.arange(1.0, 101.0), "b": jnp.arange(1.0, 101.0)}
    plain, _ = fed.randomk(0.1).encode((), update, shared=SHARED)
    assert plain["a"].seed != plain["b"].seed
    t = fed.by_path({"b": fed.randomk(0.1)})
    ruled, _ = t.encode(t.init(update), update, shared=SHARED)
    assert ruled["b"].seed == plain["b"].seed
    assert ruled["a"] is update["a"]


def test_first_rule_wins_and_states_stay_apart() -> None:
    t = fed.by_path({"kernel": fed.error_feedback(fed.topk(0.1)), r".*": fed.sign()})
    update = update_of(0)
    message, state = t.encode(t.init(update), update)
    assert type(message["kernel"]) is fed.Sparse
    assert type(message["bias"]) is fed.Signs
    assert set(state[0].memory) == {"kernel"}
    assert state[1] == ()


def test_by_path_contracts_only_where_all_do() -> None:
    with pytest.raises(ValueError, match="error can be larger"):
        fed.error_feedback(fed.by_path({"kernel": fed.randomk(0.5), ".*": fed.sign()}))


def test_combine_refuses_what_does_not_belong_together() -> None:
    t = fed.topk(0.1)
    a, _ = t.encode((), update_of(0))
    other, _ = t.encode((), {"kernel": jnp.ones((5, 5)), "bias": jnp.ones(10)})
    with pytest.raises(ValueError, match=r"combine: message 1 has Sparse of shape \(5, 5\) .* at 'kernel', message 0"):
        fed.combine([a, other])
    with pytest.raises(ValueError, match="combine: message 2 has nothing at 'bias'"):
        fed.combine([a, a, {"kernel": a["kernel"]}])
    with pytest.raises(ValueError, match="combine: message 1 has Signs"):
        fed.combine([a, fed.sign().encode((), update_of(0))[0]])
    with pytest.raises(ValueError, match="other containers"):
        fed.combine([[a["bias"]], (a["bias"],)])
    with pytest.raises(ValueError, match="there are no messages"):
        fed.combine([])
    with pytest.raises(ValueError, match="a weight for each of 2 messages, got shape"):
        fed.combine([a, a], [1.0])
    with pytest.raises(ValueError, match="0 or more with a positive sum"):
        fed.combine([a, a], [1.0, -1.0])
    with pytest.raises(ValueError, match="'w' is of type int32, which has no mean"):
        fed.combine([{"w": jnp.ones(3, jnp.int32)}] * 2)


@pytest.mark.parametrize(
    "t",
    [fed.randomk(0.5), pytest.param(fed.rotate(fed.uniform(4, limit=9.0)), marks=pytest.mark.slow)],
    ids=["randomk", "rotated"],
)
def test_messages_of_different_rounds_are_not_averaged(t) -> None:
    sent = [t.encode((), update_of(0), key=KEY, shared=jax.random.key(i))[0] for i in range(2)]
    with pytest.raises(
        ValueError, match=r"combine: the messages were made with different .* the round's key as shared="
    ):
        fed.combine(sent)
    # Inside jit the values are not known: the result is NaN, not a number that looks right.
    assert jnp.isnan(jax.jit(lambda m: fed.decode(fed.combine(m)))(sent)["kernel"]).any()
    assert jnp.isfinite(jax.jit(lambda m: fed.decode(fed.combine(m)))([sent[0]] * 2)["kernel"]).all()


WIRED = {
    "topk": fed.topk(0.1),
    "randomk": fed.randomk(0.1),
    "sign": fed.sign(),
    "rotated": fed.rotate(fed.uniform(3)),
    "powersgd": fed.powersgd(2, key=KEY),
    "rules": fed.by_path({"kernel": fed.error_feedback(fed.topk(0.3))}),
}


@pytest.mark.parametrize("name", WIRED)
def test_bytes_are_as_many_as_bits_says_and_come_back(name) -> None:
    t, update = WIRED[name], update_of(0)

    def message_of(u):
        return t.encode(t.init(u), u, key=KEY, shared=SHARED)[0]

    message = jax.jit(message_of)(update)
    data = fed.to_bytes(message)
    assert 8 * (len(data) - HEADER_BYTES) == t.bits(message)
    again = fed.from_bytes(data, like=jax.eval_shape(message_of, update))
    for a, b in zip(jax.tree.leaves(message), jax.tree.leaves(again), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert jax.tree.structure(message) == jax.tree.structure(again)


def test_a_message_can_be_kept_in_a_file(tmp_path) -> None:
    message, _ = fed.rotate(fed.uniform(3)).encode((), update_of(0), key=KEY, shared=SHARED)
    jc.save(tmp_path / "m.safetensors", message)
    again = jc.load(tmp_path / "m.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure(message)
    assert (jc.materialize(again)["kernel"] == fed.decode(message)["kernel"]).all()


def test_bytes_that_are_no_such_message_are_refused() -> None:
    message, _ = fed.sign().encode((), update_of(0))
    data = fed.to_bytes(message)
    voting, _ = fed.sign(vote=True).encode((), update_of(0))
    cases = [
        (b"", message, "these 0 bytes are no message"),
        (b"PNG." + data[4:], message, "are no message of jaxcomp.federated"),
        (data[:4] + b"\x02\x00" + data[6:], message, "has version 2, this jaxcomp reads 1"),
        (data, voting, "another layout than like="),
        (data[:-1], message, f"has {len(data) - HEADER_BYTES - 1} bytes after its header, wanted"),
        (data[:-1] + bytes([data[-1] ^ 1]), message, "does not match its checksum"),
    ]
    for bad, like, text in cases:
        with pytest.raises(fed.WireError, match=text):
            fed.from_bytes(bad, like=like)


def test_optax_trains_through_it() -> None:
    target = {"w": jnp.arange(20.0).reshape(4, 5)}
    t = fed.error_feedback(fed.topk(0.2))
    tx = optax.chain(fed.compress_updates(t, key=KEY), optax.sgd(0.1))
    params = {"w": jnp.zeros((4, 5))}

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.subtract, params, target)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(300):
        params, state = step(params, state)
    assert np.allclose(params["w"], target["w"], atol=0.05)


def test_each_step_draws_anew() -> None:
    tx = fed.compress_updates(fed.randomk(0.1), key=KEY)
    grads = {"w": jnp.ones(100)}
    state = tx.init(grads)
    first, state = tx.update(grads, state)
    second, _ = tx.update(grads, state)
    assert (first["w"] != second["w"]).any()


def along_the_axis(t: fed.Compressor, members: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """The members' kernels in float64, and what all of them get."""
    tx = fed.compress_updates(t, key=KEY, axis_name="data")
    updates = jax.tree.map(lambda *x: jnp.stack(x), *map(update_of, range(members)))
    state = tx.init(update_of(0))
    got, _ = jax.jit(jax.vmap(lambda u: tx.update(u, state), axis_name="data"))(updates)
    assert (got["kernel"] == got["kernel"][:1]).all()
    return np.asarray(updates["kernel"], np.float64), np.asarray(got["kernel"][0])


def halved(kernels: np.ndarray) -> np.ndarray:
    """The larger half of each."""
    size = np.abs(kernels)
    return np.where(size > np.median(size, (1, 2), keepdims=True), kernels, 0).mean(0)


def voted(kernels: np.ndarray) -> np.ndarray:
    return np.sign(np.sign(kernels).sum(0)) * np.abs(kernels).mean()


EXACT = {
    "dense": (fed.dense(), lambda kernels: kernels.mean(0)),
    "topk": (fed.topk(0.5), halved),
    "vote": (fed.sign(vote=True), voted),
}


@pytest.mark.parametrize("name", EXACT)
def test_devices_along_an_axis_get_the_mean_of_all_messages(name) -> None:
    t, mean = EXACT[name]
    kernels, got = along_the_axis(t)
    np.testing.assert_allclose(got, mean(kernels), rtol=1e-5, atol=1e-6)


def test_devices_along_an_axis_get_the_mean_within_a_level() -> None:
    kernels, got = along_the_axis(fed.uniform(8, axis_name="data"))
    level = 2 * np.abs(kernels).max() / 255
    assert 0 < np.abs(got - kernels.mean(0)).max() < level


def test_devices_along_an_axis_get_the_mean_of_the_places_drawn() -> None:
    kernels, got = along_the_axis(fed.randomk(0.25))
    assert (got != 0).sum() == 30
    np.testing.assert_allclose(got, np.where(got != 0, 4 * kernels.mean(0), 0), rtol=1e-4)


def test_devices_along_an_axis_get_the_mean_in_norm_through_a_rotation() -> None:
    kernels, got = along_the_axis(fed.rotate(fed.uniform(8, axis_name="data"), block=16))
    assert np.linalg.norm(got - kernels.mean(0)) < 0.02 * np.linalg.norm(kernels.mean(0))


def test_under_shard_map_the_gathered_bytes_give_every_device_the_same() -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    t = fed.error_feedback(fed.rotate(fed.uniform(8), block=16))
    tx = fed.compress_updates(t, key=KEY, axis_name="data")
    update = update_of(0)
    one = jax.shard_map(
        tx.update,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=(PartitionSpec(), PartitionSpec()),
        check_vma=False,
    )
    got, _ = jax.jit(one)(update, tx.init(update))
    assert np.allclose(got["kernel"], update["kernel"], atol=0.05)
