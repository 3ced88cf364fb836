"""regrow against numpy: exact counts, drop and grow; what regrown weights start from, by every optimizer; errors."""

from __future__ import annotations

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.core.gates import never, when
from jaxcomp.core.optimizers import MaskState, dense_value_and_grad, reset_regrown
from jaxcomp.pruning.schedules import alternating
from jaxcomp.pruning.unmasking import from_zero
from tests.marks import quick

KEY = jax.random.key(0)
SPARSITY = 0.8
OPTIMIZERS = {
    "sgd": optax.sgd(0.5),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=1e-2, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "lion": optax.lion(1e-2),
    "adafactor": optax.adafactor(2e-2, momentum=0.9, min_dim_size_to_factor=8),
    "muon": optax.contrib.muon(1e-2),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=optax.constant_schedule(1e-2)),
    "partition": optax.partition({"a": optax.adam(1e-2), "b": optax.sgd(1e-2, 0.9)}, {"in": "a", "out": "b"}),
    "schedule_free": optax.contrib.schedule_free_adamw(1e-2),
}


def make_params(key: jax.Array = KEY) -> dict:
    a, b = jax.random.split(key)
    return {
        "in": {"kernel": jax.random.normal(a, (12, 32)) / 3, "bias": jnp.zeros(32)},
        "out": {"kernel": jax.random.normal(b, (32, 10)) / 5, "bias": jnp.zeros(10)},
    }


def net(p: dict, x: jax.Array) -> jax.Array:
    h = jax.nn.relu(x @ p["in"]["kernel"] + p["in"]["bias"][None])
    return h @ p["out"]["kernel"] + p["out"]["bias"][None]


def loss(p: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((net(p, x) - y) ** 2)


X = jax.random.normal(jax.random.key(5), (128, 12))
Y = net(make_params(jax.random.key(9)), X)


def rigl(**changes) -> jc.Transform:
    return jc.pruning.rigl(SPARSITY, key=KEY, **{"period": 5, "stop": 40, "fraction": 0.4, **changes})


def set_() -> jc.Transform:
    return jc.pruning.sparse_evolution(SPARSITY, key=KEY, period=5, stop=40)


def oracle_masks(t_fraction, mask, w, grow, *, among=None):
    """Numpy: drop the smallest active, grow the largest inactive, stable sorts."""
    flat, w, grow = mask.reshape(-1).copy(), np.abs(w).reshape(-1), grow.reshape(-1)
    active = np.flatnonzero(flat)
    count = round(t_fraction * active.size)
    flat[active[np.argsort(w[active], kind="stable")[:count]]] = False
    rest = np.flatnonzero(~flat)
    flat[rest[np.argsort(-grow[rest], kind="stable")[:count]]] = True
    return flat.reshape(mask.shape)


@pytest.mark.filterwarnings("ignore:regrow. the mask of 'kernel' never moves")
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (2, 3, 4)])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_drop_and_grow_are_those_of_stable_sorts(shape, fraction) -> None:
    rng = np.random.default_rng(len(shape))
    t = jc.pruning.regrow(0.6, key=KEY, grow=jc.pruning.sensitivity, fraction=fraction)
    for ties in (False, True):
        draw = (lambda: rng.integers(-2, 3, shape)) if ties else (lambda: rng.normal(size=shape))
        w, g = draw().astype(np.float32), draw().astype(np.float32) + np.float32(0.125)
        params = {"kernel": jnp.asarray(w)}
        state = t.init(params)
        new = t.update(state, params, step=jnp.int32(3), grads={"kernel": jnp.asarray(g)})
        want = oracle_masks(fraction, np.asarray(state.masks["kernel"]), w, np.abs(g))
        assert (np.asarray(new.masks["kernel"]) == want).all()


def test_first_masks_are_exact_and_random_or_by_a_score() -> None:
    params = make_params()
    masks = rigl().init(params).masks
    assert {p: int(m.sum()) for p, m in masks.items()} == {"in/kernel": 384 - 307, "out/kernel": 64}
    other = jc.pruning.rigl(SPARSITY, key=jax.random.key(1), period=5, stop=40).init(params).masks
    overlap = int((masks["in/kernel"] & other["in/kernel"]).sum())
    assert overlap < 40  # of 77, and 15 are expected of independent draws
    top = jc.pruning.regrow(0.8, key=KEY, initial=jc.pruning.magnitude).init(params).masks["in/kernel"]
    w = jnp.abs(params["in"]["kernel"])
    assert w[top].min() >= w[~top].max()


