"""Learned quantizers: the papers' gradients by their formulas, robust scales, chains, files, training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.quantization.leaves import Folded
from jaxcomp.quantization.level_grids import E2M1, Levels
from jaxcomp.quantization.microscaling import E8M0, Blocked
from jaxcomp.quantization.scales import AbsMax, Fixed
from tests.laws import assert_same_bits

rng = np.random.default_rng(0)
W = rng.normal(size=(12, 5)).astype(np.float32)
UP = rng.normal(size=(12, 5)).astype(np.float32)
"""The gradient that comes from above."""
UNEVEN = Levels((-1.0, 0.0, 2.0))


def ends_of(grid: Any) -> tuple[float, float]:
    return (grid.levels[0], grid.levels[-1]) if hasattr(grid, "levels") else grid.code_range


def nearest(v: np.ndarray, grid: Any) -> np.ndarray:
    if not hasattr(grid, "levels"):
        return np.round(v)
    levels = np.asarray(grid.levels)
    return levels[np.abs(v[..., None] - levels).argmin(-1)]


def gradients(leaf: jc.quantization.Learned) -> jc.quantization.Learned:
    return jax.grad(lambda x: jnp.sum(x.materialize() * UP.astype(x.dtype)))(leaf)


def slow(*grids: Any) -> list[Any]:
    return [pytest.param(g, marks=pytest.mark.slow) for g in grids]


@pytest.mark.parametrize(
    "grid",
    [
        jc.Int(3),
        jc.quantization.PoT(3),
        *slow(jc.Int(2), jc.Int(8), jc.Int(2, narrow=True), jc.quantization.APoT(4), E2M1, UNEVEN),
    ],
)
def test_gradients_are_those_of_lsq(grid) -> None:
    low, high = ends_of(grid)
    s = np.full((1, 5), 0.9 * float(np.abs(W).mean()) / high, np.float32)
    v = W / s
    below, above = v <= low, v >= high
    assert below.any()
    assert above.any()
    assert (~below & ~above).any()
    per_step = np.where(below, low, np.where(above, high, nearest(v, grid) - v))
    wanted = (UP * per_step).sum(0, keepdims=True) / np.sqrt(12 * high)

    leaf = jc.quantization.Learned(jnp.asarray(W), jnp.asarray(s), None, grid)
    found = gradients(leaf)
    np.testing.assert_allclose(found.latent, np.where(below | above, 0, UP), rtol=1e-6)
    np.testing.assert_allclose(found.scale, wanted, rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(leaf.materialize(), nearest(np.clip(v, low, high), grid) * s, rtol=1e-6)


def test_offset_has_the_gradient_of_lsq_plus() -> None:
    grid, s, beta = jc.Int(3, symmetric=False), np.float32(0.25), np.float32(-0.75)  # a zero point of 3 exactly
    v = (W - beta) / s
    below, above = v <= 0, v >= 7
    assert below.any()
    assert above.any()
    factor = 1 / np.sqrt(60 * 7)
    leaf = jc.quantization.Learned(jnp.asarray(W), jnp.full((1, 1), s), jnp.full((1, 1), beta), grid)
    found = gradients(leaf)
    outside = below | above
    np.testing.assert_allclose(found.latent, np.where(outside, 0, UP), rtol=1e-6)
    per_step = np.where(below, 0, np.where(above, 7, np.round(v) - v))
    np.testing.assert_allclose(found.scale, (UP * per_step).sum().reshape(1, 1) * factor, rtol=1e-4)
    np.testing.assert_allclose(found.offset, (UP * outside).sum().reshape(1, 1) * factor, rtol=1e-4)
    np.testing.assert_allclose(leaf.materialize(), np.round(np.clip(v, 0, 7)) * s + beta, atol=1e-6)


def test_the_scale_of_a_sign_has_the_derivative_itself() -> None:
    leaf = jc.quantization.learned(jnp.asarray(W), jc.Int(1), per=jc.Tensor())
    np.testing.assert_allclose(leaf.scale, np.abs(W).mean(keepdims=True), rtol=1e-6)
    found = gradients(leaf)
    np.testing.assert_allclose(found.scale[0, 0], (UP * np.where(W < 0, -1, 1)).sum() / np.sqrt(60), rtol=1e-5)
    np.testing.assert_allclose(found.latent, UP)


def test_the_first_step_is_lsqs_or_a_rules() -> None:
    leaf = jc.quantization.learned({"kernel": jnp.asarray(W)}, jc.Int(3))["kernel"]
    np.testing.assert_allclose(leaf.scale, 2 * np.abs(W).mean(0, keepdims=True) / np.sqrt(3), rtol=1e-6)
    leaf = jc.quantization.learned({"kernel": jnp.asarray(W)}, jc.Int(3), scale=AbsMax())["kernel"]
    like = jc.quantize(jc.Int(3)).apply((), {"kernel": jnp.asarray(W)})["kernel"]
    assert_same_bits(leaf.materialize(), like.materialize())
    threshold = jc.quantization.learned(
        {"kernel": jnp.asarray(W)}, jc.quantization.APoT(4), scale=Fixed(1.5), per=jc.Tensor()
    )["kernel"]
    np.testing.assert_allclose(threshold.scale, 1.5)
    kept = jc.quantization.learned(
        {"kernel": jc.core.Masked(jnp.asarray(np.maximum(W, 0)), jnp.asarray(W > 0))}, jc.Int(3)
    )["kernel"]
    mean = np.where(W > 0, W, 0).sum(0) / (W > 0).sum(0)
    np.testing.assert_allclose(kept.scale[0], 2 * mean / np.sqrt(3), rtol=1e-6)


@pytest.mark.parametrize("grid", [jc.Int(4, symmetric=False), *slow(jc.Int(4), jc.quantization.APoT(4), jc.Int(1))])
def test_scales_may_cross_zero(grid) -> None:
    """A scale counts by its magnitude: value and codes agree, nothing is NaN, no gradient dies."""
    leaf = jc.quantization.learned({"k": jnp.asarray(W)}, grid, offset=not getattr(grid, "symmetric", True))["k"]
    for scale in (-leaf.scale, 0 * leaf.scale, leaf.scale * 1e-38, -leaf.scale * 1e-30):
        moved = jc.quantization.Learned(leaf.latent, scale, leaf.offset, grid)
        dense = moved.materialize()
        assert_same_bits(jc.materialize(moved.pack()), dense)
        assert bool(jnp.all(dense * jnp.asarray(W) >= 0)) or leaf.offset is not None
        found = gradients(moved)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(found))
        assert bool((found.scale != 0).all())
    mirrored = jc.quantization.Learned(leaf.latent, -leaf.scale, leaf.offset, grid)
    assert_same_bits(mirrored.materialize(), leaf.materialize())
    assert_same_bits(gradients(mirrored).scale, -gradients(leaf).scale)
    lost = jc.quantization.Learned(leaf.latent, leaf.scale * jnp.nan, leaf.offset, grid)
    assert bool(jnp.isnan(lost.materialize()).any())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, *slow(jnp.float16)])
def test_types_are_kept(dtype) -> None:
    params = jc.quantization.learned({"kernel": jnp.asarray(W, dtype)}, jc.Int(4))
    dense = jc.materialize(params)["kernel"]
    assert dense.dtype == dtype
    assert params["kernel"].scale.dtype == jnp.float32
    assert_same_bits(jc.materialize(jc.pack(params))["kernel"], dense)
    assert gradients(params["kernel"]).latent.dtype == dtype


def test_leaf_of_zeros_stays_zero_and_learns() -> None:
    params = jc.quantization.learned({"kernel": jnp.zeros((4, 3))}, jc.Int(2))
    assert not jc.materialize(params)["kernel"].any()
    grads = jax.grad(lambda p: jnp.sum(jc.materialize(p)["kernel"]))(params)
    assert (grads["kernel"].latent == 1).all()


def test_jit_equals_eager() -> None:
    params = jc.quantization.learned({"kernel": jnp.asarray(W)}, jc.Int(3, symmetric=False), offset=True)
    assert_same_bits(jax.jit(jc.materialize)(params), jc.materialize(params))
    assert_same_bits(
        jax.jit(lambda p: jc.quantization.learned(p, jc.Int(3)))({"k": W}),
        jc.quantization.learned({"k": jnp.asarray(W)}, jc.Int(3)),
    )


def test_pruned_weights_stay_zero_in_training_and_in_the_file(tmp_path) -> None:
    params = jc.quantization.learned({"kernel": jnp.asarray(W), "bias": jnp.zeros(5)}, jc.Int(4), per=jc.Groups(4))
    prune = jc.prune(0.5)
    state = prune.init(params)
    grads = jax.jit(jax.grad(lambda p: jnp.sum((jc.materialize(prune.apply(state, p))["kernel"] - UP) ** 2)))(params)
    assert not grads["kernel"].latent[~prune.apply(state, params)["kernel"].latent.mask].any()
    params = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
    seen = prune.apply(state, params)
    dense = jc.materialize(seen)["kernel"]
    assert (dense == 0).sum() >= 30
    jc.save(tmp_path / "net.safetensors", seen)
    again = jc.load(tmp_path / "net.safetensors")
    assert_same_bits(jc.materialize(again)["kernel"], dense)
    assert isinstance(jc.pack(seen)["kernel"].values, jc.quantization.Quantized)


@jax.numpy_dtype_promotion("standard")  # optax's own code mixes types
def test_weight_decay_reaches_weights_alone() -> None:
    params = jc.quantization.learned({"conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}}, jc.Int(4))
    params["norm"] = {"scale": jnp.ones((2, 4))}
    params["free"] = jc.core.Masked(jnp.ones((2, 2)), jnp.ones((2, 2), bool))
    mask = jc.core.weight_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    kernel = mask["conv"]["kernel"]
    assert (kernel.latent, kernel.scale, mask["conv"]["bias"], mask["norm"]["scale"]) == (True, False, False, False)
    assert (mask["free"].values, mask["free"].mask) == (True, False)
    del params["free"]
    tx = optax.add_decayed_weights(-0.5, mask=jc.core.weight_mask)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert (updates["conv"]["kernel"].latent < 0).all()
    assert not updates["conv"]["kernel"].scale.any()
    assert not jc.core.weight_mask({"k": jc.quantize(jc.Int(8)).apply((), {"k": jnp.ones((2, 2))})["k"]})["k"].codes


@jax.numpy_dtype_promotion("standard")  # optax's own code mixes types
def test_learned_scales_beat_the_largest_magnitude_at_two_bits() -> None:
    """A student of 2-bit weights learns a teacher's; the error is less when its scales are learned too."""
    x = jnp.asarray(rng.normal(size=(128, 24)).astype(np.float32))
    teacher = jnp.asarray(rng.normal(size=(24, 8)).astype(np.float32))
    start, tx, quantize = {"kernel": teacher}, optax.adam(1e-2), jc.quantize(jc.Int(2))

    def trained(params, seen) -> float:
        loss = lambda p: jnp.mean((x @ (jc.materialize(seen(p))["kernel"] - teacher)) ** 2)  # noqa: E731

        def step(carry, _):
            p, s = carry
            updates, s = tx.update(jax.grad(loss)(p), s, p)
            return (optax.apply_updates(p, updates), s), None

        (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=200))((params, tx.init(params)))
        return float(loss(params))

    absmax = trained(start, lambda p: quantize.apply((), p))
    learned = trained(jc.quantization.learned(start, jc.Int(2)), lambda p: p)
    assert learned < 0.5 * absmax


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        (
            {"grid": jc.Log(4)},
            TypeError,
            r"wants a uniform grid such as Int\(4\) or a table such as APoT\(4\), got Log",
        ),
        ({"grid": Blocked(E2M1, E8M0())}, TypeError, "wants a uniform grid"),
        ({"grid": 4}, TypeError, r"a trained scale wants a uniform grid such as Int\(4\) .*, got 4"),
        ({"grid": jc.Int(4, symmetric=False)}, ValueError, "has a zero point; train it by offset=True"),
        ({"offset": True}, ValueError, "offset=True wants an asymmetric grid"),
        ({"scale": 3.0}, TypeError, "learned: scale must be a rule"),
        ({"per": jc.Groups(5)}, ValueError, "learned: 'kernel' has 12 elements along axis 0"),
        (
            {"per": jc.core.Buckets(8)},
            TypeError,
            r"learned: per must be one of .*Tiles\(shape\), got Buckets\(size=8\)",
        ),
        ({"roles": {}}, TypeError, r"learned: roles must be what jaxcomp\.roles"),
        ({"where": "nothing"}, ValueError, "learned: rule 'nothing' matches nothing"),
        ({"per": jc.core.Tiles((5, 5))}, ValueError, "learned: 'kernel' has shape"),
    ],
)
def test_wrong_choices_are_named(kwargs, error, text) -> None:
    with pytest.raises(error, match=text):
        jc.quantization.learned({"kernel": jnp.asarray(W)}, **kwargs)


