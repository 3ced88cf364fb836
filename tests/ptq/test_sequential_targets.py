"""Leaves that make up for what reaches them wrong: fitted as numpy fits them, through scans, streams and biases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcomp as jc
from jaxcomp.core.wrappers import Masked
from jaxcomp.ptq import Exact, gptq, sequentially
from tests.marks import quick

RNG = np.random.default_rng(3)


def normal(*shape):
    return jnp.array(RNG.normal(size=shape), jnp.float32)


def block(x, p):
    inner = jnp.tanh(x @ p["up"] + p["b_up"][None, None])
    return jnp.tanh(x + (inner @ p["down"] + p["b_down"][None, None])), None


PARAMS = {
    "layers": {"up": normal(2, 4, 6) / 2, "b_up": normal(2, 6), "down": normal(2, 6, 4) / 2, "b_down": normal(2, 4)},
    "out": normal(4, 3),
}
BATCHES = [normal(2, 10, 4), normal(2, 8, 4)]


def scanned(p, x):
    return lax.scan(block, x * jnp.ones(x.shape), p["layers"])[0] @ p["out"]  # a program for each shape of a batch


def coarse(leaves, moments):
    """Rounded to halves: an error that the oracle can make too."""
    return {path: jnp.round(leaf * 2) / 2 for path, leaf in leaves.items()}


def by_numpy(how):
    """The same, in float64, written down leaf by leaf."""
    p = jax.tree.map(lambda w: np.array(w, np.float64), PARAMS)
    x = np.concatenate([np.asarray(b, np.float64).reshape(-1, 4) for b in BATCHES])
    made = jax.tree.map(np.copy, p)

    def solved(w, rows, gap, bias):
        mean = rows.mean(0) if bias else 0
        about, off = rows - mean, gap - (gap.mean(0) if bias else 0)
        h = about.T @ about
        h += how.damping * np.trace(h) / len(h) * np.eye(len(h))
        new = np.round((w + np.linalg.solve(h, about.T @ off)) * 2) / 2
        return new, (gap + rows @ (w - new)).mean(0)

    exact, now = x, x
    for i in range(2):
        up, b_up, down, b_down = (p["layers"][k][i] for k in ("up", "b_up", "down", "b_down"))
        new, shift = solved(up, now, exact @ up - now @ up, how.biases)
        made["layers"]["up"][i], made["layers"]["b_up"][i] = new, b_up + how.biases * shift
        inner, inner_now = np.tanh(exact @ up + b_up), np.tanh(now @ new + made["layers"]["b_up"][i])
        gap = inner @ down - inner_now @ down + how.stream * (exact - now)
        new, shift = solved(down, inner_now, gap, how.biases)
        made["layers"]["down"][i], made["layers"]["b_down"][i] = new, b_down + how.biases * shift
        exact = np.tanh(exact + inner @ down + b_down)
        now = np.tanh(now + inner_now @ new + made["layers"]["b_down"][i])
    made["out"], _ = solved(p["out"], now, exact @ p["out"] - now @ p["out"], False)
    return made


HOWS = [Exact(), Exact(0.1, biases=False), Exact(stream=False)]


@pytest.mark.parametrize("how", quick(HOWS, HOWS[0]), ids=str)
def test_leaves_are_fitted_to_what_they_gave_as_numpy_fits_them(how):
    made, want = sequentially(scanned, coarse, r"(.*/)?(up|down|out)", targets=how)(PARAMS, BATCHES), by_numpy(how)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), made, want)


W = normal(6, 12, 6) / 3
SEEN, HELD = normal(256, 6), normal(256, 6)


def deep(p, x):
    for up, down in zip(p["up"], p["down"], strict=True):
        x = x + jax.nn.relu(x @ up) @ down
    return x


DEEP = {"up": [w.T for w in W[:3]], "down": list(W[3:])}


def test_held_out_error_is_less_than_without_targets():
    def error(tree):
        return float(jnp.mean((deep(jc.materialize(tree), HELD) - deep(DEEP, HELD)) ** 2))

    def method(leaves, moments):
        return gptq(leaves, moments, jc.Int(3))

    ours = sequentially(deep, method, targets=Exact())(DEEP, [SEEN])
    assert error(ours) < 0.8 * error(sequentially(deep, method)(DEEP, [SEEN]))


def twice(p, x):
    return jnp.tanh(x @ p["w"] + p["b"][None]), x * p["b"][None]


def by_experts(p, x):
    return jnp.einsum("ebi,eio->ebo", x.reshape(2, -1, 4), p["w"]) + p["b"][None, None]


def layers_behind(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w[0] + w[1][None]), None), x, (p["w"], p["b"].T))[0]


def one_layer(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w + p["b"][None]), None), x, p["w"])[0]


def turned(p, x):
    return jnp.einsum("bd,dhk->bhk", x, p["w"]).transpose(0, 2, 1) + p["b"][None]


def of_rows(p, x):
    return x @ p["w"] + p["b"][:, None]


def plain(p, x):
    return x @ p["w"] + p["b"][None]


NOT_ITS_OWN = {
    "used twice": (twice, (4, 4), (4,)),
    "shared by experts": (by_experts, (2, 4, 6), (6,)),
    "layers on its last axis": (layers_behind, (4, 4, 4), (4, 4)),
    "of a result that was turned round": (turned, (4, 3, 3), (3, 3)),
    "of rows, as many as channels": (of_rows, (4, 32), (32,)),
    "shared by layers, of which there is one": (one_layer, (1, 4, 4), (4,)),
}


@pytest.mark.parametrize("name", quick(NOT_ITS_OWN, "layers on its last axis"))
def test_a_bias_that_is_not_the_leafs_own_stays(name):
    fn, w, b = NOT_ITS_OWN[name]
    params = {"w": normal(*w), "b": normal(*b)}
    made = sequentially(fn, coarse, "w", targets=Exact())(params, [normal(32, 4)])
    np.testing.assert_array_equal(made["b"], params["b"])
    assert made["w"].shape == w


def test_a_compressed_bias_stays():
    params = {"w": normal(4, 3), "b": normal(3)}
    prune = jc.prune(0.34, where="b")
    params = prune.apply(prune.init(params), params)

    def fn(p, x):
        return x @ p["w"] + jc.materialize(p["b"])[None]

    made = sequentially(fn, coarse, "w", targets=Exact())(params, [normal(32, 4)])
    assert isinstance(made["b"], Masked)
    np.testing.assert_array_equal(jc.materialize(made["b"]), jc.materialize(params["b"]))


@pytest.mark.slow
def test_rows_far_from_zero_leave_a_factor():
    """About a mean that is 10,000 times as large as they vary, float32's moments are rounding: nothing is fitted."""
    params = {"w": normal(4, 3), "b": normal(3)}
    rows = 1e4 + normal(64, 4)
    made = sequentially(plain, coarse, "w", targets=Exact())(params, [rows])
    np.testing.assert_array_equal(made["w"], jnp.round(params["w"] * 2) / 2)
    off = np.asarray(rows, np.float64).mean(0) @ np.asarray(params["w"] - made["w"], np.float64)
    np.testing.assert_allclose(made["b"], params["b"] + off, rtol=1e-3)


@pytest.mark.slow
def test_what_is_not_finite_is_said():
    params, rows = {"w": normal(4, 3), "b": normal(3)}, normal(8, 4).at[2, 1].set(jnp.nan)
    with pytest.raises(ValueError, match="of some batch 'w' takes or gives what is not finite"):
        sequentially(plain, coarse, "w", targets=Exact())(params, [rows])


def test_what_is_no_target_is_said():
    with pytest.raises(TypeError, match=r"sequentially: targets must be Exact\(\) or None, got 0.1"):
        sequentially(deep, coarse, targets=0.1)
    with pytest.raises(ValueError, match=r"Exact: damping must be a positive number, got 0"):
        Exact(damping=0)