def test_leaves_of_one_shape_and_steps_draw_for_themselves() -> None:
    params = {"a/kernel": jnp.ones((20, 20)), "b/kernel": jnp.ones((20, 20))}
    t = jc.pruning.regrow(0.5, key=KEY, fraction=1.0)
    first = t.init(params)
    later = [t.update(first, params, step=jnp.int32(i)) for i in (0, 1)]
    draws = [m for s in (first, *later) for m in s.masks.values()]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert 60 < int((a & b).sum()) < 140  # 100 of 200
    alone = jc.by_path({"b/kernel": t}).init(params)
    assert (alone[0].masks["b/kernel"] == first.masks["b/kernel"]).all()
    with pytest.warns(UserWarning, match="regrow: the mask of 'tiny' never moves: fraction=0.3 of 1 active"):
        one = jc.pruning.regrow(0.99, key=KEY).init({"tiny": jnp.ones((1, 3))})
    assert int(one.masks["tiny"].sum()) == 1


def test_a_table_gives_each_leaf_its_own_sparsity() -> None:
    params = {**make_params(), "free": {"kernel": jnp.ones((4, 4))}}
    t = jc.pruning.regrow({"in/kernel": 0.9, "out/.*": 0.25}, key=KEY)
    state = t.init(params)
    assert {p: int(m.sum()) for p, m in state.masks.items()} == {"in/kernel": 384 - 346, "out/kernel": 240}
    assert t.apply(state, params)["free"]["kernel"] is params["free"]["kernel"]


@pytest.mark.parametrize("make", quick([rigl, set_], rigl), ids=["rigl", "set"])
def test_counts_hold_at_every_step_and_masks_rest_between(make) -> None:
    t, params = make(), make_params()
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(n=1)(lambda s, p, i, g: t.update(s, p, step=i, grads=g)))
    state, moves = t.init(params), 0
    for i in range(45):
        dense = jax.tree.map(lambda x, i=i: jnp.cos(i + 3 * x), params)
        params = jax.tree.map(lambda x, i=i: x + 0.3 * jnp.sin(7 * x + i), params)
        new = update(state, params, jnp.int32(i), dense)
        eager = t.update(state, params, step=i, grads=dense)
        chex.assert_trees_all_equal(new, eager)
        due = i % 5 == 0 and 0 < i < 40
        for path, mask in new.masks.items():
            assert int(mask.sum()) == int(state.masks[path].sum())
            moved = bool((mask != state.masks[path]).any())  # what was dropped may have grown again at once
            assert due or not moved, (i, path)
            moves += moved
        state = new
    assert moves >= 10  # of two leaves at seven due steps


def test_rigl_grows_by_a_share_that_falls_as_a_cosine() -> None:
    t = jc.pruning.rigl(0.5, key=KEY, period=10, stop=100, fraction=0.3)
    params = {"kernel": jax.random.normal(KEY, (40, 50))}
    grads = {"kernel": jax.random.normal(jax.random.key(1), (40, 50))}
    state = t.init(params)
    for step in (10, 50, 90):
        want = oracle_masks(
            0.15 * (1 + np.cos(np.pi * step / 100)),
            np.asarray(state.masks["kernel"]),
            np.asarray(params["kernel"]),
            np.abs(np.asarray(grads["kernel"])),
        )
        got = t.update(state, params, step=jnp.int32(step), grads=grads).masks["kernel"]
        assert (np.asarray(got) == want).all()


def test_static_never_moves() -> None:
    t, params = when(jc.pruning.regrow(0.9, key=KEY), never), make_params()
    state = t.init(params)
    assert t.update(state, params, step=0) is state
    assert "while" not in str(jax.make_jaxpr(lambda s: t.update(s, params, step=jnp.int32(1)))(state))


def test_dense_gradients_are_those_of_the_masked_network() -> None:
    params, t = make_params(), rigl()
    state = t.init(params)
    value, grads, dense = jax.jit(dense_value_and_grad(t, loss))(state, params, X, Y)
    seen = jc.materialize(t.apply(state, params))
    want_value, want = jax.value_and_grad(loss)(seen, X, Y)
    chex.assert_trees_all_close((value, dense), (want_value, want), rtol=1e-5, atol=1e-6)
    mask = state.masks["in/kernel"]
    assert float(jnp.abs(dense["in"]["kernel"][~mask]).max()) > 0
    assert float(jnp.abs(grads["in"]["kernel"][~mask]).max()) == 0
    np.testing.assert_array_equal(grads["in"]["kernel"][mask], dense["in"]["kernel"][mask])
    (value, aux), *_ = dense_value_and_grad(t, lambda p, x: (net(p, x).sum(), x.shape), has_aux=True)(state, params, X)
    assert aux == (128, 12)
    rounded = jc.chain(t, jc.quantize(jc.Int(4)))
    _, grads, dense = dense_value_and_grad(rounded, loss)(rounded.init(params), params, X, Y)
    assert float(jnp.abs(grads["in"]["kernel"][~mask]).max()) == 0 < float(jnp.abs(dense["in"]["kernel"][~mask]).max())


