"""Each compressor against numpy: what is decoded, how many bytes it takes, unbiasedness, contraction, and sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard as scipy_hadamard

from jaxcomp import federated as fed
from jaxcomp.federated.arrays import key_of
from tests.marks import quick

KEY, SHARED = jax.random.key(1), jax.random.key(2)
FACTORS = jax.random.key(3)


def update_of(seed: int, dtype=jnp.float32) -> dict:
    a, b = jax.random.split(jax.random.key(seed))
    return {"layer": {"kernel": jax.random.normal(a, (12, 10), dtype), "bias": jax.random.normal(b, (10,), dtype)}}


def encode(t: fed.Compressor, update, *, key=KEY, shared=SHARED):
    """A first message, in jit: one compilation instead of one an operation."""
    return jax.jit(lambda u, k, s: t.encode(t.init(u), u, key=k, shared=s)[0])(update, key, shared)


def decode(message):
    return jax.jit(fed.decode)(message)


def unstacked(stacked, count):
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]


WEIGHTS = [1.0, 2.0, 5.0]
COMPRESSORS = {
    "dense": fed.dense(),
    "topk": fed.topk(0.1),
    "topk, a bitmap": fed.topk(0.5),
    "randomk": fed.randomk(0.25),
    "randomk, biased": fed.randomk(0.25, unbiased=False),
    "sign": fed.sign(),
    "uniform 1": fed.uniform(1),
    "uniform 4": fed.uniform(4),
    "uniform 3, common": fed.uniform(3, limit=8.0),
    "rotated 4": fed.rotate(fed.uniform(4)),
    "rotated 2, common": fed.rotate(fed.uniform(2, limit=8.0), block=16),
    "rotated sign": fed.rotate(fed.sign(unbiased=True), block=32),
    "powersgd": fed.powersgd(2, key=FACTORS),
    "feedback": fed.error_feedback(fed.topk(0.1)),
    "by_path": fed.by_path({r".*/kernel": fed.powersgd(1, key=FACTORS), r".*": fed.sign()}),
}
SOME = ("topk", "randomk", "sign", "uniform 3, common", "rotated 4", "powersgd", "feedback", "by_path")
every = pytest.mark.parametrize("name", quick(COMPRESSORS, *SOME))


@every
def test_messages_hold_what_is_sent_and_stand_for_the_same_tree(name) -> None:
    t, update = COMPRESSORS[name], update_of(0)
    message = encode(t, update)
    decoded = jax.eval_shape(t.decode, message)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), decoded) == jax.tree.map(lambda x: (x.shape, x.dtype), update)
    assert t.bits(message) == 8 * sum(np.asarray(x).nbytes for x in jax.tree.leaves(message))
    shapes = jax.eval_shape(lambda u: t.encode(t.init(u), u, key=KEY, shared=SHARED)[0], update)
    assert t.bits(shapes) == t.bits(message)


@pytest.mark.parametrize("name", ["topk", "randomk", "sign", "rotated 4", "powersgd"])
def test_jit_gives_what_eager_gives(name) -> None:
    t, update = COMPRESSORS[name], update_of(3)
    state = t.init(update)

    def both(state, update):
        message, state = t.encode(state, update, key=KEY, shared=SHARED)
        return t.decode(message), state

    eager, jitted = both(state, update), jax.jit(both)(state, update)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), eager, jitted)


@every
def test_messages_combine_to_the_mean_of_what_they_decode_to(name) -> None:
    t = COMPRESSORS[name]

    @jax.jit
    def everything(updates, keys):
        def one(u, k):
            return t.encode(t.init(u), u, key=k, shared=SHARED)[0]

        sent = unstacked(jax.vmap(one)(updates, keys), 3)
        return [t.decode(m) for m in sent], [t.decode(t.combine(sent, w)) for w in (None, WEIGHTS)]

    updates = jax.tree.map(lambda *x: jnp.stack(x), *[update_of(i) for i in range(3)])
    decoded, combined = everything(updates, jax.random.split(KEY, 3))
    for got, share in zip(combined, ([1 / 3] * 3, np.array(WEIGHTS) / 8), strict=True):
        want = jax.tree.map(lambda *x, s=share: np.tensordot(s, np.stack(x).astype(np.float64), 1), *decoded)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


@every
def test_narrow_types_are_kept(name) -> None:
    t, update = COMPRESSORS[name], update_of(0, jnp.bfloat16)

    def both(update):
        message, _ = t.encode(t.init(update), update, key=KEY, shared=SHARED)
        return t.decode(message), t.decode(t.combine([message, message]))

    for decoded in jax.eval_shape(both, update):
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(decoded))


def test_sizes_are_those_that_arithmetic_gives() -> None:
    kernel = {"w": jax.random.normal(jax.random.key(0), (100, 30))}  # 3000 elements, places of 12 bits

    def size(t):
        return fed.bits(jax.eval_shape(lambda u: t.encode(t.init(u), u, key=KEY, shared=SHARED)[0], kernel)) / 8

    assert size(fed.dense()) == 12000
    assert size(fed.topk(count=30)) == 30 * 4 + 45  # 30 * 12 bits
    assert size(fed.topk(count=1000)) == 1000 * 4 + 375  # a bit for each of 3000
    assert size(fed.randomk(count=30)) == 30 * 4 + 4  # and the seed
    assert size(fed.sign()) == 375 + 4
    assert size(fed.uniform(3)) == 1125 + 4
    assert size(fed.rotate(fed.uniform(3))) == 4096 * 3 / 8 + 4 + 4
    assert size(fed.rotate(fed.uniform(3), block=256)) == 12 * 256 * 3 / 8 + 4 + 4
    assert size(fed.powersgd(2, key=FACTORS)) == 2 * 130 * 4


def test_combined_messages_stay_small() -> None:
    kernel = [{"w": jax.random.normal(jax.random.key(i), (100, 30))} for i in range(5)]

    def size(t):
        def total(kernels):
            return t.combine([t.encode(t.init(k), k, key=KEY, shared=SHARED)[0] for k in kernels])

        return fed.bits(jax.eval_shape(total, kernel)) / 8

    assert size(fed.topk(count=30)) == 5 * (30 * 4 + 45)
    assert size(fed.topk(count=1000)) == 12000  # five lists would be longer than the dense mean
    assert size(fed.randomk(count=30)) == 30 * 4 + 4
    assert size(fed.sign(vote=True)) == 750 + 4
    assert size(fed.uniform(3, limit=8.0)) == 3000 * 6 / 8 + 4  # sums of 0..35
    assert size(fed.powersgd(2, key=FACTORS)) == 5 * 2 * 130 * 4


def test_topk_keeps_the_largest_exactly() -> None:
    x = np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32)
    for count in (1, 10, 63):
        got = np.asarray(decode(encode(fed.topk(count=count), {"w": jnp.asarray(x)}))["w"])
        cut = np.sort(np.abs(x).reshape(-1))[-count]
        assert (got == np.where(np.abs(x) >= cut, x, 0)).all()


def test_topk_of_a_fraction_sends_one_element_at_least() -> None:
    got = decode(encode(fed.topk(0.01), {"b": jnp.array([1.0, -3.0, 2.0])}))["b"]
    assert got.tolist() == [0, -3, 0]


@pytest.mark.slow
def test_one_element_and_zeros_survive_every_compressor() -> None:
    for name, t in COMPRESSORS.items():
        if "powersgd" in name or name == "by_path" or "common" in name:
            continue
        update = {"one": jnp.array([2.0]), "none": jnp.zeros((4, 4))}
        got = decode(encode(t, update))
        assert (got["none"] == 0).all(), name
        assert "randomk" in name or np.allclose(got["one"], 2.0), name


def test_sign_has_the_mean_magnitude() -> None:
    x = np.random.default_rng(1).normal(size=50).astype(np.float32)
    got = np.asarray(decode(encode(fed.sign(), {"w": jnp.asarray(x)}))["w"])
    assert np.allclose(got, np.where(x >= 0, 1, -1) * np.abs(x).mean(), rtol=1e-6)


@pytest.mark.slow
def test_a_vote_is_the_majoritys() -> None:
    t = fed.sign(vote=True)
    x = np.random.default_rng(2).normal(size=(4, 60)).astype(np.float32)
    sent = [t.encode((), {"w": jnp.asarray(row)})[0] for row in x]
    signs = np.where(x >= 0, 1, -1)
    scales = np.abs(x).mean(1)
    for n, weights in [(3, None), (4, None), (4, [4.0, 1.0, 1.0, 1.0])]:
        w = np.ones(n) if weights is None else np.array(weights)
        want = np.sign(w @ signs[:n]) * (w @ scales[:n] / w.sum())
        got = np.asarray(fed.decode(t.combine(sent[:n], weights))["w"])
        assert np.allclose(got, want, rtol=1e-5)
    assert (np.asarray(fed.decode(t.combine(sent))["w"]) == 0).any()  # ties


def test_a_rotated_message_is_numpys() -> None:
    """The whole decoding again with scipy's matrix: signs, transform, levels."""
    t = fed.rotate(fed.uniform(3))
    x = np.random.default_rng(3).normal(size=50).astype(np.float32)
    message = encode(t, {"w": jnp.asarray(x)})["w"]
    inner = message.inner
    codes = np.unpackbits(np.asarray(inner.codes), bitorder="little").reshape(64, 3) @ [1, 2, 4]
    signs = np.asarray(jax.random.rademacher(key_of(message.seed), (64,), jnp.float32))
    turn = scipy_hadamard(64) / 8
    padded = np.concatenate([x, np.zeros(14)])
    turned = turn @ (signs * padded)
    values = (2 * codes - 7) * float(inner.half_step)
    assert np.abs(values - turned).max() <= 2 * float(inner.half_step) * (1 + 1e-4)
    assert np.isclose(7 * float(inner.half_step), np.abs(turned).max(), rtol=1e-5)
    assert np.allclose(message.materialize(), (signs * (turn @ values))[:50], atol=1e-5)


