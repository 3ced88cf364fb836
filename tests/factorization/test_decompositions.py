"""Decompositions against numpy's SVD and planted tensors."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcomp.factorization.decompositions import energies, moment_root, normalized, right_rows, tucker2
from jaxcomp.factorization.rank_one import deflate, joined, khatri_rao, power_iteration
from tests.marks import quick

RNG = np.random.default_rng(0)
values = st.floats(-100, 100, width=32) | st.sampled_from([0.0, 2.0**-140, 1e30])
matrices = hnp.arrays(np.float32, st.sampled_from([(1, 1), (5, 3), (3, 6)]), elements=values)


def normal(*shape) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def truncated(w: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def lost(w: np.ndarray, rank: int) -> float:
    s = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    return float((s[rank:] ** 2).sum() / (s**2).sum())


def distance(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_right_rows_give_the_truncated_svd(shape, rank) -> None:
    w = normal(*shape)
    v = right_rows(jnp.asarray(w), rank)
    s = np.append(np.linalg.svd(w, compute_uv=False), 0)
    turned = 1e-6 * s[0] / (s[rank - 1] - s[rank])  # what float32's rounding turns the rows by (Wedin 1972)
    assert distance(w @ np.asarray(v).T @ np.asarray(v), truncated(w, rank)) < turned


@pytest.mark.parametrize("shape", quick([(30, 20), (48, 64)], (30, 20)))
@pytest.mark.parametrize("refits", [0, 2])
def test_rank_one_steps_are_the_truncated_svd(shape, refits) -> None:
    w = normal(*shape)
    for rank in (1, 5, 12):
        factors, errors = deflate(jnp.asarray(w), rank=rank, steps=2000, refits=refits)
        assert distance(np.abs(w).max() * joined(factors), truncated(w, rank)) < 1e-5
        for k in range(rank):
            assert abs(float(errors[k]) - lost(w, k + 1)) < 1e-5


def residual(t: np.ndarray, factors, terms: int) -> float:
    """What part of the squared norm the first terms leave, in float64."""
    top = np.abs(t).max()
    if top < np.finfo(np.float32).tiny:
        return 0.0
    axes = "abcd"[: t.ndim]
    columns = [np.asarray(f, np.float64)[:, :terms] for f in factors]
    got = np.einsum(f"{','.join(a + 'r' for a in axes)}->{axes}", *columns)
    whole = np.asarray(t, np.float64) / top
    return float(((whole - got) ** 2).sum() / (whole**2).sum())


@given(w=matrices)
def test_the_last_error_is_the_residual_and_stays_finite(w) -> None:
    factors, errors = deflate(jnp.asarray(w), rank=2, steps=20, refits=1)
    e = np.asarray(errors)
    assert np.isfinite(e).all()
    assert all(np.isfinite(np.asarray(f)).all() for f in factors)
    assert (np.diff(e, prepend=1 + 1e-6) <= 0).all()
    assert abs(e[-1] - residual(w, factors, 2)) < 1e-5


@pytest.mark.parametrize("shape", [(12, 9), (5, 6, 7)])
def test_each_term_takes_its_error_off_the_residual(shape) -> None:
    t = normal(*shape)
    factors, errors = deflate(jnp.asarray(t), rank=6, steps=200, refits=0)
    left = [residual(t, factors, k) for k in range(7)]
    sizes = np.square(np.asarray(factors[-1], np.float64) * np.abs(t).max()).sum(0) / np.square(t).sum()
    np.testing.assert_allclose(errors, left[1:], rtol=1e-4)
    np.testing.assert_allclose(-np.diff(left), sizes, rtol=1e-3)
    assert (sizes > 0.01).all()


@pytest.mark.parametrize("shape", quick([(12, 9), (5, 6, 7)], (12, 9)))
def test_each_refit_of_more_terms_leaves_less(shape) -> None:
    t = normal(*shape)
    one, three = (deflate(jnp.asarray(t), rank=r, steps=50, refits=2) for r in (1, 3))
    left = [residual(t, one[0], 1), residual(t, three[0], 3)]
    np.testing.assert_allclose(three[1][::2], left, rtol=1e-4)
    assert (np.diff([1.0, *left]) < -0.01).all()


@given(w=matrices)
def test_energies_are_parts_of_the_squared_norm(w) -> None:
    e = np.asarray(energies(jnp.asarray(w)))
    assert np.isfinite(e).all()
    assert abs(e.sum() - float((np.abs(w) > np.finfo(np.float32).tiny).any())) < 1e-5


@pytest.mark.parametrize("shape", quick([(9, 6, 10), (3, 3, 8, 10)], (3, 3, 8, 10)))
def test_planted_terms_are_recovered(shape) -> None:
    planted = [normal(n, 3) for n in shape]
    t = np.asarray(joined(tuple(map(jnp.asarray, planted))))
    factors, errors = deflate(jnp.asarray(t), rank=3, steps=20, refits=3, sweeps=60)
    assert distance(np.abs(t).max() * joined(factors), t) < 1e-3
    assert float(errors[-1]) < 0.02


def test_a_planted_rank_ends_the_residual_of_a_matrix() -> None:
    w = normal(40, 4) @ normal(4, 30)
    _, errors = deflate(jnp.asarray(w), rank=6, steps=1000, refits=1)
    assert float(errors[2]) > 1e-3
    assert float(errors[3]) < 1e-9


@pytest.mark.slow
def test_a_refit_does_better_than_deflation_alone() -> None:
    t = jnp.asarray(normal(6, 7, 8))
    plain = deflate(t, rank=8, steps=20, refits=0)[1][-1]
    assert float(deflate(t, rank=8, steps=20, refits=3)[1][-1]) < 0.95 * float(plain)


def test_the_start_is_orthogonal_to_nothing_in_particular() -> None:
    w = np.zeros((101, 101), np.float32)
    w[:100, :100] = 1  # the longest column is orthogonal to the dominant term
    w[100, 100] = 50
    x, y = power_iteration(jnp.asarray(w), 200)
    assert distance(np.outer(x, y), truncated(w, 1)) < 1e-5


def test_tucker_recovers_planted_features_and_is_no_worse_than_hosvd() -> None:
    u, core, v = normal(8, 3), normal(9, 3, 4), normal(4, 10)
    t = np.einsum("ia,sab,bo->sio", u, core, v)
    a, b = (np.asarray(x) for x in tucker2(jnp.asarray(t), (3, 4), 2))
    again = np.einsum("ia,ja,sjo,bo,bp->sip", a, a, t, b, b)
    assert distance(again, t) < 1e-5
    t = normal(9, 8, 10)
    errors = []
    for sweeps in (0, 5):
        a, b = (np.asarray(x) for x in tucker2(jnp.asarray(t), (3, 4), sweeps))
        np.testing.assert_allclose(a.T @ a, np.eye(3), atol=1e-5)
        errors.append(distance(np.einsum("ia,ja,sjo,bo,bp->sip", a, a, t, b, b), t))
    assert errors[1] <= errors[0] + 1e-6


def test_a_moment_root_is_a_root_and_its_inverse() -> None:
    x = normal(50, 6)
    root, inverse = (np.asarray(r, np.float64) for r in moment_root(jnp.asarray(x.T @ x)))
    np.testing.assert_allclose(root @ inverse, np.eye(6), atol=1e-4)
    scaled = x.T @ x / (np.trace(x.T @ x) / 6) + 1e-3 * np.eye(6)
    np.testing.assert_allclose(root @ root, scaled, atol=1e-4)
    assert all(np.isfinite(np.asarray(r)).all() for r in moment_root(jnp.zeros((3, 3))))


def test_columnwise_products_run_with_the_last_factor_fastest() -> None:
    a, b = normal(2, 3), normal(4, 3)
    want = np.stack([np.kron(a[:, r], b[:, r]) for r in range(3)], 1)
    np.testing.assert_allclose(khatri_rao((jnp.asarray(a), jnp.asarray(b))), want, rtol=1e-6)


def test_normalizing_keeps_zeros_and_tames_the_huge() -> None:
    assert float(normalized(jnp.zeros(3)).max()) == 0
    assert float(normalized(jnp.array([2.0**120, 1.0])).max()) == 1
