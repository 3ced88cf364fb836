"""N:M masks against brute force, by pairs and by ranks; padding; the checker."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcomp as jc
from jaxcomp.pruning.masks.nm import is_n_m, n_m_mask
from jaxcomp.pruning.specs import NM

CASES = [
    ((8, 3), NM(2, 4, 0)),
    ((8, 3), NM(2, 4, -2)),
    ((3, 10), NM(1, 4, -1)),
    ((2, 2), NM(1, 2, -1)),
    ((0, 8), NM(2, 4, -1)),
    pytest.param((3, 34), NM(5, 16, -1), marks=pytest.mark.slow),
    pytest.param((3, 24), NM(3, 12, 1), marks=pytest.mark.slow),
    ((2, 7, 3), NM(3, 5, 1)),
    pytest.param((3, 20), NM(5, 20, 1), marks=pytest.mark.slow),
]


def brute_force(scores: np.ndarray, s: NM, alive: np.ndarray) -> np.ndarray:
    """Group by group: a stable sort, what is not alive first."""
    along = np.moveaxis(np.where(alive, scores, -np.inf), s.axis, -1)
    keep = np.zeros(along.shape, bool)
    for index in np.ndindex(along.shape[:-1]):
        for start in range(0, along.shape[-1], s.m):
            group = along[index][start : start + s.m]
            best = np.argsort(group, kind="stable")[::-1][: s.n]
            keep[(*index, start + best)] = True
    return np.moveaxis(keep, -1, s.axis) & alive


@pytest.mark.parametrize(("shape", "s"), CASES)
@given(data=st.data())
def test_masks_are_those_of_brute_force(shape, s, data) -> None:
    scores = data.draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, 1.0, 2.0, 3.5, 1e-30, 1e30])))
    alive = data.draw(hnp.arrays(bool, shape))
    got = n_m_mask(jnp.asarray(scores), s, jnp.asarray(alive))
    assert (np.asarray(got) == brute_force(scores, s, alive)).all()
    assert is_n_m(got, s)
    everything = n_m_mask(jnp.asarray(scores), s)
    assert (np.asarray(everything) == brute_force(scores, s, np.ones(shape, bool))).all()


def test_exactly_n_are_kept_whatever_ties_and_nans() -> None:
    x = jnp.array([[0.0, 0.0, 0.0, 0.0, jnp.nan, jnp.nan, jnp.nan, 1.0, -0.0, 0.0, -0.0, 0.0]])
    mask = n_m_mask(x, NM(2, 4, axis=1))
    assert mask.reshape(3, 4).sum(1).tolist() == [2, 2, 2]
    assert mask[0, :4].tolist() == [False, False, True, True]


def test_the_checker_tells_them_apart() -> None:
    w = np.ones((8, 2), np.float32)
    w[[0, 1, 4, 6]] = 0
    assert is_n_m(w, NM(2, 4, 0))
    assert not is_n_m(w, NM(1, 4, 0))
    assert not is_n_m(w, NM(1, 2, 1))
    t = jc.prune(structure=jc.NM(2, 4))
    params = {"kernel": jax.random.normal(jax.random.key(0), (10, 3))}
    with pytest.warns(UserWarning, match="groups of 4 do not divide axis 0 of 'kernel'"):
        state = t.init(params)
    assert is_n_m(t.apply(state, params)["kernel"], NM(2, 4, 0))
    with pytest.raises(ValueError, match=r"axis -2 is out of bounds for array of dimension 1"):
        is_n_m(np.ones(4), NM(2, 4, -2))
    with pytest.raises(ValueError, match=r"NM\(n=2, m=4, axis=None\) names no axis.*name one"):
        is_n_m(w, NM(2, 4))


@pytest.mark.parametrize(("n", "m"), [(4, 4), (5, 4), (0, 4), (2, 0), (1.0, 4), (True, 2)])
def test_refuses_n_that_is_not_below_m(n, m) -> None:
    with pytest.raises(ValueError, match=r"NM: keeps n of every m, wants integers 0 < n < m, got n="):
        NM(n, m)
