"""Scales and groups fall where the program sums, whatever the layout: read off it by roles, or settled by name."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp.core.paths import leaves_with_paths
from jaxcomp.quantization.adaround import adaround
from jaxcomp.quantization.leaves import Folded
from jaxcomp.quantization.microscaling import E8M0, Blocked
from tests.laws import assert_same_bits
from tests.marks import quick

rng = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def quantized(params, roles=None, per=None, **slots):
    """The leaves on eight bits, by path."""
    t = jc.quantize(jc.Int(8), per=jc.Channels() if per is None else per, roles=roles, **slots)
    return dict(leaves_with_paths(t.apply(t.init(params), params), is_leaf=jc.core.is_compressed)[0])


def assert_channels(leaf, w, summed: tuple[int, ...]) -> None:
    """One scale for each index of the axes that are not summed over: its largest magnitude over 127.5."""
    np.testing.assert_allclose(leaf.scale, np.abs(w).max(summed, keepdims=True) / 127.5, rtol=1e-6)
    assert_same_bits(jc.pack(leaf).materialize(), leaf.materialize())


def assert_groups(leaf, w, axis: int, size: int) -> None:
    """One scale for each ``size`` neighbours along the axis, at each index of all others."""
    w = np.moveaxis(np.abs(np.asarray(w)), axis, -1)
    top = w.reshape(*w.shape[:-1], -1, size).max(-1)
    np.testing.assert_allclose(leaf.scale, np.moveaxis(top, -1, axis) / 127.5, rtol=1e-6)
    assert_same_bits(jc.pack(leaf).materialize(), leaf.materialize())


class EqxNet(eqx.Module):
    """A convolution and a linear layer, both (out, in, ...)."""

    features: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self) -> None:
        keys = jax.random.split(jax.random.key(0))
        self.features = eqx.nn.Conv2d(4, 6, 3, key=keys[0])
        self.head = eqx.nn.Linear(6, 5, key=keys[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jax.nn.relu(self.features(x)).mean((1, 2)))


def eqx_net():
    params, static = eqx.partition(EqxNet(), eqx.is_array)
    with jax.numpy_rank_promotion("allow"):  # Equinox adds biases so
        roles = jc.roles(lambda p, x: jax.vmap(eqx.combine(p, static))(x))(params, normal(2, 4, 8, 8))
    return params, roles


def test_equinox_layers_have_their_outputs_first() -> None:
    params, roles = eqx_net()
    found = quantized(params, roles)
    assert_channels(found["features/weight"], params.features.weight, (1, 2, 3))
    assert_channels(found["head/weight"], params.head.weight, (1,))
    assert found["features/bias"] is params.features.bias
    grouped = quantized(params, roles, jc.Groups(2))
    assert_groups(grouped["features/weight"], params.features.weight, 1, 2)
    assert_groups(grouped["head/weight"], params.head.weight, 1, 2)


def test_equinox_layers_by_name() -> None:
    """What is called "weight" has its outputs first: a matrix, and a kernel whose path says that it convolves."""
    params, roles = eqx_net()
    named = {"conv": {"weight": params.features.weight}, "head": {"weight": params.head.weight}}
    found = quantized(named)
    assert_same_bits(found["conv/weight"].scale, quantized(params, roles)["features/weight"].scale)
    assert_channels(found["head/weight"], params.head.weight, (1,))
    with pytest.raises(ValueError, match=r"quantize: 'features/weight' has 4 axes, and neither its path nor its rank"):
        quantized(params, where=r".*weight")


def test_torchs_layout_in_functional_code() -> None:
    params = {"up": normal(8, 4), "down": normal(3, 8)}
    x = normal(2, 4)
    roles = jc.roles(lambda p, x: jax.nn.relu(x @ p["up"].T) @ p["down"].T)(params, x)
    found = quantized(params, roles)
    assert_channels(found["up"], params["up"], (1,))
    assert_channels(found["down"], params["down"], (1,))
    assert_groups(quantized(params, roles, jc.Groups(4))["down"], params["down"], 1, 4)
    assert_channels(quantized(params)["up"], params["up"], (0,))  # by name alone the outputs are last


class Layer(nn.Module):
    """One of the layers that are scanned over."""

    @nn.compact
    def __call__(self, x: jax.Array, _) -> tuple[jax.Array, None]:
        return nn.relu(nn.Dense(8, use_bias=False)(x)), None


@jax.numpy_rank_promotion("allow")
def test_stacked_layers_have_scales_and_groups_of_their_own() -> None:
    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    x = normal(2, 8)
    params = stack.init(jax.random.key(0), x, None)["params"]
    roles = jc.roles(lambda p, x: stack.apply({"params": p}, x, None)[0])(params, x)
    ((path, w),) = leaves_with_paths(params)[0]
    w = w * jnp.asarray([1.0, 10.0, 100.0])[:, None, None]
    params = jax.tree.map(lambda _: w, params)
    assert_channels(quantized(params, roles)[path], w, (1,))
    assert_groups(quantized(params, roles, jc.Groups(4))[path], w, 1, 4)
    # Each layer of the stack is what it is alone.
    alone = [quantized({"kernel": w[i]}, per=jc.Groups(4))["kernel"].materialize() for i in range(3)]
    assert_same_bits(quantized(params, roles, jc.Groups(4))[path].materialize(), jnp.stack(alone))


@jax.numpy_rank_promotion("allow")
def test_heads_have_scales_of_their_own() -> None:
    """(in, heads, features) keeps heads and features; (heads, features, out) sums over both, in groups of features."""
    net = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, out_features=6)
    x = normal(1, 5, 4)
    params = net.init(jax.random.key(0), x)["params"]
    roles = jc.roles(lambda p, x: net.apply({"params": p}, x))(params, x)
    found, grouped = quantized(params, roles), quantized(params, roles, jc.Groups(2))
    for name in ("query", "key", "value"):
        assert_channels(found[f"{name}/kernel"], params[name]["kernel"], (0,))
        assert_groups(grouped[f"{name}/kernel"], params[name]["kernel"], 0, 2)
        assert found[f"{name}/bias"] is params[name]["bias"]
    assert_channels(found["out/kernel"], params["out"]["kernel"], (0, 1))
    assert_groups(grouped["out/kernel"], params["out"]["kernel"], 1, 2)


def test_a_tied_embedding_has_a_scale_a_row() -> None:
    params = {"embedding": normal(7, 4)}
    tokens = jnp.array([[0, 6, 3]])
    tied = jc.roles(lambda p, t: p["embedding"][t] @ p["embedding"].T)(params, tokens)
    looked_up = jc.roles(lambda p, t: p["embedding"][t])(params, tokens)
    for roles in (tied, looked_up, None):  # in a product, in a lookup alone, by its name
        assert_channels(quantized(params, roles)["embedding"], params["embedding"], (1,))
        assert_groups(quantized(params, roles, jc.Groups(2))["embedding"], params["embedding"], 1, 2)


def test_the_default_rule_is_what_the_products_multiply() -> None:
    params = {"w_beta": normal(4, 3), "positions": normal(5, 4), "v": normal(4)}
    roles = jc.roles(lambda p, x: (x + p["positions"]) @ p["w_beta"] + (x @ p["v"])[:, None])(params, normal(5, 4))
    found = quantized(params, roles)
    assert isinstance(found["w_beta"], jc.quantization.Quantized)
    assert found["positions"] is params["positions"]
    assert found["v"] is params["v"]
    with pytest.raises(ValueError, match=r"quantize: 'positions' is in no product of the program .* 'w_beta', 'v'"):
        quantized(params, roles, where="positions")
    everywhere = quantized(params, roles, jc.Tensor(), where=jc.core.everything)  # no axis is asked for
    assert all(leaf.scale.size == 1 for leaf in everywhere.values())


LAYOUTS = {
    "tensor": (jc.Tensor(), (1, 1, 1)),
    "named": (jc.Channels((0, -1)), (2, 1, 3)),
    "one": (jc.Channels(1), (1, 4, 1)),
    "groups": (jc.Groups(2, 1), (2, 2, 3)),
    "tiles": (jc.core.Tiles((2, 3)), (2, 2, 1)),
}


@pytest.mark.parametrize("name", quick(LAYOUTS, "groups", "named"))
def test_layouts_that_name_their_axes_want_no_roles(name) -> None:
    per, shape = LAYOUTS[name]
    params = {"w": normal(2, 4, 3)}
    assert quantized(params, per=per)["w"].scale.shape == shape
    assert jc.quantization.learned(params, jc.Int(4), per=per)["w"].scale.shape == shape
    assert adaround(params, jc.Int(4), per=per)["w"].scale.shape == shape
    blocks = jc.quantize(Blocked(jc.Int(4), E8M0()), per=per).apply((), params)["w"]
    assert blocks.scale.shape == shape
    assert_same_bits(jc.pack(blocks).materialize(), blocks.materialize())


def test_buckets_take_scales_on_a_grid_of_their_own() -> None:
    params = {"w": normal(2, 4, 3)}
    leaf = jc.quantize(Blocked(jc.Int(8, narrow=True), E8M0()), per=jc.core.Buckets(5)).apply((), params)["w"]
    assert isinstance(leaf, Folded)
    rows = np.pad(np.asarray(params["w"]).reshape(-1), (0, 1)).reshape(5, 5)
    step = 2.0 ** np.floor(np.log2(np.abs(rows).max(1, keepdims=True))) / 64
    want = (np.clip(np.round(rows / step), -127, 127) * step).reshape(-1)[:24].reshape(2, 4, 3)
    np.testing.assert_array_equal(leaf.materialize(), want)


@pytest.mark.parametrize("make", ["quantize", "learned", "adaround"])
@pytest.mark.parametrize("per", [jc.Channels(), jc.Groups(2)], ids=["channels", "groups"])
def test_axes_that_are_not_settled_are_asked_for(make, per) -> None:
    params = {"stack": {"kernel": normal(3, 4, 4)}}
    makers = {
        "quantize": lambda p, **slots: jc.quantize(**slots).init(p),
        "learned": jc.quantization.learned,
        "adaround": adaround,
    }
    message = (
        rf"{make}: 'stack/kernel' has 3 axes, and neither its path nor its rank settles which of them a product sums"
        r" over; pass roles=jaxcomp\.roles\(fn\)\(params, \*args\), or name the axes yourself, as in per=Channels\(\(0,"
        r" -1\)\)\."
    )
    with pytest.raises(ValueError, match=message):
        makers[make](params, per=per)


def test_an_axis_that_is_summed_and_kept_is_named() -> None:
    params = {"w": normal(4, 4)}
    roles = jc.roles(lambda p, x: (x @ p["w"], x @ p["w"].T))(params, normal(2, 4))
    with pytest.raises(ValueError, match=r"quantize: 'w' has an axis that products sum over and keep, both"):
        jc.quantize(roles=roles).init(params)
    assert quantized(params, roles, jc.Channels(-1))["w"].scale.shape == (1, 4)


def test_learned_scales_and_rounding_follow_the_roles() -> None:
    params, roles = eqx_net()
    for tree in (jc.quantization.learned(params, jc.Int(4), roles=roles), adaround(params, jc.Int(4), roles=roles)):
        assert tree.features.weight.scale.shape == (6, 1, 1, 1)
        assert tree.head.weight.scale.shape == (5, 1)
        assert tree.head.bias is params.head.bias


@pytest.mark.parametrize(
    ("name", "u", "v"), [("kernel", (1, 2), (1, 8)), ("weight", (6, 1), (2, 1))], ids=["outputs last", "outputs first"]
)
def test_factors_know_their_own_axes(name, u, v) -> None:
    """``x @ u @ v``, or ``x @ v.T @ u.T`` where outputs are first: each sums over its inputs, then over the rank."""
    params = {name: normal(6, 8)}
    t = jc.chain(jc.low_rank(2), jc.quantize(jc.Int(8)))
    leaf = t.apply(t.init(params), params)[name]
    assert (leaf.u.scale.shape, leaf.v.scale.shape) == (u, v)


@pytest.mark.slow
def test_recipes_are_a_grid_and_groups() -> None:
    params, roles = eqx_net()
    w, slots = params.head.weight, {"roles": roles, "where": "head/weight"}
    for recipe, size in ((jc.recipes.mx(block=3, **slots), 3), (jc.recipes.nf4(2, **slots), 2)):
        assert recipe.apply(recipe.init(params), params).head.weight.scale.shape == (5, 6 // size)
    wide = {"weight": normal(5, 32)}
    assert jc.recipes.nvfp4().apply((), wide)["weight"].scale.shape == (5, 2)
    alone = jc.quantize(Blocked(jc.quantization.E2M1, E8M0()), per=jc.Groups(3, 1)).apply((), {"w": w})["w"]
    found = jc.recipes.mx(block=3, **slots).apply((), params).head.weight
    assert_same_bits(found.materialize(), alone.materialize())
    deep = jc.recipes.deep_compression(0.5, 4, roles=roles)
    seen = deep.apply(deep.init(params), params)
    assert len(np.unique(np.asarray(jc.materialize(seen).head.weight))) <= 5
    assert seen.head.bias is params.head.bias