def test_wrong_leaves_are_named() -> None:
    with pytest.raises(ValueError, match="learned: 'kernel' has 60 values that are not finite"):
        jc.quantization.learned({"kernel": jnp.asarray(W) * jnp.nan})
    params = jc.quantization.learned({"kernel": jnp.asarray(W)})
    with pytest.raises(ValueError, match="'kernel/latent' belongs to a learned leaf already; leave it out by a rule"):
        jc.quantization.learned(params)
    for second in (jc.quantize(jc.Int(8)), jc.quantize(jc.Int(8), per=jc.core.Buckets(16))):
        seen = second.apply((), params)
        assert isinstance(seen["kernel"].latent, jc.quantization.Quantized | Folded)
        for use in (jc.materialize, jc.pack):
            with pytest.raises(
                ValueError, match="learned: quantize put the latent weights of a learned leaf on a grid"
            ):
                use(seen)


@jax.numpy_dtype_promotion("standard")
@jax.numpy_rank_promotion("allow")
def test_the_recipe_of_dorefa_is_its_equation_9() -> None:
    """``2 q(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1`` with ``q(x) = round((2**k - 1) x) / (2**k - 1)``."""
    from tests.test_documents import BLOCKS

    names: dict[str, Any] = {}
    exec(next(code for codes in BLOCKS.values() for code in codes if "def dorefa" in code), names)
    for bits in (1, 2, 4):
        t, n = names["dorefa"](bits), 2**bits - 1
        squashed = np.tanh(W) / (2 * np.abs(np.tanh(W)).max()) + 0.5
        found = jc.materialize(t.apply(t.init({"kernel": jnp.asarray(W)}), {"kernel": jnp.asarray(W)}))["kernel"]
        np.testing.assert_allclose(found, 2 * np.round(n * squashed) / n - 1, atol=1e-6)
