"""What is seen at the sites of a program: one skeleton, three statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.trace import calibrate, input_moments, input_norms
from tests.trace.models import normal


def mlp(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


P, X = {"up": normal(1, 4, 6), "down": normal(2, 6, 3)}, normal(3, 5, 4)


def test_norms_are_the_roots_of_the_moments_diagonal() -> None:
    norms, moments = input_norms(mlp)(P, X), input_moments(mlp)(P, X)
    np.testing.assert_allclose(norms["up"][:, 0], np.linalg.norm(np.asarray(X, np.float64), axis=0), rtol=1e-6)
    for path in P:
        np.testing.assert_allclose(norms[path][:, 0] ** 2, np.diag(moments[path]), rtol=1e-5)


def test_a_leaf_of_several_sites_has_all_their_inputs() -> None:
    def twice(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"]

    w = normal(1, 4, 4)
    got = input_norms(twice)({"w": w}, X)["w"][:, 0]
    rows = np.concatenate([X, np.tanh(np.asarray(X @ w))])
    np.testing.assert_allclose(got, np.linalg.norm(rows, axis=0), rtol=1e-5)


def test_layers_of_a_scan_have_norms_of_their_own_and_those_that_a_loop_indexes_none() -> None:
    def scanned(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    def indexed(p, x):
        return jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i]), x) @ p["head"]

    p = {"w": normal(1, 3, 4, 4), "head": normal(2, 4, 2)}
    norms = input_norms(scanned)({"w": p["w"]}, X)["w"]
    assert norms.shape == (3, 4, 1)
    np.testing.assert_allclose(norms[0, :, 0], np.linalg.norm(X, axis=0), rtol=1e-5)
    assert input_norms(indexed)(p, X).keys() == {"head"}


@pytest.mark.parametrize(
    ("collector", "message"),
    [
        (calibrate, "calibrate: 'none' matches no site with an activation; there are 'up', 'down'"),
        (input_moments, "input_moments: 'none' matches no site that multiplies rows by a leaf; there are 'up', 'down'"),
        (input_norms, "input_norms: 'none' matches no weight with one contracted axis; there are 'up', 'down'"),
    ],
)
def test_nothing_chosen_is_an_error_that_names_what_there_is(collector, message) -> None:
    with pytest.raises(ValueError, match=message):
        collector(mlp, where="none")(P, X)


def test_a_program_is_the_same_at_each_reading() -> None:
    texts = {str(jax.make_jaxpr(calibrate(mlp))(P, X)) for _ in range(3)}
    assert len(texts) == 1
