"""low_rank, factorize and choose_ranks against numpy; composition, files, budgets, weighting; and what they refuse."""

from __future__ import annotations

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.activations import factored
from jaxcomp.core.leaves import is_compressed
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.factorization.leaves import Depthwise, LowRank, Separable, Tucker, balanced
from jaxcomp.factorization.specs import CP, SVD, Budget, Energy, RankOne, Tucker2
from jaxcomp.factorization.transform import choose_ranks
from jaxcomp.trace import cost, input_moments
from jaxcomp.trace.cost import reuse_of
from tests.laws import assert_same_bits
from tests.marks import quick

RNG = np.random.default_rng(0)


def normal(*shape, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), dtype)


def decay(ratio: float, n: int) -> jax.Array:
    return jnp.asarray(ratio ** np.arange(n), jnp.float32)


def spectrum(rows: int, cols: int, ratio: float) -> jax.Array:
    """A matrix with the singular values ``ratio**k``."""
    u, s, v = np.linalg.svd(RNG.normal(size=(rows, cols)), full_matrices=False)
    return jnp.asarray((u * ratio ** np.arange(len(s))) @ v, jnp.float32)


def planted(rows: int, cols: int, rank: int) -> jax.Array:
    return normal(rows, rank) @ normal(rank, cols)


def truncated(w, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def error(leaf, w) -> float:
    w = np.asarray(w, np.float64)
    return float(np.linalg.norm(np.asarray(jc.materialize(leaf), np.float64) - w) / np.linalg.norm(w))


def leaf(w, rank, method=SVD(), **options):  # noqa: B008 - frozen
    """A matrix (in, out), or a convolution's kernel (*spatial, in, out)."""
    t = jc.low_rank(rank, method=method, where="conv", **options)
    return t.apply(t.init({"conv": w}), {"conv": w})["conv"]


@pytest.mark.parametrize("method", [SVD(), RankOne()])
@pytest.mark.parametrize("shape", quick([(30, 20), (20, 30)], (30, 20)))
def test_a_matrix_is_its_truncated_svd(method, shape) -> None:
    w = spectrum(*shape, 0.9)
    for rank in (1, 6, 20):
        got = np.asarray(leaf(w, rank, method).materialize(), np.float64)
        want = truncated(w, rank)
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-5


@pytest.mark.parametrize("method", [SVD(), RankOne(refits=0)])
def test_double_precision_is_kept_in_the_basis(method) -> None:
    rng = np.random.default_rng(1)
    w = rng.normal(size=(9, 4)) @ np.diag(0.5 ** np.arange(4)) @ rng.normal(size=(4, 7))
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(w)}
        for tree in ({"w": leaf(params["w"], 3, method)}, jc.factorize(params, 3, method=method)):
            got = jc.materialize(tree)["w"]
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, truncated(w, 3), atol=1e-12)


def test_rows_and_columns_may_be_several_axes() -> None:
    w = normal(3, 3, 4, 10)
    got = leaf(w, 4)
    assert (got.u.shape, got.v.shape) == ((3, 3, 4, 4), (4, 10))
    np.testing.assert_allclose(got.materialize().reshape(36, 10), truncated(w.reshape(36, 10), 4), atol=1e-4)
    got = leaf(w, 2, SVD(cols=3))
    assert (got.u.shape, got.v.shape) == ((3, 2), (2, 3, 4, 10))


@pytest.mark.slow
def test_stacked_layers_are_decomposed_each_by_itself() -> None:
    w = normal(2, 3, 12, 9)
    got = leaf(w, 4, SVD(stacked=2))
    assert got.u.shape == (2, 3, 12, 4)
    np.testing.assert_allclose(got.materialize(), truncated(w, 4), atol=1e-4)
    kernel = normal(2, 3, 3, 6, 5)
    for method, kind in ((Tucker2(stacked=1), Tucker), (CP(stacked=1), Depthwise), (CP(True, stacked=1), Separable)):
        both = leaf(kernel, 4, method)
        assert isinstance(both, kind)
        one = leaf(kernel[1], 4, type(method)(**{**method.__dict__, "stacked": 0}))
        slice_of_both = jc.materialize(both)[1]
        assert abs(error(slice_of_both, kernel[1]) - error(one, kernel[1])) < 0.02


