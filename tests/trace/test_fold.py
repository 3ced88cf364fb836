"""Folding: the same output, fewer equations, and nothing folded that must not be."""

from __future__ import annotations

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcomp.trace.fold import Fold, fold_batch_norm
from jaxcomp.trace.program import trace
from tests.trace.models import CASES, KEY, normal, variables_of


def primitives(fn, *args):
    return [op.name for op in trace(fn, *args).flow.ops]


def check(fn, params, x, *, tolerance=1e-5):
    folded = fold_batch_norm(fn)(params, x)
    expected = eqx.filter_jit(fn)(params, x)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(
        eqx.filter_jit(folded.fn)(folded.params, x), expected, rtol=tolerance, atol=tolerance * scale
    )
    return folded


class Layers(nn.Module):
    """Convolutions of every kind, each followed by a batch norm."""

    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        for conv in (
            nn.Conv(6, (3, 3), use_bias=self.use_bias),
            nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False),
            nn.Conv(9, (3, 3), feature_group_count=3),
            nn.ConvTranspose(4, (2, 2), strides=(2, 2), transpose_kernel=False),
        ):
            x = nn.relu(nn.BatchNorm(use_running_average=True, use_bias=self.use_bias)(conv(x)))
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(5)(x.mean((1, 2))))
        return nn.DenseGeneral((2, 3))(x)


@pytest.mark.parametrize("use_bias", [True, False])
def test_flax_batch_norms_vanish(use_bias):
    x = normal(0, 2, 6, 6, 3)
    model = Layers(use_bias)
    variables = variables_of(model, x)
    folded = check(model.apply, variables, x)
    assert len(folded.folds) == 5
    assert len(jax.tree.leaves(folded.params)) == 6 * 2
    names = primitives(folded.fn, folded.params, x)
    assert "rsqrt" not in names
    assert not {"sub", "mul"} & set(names)
    assert "rsqrt" in primitives(model.apply, variables, x)
    doubled = jnp.concatenate([x, x])
    twice = jax.jit(folded.fn)(folded.params, doubled)
    np.testing.assert_allclose(twice[2:], twice[:2], rtol=1e-6)


def test_other_containers():
    fn, state, x = CASES["nnx_net"]()
    folded = check(fn, state, x)
    assert [f.path for f in folded.folds] == ["conv/kernel"]
    assert folded.folds[0].bias == "norm/bias"
    assert isinstance(folded.params, nnx.State)

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        scale: jax.Array

        def __call__(self, x):
            return jax.nn.relu(self.conv(x) * self.scale[:, None, None])

    net = Net(eqx.nn.Conv2d(3, 4, 3, key=KEY), normal(1, 4))
    (fold,) = check(lambda m, x: jax.vmap(m)(x), net, normal(2, 2, 3, 6, 6)).folds
    assert fold == Fold("conv/weight", "scale", ("conv/bias",)) or fold == Fold("conv/weight", "conv/bias", ("scale",))


def test_layers_in_a_scan_are_folded_one_by_one():
    def fn(p, x):
        def layer(h, w):
            @jax.checkpoint
            def block(h):
                y = h @ w["kernel"] + w["bias"]
                return jnp.tanh((y - w["mean"]) * (w["scale"] / jnp.sqrt(w["var"] + 1e-3)) + w["shift"])

            return block(h), None

        return jax.lax.scan(layer, x, p)[0]

    vectors = {name: normal(i, 3, 4) for i, name in enumerate(("bias", "mean", "scale", "shift"))}
    p = {"kernel": normal(9, 3, 4, 4), "var": jnp.abs(normal(8, 3, 4)), **vectors}
    folded = check(fn, p, normal(7, 2, 4))
    assert set(folded.folds[0].gone) == {"bias", "mean", "scale", "var"}
    assert folded.params["shift"].shape == (3, 4)
    assert "remat" in str(jax.make_jaxpr(folded.fn)(folded.params, normal(7, 2, 4)))