@pytest.mark.parametrize(
    "t",
    [fed.randomk(0.25), fed.uniform(1), fed.rotate(fed.uniform(2), block=16), fed.rotate(fed.randomk(0.5))],
    ids=["randomk", "uniform", "rotated", "rotated randomk"],
)
def test_unbiased(t) -> None:
    x = jax.random.normal(jax.random.key(5), (30,))
    n = 4000

    def once(key):
        a, b = jax.random.split(key)
        return t.decode(t.encode((), {"w": x}, key=a, shared=b)[0])["w"]

    got = np.asarray(jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(6), n)), np.float64)
    error = np.abs(got.mean(0) - np.asarray(x))
    assert (error < 5 * got.std(0) / np.sqrt(n) + 1e-6).all()


def test_drive_is_nearly_unbiased_and_plain_sign_is_not() -> None:
    x = jax.random.normal(jax.random.key(5), (256,)) ** 3

    def bias(t):
        def once(key):
            return t.decode(t.encode((), {"w": x}, key=key, shared=key)[0])["w"]

        got = jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(6), 2000))
        return float(jnp.linalg.norm(got.mean(0) - x) / jnp.linalg.norm(x))

    assert bias(fed.rotate(fed.sign(unbiased=True))) < 0.06
    assert bias(fed.rotate(fed.sign())) > 0.2  # shrinks by 2 / pi
    assert bias(fed.sign()) > 0.3