@pytest.mark.parametrize(
    ("method", "rank"), [(Tucker2(), (3, 2)), (CP(sweeps=60), 3), (CP(separable=True, sweeps=100, refits=3), 2)]
)
def test_planted_kernels_are_recovered(method, rank) -> None:
    if isinstance(method, Tucker2):
        w = Tucker(normal(8, 3), normal(3, 3, 3, 2), normal(2, 10)).materialize()
    elif method.separable:
        w = Separable(normal(8, rank), normal(3, rank), normal(3, rank), normal(rank, 10)).materialize()
    else:
        w = Depthwise(normal(8, rank), normal(3, 3, rank), normal(rank, 10)).materialize()
    assert error(leaf(w, rank, method), w) < (1e-4 if isinstance(method, Tucker2) else 2e-2)


def test_leaves_are_the_sums_that_they_say() -> None:
    u, core, v = normal(4, 2), normal(3, 5, 2, 3), normal(3, 6)
    np.testing.assert_allclose(
        Tucker(u, core, v).materialize(), np.einsum("ia,hwab,bo->hwio", u, core, v), rtol=1e-5, atol=1e-5
    )
    u, taps, v = normal(4, 2), normal(3, 5, 2), normal(2, 6)
    np.testing.assert_allclose(
        Depthwise(u, taps, v).materialize(), np.einsum("ir,hwr,ro->hwio", u, taps, v), rtol=1e-5, atol=1e-5
    )
    h, w = normal(3, 2), normal(5, 2)
    np.testing.assert_allclose(
        Separable(u, h, w, v).materialize(), np.einsum("ir,hr,wr,ro->hwio", u, h, w, v), rtol=1e-5, atol=1e-5
    )


METHODS = {"svd": (SVD(), 3), "rank one": (RankOne(), 3), "tucker": (Tucker2(), (3, 2)), "cp": (CP(), 3)}
METHODS["separable"] = (CP(separable=True), 3)


@pytest.mark.parametrize("name", quick(METHODS, "svd", "tucker"))
@pytest.mark.parametrize("dtype", quick([jnp.float32, jnp.bfloat16, jnp.float16], jnp.bfloat16))
def test_types_are_kept_and_the_file_keeps_every_bit(name, dtype, tmp_path) -> None:
    method, rank = METHODS[name]
    tree = {"w": leaf(normal(3, 3, 6, 5, dtype=dtype), rank, method)}
    assert tree["w"].dtype == dtype
    assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
    jc.save(tmp_path / "f", tree)
    loaded = jc.load(tmp_path / "f")
    assert type(loaded["w"]) is type(tree["w"])
    assert_same_bits(jc.materialize(loaded), jc.materialize(tree))
    assert_same_bits(jc.materialize(jc.pack(tree)), jc.materialize(tree))


@pytest.mark.parametrize("name", quick(METHODS, "svd", "rank one", "tucker"))
def test_a_leaf_of_zeros_gives_finite_zeros(name) -> None:
    method, _ = METHODS[name]
    got = leaf(jnp.zeros((3, 3, 4, 5)), 1, method)
    chex.assert_tree_all_finite(got)
    assert not np.asarray(got.materialize()).any()
    chex.assert_tree_all_finite(jc.factorize({"conv": jnp.zeros((3, 3, 4, 5))}, 1, method=method))


def test_factors_are_pruned_and_quantized_and_saved_small(tmp_path) -> None:
    params = {"kernel": normal(64, 48), "bias": normal(48)}
    t = jc.chain(jc.low_rank(8), jc.prune(0.5), jc.quantize(jc.Int(8)))
    seen = t.apply(t.init(params), params)
    u, v = seen["kernel"].u, seen["kernel"].v
    assert isinstance(u, jc.core.Masked)
    assert isinstance(v.values, jc.quantization.Quantized)
    assert (int(u.mask.sum()), int(v.mask.sum())) == (64 * 4, 8 * 24)
    size = jc.save(tmp_path / "f", seen)
    assert size < 64 * 48  # less than a byte for each weight of the dense leaf
    assert_same_bits(jc.materialize(jc.load(tmp_path / "f", like=params)), jc.materialize(seen))


