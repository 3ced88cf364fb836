"""The slots of prune: scores, structures, scopes, gradients, statistics; and what does not go together."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcomp as jc
from jaxcomp.pruning import statistics
from jaxcomp.pruning.masks.densities import erk, heuristic
from jaxcomp.pruning.masks.nm import is_n_m
from jaxcomp.pruning.scores import importance, lamp, norm, redundancy
from jaxcomp.pruning.specs import Given, Heuristic, StraightThrough, Tied
from jaxcomp.pruning.transform import masked_by
from jaxcomp.trace import input_norms
from tests.marks import quick
from tests.pruning.test_transform import masks


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


TREE = {"a": {"kernel": normal(20, 30)}, "b": {"kernel": normal(4, 5, seed=1)}}


def gone(got: dict) -> dict[str, int]:
    return {k: int((~v["kernel"]).sum()) for k, v in got.items()}


def test_counts_and_fractions() -> None:
    with pytest.warns(UserWarning, match="sparsity=3 is an int and so a count: 3 of the 600 units of 'a/kernel' are"):
        assert gone(masks(jc.prune(3), TREE)) == {"a": 3, "b": 3}
    assert sum(gone(masks(jc.prune(130, scope=jc.Global()), TREE)).values()) == 130
    with pytest.raises(ValueError, match=r"prune: 'b/kernel': 20 units, fewer than the 21 to prune"):
        jc.prune(21, where="b/.*").init(TREE)
    with pytest.raises(ValueError, match=r"prune: 'a/kernel': 30 units, fewer than the 31"):
        jc.prune(31, structure=jc.Filters(), where="a/.*").init(TREE)


def test_scopes_give_each_leaf_its_own_sparsity() -> None:
    shapes = {"a": (20, 30), "b": (4, 5)}
    sizes = {"a": 600, "b": 20}
    want = {k: round(s * sizes[k]) for k, s in erk(shapes, 0.8).items()}
    assert gone(masks(jc.prune(0.8, scope=jc.pruning.ERK()), TREE)) == want
    assert gone(masks(jc.prune(jc.cubic(0.8, end=4), scope=jc.pruning.ERK()), TREE, step=9)) == want
    want = {k: round(s * sizes[k]) for k, s in heuristic(shapes, 0.5).items()}
    assert gone(masks(jc.prune(0.5, scope=Heuristic()), TREE)) == want
    table = Given({"b/.*": 2, ".*": jc.cubic(0.5, end=4)})
    assert gone(masks(jc.prune(scope=table), TREE, step=4)) == {"a": 300, "b": 2}


def test_a_given_table_must_cover_the_leaves_and_be_used() -> None:
    with pytest.raises(ValueError, match=r"prune: 'a/kernel' matches no rule of Given"):
        jc.prune(scope=Given({"b/.*": 0.5})).init(TREE)
    with pytest.raises(ValueError, match=r"prune: Given: rule 'c/\.\*' matches nothing that an earlier rule"):
        jc.prune(scope=Given({"c/.*": 0.5, ".*": 0.1})).init(TREE)
    with pytest.raises(ValueError, match=r"Given: rule '.\*': sparsity must be a number in \[0, 1\)"):
        Given({".*": 1.5})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, r"prune: wants a sparsity, such as 0.5"),
        ({"sparsity": 0.5, "structure": jc.NM(2, 4)}, r"prune: NM says the sparsity; leave 0.5 out"),
        ({"structure": jc.NM(2, 4), "scope": jc.Global()}, r"so it has no scope, got Global"),
        ({"sparsity": 0.5, "scope": Given({".*": 0.5})}, r"prune: Given says the sparsity; leave 0.5 out"),
        ({"sparsity": 3, "scope": jc.pruning.ERK()}, r"spreads a fraction over the leaves, got the count 3"),
        (
            {"sparsity": 0.5, "scope": jc.pruning.ERK(), "structure": Tied({".*": 0})},
            r"Tied prunes several alike, take Global",
        ),
    ],
)
def test_refuses_what_does_not_go_together(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        jc.prune(**kwargs)


def test_n_m_of_survivors_and_of_conv_kernels() -> None:
    params = {"conv": normal(3, 3, 8, 5)}
    got = masks(jc.prune(structure=jc.NM(2, 4)), params)["conv"]
    assert int(got.sum()) == 180
    assert is_n_m(got, jc.NM(2, 4, axis=2))
    first = masks(jc.prune(0.5), params)["conv"]
    both = masks(jc.chain(jc.prune(0.5), jc.prune(structure=jc.NM(2, 4))), params)["conv"]
    assert not (both & ~first).any()
    assert is_n_m(both, jc.NM(2, 4, axis=2))
    with pytest.raises(ValueError, match=r"prune: 'kernel' axis 2 is out of bounds for array of dimension 2"):
        jc.prune(structure=jc.NM(2, 4, axis=2)).init({"kernel": jnp.ones((4, 4))})


def test_blocks_of_a_masked_leaf_and_blocks_that_do_not_divide() -> None:
    params = {"kernel": normal(5, 7)}
    got = masks(jc.prune(0.5, structure=jc.pruning.Block((2, 2), pool="max")), params)["kernel"]
    assert got.shape == (5, 7)
    corners = np.asarray(got)[::2, ::2]
    assert int((~corners).sum()) == 6
    assert (np.repeat(np.repeat(corners, 2, 0), 2, 1)[:5, :7] == np.asarray(got)).all()
    # The block order is by the largest entry of each.
    w = np.pad(np.abs(np.asarray(params["kernel"])), ((0, 1), (0, 1)))
    tops = w.reshape(3, 2, 4, 2).max((1, 3))
    assert tops[~corners].max() <= tops[corners].min()


def test_tied_heads_go_together() -> None:
    def attention(seed: int) -> dict:
        return {
            "query": {"kernel": normal(6, 4, 3, seed=seed)},
            "out": {"kernel": normal(4, 3, 6, seed=seed + 1)},
        }

    params = {"block_0": attention(0), "block_1": attention(5)}
    heads = Tied({r"(.*)/query/kernel": 1, r"(.*)/out/kernel": 0}, order=1)
    got = masks(jc.prune(1, structure=heads), params)
    for block in ("block_0", "block_1"):
        q, o = np.asarray(params[block]["query"]["kernel"]), np.asarray(params[block]["out"]["kernel"])
        worst = np.argmin(np.abs(q).sum((0, 2)) + np.abs(o).sum((1, 2)))
        want = np.arange(4) != worst
        assert got[block]["query"]["kernel"].shape == (1, 4, 1)
        assert (np.asarray(got[block]["query"]["kernel"]).ravel() == want).all()
        assert (np.asarray(got[block]["out"]["kernel"]).ravel() == want).all()
    both = masks(jc.prune(3, structure=heads, scope=jc.Global()), params)
    assert sum(int((~both[b]["out"]["kernel"]).sum()) for b in both) == 3
    with pytest.raises(ValueError, match=r"prune: 'block_0/out/kernel' belongs to no group"):
        jc.prune(0.5, structure=Tied({r"(.*)/query/kernel": 1})).init(params)
    with pytest.raises(ValueError, match=r"group 'block_0' ties different numbers of slices: .* has 6 along axis 2"):
        jc.prune(0.5, structure=Tied({r"(.*)/query/kernel": 1, r"(.*)/out/kernel": 2})).init(params)


@given(sparsity=st.floats(0, 0.99), seed=st.integers(0, 1000))
@pytest.mark.filterwarnings("ignore:prune. nothing of")
def test_random_masks_are_exact_repeat_and_only_grow(sparsity, seed) -> None:
    score = jc.pruning.random_score(jax.random.key(seed))
    first = masks(jc.prune(sparsity, score=score), TREE)
    again = masks(jc.prune(sparsity, score=score), TREE)
    assert gone(first) == {"a": round(sparsity * 600), "b": round(sparsity * 20)}
    for k in first:
        assert (first[k]["kernel"] == again[k]["kernel"]).all()
        assert not (masks(jc.prune(0.995, score=score), TREE)[k]["kernel"] & ~first[k]["kernel"]).any()


def test_random_masks_differ_by_key_and_leaf() -> None:
    params = {"a": {"kernel": jnp.ones((8, 8))}, "b": {"kernel": jnp.ones((8, 8))}}
    one, two = (masks(jc.prune(0.5, score=jc.pruning.random_score(jax.random.key(s))), params) for s in (0, 1))
    assert (one["a"]["kernel"] != one["b"]["kernel"]).any()
    assert (one["a"]["kernel"] != two["a"]["kernel"]).any()
    for bad in (0, None, jnp.ones(2), jax.random.split(jax.random.key(0))):
        with pytest.raises(ValueError, match=r"random_score: key must be one key such as jax.random.key\(0\)"):
            jc.pruning.random_score(bad)


def test_filters_go_by_a_functions_own_sign() -> None:
    w = {"kernel": jnp.array([[1.0, 5.0, 3.0], [1.0, 5.0, 3.0]])}
    kept = masks(jc.prune(1, score=lambda w: -jnp.abs(w), structure=jc.Filters()), w)["kernel"]
    assert kept.tolist() == [[True, False, True]]


@pytest.mark.parametrize("structure", quick([jc.pruning.Element(), jc.Filters(), jc.NM(2, 4)], jc.Filters()))
def test_a_score_of_ones_own_with_a_statistic(structure) -> None:
    age = jc.pruning.Score("age", lambda w, age: jnp.abs(w) / (1 + age), needs=("age",), maker="the training loop")
    params = {"kernel": normal(8, 6)}
    ages = jnp.asarray(np.random.default_rng(3).integers(0, 5, (8, 6)), jnp.float32)
    t = jc.prune(None if isinstance(structure, jc.NM) else 0.5, score=age, structure=structure)
    given = jc.prune(None if isinstance(structure, jc.NM) else 0.5, score=importance, structure=structure)
    got = t.apply(t.update(t.init(params), params, step=0, age={"kernel": ages}), params)
    stats = {"kernel": jnp.abs(params["kernel"]) / (1 + ages)}
    want = given.apply(given.update(given.init(params), params, step=0, importance=stats), params)
    assert (jc.materialize(got)["kernel"] == jc.materialize(want)["kernel"]).all()
    with pytest.raises(ValueError, match=r"score 'age' needs the statistic 'age'.*made by the training loop"):
        t.update(t.init(params), params, step=0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jc.prune(0.5, gradient="ste"), TypeError, "gradient must be one of Cut, StraightThrough.*got 'ste'"),
        (lambda: jc.prune(0.5, scope=jc.Global), TypeError, "scope must be one of Local, Global.*got <class"),
        (
            lambda: jc.prune(0.5, structure="filters"),
            TypeError,
            "structure must be one of Element, .*NM.*got 'filters'",
        ),
        (lambda: jc.prune(0.5, score="l1"), TypeError, "score must be a Score such as magnitude.*got 'l1'"),
        (
            lambda: jc.prune(0.5, score=jc.pruning.movement, structure=jc.Filters(order=2)),
            ValueError,
            "score 'movement' may be below zero, which a norm of order 2 would hide; take order=1",
        ),
    ],
)
def test_slots_are_checked_where_written(make, error, message) -> None:
    with pytest.raises(error, match="prune: " + message):
        make()


def test_refuses_scores_that_are_nan() -> None:
    params = {"kernel": normal(4, 4)}
    t = jc.prune(0.5, score=jc.pruning.taylor)
    grads = {"kernel": params["kernel"].at[1, 2].set(jnp.nan)}
    with pytest.raises(
        ValueError, match=r"'grads' has 1 values that are not finite at 'kernel', and nothing is masked"
    ):
        t.update(t.init(params), params, step=0, grads=grads)
    own = jc.pruning.Score("own", lambda w, grads: grads * jnp.nan, needs=("grads",))
    with pytest.raises(ValueError, match=r"'kernel' has 16 scores of 'own' that are NaN from the statistic 'grads'"):
        jc.prune(0.5, score=own).update(t.init(params), params, step=0, grads=params)
    with pytest.raises(ValueError, match=r"prune: 'kernel' has 16 scores of '<lambda>' that are NaN, of 16"):
        jc.prune(0.5, score=lambda w: w * jnp.nan).init(params)


def test_scores_of_statistics_are_their_formulas() -> None:
    w, s = np.asarray(normal(6, 5)), np.abs(np.asarray(normal(6, 5, seed=2)))
    x = np.abs(np.asarray(normal(6, 1, seed=3)))

    def lowest(values: np.ndarray) -> np.ndarray:
        keep = np.ones(30, bool)
        keep[np.argsort(values.ravel(), kind="stable")[:15]] = False
        return keep.reshape(6, 5)

    for score, stats, want in [
        (jc.pruning.fisher, {"fisher": s}, 0.5 * s * w * w),
        (jc.pruning.wanda, {"input_norms": x}, np.abs(w) * x),
        (jc.pruning.movement, {"movement": w * s}, w * s),
        (importance, {"importance": w}, w),
        (jc.pruning.taylor, {"grads": s}, np.abs(w * s)),
        (norm(3), {}, np.abs(w) ** 3),
        (lambda w: w * w - w, {}, w * w - w),
    ]:
        given_stats = {k: {"kernel": jnp.asarray(v)} for k, v in stats.items()}
        got = masks(jc.prune(0.5, score=score), {"kernel": jnp.asarray(w)}, **given_stats)["kernel"]
        assert (np.asarray(got) == lowest(want.astype(np.float64))).all()


@pytest.mark.parametrize(
    ("score", "maker"),
    [
        (jc.pruning.wanda, "jaxcomp.trace.input_norms"),
        (jc.pruning.fisher, "jaxcomp.pruning.statistics.accumulate"),
        (jc.pruning.movement, "jaxcomp.pruning.statistics.accumulate"),
        (jc.pruning.taylor, "jax.grad of the loss"),
    ],
)
def test_a_missing_statistic_is_named_with_its_maker(score, maker) -> None:
    t = jc.prune(0.5, score=score)
    with pytest.raises(
        ValueError, match=rf"score '{score.name}' needs the statistic '{score.needs[0]}'.*made by {maker}"
    ):
        t.update(t.init(TREE), TREE, step=0)


def test_lamp_is_the_published_score_and_leaves_no_leaf_empty() -> None:
    w = np.asarray(normal(3, 4))
    order = np.argsort(np.abs(w).ravel(), kind="stable")
    square = np.sort(np.abs(w).ravel()).astype(np.float64) ** 2
    want = np.empty(12)
    want[order] = [square[i] / square[i:].sum() for i in range(12)]
    np.testing.assert_allclose(np.asarray(lamp().normalize(jnp.abs(jnp.asarray(w)))).ravel(), want, rtol=1e-5)
    params = {"tiny": {"kernel": 1e-6 * normal(4, 4)}, "large": {"kernel": normal(20, 20)}}
    got = masks(jc.prune(0.95, score=lamp(), scope=jc.Global()), params)
    assert all(v["kernel"].any() for v in got.values())
    assert not masks(jc.prune(0.95, scope=jc.Global()), params)["tiny"]["kernel"].any()
    with pytest.raises(ValueError, match="lamp: wants a score that is not negative"):
        lamp(jc.pruning.movement)


def test_redundancy_prunes_the_filter_that_others_replace() -> None:
    w = np.asarray(normal(3, 3, 4, 6)).copy()
    w[..., 2] = w.mean(-1)  # at the middle of all others
    got = masks(jc.prune(1, score=redundancy, structure=jc.Filters()), {"conv": jnp.asarray(w)})["conv"]
    assert np.flatnonzero(~np.asarray(got).ravel()).tolist() == [2]
    with pytest.raises(ValueError, match=r"prune: 'kernel' is scored by the distances between slices"):
        jc.prune(1, score=redundancy).init({"kernel": jnp.asarray(w)})


def test_an_all_zero_leaf_is_pruned_exactly() -> None:
    params = {"kernel": jnp.zeros((4, 5))}
    for t in (jc.prune(0.5), jc.prune(0.5, score=lamp()), jc.prune(0.5, structure=jc.Filters(0, order=2))):
        mask = np.broadcast_to(np.asarray(masks(t, params)["kernel"]), (4, 5))
        assert int(mask.sum()) == 10
    assert int(masks(jc.prune(structure=jc.NM(1, 2)), params)["kernel"].sum()) == 10


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    "t",
    [
        jc.prune(0.5, structure=jc.pruning.Block((2, 2))),
        jc.prune(structure=jc.NM(2, 4)),
        jc.prune(0.5, gradient=StraightThrough(), score=jc.pruning.random_score(jax.random.key(0))),
    ],
)
def test_types_are_kept(t, dtype) -> None:
    params = {"kernel": normal(8, 8).astype(dtype)}
    assert jc.materialize(t.apply(t.init(params), params))["kernel"].dtype == dtype


def test_without_regrowth_masks_only_grow() -> None:
    t = jc.prune(0.5, regrow=False)
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    state = t.init(params)
    swapped = {"kernel": params["kernel"][:, ::-1]}
    assert t.update(state, swapped, step=0)["kernel"].tolist() == [[False, False, True, True]]
    assert jc.prune(0.5).update(state, swapped, step=0)["kernel"].tolist() == [[True, True, False, False]]
    nm = jc.prune(structure=jc.NM(2, 4, axis=1), regrow=False)
    assert nm.update(nm.init(params), swapped, step=0)["kernel"].tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("rest", [(), (jc.quantize(jc.Int(8)),)], ids=["alone", "quantized"])
def test_the_straight_through_gradient_is_dense(rest) -> None:
    params = {"kernel": normal(4, 4)}

    def grad(t: jc.Transform):
        state = t.init(params)
        return jax.grad(lambda p: jc.materialize(t.apply(state, p))["kernel"].sum())(params)["kernel"]

    assert (grad(jc.chain(jc.prune(0.5, gradient=StraightThrough()), *rest)) != 0).all()
    assert int((grad(jc.chain(jc.prune(0.5), *rest)) != 0).sum()) == 8
    gated = jc.gate(jc.prune(0.5, gradient=StraightThrough()), jc.every(1))
    state = gated.update(gated.init(params), params, step=0)
    g = jax.grad(lambda p: jc.materialize(gated.apply(state, p))["kernel"].sum())(params)["kernel"]
    assert (g == 1).all()


def test_given_masks() -> None:
    mask = jnp.array([[True], [False]])
    t = masked_by({"a": {"kernel": mask}})
    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": jnp.ones(3)}
    seen = jc.materialize(t.apply(t.init(params), params))
    assert seen["a"]["kernel"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert seen["b"] is params["b"]
    with pytest.raises(ValueError, match=r"masked_by: there is no leaf 'c'"):
        masked_by({"a": {"kernel": mask}, "c": mask}).init(params)
    with pytest.raises(ValueError, match=r"masked_by: the mask of 'a/kernel' is float32 of shape"):
        masked_by({"a": {"kernel": jnp.ones((2, 1))}}).init(params)


def test_movement_and_fisher_are_gathered_over_steps() -> None:
    grads = [normal(3, 4, seed=s) for s in range(4)]
    params = {"kernel": normal(3, 4, seed=9)}
    t = statistics.accumulate(
        jc.gate(jc.prune(0.5, score=jc.pruning.movement), jc.every(4, start=3)), statistics.movement, statistics.fisher
    )
    state = t.init(params)
    update = jax.jit(lambda s, g, i: t.update(s, params, step=i, grads={"kernel": g}))
    for i, g in enumerate(grads):
        state = update(state, g, jnp.int32(i))
    total = -sum(np.asarray(g) * np.asarray(params["kernel"]) for g in grads)
    np.testing.assert_allclose(state.values["movement:kernel"], total, rtol=1e-5, atol=1e-6)
    keep = np.ones(12, bool)
    keep[np.argsort(total.ravel())[:6]] = False
    assert (np.asarray(t.apply(state, params)["kernel"].mask).ravel() == keep).all()
    weights = 0.99 ** np.arange(3, -1, -1) * 0.01
    mean = sum(w * np.asarray(g) ** 2 for w, g in zip(weights, grads, strict=True))
    np.testing.assert_allclose(state.values["fisher:kernel"], mean, rtol=1e-5)
    with pytest.raises(ValueError, match=r"accumulate: wants the gradients"):
        t.update(state, params, step=5)
    with pytest.raises(ValueError, match=r"Running: decay must be in \[0, 1\) or None"):
        statistics.Running("x", lambda w, g: g, decay=1.0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(x).reshape(x.shape[0], -1)
        return nn.Dense(5)(x)


def test_roles_and_input_norms_come_from_the_trace() -> None:
    x = normal(2, 4, 4, 4)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = Net().init(jax.random.key(0), x)["params"]
        fn = lambda p, x: Net().apply({"params": p}, x)  # noqa: E731
        roles = jc.roles(fn)(params, x)
        norms = jax.jit(input_norms(fn))(params, x)
    assert norms["Conv_0/kernel"].shape == (1, 1, 4, 1)
    np.testing.assert_allclose(
        np.ravel(norms["Conv_0/kernel"]), np.sqrt((np.asarray(x) ** 2).sum((0, 1, 2))), rtol=1e-5
    )
    assert norms["Dense_0/kernel"].shape == (128, 1)
    t = jc.prune(structure=jc.NM(2, 4), score=jc.pruning.wanda, roles=roles)
    seen = t.apply(t.update(t.init(params), params, step=0, input_norms=norms), params)
    for path, axis in {"Conv_0/kernel": 2, "Dense_0/kernel": 0}.items():
        layer, name = path.split("/")
        assert is_n_m(seen[layer][name], jc.NM(2, 4, axis))
        assert int(seen[layer][name].mask.sum()) == seen[layer][name].size // 2


def test_norms_of_stacked_layers_are_each_layers_own() -> None:
    w, x = normal(3, 4, 4), normal(5, 4, seed=1)

    def fn(p, x):
        return jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, p["kernel"])[0]

    got = input_norms(fn)({"kernel": w}, x)["kernel"]
    assert got.shape == (3, 4, 1)
    h = np.asarray(x)
    for layer in range(3):
        np.testing.assert_allclose(np.ravel(got[layer]), np.sqrt((h**2).sum(0)), rtol=1e-5)
        h = np.tanh(h @ np.asarray(w[layer]))
