"""Sharing: how many values are left, who gets which gradient, what zeros do, and what it refuses."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.core.layouts import Buckets, Channels, Groups, Tensor, Tiles, Tokens
from jaxcomp.distill import soft_targets
from jaxcomp.sharing.kmeans import inits
from jaxcomp.sharing.leaves import trained_tables, with_tables
from jaxcomp.sharing.vectors import share_vectors
from tests.laws import assert_same_bits, bits_of
from tests.marks import quick


def normal(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def applied(t: jc.Transform, w) -> jc.sharing.Codebook:
    params = {"kernel": jnp.asarray(w)}
    return t.apply(t.init(params), params)["kernel"]


def relaxed(update):
    """An optax update that promotes types of its own."""

    def call(*args):
        with jax.numpy_dtype_promotion("standard"):
            return update(*args)

    return call


def distinct(x) -> int:
    return len(np.unique(np.asarray(jc.materialize(x))))


@pytest.mark.parametrize(
    "per",
    quick(
        [Tensor(), Channels(-1), Channels((0, -1)), Buckets(20), Groups(3, 1), Tiles((3, 5)), jc.Global()],
        jc.Global(),
        Groups(3, 1),
    ),
    ids=repr,
)
def test_each_table_has_so_many_values(per) -> None:
    w = normal(4, 9, 5)
    clusters = 2 if isinstance(per, Groups) else 4
    leaf = applied(jc.share(clusters, per=per, init=inits.linear), w)
    dense = np.asarray(leaf.materialize())
    tables = {
        Channels(-1): list(dense.transpose(2, 0, 1).reshape(5, -1)),
        Channels((0, -1)): list(dense.transpose(0, 2, 1).reshape(20, -1)),
        Buckets(20): [dense.reshape(-1)[i : i + 20] for i in range(0, 180, 20)],
        Groups(3, 1): [dense[i, j : j + 3, k] for i in range(4) for j in range(0, 9, 3) for k in range(5)],
        Tiles((3, 5)): [dense[i, j : j + 3] for i in range(4) for j in range(0, 9, 3)],
    }.get(per, [dense])
    assert [distinct(x) for x in tables] == [clusters] * len(tables)
    assert leaf.table.shape == (clusters, len(tables))
    lists = np.asarray(leaf.table)[:, 0]
    assert set(np.unique(tables[0])) == set(lists)


@pytest.mark.parametrize(
    "per", quick([Tensor(), Channels(0), Buckets(7), Groups(5, 1)], Buckets(7), Groups(5, 1)), ids=repr
)
def test_a_weight_gets_its_nearest_entry(per) -> None:
    w = normal(6, 5)
    leaf = applied(jc.share(3, per=per, init=inits.linear), w)
    dense, table = np.asarray(leaf.materialize()).reshape(-1), np.asarray(leaf.table)
    number = {Channels(0): np.arange(30) // 5, Groups(5, 1): np.arange(30) // 5, Buckets(7): np.arange(30) // 7}.get(
        per, np.zeros(30, int)
    )
    far = np.abs(table[:, number] - np.asarray(w).reshape(-1))
    np.testing.assert_allclose(np.abs(dense - np.asarray(w).reshape(-1)), far.min(0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_one_table_serves_several_leaves() -> None:
    params = {"one": normal(5, 6), "two": normal(3, 4, 5, seed=1).astype(jnp.bfloat16)}
    t = jc.share(6, per=jc.Global(), init=inits.linear)
    seen = t.apply(t.init(params), params)
    both = np.concatenate([np.asarray(x, np.float32).reshape(-1) for x in jax.tree.leaves(jc.materialize(seen))])
    assert len(np.unique(np.asarray(jnp.asarray(both).astype(jnp.bfloat16), np.float32))) <= 6
    assert seen["two"].dtype == jnp.bfloat16


@pytest.mark.parametrize("k", quick([2, 3, 16, 200, 300], 16, 300))
def test_codes_take_log2_bits(k, tmp_path) -> None:
    leaf = applied(jc.share(k, init=inits.quantile), normal(40, 25))
    packed = jc.pack(leaf)
    bits = {2: 1, 3: 2, 16: 4, 200: 8, 300: 16}[k]
    stored = packed.codes.data if isinstance(packed.codes, jc.core.Packed) else packed.codes
    assert stored.nbytes == 1000 * bits // 8
    assert packed.weights is None
    assert_same_bits(packed.materialize(), leaf.materialize())
    jc.save(tmp_path / "f", {"kernel": leaf})
    assert_same_bits(jc.materialize(jc.load(tmp_path / "f"))["kernel"], leaf.materialize())


@pytest.mark.slow
def test_kept_codes_do_not_move_and_entries_follow_their_members() -> None:
    params = {"kernel": normal(8, 8)}
    t = jc.share(4, init=inits.linear, recluster=False)
    state = t.init(params)
    moved = {"kernel": params["kernel"] * 2 + 1}
    after = t.update(state, moved, step=jnp.int32(0))
    leaf = t.apply(after, moved)["kernel"]
    assert_same_bits(leaf.codes, t.apply(state, params)["kernel"].codes)
    np.testing.assert_allclose(leaf.table, t.apply(state, params)["kernel"].table * 2 + 1, rtol=1e-5)


@pytest.mark.slow
def test_reclustering_follows_the_weights() -> None:
    params = {"kernel": normal(64, 8)}
    t = jc.share(4, init=inits.quantile)
    state = t.init(params)
    moved = {"kernel": params["kernel"] ** 3}
    after = t.apply(t.update(state, moved, step=jnp.int32(0)), moved)
    stale = t.apply(state, moved)
    error = lambda seen: float(jnp.sum((jc.materialize(seen)["kernel"] - moved["kernel"]) ** 2))  # noqa: E731
    assert error(after) < 0.9 * error(stale)


@pytest.mark.parametrize("per", quick([Tensor(), Channels(), Buckets(6)], Tensor(), Buckets(6)), ids=repr)
@pytest.mark.parametrize("gradient", quick(["straight", "sum", "mean"], "straight", "mean"))
def test_the_gradient_of_a_weight(gradient, per) -> None:
    w, g = normal(5, 4), normal(5, 4, seed=1)
    t = jc.share(3, gradient=gradient, init=inits.linear, per=per)
    state = t.init({"kernel": w})
    got = jax.grad(lambda p: jnp.sum(jc.materialize(t.apply(state, p))["kernel"] * g))({"kernel": w})["kernel"]
    leaf = t.apply(state, {"kernel": w})["kernel"]
    number = {Channels(): np.arange(20) % 4, Buckets(6): np.arange(20) // 6}.get(per, np.zeros(20, int))
    group = np.asarray(leaf.codes).reshape(-1) * 100 + number
    flat = np.asarray(g).reshape(-1)
    want = flat.copy()
    if gradient != "straight":
        reduce = np.sum if gradient == "sum" else np.mean
        want = np.array([reduce(flat[group == c]) for c in group])
    np.testing.assert_allclose(np.asarray(got).reshape(-1), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", ["sum", "mean"])
def test_the_gradient_of_a_table(gradient) -> None:
    g = normal(6, 5, seed=1)
    leaf = applied(jc.share(3, init=inits.linear, preserve_zeros=True), jnp.where(g > -0.3, normal(6, 5), 0.0))
    trained, fixed = trained_tables({"kernel": leaf, "bias": jnp.ones(2)}, gradient)
    loss = lambda t: jnp.sum(jc.materialize(with_tables(t, fixed))["kernel"] * g)  # noqa: E731
    got = jax.grad(loss)(trained)["kernel"].table[:, 0]
    codes = np.asarray(leaf.codes)
    reduce = np.sum if gradient == "sum" else np.mean
    want = [0.0] + [reduce(np.asarray(g)[codes == k]) for k in (1, 2)]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    again = with_tables(trained, fixed)
    assert_same_bits(jc.materialize(again)["kernel"], leaf.materialize())


@pytest.mark.parametrize("gradient", ["sum", "mean"])
def test_an_entry_of_vectors_gets_its_members_gradients(gradient) -> None:
    w, g = normal(12, 5), np.asarray(normal(12, 5, seed=1))
    leaf = applied(share_vectors(4, size=3, key=jax.random.key(0)), w)
    trained, fixed = trained_tables({"kernel": leaf}, gradient)
    table = jax.grad(lambda t: jnp.sum(jc.materialize(with_tables(t, fixed))["kernel"] * g))(trained)["kernel"].table
    codes, vectors = np.asarray(leaf.codes), g.reshape(4, 3, 5).transpose(0, 2, 1)
    gathered = np.sum if gradient == "sum" else np.mean
    for entry in range(4):
        np.testing.assert_allclose(table[entry], gathered(vectors[codes == entry], axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_trained_tables_learn_with_adam_and_keep_zeros() -> None:
    x, target = normal(64, 6), normal(64, 3, seed=5)
    t = jc.chain(jc.prune(0.5), jc.share(4, init=inits.quantile, preserve_zeros=True))
    params = {"kernel": normal(6, 3, seed=2)}
    trained, fixed = trained_tables(t.apply(t.init(params), params))
    tx = optax.adamw(0.05, weight_decay=0.1)
    opt = tx.init(trained)

    def loss(p):
        return jnp.mean((x @ jc.materialize(with_tables(p, fixed))["kernel"] - target) ** 2)

    @jax.jit
    def step(p, opt):
        updates, opt = relaxed(tx.update)(jax.grad(loss)(p), opt, p)
        return optax.apply_updates(p, updates), opt

    before = loss(trained)
    for _ in range(30):
        trained, opt = step(trained, opt)
    assert float(loss(trained)) < 0.8 * float(before)
    dense = jc.materialize(with_tables(trained, fixed))["kernel"]
    assert int((dense == 0).sum()) == 9
    assert distinct(dense) <= 4


@pytest.mark.slow
def test_what_is_zero_stays_zero_and_nothing_else_becomes_it() -> None:
    w = jnp.where(jnp.arange(60).reshape(6, 10) % 3 == 0, 0.0, normal(6, 10))
    params = {"kernel": w}
    t = jc.share(5, preserve_zeros=True)
    state = t.init(params)
    dense = jc.materialize(t.apply(state, params))["kernel"]
    assert ((dense == 0) == (w == 0)).all()
    assert distinct(dense) == 5
    grads = jax.grad(lambda p: jnp.sum(jc.materialize(t.apply(state, p))["kernel"] ** 2 + 1.0))(params)["kernel"]
    assert (np.asarray(grads)[np.asarray(w) == 0] == 0).all()
    alone = jc.share(4)
    free = {"kernel": w[w != 0][:, None]}
    np.testing.assert_allclose(state.tables["kernel"][1:], alone.init(free).tables["kernel"], rtol=1e-6)


COMPOSED = {
    "PQAT": (jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4))), None, True),
    "CQAT": (jc.chain(jc.share(6, init=inits.linear), jc.quantize(jc.Int(4))), 6, False),
    "CQAT, log": (jc.chain(jc.share(6, init=inits.linear), jc.quantize(jc.Log(6))), 6, False),
    "PCQAT": (jc.chain(jc.prune(0.5), jc.share(6, preserve_zeros=True), jc.quantize(jc.Int(8))), 6, True),
    "deep compression": (jc.recipes.deep_compression(0.5, 6), 7, True),
}


@pytest.mark.parametrize("name", quick(COMPOSED, "PCQAT"))
def test_training_preserves_what_came_before(name) -> None:
    t, most, sparse = COMPOSED[name]
    params, x = {"kernel": normal(12, 8)}, normal(32, 12, seed=3)
    state, tx = t.init(params), optax.adam(0.05)
    opt = tx.init(params)

    @jax.jit
    def step(state, opt, params, i):
        state = t.update(state, params, step=i)
        loss = lambda p: jnp.mean((x @ jc.materialize(t.apply(state, p))["kernel"] - 1.0) ** 2)  # noqa: E731
        grads = jax.grad(loss)(params)
        updates, opt = relaxed(tx.update)(grads, opt, params)
        return state, opt, optax.apply_updates(params, updates), jc.materialize(t.apply(state, params))

    for i in range(6):
        state, opt, params, dense = step(state, opt, params, jnp.int32(i))
        assert np.isfinite(np.asarray(dense["kernel"])).all()
        if most is not None:
            assert distinct(dense["kernel"]) <= most
        if sparse:
            assert int((dense["kernel"] == 0).sum()) >= 48


def test_the_quantized_table_is_on_the_grid() -> None:
    leaf = applied(jc.chain(jc.share(6, init=inits.linear), jc.quantize(jc.Int(4))), normal(12, 8))
    assert isinstance(leaf.table, jc.quantization.Quantized)
    codes = np.asarray(leaf.table.codes)
    assert codes.shape == (6, 1)
    assert (codes == np.round(codes)).all()
    assert leaf.table.scale.shape == (1, 1)


@pytest.mark.slow
def test_one_step_prunes_shares_and_distils(tmp_path) -> None:
    """Zeros and at most 16 values in every selected leaf, at every step and in the file."""
    sizes, steps = {"one": (16, 32), "two": (32, 10)}, 8
    teacher = {k: normal(*s, seed=i) / 4 for i, (k, s) in enumerate(sizes.items())}
    schedule = jc.cubic(0.8, end=5)
    t = jc.chain(jc.prune(schedule), jc.share(16, preserve_zeros=True))
    x = normal(64, 16, seed=9)
    net = lambda p: jax.nn.relu(x @ p["one"]) @ p["two"]  # noqa: E731
    params, tx = jax.tree.map(lambda w: w + 0.05 * normal(*w.shape, seed=7), teacher), optax.adamw(1e-2)
    state, opt = t.init(params), tx.init(params)

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, opt, i):
        state = t.update(state, params, step=i)
        loss, grads = jax.value_and_grad(
            lambda p: soft_targets(net(jc.materialize(t.apply(state, p))), net(teacher), 4.0)
        )(params)
        updates, opt = relaxed(tx.update)(grads, opt, params)
        return optax.apply_updates(params, updates), state, opt, loss

    for i in range(steps):
        params, state, opt, loss = step(params, state, opt, jnp.int32(i))
        assert np.isfinite(float(loss))
        for name, w in jc.materialize(t.apply(state, params)).items():
            assert distinct(w) <= 16, (i, name)
            assert int((w == 0).sum()) >= round(float(schedule(i)) * w.size), (i, name)
    seen = t.apply(state, params)
    dense_bytes = jc.save(tmp_path / "dense", params)
    assert jc.save(tmp_path / "f", seen) < 0.4 * dense_bytes
    loaded = jc.materialize(jc.load(tmp_path / "f"))
    for name, w in jc.materialize(seen).items():
        assert_same_bits(loaded[name], w)
        assert distinct(loaded[name]) <= 16
        assert int((loaded[name] == 0).sum()) >= round(0.8 * w.size)


@pytest.mark.slow
def test_a_leaf_of_zeros_at_the_start_is_shared_well_later() -> None:
    t = jc.share(8)
    state = t.init({"kernel": jnp.zeros((8, 8))})
    later = {"kernel": normal(8, 8)}
    dense = jc.materialize(t.apply(t.update(state, later, step=jnp.int32(0)), later))["kernel"]
    assert distinct(dense) == 8


@pytest.mark.parametrize("value", [0.0, 0.1, -3e38])
def test_constant_leaves_come_back_as_they_are(value) -> None:
    w = jnp.full((5, 7), value)
    assert_same_bits(applied(jc.share(8), w).materialize(), w)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_types_are_kept(dtype) -> None:
    leaf = applied(jc.share(8, init=inits.linear), normal(20, 6).astype(dtype))
    assert leaf.materialize().dtype == leaf.table.dtype == dtype
    assert distinct(leaf.materialize().astype(jnp.float32)) <= 8


@pytest.mark.slow
def test_double_precision_is_kept() -> None:
    with jax.enable_x64(True):
        leaf = applied(jc.share(8, init=inits.linear), np.random.default_rng(0).normal(size=(20, 6)))
        assert leaf.materialize().dtype == jnp.float64


@pytest.mark.parametrize("init", [inits.random, inits.plus_plus], ids=lambda i: i.name)
def test_draws_want_a_key_and_repeat_with_it(init) -> None:
    with pytest.raises(
        ValueError, match=r"init '\w+' draws, and wants a key: share\(\.\.\., key=jax\.random\.key\(0\)\)"
    ):
        jc.share(4, init=init)
    params = {"kernel": normal(9, 9)}
    states = [jc.share(4, init=init, key=jax.random.key(k)).init(params) for k in (0, 0)]
    assert_same_bits(*states)


@pytest.mark.slow
def test_optimal_is_never_worse() -> None:
    w = normal(30, 10)
    error = lambda init: float(jnp.sum((applied(jc.share(5, init=init), w).materialize() - w) ** 2))  # noqa: E731
    best = error(inits.optimal)
    for init in (inits.linear, inits.density, inits.quantile, inits.near_optimal):
        assert best <= error(init) * (1 + 1e-5)


@pytest.mark.slow
def test_optimal_works_inside_jit() -> None:
    t, params = jc.share(5, init=inits.optimal), {"kernel": normal(30, 10)}
    np.testing.assert_array_equal(
        bits_of(jax.jit(t.init)(params).tables["kernel"]), bits_of(t.init(params).tables["kernel"])
    )


def test_vectors_are_shared_together(tmp_path) -> None:
    w = normal(3, 8, 6)
    t = share_vectors(8, size=4, axis=1, key=jax.random.key(0))
    params = {"kernel": w}
    state = t.init(params)
    seen = t.apply(t.update(state, params, step=jnp.int32(0)), params)
    dense = np.asarray(jc.materialize(seen)["kernel"])
    assert dense.shape == w.shape
    vectors = dense.reshape(3, 2, 4, 6).transpose(0, 1, 3, 2).reshape(-1, 4)
    assert len(np.unique(vectors, axis=0)) == 8
    own = np.asarray(w).reshape(3, 2, 4, 6).transpose(0, 1, 3, 2).reshape(-1, 4)
    table = np.asarray(seen["kernel"].table)
    far = ((own[:, None] - table) ** 2).sum(-1)
    np.testing.assert_allclose(((own - vectors) ** 2).sum(-1), far.min(1), rtol=1e-4)
    assert_same_bits(jc.materialize(jc.pack(seen))["kernel"], jnp.asarray(dense))
    jc.save(tmp_path / "f", seen)
    assert_same_bits(jc.materialize(jc.load(tmp_path / "f"))["kernel"], jnp.asarray(dense))
    grads = jax.grad(lambda p: jnp.sum(jc.materialize(t.apply(state, p))["kernel"] * w))(params)["kernel"]
    np.testing.assert_array_equal(grads, w)


@pytest.mark.slow
def test_vectors_with_a_mask_keep_its_zeros() -> None:
    t = jc.chain(jc.prune(0.5), share_vectors(8, size=2, key=jax.random.key(0)))
    params = {"kernel": normal(8, 6)}
    assert int((jc.materialize(t.apply(t.init(params), params))["kernel"] == 0).sum()) >= 24


BAD_SPECS = {
    "clusters must be an integer in 2..65536, got 1": lambda: jc.share(1),
    "clusters must be an integer in 2..65536, got 2.5": lambda: jc.share(2.5),
    "gradient must be one of 'straight', 'sum', 'mean', got 'max'": lambda: jc.share(4, gradient="max"),
    "iterations must be an integer that is not negative": lambda: jc.share(4, iterations=-1),
    "Buckets: size must be a positive integer, got 0": lambda: Buckets(0),
    "share_vectors: size must be a positive integer": lambda: share_vectors(4, size=0, key=jax.random.key(0)),
    "share_vectors: the first table is drawn": lambda: share_vectors(4, size=2, key=None),
    "share_vectors: axis must be an integer, or None": lambda: share_vectors(
        4, size=2, axis=1.0, key=jax.random.key(0)
    ),
    "share_vectors: key must be one key such as": lambda: share_vectors(4, size=2, key=3),
    "share: key must be one key such as": lambda: jc.share(
        4, init=inits.random, key=jax.random.split(jax.random.key(0))
    ),
}


@pytest.mark.parametrize("message", BAD_SPECS)
def test_bad_specs_are_refused_where_they_are_written(message) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        BAD_SPECS[message]()


BAD_LEAVES = {
    r"share: 'kernel' of shape \(3, 4\) has 12 weights a table, fewer than 16 clusters": (
        jc.share(16),
        np.ones((3, 4)),
    ),
    r"share: 'kernel' of shape \(3, 4\) has 3 weights a table": (jc.share(4, per=Channels()), np.ones((3, 4))),
    r"share: 'kernel' of shape \(3, 4\) has 2 weights a table": (jc.share(4, per=Buckets(2)), np.ones((3, 4))),
    r"has shape \(3, 4\) and no axis 2; name axes in -2..1": (jc.share(2, per=Channels(2)), np.ones((3, 4))),
    r"share: 'kernel' has 1 values that are not finite": (jc.share(2), np.array([[1.0, np.nan], [2, 3]])),
    r"share: 'kernel' is empty": (jc.share(2), np.ones((0, 4))),
    r"share: rule 'x' matches nothing": (jc.share(2, where="x"), np.ones((3, 4))),
    r"share: 'kernel' was made by quantize earlier in this chain; put share before quantize": (
        jc.chain(jc.quantize(), jc.share(2)),
        np.ones((3, 4)),
    ),
    r"vectors of 2 do not divide": (share_vectors(2, size=2, key=jax.random.key(0)), np.ones((3, 4))),
    r"has 2 vectors of 2, fewer than 3": (share_vectors(3, size=2, key=jax.random.key(0)), np.ones((2, 2))),
    r"share_vectors: 'kernel' has shape \(4,\) and no axis -2; name one in -1..0": (
        share_vectors(2, size=2, axis=-2, key=jax.random.key(0), where=jc.core.everything),
        np.ones(4),
    ),
    r"share: 'kernel' has 3 axes, and neither its path nor its rank settles": (
        jc.share(2, per=Channels()),
        np.ones((3, 4, 5)),
    ),
    r"share_vectors: 'kernel' has 3 axes, and neither": (
        share_vectors(2, size=2, key=jax.random.key(0)),
        np.ones((3, 4, 5)),
    ),
    r"share: 'kernel' has 4 elements along axis 1 of shape \(3, 4\), which groups of 3 do not divide": (
        jc.share(2, per=Groups(3, 1)),
        np.ones((3, 4)),
    ),
}


@pytest.mark.parametrize("message", BAD_LEAVES)
def test_bad_leaves_are_named(message) -> None:
    t, w = BAD_LEAVES[message]
    with pytest.raises(ValueError, match=message):
        t.init({"kernel": jnp.asarray(w, jnp.float32)})


def test_trained_tables_want_codebooks() -> None:
    with pytest.raises(ValueError, match="the tree has no codebook"):
        trained_tables({"kernel": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="gradient must be 'sum' or 'mean', got 'straight'"):
        trained_tables({"kernel": applied(jc.share(2), normal(3, 3))}, "straight")


def test_specs_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match="init must be an Init such as near_optimal, got 'linear'"):
        jc.share(4, init="linear")
    for per in ("channel", jc.core.Local(), Tokens()):
        with pytest.raises(TypeError, match=r"per must be one of Tensor\(\), Channels\(axes\), .*Global\(\), got"):
            jc.share(4, per=per)
    with pytest.raises(TypeError, match=r"share: roles must be what jaxcomp.roles\(fn\)"):
        jc.share(4, roles={})
    with pytest.raises(TypeError, match=r"share_vectors: roles must be what jaxcomp.roles\(fn\)"):
        share_vectors(4, size=2, key=jax.random.key(0), roles={})


def test_fault_4_small_leaves_share_one_program() -> None:
    traced = []
    counting = inits.Init("counting", lambda *given: (traced.append(1), inits.linear.fn(*given))[1])
    params = {f"l{i}": {"kernel": normal(*shape)} for i, shape in enumerate([(16, 32), (32, 64), (64, 10)])}
    t = jc.share(16, init=counting)
    state = t.init(params)
    assert len(traced) == 1
    for name, leaf in params.items():  # and what another leaf does to it is nothing
        alone = jc.share(16, init=counting).init({name: leaf})
        assert_same_bits(alone.tables[f"{name}/kernel"], state.tables[f"{name}/kernel"])


def test_fault_4_a_table_a_channel_is_that_channels_own() -> None:
    w = normal(96, 6)
    tables = jc.share(8, per=Channels(-1)).init({"kernel": w}).tables["kernel"]
    jitted = jax.jit(jc.share(8, per=Channels(-1)).init)({"kernel": w}).tables["kernel"]
    assert_same_bits(tables, jitted)
    for c in (0, 5):
        alone = jc.share(8).init({"kernel": w[:, c : c + 1]}).tables["kernel"]
        np.testing.assert_allclose(tables[:, c], alone[:, 0], rtol=1e-6)
