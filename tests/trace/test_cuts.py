"""Where programs are cut, and that their blocks one after another are the program."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.ptq import Layers, Scopes, Single, cut
from tests.marks import quick

rng = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def residual(p, x, shift):
    x = x @ p["stem"] + jnp.tanh(shift)
    for name in ("block_0", "block_1"):
        x = x + jax.jit(lambda q, x: jax.nn.relu(x @ q["up"]) @ q["down"])(p[name], x)
    return {"logits": x @ p["head"], "shift": shift, "two": 2.0}


RESIDUAL = {
    "stem": normal(3, 4),
    "block_0": {"up": normal(4, 5), "down": normal(5, 4)},
    "block_1": {"up": normal(4, 5), "down": normal(5, 4)},
    "head": normal(4, 2),
}
X, SHIFT = normal(6, 3), normal(1, 4)


def through(blocks, params, *args):
    values = ()
    for block in blocks:
        values = block(params, values, *args)
    return blocks.result(values)


CUTS = {"single": (Single(), 4), "layers": (Layers(), 6), "scopes": (Scopes("block"), 3)}


@pytest.mark.parametrize("name", quick(CUTS, "single", "scopes"))
def test_blocks_one_after_another_are_the_function(name) -> None:
    cuts, count = CUTS[name]
    blocks = cut(residual, cuts)(RESIDUAL, X, SHIFT)
    assert len(blocks) == count
    assert [path for block in blocks for path in block.sites] == [
        "stem", "block_0/up", "block_0/down", "block_1/up", "block_1/down", "head",
    ]  # fmt: skip
    found, wanted = through(blocks, RESIDUAL, X, SHIFT), residual(RESIDUAL, X, SHIFT)
    chex.assert_trees_all_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_blocks_that_are_alike_have_one_shape() -> None:
    blocks = cut(residual)(RESIDUAL, X, SHIFT)
    assert blocks[1].shape == blocks[2].shape
    assert len({block.shape for block in blocks}) == 3
    assert "block_0/up" in repr(blocks)


def scanned(p, x, mask):
    def layer(x, w):
        return x + jax.nn.relu(x * mask @ w), None

    return jax.lax.scan(layer, x @ p["stem"], p["layers"])[0] @ p["head"]


def remat(p, x, mask):
    x = x @ p["stem"]
    x = jax.checkpoint(lambda w, x: x + jnp.tanh(x @ w) * mask)(p["layers"][0], x)
    return x @ p["head"]


def shared(p, x, mask):
    x = x @ p["stem"]
    for _ in range(2):
        x = jnp.tanh(x @ p["layers"][0]) * mask
    return x @ p["head"]


def pre_norm(p, x, mask):
    x = x @ p["stem"]
    for w in p["layers"]:
        y = (x - x.mean(-1, keepdims=True)) * mask
        x = x + jax.nn.gelu(y @ w)
    return x @ p["head"]


NETS = {"scan": (scanned, 3), "remat": (remat, 3), "shared": (shared, 4), "pre-norm": (pre_norm, 4)}


@pytest.mark.parametrize("name", quick(NETS, "scan"))
def test_other_programs(name) -> None:
    net, count = NETS[name]
    params = {"stem": normal(3, 4), "layers": normal(2, 4, 4), "head": normal(4, 2)}
    mask = jnp.asarray([[1.0, 0.0, 1.0, 1.0]])
    blocks = cut(net)(params, X, mask)
    assert len(blocks) == count
    np.testing.assert_allclose(through(blocks, params, X, mask), net(params, X, mask), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_linen_module_under_jit() -> None:
    net = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)])
    params = net.init(jax.random.key(0), X)
    blocks = cut(jax.jit(net.apply))(params, X)
    assert [block.sites for block in blocks] == [("params/layers_0/kernel",), ("params/layers_2/kernel",)]
    assert blocks[0].paths == ("params/layers_0/bias", "params/layers_0/kernel")
    np.testing.assert_allclose(through(blocks, params, X), net.apply(params, X), rtol=1e-6, atol=1e-6)


def test_constants_are_read_by_blocks_that_are_alike() -> None:
    scales = [np.float32([[1, 2, 3, 4]]), normal(1, 4), normal(1, 4)]

    def net(p, x):
        for w, scale in zip(p, scales, strict=True):
            x = jnp.tanh(x @ w) * scale
        return x

    p, x = [normal(4, 4) for _ in scales], normal(5, 4)
    blocks = cut(net)(p, x)
    assert blocks[1].shape == blocks[2].shape
    assert blocks[0].shape != blocks[1].shape, "the first reads the function's argument, the others what was given"
    assert all((block.constants[0] == s).all() for block, s in zip(blocks, scales, strict=True))
    np.testing.assert_allclose(through(blocks, p, x), net(p, x), rtol=1e-6, atol=1e-6)


def test_arguments_that_are_no_arrays_are_held() -> None:
    def net(p, x, train):
        return jnp.tanh(x @ p["a"]) @ p["b"] if not train else x

    p = {"a": normal(3, 4), "b": normal(4, 2)}
    blocks = cut(net)(p, X, False)
    assert len(blocks) == 2
    np.testing.assert_allclose(through(blocks, p, X, False), net(p, X, False), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="the function has no site"):
        cut(lambda p, x: p["w"] * x)({"w": jnp.ones(2)}, jnp.ones(2))
    with pytest.raises(TypeError, match=r"cuts must be Single\(\), Layers\(\) or Scopes\(pattern\), got 3"):
        cut(residual, 3)
    with pytest.raises(ValueError, match=r"Scopes: '\(' is no regular expression"):
        Scopes("(")
    block = cut(residual)(RESIDUAL, X, SHIFT)[0]
    with pytest.raises(ValueError, match="the tree has no 'stem', which the block 'stem' reads"):
        block({"other": jnp.ones(2)}, (), X, SHIFT)


def test_a_block_may_have_no_parameters_and_what_lies_between_may_be_one():
    def attention(p, x):
        x = jnp.tanh(x @ p["stem"])
        q, k = x @ p["q"], x @ p["k"]
        x = x + jax.nn.softmax(q @ k.T) @ x
        return (x - x.mean()) @ p["head"]

    p = {"stem": normal(3, 4), "q": normal(4, 4), "k": normal(4, 4), "head": normal(4, 2)}
    for cuts, parameters in ((Layers(), [["stem"], ["q"], ["k"], [], [], ["head"]]), (Single(apart=True), None)):
        blocks = cut(attention, cuts)(p, X)
        chex.assert_trees_all_close(through(blocks, p, X), attention(p, X), rtol=1e-5)
        if parameters is not None:
            assert [list(block.paths) for block in blocks] == parameters
    assert [block.sites for block in blocks if not block.sites] == [(), ()]  # the tanh; the mean
