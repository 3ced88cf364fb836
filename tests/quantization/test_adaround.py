"""AdaRound: soft leaves, hardening, the regularizer, and reconstruction of a layer."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.quantization.adaround import SoftRounded, adaround, annealed_beta, harden, rounding_regularizer
from jaxcomp.quantization.scales import MSE, AbsMax
from tests.laws import assert_same_bits
from tests.marks import quick

rng = np.random.default_rng(0)
W = jnp.asarray(rng.normal(size=(12, 5)).astype(np.float32))


BEGUN = {
    "int2": (jc.Int(2), jc.Channels()),
    "int3": (jc.Int(3, symmetric=False), jc.Channels()),
    "groups": (jc.Int(4), jc.Groups(4)),
}


@pytest.mark.parametrize("name", quick(BEGUN, "int3"))
def test_it_begins_at_the_weights_and_hardens_to_the_nearest(name) -> None:
    grid, per = BEGUN[name]
    params = adaround({"kernel": W, "bias": jnp.zeros(5)}, grid, per=per, scale=AbsMax())
    leaf = params["kernel"]
    low, high = grid.code_range
    plain = jc.quantize(grid, per=per).apply((), {"kernel": W})["kernel"]
    inside = (leaf.floor >= low) & (leaf.floor < high)
    off = np.abs(np.asarray(leaf.materialize() - W))
    assert (off[np.asarray(inside)] < 1e-5).all()
    assert (off <= np.asarray(jnp.max(leaf.scale)) * 0.51).all()
    tie = leaf.rounding == 0  # nearest goes to the even code, AdaRound up
    assert tie.mean() < 0.2
    np.testing.assert_array_equal(harden(params)["kernel"].codes[~tie], plain.codes[~tie])
    assert_same_bits(jc.materialize(jc.pack(harden(params))), jc.materialize(harden(params)))


@pytest.mark.parametrize("value", [0.0, 2.0**-140, -0.3, 1e38])
@pytest.mark.parametrize(
    ("grid", "per"),
    [(jc.Int(4), jc.Channels()), (jc.Int(4, symmetric=False), jc.Channels()), (jc.Int(2), jc.Groups(4))],
    ids=["symmetric", "asymmetric", "groups"],
)
def test_a_constant_leaf_is_finite_and_within_half_a_step(grid, per, value) -> None:
    w = jnp.full((4, 3), value)
    params = adaround({"kernel": w}, grid, per=per)
    grads = jax.grad(lambda p: jnp.sum(jc.materialize(p)["kernel"]))(params)
    chex.assert_tree_all_finite((params, grads))
    half = 0.50001 * params["kernel"].scale.max()
    for dense in (jc.materialize(params)["kernel"], jc.materialize(harden(params))["kernel"]):
        assert (jnp.abs(dense - w) <= half).all()


def test_only_the_rounding_learns() -> None:
    params = adaround({"kernel": W}, jc.Int(4))
    grads = jax.grad(lambda p: jnp.sum(jc.materialize(p)["kernel"]))(params)["kernel"]
    assert grads.rounding.any()
    assert not grads.floor.any()
    assert not grads.scale.any()
    # dh/dV = 1.2 σ (1 - σ) where h is neither 0 nor 1
    sigma = jax.nn.sigmoid(params["kernel"].rounding)
    free = (params["kernel"].up > 0) & (params["kernel"].up < 1) & (jnp.abs(params["kernel"].floor + 0.5) < 7)
    wanted = 1.2 * sigma * (1 - sigma) * params["kernel"].scale
    np.testing.assert_allclose(grads.rounding[free], wanted[free], rtol=1e-4)
    assert not any(jax.tree.leaves(jc.core.weight_mask(params)))


def test_regularizer_and_its_annealing() -> None:
    v = jnp.asarray(rng.normal(size=(6, 4)).astype(np.float32) * 3)
    leaf = SoftRounded(jnp.zeros((6, 4)), v, jnp.ones((1, 1)), None, jc.Int(4), jnp.dtype(jnp.float32))
    h = np.clip(1 / (1 + np.exp(-np.asarray(v))) * 1.2 - 0.1, 0, 1)
    for beta in (2.0, 7.5, 20.0):
        found = rounding_regularizer({"a": leaf, "b": [leaf, jnp.ones(3)]}, beta)
        np.testing.assert_allclose(found, 2 * (1 - np.abs(2 * h - 1) ** beta).sum(), rtol=1e-4)
    grads = jax.grad(lambda x: rounding_regularizer(x, 2.0))(leaf)
    assert bool(jnp.isfinite(grads.rounding).all())
    beta = annealed_beta(1000)
    assert [float(beta(i)) for i in (0, 200)] == [20.0, 20.0]
    for i in (300, 600, 999, 1000, 2000):
        wanted = 2 + 18 * 0.5 * (1 + np.cos(np.pi * min((i - 200) / 800, 1)))
        assert float(beta(i)) == pytest.approx(wanted, rel=1e-5)
        assert float(jax.jit(beta)(jnp.int32(i))) == pytest.approx(wanted, rel=1e-5)


def test_pruned_weights_stay_zero() -> None:
    mask = jnp.abs(W) > 0.6
    params = adaround({"kernel": jc.core.Masked(jnp.where(mask, W, 0), mask)}, jc.Int(4))
    assert (jc.materialize(params)["kernel"] == 0)[~mask].all()
    hard = harden(params)
    assert isinstance(hard["kernel"].values, jc.quantization.Quantized)
    assert not hard["kernel"].values.codes[~mask].any()


@jax.numpy_dtype_promotion("standard")  # optax's own code mixes types
@pytest.mark.parametrize("bits", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_reconstruction_beats_nearest(bits) -> None:
    """A layer with correlated inputs: what it gives is nearer with learned rounding, at one and the same scale."""
    x = rng.normal(size=(256, 8)) @ rng.normal(size=(8, 32)) + 0.3 * rng.normal(size=(256, 32))
    x, params = jnp.asarray(x, jnp.float32), {"kernel": jnp.asarray(rng.normal(size=(32, 16)) / 6, jnp.float32)}
    steps, tx = 500, optax.adam(1e-2)
    soft, beta = adaround(params, jc.Int(bits)), annealed_beta(steps)

    def error(tree):
        return jnp.mean((x @ (jc.materialize(tree)["kernel"] - params["kernel"])) ** 2)

    def step(carry, i):
        p, s = carry
        grads = jax.grad(lambda p: error(p) + 1e-3 * rounding_regularizer(p, beta(i)))(p)
        updates, s = tx.update(grads, s, p)
        return (optax.apply_updates(p, updates), s), None

    (soft, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))((soft, tx.init(soft)))
    nearest = error(jc.quantize(jc.Int(bits), scale=MSE()).apply((), params))
    assert error(harden(soft)) < 0.5 * nearest


def test_errors() -> None:
    params = adaround({"kernel": W}, jc.Int(4))
    with pytest.raises(ValueError, match=r"still rounded softly; pack harden\(params\) instead"):
        jc.pack(params)
    for grid in (jc.Int(1), jc.quantization.APoT(4)):
        with pytest.raises(TypeError, match=r"adaround: rounds up or down on an integer grid, Int\(2..8\)"):
            adaround({"kernel": W}, grid)
    with pytest.raises(ValueError, match="harden: the tree has no softly rounded leaf"):
        harden({"kernel": W})
    with pytest.raises(ValueError, match="rounding_regularizer: the tree has no softly rounded leaf"):
        rounding_regularizer({"kernel": W}, 2.0)
    with pytest.raises(TypeError, match=r"adaround: per must be one of .*Tiles\(shape\), got Buckets\(size=8\)"):
        adaround({"kernel": W}, jc.Int(4), per=jc.core.Buckets(8))
    with pytest.raises(ValueError, match="annealed_beta: wants 2 steps or more"):
        annealed_beta(1)
    with pytest.raises(ValueError, match="adaround: 'kernel' was made by adaround earlier in this chain"):
        adaround(params)
