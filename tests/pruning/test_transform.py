"""prune against numpy: exact counts, ties, scopes, survivors, schedules, statistics; and what it refuses."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.core.leaves import is_compressed

# A few shapes, many values: each new shape is a new compilation.
shapes = st.sampled_from([(1, 1), (7, 5), (2, 3, 4)])
arrays = hnp.arrays(np.float32, shapes, elements=st.floats(-8, 8, width=16))

NOTHING = pytest.mark.filterwarnings("ignore:prune. nothing of")  # of few units a share may be none


def oracle(w: np.ndarray, sparsity: float, alive: np.ndarray | None = None) -> np.ndarray:
    """Keeps all but the first round(sparsity * n) of a stable sort."""
    flat = np.abs(w).reshape(-1)
    index = np.arange(flat.size) if alive is None else np.flatnonzero(alive.reshape(-1))
    gone = index[np.argsort(flat[index], kind="stable")[: round(sparsity * index.size)]]
    keep = np.zeros(flat.size, bool)
    keep[index] = True
    keep[gone] = False
    return keep.reshape(w.shape)


def masks(t: jc.Transform, params, step: int = 0, **stats) -> dict:
    state = t.init(params)
    if stats or step:
        state = t.update(state, params, step=jnp.int32(step), **stats)
    return jax.tree.map(lambda x: getattr(x, "mask", None), t.apply(state, params), is_leaf=is_compressed)


@NOTHING
@given(w=arrays, sparsity=st.floats(0, 0.999))
def test_local_masks_are_those_of_a_stable_sort(w, sparsity) -> None:
    got = masks(jc.prune(sparsity), {"kernel": jnp.asarray(w)})["kernel"]
    assert (np.asarray(got) == oracle(w, sparsity)).all()


@NOTHING
@given(a=arrays, b=arrays, sparsity=st.floats(0, 0.999))
def test_a_global_threshold_is_that_of_the_leaves_joined(a, b, sparsity) -> None:
    got = masks(jc.prune(sparsity, scope=jc.Global()), {"u": jnp.asarray(a), "v": jnp.asarray(b)})
    want = oracle(np.concatenate([a.reshape(-1), b.reshape(-1)]), sparsity)
    assert (np.concatenate([np.asarray(got[k]).reshape(-1) for k in "uv"]) == want).all()


@NOTHING
@given(w=arrays, first=st.floats(0, 0.9), second=st.floats(0, 0.9))
def test_stacked_prunes_act_on_survivors(w, first, second) -> None:
    t = jc.chain(jc.prune(first), jc.prune(second))
    got = masks(t, {"kernel": jnp.asarray(w)})["kernel"]
    assert (np.asarray(got) == oracle(w, second, oracle(w, first))).all()


def test_half_and_half_of_the_rest_is_three_quarters() -> None:
    got = masks(jc.chain(jc.prune(0.5), jc.prune(0.5)), {"kernel": jax.random.normal(jax.random.key(0), (32, 32))})
    assert int(got["kernel"].sum()) == 256


@NOTHING
@given(w=arrays, sparsity=st.floats(0, 0.999), order=st.sampled_from([1.0, 2.0, np.inf]))
def test_filters_go_by_their_norm(w, sparsity, order) -> None:
    t = jc.prune(sparsity, structure=jc.Filters(axis=-1, order=order))
    got = np.asarray(masks(t, {"kernel": jnp.asarray(w)})["kernel"]).reshape(-1)
    norms = np.linalg.norm(w.reshape(-1, w.shape[-1]).astype(np.float64), ord=order, axis=0)
    gone = round(sparsity * len(norms))
    assert got.sum() == len(norms) - gone
    if 0 < gone < len(norms):
        assert norms[~got].max() <= norms[got].min() * (1 + 1e-5)


def test_a_filter_mask_is_stored_once_a_filter() -> None:
    w = jax.random.normal(jax.random.key(0), (3, 3, 8, 16))
    assert masks(jc.prune(0.5, structure=jc.Filters()), {"conv": w})["conv"].shape == (1, 1, 1, 16)


def test_a_scheduled_mask_follows_the_schedule_and_the_weights() -> None:
    t = jc.prune(jc.cubic(0.8, begin=10, end=20))
    w = jax.random.normal(jax.random.key(1), (20, 20))
    state = t.init({"kernel": w})
    assert state["kernel"].all()
    for step, want in [(5, 0), (15, round(400 * 0.8 * (1 - 0.5**3))), (20, 320), (99, 320)]:
        state = t.update(state, {"kernel": w}, step=jnp.int32(step))
        assert int((~state["kernel"]).sum()) == want
    regrown = w.at[0, 0].set(100.0)
    assert t.update(state, {"kernel": regrown}, step=jnp.int32(99))["kernel"][0, 0]


def test_sensitivity_prunes_where_the_gradient_is_small() -> None:
    w = jnp.ones((2, 3))
    grads = {"kernel": jnp.array([[0.1, -5.0, 0.2], [3.0, -0.05, 4.0]])}
    got = masks(jc.prune(0.5, score=jc.pruning.sensitivity), {"kernel": w}, grads=grads)["kernel"]
    assert got.tolist() == [[False, True, False], [True, False, True]]


def test_masked_weights_get_no_gradient_and_others_do() -> None:
    t = jc.prune(0.5)
    params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    g = jax.grad(lambda p: jc.materialize(t.apply(t.init(params), p))["kernel"].sum())(params)["kernel"]
    assert g.tolist() == [[0, 1], [1, 0]]


def test_a_global_count_is_exact_for_many_weights() -> None:
    w = jax.random.normal(jax.random.key(0), (1000, 777))
    mask = jax.jit(lambda p: masks(jc.prune(0.9), p))({"kernel": w})["kernel"]
    assert int(mask.sum()) == 777_000 - round(0.9 * 777_000)
    assert float(jnp.abs(w)[mask].min()) >= float(jnp.abs(w)[~mask].max())


def test_containers_of_every_kind() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.inner = nnx.Linear(4, 6, rngs=rngs)

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    t = jc.chain(jc.prune(0.5, where="inner/kernel"), jc.quantize(jc.Int(4), where="inner/kernel"))
    dense = jc.materialize(t.apply(t.init(state), state))
    assert int((nnx.merge(graph, dense).inner.kernel[...] == 0).sum()) >= 12

    mlp = eqx.nn.MLP(3, 3, 8, 2, key=jax.random.key(0))
    t = jc.prune(0.5)
    pruned = jc.materialize(t.apply(t.init(mlp), mlp))
    assert float((pruned.layers[1].weight == 0).mean()) == 0.5
    assert pruned(jnp.ones(3)).shape == (3,)

    nested = {"a": (jnp.arange(1.0, 5.0).reshape(2, 2), [jnp.ones(3)])}
    assert masks(jc.prune(0.5), nested)["a"][0].tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, float("nan"), "half", True, -1])
def test_refuses_a_sparsity_outside(sparsity) -> None:
    with pytest.raises(ValueError, match=r"prune: sparsity must be a number in \[0, 1\) or a schedule.*, got"):
        jc.prune(sparsity)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": {"bias": jnp.ones(3)}}, r"prune: rule matrices matches nothing; the paths are 'a/bias'\."),
        ({"a": {"kernel": jnp.ones((0, 3))}}, r"prune: 'a/kernel' is empty \(shape \(0, 3\)\)"),
        ({"a": {"kernel": jnp.array([[1.0, jnp.nan]])}}, r"prune: 'a/kernel' has 1 values that are not finite, of 2"),
        ({"a": {"kernel": jnp.array([[1.0, jnp.inf]])}}, r"prune: 'a/kernel' has 1 values that are not finite, of 2"),
    ],
)
def test_refuses_leaves_that_do_not_fit(params, message) -> None:
    with pytest.raises(ValueError, match=message):
        jc.prune(0.5).init(params)


def test_refuses_an_integer_leaf_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"prune: 'ids' is of type int32, not a floating array; leave it out by a rule"
    ):
        jc.prune(0.5, where="ids").init({"ids": jnp.ones((2, 2), jnp.int32)})


def test_refuses_a_pattern_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"rule '\(' is not a regular expression"):
        jc.prune(0.5, where="(").init({"kernel": jnp.ones((2, 2))})


def test_refuses_to_prune_what_is_quantized() -> None:
    t = jc.chain(jc.quantize(), jc.prune(0.5))
    with pytest.raises(ValueError, match=r"prune: 'b/kernel' was made by quantize earlier.*put prune before quantize"):
        t.init({"b": {"kernel": jnp.ones((2, 2))}})


def test_asks_for_the_statistic_it_needs() -> None:
    t = jc.prune(0.5, score=jc.pruning.sensitivity)
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(
        ValueError, match=r"score 'sensitivity' needs the statistic 'grads'; call update\(..., grads=tree"
    ):
        t.update(t.init(params), params, step=0)
    with pytest.raises(ValueError, match=r"'grads' has no entry for 'kernel', only 'other'"):
        t.update(t.init(params), params, step=0, grads={"other": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"'grads' has shape \(3,\) at 'kernel', wanted \(2, 2\)"):
        t.update(t.init(params), params, step=0, grads={"kernel": jnp.ones(3)})


def test_names_the_axis_that_a_leaf_lacks() -> None:
    with pytest.raises(ValueError, match=r"prune: 'kernel' axis 3 is out of bounds for array of dimension 2"):
        jc.prune(0.5, structure=jc.Filters(axis=3)).init({"kernel": jnp.ones((2, 2))})


def test_two_leaves_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two leaves are both named 'a/b'"):
        jc.prune(0.5).init({"a": {"b": jnp.ones((2, 2))}, "a/b": jnp.ones((2, 2))})


def test_cubic_is_the_published_equation() -> None:
    s = jc.cubic(0.9, begin=10, end=110, initial=0.1)
    for t in (10, 37, 80, 110):
        want = 0.9 + (0.1 - 0.9) * (1 - (t - 10) / 100) ** 3
        assert float(s(t)) == pytest.approx(want, abs=1e-6)
    with pytest.raises(ValueError, match="end must be after begin"):
        jc.cubic(0.5, begin=5, end=5)


@jax.numpy_dtype_promotion("standard")  # optax's adam mixes types
def test_wrap_optax_keeps_zeros_through_an_unchanged_loop() -> None:
    tx = jc.wrap_optax(optax.adam(1e-2), jc.chain(jc.prune(0.5), jc.quantize(jc.Int(4))))
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8)), "bias": jnp.zeros(8)}
    x, y = jax.random.normal(jax.random.key(1), (64, 8)), jax.random.normal(jax.random.key(2), (64, 8))
    state = tx.init(params)

    def loss(p):
        return jnp.mean((x @ p["kernel"] + p["bias"][None] - y) ** 2)

    @jax.jit
    def step(p, s):
        value, grads = jax.value_and_grad(loss)(p)
        updates, s = tx.update(grads, s, p)
        return optax.apply_updates(p, updates), s, value

    values = []
    for _ in range(30):
        params, state, value = step(params, state)
        values.append(float(value))
    assert int((params["kernel"] == 0).sum()) >= 32
    for column in np.asarray(params["kernel"]).T:
        assert len(np.unique(np.round(column / np.abs(column).max(), 4))) <= 16
    assert values[-1] < values[1]
    with pytest.raises(ValueError, match=r"tx.update\(grads, state, params\)"):
        tx.update(params, state)
