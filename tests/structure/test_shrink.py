"""``shrink`` as a JAX transformation, the trees around it, and what it refuses."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxcomp.structure import Plan, channel_groups, check_shrink, mask, plan, shrink
from tests.structure.models import IMAGE, ResNet, filled, normal, plain, resnet, stack


def mlp(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"][None]) @ p["down"]


def mlp_parts(sparsity=0.5):
    params, x = plain({"up": (3, 8), "bias": (8,), "down": (8, 2)}), normal(5, 3)
    return params, x, plan(channel_groups(mlp)(params, x), params, sparsity=sparsity)


def test_works_under_jit_grad_vmap():
    params, x, half = mlp_parts()
    small, fn = half.take(params), shrink(mlp, half)
    want = mlp(mask(half)(params), x)
    np.testing.assert_allclose(jax.jit(fn)(small, x), want, atol=1e-5)
    rows = jax.vmap(fn, (None, 0))(small, x[:, None])
    np.testing.assert_allclose(rows[:, 0], want, atol=1e-5)
    got = jax.grad(lambda p: jnp.sum(fn(p, x) ** 2))(small)
    full = jax.grad(lambda p: jnp.sum(mlp(mask(half)(p), x) ** 2))(params)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), got, half.take(full))
    stacked = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), small)
    np.testing.assert_allclose(jax.vmap(fn, (0, None))(stacked, x)[0], want, atol=1e-5)


def test_shrunken_program_is_small():
    params, x, half = mlp_parts()
    text = str(jax.make_jaxpr(shrink(mlp, half))(half.take(params), x))
    assert "[5,4]" in text
    assert "[5,8]" not in text


def test_another_batch_size_and_bfloat16():
    params, _, half = mlp_parts()
    small = jax.tree.map(lambda w: w.astype(jnp.bfloat16), half.take(params))
    y = shrink(mlp, half)(small, jnp.ones((9, 3), jnp.bfloat16))
    assert (y.shape, y.dtype) == ((9, 2), jnp.bfloat16)


def test_relu_keeps_its_gradient_at_zero():
    params = {"up": jnp.zeros((2, 4)), "down": jnp.ones((4, 1))}

    def f(p, x):
        return jax.nn.relu(x @ p["up"]) @ p["down"]

    half = plan(channel_groups(f)(params, jnp.ones((1, 2))), params, sparsity=0.5)
    grads = jax.grad(lambda p: shrink(f, half)(p, jnp.ones((1, 2))).sum())(half.take(params))
    assert float(jnp.abs(grads["up"]).max()) == 0.0  # max(x, 0) alone would give 1/2


def test_custom_vjp_keeps_its_rule():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))

    def f(p, x):
        return (rounded(4 * (x @ p["up"]))) @ p["down"]

    params, x = plain({"up": (3, 6), "down": (6, 2)}), normal(4, 3)
    half = plan(channel_groups(f)(params, x), params, sparsity=0.5)
    assert check_shrink(f, half, params, x) < 1e-5
    got = jax.grad(lambda p: shrink(f, half)(p, x).sum())(half.take(params))
    want = jax.grad(lambda p: f(mask(half)(p), x).sum())(params)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), got, half.take(want))
    assert float(jnp.abs(got["up"]).max()) > 0


def test_custom_vjp_that_mixes_channels_in_its_rule_runs_at_full_size():
    @jax.custom_vjp
    def f_inner(x):
        return jnp.tanh(x)

    f_inner.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * jax.nn.softmax(x),))

    def f(p, x):
        return f_inner(x @ p["up"]) @ p["down"]

    params, x = plain({"up": (3, 6), "down": (6, 2)}), normal(4, 3)
    half = plan(channel_groups(f)(params, x), params, sparsity=0.5)
    got = jax.jit(jax.grad(lambda p: shrink(f, half)(p, x).sum()))(half.take(params))
    want = jax.grad(lambda p: f(mask(half)(p), x).sum())(params)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), got, half.take(want))


def test_train_mode_state_goes_round():
    case = resnet(train=True)
    half = plan(channel_groups(case.fn)(case.params, *case.args), case.params, sparsity=0.5)
    small = half.take(case.params)
    _, state = shrink(case.fn, half)(small, *case.args)
    assert jax.tree.map(jnp.shape, state["batch_stats"]) == jax.tree.map(jnp.shape, small["batch_stats"])
    shrink(case.fn, half)({**small, **state}, *case.args)


def test_layers_of_a_stack_keep_units_of_their_own():
    case = stack()
    groups = channel_groups(case.fn)(case.params, *case.args)
    assert [g.layers for g in groups] == [3] * 4
    hidden = next(g for g in groups if g.units == 12)
    half = plan(groups, case.params, sparsity=0.5)
    kept = half.kept[groups.groups.index(hidden)]
    assert kept.shape == (3, 6)
    assert len({tuple(row) for row in kept}) > 1
    assert check_shrink(case.fn, half, case.params, *case.args) < 1e-4


def test_layers_that_take_part_of_a_dimension_agree():
    def f(p, x):
        def layer(x, w):
            a, b = jnp.split(x @ w["up"], 2, -1)
            return x + (a * jax.nn.sigmoid(b)) @ w["down"], None

        return lax.scan(layer, x, p)[0]

    params, x = plain({"up": (3, 4, 12), "down": (3, 6, 4)}), normal(2, 4)
    groups = channel_groups(f)(params, x)
    assert [(g.units, g.layers) for g in groups] == [(6, None)]
    assert check_shrink(f, plan(groups, params, sparsity=0.5), params, x) < 1e-4


def test_through_means_shrinks_a_normed_stream():
    def f(p, x):
        h = x @ p["in"]
        h = h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6) * p["scale"][None]
        return h @ p["out"]

    params, x = plain({"in": (3, 8), "scale": (8,), "out": (8, 2)}), normal(4, 3)
    assert len(channel_groups(f)(params, x)) == 0
    groups = channel_groups(f, through_means=True)(params, x)
    assert [g.units for g in groups] == [8]
    assert check_shrink(f, plan(groups, params, sparsity=0.5), params, x) < 1e-5


def test_optimizer_state_shrinks_alike():
    module = ResNet()
    variables = filled(jax.eval_shape(module.init, jax.random.key(0), normal(*IMAGE)))
    half = plan(channel_groups(module.apply)(variables, normal(*IMAGE)), variables, sparsity=0.5)
    tx = optax.chain(optax.clip(1.0), optax.adamw(1e-3), optax.trace(0.9))
    state = tx.init(variables["params"])
    small = half.take_like(state, variables["params"])
    want = tx.init(half.take(variables)["params"])
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, want)
    assert jax.tree.structure(small) == jax.tree.structure(want)
    moments = jax.tree.map(lambda w: w + jnp.arange(w.size, dtype=w.dtype).reshape(w.shape), variables["params"])
    taken = half.take_like({"mu": moments}, variables["params"])["mu"]
    jax.tree.map(np.testing.assert_array_equal, taken, half.take({**variables, "params": moments})["params"])


def test_factored_state_is_refused():
    params, _, half = mlp_parts()
    with pytest.raises(ValueError, match=r"take_like: 'v/up' has shape \(3,\).*initialise the optimizer anew"):
        half.take_like({"v": {"up": jnp.zeros(3)}}, params)


def test_new_widths_build_the_same_module():
    class Net(nn.Module):
        widths: tuple[int, int]

        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.relu(nn.Conv(self.widths[0], (3, 3))(x)))
            return nn.Dense(2)(nn.gelu(nn.Dense(self.widths[1])(x.mean((1, 2)))))

    x = normal(*IMAGE)
    net = Net((8, 6))
    params = filled(jax.eval_shape(net.init, jax.random.key(0), x))
    half = plan(channel_groups(net.apply)(params, x), params, sparsity=0.5)
    widths = (half.widths["params/Conv_0/kernel"][-1], half.widths["params/Dense_1/kernel"][-1])
    assert widths == (4, 3)
    small = half.take(params)
    np.testing.assert_allclose(Net(widths).apply(small, x), shrink(net.apply, half)(small, x), atol=1e-5)


def test_shrinks_twice():
    params, x, half = mlp_parts()
    fn, small = shrink(mlp, half), half.take(params)
    quarter = plan(channel_groups(fn)(small, x), small, sparsity=0.5)
    assert quarter.counts == [2]
    assert check_shrink(fn, quarter, small, x) < 1e-5


def test_take_of_shapes_gives_shapes():
    params, _, half = mlp_parts()
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    assert {k: s.shape for k, s in half.take(shapes).items()} == half.widths


def test_free_outputs_may_shrink():
    def f(p, x):
        h = jnp.tanh(x @ p["up"])
        return {"y": h @ p["down"], "hidden": h}

    params, x = plain({"up": (3, 8), "down": (8, 2)}), normal(4, 3)
    assert len(channel_groups(f)(params, x)) == 0
    groups = channel_groups(f, free_outputs="hidden")(params, x)
    half = plan(groups, params, sparsity=0.5)
    assert shrink(f, half)(half.take(params), x)["hidden"].shape == (4, 4)
    assert check_shrink(f, half, params, x) < 1e-5


def test_values_that_are_not_zero_when_masked_freeze_what_sums_over_them():
    def f(p, x):
        a, b = jnp.cos(x @ p["a"]), jnp.exp(x @ p["b"])  # neither is zero at zero: their product is not either
        return jnp.sum(a * b, -1) + jnp.sum(jnp.sin(x @ p["c"]) * jnp.exp(x @ p["d"]), -1)

    params, x = plain(dict.fromkeys("abcd", (3, 4))), normal(5, 3)
    groups = channel_groups(f)(params, x)
    assert [g.paths for g in groups] == [("c", "d")]
    assert check_shrink(f, plan(groups, params, sparsity=0.5), params, x) < 1e-5


def test_unknown_primitive_is_frozen_named_and_refused_if_strict():
    def f(p, x):
        h = x @ p["up"]
        flipped = jax.pure_callback(lambda h: np.asarray(h)[:, ::-1], jax.ShapeDtypeStruct(h.shape, h.dtype), h)
        return flipped @ p["down"] + jnp.tanh(x @ p["a"]) @ p["c"]

    params, x = plain({"up": (3, 8), "down": (8, 2), "a": (3, 4), "c": (4, 2)}), normal(4, 3)
    groups = channel_groups(f)(params, x)
    assert [g.paths for g in groups] == [("a", "c")]
    assert [u.primitive for u in groups.unknown] == ["pure_callback"]
    assert "test_shrink.py" in groups.unknown[0].source
    assert "unknown primitive 'pure_callback'" in repr(groups)
    assert check_shrink(f, plan(groups, params, sparsity=0.5), params, x) < 1e-5
    with pytest.raises(NotImplementedError, match=r"primitive 'pure_callback' at .*test_shrink.py.*not known"):
        channel_groups(f, strict=True)(params, x)


def test_plan_for_another_tree():
    params, x, half = mlp_parts()
    for use in (half.take, mask(half), lambda p: shrink(mlp, half)(p, x)):
        with pytest.raises(ValueError, match=r"the tree has no 'bias'.*made for another tree"):
            use({"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))})
    with pytest.raises(ValueError, match=r"'bias' has shape \(8,\), the plan expects \(4,\)"):
        shrink(mlp, half)(params, x)
    with pytest.raises(ValueError, match=r"'bias' has shape \(4,\), the plan expects \(8,\)"):
        half.take(half.take(params))


def test_plan_of_another_function():
    params, x, half = mlp_parts()
    with pytest.raises(ValueError, match=r"shrink: at 'bias' axis 0 the plan separates .* same mode"):
        shrink(lambda p, x: jax.nn.softmax(x @ p["up"] + p["bias"][None]) @ p["down"], half)(half.take(params), x)


def test_bad_plans_and_arguments():
    params, x, half = mlp_parts()
    with pytest.raises(ValueError, match="at least one unit"):
        Plan(half.groups, (np.zeros(0, np.int64),))
    with pytest.raises(ValueError, match="rising unit numbers below 8"):
        Plan(half.groups, (np.array([3, 3]),))
    with pytest.raises(ValueError, match="1 groups need as many"):
        Plan(half.groups, ())
    with pytest.raises(KeyError, match="no parameter is named 'down2'"):
        half.groups.of("down2", 0)
    with pytest.raises(TypeError, match="must be the parameter tree"):
        channel_groups(lambda x, p: x)("relu", params)
    with pytest.raises(ValueError, match=r"take_like: params holds 'other'"):
        half.take_like({}, {"other": x})