def test_gradients_reach_the_dense_leaf_through_the_basis_and_both_factors_of_a_factorized_one() -> None:
    params, x = {"kernel": normal(12, 10)}, normal(5, 12)
    t = jc.low_rank(3)
    state = t.init(params)
    loss = lambda p: jnp.sum((x @ jc.materialize(p)["kernel"]) ** 2)  # noqa: E731
    got = jax.grad(lambda p: loss(t.apply(state, p)))(params)["kernel"]
    v = np.asarray(state["kernel"]["v"])
    want = 2 * np.asarray(x).T @ np.asarray(x @ t.apply(state, params)["kernel"].materialize()) @ v.T @ v
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    grads = jax.grad(loss)(jc.factorize(params, 3))["kernel"]
    assert np.abs(grads.u).max() > 0
    assert np.abs(grads.v).max() > 0


def test_the_basis_moves_at_due_steps_alone() -> None:
    first, second = {"kernel": normal(8, 6)}, {"kernel": normal(8, 6)}
    t = jc.core.when(jc.low_rank(2), jc.every(10))
    state = t.init(first)
    for update in (t.update, jax.jit(t.update)):
        assert_same_bits(update(state, second, step=jnp.int32(3)), state)
        moved = update(state, second, step=jnp.int32(10))
        np.testing.assert_allclose(
            jc.materialize(t.apply(moved, second))["kernel"], truncated(second["kernel"], 2), atol=1e-4
        )


@pytest.mark.parametrize("name", quick(METHODS, "svd", "tucker"))
def test_balancing_changes_sizes_and_not_the_product(name) -> None:
    method, rank = METHODS[name]
    w = normal(3, 3, 6, 5)
    plain, even = leaf(w, rank, method), jc.factorize({"conv": w}, rank, method=method)["conv"]
    np.testing.assert_allclose(even.materialize(), plain.materialize(), atol=1e-4)
    if isinstance(even, LowRank):
        np.testing.assert_allclose(
            jnp.linalg.norm(even.u.reshape(-1, rank), axis=0), jnp.linalg.norm(even.v, axis=1), rtol=1e-4
        )
    dead = balanced(LowRank(jnp.zeros((4, 1)), jnp.ones((1, 3))))
    assert np.asarray(dead.v).all()


@jax.numpy_dtype_promotion("standard")  # optax's own code mixes types
def test_factors_are_parameters_of_any_optimizer() -> None:
    target = planted(16, 12, 2)
    x = normal(64, 16)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    tree = jc.factorize({"w": target + normal(16, 12)}, 2)
    tx = optax.adam(0.02)
    opt = tx.init(tree)

    @jax.jit
    def step(tree, opt):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((factored(fn)(p, x) - x @ target) ** 2))(tree)
        updates, opt = tx.update(grads, opt, tree)
        return optax.apply_updates(tree, updates), opt, loss

    losses = []
    for _ in range(200):
        tree, opt, loss = step(tree, opt)
        losses.append(float(loss))
    assert losses[-1] < 0.01 * losses[0]
    assert isinstance(tree["w"], LowRank)


def test_layer_by_layer_leaves_earlier_factors_alone() -> None:
    params = {f"layer{i}": {"kernel": normal(16, 16)} for i in range(3)}
    ranks = choose_ranks(params, Budget(params=0.5))
    for path in ranks:
        before = params
        params = jc.factorize(params, ranks, where=re.escape(path))
        for other, old in leaves_with_paths(before, is_leaf=is_compressed)[0]:
            if other != path:
                assert dict(leaves_with_paths(params, is_leaf=is_compressed)[0])[other] is old
    assert all(isinstance(p["kernel"], LowRank) == (f"layer{i}/kernel" in ranks) for i, p in enumerate(params.values()))


# Ranks chosen together


@pytest.mark.parametrize("method", [SVD(), RankOne()])
def test_energy_finds_planted_ranks(method) -> None:
    params = {"a": planted(20, 30, 3), "d": planted(24, 24, 5)}
    assert choose_ranks(params, Energy(0.99999), method=method) == {"a": 3, "d": 5}


