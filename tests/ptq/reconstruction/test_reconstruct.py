"""Reconstruction: against all roundings of a small layer, in effect on other inputs, and what it refuses."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.activations import LSQ, ranges_of
from jaxcomp.ptq.reconstruction import Layers, Scopes, Single, Training, reconstruct, sampled_loss
from jaxcomp.quantization.adaround import adaround, harden
from jaxcomp.quantization.scales import AbsMax
from jaxcomp.trace.ranges import Range

rng = np.random.default_rng(0)
MIX = rng.normal(size=(6, 6))


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def correlated(rows: int) -> jax.Array:
    return jnp.asarray((rng.normal(size=(rows, 6)) @ MIX).astype(np.float32))


def net(p, x):
    for name in ("one", "two"):
        x = x + jax.nn.relu(x @ p[name]["up"]) @ p[name]["down"]
    return x @ p["head"]


PARAMS = {
    "one": {"up": normal(6, 8), "down": normal(8, 6) / 4},
    "two": {"up": normal(6, 8), "down": normal(8, 6) / 4},
    "head": normal(6, 3),
}
BATCHES = [correlated(64) for _ in range(4)]
FEW = Training(steps=150)


def test_a_layer_is_as_good_as_the_best_of_all_roundings() -> None:
    w = normal(6, 1)
    soft = adaround({"kernel": w}, jc.Int(3), scale=AbsMax())
    more = Training(steps=300)
    found = reconstruct(lambda p, x: x @ p["kernel"], {"kernel": w}, soft, batches=BATCHES, training=more)
    leaf, x = soft["kernel"], np.concatenate(BATCHES).astype(np.float64)
    floor, scale = np.asarray(leaf.floor, np.float64), float(leaf.scale.squeeze())
    codes = (np.clip(floor[:, 0] + np.array(up), -4, 3) * scale for up in itertools.product((0, 1), repeat=6))
    target = x @ np.asarray(w, np.float64)[:, 0]
    best = min(np.square(x @ c - target).sum() for c in codes) / np.square(target).sum()
    np.testing.assert_allclose(
        np.square(x @ np.asarray(found.params["kernel"].materialize(), np.float64)[:, 0] - target).sum(),
        found.blocks[0].after * np.square(target).sum(),
        rtol=1e-4,
    )
    assert best * 0.999 <= found.blocks[0].after <= best * 1.1
    assert found.blocks[0].after <= found.blocks[0].before


def ends(x: np.ndarray | jax.Array) -> Range:
    return Range(-jnp.abs(x).max(), jnp.abs(x).max())


def test_blocks_learn_what_holds_on_other_inputs() -> None:
    """A block of two layers, with dropping: what is reported is what the quantized function then does."""

    def fn(p, x):
        return jax.nn.relu(x @ p["up"]) @ p["down"]

    p, x = {"up": normal(6, 8), "down": normal(8, 6)}, np.concatenate(BATCHES)
    rules = {"up": jc.Act(8, symmetric=True), "down": jc.Act(4, symmetric=True, range=LSQ())}
    ranges = {"up": ends(x), "down": ends(np.maximum(x @ np.asarray(p["up"]), 0))}
    soft = adaround(p, jc.Int(3), scale=AbsMax())
    given = {"batches": BATCHES, "rules": rules, "ranges": ranges, "key": jax.random.key(0), "cuts": Scopes("")}
    found = reconstruct(fn, p, soft, training=Training(steps=100, drop=0.5), **given)
    assert len(found.blocks) == 1
    assert found.blocks[0].after < 0.8 * found.blocks[0].before
    assert found.ranges["up"] == ranges["up"]
    assert found.ranges["down"] != ranges["down"]
    up = found.params["up"].codes - soft["up"].floor
    assert set(np.unique(up)) <= {-1.0, 0.0, 1.0}
    error = relative(fn, p, rules)
    other = correlated(256)
    assert error(found.params, found.ranges, other) < error(harden(soft), ranges, other)
    np.testing.assert_allclose(error(found.params, found.ranges, x), found.blocks[0].after, rtol=0.02)


def relative(fn, params, rules):
    """The squared error of the quantized function over the square of what it should give."""

    @jax.jit
    def error(tree, ranges, x):
        wanted, found = fn(params, x), jc.quantize_function(fn, rules)(tree, ranges, x)
        return jnp.sum(jnp.square(found - wanted)) / jnp.sum(jnp.square(wanted))

    return error


@pytest.mark.slow
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_a_network_learns_block_by_block(drop) -> None:
    rules = {"head": jc.Act(8, symmetric=True), ".*": jc.Act(4, symmetric=True, range=LSQ())}
    ranges = ranges_of(jc.calibrate(net)(PARAMS, jnp.concatenate(BATCHES)))
    soft = adaround(PARAMS, jc.Int(3))
    given = {"batches": BATCHES, "rules": rules, "ranges": ranges, "key": jax.random.key(0)}
    found = reconstruct(net, PARAMS, soft, training=Training(steps=150, drop=drop), **given)
    assert len(found.blocks) == 4  # what enters is an argument, and so no value that crosses a cut
    assert all(b.after <= b.before for b in found.blocks)
    error, other = relative(net, PARAMS, rules), correlated(256)
    assert error(found.params, found.ranges, other) < error(harden(soft), ranges, other)
    here = error(found.params, found.ranges, jnp.concatenate(BATCHES))
    np.testing.assert_allclose(here, found.blocks[-1].after, rtol=0.02)


@pytest.mark.slow
def test_layers_are_blocks_too_and_other_leaves_stay() -> None:
    soft = adaround(PARAMS, jc.Int(3), where="one/.*")
    found = reconstruct(net, PARAMS, soft, batches=BATCHES, cuts=Layers(), training=FEW)
    again = reconstruct(net, PARAMS, soft, batches=BATCHES, cuts=Layers(), training=FEW)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found.params, again.params))
    assert found.params["head"] is PARAMS["head"]
    assert found.blocks[0].after < found.blocks[0].before
    assert "one/up" in repr(found)
    assert isinstance(found.params["one"]["up"], jc.quantization.Quantized)


@pytest.mark.slow
def test_importance_says_which_errors_count() -> None:
    p, x = {"w": normal(6, 2)}, BATCHES
    f = lambda p, x: x @ p["w"]  # noqa: E731
    soft = adaround(p, jc.Int(2))
    first = lambda out, key: out[:, 0].sum() + 1e-3 * out[:, 1].sum()  # noqa: E731
    found = reconstruct(f, p, soft, batches=x, training=FEW, importance=first, key=jax.random.key(0))
    all_x = jnp.concatenate(x)
    error = jnp.square(f(jc.materialize(found.params), all_x) - f(p, all_x)).sum(0)
    weighed = float(error[0] / jnp.square(f(p, all_x)).sum(0)[0])
    np.testing.assert_allclose(found.blocks[0].after, weighed, rtol=1e-3)


@pytest.mark.slow
def test_the_sampled_loss_has_fishers_gradient() -> None:
    logits = jnp.asarray([[1.0, 0.0, -1.0]])
    keys = jax.random.split(jax.random.key(0), 4000)
    grads = jax.jit(jax.vmap(jax.grad(sampled_loss), (None, 0)))(logits, keys)
    p = np.asarray(jax.nn.softmax(logits))[0].astype(np.float64)
    np.testing.assert_allclose(np.square(grads).mean((0, 1)), p * (1 - p), atol=0.02)


@pytest.mark.slow
def test_values_that_are_not_finite_are_told_with_their_block() -> None:
    soft = adaround(PARAMS, jc.Int(3))
    with pytest.raises(ValueError, match="the block 'one/up' gives values that are not finite"):
        reconstruct(net, PARAMS, soft, batches=[BATCHES[0] * jnp.inf], cuts=Single())


def test_what_is_refused() -> None:
    soft = adaround(PARAMS, jc.Int(3), scale=AbsMax())
    with pytest.raises(ValueError, match="there is nothing to learn"):
        reconstruct(net, PARAMS, PARAMS, batches=BATCHES)
    with pytest.raises(TypeError, match="reconstruct: wants batches, got one array"):
        reconstruct(net, PARAMS, soft, batches=BATCHES[0])
    with pytest.raises(ValueError, match="there is no batch"):
        reconstruct(net, PARAMS, soft, batches=[])
    with pytest.raises(ValueError, match="batch 1 has shapes"):
        reconstruct(net, PARAMS, soft, batches=[BATCHES[0], BATCHES[0][:3]])
    with pytest.raises(ValueError, match="params and rounded differ at 'head'"):
        reconstruct(net, PARAMS, {**soft, "head": jnp.ones((6, 4))}, batches=BATCHES)
    with pytest.raises(ValueError, match=r"give key=jax.random.key\(0\)"):
        reconstruct(net, PARAMS, soft, batches=BATCHES, training=Training(drop=0.5))
    with pytest.raises(ValueError, match="drop must be a probability below 1, got 1"):
        Training(drop=1)
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        Training(steps=1)
    with pytest.raises(ValueError, match="rate must be a number of 0 or more, got -1"):
        Training(rate=-1)
