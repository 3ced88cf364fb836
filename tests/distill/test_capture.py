"""Captured values against those that the networks themselves give, and what cannot be captured."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcomp as jc
from jaxcomp.distill import capture, points


class Block(nn.Module):
    """A residual block."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> Any:
        return x + nn.Dense(x.shape[-1])(nn.relu(nn.Dense(6)(x))), None


class Net(nn.Module):
    """Two blocks by name, one of them twice, three in a scan of remats, and a head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = Block(name="block")
        x, _ = block(block(x)[0] + 1.0)
        scanned = nn.scan(
            nn.remat(Block), variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = scanned(name="stack")(x, None)
        return nn.Dense(2, name="head")(x)


X = jnp.cos(jnp.arange(12.0)).reshape(3, 4)
NET = Net()
PARAMS = NET.init(jax.random.key(0), X)["params"]


def net(params: Any, x: jax.Array) -> jax.Array:
    return NET.apply({"params": params}, x)


def test_modules_give_what_linen_captures() -> None:
    out, values = jax.jit(capture(net))(PARAMS, X)
    np.testing.assert_allclose(out, net(PARAMS, X), rtol=1e-6)
    _, seen = NET.apply({"params": PARAMS}, X, capture_intermediates=True, mutable=["intermediates"])
    for name, times in {"Net/block/Dense_0": 2, "Net/block/Dense_1": 2, "Net/stack/Dense_0": 1}.items():
        for k in range(times):
            got = values[f"{name}#{k}" if k else name]
            want = seen["intermediates"]
            for part in name.split("/")[1:]:
                want = want[part]
            np.testing.assert_allclose(got, want["__call__"][k], rtol=1e-5, atol=1e-6)
    assert values["Net/stack/Dense_0"].shape == (3, 3, 4), "layers of a scan stand in front"


def test_products_have_what_enters_them_and_what_they_give() -> None:
    out, values = capture(net, "head/.*")(PARAMS, X)
    assert list(values) == ["head/kernel:in", "head/kernel:out"]
    np.testing.assert_allclose(
        values["head/kernel:in"] @ PARAMS["head"]["kernel"], values["head/kernel:out"], rtol=1e-5
    )
    np.testing.assert_allclose(values["head/kernel:out"] + PARAMS["head"]["bias"][None], out, rtol=1e-5)


def test_points_are_what_capture_gives() -> None:
    shapes = points(net)(PARAMS, X)
    _, values = jax.eval_shape(capture(net), PARAMS, X)
    assert {name: (v.shape, v.dtype) for name, v in values.items()} == {
        name: (s.shape, s.dtype) for name, s in shapes.items()
    }


def test_captured_values_have_gradients() -> None:
    def by_capture(p: Any) -> jax.Array:
        return jnp.sum(capture(net, "head/kernel:in")(p, X).values["head/kernel:in"] ** 2)

    def block(w: Any, x: jax.Array) -> jax.Array:
        return Block().apply({"params": w}, x)[0]

    def by_hand(p: Any) -> jax.Array:
        x = block(p["block"], block(p["block"], X) + 1.0)
        for i in range(3):
            x = block(jax.tree.map(lambda w: w[i], p["stack"]), x)  # noqa: B023
        return jnp.sum(x**2)

    pairs = zip(*(jax.tree.leaves(jax.jit(jax.grad(f))(PARAMS)) for f in (by_capture, by_hand)), strict=True)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5)


@pytest.mark.slow
def test_attention_between_activations() -> None:
    def attend(p: Any, x: jax.Array) -> jax.Array:
        q, k = x @ p["q"], x @ p["k"]
        return jax.nn.softmax(q @ k.T) @ x

    p = {"q": jnp.eye(4), "k": jnp.ones((4, 4))}
    _, values = capture(attend, "dot_1:in0")(p, X)
    np.testing.assert_allclose(values["dot_1:in0"].sum(-1), 1.0, rtol=1e-6)


def test_nnx_has_products_and_its_own_scopes() -> None:
    class Two(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first, self.second = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            with jax.named_scope("body"):
                h = jnp.tanh(self.first(x))
            return self.second(h)

    model = Two(nnx.Rngs(0))
    graph, state = nnx.split(model)
    _, values = capture(lambda s, x: nnx.merge(graph, s)(x), ["body", "second/kernel:in"])(state, X)
    assert list(values) == ["body", "second/kernel:in"]
    np.testing.assert_array_equal(values["body"], jnp.tanh(model.first(X)))
    np.testing.assert_array_equal(values["body"], values["second/kernel:in"])


def test_compressed_leaves_are_materialized() -> None:
    small = jc.quantize(jc.Int(4), where=".*block.*kernel").apply((), PARAMS)
    got, want = capture(net, "head.*in")(small, X), capture(net, "head.*in")(jc.materialize(small), X)
    np.testing.assert_array_equal(got.values["head/kernel:in"], want.values["head/kernel:in"])


def looped(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), x) @ p["out"]


def branched(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.cond(x.sum() > 0, lambda h: h @ p["w"], lambda h: h, x) @ p["out"]


@jax.custom_vjp
def own(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


own.defvjp(lambda x, w: (own(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (looped, "stands in a loop that is not over layers"),
        (branched, "stands in a while loop or a branch"),
        (lambda p, x: own(x, p["w"]) @ p["out"], "stands in a custom gradient rule"),
    ],
    ids=["loop", "branch", "rule"],
)
def test_what_cannot_come_out_is_said(fn, why) -> None:
    p = {"w": jnp.eye(4), "out": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match=f"capture: 'w:in' {why}"):
        capture(fn, ["w:in"])(p, X)
    assert "w:in" not in points(fn)(p, X)
    assert list(capture(fn, "out:in")(p, X).values) == ["out:in"]


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"capture: 'heads' matches no value of the program; there are .*points"):
        capture(net, ["head/kernel:in", "heads"])(PARAMS, X)
