"""Adapted leaves as they run: a product with the base and a thin one beside it, the same as of the sum."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.activations import Dynamic, factored
from jaxcomp.adapters import adapt, combine, partition
from tests.marks import quick


class Layer(nn.Module):
    """One of a stack."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> Any:
        return x + nn.relu(nn.Dense(8)(x)), None


class Net(nn.Module):
    """A table, a scan of layers, a convolution, and a head."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(10, 8)(tokens)
        scanned = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = scanned(name="stack")(x, None)
        return nn.DenseGeneral((2, 3), axis=-1, name="head")(nn.Conv(8, (3,))(x))


TOKENS = jnp.arange(8).reshape(2, 4)
PARAMS = jax.jit(Net().init)(jax.random.key(0), TOKENS)["params"]


def net(p: Any, tokens: jax.Array) -> jax.Array:
    return Net().apply({"params": p}, tokens)


plain = jax.jit(net)
ROLES = jc.roles(net)(PARAMS, TOKENS)
INT4 = jc.quantize(jc.Int(4), roles=ROLES)


def adapted(base: Any = None) -> Any:
    trained, frozen = partition(adapt(PARAMS, 2, key=jax.random.key(1), base=base, roles=ROLES, alpha=4))
    rng = np.random.default_rng(2)
    return combine(jax.tree.map(lambda x: jnp.asarray(x + np.float32(0.1 * rng.normal(size=x.shape))), trained), frozen)


TREES = {"float": lambda: adapted(), "int4": lambda: adapted(INT4), "packed": lambda: jc.pack(adapted(INT4))}


@pytest.mark.parametrize("name", quick(TREES, "packed"))
def test_thin_products_beside_the_base(name) -> None:
    tree = TREES[name]()
    want = plain(jc.materialize(tree), TOKENS)
    np.testing.assert_allclose(jax.jit(factored(net))(tree, TOKENS), want, rtol=2e-5, atol=2e-6)
    assert np.abs(want - plain(PARAMS, TOKENS)).max() > 0.05


def test_no_adapter_is_multiplied_out() -> None:
    tree = adapt({"w": jnp.ones((64, 64))}, 2, key=jax.random.key(0))
    macs = jc.cost(factored(lambda p, x: x @ p["w"]))(tree, jnp.ones((1, 64))).macs
    assert macs == 64 * 64 + 2 * 64 * 2


@pytest.mark.slow
def test_gradients_are_those_of_the_sum() -> None:
    trained, frozen = partition(jc.pack(adapted(INT4)))
    thin = jax.grad(lambda t: jnp.sum(factored(net)(combine(t, frozen), TOKENS) ** 2))(trained)
    dense = jax.grad(lambda t: jnp.sum(net(jc.materialize(combine(t, frozen)), TOKENS) ** 2))(trained)
    for got, want in zip(jax.tree.leaves(thin), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_integer_products_with_the_base() -> None:
    """The base runs on int8 codes, and the adapter meets the activation as it is."""
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 16), (16, 6)))
    base = jc.quantize(jc.Int(8)).apply((), {"w": w})
    tree = adapt(base, 2, key=jax.random.key(2))
    trained, frozen = partition(tree)
    tree = combine(jax.tree.map(lambda a: a + 0.3, trained), frozen)
    run = jax.jit(jc.quantize_function(fn, {"w": jc.Act(8, range=Dynamic())}, integer=True, strict=True))
    want = run(base, None, x) + x @ tree["w"].delta.u @ tree["w"].delta.v
    np.testing.assert_allclose(run(tree, None, x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_exported_as_it_is(tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    tree = jc.pack(adapted(INT4))
    jc.export.to_onnx(tmp_path / "m.onnx", net, tree, TOKENS)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: np.asarray(TOKENS)})
    np.testing.assert_allclose(got, net(jc.materialize(tree), TOKENS), rtol=1e-4, atol=1e-5)