def test_energy_is_the_smallest_rank_that_keeps_it() -> None:
    w = normal(40, 40) * decay(0.8, 40)[None, :]
    s = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False) ** 2
    for fraction in (0.5, 0.9, 0.95):
        want = int(np.argmax(np.cumsum(s) / s.sum() >= fraction)) + 1
        assert choose_ranks({"w": w}, Energy(fraction)) == {"w": want}


def test_a_budget_goes_where_the_error_falls_most() -> None:
    """Against the best of all choices, by brute force over the ranks of two leaves."""
    params = {"a": normal(10, 12) * decay(0.7, 12)[None], "d": normal(14, 8) * decay(0.85, 8)[None]}
    spectra = {k: np.linalg.svd(np.asarray(w, np.float64), compute_uv=False) ** 2 for k, w in params.items()}
    sizes = {k: w.size for k, w in params.items()}

    def outcomes(name):
        s, (n, m) = spectra[name], params[name].shape
        yield from ((r * (n + m), float(s[r:].sum() / s.sum())) for r in range(1, len(s)) if r * (n + m) < n * m)
        yield n * m, 0.0

    limit = 0.6 * sum(sizes.values())
    best = min(e + f for a, e in outcomes("a") for b, f in outcomes("d") if a + b <= limit)
    chosen = choose_ranks(params, Budget(params=0.6))
    spent = sum(chosen[k] * sum(params[k].shape) if k in chosen else sizes[k] for k in params)
    lost = sum(float(spectra[k][chosen[k] :].sum() / spectra[k].sum()) for k in chosen)
    assert spent <= limit
    assert lost <= 1.1 * best + 1e-6
    tree = jc.factorize(params, Budget(params=0.6))
    assert sum(x.size for x in jax.tree.leaves(tree)) == spent


def test_ranks_are_pruned_across_layers() -> None:
    """One step for all leaves: the redundant leaf gives its ranks to the rich one."""
    params = {"thin": planted(32, 32, 2) + 0.01 * normal(32, 32), "rich": normal(32, 32)}
    ranks = choose_ranks(params, Budget(params=0.5), method=RankOne(steps=100, refits=0))
    assert ranks["thin"] < 4 < ranks["rich"]


def test_an_error_budget_is_met() -> None:
    params = {"a": normal(20, 30), "d": planted(24, 24, 3)}
    tree = jc.factorize(params, Budget(error=0.2))
    lost = [error(tree[k], params[k]) ** 2 for k in params]
    assert np.mean(lost) <= 0.2 + 1e-4
    assert sum(x.size for x in jax.tree.leaves(tree)) < 20 * 30 + 24 * 24


@pytest.mark.slow
def test_tucker_and_cp_budgets_are_met_and_better_with_more() -> None:
    params = {"conv_a": normal(3, 3, 8, 8), "conv_d": normal(3, 3, 6, 10)}
    for method in (Tucker2(), CP(steps=5, refits=0, sweeps=10)):
        errors = []
        for part in (0.3, 0.6):
            tree = jc.factorize(params, Budget(params=part), method=method, max_rank=24)
            assert sum(x.size for x in jax.tree.leaves(tree)) <= part * sum(x.size for x in params.values())
            errors.append(sum(error(tree[k], params[k]) for k in params))
        assert errors[1] < errors[0]


def test_a_macs_budget_counts_how_often_a_leaf_is_multiplied() -> None:
    def fn(p, x):
        y = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y.mean((1, 2)) @ p["dense"]

    params, x = {"conv": normal(3, 3, 8, 8), "dense": normal(8, 72)}, normal(1, 6, 6, 8)
    reuse = reuse_of(fn)(params, x)
    assert reuse == {"conv": 36.0, "dense": 1.0}
    tree = jc.factorize(params, Budget(macs=0.5), reuse=reuse)
    thin, dense = cost(factored(fn))(tree, x).macs, cost(fn)(params, x).macs
    assert 0.3 * dense < thin <= 0.5 * dense
    with pytest.raises(ValueError, match=r"how often 'conv' is multiplied; pass reuse=reuse_of"):
        choose_ranks(params, Budget(macs=0.5))