def test_a_rotation_lowers_the_error_where_there_are_outliers() -> None:
    x = {"w": jax.random.normal(jax.random.key(7), (1024,)).at[0].set(100.0)}

    def error(t):
        return float(jnp.sum((decode(encode(t, x))["w"] - x["w"]) ** 2))

    assert error(fed.rotate(fed.uniform(4))) < error(fed.uniform(4)) / 10


CONTRACTING = {
    "topk": (fed.topk(count=12), 12 / 120),
    "sign": (fed.sign(), 0.0),
    "uniform 4": (fed.rotate(fed.uniform(4)), 0.0),
    "rotated sign": (fed.rotate(fed.sign()), 0.0),
    "powersgd": (fed.powersgd(2, key=FACTORS), 0.0),
}


@pytest.mark.parametrize("name", quick(CONTRACTING, "topk", "powersgd"))
def test_contracts(name) -> None:
    t, delta = CONTRACTING[name]
    for seed in range(5):
        x = {"kernel": jax.random.normal(jax.random.key(seed), (12, 10)) ** 3}
        error = jnp.sum((x["kernel"] - decode(encode(t, x))["kernel"]) ** 2)
        assert float(error) <= (1 - delta) * float(jnp.sum(x["kernel"] ** 2)) * (1 + 1e-6)


