"""The evaluator: the identity is the identity bit for bit, and claims change what they claim."""

from __future__ import annotations

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomp.trace.evaluator import claims_of, evaluate, rewrite
from jaxcomp.trace.interpreter import Claim, Emitted, Monoid
from jaxcomp.trace.program import trace
from tests.marks import quick
from tests.trace.models import CASES, NOT_REVERSIBLE, normal

PRODUCTS = {"dot_general", "conv_general_dilated"}


def nothing(op):
    return None


def again(op):
    """Opens everything down to the products, and leaves them as they are."""
    return Claim(lambda *values: op.bind(*values)) if op.name in PRODUCTS else None


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def test_identity_is_bitwise(case):
    fn, params, x = case
    chex.assert_trees_all_equal(eqx.filter_jit(rewrite(fn, again))(params, x), eqx.filter_jit(fn)(params, x))


def test_identity_is_bitwise_without_jit(case):
    fn, params, x = case
    chex.assert_trees_all_equal(rewrite(fn, nothing)(params, x), fn(params, x))


GRADIENTS = ("linen_scan_remat", "custom_gradient", "branching", "rematerialized", "recurrent", "matmul")


@pytest.mark.parametrize("name", quick(sorted(CASES.keys() - NOT_REVERSIBLE), *GRADIENTS))
def test_gradients_are_the_same(name):
    fn, params, x = CASES[name]()

    def loss(f):
        return lambda p: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(f(p, x)))

    expected = eqx.filter_jit(eqx.filter_grad(loss(fn)))(params)
    chex.assert_trees_all_close(
        eqx.filter_jit(eqx.filter_grad(loss(rewrite(fn, again))))(params), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["matmul", "stacked_scan", "branching", "rematerialized", "while_and_fori"])
def test_composes_with_vmap(name):
    fn, params, x = CASES[name]()
    many = jnp.stack([x, 2 * x, -x])
    mapped = jax.jit(jax.vmap(rewrite(fn, again), (None, 0)))(params, many)
    chex.assert_trees_all_close(mapped, jax.jit(jax.vmap(fn, (None, 0)))(params, many), rtol=1e-5, atol=1e-6)


def test_custom_rules_stay():
    def fn(p, x):
        return jnp.sum(jax.nn.relu(x * p))

    zero = jnp.zeros(3)
    gradient = jax.grad(rewrite(fn, lambda op: Claim(lambda a, b: [a * b]) if op.name == "mul" else None))
    np.testing.assert_array_equal(gradient(jnp.ones(3), zero), jnp.zeros(3))
    assert jax.grad(rewrite(fn, nothing), 1)(jnp.ones(3), zero).sum() == 0.0  # an opened relu would give 1.5

    fn, params, x = CASES["custom_gradient"]()
    expected = 2 * jax.grad(lambda p: jnp.sum(x @ p["w"]))(params)["w"]
    np.testing.assert_allclose(jax.grad(rewrite(fn, again))(params, x)["w"], expected, rtol=1e-6)


def test_remat_and_scan_are_kept():
    fn, params, x = CASES["linen_scan_remat"]()
    text = str(jax.make_jaxpr(rewrite(fn, again))(params, x))
    assert text.count("scan[") == 1
    assert "remat" in text or "checkpoint" in text


def test_claims_replace_equations():
    fn, params, x = CASES["matmul"]()
    halved = rewrite(
        fn, lambda op: Claim(lambda *v: [y / 2 for y in op.bind(*v)]) if op.name == "dot_general" else None
    )
    bias = params["b"][1]
    np.testing.assert_allclose(halved(params, x), (fn(params, x) - bias) / 4 + bias, rtol=1e-5)


def test_parameters_of_an_equation_can_change():
    def handler(op):
        if op.name != "dot_general":
            return None
        return Claim(lambda *v: op.bind(*v, precision=(jax.lax.Precision.HIGHEST,) * 2))

    fn, params, x = CASES["matmul"]()
    assert "HIGHEST" not in str(jax.make_jaxpr(fn)(params, x))
    assert str(jax.make_jaxpr(rewrite(fn, handler))(params, x)).count("HIGHEST") == 4


def test_names_stay_for_the_profiler():
    fn, params, x = CASES["linen_conv"]()
    text = jax.jit(rewrite(fn, again)).lower(params, x).as_text(debug_info=True)
    assert "ConvNet/Conv_0" in text
    assert "ConvNet/BatchNorm_0" in text