# Weighted by the data


@pytest.mark.parametrize("method", [SVD(), RankOne()])
def test_weighting_lowers_the_error_of_the_products(method) -> None:
    w = normal(24, 16)
    x = normal(400, 24) * decay(0.8, 24)[None]
    moments = input_moments(lambda p, x: x @ p["w"])({"w": w}, x)
    np.testing.assert_allclose(moments["w"], np.asarray(x).T @ np.asarray(x), rtol=1e-4, atol=1e-3)
    moments = {"conv": moments["w"]}
    for given in (moments, {"conv": jnp.diag(moments["conv"])}):
        plain, weighted = leaf(w, 5, method), leaf(w, 5, method, moments=given)
        errors = [float(jnp.linalg.norm(x @ (k.materialize() - w))) for k in (plain, weighted)]
        assert errors[1] < 0.8 * errors[0]
    best = np.linalg.svd(np.asarray(x @ w, np.float64), compute_uv=False)[5:]
    assert errors[1] >= np.linalg.norm(best) * (1 - 1e-4)
    full = float(jnp.linalg.norm(x @ (leaf(w, 5, method, moments=moments).materialize() - w)))
    assert full < 1.02 * np.linalg.norm(best)  # the damping costs a little


@pytest.mark.parametrize("method", quick([SVD(), Tucker2(), CP(sweeps=40)], SVD()))
def test_weighting_lowers_the_error_of_convolutions(method) -> None:
    def fn(p, x):
        return jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    w, x = normal(3, 3, 8, 10), normal(4, 9, 9, 8) * decay(0.5, 8)[None, None, None]
    moments = input_moments(fn)({"conv": w}, x)
    errors = []
    for given in (None, moments):
        got = leaf(w, 4, method, moments=given).materialize()
        errors.append(float(jnp.linalg.norm(fn({"conv": got - w}, x))))
    assert errors[1] < 0.9 * errors[0]