def test_a_shared_layer_in_a_loop_is_folded_once():
    def fn(p, x):
        def step(h, _):
            return jnp.tanh((h @ p["w"] - p["m"]) * p["s"]), None

        return jax.lax.scan(step, x, None, length=3)[0]

    p = {"w": normal(1, 4, 4), "m": normal(2, 4), "s": normal(3, 4)}
    assert check(fn, p, normal(4, 2, 4)).folds == (Fold("w", "s", ("m",)),)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: jnp.transpose((x @ p["w"]).reshape(1, 2, 1, 4), (0, 3, 1, 2)) * p["s"][:, None, None] + 1.0,
        lambda p, x: 3.0 - (2.0 * (x @ p["w"])) / p["s"],
        lambda p, x: p["w"].T @ x.T * p["s"][:, None] - p["b"][:, None],
        lambda p, x: jax.jit(lambda y: y * p["s"] + p["b"])(jax.jit(jnp.dot)(x, p["w"])),
        lambda p, x: (x @ p["w"]).astype("bfloat16").astype("float32") * p["s"] + p["b"],
        lambda p, x: jnp.einsum("bi,io->bo", x, p["w"]) * jax.nn.softplus(p["s"]) + p["b"] * 1e4,
        lambda p, x: (x @ p["w"].T.T) * jnp.broadcast_to(p["s"], (2, 4)),
    ],
)
def test_chains_in_many_dresses(fn):
    p = {"w": normal(1, 3, 4), "s": jnp.abs(normal(2, 4)) + 0.1, "b": normal(3, 4)}
    x = normal(4, 2, 3)
    tolerance = 1e-2 if "bfloat16" in str(jax.make_jaxpr(fn)(p, x)) else 1e-5
    folded = check(fn, p, x, tolerance=tolerance)
    assert len(folded.folds) == 1
    assert not {"mul", "div", "sub"} & set(primitives(folded.fn, folded.params, x))


def tied(p, x):
    return (x @ p["w"]) * p["s"] + (x @ p["w"])


def doubly_used(p, x):
    y = x @ p["w"]
    return y * p["s"] + jnp.sin(y)


def returned(p, x):
    y = x @ p["w"]
    return y * p["s"] + p["b"], y


def decayed(p, x):
    return (x @ p["w"]) * p["s"] + jnp.sum(p["w"] ** 2 * x.sum())


def masked(p, x):
    return (x @ (p["w"] * (p["w"] > 0))) * p["s"]


def by_row(p, x):
    return (x @ p["w"]) * p["b"][:2, None]


def by_argument(p, x):
    return (x @ p["w"]) * x.sum()


def just_a_bias(p, x):
    return x @ p["w"] + p["b"]


def squared(p, x):
    y = (x @ p["w"]) + p["b"]
    return y * y


def branched(p, x):
    return jax.lax.cond(x.sum() > 0, lambda: (x @ p["w"]) * p["s"], lambda: jnp.ones((2, 4)))


@pytest.mark.parametrize(
    "fn",
    [tied, doubly_used, returned, decayed, masked, by_row, by_argument, just_a_bias, squared, branched],
)  # fmt: skip
def test_what_must_not_be_folded_stays(fn):
    p = {"w": normal(1, 3, 4), "s": normal(2, 4), "b": normal(3, 4)}
    x = normal(4, 2, 3)
    folded = check(fn, p, x)
    assert folded.folds == ()
    chex.assert_trees_all_equal(folded.params, p)


def test_a_leaf_used_elsewhere_is_kept():
    def fn(p, x):
        return jnp.sin((x @ p["w"]) * p["s"] + p["b"]) * p["s"]

    p = {"w": normal(1, 3, 4), "s": normal(2, 4), "b": normal(3, 4)}
    folded = check(fn, p, normal(4, 2, 3))
    assert folded.folds == (Fold("w", "b", ()),)
    np.testing.assert_array_equal(folded.params["s"], p["s"])


def test_a_shared_norm_serves_two_layers():
    def fn(p, x):
        def norm(y):
            return (y - p["mean"]) * p["scale"] + p["shift"]

        return norm(jnp.sin(norm(x @ p["a"])) @ p["b"])

    names = ("mean", "scale", "shift")
    p = {"a": normal(1, 4, 4), "b": normal(2, 4, 4), **{n: normal(3 + i, 4) for i, n in enumerate(names)}}
    folded = check(fn, p, normal(9, 2, 4))
    assert len(folded.folds) <= 2


def test_gradients_and_the_wrong_tree():
    fn, state, x = CASES["linen_conv"]()
    folded = fold_batch_norm(fn)(state, x)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(folded.fn(p, x) ** 2)))(folded.params)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="takes the folded parameters"):
        folded.fn({"w": x}, x)
