"""Distillation losses against their equations in numpy, and what they refuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from jaxcomp import distill
from tests.marks import quick


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_targets(temperature) -> None:
    s, t = normal(5, 7), normal(5, 7, seed=1)
    p = softmax(np.asarray(t, np.float64) / temperature, -1)
    want = temperature**2 * np.mean(
        np.sum(p * (np.log(p) - log_softmax(np.asarray(s, np.float64) / temperature, -1)), -1)
    )
    assert float(jax.jit(distill.soft_targets, static_argnums=2)(s, t, temperature)) == pytest.approx(want, rel=1e-5)


def test_soft_targets_at_a_high_temperature_match_logits() -> None:
    """There the gradient is that of ``(s - t)² / 2 classes`` between centered logits."""
    s, t = normal(1, 7), normal(1, 7, seed=1)
    got = jax.jit(jax.grad(lambda s: distill.soft_targets(s, t, 1e3)))(s)
    centered = lambda x: x - jnp.mean(x, -1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(got, (centered(s) - centered(t)) / 7, atol=2e-3)


def test_hint_with_a_projection() -> None:
    s, t, m = normal(4, 3), normal(4, 5, seed=1), normal(3, 5, seed=2)
    want = np.mean((np.asarray(s) @ np.asarray(m) - np.asarray(t)) ** 2)
    assert float(distill.hint(s, t, m)) == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_attention_transfer_sees_space_and_no_scale() -> None:
    s, t = normal(2, 4, 4, 3), normal(2, 4, 4, 6, seed=1)
    maps = [np.mean(np.abs(np.asarray(x, np.float64)) ** 2, -1).reshape(2, -1) for x in (s, t)]
    a, b = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps)
    want = np.mean(np.sum((a - b) ** 2, 1))
    assert float(distill.attention_transfer(s, t)) == pytest.approx(want, rel=1e-5)
    assert float(distill.attention_transfer(3 * s, t)) == pytest.approx(want, rel=1e-5)


def test_similarity() -> None:
    s, t = normal(4, 6), normal(4, 2, 5, seed=1)
    grams = [np.asarray(x, np.float64).reshape(4, -1) @ np.asarray(x, np.float64).reshape(4, -1).T for x in (s, t)]
    a, b = (g / np.linalg.norm(g, axis=1, keepdims=True) for g in grams)
    assert float(jax.jit(distill.similarity)(s, t)) == pytest.approx(np.mean((a - b) ** 2), rel=1e-5)


LOSSES = {
    "soft_targets": distill.soft_targets,
    "hint": distill.hint,
    "attention_transfer": distill.attention_transfer,
    "similarity": distill.similarity,
    "distances": distill.distances,
    "angles": distill.angles,
}


@pytest.mark.parametrize("name", quick(LOSSES, "soft_targets", "hint"))
def test_only_the_student_learns(name) -> None:
    s, t = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    ours, theirs = jax.jit(jax.grad(LOSSES[name], argnums=(0, 1)))(s, t)
    assert np.asarray(ours).any()
    assert not np.asarray(theirs).any()


@pytest.mark.parametrize("name", quick(LOSSES, "soft_targets", "similarity"))
def test_zeros_and_half_precision_stay_finite(name) -> None:
    zeros = jnp.zeros((3, 4, 5), jnp.bfloat16)
    value, grads = jax.jit(jax.value_and_grad(LOSSES[name]))(zeros, zeros)
    assert value.dtype == jnp.float32
    assert np.isfinite(float(value))
    assert np.isfinite(np.asarray(grads, np.float32)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distill.soft_targets(jnp.ones((2, 3)), jnp.ones((2, 4))), "soft_targets: the student's shape is"),
        (
            lambda: distill.soft_targets(jnp.ones((2, 3)), jnp.ones((2, 3)), 0.0),
            "temperature must be positive, got 0.0",
        ),
        (lambda: distill.hint(jnp.ones((2, 3)), jnp.ones((2, 4))), "hint: the student's shape is"),
        (lambda: distill.attention_transfer(jnp.ones((2, 3, 1)), jnp.ones((2, 4, 1))), "all but the last dimension"),
        (lambda: distill.similarity(jnp.ones((2, 3)), jnp.ones((3, 3))), "batches are 2 and 3"),
        (lambda: distill.distances(jnp.ones((2, 3)), jnp.ones((3, 3))), "distances: the batches are 2 and 3"),
        (lambda: distill.distances(jnp.ones((1, 3)), jnp.ones((1, 3))), "wants 2 examples or more, got a batch of 1"),
        (lambda: distill.angles(jnp.ones((2, 3)), jnp.ones((2, 3))), "wants 3 examples or more, got a batch of 2"),
        (lambda: distill.attention_maps(jnp.ones((2, 3)), jnp.ones((2, 4))), "attention_maps: the student's shape"),
    ],
)
def test_misfits_are_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_fault_7_an_empty_batch_is_refused() -> None:
    """The mean over no example would be NaN."""
    none, maps = jnp.zeros((0, 10)), jnp.zeros((0, 4, 4, 3))
    for call in (
        lambda: distill.soft_targets(none, none),
        lambda: distill.hint(none, none),
        lambda: distill.attention_transfer(maps, maps),
        lambda: distill.similarity(none, none),
    ):
        with pytest.raises(ValueError, match=r": there is no example in shape \(0, "):
            call()


def test_fault_7_a_narrow_projection_is_summed_wide() -> None:
    x, w = jnp.full((1, 4096), 0.0625, jnp.bfloat16), jnp.full((4096, 1), 0.0625, jnp.bfloat16).at[0].set(1.0)
    want = np.float64(0.0625) * (1 + 4095 * 0.0625)
    assert float(distill.hint(x, jnp.zeros((1, 1)), w)) == pytest.approx(want**2, rel=1e-6)


def test_attention_maps() -> None:
    s, t = (softmax(np.asarray(normal(2, 3, 4, 5, seed=i), np.float64), -1) for i in (0, 1))
    want = np.mean(np.sum(t * np.log(t / s), -1))
    assert float(jax.jit(distill.attention_maps)(jnp.float32(s), jnp.float32(t))) == pytest.approx(want, rel=1e-5)
    masked = t * (np.arange(5) < 3)
    masked /= masked.sum(-1, keepdims=True)
    want = np.mean(np.sum((masked * np.log(np.where(masked > 0, masked, 1) / s)), -1))
    assert float(jax.jit(distill.attention_maps)(jnp.float32(s), jnp.float32(masked))) == pytest.approx(want, rel=1e-5)


def huber(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) <= 1, x * x / 2, np.abs(x) - 0.5)


def test_distances_of_pairs() -> None:
    scaled = []
    for x in (normal(6, 3), 5 * normal(6, 2, 4, seed=1)):
        flat = np.asarray(x, np.float64).reshape(6, -1)
        pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
        d = np.array([np.linalg.norm(flat[i] - flat[j]) for i, j in pairs])
        scaled.append(d / d.mean())
    want = huber(scaled[0] - scaled[1]).mean()
    got = jax.jit(distill.distances)(normal(6, 3), 5 * normal(6, 2, 4, seed=1))
    assert float(got) == pytest.approx(want, rel=1e-5)


def test_angles_of_triplets() -> None:
    cosines = []
    for x in (normal(5, 3), 5 * normal(5, 2, 4, seed=1)):
        flat = np.asarray(x, np.float64).reshape(5, -1)
        triplets = [(i, j, k) for i in range(5) for j in range(5) for k in range(5) if len({i, j, k}) == 3]
        unit = lambda v: v / np.linalg.norm(v)  # noqa: E731
        cosines.append(np.array([unit(flat[i] - flat[j]) @ unit(flat[k] - flat[j]) for i, j, k in triplets]))
    want = huber(cosines[0] - cosines[1]).mean()
    got = jax.jit(distill.angles)(normal(5, 3), 5 * normal(5, 2, 4, seed=1))
    assert float(got) == pytest.approx(want, rel=1e-4)


@pytest.mark.slow
def test_far_from_the_origin_pairs_are_told_apart() -> None:
    """Distances come from products, which lose what is small beside their size: the mean is taken off first."""
    x = normal(8, 4)
    near, far = distill.distances(x, normal(8, 4, seed=1)), distill.distances(x + 1000, normal(8, 4, seed=1))
    assert float(far) == pytest.approx(float(near), rel=1e-3)
