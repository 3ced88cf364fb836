"""Scales, rotations and biases moved between layers: what is moved, that the function stays, and that it helps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.core.leaves import materialize
from jaxcomp.ptq import awq, correct_bias, equalize, input_peaks, rotate, smooth
from jaxcomp.ptq.rewrites.diagonals import diagonals_of
from jaxcomp.ptq.rewrites.labels import Factors
from jaxcomp.trace import input_moments, row_moments, trace
from tests.trace.models import CASES


@pytest.fixture(autouse=True)
def jax_defaults():
    """Networks as users write them, under JAX's own rules of promotion."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def mlp(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"] + p["end"]


def mlp_params(seed: int = 0) -> tuple[Any, jax.Array]:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    spread = np.exp(rng.normal(0, 1.5, 16)).astype(np.float32)
    params = {"up": draw(8, 16) * spread, "bias": draw(16) * spread, "down": draw(16, 4), "end": draw(4)}
    return params, draw(64, 8)


def glu(p: Any, x: jax.Array) -> jax.Array:
    """A pre-norm block with a gate and one head of attention."""

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * scale

    x = x @ p["in"]
    h = norm(x, p["n0"])
    x = x + jax.nn.softmax((h @ p["q"]) @ (h @ p["k"]).T) @ (h @ p["v"]) @ p["o"]
    h = norm(x, p["n1"])
    x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
    return norm(x, p["n2"]) @ p["head"]


def glu_params() -> tuple[Any, jax.Array]:
    rng = np.random.default_rng(1)
    d, hidden = 8, 12
    shapes = {
        **dict.fromkeys("qkvo", (d, d)),
        "in": (5, d),
        "gate": (d, hidden),
        "up": (d, hidden),
        "down": (hidden, d),
    }
    params = {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in {**shapes, "head": (d, 3)}.items()}
    params |= {name: rng.uniform(0.5, 2, d).astype(np.float32) for name in ("n0", "n1", "n2")}
    return params, rng.normal(size=(6, 5)).astype(np.float32)


def sides(fn: Any, params: Any, *args: Any) -> set[frozenset[tuple[str, int, bool]]]:
    return {frozenset((s.path, s.axes[-1], s.inverse) for s in d.sides) for d in diagonals_of(trace(fn, params, *args))}


def test_factors_that_are_their_own_inverse_are_one() -> None:
    factors = Factors()
    a, b, c = (factors.fresh((2,)) for _ in range(3))
    factors.tie(a, -b)
    factors.tie(b[:1], a[:1])
    factors.tie(c, b)
    (solved,) = factors.solved(np.stack([a, b, c]))
    assert solved[:, 0].tolist() == [0, 0, 0]
    assert solved[0, 1] == -solved[1, 1] == -solved[2, 1] != 0