def shaped_like_params(opt_state, params) -> dict:
    """By the place in the state: arrays whose path ends as a kernel's and whose shape is that kernel's."""
    shapes = {
        str(path[-2:]): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if "kernel" in str(path[-1])
    }
    return {
        (jax.tree_util.keystr(path), str(path[-2:])): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
        if shapes.get(str(path[-2:])) == getattr(leaf, "shape", None)
    }


# sgd keeps nothing; a factored adafactor keeps momentum alone; others one array a moment, lion's and muon's just one.
KEPT = {
    "sgd": 0,
    "momentum": 2,
    "adam": 4,
    "adamw": 4,
    "lion": 2,
    "adafactor": 2,
    "muon": 2,
    "inject_hyperparams": 4,
    "partition": 3,
    "schedule_free": 4,
}


@pytest.mark.parametrize("name", quick(OPTIMIZERS, "muon"))
def test_rigl_trains_and_regrown_weights_start_afresh(name) -> None:
    _train(OPTIMIZERS[name], rigl(), KEPT[name])


@pytest.mark.parametrize("name", quick(OPTIMIZERS, "adam"))
def test_set_trains_and_regrown_weights_start_afresh(name) -> None:
    _train(OPTIMIZERS[name], set_(), KEPT[name])


@jax.numpy_dtype_promotion("standard")  # optax's and muon's own code mixes types and ranks
@jax.numpy_rank_promotion("allow")
def _train(tx: optax.GradientTransformation, t: jc.Transform, kept: int) -> None:
    params = make_params()
    state, opt_state = t.init(params), tx.init(params)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, opt_state, state, i):
        value, grads, dense = dense_value_and_grad(t, loss)(state, params, X, Y)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        new = t.update(state, params, step=i, grads=dense)
        return value, (params, opt_state), new, reset_regrown(state, new, params, opt_state)

    values, regrown = [], 0
    for i in range(60):
        value, before, new, after = step(params, opt_state, state, jnp.int32(i))
        values.append(float(value))
        if i in (5, 20, 41):
            regrown += _check_reset(state, new, before, after, kept)
        state, (params, opt_state) = new, after
    assert regrown > 10
    assert np.mean(values[-5:]) < 0.6 * values[0], values
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, opt_state)))


def _check_reset(old: MaskState, new: MaskState, before, after, kept: int) -> int:
    """Regrown weights and all that is kept of them are zero; every other number is what it was."""
    grown = {str(_key_path(p)): np.asarray(new.masks[p] & ~old.masks[p]) for p in new.masks}
    found = shaped_like_params(before[1], before[0])
    assert len(found) == kept, list(found)
    (kernels, moments), other = (shaped_like_params(x, before[0]) for x in after), 0
    for (place, end), x in {**kernels, **{("state" + k[0], k[1]): v for k, v in moments.items()}}.items():
        was = shaped_like_params(before[1] if place.startswith("state") else before[0], before[0])
        was = np.asarray(was[place.removeprefix("state"), end])
        np.testing.assert_array_equal(np.asarray(x), np.where(grown[end], 0, was))
        other += int((was[~grown[end]] != 0).sum())
    assert other > 0
    places = set(kernels) | set(moments)
    for (path, x), (_, y) in zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in (before, after)), strict=True):
        if (jax.tree_util.keystr(path[1:]), str(path[-2:])) not in places:
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))
    return sum(int(m.sum()) for m in grown.values())


def _key_path(path: str) -> tuple:
    return tuple(jax.tree_util.DictKey(part) for part in path.split("/"))


def test_a_weight_that_comes_back_at_once_has_never_left() -> None:
    t = jc.pruning.regrow(0.5, key=KEY, grow=jc.pruning.sensitivity, fraction=1.0, initial=jc.pruning.magnitude)
    params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    state = t.init(params)
    new = t.update(state, params, step=0, grads={"w": jnp.array([[9.0, 0.1, 0.2, 8.0]])})
    assert new.masks["w"].tolist() == [[True, False, False, True]]
    assert reset_regrown(state, new, params, ())[0]["w"].tolist() == [[4.0, 3.0, 2.0, 0.0]]


