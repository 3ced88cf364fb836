import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcomp.core.paths import leaves_with_paths
from tests.train.networks.test_linen import SHRUNKEN, count, forward, images, infer, randomized
from train.networks import nnx as nnx_models
from train.networks.linen import ResNet18


@pytest.fixture(scope="module", params=[None, SHRUNKEN], ids=["width", "widths"])
def twins(request):
    """A linen ResNet-18 with its variables, and a function that makes the NNX one of the same variables."""
    model = ResNet18(width=4, widths=request.param)
    variables = randomized(model, images())
    empty = nnx.eval_shape(lambda: nnx_models.ResNet18(4, widths=request.param, rngs=nnx.Rngs(0)))
    graphdef, params, stats = nnx.split(empty, nnx.Param, nnx.BatchStat)

    def filled(state, collection):
        values = dict(leaves_with_paths(variables[collection])[0])
        named, treedef = leaves_with_paths(state)
        assert {p: leaf.shape for p, leaf in named} == {p: v.shape for p, v in values.items()}
        return jax.tree.unflatten(treedef, [jnp.asarray(values[p]) for p, _ in named])

    return model, variables, lambda: nnx.merge(graphdef, filled(params, "params"), filled(stats, "batch_stats"))


@functools.partial(nnx.jit, static_argnums=2)
def nnx_forward(model, x, train=False):
    return model(x, train)


def test_nnx_twin_gives_the_same_logits(twins):
    model, variables, make = twins
    twin = make()
    x = images()
    wanted = infer(model, variables, x)
    np.testing.assert_allclose(nnx_forward(twin, x), wanted, rtol=1e-5, atol=1e-5)


def test_nnx_twin_trains_the_same(twins):
    model, variables, make = twins
    twin = make()
    x = images()
    logits, updated = forward(model, variables, x, True)
    np.testing.assert_allclose(nnx_forward(twin, x, True), logits, rtol=1e-4, atol=1e-4)
    wanted = dict(leaves_with_paths(updated["batch_stats"])[0])
    for path, leaf in leaves_with_paths(nnx.state(twin, nnx.BatchStat))[0]:
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_nnx_full_size_count_and_bfloat16():
    full = nnx.eval_shape(lambda: nnx_models.ResNet18(rngs=nnx.Rngs(0)))
    assert count(nnx.state(full, nnx.Param)) == 11_173_962
    half = nnx.eval_shape(lambda: nnx_models.ResNet18(4, channels=1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    with jax.numpy_dtype_promotion("standard"):
        assert nnx.eval_shape(lambda m: m(jnp.zeros((2, 8, 8, 1)), True), half).dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half, (nnx.Param, nnx.BatchStat)))} == {
        jnp.dtype("float32")
    }
