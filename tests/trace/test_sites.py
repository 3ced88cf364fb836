"""Sites: roles of the leaf's own axes, MACs by hand, paths, and a program too large to hold."""

from __future__ import annotations

import gc

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxcomp.trace.sites import sites
from tests.trace.models import CASES, Block


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


def only(fn, params, *args):
    (site,) = sites(fn)(params, *args)
    return site


def conv_macs(module, *in_shape):
    x = shape(*in_shape)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    return only(module.apply, variables, x)


@pytest.mark.parametrize(
    ("module", "in_shape", "macs"),
    [
        (nn.Conv(8, (3, 3)), (2, 16, 16, 4), 2 * 16 * 16 * 8 * 4 * 9),
        (nn.Conv(8, (3, 3), padding="VALID"), (2, 16, 16, 4), 2 * 14 * 14 * 8 * 4 * 9),
        (nn.Conv(8, (3, 3), strides=2), (2, 16, 16, 4), 2 * 8 * 8 * 8 * 4 * 9),
        (nn.Conv(8, (3, 3), feature_group_count=2), (2, 16, 16, 4), 2 * 16 * 16 * 8 * 2 * 9),
        (nn.Conv(4, (3, 3), feature_group_count=4), (2, 16, 16, 4), 2 * 16 * 16 * 4 * 9),
        (nn.Conv(8, (3, 3), kernel_dilation=2, padding="VALID"), (2, 16, 16, 4), 2 * 12 * 12 * 8 * 4 * 9),
        (nn.Conv(8, (5,)), (2, 16, 4), 2 * 16 * 8 * 4 * 5),
        (nn.Conv(8, (3, 3, 3)), (2, 6, 6, 6, 4), 2 * 6**3 * 8 * 4 * 27),
        (nn.ConvTranspose(8, (2, 2), strides=(2, 2)), (2, 16, 16, 4), 2 * 16 * 16 * 8 * 4 * 4),
        (nn.ConvTranspose(8, (4,), strides=(2,), padding="VALID"), (2, 16, 4), 2 * 16 * 8 * 4 * 4),
    ],
)
def test_macs_of_convolutions(module, in_shape, macs):
    site = conv_macs(module, *in_shape)
    assert site.macs == macs
    assert site.kind == "conv"
    assert site.path == "params/kernel"
    assert site.groups == getattr(module, "feature_group_count", 1)
    spatial = ("spatial",) * (len(in_shape) - 2)
    assert site.operands[1].leaf_roles == (*spatial, "contracted", "output")
    assert site.operands[0].roles == ("output", *spatial, "contracted")
    assert site.operands[1].exact


def roles(fn, w, *args):
    site = only(lambda p, *a: fn(p["w"], *a), {"w": w}, *args)
    operand = site.operands[site.weight]
    assert site.leaf == "w"
    return operand.leaf_roles, operand.exact


@pytest.mark.parametrize(
    ("fn", "size", "expected", "exact"),
    [
        (lambda w, x: x @ w, (4, 6), ("contracted", "output"), True),
        (lambda w, x: w @ x.T, (6, 4), ("output", "contracted"), True),
        (lambda w, x: x @ w.T.astype("float32"), (6, 4), ("output", "contracted"), True),
        (lambda w, x: x @ w.reshape(4, 6), (4, 2, 3), ("contracted", "output", "output"), True),
        (lambda w, x: x @ w.reshape(4, 6), (2, 2, 6), ("contracted", "contracted", "output"), True),
        (lambda w, x: jnp.einsum("bi,hio->bho", x, w), (3, 4, 5), ("output", "contracted", "output"), True),
        (lambda w, x: jnp.einsum("bi,i->b", x, w), (4,), ("contracted",), True),
        (lambda w, x: jnp.einsum("bi,bio->bo", x, w), (3, 4, 5), ("batch", "contracted", "output"), True),
        (lambda w, x: x @ w[1], (3, 4, 5), ("stacked", "contracted", "output"), True),
        (lambda w, x: x @ w[:, :2], (4, 6), ("contracted", "output"), False),
        (lambda w, x: x @ w[::-1], (4, 6), ("contracted", "output"), False),
        (lambda w, x: x @ jnp.split(w, 2, axis=1)[1], (4, 6), ("contracted", "output"), False),
        (lambda w, x: x @ (w * (jnp.abs(w) > 0.5)), (4, 6), ("contracted", "output"), False),
        (lambda w, x: x @ ((w - w.mean(0)) / w.std(0)), (4, 6), ("contracted", "output"), False),
        (lambda w, x: x @ (w + jax.lax.stop_gradient(jnp.round(w) - w)), (4, 6), ("contracted", "output"), False),
        (lambda w, x: x @ w[0], (1, 4, 6), ("single", "contracted", "output"), True),
    ],
)
def test_roles_are_those_of_the_leafs_own_axes(fn, size, expected, exact):
    assert roles(fn, shape(*size), shape(3, 4)) == (expected, exact)


