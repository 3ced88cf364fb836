"""The distilled loss against its terms by hand, its projections, and what it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.distill import Match, capture, distilled, hint, soft_targets


def fn(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["up"]) @ p["down"]


def normal(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def params(width: int, seed: int) -> Any:
    return {"up": normal(3, width, seed=seed), "down": normal(width, 2, seed=seed + 2)}


X = normal(5, 3, seed=9)
OURS, THEIRS = params(4, 0), params(7, 1)
TERMS = {
    "soft": Match(partial(soft_targets, temperature=2.0), weight=0.3),
    "hidden": Match(hint, at="down:in", weight=2.0, projected=True),
}


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    taught = distilled(fn, fn, TERMS)
    projections = taught.init(jax.random.key(3), OURS, THEIRS, X)
    found = jax.jit(taught.loss)(OURS, THEIRS, X, projections=projections)
    soft = soft_targets(fn(OURS, X), fn(THEIRS, X), 2.0)
    hidden = [capture(fn, "down:in")(p, X).values["down:in"] for p in (OURS, THEIRS)]
    at = hint(hidden[0], hidden[1], projections["hidden"])
    np.testing.assert_allclose(found.parts["soft"], soft, rtol=1e-5)
    np.testing.assert_allclose(found.parts["hidden"], at, rtol=1e-5)
    np.testing.assert_allclose(found.loss, 0.3 * soft + 2.0 * at, rtol=1e-5)
    np.testing.assert_allclose(found.out, fn(OURS, X), rtol=1e-6)


def test_the_student_and_its_projections_learn_and_the_teacher_does_not() -> None:
    taught = distilled(fn, fn, TERMS)
    trained = {"student": OURS, "projections": taught.init(jax.random.key(3), OURS, THEIRS, X)}

    def loss(trained: Any, known: Any) -> jax.Array:
        return taught.loss(trained["student"], known, X, projections=trained["projections"]).loss

    to_teacher = jax.grad(loss, argnums=1)(trained, THEIRS)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(to_teacher))
    tx = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def step(trained: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(trained, THEIRS), state)
        return optax.apply_updates(trained, updates), state

    first, state = loss(trained, THEIRS), tx.init(trained)
    for _ in range(60):
        trained, state = step(trained, state)
    assert loss(trained, THEIRS) < 0.2 * first


@pytest.mark.slow
def test_a_teacher_in_low_precision() -> None:
    small = jc.pack(jc.quantize(jc.Int(8)).apply((), THEIRS))
    soft = {"soft": Match(soft_targets)}
    got = distilled(fn, fn, soft).loss(OURS, small, X).loss
    np.testing.assert_allclose(got, soft_targets(fn(OURS, X), fn(jc.materialize(small), X)), rtol=1e-6)
    narrow = distilled(fn, fn, soft, dtype=jnp.bfloat16).loss(OURS, THEIRS, X).loss
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (THEIRS, X))
    np.testing.assert_allclose(narrow, soft_targets(fn(OURS, X), fn(*half).astype(jnp.float32)), rtol=1e-6)
    assert narrow.dtype == jnp.float32


def stacked(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]


def test_a_layer_of_a_stack() -> None:
    ours, theirs = ({"layers": normal(n, 3, 3, seed=i)} for i, n in enumerate((2, 4)))
    taught = distilled(stacked, stacked, {"h": Match(hint, at="layers:out", layer=1, of_layer=3)})
    found = [capture(stacked, "layers:out")(p, X).values["layers:out"] for p in (ours, theirs)]
    np.testing.assert_allclose(taught.loss(ours, theirs, X).loss, hint(found[0][1], found[1][3]), rtol=1e-6)
    with pytest.raises(ValueError, match="'layers:out' has 2 in front, and there is no layer 2"):
        distilled(stacked, stacked, {"h": Match(hint, at="layers:out", layer=2)}).loss(ours, theirs, X)


def test_misfits_are_refused() -> None:
    with pytest.raises(ValueError, match="distilled: there is no term"):
        distilled(fn, fn, {})
    with pytest.raises(ValueError, match="projections are wanted for 'hidden', got none"):
        distilled(fn, fn, TERMS).loss(OURS, THEIRS, X)
    both = lambda p, x: (fn(p, x), x)  # noqa: E731
    with pytest.raises(ValueError, match="gives tuple, which is no array; say by logits="):
        distilled(both, both, {"soft": Match(soft_targets)}).loss(OURS, THEIRS, X)
    first = distilled(both, both, {"soft": Match(soft_targets)}, logits=lambda out: out[0])
    np.testing.assert_allclose(first.loss(OURS, THEIRS, X).loss, soft_targets(fn(OURS, X), fn(THEIRS, X)), rtol=1e-6)