def test_diagonals_of_a_block() -> None:
    """Norms' scales, values and outputs, queries and keys, gates: each diagonal, and no other."""
    found = sides(glu, *glu_params())
    turned = frozenset({("q", 1, False), ("k", 1, True)})  # which of the two is divided has no meaning
    assert found - {turned} | ({frozenset({("q", 1, True), ("k", 1, False)})} if turned in found else set()) == {
        frozenset({("n0", 0, True), ("q", 0, False), ("k", 0, False), ("v", 0, False)}),
        frozenset({("q", 1, True), ("k", 1, False)}),
        frozenset({("v", 1, True), ("o", 0, False)}),
        frozenset({("n1", 0, True), ("gate", 0, False), ("up", 0, False)}),
        frozenset({("up", 1, True), ("down", 0, False)}),
        frozenset({("n2", 0, True), ("head", 0, False)}),
    }


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: jax.nn.gelu(x @ p["a"]) @ p["b"],
        lambda p, x: jnp.exp(x @ p["a"]) @ p["b"],
        lambda p, x: jax.nn.relu(x @ p["a"] + 1.0) @ p["b"],
        lambda p, x: jnp.sort(x @ p["a"], -1) @ p["b"],
        lambda p, x: jax.nn.relu6(x @ p["a"]) @ p["b"],
        lambda p, x: (x @ p["a"]).astype(jnp.int32).astype(jnp.float32) @ p["b"],
        lambda p, x: (x @ p["a"]) ** 2 @ p["b"],
        lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["b"],
        lambda p, x: (x @ p["a"], x @ p["a"] @ p["b"]),
    ],
    ids=["gelu", "exp", "shifted", "sort", "clipped", "integers", "square", "softmax", "result"],
)
def test_what_a_factor_does_not_pass(fn) -> None:
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    assert not sides(fn, params, jnp.ones((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_functions_stay(case) -> None:
    fn, params, *args = CASES[case]()
    for done in (equalize(fn)(params, *args), rotate(fn, least=2)(params, jax.random.key(0), *args)):
        assert done.difference < 1e-5
        shapes = [[getattr(x, "shape", None) for x in jax.tree.leaves(tree)] for tree in (done.params, params)]
        assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["linen_mlp", "linen_conv", "linen_scan_remat", "nnx_net", "equinox_mlp"])
def test_smoothing_keeps_real_layers(case) -> None:
    fn, params, *args = CASES[case]()
    done = smooth(fn, insert=True)(params, input_peaks(fn)(params, *args), *args)
    assert done.difference < 1e-5
    assert done.moved


def test_smooth_is_the_papers_and_helps() -> None:
    params, x = mlp_params()
    peaks = input_peaks(mlp)(params, x)
    hidden = np.maximum(x @ params["up"] + params["bias"], 0)
    np.testing.assert_allclose(peaks["down"], hidden.max(0), rtol=1e-5)
    done = smooth(mlp, alpha=0.5, where="down")(params, peaks, x)
    s = np.sqrt(hidden.max(0) / np.abs(params["down"]).max(1))
    np.testing.assert_allclose(done.params["down"], params["down"] * s[:, None], rtol=1e-5)
    np.testing.assert_allclose(done.params["up"], params["up"] / s, rtol=1e-5)
    assert done.difference < 1e-5
    assert done.fn is mlp
    assert not done.left
    whole = smooth(mlp, where="up|down")(params, peaks, x)
    assert [(left.path, "insert=True" in left.why) for left in whole.left] == [("up", True)]


def test_windows_of_several_widths() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"a": (3, 3, 2, 4), "b": (3, 3, 4, 6), "c": (6, 3)}
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=False)}
    x = jax.random.normal(keys[3], (4, 5, 5, 2))

    def fn(p: Any, x: jax.Array) -> jax.Array:
        for name in ("a", "b"):
            dims = ("NHWC", "HWIO", "NHWC")
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, p[name], (1, 1), "SAME", dimension_numbers=dims))
        return x.mean((1, 2)) @ p["c"]

    quantizer = jc.quantize(jc.Int(3), roles=jc.roles(fn)(params, x))
    done = [awq(fn, quantizer, steps=4)(params, seen(fn)(params, x), x) for seen in (row_moments, input_moments)]
    done += [smooth(fn)(params, input_peaks(fn)(params, x), x), equalize(fn)(params, x)]
    for one in done:
        assert one.moved == ("a", "b", "c")
        assert one.difference < 1e-5
    assert "moved 'a', 'b', 'c'" in repr(done[0])


def test_statistics_of_another_kind_are_refused() -> None:
    params, x = mlp_params()
    with pytest.raises(TypeError, match="'down' are Moments, wanted an array; make them by input_peaks"):
        smooth(mlp)(params, row_moments(mlp)(params, x), x)
    with pytest.raises(ValueError, match=r"'down' has \d+ channels along its axes \(0,\).*gather it"):
        smooth(mlp)(params, input_moments(mlp)(params, x), x)
    with pytest.raises(TypeError, match=r"awq: Int\(4\) is no transform but goes into one; write quantize"):
        awq(mlp, jc.Int(4))


def test_equalized_ranges_are_equal() -> None:
    params, x = mlp_params()
    done = equalize(mlp)(params, x)
    made, read = (np.abs(np.asarray(done.params[name])).max(axis) for name, axis in (("up", 0), ("down", 1)))
    np.testing.assert_allclose(made, read, rtol=1e-3)