def test_biased_randomk_contracts_on_average() -> None:
    t, x = fed.randomk(0.25, unbiased=False), jax.random.normal(jax.random.key(0), (40,))
    keys = jax.random.split(jax.random.key(1), 2000)
    error = jax.jit(jax.vmap(lambda k: jnp.sum((x - t.decode(t.encode((), {"w": x}, shared=k)[0])["w"]) ** 2)))(keys)
    assert np.isclose(float(error.mean() / jnp.sum(x**2)), 0.75, atol=0.02)


def test_powersgd_converges_to_the_svd_when_repeated() -> None:
    t = fed.powersgd(2, key=FACTORS)
    rng = np.random.default_rng(0)
    u, s, vt = np.linalg.svd(rng.normal(size=(12, 10)), full_matrices=False)
    s = s * 0.4 ** np.arange(10)
    update = {"kernel": jnp.asarray((u * s) @ vt, jnp.float32)}
    state = t.init(update)
    for _ in range(12):
        message, state = t.encode(state, update)
    best = (u[:, :2] * s[:2]) @ vt[:2]
    assert np.allclose(t.decode(message)["kernel"], best, atol=1e-4)


def test_powersgd_takes_all_axes_but_the_last_as_rows_and_sends_the_rest_as_it_is() -> None:
    t = fed.powersgd(1, key=FACTORS)
    update = {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.arange(4.0)}
    message = encode(t, update)
    assert message["kernel"].p.shape == (18, 1)
    assert message["kernel"].q.shape == (4, 1)
    assert np.allclose(t.decode(message)["kernel"], 1, atol=1e-6)  # of rank one
    assert (message["bias"] == update["bias"]).all()


def test_powersgd_over_an_axis_is_one_step_on_the_mean() -> None:
    t = fed.powersgd(2, key=FACTORS, axis_name="clients")
    alone = fed.powersgd(2, key=FACTORS)
    updates = jax.tree.map(lambda *x: jnp.stack(x), *[update_of(i) for i in range(3)])
    mean = jax.tree.map(lambda x: x.mean(0), updates)
    state = alone.init(mean)
    got = jax.jit(jax.vmap(lambda u: t.decode(t.encode(state, u)[0]), axis_name="clients"))(updates)
    want = alone.decode(alone.encode(state, mean)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-5), got, want)


def test_a_common_range_over_an_axis_lets_codes_be_summed_as_integers() -> None:
    t = fed.rotate(fed.uniform(4, axis_name="clients"))
    updates = jax.tree.map(lambda *x: jnp.stack(x), *[update_of(i) for i in range(3)])
    keys = jax.random.split(KEY, 3)
    sent = jax.jit(jax.vmap(lambda u, k: t.encode((), u, key=k, shared=SHARED)[0], axis_name="clients"))(updates, keys)
    total = jax.jit(fed.combine_stacked)(sent)
    assert total["layer"]["kernel"].inner.parts == 3
    assert total["layer"]["kernel"].inner.codes.size == 128 * 6 // 8  # sums of 0..45
    want = jax.tree.map(lambda x: x.mean(0), jax.jit(jax.vmap(t.decode))(sent))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), t.decode(total), want)


REFUSED = [
    (lambda: fed.topk(0.0), r"topk: fraction must be a number in \(0, 1\], got 0.0"),
    (lambda: fed.topk(1.5), r"topk: fraction must be a number in \(0, 1\], got 1.5"),
    (lambda: fed.topk(), "topk: give a fraction or count="),
    (lambda: fed.topk(0.5, count=3), "topk: give a fraction or count="),
    (lambda: fed.randomk(count=0), "randomk: count must be a positive integer, got 0"),
    (lambda: fed.uniform(0), r"uniform: bits must be an integer in 1..8, got 0"),
    (lambda: fed.uniform(9), r"uniform: bits must be an integer in 1..8, got 9"),
    (lambda: fed.uniform(4, limit=0.0), "uniform: limit must be positive, got 0.0"),
    (lambda: fed.uniform(4, limit=1.0, axis_name="i"), "give one of them"),
    (lambda: fed.rotate(fed.sign(), block=12), "rotate: block must be a power of two, got 12"),
    (lambda: fed.powersgd(0, key=FACTORS), "powersgd: rank must be a positive integer, got 0"),
    (lambda: fed.error_feedback(fed.randomk(0.1)), r"use randomk\(unbiased=False\)"),
    (lambda: fed.error_feedback(fed.rotate(fed.uniform(2))), "uniform with 3 bits or more"),
]


