"""Blocks of zeros stay zeros on grids without one, in training and as they are stored, and go on learning."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomp as jc
from jaxcomp.core.layouts import Buckets, Tiles
from jaxcomp.quantization import (
    MSE,
    AbsMax,
    Blocked,
    Fixed,
    LevelGrid,
    Levels,
    MeanAbs,
    Percentile,
    Stochastic,
    learned,
)
from jaxcomp.quantization.level_grids import E4M3
from tests.marks import quick
from tests.quantization.test_grids import Odd


@dataclass(frozen=True)
class Halves(LevelGrid):
    """A table of a user."""

    @property
    def levels(self):
        return (-1.5, -0.5, 0.5, 1.5)


GRIDS = {
    "sign": jc.Int(1),
    "levels": Levels((-1.0, -0.3, 0.3, 1.0)),
    "positive": Levels((0.5, 1.0)),
    "negative": Levels((-1.0, -0.5)),
    "table": Halves(),
    "odd": Odd(),
}
RULES = {"default": None, "mean": MeanAbs(), "mse": MSE(steps=5), "percentile": Percentile(60.0), "fixed": Fixed(2.0)}
RULES["absmax"] = AbsMax()
LAYOUTS = {
    "channels": jc.Channels(),
    "groups": jc.Groups(4),
    "tiles": Tiles((4, 2)),
    "tensor": jc.Tensor(),
    "buckets": Buckets(4),
}
W = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
W[:4] = 0  # a group of each column
W[:, 1] = 0  # a column
W[4:8, 2:] = 0  # a tile
W[5, 0] = 0  # one weight of a block that is none of zeros


def bits(x) -> bytes:
    return np.asarray(x).tobytes()


def zero_blocks(w: np.ndarray, scale) -> np.ndarray:
    """Which weights belong to a block of zeros, by numpy."""
    split = [d for n, b in zip(w.shape, scale.shape, strict=True) for d in (b, n // b)]
    blocks = np.abs(w.reshape(split)).max((1, 3), keepdims=True) == 0
    return np.broadcast_to(blocks, split).reshape(w.shape)


@pytest.mark.parametrize("name", quick(GRIDS, "sign", "levels", "negative"))
@pytest.mark.parametrize("layout", quick(LAYOUTS, "channels", "groups"))
@pytest.mark.parametrize("rule", quick(RULES, "default"))
def test_fault_3_blocks_of_zeros_are_zero(name, layout, rule) -> None:
    t = jc.quantize(GRIDS[name], per=LAYOUTS[layout], scale=RULES[rule])
    leaf = t.apply((), {"kernel": jnp.asarray(W)})["kernel"]
    dense = np.asarray(leaf.materialize())
    if layout == "buckets":
        zeros = zero_blocks(W.reshape(-1, 4), leaf.rows.scale).reshape(W.shape)
    else:
        zeros = zero_blocks(W, leaf.scale)
    assert zeros.any() == (layout != "tensor")
    assert (dense[zeros] == 0).all()
    assert (dense[~zeros] != 0).all()  # a zero beside others is the level next to it, as documented
    assert bits(jc.pack(leaf).materialize()) == bits(dense)
    assert bits(jax.jit(lambda w: jc.pack(t.apply((), {"kernel": w}))["kernel"].materialize())(W)) == bits(dense)
    g = jax.grad(lambda p: jc.materialize(t.apply((), p))["kernel"].sum())({"kernel": jnp.asarray(W)})["kernel"]
    if GRIDS[name].ends[0] < 0 < GRIDS[name].ends[1] or rule != "fixed":  # else 0 is outside the range
        np.testing.assert_allclose(np.asarray(g)[zeros], 1, rtol=3e-7)
    assert np.isfinite(np.asarray(g)).all()


@pytest.mark.parametrize("name", quick(GRIDS, "sign", "positive", "odd"))
@pytest.mark.parametrize("dtype", quick(["float32", "float16", "bfloat16"], "float16"))
def test_fault_3_subnormal_blocks_are_zero(name, dtype) -> None:
    """XLA on CPU reads subnormal numbers as zeros; on other hardware they are as good as that."""
    w = np.full((4, 3), 1e-40, np.float32)
    w[:, 1] = -1e-39
    w[:, 2] = [1, -1, 2, 3]
    leaf = jc.quantize(GRIDS[name]).apply((), {"kernel": jnp.asarray(w).astype(dtype)})["kernel"]
    dense = np.asarray(leaf.materialize(), np.float64)
    assert (dense[:, :2] == 0).all()
    assert (dense[:, 2] != 0).all()
    assert bits(jc.pack(leaf).materialize()) == bits(leaf.materialize())


@pytest.mark.parametrize("name", quick(GRIDS, "sign", "levels"))
def test_fault_3_masked_random_and_saved(name, tmp_path) -> None:
    params = {"kernel": jnp.asarray(W)}
    masked = jc.chain(jc.prune(0.7), jc.quantize(GRIDS[name], per=jc.Groups(4)))
    tree = {
        "masked": masked.apply(masked.init(params), params)["kernel"],
        "random": jc.quantize(GRIDS[name], per=jc.Groups(4), rounding=Stochastic(jax.random.key(0))).apply(
            jax.random.key_data(jax.random.key(0)), params
        )["kernel"],
    }
    want = jc.materialize(tree)
    assert (np.asarray(want["masked"])[:4] == 0).all()
    assert (np.asarray(want["random"])[:4] == 0).all()
    jc.save(tmp_path / "w.safetensors", tree)
    again = jc.materialize(jc.load(tmp_path / "w.safetensors"))
    for key, x in want.items():
        assert bits(again[key]) == bits(x)


@pytest.mark.parametrize("layout", ["channels", "groups"])
def test_fault_3_integers_have_no_output_there_either(layout) -> None:
    def fn(p, x):
        return x @ p["kernel"]

    w = np.random.default_rng(1).normal(size=(32, 4)).astype(np.float32)
    w[:, 1] = w[:8] = 0
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 32)), jnp.float32)
    leaf = jc.quantize(jc.Int(1), per=jc.Groups(8) if layout == "groups" else jc.Channels()).apply(
        (), {"kernel": jnp.asarray(w)}
    )
    rules = {"kernel": jc.Act(8, range=jc.activations.Dynamic())}
    want = None
    for tree in (leaf, jc.pack(leaf)):
        for integer in (False, True):
            y = np.asarray(jc.quantize_function(fn, rules, integer=integer)(tree, {}, x))
            assert (y[:, 1] == 0).all()
            want = y if want is None else want
            np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sign", "levels"])
def test_fault_3_learned_quantizers_start_at_zero_and_learn(name) -> None:
    """Their scale starts at 0, so that a block does not leap to ±1 with the first step of an optimizer."""
    params = learned({"kernel": jnp.zeros((4, 2)), "other": jnp.asarray(W)}, GRIDS[name])
    assert (np.asarray(jc.materialize(params)["kernel"]) == 0).all()
    assert (np.asarray(jc.materialize(params)["other"])[:, 1] == 0).all()
    assert bits(jc.materialize(jc.pack(params))["other"]) == bits(jc.materialize(params)["other"])
    target = jnp.array([[0.5, -0.5]] * 4)

    def loss(p):
        return jnp.mean((jc.materialize(p)["kernel"] - target) ** 2)

    tx = optax.adam(1e-2)
    state, first = tx.init(params), loss(params)
    step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
    with jax.numpy_dtype_promotion("standard"):
        for i in range(200):
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
            assert i or np.abs(np.asarray(jc.materialize(params)["kernel"])).max() < 0.1
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(params))
    assert loss(params) < 0.05 * first


def test_fault_3_a_residual_block_that_starts_at_zero_is_the_identity() -> None:
    w = {"up": jnp.asarray(W.T[:, :8]), "down": jnp.zeros((8, 4))}
    x = jnp.asarray(W[8:])
    for grid in (jc.Int(1), Levels((-1.0, 1.0))):
        t = jc.quantize(grid)

        def block(p, x, t=t):
            p = jc.materialize(t.apply((), p))
            return x + jax.nn.relu(x @ p["up"]) @ p["down"]

        assert (block(w, x) == x).all()
        assert np.asarray(jax.grad(lambda w, block=block: jnp.sum(block(w, x)))(w)["down"]).any()


def test_fault_3_which_grids_have_a_zero() -> None:
    """Of those that are there; and a grid of a user's is asked."""
    from tests.quantization.test_blocks import GRIDS as EVERY

    for grid in (*EVERY.values(), jc.Int(1, symmetric=False), E4M3):
        zero = jc.quantize(grid, per=jc.Tensor()).apply((), {"kernel": jnp.array([[1.0, 0.0]])})["kernel"].materialize()
        assert grid.has_zero == (zero[0, 1] == 0)
    assert not any(grid.has_zero for grid in GRIDS.values())
    assert Levels((-1.0, 0.0, 1.0)).has_zero


@pytest.mark.parametrize("scales", [jc.quantization.E8M0(), E4M3], ids=["e8m0", "e4m3"])
def test_fault_3_scales_without_a_zero_refuse_a_grid_without_one(scales) -> None:
    with pytest.raises(ValueError, match="Blocked: a block of zeros wants a grid with 0 among its numbers"):
        Blocked(Levels((-1.0, 1.0)), scales)