@pytest.mark.slow
def test_awq_is_never_worse_than_rounding() -> None:
    params, x = mlp_params()
    x = x * np.exp(np.linspace(0, 3, 8, dtype=np.float32))
    quantizer = jc.quantize(jc.Int(3), where="up|down")
    done = awq(mlp, quantizer, steps=8, insert=True)(params, input_moments(mlp)(params, x), x)
    assert done.difference < 1e-5

    def error(fn: Any, p: Any, q: Any) -> float:
        return float(jnp.sum((fn(materialize(q), x) - mlp(params, x)) ** 2))

    inner = jc.quantize(jc.Int(3), where="params/(up|down)").apply((), done.params)
    assert error(done.fn, done.params, inner) < error(mlp, params, quantizer.apply((), params))


def test_rotation_turns_the_stream() -> None:
    params, x = glu_params()
    done = rotate(glu)(params, jax.random.key(0), x)
    assert done.difference < 1e-5
    assert {"in", "q", "k", "v", "o", "gate", "up", "down", "head"} <= set(done.moved)
    assert all((done.params[name] == 1).all() for name in ("n0", "n1", "n2"))
    spiked = {**params, "in": params["in"] * np.where(np.arange(8) == 3, 30, 1).astype(np.float32)}
    even = rotate(glu)(spiked, jax.random.key(0), x).params["in"]
    peak = lambda w: float(jnp.abs(w).max() / jnp.sqrt(jnp.mean(w**2)))  # noqa: E731
    assert peak(jnp.asarray(even)) < 0.75 * peak(jnp.asarray(spiked["in"]))


def test_corrected_biases_make_the_means_right() -> None:
    params, x = mlp_params()
    rounded = jc.quantize(jc.Int(3), where="up|down").apply((), params)
    done = correct_bias(mlp)(params, rounded, x)
    assert set(done.moved) == {"bias", "end"}
    assert not done.left
    w = {name: np.asarray(materialize(rounded)[name], np.float64) for name in ("up", "down")}
    bias = params["bias"] + (x @ (params["up"] - w["up"])).mean(0)
    np.testing.assert_allclose(done.params["bias"], bias, rtol=1e-4, atol=1e-5)
    after = np.maximum(x @ w["up"] + bias, 0) @ w["down"] + np.asarray(done.params["end"])
    np.testing.assert_allclose(after.mean(0), mlp(params, x).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_bias_that_is_not_the_products_own_stays() -> None:
    w, b, x = (np.random.default_rng(i).normal(size=(4, 4)).astype(np.float32) for i in range(3))
    step = lambda h, w: (jnp.tanh(h @ w[0] + w[1][None]), None)  # noqa: E731
    behind = lambda p, x: jax.lax.scan(step, x, (p["w"], p["b"].T))[0]  # noqa: E731
    twice = lambda p, x: (x @ p["w"] + p["b"][0][None], x * p["b"][0][None])  # noqa: E731
    for fn, params in ((behind, {"w": np.stack([w] * 4), "b": b}), (twice, {"w": w, "b": b})):
        rounded = jc.quantize(jc.Int(3), per=jc.Tensor(), where="w").apply((), params)
        done = correct_bias(fn)(params, rounded, x)
        assert [left.path for left in done.left] == ["w"]
        np.testing.assert_array_equal(done.params["b"], b)


def test_what_is_wrong_is_said() -> None:
    params, x = mlp_params()
    with pytest.raises(ValueError, match=r"smooth: alpha must be in 0..1, got 2."):
        smooth(mlp, alpha=2)
    with pytest.raises(ValueError, match="smooth: the statistics have no entry for 'down', only none"):
        smooth(mlp)(params, {}, x)
    peaks = {name: jnp.full(n, jnp.nan) for name, n in (("up", 8), ("down", 16))}
    with pytest.raises(ValueError, match="statistics of 'down' are not finite"):
        smooth(mlp)(params, peaks, x)
    rounded = jc.quantize(jc.Int(8), where="up").apply((), params)
    with pytest.raises(TypeError, match="equalize: 'up' is a Quantized, whose values can no longer be scaled"):
        equalize(mlp)(rounded, x)
    with pytest.raises(ValueError, match="no leaf of the second tree is compressed; give the parameters before and"):
        correct_bias(mlp)(rounded, params, x)