@pytest.mark.parametrize(("make", "text"), REFUSED, ids=[t for _, t in REFUSED])
def test_refuses_where_it_is_written(make, text) -> None:
    with pytest.raises(ValueError, match=text):
        make()


MISFITS = [
    (fed.topk(count=11), r"topk: 'layer/bias' of shape \(10,\) has 10 elements, fewer than count=11"),
    (fed.randomk(count=500), r"randomk: 'layer/bias' of shape \(10,\) has 10 elements, fewer than count=500"),
    (fed.powersgd(11, key=FACTORS), r"powersgd: 'layer/kernel' of shape \(12, 10\) has at most rank 10, got rank 11"),
    (fed.powersgd(1, key=FACTORS, where=".*"), r"powersgd: 'layer/bias' of shape \(10,\) is no matrix"),
    (fed.by_path({"nothing": fed.sign()}), "by_path: rule 'nothing' matches nothing"),
]


@pytest.mark.parametrize(("t", "text"), MISFITS, ids=[t for _, t in MISFITS])
def test_refuses_at_init_what_does_not_fit(t, text) -> None:
    with pytest.raises(ValueError, match=text):
        t.init(update_of(0))


@pytest.mark.parametrize("name", [n for n in COMPRESSORS if n != "by_path"])
def test_refuses_updates_that_are_none(name) -> None:
    t = COMPRESSORS[name]
    good = update_of(0)
    state = t.init(good)
    bad = [
        ({"layer": {"kernel": jnp.ones((12, 10)).at[2, 3].set(jnp.nan), "bias": jnp.ones(10)}}, "'layer/kernel' has 1"),
        ({"layer": {"kernel": jnp.ones((12, 10), jnp.int32), "bias": jnp.ones(10)}}, "'layer/kernel' is of type int32"),
        ({"layer": {"kernel": jnp.ones((0, 10)), "bias": jnp.ones(10)}}, "'layer/kernel' is empty"),
        ({}, "the update has no arrays"),
    ]
    for update, text in bad:
        with pytest.raises(ValueError, match=text):
            t.encode(state, update, key=KEY, shared=SHARED)


def test_refuses_missing_keys() -> None:
    update = update_of(0)
    with pytest.raises(ValueError, match="randomk: encode wants shared=, the round's key"):
        fed.randomk(0.1).encode((), update)
    with pytest.raises(ValueError, match="uniform: encode wants key=, this sender's own key"):
        fed.uniform(4).encode((), update, shared=SHARED)
    with pytest.raises(ValueError, match="rotate: encode wants shared="):
        fed.rotate(fed.sign()).encode((), update, key=KEY)


def test_a_compressed_update_is_refused() -> None:
    message = encode(fed.sign(), update_of(0))
    with pytest.raises(ValueError, match=r"topk: 'layer/bias' is a Signs; encode materialize\(update\)"):
        fed.topk(0.1).encode((), message)


@pytest.mark.parametrize("size", [1e-20, 1e19, 1e30])
def test_the_scale_of_drive_is_in_range_where_squares_are_not(size) -> None:
    t, update = fed.sign(unbiased=True), update_of(3)
    want = decode(encode(t, update))
    got = decode(encode(t, jax.tree.map(lambda x: x * size, update)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a / size, b, rtol=1e-5), got, want)


def test_specs_are_checked_where_written() -> None:
    with pytest.raises(ValueError, match="powersgd: key must be one key such as"):
        fed.powersgd(2, key=3)
    with pytest.raises(TypeError, match=r"error_feedback: wants a compressor such as topk\(0.01\), got 3"):
        fed.error_feedback(3)
    for bad in ("a", True, 0.0):
        with pytest.raises(ValueError, match="uniform: limit must be positive"):
            fed.uniform(4, limit=bad)


def test_a_key_outlives_a_donated_state() -> None:
    key, update = jax.random.key(5), update_of(0)
    tx = fed.compress_updates(fed.topk(0.5), key=key)
    for _ in range(2):
        jax.jit(tx.update, donate_argnums=1)(update, tx.init(update))