def test_moments_of_stacked_layers_and_of_heads() -> None:
    def fn(p, x):
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
        return jnp.einsum("bhk,hkd->bd", x.reshape(-1, 2, 4), p["out"])

    params, x = {"layers": normal(3, 8, 8), "out": normal(2, 4, 6)}, normal(5, 8)
    moments = jax.jit(input_moments(fn))(params, x)
    assert {k: m.shape for k, m in moments.items()} == {"layers": (3, 8, 8), "out": (8, 8)}
    np.testing.assert_allclose(moments["layers"][0], np.asarray(x).T @ np.asarray(x), rtol=1e-4, atol=1e-4)
    tree = jc.factorize({"w": params["layers"]}, 2, method=SVD(stacked=1), moments={"w": moments["layers"]})
    assert tree["w"].u.shape == (3, 8, 2)
    with pytest.raises(ValueError, match="matches no site that multiplies rows"):
        input_moments(lambda p, x: x @ p["w"].T)({"w": normal(4, 4)}, normal(2, 4))


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Energy(0.0), r"Energy: the fraction must be a number in \(0, 1\], got 0.0"),
        (lambda: Energy(1.1), r"in \(0, 1\], got 1.1"),
        (lambda: Budget(), "exactly one of params, macs and error"),
        (lambda: Budget(params=0.5, error=0.1), "exactly one"),
        (lambda: SVD(cols=0), "SVD: cols must be an integer of at least 1, got 0"),
        (lambda: CP(steps=0), "CP: steps"),
        (lambda: jc.low_rank({}), "empty"),
    ],
)
def test_specs_say_what_they_want(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ({"a": {"k": jnp.ones((3, 4))}}, {"rank": 5}, r"'a/k' has shape \(3, 4\), of rank 3 at most; got rank 5"),
        ({"w": jnp.ones((3, 4))}, {"rank": 0}, "got rank 0"),
        ({"w": jnp.ones((3, 4))}, {"rank": 1.5}, r"a fraction of the largest in \(0, 1\], got 1.5"),
        ({"bias": jnp.ones(4)}, {"rank": 1, "where": "bias"}, r"'bias' has shape \(4,\), which has no rows"),
        ({"w": jnp.ones((3, 4))}, {"rank": 1, "method": Tucker2()}, r"wants a kernel \(\*spatial, I, O\)"),
        ({"conv": jnp.ones((3, 4, 5))}, {"rank": 1, "method": CP(True)}, r"taps want a kernel \(H, W, I, O\)"),
        ({"w": jnp.ones((0, 4))}, {"rank": 1}, "'w' is empty"),
        ({"w": jnp.array([[1.0, jnp.nan]])}, {"rank": 1}, "'w' has 1 values that are not finite"),
        ({"w": jnp.ones((3, 4))}, {"rank": {"x": 1}}, "ranks by path"),
        ({"w": jnp.ones((3, 4)), "c": jnp.ones((3, 4))}, {"rank": {"w": 1, "x": 1}}, "ranks are given for 'x'"),
        ({"w": jnp.ones((3, 4))}, {"rank": Budget(params=0.1)}, "cannot be met: rank 1 everywhere leaves 0.5833"),
        ({"w": jnp.eye(4)}, {"rank": Energy(1.0)}, "no selected leaf gets smaller"),
        ({"w": jnp.ones((3, 4))}, {"rank": 1, "moments": {"w": jnp.ones(4)}}, r"n in \[3\], got \(4,\)"),
        ({"w": jnp.ones((3, 4))}, {"rank": 1, "moments": {"x": jnp.ones(3)}}, "none of the selected leaves"),
        ({"w": jnp.ones((3, 4))}, {"rank": 1, "moments": {"w": -jnp.ones(3)}}, "moment of 'w' must be finite"),
        ({"w": jnp.ones((3, 4))}, {"rank": 1, "moments": {"w": jnp.full((3, 3), jnp.nan)}}, "moment of 'w' must"),
        ({"w": jnp.ones((3, 4))}, {"rank": 1, "max_rank": 0}, "max_rank must be a positive integer or None, got 0"),
    ],
)  # fmt: skip
def test_bad_input_names_the_path_and_the_mend(params, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        jc.low_rank(**options).init(params)


def test_known_moments_are_checked_inside_jit_too() -> None:
    w = normal(6, 4)
    t = jc.low_rank(2, moments={"w": jnp.arange(1.0, 7)})
    want, got = t.init({"w": w}), jax.jit(t.init)({"w": w})
    np.testing.assert_allclose(got["w"]["v"], want["w"]["v"], atol=1e-5)
    with pytest.raises(ValueError, match="moment of 'w' must be finite"):
        jax.jit(jc.low_rank(2, moments={"w": -jnp.ones(6)}).init)({"w": w})


def test_kinds_that_are_no_rank_or_method() -> None:
    with pytest.raises(TypeError, match="method must be SVD"):
        jc.low_rank(1, method="svd")
    with pytest.raises(TypeError, match="rank must be a number"):
        jc.low_rank("8")
    with pytest.raises(TypeError, match="wants Energy"):
        choose_ranks({"w": jnp.ones((2, 2))}, 3)


def test_wrong_orders_are_found_at_init() -> None:
    params = {"w": normal(6, 6)}
    for first, message in (
        (jc.prune(0.5), "'w' was made by prune earlier in this chain; put low_rank before prune"),
        (jc.quantize(jc.Int(8)), "'w' was made by quantize earlier in this chain; put low_rank before quantize"),
        (jc.low_rank(2), "'w/u' is a factor already"),
    ):
        with pytest.raises(ValueError, match=message):
            jc.chain(first, jc.low_rank(1)).init(params)


def test_ranks_by_value_need_values() -> None:
    shapes = {"w": jax.ShapeDtypeStruct((6, 6), jnp.float32)}
    with pytest.raises(ValueError, match=r"depend on the values of 'w'.* call choose_ranks"):
        jax.eval_shape(jc.low_rank(Energy(0.5)).init, shapes)
    assert jax.eval_shape(jc.low_rank({"w": 2}).init, shapes)["w"]["v"].shape == (2, 6)
