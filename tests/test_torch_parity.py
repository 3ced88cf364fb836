"""Masks equal to those of ``torch.nn.utils.prune``, where torch is installed (the benchmarks extra)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.pruning.scores import importance
from jaxcomp.pruning.transform import is_pruned, masked_by

torch = pytest.importorskip("torch")
tp = pytest.importorskip("torch.nn.utils.prune")

W = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
CONV = np.random.default_rng(1).normal(size=(5, 4, 3, 3)).astype(np.float32)


def module(w: np.ndarray):
    m = torch.nn.Module()
    m.weight = torch.nn.Parameter(torch.from_numpy(w.copy()))
    return m


def ours(t: jc.Transform, w: np.ndarray, **stats) -> np.ndarray:
    """The mask, at full shape."""
    params = {"weight": jnp.asarray(w)}
    state = t.init(params)
    if stats:
        state = t.update(state, params, step=0, **{k: {"weight": jnp.asarray(v)} for k, v in stats.items()})
    return np.broadcast_to(np.asarray(t.apply(state, params)["weight"].mask), w.shape)


@pytest.mark.parametrize("amount", [0, 1, 7, 48, 0.0, 0.3, 0.5, 0.99])
def test_l1_unstructured(amount) -> None:
    m = tp.l1_unstructured(module(W), "weight", amount=amount)
    assert (ours(jc.prune(amount), W) == m.weight_mask.numpy().astype(bool)).all()


def test_importance_scores() -> None:
    scores = np.random.default_rng(2).normal(size=W.shape).astype(np.float32)
    m = tp.l1_unstructured(module(W), "weight", amount=0.4, importance_scores=torch.from_numpy(scores))
    got = ours(jc.prune(0.4, score=importance), W, importance=np.abs(scores))  # torch takes their sizes
    assert (got == m.weight_mask.numpy().astype(bool)).all()


@pytest.mark.parametrize("n", [1, 2, float("inf")])
@pytest.mark.parametrize(("w", "dims"), [(W, (0, 1)), (CONV, (0, 3))], ids=["matrix", "conv"])
def test_importance_scores_of_structures(w, dims, n) -> None:
    scores = np.random.default_rng(2).normal(size=w.shape).astype(np.float32) ** 3  # whose orders differ
    for dim in dims:
        for amount in (1, 2):
            given = torch.from_numpy(scores)
            m = tp.ln_structured(module(w), "weight", amount=amount, n=n, dim=dim, importance_scores=given)
            t = jc.prune(amount, score=importance, structure=jc.Filters(dim, order=n))
            assert (ours(t, w, importance=np.abs(scores)) == m.weight_mask.numpy().astype(bool)).all()


@pytest.mark.parametrize("n", [1, 2, 3, float("inf"), float("-inf"), "fro"])
@pytest.mark.parametrize(("w", "dims"), [(W, (0, 1, -1)), (CONV, (0, 1, 2, -1))], ids=["matrix", "conv"])
def test_ln_structured(w, dims, n) -> None:
    if n == "fro" and w.ndim > 2:
        return  # torch's takes vectors and matrices only
    for dim in dims:
        for amount in (1, 2, 0.5):
            m = tp.ln_structured(module(w), "weight", amount=amount, n=n, dim=dim)
            got = ours(jc.prune(amount, structure=jc.Filters(dim, order=n)), w)
            assert (got == m.weight_mask.numpy().astype(bool)).all()


def test_ln_structured_by_the_nuclear_norm() -> None:
    w = CONV[:, :, 0]
    for dim in (0, 1, 2):
        m = tp.ln_structured(module(w), "weight", amount=2, n="nuc", dim=dim)
        got = ours(jc.prune(2, structure=jc.Filters(dim, order="nuc")), w)
        assert (got == m.weight_mask.numpy().astype(bool)).all()


def test_random_counts_are_equal() -> None:
    import jax

    score = jc.pruning.random_score(jax.random.key(0))
    for amount in (5, 0.3):
        m = tp.random_unstructured(module(W), "weight", amount=amount)
        assert ours(jc.prune(amount, score=score), W).sum() == m.weight_mask.sum().item()
        m = tp.random_structured(module(W), "weight", amount=amount, dim=1)
        got = ours(jc.prune(amount, score=score, structure=jc.Filters(1)), W)
        assert got.sum() == m.weight_mask.sum().item()
        assert set(got.sum(0).tolist()) <= {0, W.shape[0]}


@pytest.mark.parametrize("amount", [9, 0.6])
def test_global_unstructured(amount) -> None:
    a, b = module(W), module(CONV)
    tp.global_unstructured([(a, "weight"), (b, "weight")], pruning_method=tp.L1Unstructured, amount=amount)
    params = {"one": jnp.asarray(W), "two": jnp.asarray(CONV)}
    t = jc.prune(amount, scope=jc.Global())
    seen = t.apply(t.init(params), params)
    for name, m in (("one", a), ("two", b)):
        assert (np.asarray(seen[name].mask) == m.weight_mask.numpy().astype(bool)).all()


def assert_equal_masks(t: jc.Transform, a, b, **stats) -> None:
    """Of two leaves by a transform, and of two modules by torch."""
    params = {"one": jnp.asarray(W), "two": jnp.asarray(CONV)}
    state = t.init(params)
    if stats:
        state = t.update(state, params, step=0, **stats)
    seen = t.apply(state, params)
    for name, m in (("one", a), ("two", b)):
        got = np.broadcast_to(np.asarray(seen[name].mask), params[name].shape)
        assert (got == m.weight_mask.numpy().astype(bool)).all()


@pytest.mark.parametrize("amount", [60, 0.3])
def test_global_importance_scores(amount) -> None:
    a, b = module(W), module(CONV)
    scores = [np.random.default_rng(i).normal(size=w.shape).astype(np.float32) for i, w in ((4, W), (5, CONV))]
    tp.global_unstructured(
        [(a, "weight"), (b, "weight")],
        pruning_method=tp.L1Unstructured,
        amount=amount,
        importance_scores={(m, "weight"): torch.from_numpy(x) for m, x in ((a, scores[0]), (b, scores[1]))},
    )
    sizes = {name: jnp.abs(jnp.asarray(x)) for name, x in zip(("one", "two"), scores, strict=True)}
    assert_equal_masks(jc.prune(amount, score=importance, scope=jc.Global()), a, b, importance=sizes)


@pytest.mark.parametrize("amount", [20, 0.4])
def test_global_prunes_among_what_earlier_ones_left(amount) -> None:
    a, b = module(W), module(CONV)
    tp.l1_unstructured(a, "weight", amount=0.5)
    tp.ln_structured(b, "weight", amount=2, n=2, dim=0)
    tp.global_unstructured([(a, "weight"), (b, "weight")], pruning_method=tp.L1Unstructured, amount=amount)
    t = jc.chain(
        jc.prune(0.5, where="one"),
        jc.prune(2, structure=jc.Filters(0, order=2), where="two"),
        jc.prune(amount, scope=jc.Global()),
    )
    assert_equal_masks(t, a, b)


@pytest.mark.parametrize("amount", [5, 0.5])
def test_l1_acts_on_what_a_given_mask_left(amount) -> None:
    given = np.random.default_rng(3).random(W.shape) < 0.5
    m = tp.custom_from_mask(module(W), "weight", torch.from_numpy(given))
    tp.l1_unstructured(m, "weight", amount=amount)
    t = jc.chain(masked_by({"weight": given}), jc.prune(amount))
    assert (ours(t, W) == m.weight_mask.numpy().astype(bool)).all()
    assert ours(t, W).sum() == given.sum() - (amount if amount > 1 else round(given.sum() * amount))


def test_stacks_act_on_what_is_left() -> None:
    m = module(W)
    tp.l1_unstructured(m, "weight", amount=0.3)
    tp.ln_structured(m, "weight", amount=2, n=2, dim=1)
    tp.l1_unstructured(m, "weight", amount=5)
    tp.ln_structured(m, "weight", amount=0.5, n=1, dim=0)
    t = jc.chain(
        jc.prune(0.3),
        jc.prune(2, structure=jc.Filters(1, order=2)),
        jc.prune(5),
        jc.prune(0.5, structure=jc.Filters(0)),
    )
    assert (ours(t, W) == m.weight_mask.numpy().astype(bool)).all()


def test_identity_custom_mask_is_pruned_and_remove() -> None:
    assert (ours(jc.prune(0), W) == tp.identity(module(W), "weight").weight_mask.numpy().astype(bool)).all()
    given = np.random.default_rng(3).random(W.shape) < 0.5
    m = tp.custom_from_mask(module(W), "weight", torch.from_numpy(given))
    t, params = masked_by({"weight": given}), {"weight": jnp.asarray(W)}
    seen = t.apply(t.init(params), params)
    assert tp.is_pruned(m)
    assert is_pruned(seen)
    tp.remove(m, "weight")
    removed = jc.materialize(seen)
    assert not tp.is_pruned(m)
    assert not is_pruned(removed)
    assert (np.asarray(removed["weight"]) == m.weight.detach().numpy()).all()
