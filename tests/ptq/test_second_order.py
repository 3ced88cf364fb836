"""Leaves solved by the moments of their inputs: how much they lose, which leaves they are, and what is refused."""

from __future__ import annotations

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp import NM, Channels, Groups, Int, materialize, pack
from jaxcomp.core.wrappers import Masked
from jaxcomp.ptq import gptq, sparsegpt
from jaxcomp.quantization import MSE, NF4, Quantized
from jaxcomp.recipes import mx
from jaxcomp.trace import row_moments
from tests.ptq.test_columns import correlated

RNG = np.random.default_rng(1)


def normal(*shape):
    return jnp.array(RNG.normal(size=shape), jnp.float32)


N, COLUMNS = 64, 24
MIX = RNG.normal(size=(N, N)) * np.exp(-np.arange(N) / 12)[:, None]
SEEN, HELD = (jnp.array(RNG.normal(size=(1024, N)) @ MIX, jnp.float32) for _ in range(2))
PARAMS = {"kernel": normal(N, COLUMNS), "bias": jnp.zeros((1, COLUMNS))}


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


MOMENTS = row_moments(dense)(PARAMS, SEEN)


def error(tree, fn=dense, params=PARAMS, x=HELD):
    """Mean squared error of the outputs on held-out inputs."""
    host = {path: np.asarray(leaf, np.float64) for path, leaf in materialize(tree).items()}
    if fn is dense:
        return float(np.mean((np.asarray(x, np.float64) @ (host["kernel"] - np.asarray(params["kernel"]))) ** 2))
    return float(jnp.mean((fn(materialize(tree), x) - fn(params, x)) ** 2))


@pytest.mark.parametrize(
    "per",
    [Groups(16), *(pytest.param(p, marks=pytest.mark.slow) for p in (Channels(), jc.Tensor(), jc.core.Tiles((16, 8))))],
    ids=repr,
)
def test_held_out_error_at_four_bits_is_below_057_of_nearest(per):
    ours = gptq(PARAMS, MOMENTS, Int(4), per=per)
    nearest = jc.quantize(Int(4), per=per).apply((), PARAMS)
    assert error(ours) <= 0.57 * error(nearest)
    assert ours["bias"] is PARAMS["bias"]
    leaf, like = ours["kernel"], nearest["kernel"]
    assert (type(leaf), leaf.grid, leaf.scale.shape, leaf.dtype) == (Quantized, Int(4), like.scale.shape, like.dtype)
    np.testing.assert_array_equal(materialize(pack(ours))["kernel"], materialize(ours)["kernel"])


GRIDS = {
    "NF4": NF4(),
    "asymmetric": Int(3, symmetric=False),
    "sign": Int(1),
    "log": jc.Log(4),
    "float": jc.Float(2, 1),
    "codebook": jc.quantization.Levels((-1.0, -0.4, -0.1, 0.0, 0.2, 0.5, 1.0)),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in GRIDS])
