"""The column solver equals the published algorithms, in float64 numpy with the inverse of the moments."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import NM, Int
from jaxcomp.ptq.columns import Rows, Rule, factored, solve
from tests.ptq import published

RNG = np.random.default_rng(0)


def correlated(n, rows=1000):
    """Second moments of inputs that go together, and unlike each other in size; the first row is not the largest."""
    x = RNG.normal(size=(rows, n)) @ (RNG.normal(size=(n, n)) * np.exp(-np.arange(n) / (n / 5))[:, None])
    x *= 1 + RNG.random(n)
    return np.float32(x.T @ x)


H, W = correlated(150), np.float32(RNG.normal(size=(150, 24)))
H144, W144 = H[:144, :144], W[:144]
SCALE = np.broadcast_to(np.abs(W).max(0) / 7.3, W.shape)
RULE = Rule(Int(4), 0, None, None, by_activation=False, damping=0.01)


def solved(rows, h, rule):
    return solve(rows, factored(jnp.array(h), rule), rule)


def agree(ours, theirs, most=0.002):
    """Codes are alike but where a rounding error of float32 meets a tie, and what follows from it."""
    assert np.mean(np.asarray(ours) != theirs) <= most


@pytest.mark.parametrize("by_activation", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_codes_are_those_of_the_published_algorithm(by_activation):
    order = np.argsort(-np.diag(H), kind="stable") if by_activation else np.arange(len(H))
    wanted = published.gptq(W[order], H[order][:, order], SCALE[order], ends=(-8, 7))[np.argsort(order)]
    rule = Rule(Int(4), 0, None, None, by_activation=by_activation, damping=0.01)
    done = solved(Rows(jnp.array(W), jnp.array(SCALE)), H, rule)
    agree(done.codes, wanted)
    assert done.mask is None
    np.testing.assert_array_equal(done.values, np.asarray(done.codes) * SCALE)


@pytest.mark.slow
def test_scales_of_groups_are_found_when_they_are_reached():
    codes, scales = published.gptq_of_groups(W144, H144, 16, ends=(-8, 7))
    done = solved(Rows(jnp.array(W144)), H144, Rule(Int(4), 16, None, None, False, 0.01))
    np.testing.assert_allclose(done.scale, scales, rtol=2e-3)
    agree(done.codes, codes, 0.01)


@pytest.mark.slow
def test_groups_stay_together_where_large_inputs_go_first():
    rule = Rule(Int(4), 16, None, None, by_activation=True, damping=0.01)
    of_groups = np.argsort(-np.diag(H144).reshape(-1, 16).mean(1), kind="stable")
    order = np.concatenate([16 * g + np.argsort(-np.diag(H144)[16 * g : 16 * g + 16]) for g in of_groups])
    codes, scales = published.gptq_of_groups(W144[order], H144[order][:, order], 16, ends=(-8, 7))
    done = solved(Rows(jnp.array(W144)), H144, rule)
    np.testing.assert_allclose(np.asarray(done.scale)[of_groups], scales, rtol=2e-3)
    agree(done.codes, codes[np.argsort(order)], 0.01)


@pytest.mark.parametrize(
    "keep", [pytest.param(0.6, marks=pytest.mark.slow, id="fraction"), pytest.param(NM(2, 4), id="2:4")]
)
def test_what_is_left_is_that_of_the_published_pruning(keep):
    how = {"fraction": keep} if isinstance(keep, float) else {"n_m": (keep.n, keep.m)}
    wanted = published.sparsegpt(W144, H144, block=128, **how)
    done = solved(Rows(jnp.array(W144)), H144, Rule(None, 0, None, keep, False, 0.01))
    assert np.mean(np.asarray(done.mask) != (wanted != 0)) <= 0.002
    np.testing.assert_array_equal(np.asarray(done.values)[~np.asarray(done.mask)], 0)
    off = np.linalg.norm(done.values - wanted) / np.linalg.norm(wanted)
    assert off < 0.02, off


def test_the_damping_grows_until_there_is_a_factor():
    x = np.float32(RNG.normal(size=(3, 40)))
    h = jnp.array(x.T @ x) - 1e-3 * jnp.eye(40)  # no rounding error is that large: no moments are
    found = factored(h, replace(RULE, damping=0.0))
    assert 0 < float(found.damping) < 0.1
    assert float(factored(jnp.array(H), RULE).damping) == np.float32(0.01)
    assert np.isfinite(found.root).all()
    damped = np.asarray(h) + float(found.damping) * np.mean(np.diag(h)) * np.eye(40)
    np.testing.assert_allclose((found.root @ found.root.T)[::-1, ::-1], damped, atol=1e-4)


def test_inputs_that_were_always_zero_leave_their_rows_as_they_are_rounded():
    h, w = np.array(H), jnp.array(W)
    h[5] = h[:, 5] = 0
    done = solved(Rows(w, jnp.array(SCALE)), h, RULE)
    np.testing.assert_array_equal(done.codes[5], published.int_codes(W[5] / SCALE[5], -8, 7))
    nothing = solved(Rows(w, jnp.array(SCALE)), np.zeros_like(H), RULE)
    np.testing.assert_array_equal(nothing.codes, published.int_codes(W / SCALE, -8, 7))