def test_sharded_inputs_stay_sharded():
    fn, params, x = CASES["matmul"]()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    out = jax.jit(rewrite(fn, again))(params, x)
    np.testing.assert_array_equal(out, jax.jit(fn)(params, x))


LARGEST = Monoid(lambda s: jnp.full(s.shape, -jnp.inf, s.dtype), jnp.maximum)


def largest_inputs(fn, params, x, *, side=None, collect=LARGEST):
    """The largest input of each dot, named by its weight, with a number added that is handed in."""
    program = trace(fn, params, x)

    def handler(op):
        if op.name != "dot_general":
            return None

        def run(extra, *values):
            assert extra.shape == ()
            return Emitted(op.bind(*values), {op.tags[1].origin.path: jnp.max(values[0]) + extra})

        return Claim(run, jnp.zeros(op.layer_steps) if side is None else side)

    run = jax.jit(lambda *v: evaluate(program, claims_of(program, handler), program.flatten(*v), collect=collect))
    return run(params, x)


def test_emissions_of_layers_are_stacked_and_sides_sliced():
    fn, params, x = CASES["stacked_scan"]()
    result = largest_inputs(fn, params, x, side=jnp.asarray([0.0, 10.0, 20.0]))
    h1 = jnp.tanh(x @ params["w"][0] + params["b"][0])
    h2 = jnp.tanh(h1 @ params["w"][1] + params["b"][1])
    np.testing.assert_allclose(result.aux["w"], [x.max(), h1.max() + 10, h2.max() + 20], rtol=1e-6)
    chex.assert_trees_all_close(result.out, fn(params, x), rtol=1e-6)


def test_sides_and_emissions_pass_through_remat():
    fn, params, x = CASES["rematerialized"]()
    result = largest_inputs(fn, params, x, side=jnp.asarray(5.0))
    np.testing.assert_allclose(result.aux["a"], x.max() + 5, rtol=1e-6)
    assert set(result.aux) == {"a", "b"}


def test_emissions_of_other_loops_are_merged():
    fn, params, x = CASES["recurrent"]()
    result = largest_inputs(fn, params, x)
    np.testing.assert_allclose(result.aux["wx"], x.max(), rtol=1e-6)
    np.testing.assert_allclose(result.aux["wh"], jnp.maximum(0, fn(params, x)[1:].max()), rtol=1e-6)
    fn, params, x = CASES["while_and_fori"]()
    assert largest_inputs(fn, params, x).aux["w"] >= x.max()


def test_branches_not_taken_emit_nothing():
    fn, params, x = CASES["branching"]()
    x = jnp.abs(x)
    aux = largest_inputs(fn, params, x).aux
    assert aux["b"] == -jnp.inf
    np.testing.assert_allclose(aux["a"], jnp.maximum(x.max(), (x @ params["a"]).max()), rtol=1e-6)


def test_shrunken_values_run_through_open_equations():
    def fn(p, x):
        h = jax.jit(lambda x: jax.lax.scan(lambda c, w: (c * 2, c @ w), x, p["w"])[1])(x)
        return h.sum(0)

    params, x = {"w": normal(1, 3, 4, 6)}, normal(2, 2, 4)
    program = trace(fn, params, x)
    small = {"w": params["w"][..., :5]}
    out = evaluate(program, {}, program.flatten(small, x)).out
    np.testing.assert_allclose(out, fn(small, x), rtol=1e-6)


def test_errors_say_what_to_do():
    fn, params, x = CASES["matmul"]()
    program = trace(fn, params, x)
    with pytest.raises(ValueError, match="stand at no equation"):
        evaluate(program, {(99,): Claim(lambda *v: v)}, program.flatten(params, x))
    with pytest.raises(ValueError, match="must return a list of 1 results"):
        rewrite(fn, lambda op: Claim(lambda *v: []) if op.name == "add" else None)(params, x)
    with pytest.raises(ValueError, match=r"give collect=Monoid"):
        largest_inputs(*CASES["recurrent"](), collect=None)
    with pytest.raises(TypeError, match="must be the parameter tree"):
        trace(lambda x: x, 3.0)
    with pytest.raises(ValueError, match="was given another tree"):
        program.flatten({"a": x}, x)
    boxed = {**params, "a": {"codes": params["a"]}}
    with pytest.raises(TypeError, match="is no array"):
        evaluate(program, {}, program.flatten(boxed, x))
    opened = evaluate(program, {}, program.flatten(boxed, x), to_array=lambda box: box["codes"])
    np.testing.assert_array_equal(opened.out, fn(params, x))
