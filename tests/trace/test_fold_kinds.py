"""Fault 13: chains behind splits and norms of other shapes are folded, and what is not folded is said."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.trace.fold import Fold, fold_batch_norm
from tests.trace.models import KEY, normal
from tests.trace.test_fold import by_row, check, decayed, doubly_used, just_a_bias, masked, primitives, tied


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: (x @ p["w"]).reshape(4, 8, 3, 4) / 2,
        lambda p, x: (x @ p["w"] + p["b"]).reshape(4, 8, 3, 4) / 2,
        lambda p, x: (x @ p["w"]).reshape(32, 3, 4).transpose(1, 0, 2) * p["heads"][:, None, None],
        lambda p, x: (x @ p["w"]).reshape(4, 8, 3, 4) * p["within"] + p["b"].reshape(3, 4),
        lambda p, x: ((x @ p["w"]).reshape(4, 8, 3, 2, 2) * p["heads"][:, None, None]).reshape(32, 12) - p["b"],
        lambda p, x: (x @ p["w"] * p["b"]).reshape(4, 96).reshape(4, 8, 12) * 3.0 + p["both"].reshape(12),
    ],
)
def test_fault_13_chains_behind_a_split_into_heads_are_folded(fn):
    p = {"w": normal(1, 6, 12), "b": normal(2, 12), "heads": normal(3, 3), "within": normal(4, 4)}
    p["both"] = normal(5, 3, 4)
    x = normal(6, 4, 8, 6)
    folded = check(fn, p, x)
    assert [f.path for f in folded.folds] == ["w"]
    assert folded.left == ()
    assert not {"mul", "div", "sub"} & set(primitives(folded.fn, folded.params, x))


@pytest.mark.parametrize("bias", [False, True])
def test_fault_13_equinox_attention(bias):
    """Its queries are divided by the root of a head's size, after they were split."""
    model = eqx.nn.MultiheadAttention(4, 8, key=KEY, use_query_bias=bias)
    fn = lambda m, x: jax.vmap(m)(x, x, x)  # noqa: E731
    folded = check(fn, model, normal(1, 2, 5, 8))
    assert folded.folds == (Fold("query_proj/weight", "query_proj/bias" if bias else None, ()),)
    np.testing.assert_allclose(folded.params.query_proj.weight, model.query_proj.weight / 2**0.5, rtol=1e-6)


def conv(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 1, 5)])
@pytest.mark.parametrize("biased", [False, True])
def test_fault_13_norms_whose_arrays_have_axes_of_one_element(shape, biased):
    """Haiku's batch norm keeps arrays of (1, 1, 1, C)."""

    def fn(p, x):
        y = conv(x, p["conv"]["w"]) + (p["conv"]["b"] if biased else 0.0)
        inv = p["bn"]["scale"] * jax.lax.rsqrt(p["state"]["var"] + 1e-5)
        return jax.nn.relu((y - p["state"]["mean"]) * inv + p["bn"]["offset"])

    vector = {name: normal(i, *shape) for i, name in enumerate(("scale", "mean", "offset"))}
    p = {
        "conv": {"w": normal(5, 3, 3, 2, 5), "b": normal(6, 5)},
        "bn": {"scale": vector["scale"], "offset": vector["offset"]},
        "state": {"mean": vector["mean"], "var": jnp.abs(normal(7, *shape)) + 0.1},
    }
    folded = check(fn, p, normal(8, 2, 4, 4, 2))
    ((path, home, _),) = folded.folds
    assert (path, home, folded.left) == ("conv/w", "bn/offset", ())
    inv = np.asarray(p["bn"]["scale"], np.float64) / np.sqrt(np.asarray(p["state"]["var"], np.float64) + 1e-5)
    bias = (np.asarray(p["conv"]["b"], np.float64) if biased else 0.0) - np.asarray(p["state"]["mean"], np.float64)
    wanted = (bias * inv + np.asarray(p["bn"]["offset"], np.float64)).reshape(shape)
    np.testing.assert_allclose(folded.params["bn"]["offset"], wanted, rtol=1e-5, atol=1e-6)


def test_fault_13_layers_in_a_scan_with_axes_of_one_element():
    def fn(p, x):
        def layer(h, w):
            y = conv(h, w["kernel"])
            return jnp.tanh((y - w["mean"]) * w["scale"] + w["shift"]), None

        return jax.lax.scan(layer, x, p)[0]

    p = {"kernel": normal(9, 3, 1, 1, 4, 4), **{n: normal(i, 3, 1, 1, 1, 4) for i, n in enumerate("msb")}}
    p = {"kernel": p["kernel"], "mean": p["m"], "scale": p["s"], "shift": p["b"]}
    folded = check(fn, p, normal(7, 2, 3, 3, 4))
    assert folded.folds[0].bias == "shift"
    assert folded.params["shift"].shape == (3, 1, 1, 1, 4)


def layer_norm(p, x):
    h = x @ p["w"]
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
    return h * p["s"] + p["b"]


def no_home(p, x):
    return (x @ p["w"]) * 2.0 + p["one"]


def in_a_branch(p, x):
    return jax.lax.cond(x.sum() > 0, lambda: (x @ p["w"]) * p["s"], lambda: jnp.ones((2, 4)))


@pytest.mark.parametrize(
    ("fn", "path", "why"),
    [
        (tied, "w", "its kernel is used at another place too"),
        (doubly_used, "w", "what it gives is used more than once before it is scaled"),
        (decayed, "w", "its kernel is used at another place too"),
        (masked, "w", "its kernel is computed, not a leaf"),
        (by_row, "w", "what scales it varies along other axes than its channels"),
        (layer_norm, "s", "no product stands right before it"),
        (no_home, "w", "its bias of shape (4,) has no home"),
        (in_a_branch, "w", "it is inside a cond"),
    ],
)
def test_fault_13_what_is_not_folded_is_said_with_a_reason(fn, path, why):
    p = {"w": normal(1, 3, 4), "s": normal(2, 4), "b": normal(3, 4), "one": normal(4, 1)}
    folded = check(fn, p, normal(4, 2, 3))
    assert folded.folds == ()
    assert any(name == path and reason.startswith(why) for name, reason in folded.left)


def test_fault_13_nothing_is_said_of_a_bias_alone():
    p = {"w": normal(1, 3, 4), "b": normal(3, 4)}
    assert fold_batch_norm(just_a_bias)(p, normal(4, 2, 3)).left == ()