@pytest.mark.parametrize("reached", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_grid(name, reached):
    grid, rule = GRIDS[name], None if name == "sign" else MSE(steps=20)
    ours = gptq(PARAMS, MOMENTS, grid, per=Groups(16), scale=rule, reached=reached)
    nearest = jc.quantize(grid, per=Groups(16), scale=rule).apply((), PARAMS)
    assert error(ours) < 0.57 * error(nearest)
    np.testing.assert_array_equal(materialize(pack(ours))["kernel"], materialize(ours)["kernel"])


@pytest.mark.slow
def test_scales_on_a_grid_of_their_own():
    like = mx(where="kernel").apply((), PARAMS)
    ours = gptq(PARAMS, MOMENTS, jc.quantization.Blocked(jc.quantization.E2M1, jc.quantization.E8M0()), per=Groups(32))
    assert error(ours) < 0.57 * error(like)
    np.testing.assert_array_equal(materialize(ours["kernel"].scale), materialize(like["kernel"].scale))


def test_pruning_and_rounding_at_once_beat_one_after_the_other():
    def magnitude(tree):
        t = jc.prune(structure=NM(2, 4))
        return t.apply(t.init(tree), tree)

    pruned = sparsegpt(PARAMS, MOMENTS, NM(2, 4))
    assert isinstance(pruned["kernel"], Masked)
    assert error(pruned) < 0.5 * error(magnitude(PARAMS))
    both = sparsegpt(PARAMS, MOMENTS, NM(2, 4), grid=Int(4))
    after = jc.quantize(Int(4)).apply((), pruned)
    again = gptq(pruned, MOMENTS, Int(4))  # an earlier mask stays
    assert error(both) < error(again) < error(after)
    kept = np.asarray(both["kernel"].mask).reshape(-1, 4, COLUMNS).sum(1)
    assert (kept == 2).all()
    assert isinstance(both["kernel"].values, Quantized)
    np.testing.assert_array_equal(again["kernel"].mask, pruned["kernel"].mask)
    np.testing.assert_array_equal(materialize(again)["kernel"][~np.asarray(pruned["kernel"].mask)], 0)


@pytest.mark.slow
def test_windows_of_a_convolution():
    def conv(p, x):
        return lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    params, x = {"conv": normal(3, 3, 4, 6)}, normal(8, 6, 6, 4) @ normal(4, 4)
    ours = gptq(params, row_moments(conv)(params, x), Int(3), per=Channels())
    nearest = jc.quantize(Int(3)).apply((), params)
    assert ours["conv"].scale.shape == (1, 1, 1, 6)
    assert error(ours, conv, params, x) < 0.9 * error(nearest, conv, params, x)


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "features"), [(6, 6), (2, 8)], ids=["depthwise", "groups"])
def test_feature_groups_are_solved_by_their_own_windows(groups, features):
    def conv(p, x):
        return lax.conv_general_dilated(
            x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    params = {"conv": normal(3, 3, 6 // groups, features)}
    x, held = (jnp.cumsum(jnp.cumsum(normal(8, 12, 12, 6), 1), 2) / 4 for _ in range(2))
    moments = row_moments(conv)(params, x)
    for grid, keep in ((Int(3), None), (None, 0.5)):
        if grid is not None:
            ours, theirs = gptq(params, moments, grid), jc.quantize(grid, per=Channels(-1)).apply((), params)
            assert ours["conv"].scale.shape == (1, 1, 1, features)
        else:
            prune = jc.prune(keep)
            ours, theirs = sparsegpt(params, moments, keep), prune.apply(prune.init(params), params)
        assert error(ours, conv, params, held) < 0.7 * error(theirs, conv, params, held)


def test_each_layer_of_a_stack_is_solved_by_its_own_inputs():
    def layers(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    params, x = {"w": normal(3, N, N) / 8}, SEEN[:256]
    moments = row_moments(layers)(params, x)
    together = gptq(params, moments, Int(4))["w"]
    assert together.scale.shape == (3, 1, N)
    h = x
    for i in range(3):
        alone = {"w": params["w"][i]}
        own = gptq(alone, row_moments(lambda p, x: x @ p["w"])(alone, h), Int(4))["w"]
        assert np.mean(np.asarray(own.codes) != np.asarray(together.codes[i])) < 0.01
        h = jnp.tanh(h @ params["w"][i])


@pytest.mark.slow
def test_a_weight_that_lies_the_other_way_round_is_solved_alike():
    def turned(p, x):
        return x @ p["kernel"].T

    params = {"kernel": PARAMS["kernel"].T}
    ours = gptq(params, row_moments(turned)(params, SEEN), Int(4), per=Groups(16))["kernel"]
    np.testing.assert_array_equal(ours.codes.T, gptq(PARAMS, MOMENTS, Int(4), per=Groups(16))["kernel"].codes)


@pytest.mark.slow
def test_inside_jit_and_twice_the_same_bits():
    outside = gptq(PARAMS, MOMENTS, Int(4), per=Groups(16))["kernel"]
    inside = jax.jit(lambda p, m: gptq(p, m, Int(4), per=Groups(16)))(PARAMS, MOMENTS)["kernel"]
    np.testing.assert_array_equal(outside.codes, inside.codes)


def test_calibration_that_is_too_small_is_said_once():
    def experts(p, x):
        return lax.ragged_dot(x, p["up"], jnp.array([5, 0, 4], jnp.int32))

    params, x = {"up": normal(3, 8, 4)}, normal(9, 8)
    moments = row_moments(experts)(params, x)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ours = gptq(params, moments, Int(4))["up"]
    few, none = (str(w.message) for w in seen)
    assert few == (
        "gptq: 'up' has 8 inputs and was calibrated on 4 rows, which leave 4 directions or more to the damping;"
        " calibrate on 8 rows at least, better on ten times as many."
    )
    assert none.startswith("gptq: no row reached index 1 of 'up': rounded to nearest")
    np.testing.assert_array_equal(
        ours.codes[1], jc.quantize(Int(4), per=Channels((0, 2)), where="up").apply((), params)["up"].codes[1]
    )
    assert np.isfinite(materialize(ours)).all()


SPOILED = {"kernel": jax.tree.map(lambda x: x * jnp.nan, MOMENTS["kernel"])}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: gptq(PARAMS, {}, Int(4)), "gptq: no leaf has moments: they are of nothing, and the paths are"),
        (lambda: gptq(PARAMS, MOMENTS, Int(4), where="bias"), "gptq: 'bias' has no moments, which are of 'kernel'"),
        (lambda: gptq(PARAMS, SPOILED), "gptq: 'kernel' has moments with 4096 values that are not finite, of 4096"),
        (lambda: gptq({"kernel": normal(8, 4)}, MOMENTS), "gptq: 'kernel' has shape (8, 4), and its moments, of shape"),
        (lambda: gptq(PARAMS, MOMENTS, damping=-1), "gptq: damping must be a number that is not negative, got -1."),
        (
            lambda: gptq(PARAMS, MOMENTS, per=jc.core.Buckets(5)),
            "gptq: 'kernel' would be cut in buckets across its rows",
        ),
        (lambda: gptq(PARAMS, MOMENTS, per=Groups(7)), "gptq: 'kernel' has 64 elements along axis 0"),
        (lambda: sparsegpt(PARAMS, MOMENTS, NM(2, 5)), "sparsegpt: 'kernel' has 64 elements along axis 0"),
        (lambda: sparsegpt(PARAMS, MOMENTS, NM(2, 4, 1)), "sparsegpt: 'kernel' is pruned along axis 0"),
        (lambda: sparsegpt(PARAMS, MOMENTS, 1.5), "sparsegpt: sparsity must be NM(n, m) or a number in [0, 1), got"),
    ],
    ids=lambda x: "" if callable(x) else x[:40],
)
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


def test_other_kinds_are_named():
    with pytest.raises(TypeError, match=r"the moments of 'kernel' are .*, not Moments; gather them by jaxcomp.trace"):
        gptq(PARAMS, {"kernel": jnp.eye(N)})
    with pytest.raises(TypeError, match=r"gptq: wants a grid such as Int\(4\), got 4"):
        gptq(PARAMS, MOMENTS, 4)


@pytest.mark.slow
def test_larger_than_a_block_and_not_a_multiple_of_it():
    n = 300
    params, h = {"kernel": normal(n, 16)}, correlated(n)
    fn = lambda p, x: x @ p["kernel"]  # noqa: E731
    seen = row_moments(fn)(params, jnp.ones((1, n)))["kernel"]
    moments = {"kernel": jc.trace.Moments(jnp.array(h), seen.first, jnp.float32(1e4), (), (0,))}

    def loss(tree):
        return float(
            np.einsum(
                "ic,ij,jc->", *[d := np.asarray(materialize(tree)["kernel"] - params["kernel"], np.float64), h, d]
            )
        )

    assert loss(gptq(params, moments, Int(4))) < 0.57 * loss(jc.quantize(Int(4)).apply((), params))