def test_scanned_layers_are_stacked():
    fn, params, x = CASES["stacked_scan"]()
    site = only(fn, params, x)
    assert site.operands[1].leaf_roles == ("stacked", "contracted", "output")
    assert (site.layer_steps, site.steps, site.macs) == ((3,), 3, 3 * 2 * 4 * 4)
    assert site.param_bytes == 3 * 4 * 4 * 4
    fn, params, x = CASES["recurrent"]()
    wx, wh = sites(fn)(params, x)
    assert (wh.path, wh.layer_steps, wh.steps, wh.macs, wh.param_bytes) == ("wh", (), 5, 5 * 4 * 4, 64)
    assert wx.in_bytes == 4 * 5 * 3


def test_a_loop_that_indexes_layers_is_stacked_too():
    fn, params, x = CASES["while_and_fori"]()
    first, second = sites(fn)(params, x)
    assert first.operands[1].leaf_roles == ("stacked", "contracted", "output")
    assert second.operands[1].leaf_roles == ("stacked", "output", "contracted")
    assert (first.steps, second.steps) == (3, 1)
    assert (first.path, second.path) == ("w", "w#1")


def test_tied_parameters_stay_one_leaf():
    def fn(p, tokens):
        return (p["embed"][tokens] @ p["w"]) @ p["embed"].T

    lookup, dense, head = sites(fn)({"embed": shape(50, 8), "w": shape(8, 8)}, shape(2, 5, dtype="int32"))
    assert (lookup.kind, lookup.operands[0].leaf_roles, lookup.macs) == ("embed", ("indexed", "output"), 0)
    assert (lookup.path, head.path, dense.path) == ("embed", "embed#1", "w")
    assert lookup.leaf == head.leaf == "embed"
    assert head.operands[1].leaf_roles == ("output", "contracted")


def test_products_of_activations_are_named_by_scope():
    x = shape(2, 5, 8)
    found = sites(Block().apply)(jax.eval_shape(Block().init, jax.random.key(0), x), x)
    inner = [s for s in found if s.weight is None]
    assert [s.macs for s in inner] == [2 * 2 * 5 * 5 * 4] * 2
    assert all(s.path.startswith("Block/MultiHeadDotProductAttention_0/") for s in inner)
    assert len({s.path for s in found}) == len(found) == 8
    assert all(s.activations == ((0, 1) if s.weight is None else (0,)) for s in found)


def test_weights_from_several_leaves_take_their_common_path():
    def fn(p, x):
        return x @ (p["lora"]["a"] @ p["lora"]["b"])

    product, use = sites(fn)({"lora": {"a": shape(8, 2), "b": shape(2, 4)}}, shape(3, 8))
    assert (product.path, product.activations) == ("lora/b", ())
    assert (use.path, use.leaf, use.operands[1].params) == ("lora", None, ("lora/a", "lora/b"))


def test_every_case_has_unique_paths_and_its_weights():
    for make in CASES.values():
        fn, params, x = make()
        found = sites(fn)(params, x)
        assert found
        assert len({s.path for s in found}) == len(found)
        assert len({s.location for s in found}) == len(found)


def test_a_billion_parameters_by_shape_alone():
    width, depth, tokens = 2048, 24, 1024

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(16)(nn.LayerNorm()(x))
            return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))

    class Gpt(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(32000, width, name="embed")(tokens)
            for _ in range(depth):
                x = Layer()(x)
            return nn.Dense(32000, use_bias=False)(x)

    x = shape(1, tokens, dtype="int32")
    variables = jax.eval_shape(Gpt().init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) > 1e9
    gc.collect()
    live = len(jax.live_arrays())
    found = sites(Gpt().apply)(variables, x)
    assert len(jax.live_arrays()) <= live
    weights = depth * 12 * width**2 + 32000 * width
    assert sum(s.macs for s in found) == tokens * weights + depth * 2 * tokens**2 * width
    assert len(found) == 1 + depth * 8 + 1