def test_resets_reach_through_chain_gate_and_rules_and_tell_paths_apart() -> None:
    # Of one shape, and the one's path ends as the other's; the unmasked one keeps its moments.
    params = {"kernel": jnp.ones((4, 4)), "a": {"kernel": jnp.ones((4, 4))}}
    inner = jc.pruning.regrow(0.5, key=KEY, fraction=1.0, where="kernel")
    t = jc.chain(jc.by_path({"kernel": jc.gate(inner, jc.every(1))}), jc.quantize(jc.Int(4)))
    tx = optax.adam(0.1)
    opt_state = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), tx.init(params))
    old = t.init(params)
    new = t.update(old, params, step=0)
    after, moments = reset_regrown(old, new, params, opt_state)
    grown = 4 * 4 - int((after["kernel"] == 1).sum())
    assert grown > 0
    assert int((moments[0].mu["kernel"] == 0).sum()) == grown == int((moments[0].nu["kernel"] == 0).sum())
    assert after["a"]["kernel"] is params["a"]["kernel"]
    assert moments[0].mu["a"]["kernel"] is opt_state[0].mu["a"]["kernel"]
    assert reset_regrown((), (), params, opt_state) == (params, opt_state)


def test_what_reset_refuses() -> None:
    masks = [MaskState({"u": jnp.array([x])}) for x in (False, True)]
    with pytest.raises(ValueError, match=r"'u' is masked but is no leaf of the parameters, which are 'w'.*Put regrow"):
        reset_regrown(*masks, {"w": jnp.ones(1)}, ())
    with pytest.raises(ValueError, match=r"only one of the two states masks 'u'"):
        reset_regrown((), masks[1], {"u": jnp.ones(1)}, ())


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # optax's adam mixes types
def test_wrap_optax_trains_with_rigl_in_one_line() -> None:
    t, adam, params = rigl(), optax.adam(1e-2), make_params()
    tx = jc.wrap_optax(adam, t)
    state = tx.init(params)
    by_hand = (params, adam.init(params), state.transform)
    params = jc.materialize(t.apply(state.transform, params))

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params, X, Y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def step_by_hand(latent, opt_state, masks, i):
        _, grads, dense = dense_value_and_grad(t, loss)(masks, latent, X, Y)
        updates, opt_state = adam.update(grads, opt_state, latent)
        latent = optax.apply_updates(latent, updates)
        new = t.update(masks, latent, step=i, grads=dense)
        return *reset_regrown(masks, new, latent, opt_state), new

    values, moved = [], 0
    for i in range(60):
        before = state
        params, state, value = step(params, state)
        values.append(float(value))
        mask, old = (s.transform.masks["in/kernel"] for s in (state, before))
        assert int(mask.sum()) == 77
        assert int((params["in"]["kernel"] != 0).sum()) <= 77
        grown = np.asarray(mask & ~old)
        moved += grown.sum()
        assert (np.asarray(state.latent["in"]["kernel"])[grown] == 0).all()
        assert (np.asarray(state.optimizer[0].nu["in"]["kernel"])[grown] == 0).all()
        by_hand = step_by_hand(*by_hand, jnp.int32(i))
        if i == 10:  # later, differences in the last bits have grown
            chex.assert_trees_all_close(state.latent, by_hand[0], rtol=1e-3, atol=1e-5)
            chex.assert_trees_all_equal(state.transform, by_hand[2])
    assert moved > 30
    assert values[-1] < 0.6 * values[0]


EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, jaxcomp as jc
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
w, g = jax.random.normal(jax.random.key(0), (64, 32)), jax.random.normal(jax.random.key(1), (64, 32))
for grow, spec in ((None, P("d")), (jc.pruning.sensitivity, P(None, "d"))):
    t = jc.pruning.regrow(0.9, key=jax.random.key(2), grow=grow)
    f = jax.jit(lambda p, g: t.update(t.init(p), p, step=jnp.int32(3), grads=g).masks["w"])
    one = f({"w": w}, {"w": g})
    assert int(one.sum()) == 2048 - 1843
    put = lambda x: jax.device_put(x, NamedSharding(mesh, spec))
    assert (np.asarray(f({"w": put(w)}, {"w": put(g)})) == np.asarray(one)).all()
"""


@pytest.mark.slow
def test_eight_devices_give_what_one_gives() -> None:
    import os

    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_key_is_not_used_up() -> None:
    params = make_params()
    with jax.debug_key_reuse(True):
        t = jc.pruning.regrow(0.5, key=jax.random.key(3))
        state = t.init(params)
        update = jax.jit(lambda s, i: t.update(s, params, step=i))
        for i in range(2):
            state = update(t.update(state, params, step=jnp.int32(i)), jnp.int32(i))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: jc.pruning.regrow(1.0, key=KEY),
            r"sparsity must be a number in \[0, 1\), or a table.*got 1.0",
        ),
        (lambda: jc.pruning.regrow({"a": -0.1}, key=KEY), r"sparsity must be a number in \[0, 1\).*got -0.1"),
        (
            lambda: jc.pruning.regrow(0.5, key=KEY, fraction=1.5),
            r"fraction must be a number in \[0, 1\] or a sched.*got 1.5",
        ),
        (
            lambda: jc.pruning.regrow(0.5),
            r"first masks and growth are drawn, which wants a key: key=jax.random.key\(0\)",
        ),
        (lambda: jc.pruning.regrow(0.5, initial=jc.pruning.magnitude), r".*which wants a key"),
        (lambda: jc.pruning.regrow(0.5, key=0), r"key must be one key such as jax.random.key\(0\), got 0"),
        (lambda: jc.pruning.regrow(0.5, key=jax.random.split(KEY)), r"key must be one key"),
        (
            lambda: jc.pruning.regrow(0.5, initial=jc.pruning.sensitivity),
            r"initial score 'sensitivity' needs 'grads'; init has",
        ),
    ],
)
def test_refuses_what_it_is_told(make, message) -> None:
    with pytest.raises(ValueError, match="regrow: " + message):
        make()


def test_ac_dc_is_that_of_numpy() -> None:
    """Dense phases go on from the sparse weights, without their momentum."""
    rng, lr, beta = np.random.default_rng(0), 0.05, 0.9
    x, y = rng.normal(size=(32, 8)), rng.normal(size=(32, 3))
    plan = alternating(0.75, dense=3, sparse=4)
    tx = jc.wrap_optax(optax.sgd(lr, momentum=beta), from_zero(plan.gate(jc.prune(plan))))
    params = {"kernel": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)}
    loss = lambda p: jnp.mean((jnp.asarray(x, jnp.float32) @ p["kernel"] - jnp.asarray(y, jnp.float32)) ** 2)  # noqa: E731

    @jax.jit
    def train_step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    w, state = np.asarray(params["kernel"], np.float64), tx.init(params)
    mask, momentum = np.ones(w.shape, bool), np.zeros(w.shape)
    for step in range(20):
        params, state = train_step(params, state)
        momentum = beta * momentum + mask * (2 / y.size * x.T @ (x @ (w * mask) - y))
        w = w - lr * momentum
        if step % 7 == 0:
            w, momentum, mask = w * mask, momentum * mask, np.ones(w.shape, bool)
        elif step % 7 == 3:
            mask = np.abs(w) >= np.sort(np.abs(w), axis=None)[18]
        np.testing.assert_allclose(params["kernel"], w * mask, rtol=1e-4, atol=1e-5)


def test_from_zero_wants_a_mask() -> None:
    with pytest.raises(ValueError, match="from_zero: the transform masks no parameter; give it a prune"):
        from_zero(jc.quantize(jc.Int(8))).init(make_params())


def test_refuses_leaves_that_do_not_fit() -> None:
    params = make_params()
    with pytest.raises(ValueError, match=r"regrow: rule 'nothing' matches nothing.*'in/kernel', 'out/kernel'"):
        jc.pruning.regrow({"in/kernel": 0.5, "nothing": 0.5}, key=KEY).init(params)
    with pytest.raises(ValueError, match=r"'in/kernel' is masked already; put regrow before prune"):
        jc.chain(jc.prune(0.5), rigl()).init(params)
    with pytest.raises(ValueError, match=r"regrow: 'in/kernel' has 1 values that are not finite"):
        rigl().init({"in": {"kernel": jnp.array([[1.0, jnp.nan]])}})


def test_asks_for_dense_gradients() -> None:
    t, params = rigl(period=1), make_params()
    state = t.init(params)
    with pytest.raises(ValueError, match=r"score 'sensitivity' needs the statistic 'grads'; call update\(..., grads="):
        t.update(state, params, step=1)
    with pytest.raises(ValueError, match=r"'grads' has no entry for 'in/kernel', only 'other'.* dense_value_and_grad"):
        t.update(state, params, step=1, grads={"other": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"'grads' has shape \(32, 12\) at 'in/kernel', wanted \(12, 32\)"):
        t.update(state, params, step=1, grads=jax.tree.map(jnp.transpose, params))
    _, grads, _ = dense_value_and_grad(t, loss)(state, params, X, Y)
    with pytest.raises(ValueError, match=r"'grads' is zero wherever 'in/kernel' is masked, so growth would be blind"):
        t.update(state, params, step=1, grads=grads)
